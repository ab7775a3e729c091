"""The pool that envs live in: slots with an env each, here or in worker processes. Knows no policy and no episode."""

import logging
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

import cloudpickle

from vlm_agents.cores import single_threaded
from vlm_agents.envs.base import Env, check_contract, checked_observation, checked_step
from vlm_agents.errors import EnvError, VlmAgentsError, harmless
from vlm_agents.experts import Advised, Advising, NoExpert
from vlm_agents.imports import told
from vlm_agents.progress import under_way
from vlm_agents.stopwatch import Stopwatch
from vlm_agents.types import Observation, Step

logger = logging.getLogger(__name__)

RESTARTS = 3  # of one slot in a row, without a finished step between them, before the pool gives up
CHECKED_TURNS = 30  # of the episode by which a foreign env is held to the contract

Make = Callable[[], Env]
Advise = Callable[[Env], Advised]


class Description(NamedTuple):
    """What an env says of itself."""

    name: str
    instructions: str
    has_expert: bool


class Refusal(EnvError):
    """What our own code says is wrong with an env: a line for the user as it stands."""


class EnvPool:
    """Slots with an env each, in this process or each in a worker process of its own.

    An env that raises or answers with what is no Observation or Step, or a worker that dies or doesn't answer within
    `timeout_s`, answers with an EnvError; its slot gets a new env, in a new process, at the next reset. An env in this
    process can't be timed out. What is to be known of the env, the first slot's is asked, when the pool is made.

    `advise` puts an expert beside an env, whose advice is in the observations that `advice` names; a reset may name
    others. `preload`: modules that all workers need, imported once.
    """

    def __init__(
        self,
        make: Make,
        num_envs: int,
        workers: bool = False,
        timeout_s: float = 60.0,
        *,
        advise: Advise | None = None,
        advice: Advising = "never",
        preload: Sequence[str] = (),
    ) -> None:
        host = partial(_Host, make, None if advice == "never" else advise)
        self._start = partial(_Worker, host, timeout_s, preload) if workers else partial(_Here, host)
        self.num_envs = num_envs
        self._advice: Advising = advice
        self._slots: dict[int, _Here | _Worker] = {0: self._start()}
        self._failures = [0] * num_envs  # of each slot, since its last finished step
        self._seen: set[str] = set()
        self.stopwatch = Stopwatch()  # `env`: until the envs had answered, pictures and experts' advice included
        self.name, self.instructions, self.has_expert = self._first("describe")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        if raised is None:
            for slot in self._slots.values():
                slot.dismiss()
        for slot in self._slots.values():
            slot.close(kill=raised is not None)
        self._slots.clear()

    def check_contract(self) -> None:
        """Have the first slot hold its kind of env to the contract; EnvError where it doesn't keep it."""
        self._first("check")

    def reset(self, seeds: Mapping[int, int], advice: Advising | None = None) -> dict[int, Observation | EnvError]:
        """Start an episode in each of these slots; `advice` may ask less than the pool was made for."""
        new = seeds.keys() - self._slots.keys()
        starting = under_way(f"starting envs: {len(new)}") if new else nullcontext()
        with self.stopwatch.phase("env"), starting:
            for slot in new:
                self._slots[slot] = self._start()
            for slot, seed in seeds.items():
                self._slots[slot].send("reset", seed, advice or self._advice)
            return self._receive(seeds)

    def step(self, actions: Mapping[int, str | None]) -> dict[int, Step | EnvError]:
        """Play an action in each of these slots."""
        with self.stopwatch.phase("env"):
            self.send(actions)
            return self.receive(actions)

    def send(self, actions: Mapping[int, str | None]) -> None:
        """Have an action played in each of these slots; `receive` gives what comes of it.

        Workers begin at once, and each has `timeout_s` from here; envs in this process are played when they are
        received.
        """
        for slot, action in actions.items():
            self._slots[slot].send("step", action)

    def receive(self, slots: Iterable[int]) -> dict[int, Step | EnvError]:
        """What came of the actions that were sent to these slots."""
        steps = self._receive(slots)
        for slot, step in steps.items():
            if isinstance(step, Step):
                self._failures[slot] = 0
        return steps

    def _receive(self, slots: Iterable[int]) -> dict[int, Any]:
        answers = {slot: self._slots[slot].receive() for slot in slots}
        for slot, answer in answers.items():
            if isinstance(answer, EnvError):
                self._fail(slot, answer)
        return answers

    def _first(self, call: str) -> Any:
        """The answer of the first slot, whose failure is the pool's."""
        self._slots[0].send(call)
        try:
            answer = self._slots[0].receive()
        except BaseException:
            self.__exit__(EnvError)
            raise
        if isinstance(answer, EnvError):
            self.__exit__(EnvError)
            if isinstance(answer, Refusal):
                raise answer
            raise EnvError(f"the env can't be {'made' if call == 'describe' else 'played'}: {answer}") from answer
        return answer

    def _fail(self, slot: int, error: EnvError) -> None:
        """Throw the env of this slot away; give up when this happens again and again."""
        self._slots.pop(slot).close(kill=True)
        self._failures[slot] += 1
        first = str(error) not in self._seen
        self._seen.add(str(error))
        traced = first and hasattr(error, "__notes__")  # the env's traceback
        logger.warning("%s, slot %d: %s", self.name, slot, error, exc_info=error if traced else None)
        if self._failures[slot] > RESTARTS:
            raise EnvError(
                f"{self.name}: slot {slot} failed {self._failures[slot]} times in a row without finishing a step: "
                f"mend the env. Last cause: {error}"
            ) from error


