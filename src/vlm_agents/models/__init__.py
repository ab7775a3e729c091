"""Models: loading, and the agent made of them. The only package that imports transformers and peft."""

from vlm_agents.models.actor_critic import Agent
from vlm_agents.models.loading import load_agent
from vlm_agents.models.sampler import Sampler

__all__ = ["Agent", "Sampler", "load_agent"]
