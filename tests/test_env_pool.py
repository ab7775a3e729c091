"""The pool's own business: what it asks of whom and when. What it makes of envs that fail is in test_rollout."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import pytest

from vlm_agents.config import EchoConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.envs import make_env
from vlm_agents.envs.base import Env
from vlm_agents.envs.echo import EchoEnv
from vlm_agents.errors import EnvError
from vlm_agents.experts import Advised, Advising
from vlm_agents.stages.playing import open_envs
from vlm_agents.types import Advice, Observation, Step

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test file by name
CFG = EchoConfig(turns=4)


class Counts(EchoEnv):
    """How many were made in this process."""

    made = 0

    def __init__(self) -> None:
        Counts.made += 1
        super().__init__(CFG)


class Slow(EchoEnv):
    """Takes half a second a turn."""

    def step(self, action: str | None) -> Step:
        time.sleep(0.5)
        return super().step(action)


class Tells:
    """An expert that counts how often it is asked."""

    asked = 0

    def start(self) -> Advice | None:
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        Tells.asked += 1
        return Advice("it is red", "red", 1)


def advised(env: Env) -> Advised:
    return Advised(env, Tells())


def test_what_is_to_be_known_of_an_env_its_first_slot_says() -> None:
    Counts.made = 0
    with EnvPool(Counts, 3) as envs:
        assert (envs.name, envs.has_expert) == (CFG.id, False)
        assert Counts.made == 1
        envs.reset({0: 1, 1: 2})
        assert Counts.made == 2  # the third slot hasn't been asked for anything


def test_no_env_is_made_in_this_process_where_there_are_workers() -> None:
    def make() -> EchoEnv:
        if os.getpid() == parent:
            raise AssertionError("made in the trainer")
        return EchoEnv(CFG)

    parent = os.getpid()
    with EnvPool(make, 2, workers=True) as envs:
        assert envs.instructions.startswith("You see one colour a turn")
        assert isinstance(envs.reset({1: 0})[1], Observation)


@pytest.mark.parametrize(("advice", "asked"), [("never", 0), ("first", 1), ("always", 4)])
def test_an_expert_is_asked_where_somebody_wants_its_advice(advice: Advising, asked: int) -> None:
    """Four turns: their observations are the first and those after three turns; after the fourth it is over."""
    Tells.asked = 0
    with EnvPool(partial(EchoEnv, CFG), 1, advise=advised, advice=advice) as envs:
        assert envs.has_expert == (advice != "never")
        seen = [envs.reset({0: 5})[0]]
        for _ in range(3):
            step = envs.step({0: "red"})[0]
            assert isinstance(step, Step)
            seen.append(step.observation)
        envs.step({0: "red"})
    told = [isinstance(one, Observation) and one.advice is not None for one in seen]
    assert told == [True] * asked + [False] * (4 - asked)
    assert Tells.asked == asked


class Misleads(Tells):
    def follow(self, action: str | None) -> Advice | None:
        return Advice("it is red", "crimson", 1)


class Fails(Tells):
    def follow(self, action: str | None) -> Advice | None:
        raise KeyError("red")


class Blurts(Tells):
    def follow(self, action: str | None) -> Any:
        return "red"


@pytest.mark.parametrize(
    ("expert", "said"),
    [
        (Misleads, r"the advised action is 'crimson', none of the legal ones: red, \w+, \w+, \w+$"),
        (Fails, r"KeyError: 'red' \(\S*test_env_pool\.py, line \d+\)$"),
        (Blurts, "the advice is 'red', neither an Advice nor None$"),
    ],
)
def test_an_expert_that_is_wrong_is_named(expert: type[Tells], said: str, caplog: pytest.LogCaptureFixture) -> None:
    """It costs the episode; where an env is held to the contract, the run."""

    def advise(env: Env) -> Advised:
        return Advised(env, expert(), "env.expert=own:Guide")

    pool = partial(EnvPool, partial(EchoEnv, CFG), 1, advise=advise, advice="always")
    with pool() as envs:
        assert re.match(f"env.expert=own:Guide, start: {said}", str(envs.reset({0: 5})[0]))
        assert ("Traceback" in caplog.text) == (expert is Fails)  # whose bug it helps to find
    with pytest.raises(EnvError) as raised, pool() as envs:
        envs.check_contract()
    assert re.match(f"vlm_agents/Echo-v0: env.expert=own:Guide, start: {said}", str(raised.value))


def test_a_reset_may_ask_for_less_than_the_pool_was_opened_for() -> None:
    with open_envs(CFG, 1, "always") as envs:
        for advice, told in (("first", True), ("never", False), (None, True)):
            seen = envs.reset({0: 5}, advice)[0]  # pyright: ignore[reportArgumentType]
            assert isinstance(seen, Observation)
            assert (seen.advice is not None) == told
        step = envs.step({0: "red"})[0]
        assert isinstance(step, Step)
        assert step.observation.advice is not None  # of the last reset, which asked for all


def test_workers_play_while_nobody_waits() -> None:
    with EnvPool(partial(Slow, CFG), 2, workers=True) as envs:
        envs.reset({0: 0, 1: 1})
        begun = time.monotonic()
        envs.send({0: "red"})
        envs.send({1: "red"})
        assert time.monotonic() - begun < 0.25
        steps = {**envs.receive([1]), **envs.receive([0])}
        assert time.monotonic() - begun < 0.95  # half a second each, at the same time
    assert all(isinstance(step, Step) for step in steps.values())


def exits() -> EchoEnv:
    sys.exit("no licence")


def dies() -> EchoEnv:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (exits, "the env can't be made: SystemExit: no licence"),
        (dies, "the env can't be made: its worker process died (exit code -9)"),
        (partial(make_env, EchoConfig(id="vlm_agents/Eco-v0")), "Environment `Eco` doesn't exist in namespace"),
    ],
)
def test_an_env_that_a_worker_cannot_make_is_one_line(make: Callable[[], EchoEnv], said: str) -> None:
    with pytest.raises(EnvError) as raised:
        EnvPool(make, 2, workers=True)
    assert said in str(raised.value)


def test_a_bug_in_a_foreign_env_is_not_told_as_one_in_making_it() -> None:
    class Breaks(EchoEnv):
        def step(self, action: str | None) -> Step:
            raise KeyError("red")

    with pytest.raises(EnvError) as raised, EnvPool(partial(Breaks, CFG), 1) as envs:
        envs.check_contract()
    assert re.match(r"the env can't be played: KeyError: 'red' \(\S*test_env_pool.py, line \d+\)$", str(raised.value))


def test_a_foreign_env_is_held_to_the_contract_where_it_lives() -> None:
    class Forgets(EchoEnv):
        played = 0

        def reset(self, seed: int) -> Observation:
            Forgets.played += 1
            return super().reset(Forgets.played)

    for workers in (False, True):
        with (
            pytest.raises(EnvError, match=r"^vlm_agents/Echo-v0: shows different things for seed 0$"),
            EnvPool(partial(Forgets, CFG), 1, workers) as envs,
        ):
            envs.check_contract()
