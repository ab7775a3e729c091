"""The planner of ALFWorld: wins every game in as many steps as it says, from wherever one has gone astray."""

import random

import pytest

from vlm_agents.config import ALFWORLD_TASKS, AlfWorldConfig
from vlm_agents.envs import make_env
from vlm_agents.experts import with_expert


@pytest.mark.parametrize("kind", ALFWORLD_TASKS)
def test_it_wins_each_game_in_as_many_steps_as_it_says(kind: str) -> None:
    for level, games in (("tiny", 20), ("small", 20), ("medium", 6), ("large", 4)):
        cfg = AlfWorldConfig(level=level, tasks=[kind], observation="text")
        env = with_expert(make_env(cfg), cfg)
        for seed in range(games):
            advice, said = env.reset(seed).advice, []
            assert advice
            steps = advice.distance
            step = None
            while advice:
                step = env.step(advice.action)
                said.append(advice.distance)
                advice = step.observation.advice
            assert step
            assert step.success
            assert said == list(range(steps or 0, 0, -1))


@pytest.mark.parametrize("kind", ALFWORLD_TASKS)
def test_it_finds_back_from_anywhere(kind: str) -> None:
    """After thirty random moves: things lie elsewhere, something else is in the hand."""
    cfg = AlfWorldConfig(level="small", tasks=[kind], observation="text", max_steps=80)
    env = with_expert(make_env(cfg), cfg)
    for seed in range(10):
        now, rng, step = env.reset(seed), random.Random(seed), None
        for _ in range(30):
            step = env.step(rng.choice(now.legal_actions or ()))
            now = step.observation
            if step.terminated:
                break
        while not (step and step.terminated):
            assert now.advice
            step = env.step(now.advice.action)
            now = step.observation
        assert step.success


def test_it_says_what_it_is_after() -> None:
    cfg = AlfWorldConfig(level="tiny", tasks=["pick_heat_then_place_in_recep"], observation="text")
    env = with_expert(make_env(cfg), cfg)
    advice, thoughts = env.reset(0).advice, []
    while advice:
        thoughts.append(advice.thought)
        advice = env.step(advice.action).observation.advice
    assert thoughts[0].startswith("I need a ")
    assert any(" and have to heat it. I go to the microwave 1." in thought for thought in thoughts)
    assert any(thought.startswith("Here is the microwave 1. I heat the ") for thought in thoughts)
    assert thoughts[-1].startswith("I leave the ")
