"""Envs by name. Importing this registers our Gymnasium ids; no env is imported before it is made."""

import os

import gymnasium

from vlm_agents.config import EchoConfig, EnvConfig, MiniGridConfig
from vlm_agents.envs.base import Env
from vlm_agents.errors import EnvError, did_you_mean

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # minigrid imports pygame, which must not look for a screen
gymnasium.register(id="vlm_agents/Echo-v0", entry_point="vlm_agents.envs.echo:EchoGame")


def make_env(cfg: EnvConfig) -> Env:
    """The env that `cfg` describes; EnvError where there is none."""
    match cfg:
        case EchoConfig():
            from vlm_agents.envs.echo import EchoEnv

            return EchoEnv(cfg)
        case MiniGridConfig():
            from vlm_agents.envs.minigrid import MiniGrid

            return MiniGrid(cfg)
        case _:
            known = ("echo", "minigrid")
            hint = did_you_mean(cfg.family, known)
            raise EnvError(f"there is no env family '{cfg.family}'; known: {', '.join(known)}.{hint}")
