"""Playing episodes: the only place where policy and env meet.

`collect` is the one loop behind collect, ppo and eval; what differs between them is the policy. It knows nothing of
disks, gradients or tokens.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlm_agents.env_pool import EnvPool
from vlm_agents.errors import DataError, EnvError, TrainingError
from vlm_agents.policies import Policy, is_random
from vlm_agents.prompting import PromptFormat
from vlm_agents.types import Observation, Query, Stop, Trajectory, Turn


@dataclass(slots=True)
class _Episode:
    """An episode that waits, is under way, or has its `result`."""

    seed: int
    rng: np.random.Generator
    now: Observation | None = None
    turns: list[Turn] = field(default_factory=list)
    error: str | None = None
    result: Trajectory | None = None

    @property
    def truncated(self) -> bool:
        return self.error is None and bool(self.turns) and self.turns[-1].step.truncated

    @property
    def over(self) -> bool:
        return self.error is not None or self.truncated or (bool(self.turns) and self.turns[-1].step.terminated)

    def fail(self, env: str, error: EnvError) -> None:
        self.error = f"{env}, seed {self.seed}: {error}"

    def query(self, instructions: str, prompt_format: PromptFormat) -> Query:
        assert self.now is not None
        try:
            prompt = prompt_format.prompt(instructions, self.turns, self.now)
        except DataError as error:
            raise DataError(f"seed {self.seed}, turn {len(self.turns)}: {error}") from error
        return Query(prompt, self.now, self.rng)


def collect(
    envs: EnvPool,
    policy: Policy,
    prompt_format: PromptFormat,
    seeds: Sequence[int],
    *,
    invalid_penalty: float,
    run_seed: int,
) -> Iterator[Trajectory]:
    """Play one whole episode a seed and yield them in the order of `seeds`.

    All active slots take each turn together; a slot whose episode ends takes the next seed. An episode's randomness
    is its own, drawn from (run_seed, seed), so neither the number of slots nor the other episodes decide its outcome
    (but for the rounding of a model that sees other batches). Equal seeds give equal episodes.
    A reply without a legal action costs `invalid_penalty`.
    """
    waiting = deque(_Episode(seed, np.random.default_rng([run_seed, seed])) for seed in seeds)
    unyielded = waiting.copy()
    active: dict[int, _Episode] = {}
    while unyielded:
        _refill(envs, active, waiting)
        _play_turn(envs, active, policy, prompt_format, invalid_penalty)
        _settle(envs, active, policy, prompt_format)
        while unyielded and (result := unyielded[0].result) is not None:
            unyielded.popleft()
            yield result


def _refill(envs: EnvPool, active: dict[int, _Episode], waiting: deque[_Episode]) -> None:
    """Start the next episodes in the slots that are free."""
    free = [slot for slot in range(envs.num_envs) if slot not in active]
    starting = {slot: waiting.popleft() for slot in free[: len(waiting)]}
    for slot, answer in envs.reset({slot: episode.seed for slot, episode in starting.items()}).items():
        episode = starting[slot]
        if isinstance(answer, EnvError):
            episode.fail(envs.name, answer)
        else:
            episode.now = answer
    active |= starting


def _play_turn(
    envs: EnvPool, active: dict[int, _Episode], policy: Policy, prompt_format: PromptFormat, invalid_penalty: float
) -> None:
    """Ask, read and play one turn of every episode that could be started."""
    playing = {slot: episode for slot, episode in active.items() if not episode.over}
    if not playing:
        return
    queries = [episode.query(envs.instructions, prompt_format) for episode in playing.values()]
    replies = policy.reply(queries)
    readings = [
        prompt_format.parse(reply.text, query.observation.legal_actions, query.rng)
        for query, reply in zip(queries, replies, strict=True)
    ]
    steps = envs.step({slot: parsed.action for slot, parsed in zip(playing, readings, strict=True)})
    for (slot, episode), query, reply, parsed in zip(playing.items(), queries, replies, readings, strict=True):
        step = steps[slot]
        if isinstance(step, EnvError):
            episode.fail(envs.name, step)
            continue
        if parsed.action is None:
            step = replace(step, reward=step.reward - invalid_penalty)
        episode.turns.append(Turn(query.observation, query.prompt, reply, parsed, step))
        episode.now = step.observation


def _settle(envs: EnvPool, active: dict[int, _Episode], policy: Policy, prompt_format: PromptFormat) -> None:
    """Take the episodes that are over out of their slots and write their results."""
    over = [slot for slot, episode in active.items() if episode.over]
    truncated = [slot for slot in over if active[slot].truncated]
    queries = [active[slot].query(envs.instructions, prompt_format) for slot in truncated]
    bootstraps = dict(zip(truncated, policy.value(queries) if queries else (), strict=True))
    for slot in over:
        episode = active.pop(slot)
        episode.result = Trajectory(
            env=envs.name,
            seed=episode.seed,
            policy=policy.name,
            turns=tuple(episode.turns),
            stop=_stop(episode),
            bootstrap=bootstraps.get(slot, 0.0),
            error=episode.error,
        )


def _stop(episode: _Episode) -> Stop:
    """Why an episode ended. `invalid`: without success, and not one of its replies held a legal action.

    An env_error keeps the turns before it, whose outcome is unknown: nothing to train on, nothing to average.
    """
    if episode.error is not None:
        return "env_error"
    if episode.turns[-1].step.metrics["success"]:
        return "success"
    if all(turn.parsed.action is None for turn in episode.turns):
        return "invalid"
    return "time_limit" if episode.truncated else "failure"


def summarise(trajectories: Iterable[Trajectory], prefix: str = "rollout") -> dict[str, float]:
    """Means over episodes, turns or replies; `env_errors` is a count, and those episodes are in no mean.

    `reply_tokens` and `entropy` are there if a model sampled; `steps_over_expert`, the turns that a solved episode took
    over those that the expert would need, if an expert counts them. TrainingError if no episode is usable.
    The episodes are gone through once and not kept: they may be more than fit into memory.
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    errors: list[str] = []
    for trajectory in trajectories:
        if trajectory.stop == "env_error":
            errors.append(str(trajectory.error))
            continue
        for name, found in _figures(trajectory).items():
            values[name] += found
    if not values:
        told = f"mend the env. The first error: {errors[0]}" if errors else "none was played"
        raise TrainingError(f"none of {len(errors)} episodes came to an end: {told}")
    means = {name: float(np.mean(found)) for name, found in values.items() if found}
    return {f"{prefix}/{name}": value for name, value in {**means, "env_errors": float(len(errors))}.items()}


