"""Envs by name. Importing this registers our Gymnasium ids; no env is imported before it is made."""

import os

import gymnasium

from vlm_agents.config import CardsConfig, EchoConfig, EnvConfig, MiniGridConfig
from vlm_agents.envs.base import Env
from vlm_agents.errors import EnvError, did_you_mean

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # minigrid imports pygame, which must not look for a screen
gymnasium.register(id="vlm_agents/Echo-v0", entry_point="vlm_agents.envs.echo:EchoGame")
gymnasium.register(id="vlm_agents/NumberLine-v0", entry_point="vlm_agents.envs.gym_cards.number_line:NumberLineGame")
gymnasium.register(id="vlm_agents/Blackjack-v0", entry_point="vlm_agents.envs.gym_cards.blackjack:BlackjackGame")
gymnasium.register(id="vlm_agents/Points24-v0", entry_point="vlm_agents.envs.gym_cards.points:PointsGame")
gymnasium.register(
    id="vlm_agents/EZPoints-v0",
    entry_point="vlm_agents.envs.gym_cards.points:PointsGame",
    kwargs={"kind": "ezpoints", "target": 12, "cards": 2, "solvable_only": True},
)


def make_env(cfg: EnvConfig) -> Env:
    """The env that `cfg` describes; EnvError where there is none."""
    match cfg:
        case EchoConfig():
            from vlm_agents.envs.echo import EchoEnv

            return EchoEnv(cfg)
        case MiniGridConfig():
            from vlm_agents.envs.minigrid import MiniGrid

            return MiniGrid(cfg)
        case CardsConfig():
            from vlm_agents.envs.gym_cards import CardEnv

            return CardEnv(cfg)
        case _:
            known = ("echo", "minigrid", "number_line", "blackjack", "ezpoints", "points24")
            hint = did_you_mean(cfg.family, known)
            raise EnvError(f"there is no env family '{cfg.family}'; known: {', '.join(known)}.{hint}")
