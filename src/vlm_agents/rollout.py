"""Playing episodes: the only place where policy and env meet, and the pool that envs live in.

`collect` is the one loop behind collect, ppo and eval; what differs between them is the policy. It knows nothing of
disks, gradients or tokens.
"""

import logging
import multiprocessing
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import NoAsyncCallError
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from vlm_agents.envs.base import Env
from vlm_agents.errors import EnvError, TrainingError
from vlm_agents.policies import Policy, is_random
from vlm_agents.prompting import PromptFormat
from vlm_agents.types import Observation, Query, Step, Stop, Trajectory, Turn

logger = logging.getLogger(__name__)

RESTARTS = 3  # of one slot in a row, without a finished step between them, before the pool gives up


# ---- episodes --------------------------------------------------------------------------------------------------------
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
        return Query(prompt_format.prompt(instructions, self.turns, self.now), self.now, self.rng)


def collect(
    envs: "EnvPool",
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


def _refill(envs: "EnvPool", active: dict[int, _Episode], waiting: deque[_Episode]) -> None:
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
    envs: "EnvPool", active: dict[int, _Episode], policy: Policy, prompt_format: PromptFormat, invalid_penalty: float
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
    envs: "EnvPool", active: dict[int, _Episode], policy: Policy, prompt_format: PromptFormat
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


# ---- envs ------------------------------------------------------------------------------------------------------------
class EnvPool:
    """Slots with an env each, in this process or each in a worker process of its own.

    An env that raises, or a worker that dies or doesn't answer within `timeout_s`, answers with an EnvError; its slot
    gets a new env, in a new process, at the next reset. An env in this process can't be timed out.
    """

    def __init__(self, make: Callable[[], Env], num_envs: int, workers: bool = False, timeout_s: float = 60.0) -> None:
        with closing(make()) as env:  # here too, so that a wrong id fails at once and in plain words
            self.name = env.name
            self.instructions = env.instructions
        self.num_envs = num_envs
        self._timeout_s = timeout_s
        self._start = partial(_Worker, make, timeout_s) if workers else partial(_Here, make)
        self._slots: dict[int, _Here | _Worker] = {}
        self._failures = [0] * num_envs  # of each slot, since its last finished step
        self._seen: set[str] = set()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        for slot in self._slots.values():
            slot.close(kill=raised is not None)
        self._slots.clear()

    def reset(self, seeds: Mapping[int, int]) -> dict[int, Observation | EnvError]:
        """Start an episode in each of these slots."""
        for slot in seeds.keys() - self._slots.keys():
            self._slots[slot] = self._start()
        return self._ask("reset", seeds)

    def step(self, actions: Mapping[int, str | None]) -> dict[int, Step | EnvError]:
        """Play an action in each of these slots."""
        steps = self._ask("step", actions)
        for slot, step in steps.items():
            if isinstance(step, Step):
                self._failures[slot] = 0
        return steps

    def _ask(self, call: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        for slot, argument in arguments.items():
            self._slots[slot].send(call, argument)
        deadline = time.monotonic() + self._timeout_s
        answers = {slot: self._slots[slot].receive(deadline) for slot in arguments}
        for slot, answer in answers.items():
            if isinstance(answer, EnvError):
                self._fail(slot, answer)
        return answers

    def _fail(self, slot: int, error: EnvError) -> None:
        """Throw the env of this slot away; give up when this happens again and again."""
        self._slots.pop(slot).close(kill=True)
        self._failures[slot] += 1
        first = str(error) not in self._seen
        self._seen.add(str(error))
        logger.warning("%s, slot %d: %s", self.name, slot, error, exc_info=error if first else None)
        if self._failures[slot] > RESTARTS:
            raise EnvError(
                f"{self.name}: slot {slot} failed {self._failures[slot]} times in a row without finishing a step. "
                f"Mend the env, or raise env.timeout_s if it is only slow. Last cause: {error}"
            ) from error


class _Bridge(gymnasium.Env):
    """One of our envs as gymnasium's vector API wants it: our objects travel whole, in `info`.

    The spaces are stand-ins: observations hold text and pictures of any size, actions are words or None, and no
    space of gymnasium's says that. The env is made at the first reset, for the vector API also makes a bridge in the
    parent only to look at its spaces.
    """

    observation_space = Discrete(1)
    action_space = Discrete(1)

    def __init__(self, make: Callable[[], Env]) -> None:
        self._make = make
        self._env: Env | None = None

    def ask(self, call: str, argument: Any) -> Any:
        """The env's answer; an EnvError if it raised. That is text only, for not every exception survives a pipe."""
        try:
            if self._env is None:
                self._env = self._make()
            return getattr(self._env, call)(argument)
        except Exception as error:  # noqa: BLE001 (foreign code: whatever it raises costs its own episode only)
            answer = EnvError(f"{type(error).__name__}: {error}")
            answer.add_note(traceback.format_exc())
            return answer

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        return 0, {"answer": self.ask("reset", seed)}

    def step(self, action: str | None) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return 0, 0.0, False, False, {"answer": self.ask("step", action)}

    def close(self) -> None:
        if self._env is not None:
            self._env.close()


class _Here:
    """An env in this process, spoken to as one in a worker: `send` a call, then `receive` what came of it."""

    def __init__(self, make: Callable[[], Env]) -> None:
        self._bridge = _Bridge(make)

    def send(self, call: str, argument: Any) -> None:
        self._asked = call, argument

    def receive(self, deadline: float) -> Any:
        return self._bridge.ask(*self._asked)

    def close(self, kill: bool) -> None:
        if not kill:  # an env that is to be killed can't be trusted to close itself
            self._bridge.close()


class _Worker:
    """An env in a process of its own, behind a vector env of one so that each can fail and be replaced alone.

    Workers are forked from a server that has imported the env's modules once: 16 are ready in a tenth of the time that
    spawning each takes (1.4 s against 19 s on two busy cores). Forking this process, with torch's threads, isn't safe.
    """

    def __init__(self, make: Callable[[], Env], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        loaded = [name for name in sys.modules if name.startswith(("vlm_agents.envs", "vlm_agents.experts"))]
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *loaded])
        try:
            self._vector = AsyncVectorEnv(
                [partial(_Bridge, make)],
                shared_memory=False,
                context="forkserver",
                autoreset_mode=AutoresetMode.DISABLED,
            )
        except (EOFError, OSError) as error:
            raise EnvError(f"can't start a worker process ({error!r}); env.workers=false needs none") from error

    def send(self, call: str, argument: Any) -> None:
        self._call = call
        with suppress(OSError):  # a worker that died in the meantime is found out by `receive`
            if call == "reset":
                self._vector.reset_async(seed=[argument])
            else:
                self._vector.step_async([argument])

    def receive(self, deadline: float) -> Any:
        wait = self._vector.reset_wait if self._call == "reset" else self._vector.step_wait
        try:
            return wait(timeout=max(deadline - time.monotonic(), 0.0))[-1]["answer"][0]
        except multiprocessing.TimeoutError:
            return EnvError(f"no answer within {self._timeout_s:g} s")
        except (EOFError, OSError, NoAsyncCallError):
            process = self._vector.processes[0]
            process.join(timeout=1.0)
            return EnvError(f"its worker process died (exit code {process.exitcode})")

    def close(self, kill: bool) -> None:
        if not kill:
            with suppress(EOFError, OSError):
                self._vector.close()
        if not self._vector.closed:  # gymnasium's own close would first wait for the pending answer
            for process, pipe in zip(self._vector.processes, self._vector.parent_pipes, strict=True):
                process.kill()
                process.join()
                pipe.close()
            self._vector.closed = True
