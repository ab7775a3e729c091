"""Scripted solvers, one per env family: they label what to do, and are the ceiling that eval compares with.

An expert sees the exact state of the world and never enters a prompt. `Observation.advice` None means that the expert
knows no way to success from here (or that the episode is over): such a turn has no label and an infinite distance. An
advice whose `distance` is None is good all the same; only its length isn't known.
"""

from dataclasses import replace
from typing import Protocol

from vlm_agents.config import CardsConfig, EchoConfig, EnvConfig, MiniGridConfig
from vlm_agents.envs.base import Env
from vlm_agents.errors import ConfigError
from vlm_agents.types import Advice, Observation, Step


class Expert(Protocol):
    """Advises one env, whose world it reads. It must be told of each reset and each action."""

    def start(self) -> Advice | None: ...

    def follow(self, action: str | None) -> Advice | None:
        """Advice after `action` was played, whether or not it was the advised one."""
        ...


class Advised:
    """An env whose observations carry the expert's advice."""

    def __init__(self, env: Env, expert: Expert) -> None:
        self.env = env
        self.expert = expert
        self.name = env.name
        self.instructions = env.instructions

    def reset(self, seed: int) -> Observation:
        observation = self.env.reset(seed)
        return replace(observation, advice=self.expert.start())

    def step(self, action: str | None) -> Step:
        step = self.env.step(action)
        if step.terminated:
            return step
        return replace(step, observation=replace(step.observation, advice=self.expert.follow(action)))

    def close(self) -> None:
        self.env.close()


def with_expert(env: Env, cfg: EnvConfig) -> Env:
    """`env`, made from `cfg`, with advice in every observation; ConfigError where nobody wrote an expert."""
    match cfg:
        case EchoConfig():
            from vlm_agents.envs.echo import EchoEnv
            from vlm_agents.experts.echo import EchoExpert

            assert isinstance(env, EchoEnv)
            return Advised(env, EchoExpert(env))
        case MiniGridConfig():
            from vlm_agents.envs.minigrid import MiniGrid
            from vlm_agents.experts.babyai import BotExpert
            from vlm_agents.experts.minigrid import PlanExpert

            assert isinstance(env, MiniGrid)
            return Advised(env, BotExpert(env) if cfg.id.startswith("BabyAI-") else PlanExpert(env))
        case CardsConfig():
            from vlm_agents.envs.gym_cards import CardEnv
            from vlm_agents.experts.gym_cards import card_expert

            assert isinstance(env, CardEnv)
            return Advised(env, card_expert(env))
        case _:
            raise ConfigError(f"env.family={cfg.family} has no expert; echo, minigrid and the card games have one")
