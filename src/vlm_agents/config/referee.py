"""Who says whether an answer is right, where an env leaves that open."""

from dataclasses import dataclass
from typing import Literal

from vlm_agents.config.fields import Part, setting
from vlm_agents.config.remote import RemoteConfig


@dataclass
class JudgeConfig(RemoteConfig, place="referee.remote"):
    """The server that judges. It has less time than one that plays: an answer that nobody can judge is left out."""

    timeout_s: float = 20.0
    retries: int = 2


@dataclass
class RefereeConfig(Part, place="referee"):
    name: str = setting(
        "rule",
        "rule: rules alone, and what they can't tell is wrong; server: a model on a server is asked then; chosen by "
        "referee=",
        choices=Literal["rule", "server"],
    )
    rules: bool = setting(
        True,
        "rules first, and the server where they can't tell; false: it is asked about every answer",
        only=("name", ("server",)),
    )
    max_unscored: float = setting(
        0.3,
        "largest share of the answers of an iteration or panel that may stay without a verdict; more stop the run",
        low=0,
        high=1,
        may_change=True,
        only=("name", ("server",)),
    )
    remote: JudgeConfig = setting(JudgeConfig, "the server of referee=server")
