"""The expert of Echo, and the door to all experts."""

import pytest

from vlm_agents.config import EchoConfig, EnvConfig
from vlm_agents.envs import make_env
from vlm_agents.errors import ConfigError
from vlm_agents.experts import with_expert


def test_expert_names_every_colour() -> None:
    cfg = EchoConfig(turns=3)
    env = with_expert(make_env(cfg), cfg)
    advice = env.reset(4).advice
    for left in (3, 2, 1):
        assert advice
        assert advice.distance == left
        assert advice.thought == f"the picture is {advice.action}"
        step = env.step(advice.action)
        advice = step.observation.advice
    assert advice is None
    assert step.success == 1.0


def test_after_a_mistake_the_rest_still_earns() -> None:
    cfg = EchoConfig(turns=3)
    env = with_expert(make_env(cfg), cfg)
    env.reset(4)
    advice = env.step(None).observation.advice
    assert advice
    assert advice.distance is None
    assert env.step(advice.action).reward == 1 / 3


def test_a_family_without_expert_is_refused() -> None:
    cfg = EnvConfig(family="chess", id="x")
    with pytest.raises(ConfigError, match=r"env\.family=chess has no expert"):
        with_expert(make_env(EchoConfig()), cfg)