def _figures(trajectory: Trajectory) -> dict[str, list[float]]:
    """What an episode, each of its turns or each of its replies adds to a mean."""
    turns = trajectory.turns
    sampled = [turn.reply for turn in turns if turn.reply.token_ids and turn.reply.entropy is not None]
    advice = turns[0].observation.advice
    needed = advice.distance if advice is not None and trajectory.success else None
    return {
        "success": [trajectory.success],
        "return": [trajectory.total_reward],
        "positive_return": [trajectory.total_reward > 0],
        "episode_length": [len(turns)],
        "steps_over_expert": [len(turns) / needed] if needed else [],
        "time_limit_rate": [turns[-1].step.truncated],
        "failure_rate": [trajectory.stop == "failure"],
        "all_invalid_rate": [trajectory.stop == "invalid"],
        "invalid_rate": [turn.parsed.action is None for turn in turns],
        "loop_rate": _repeats(turns),
        "random_rate": [is_random(turn.reply) for turn in turns],
        "truncated_rate": [turn.reply.finish == "length" for turn in turns],
        "reply_tokens": [len(reply.token_ids) for reply in sampled],
        "entropy": [reply.entropy for reply in sampled if reply.entropy is not None],
    }


def _repeats(turns: Sequence[Turn]) -> list[float]:
    """Which turns did in a state what had been done in that state before."""
    done: set[tuple[str, str | None]] = set()
    repeats: list[float] = []
    for turn in turns:
        deed = turn.observation.state_key, turn.parsed.action
        repeats.append(deed in done)
        done.add(deed)
    return repeats