class _Host:
    """An env, made when it is first needed, and its expert: answers each call, by an EnvError if the env raises."""

    def __init__(self, make: Make, advise: Advise | None) -> None:
        self._make = make
        self._advise = advise
        self._env: Env | None = None

    def answer(self, call: str, *arguments: Any) -> Any:
        """Errors are text only, for not every exception survives a pipe."""
        try:
            return getattr(self, call)(*arguments)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # foreign code: it costs its own episode only
            if isinstance(error, KeyboardInterrupt) and multiprocessing.parent_process() is None:
                raise  # the user's; a worker never gets it
            ours = isinstance(error, VlmAgentsError)
            failure = Refusal(told(error)) if ours else EnvError(told(error))
            if not isinstance(error.__cause__ if ours else error, VlmAgentsError | None):
                failure.add_note(harmless(traceback.format_exc()))
            return failure

    def describe(self) -> Description:
        env = self.env
        return Description(str(env.name), str(env.instructions), isinstance(env, Advised))

    def check(self) -> None:
        make = self._make if self._advise is None else self._made
        check_contract(make, seeds=(0,), turns=CHECKED_TURNS)

    def reset(self, seed: int, advice: Advising) -> Observation:
        env = self.env
        if isinstance(env, Advised):
            env.advice = advice
        return checked_observation(env.reset(seed))

    def step(self, action: str | None) -> Step:
        return checked_step(self.env.step(action))

    def close(self) -> None:
        if self._env is not None:
            try:
                self._env.close()
            except (Exception, SystemExit) as error:  # noqa: BLE001 (foreign code, and all is played)
                logger.warning("closing an env: %s", told(error))

    @property
    def env(self) -> Env:
        if self._env is None:
            self._env = self._made()
        return self._env

    def _made(self) -> Env:
        env = self._make()
        if self._advise is not None:
            with suppress(NoExpert):
                return self._advise(env)
        return env


class _Here:
    """An env in this process, spoken to as one in a worker: `send` a call, then `receive` what came of it."""

    def __init__(self, host: Callable[[], _Host]) -> None:
        self._host = host()

    def send(self, call: str, *arguments: Any) -> None:
        self._asked = call, *arguments

    def receive(self) -> Any:
        return self._host.answer(*self._asked)

    def dismiss(self) -> None:
        pass

    def close(self, kill: bool) -> None:
        if not kill:  # an env that is to be killed can't be trusted to close itself
            self._host.close()


class _Worker:
    """An env in a process of its own, which can fail and be replaced alone.

    Workers are forked from a server that has imported the env's modules once: 16 are ready in a tenth of the time that
    spawning each takes (1.4 s against 19 s on two busy cores). Forking this process, with torch's threads, isn't safe.
    """

    def __init__(self, host: Callable[[], _Host], timeout_s: float, preload: Sequence[str]) -> None:
        self._timeout_s = timeout_s
        self._deadline: float | None = None  # of the answer that is awaited; None: the process isn't there yet
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *preload])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cloudpickle.dumps(host)), daemon=True)
        try:
            with single_threaded():  # for the server too, which loads numpy for all of them
                self._process.start()
        except (EOFError, OSError) as error:
            raise EnvError(f"can't start a worker process ({error!r}); env.workers=false needs none") from error
        finally:
            theirs.close()  # so that a worker's death is the end of the pipe

    def send(self, call: str, *arguments: Any) -> None:
        if self._deadline is not None:
            self._deadline = time.monotonic() + self._timeout_s
        with suppress(OSError):  # a worker that died in the meantime is found out by `receive`
            self._pipe.send((call, *arguments))

    def receive(self) -> Any:
        try:
            if self._deadline is None:
                self._pipe.recv()  # its first word, once all is imported: an env's own time begins here
                self._deadline = time.monotonic() + self._timeout_s
            if self._pipe.poll(max(self._deadline - time.monotonic(), 0.0)):
                return self._pipe.recv()
            return EnvError(f"no answer within env.timeout_s={self._timeout_s:g} s")
        except (EOFError, OSError):
            self._process.join(timeout=1.0)
            return EnvError(f"its worker process died (exit code {self._process.exitcode})")

    def dismiss(self) -> None:
        """Have it close its env and end; `close` waits for that."""
        with suppress(OSError):
            self._pipe.send(None)

    def close(self, kill: bool) -> None:
        if not kill:
            self._process.join(self._timeout_s)
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, host: bytes) -> None:
    """The life of a worker: it answers until it is dismissed, or nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent ends its workers
    slot: _Host = cloudpickle.loads(host)()
    with suppress(EOFError, OSError):
        pipe.send(None)
        while (asked := pipe.recv()) is not None:
            pipe.send(slot.answer(*asked))
        slot.close()
