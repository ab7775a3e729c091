"""Scripted solvers, one per env family: they label what to do, and are the ceiling that eval compares with.

An expert sees the exact state of the world and never enters a prompt. `Observation.advice` None means that the expert
knows no way to success from here (or that the episode is over): such a turn has no label and an infinite distance. An
advice whose `distance` is None is good all the same; only its length isn't known.
"""

from dataclasses import replace
from typing import Literal, Protocol

from vlm_agents.config import FAMILIES, EnvConfig
from vlm_agents.envs.base import Env, checked_advice, checked_observation, checked_step
from vlm_agents.errors import ConfigError, EnvError
from vlm_agents.imports import made, told
from vlm_agents.types import Advice, Observation, Step

Advising = Literal["never", "first", "always"]  # in which observations of an episode the expert is asked


class NoExpert(ConfigError):
    """An env that nobody wrote an expert for."""


class Expert(Protocol):
    """Advises one env, whose world it reads. It must be told of each reset and each action."""

    def start(self) -> Advice | None: ...

    def follow(self, action: str | None) -> Advice | None:
        """Advice after `action` was played, whether or not it was the advised one."""
        ...


class Advised:
    """An env whose observations carry the expert's advice, as `advice` has it for the episode that begins next.

    `source` is what errors call the expert. One that raises, or advises what isn't legal, raises EnvError.
    """

    def __init__(self, env: Env, expert: Expert, source: str = "the expert") -> None:
        self.env = env
        self.expert = expert
        self.source = source
        self.name = env.name
        self.instructions = env.instructions
        self.advice: Advising = "always"

    def reset(self, seed: int) -> Observation:
        observation = self.env.reset(seed)
        self._follows = self.advice == "always"
        return observation if self.advice == "never" else self._advised(observation, "start")

    def step(self, action: str | None) -> Step:
        step = self.env.step(action)
        if not self._follows or checked_step(step).terminated:
            return step
        return replace(step, observation=self._advised(step.observation, "follow", action))

    def close(self) -> None:
        self.env.close()

    def _advised(self, seen: Observation, ask: str, *arguments: str | None) -> Observation:
        legal = checked_observation(seen).legal_actions
        try:
            return replace(seen, advice=checked_advice(getattr(self.expert, ask)(*arguments), legal))
        except (Exception, SystemExit) as error:
            raise EnvError(f"{self.source}, {ask}: {told(error)}") from error


def with_expert(env: Env, cfg: EnvConfig) -> Advised:
    """`env`, made from `cfg`, with advice in its observations; NoExpert where nobody wrote an expert.

    `env.expert` takes the place of the family's own.
    """
    path = cfg.expert or cfg.advises
    if path is None:
        known = ", ".join(family for family, kind in FAMILIES.items() if kind.advises)
        raise NoExpert(
            f"env.family={cfg.family} has no expert; {known} have one, and env.expert=my_package.my_module:MyExpert "
            "brings in your own"
        )
    return Advised(env, made("env.expert", path, env, needs=("start", "follow")), f"env.expert={path}")
