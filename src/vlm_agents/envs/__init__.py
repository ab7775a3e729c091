"""Envs by name. Importing this registers our Gymnasium ids; no env is imported before it is made."""

import os

import gymnasium

from vlm_agents.config import FAMILIES, EnvConfig
from vlm_agents.envs.base import Env, check_contract
from vlm_agents.errors import EnvError, did_you_mean
from vlm_agents.imports import attribute

__all__ = ["Env", "check_contract", "is_known", "make_env", "modules"]

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame, by which many games draw, must not look for a screen
gymnasium.register(id="vlm_agents/Echo-v0", entry_point="vlm_agents.envs.echo:EchoGame")
gymnasium.register(id="vlm_agents/NumberLine-v0", entry_point="vlm_agents.envs.gym_cards.number_line:NumberLineGame")
gymnasium.register(id="vlm_agents/Blackjack-v0", entry_point="vlm_agents.envs.gym_cards.blackjack:BlackjackGame")
gymnasium.register(id="vlm_agents/Points24-v0", entry_point="vlm_agents.envs.gym_cards.points:PointsGame")
gymnasium.register(
    id="vlm_agents/EZPoints-v0",
    entry_point="vlm_agents.envs.gym_cards.points:PointsGame",
    kwargs={"kind": "ezpoints", "target": 12, "cards": 2, "solvable_only": True},
)
gymnasium.register(id="vlm_agents/FrozenLake-v0", entry_point="vlm_agents.envs.frozen_lake:FrozenLakeGame")
gymnasium.register(id="vlm_agents/Sokoban-v0", entry_point="vlm_agents.envs.sokoban:SokobanGame")


def make_env(cfg: EnvConfig) -> Env:
    """The env that `cfg` describes; EnvError where there is none."""
    return attribute("env", path_of(cfg))(cfg)


def path_of(cfg: EnvConfig) -> str:
    if cfg.makes is None:
        hint = did_you_mean(cfg.family, FAMILIES)
        raise EnvError(f"there is no env family '{cfg.family}'; known: {', '.join(FAMILIES)}.{hint}")
    return cfg.makes


def is_known(cfg: EnvConfig) -> bool:
    """Can the family tell without making the env that there is one? EnvError where it can tell that there is none.

    A family that can has a static method `check(cfg)`.
    """
    check = getattr(attribute("env", path_of(cfg)), "check", None)
    if check is None:
        return False
    check(cfg)
    return True


def modules(cfg: EnvConfig) -> list[str]:
    """Our modules that the env and its expert come from: a server of worker processes imports them once for all."""
    return [path.partition(":")[0] for path in (cfg.makes, cfg.advises) if path]
