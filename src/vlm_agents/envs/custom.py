"""An env of the user's own, from `env.factory`."""

from vlm_agents.config import CustomConfig
from vlm_agents.envs.base import Env
from vlm_agents.imports import made

NEEDS = ("name", "instructions", "reset", "step", "close")


def make(cfg: CustomConfig) -> Env:
    """What the factory gives for `env.kwargs`, and `max_steps` where that is set; ConfigError where that is no env."""
    limit = {} if cfg.max_steps is None else {"max_steps": cfg.max_steps}
    return made("env.factory", cfg.factory, needs=NEEDS, **(cfg.kwargs or {}), **limit)
