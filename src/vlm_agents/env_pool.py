"""The pool that envs live in: slots with an env each, here or in worker processes. Knows no policy and no episode."""

import logging
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import gymnasium
from gymnasium.error import NoAsyncCallError
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from vlm_agents.cores import single_threaded
from vlm_agents.envs.base import Env, checked_observation, checked_step
from vlm_agents.errors import EnvError, VlmAgentsError, harmless
from vlm_agents.progress import under_way
from vlm_agents.types import Observation, Step

logger = logging.getLogger(__name__)

RESTARTS = 3  # of one slot in a row, without a finished step between them, before the pool gives up


class EnvPool:
    """Slots with an env each, in this process or each in a worker process of its own.

    An env that raises or answers with what is no Observation or Step, or a worker that dies or doesn't answer within
    `timeout_s`, answers with an EnvError; its slot gets a new env, in a new process, at the next reset. An env in this
    process can't be timed out.
    """

    def __init__(self, make: Callable[[], Env], num_envs: int, workers: bool = False, timeout_s: float = 60.0) -> None:
        try:
            env = make()  # here too, so that a wrong id fails at once and in plain words
            self.name, self.instructions = env.name, env.instructions
        except VlmAgentsError:
            raise
        except (Exception, SystemExit) as error:
            raise EnvError(f"the env can't be made: {_told(error)}") from error
        _close(env)
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
        new = seeds.keys() - self._slots.keys()
        with under_way(f"starting {len(new)} envs") if new else nullcontext():
            for slot in new:
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
        told = first and hasattr(error, "__notes__")  # the env's traceback
        logger.warning("%s, slot %d: %s", self.name, slot, error, exc_info=error if told else None)
        if self._failures[slot] > RESTARTS:
            raise EnvError(
                f"{self.name}: slot {slot} failed {self._failures[slot]} times in a row without finishing a step: "
                f"mend the env. Last cause: {error}"
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
        """The env's answer, checked; an EnvError if it raised or is no answer.

        That is text only, for not every exception survives a pipe.
        """
        try:
            if self._env is None:
                self._env = self._make()
            answer = getattr(self._env, call)(argument)
            return checked_observation(answer) if call == "reset" else checked_step(answer)
        except EnvError as error:
            return EnvError(harmless(str(error)))
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # foreign code: it costs its own episode only
            if isinstance(error, KeyboardInterrupt) and multiprocessing.parent_process() is None:
                raise  # the user's; in a worker the parent has it too
            failure = EnvError(_told(error))
            failure.add_note(harmless(traceback.format_exc()))
            return failure

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        return 0, {"answer": self.ask("reset", seed)}

    def step(self, action: str | None) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return 0, 0.0, False, False, {"answer": self.ask("step", action)}

    def close(self) -> None:
        if self._env is not None:
            _close(self._env)


def _close(env: Env) -> None:
    try:
        env.close()
    except (Exception, SystemExit) as error:  # noqa: BLE001 (foreign code, and all is played)
        logger.warning("closing an env: %s", _told(error))


def _told(error: BaseException) -> str:
    return harmless(": ".join(filter(None, (type(error).__name__, str(error)))))


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
            with single_threaded():  # for the server too, which loads numpy for all of them
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
            return EnvError(f"no answer within env.timeout_s={self._timeout_s:g} s")
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
