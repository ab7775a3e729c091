"""Playing episodes: the only place where policy and env meet.

`collect` is the one loop behind collect, ppo and eval; what differs between them is the policy. It knows nothing of
disks, gradients or tokens.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
    on_episode: Callable[[Trajectory], None] | None = None,
) -> Iterator[Trajectory]:
    """Play one whole episode a seed and yield them in the order of `seeds`.

    All active slots take each turn together; a slot whose episode ends takes the next seed. An episode's randomness
    is its own, drawn from (run_seed, seed), so neither the number of slots nor the other episodes decide its outcome
    (but for the rounding of a model that sees other batches). Equal seeds give equal episodes.
    A reply without a legal action costs `invalid_penalty`. `on_episode` is called as each episode ends, in any order.
    """
    waiting = deque(_Episode(seed, np.random.default_rng([run_seed, seed])) for seed in seeds)
    unyielded = waiting.copy()
    active: dict[int, _Episode] = {}
    while unyielded:
        _refill(envs, active, waiting)
        _play_turn(envs, active, policy, prompt_format, invalid_penalty)
        for trajectory in _settle(envs, active, policy, prompt_format):
            if on_episode is not None:
                on_episode(trajectory)
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
            episode.error = str(answer)
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
            episode.error = str(step)
            continue
        if parsed.action is None:
            step = replace(step, reward=step.reward - invalid_penalty)
        episode.turns.append(Turn(query.observation, query.prompt, reply, parsed, step))
        episode.now = step.observation


def _settle(
    envs: EnvPool, active: dict[int, _Episode], policy: Policy, prompt_format: PromptFormat
) -> Iterator[Trajectory]:
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
        yield episode.result


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


def summarise(trajectories: Sequence[Trajectory], prefix: str = "rollout") -> dict[str, float]:
    """Means over episodes, turns or replies; `env_errors` is a count, and those episodes are in no mean.

    `reply_tokens` and `entropy` are there if a model sampled. TrainingError if no episode is usable.
    """
    played = [trajectory for trajectory in trajectories if trajectory.stop != "env_error"]
    if not played:
        causes = {trajectory.error for trajectory in trajectories}
        raise TrainingError(f"none of {len(trajectories)} episodes came to an end; env errors: {causes or 'none'}")
    turns = [turn for trajectory in played for turn in trajectory.turns]
    replies = [turn.reply for turn in turns]
    metrics = {
        "success": np.mean([trajectory.success for trajectory in played]),
        "return": np.mean([trajectory.total_reward for trajectory in played]),
        "positive_return": np.mean([trajectory.total_reward > 0 for trajectory in played]),
        "episode_length": len(turns) / len(played),
        "time_limit_rate": np.mean([trajectory.turns[-1].step.truncated for trajectory in played]),
        "env_errors": len(trajectories) - len(played),
        "invalid_rate": np.mean([turn.parsed.action is None for turn in turns]),
        "loop_rate": sum(_repeats(trajectory) for trajectory in played) / len(turns),
        "random_rate": np.mean([is_random(reply) for reply in replies]),
        "truncated_rate": np.mean([reply.finish == "length" for reply in replies]),
    }
    if entropies := [reply.entropy for reply in replies if reply.token_ids and reply.entropy is not None]:
        metrics["reply_tokens"] = np.mean([len(reply.token_ids) for reply in replies if reply.token_ids])
        metrics["entropy"] = np.mean(entropies)
    return {f"{prefix}/{name}": float(value) for name, value in metrics.items()}


def _repeats(trajectory: Trajectory) -> int:
    """How many turns did in a state what had been done in that state before."""
    done = {(turn.observation.state_key, turn.parsed.action) for turn in trajectory.turns}
    return len(trajectory.turns) - len(done)
