"""The envs: one class a family of games."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, setting
from vlm_agents.errors import ConfigError

Compat = Literal["ours", "rl4vlm"]
Faces = Literal["ten", "rank"]


@dataclass
class EnvConfig(Part, place="env"):
    family: str = setting(MISSING, "kind of env; chosen by env=")
    id: str = setting(MISSING, "Gymnasium id of the env")
    max_steps: int | None = setting(None, "turns before an episode is truncated; null: the env's own limit", low=1)
    invalid_penalty: float = setting(0.1, "taken off the reward of a turn whose reply held no legal action", low=0)
    workers: bool = setting(False, "step each env in a process of its own")
    timeout_s: float = setting(
        60.0, "seconds; a worker that answers later is restarted, its episode marked env_error", positive=True
    )


@dataclass
class EchoConfig(EnvConfig):
    """A picture shows a colour, its name is the action; `turns` colours make an episode."""

    family: str = "echo"
    id: str = "vlm_agents/Echo-v0"
    colors: int = setting(4, "how many colours there are", low=2, high=8)
    turns: int = setting(3, "colours that make an episode", low=1)


@dataclass
class MiniGridConfig(EnvConfig):
    """Any MiniGrid-* or BabyAI-* id."""

    family: str = "minigrid"
    id: str = setting("MiniGrid-DoorKey-6x6-v0", "any MiniGrid-* or BabyAI-* id")
    view: str = setting(
        "full",
        "full: the whole grid from above; agent: the 7x7 cells that the agent sees",
        choices=Literal["full", "agent"],
    )
    tile_size: int = setting(
        28,
        "pixels a cell; 28 makes one cell one merged vision token of Qwen2-VL and Qwen2.5-VL",
        low=4,
        high=256,
    )
    describe: bool = setting(False, "put a text description of what is visible into the observation")


@dataclass
class CardsConfig(EnvConfig):
    """The card games of RL4VLM; each has a class of its own below."""

    observation: str = setting(
        "image",
        "what the agent gets: the picture, what it shows in words, or both",
        choices=Literal["image", "text", "both"],
    )
    size: int = setting(300, "side of the picture in pixels; it is drawn at 300 and scaled", low=28, high=4096)
    compat: str = setting(
        "ours",
        "rl4vlm: with the original's bugs, and a random action where none could be read",
        choices=Compat,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.id != type(self).id:
            raise ConfigError(f"env.id={self.id}: this game's id is {type(self).id}; choose another game by env=")
        if self.compat == "rl4vlm" and self.invalid_penalty:
            raise ConfigError(
                "env.compat=rl4vlm plays a random action where none can be read and takes nothing off for it, and "
                f"env.invalid_penalty is {self.invalid_penalty:g}: set env.invalid_penalty=0"
            )


@dataclass
class NumberLineConfig(CardsConfig):
    """Walk from a number to another one."""

    family: str = "number_line"
    id: str = "vlm_agents/NumberLine-v0"
    highest: int = setting(5, "last number of the line, which begins at 0", low=2, high=99)


@dataclass
class BlackjackConfig(CardsConfig):
    """Beat the dealer."""

    family: str = "blackjack"
    id: str = "vlm_agents/Blackjack-v0"
    natural: bool = setting(False, "a win with an ace and a ten earns 1.5")


@dataclass
class PointsConfig(CardsConfig):
    """Points24: make the target of all cards, with + - * / and brackets."""

    family: str = "points24"
    id: str = "vlm_agents/Points24-v0"
    target: int = setting(24, "what the formula must make", low=1)
    cards: int = setting(4, "cards of a hand", low=2, high=4)
    faces: str = setting("ten", "what J, Q and K count: ten, or their rank (11, 12, 13)", choices=Faces)
    solvable_only: bool = setting(
        False, "deal no hand that can't make the target (27 of 100 hands of four cards can't make 24)"
    )


@dataclass
class EZPointsConfig(PointsConfig):
    """The same with + and * alone. Two cards that shall make 12 always can."""

    family: str = "ezpoints"
    id: str = "vlm_agents/EZPoints-v0"
    target: int = 12
    cards: int = 2
    solvable_only: bool = True
