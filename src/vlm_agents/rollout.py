"""Playing episodes: the only place where policy and env meet.

`collect` is the one loop behind collect, ppo and eval; what differs between them is the policy. It knows nothing of
disks, gradients or tokens.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm_agents.env_pool import EnvPool
from vlm_agents.errors import DataError, EnvError, TooLongError
from vlm_agents.experts import Advising
from vlm_agents.policies import Policy
from vlm_agents.prompting import PromptFormat, drawn
from vlm_agents.seeds import Deal
from vlm_agents.types import Observation, Query, Stop, Trajectory, Turn

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Episode:
    """An episode that waits, is under way, or has its `result`."""

    deal: Deal
    rng: np.random.Generator
    now: Observation | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    broken: str | None = None
    too_long: str | None = None
    result: Trajectory | None = None

    @property
    def truncated(self) -> bool:
        return self.broken is None and bool(self.turns) and self.turns[-1].step.truncated

    @property
    def over(self) -> bool:
        ended = bool(self.turns) and (self.turns[-1].step.terminated or self.turns[-1].step.truncated)
        return ended or self.broken is not None or self.too_long is not None

    def start(self, now: Observation) -> None:
        self.now, self.tags = now, now.tags

    def fail(self, env: str, error: EnvError) -> None:
        self.broken = f"{env}, seed {self.deal.seed}: {error}"

    def query(self, instructions: str, prompt_format: PromptFormat) -> Query | None:
        """What is to be asked next; None, and then `too_long` or `broken` says so, where that can't be asked."""
        assert self.now is not None
        try:
            return Query(prompt_format.prompt(instructions, self.turns, self.now), self.now, self.rng)
        except TooLongError as error:
            self.too_long = f"seed {self.deal.seed}, turn {len(self.turns)}: {error}"
            logger.warning("too long for the model: %s", self.too_long)
        except DataError as error:  # as of a picture that its image processor refuses
            self.broken = f"seed {self.deal.seed}, turn {len(self.turns)}: no model can be asked this: {error}"
            logger.warning("%s", self.broken)
        return None


def collect(
    envs: EnvPool,
    policy: Policy,
    deals: Sequence[Deal],
    *,
    run_seed: int,
    advice: Advising | None = None,
) -> Iterator[Trajectory]:
    """Play one whole episode a deal and yield them in the order of `deals`.

    All active slots take each turn together; a slot whose episode ends takes the next deal. An episode's start hangs
    on its seed alone, its randomness on (run_seed, seed, member), so neither the number of slots nor the other episodes
    decide its outcome (but for the rounding of a model that sees other batches). Equal deals give equal episodes.
    A prompt that a model can't take ends its episode. `advice`: where less of the expert's is wanted than `envs` was
    opened for.
    """
    waiting = deque(_Episode(deal, np.random.default_rng([run_seed, *deal])) for deal in deals)
    unyielded = waiting.copy()
    active: dict[int, _Episode] = {}
    while unyielded:
        _refill(envs, active, waiting, advice)
        _play_turn(envs, active, policy)
        _settle(envs, active, policy)
        while unyielded and (result := unyielded[0].result) is not None:
            unyielded.popleft()
            yield result


def _refill(envs: EnvPool, active: dict[int, _Episode], waiting: deque[_Episode], advice: Advising | None) -> None:
    """Start the next episodes in the slots that are free."""
    free = [slot for slot in range(envs.num_envs) if slot not in active]
    starting = {slot: waiting.popleft() for slot in free[: len(waiting)]}
    for slot, answer in envs.reset({slot: one.deal.seed for slot, one in starting.items()}, advice).items():
        episode = starting[slot]
        if isinstance(answer, EnvError):
            episode.fail(envs.name, answer)
        else:
            episode.start(answer)
    active |= starting


def _play_turn(envs: EnvPool, active: dict[int, _Episode], policy: Policy) -> None:
    """Ask, read and play one turn of every episode that could be started."""
    queries = _queries(active, [slot for slot in active if not active[slot].over], envs.instructions, policy.format)
    if not queries:
        return
    replies = policy.reply(list(queries.values()))
    readings = [
        drawn(policy.format.parse(reply.text, query.observation.legal_actions), query.rng)
        for query, reply in zip(queries.values(), replies, strict=True)
    ]
    steps = envs.step({slot: parsed.action for slot, parsed in zip(queries, readings, strict=True)})
    for (slot, query), reply, parsed in zip(queries.items(), replies, readings, strict=True):
        episode, step = active[slot], steps[slot]
        if isinstance(step, EnvError):
            episode.fail(envs.name, step)
            continue
        episode.turns.append(Turn(query.observation, query.prompt, reply, parsed, step))
        episode.now = step.observation


def _queries(
    active: Mapping[int, _Episode], slots: Iterable[int], instructions: str, prompt_format: PromptFormat
) -> dict[int, Query]:
    """What these slots ask next, but for those whose prompt is too long."""
    asked = {slot: active[slot].query(instructions, prompt_format) for slot in slots}
    return {slot: query for slot, query in asked.items() if query is not None}


def _settle(envs: EnvPool, active: dict[int, _Episode], policy: Policy) -> None:
    """Take the episodes that are over out of their slots and write their results."""
    over = [slot for slot, episode in active.items() if episode.over]
    queries = _queries(active, [slot for slot in over if active[slot].truncated], envs.instructions, policy.format)
    bootstraps = dict(zip(queries, policy.value(list(queries.values())) if queries else (), strict=True))
    for slot in over:
        episode = active.pop(slot)
        stop = _stop(episode)
        if stop == "time_limit" and episode.too_long is not None:  # the last that the critic could be asked
            bootstraps[slot] = episode.turns[-1].reply.value or 0.0
        episode.result = Trajectory(
            env=envs.name,
            seed=episode.deal.seed,
            member=episode.deal.member,
            policy=policy.name,
            turns=tuple(episode.turns),
            stop=stop,
            bootstrap=bootstraps.get(slot, 0.0),
            error=episode.too_long if stop == "too_long" else episode.broken,
            tags=episode.tags,
        )


def _stop(episode: _Episode) -> Stop:
    """Why an episode ended. `invalid`: without success, and not one of its replies held a legal action.

    An env_error keeps the turns before it, whose outcome is unknown: nothing to train on, nothing to average. What is
    too long for the model is the policy's own affair: a failure, after which nothing comes.
    """
    if episode.broken is not None:
        return "env_error"
    last = episode.turns[-1].step if episode.turns else None
    if last is None or not (last.terminated or last.truncated):
        return "too_long"
    if last.success:
        return "success"
    if all(turn.parsed.action is None for turn in episode.turns):
        return "invalid"
    return "time_limit" if episode.truncated else "failure"
