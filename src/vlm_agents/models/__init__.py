"""Models: loading, and the agent made of them. The only package that imports transformers and peft.

Its names are imported as they are used: where a model lies, and what an adapter says of itself, needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_agents.models.actor_critic import Agent
    from vlm_agents.models.loading import load_agent
    from vlm_agents.models.sampler import HFSampler

__all__ = ["Agent", "HFSampler", "load_agent"]

PLACES = {"Agent": "actor_critic", "HFSampler": "sampler", "load_agent": "loading"}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
