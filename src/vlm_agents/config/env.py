"""The envs: one class a family of games, with its settings, and with the import paths of what makes it.

A family is found by its class alone: Hydra's schema, `make_env`, the experts and the tests of the contract read
FAMILIES. Nothing here imports a game.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, check_kwargs, setting
from vlm_agents.errors import ConfigError, did_you_mean
from vlm_agents.sandbox.settings import LEAST, MEANINGS, Require, SandboxSettings

if TYPE_CHECKING:
    from vlm_agents.config.run import RunConfig

Compat = Literal["ours", "rl4vlm"]
Faces = Literal["ten", "rank"]
ALFWORLD_TASKS = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)


@dataclass
class EnvConfig(Part, place="env"):
    makes: ClassVar[str | None] = None  # package.module:attribute that is called with the config and gives the env
    advises: ClassVar[str | None] = None  # the same of the scripted expert, called with the env
    foreign: ClassVar[bool] = False  # somebody else wrote the game: it is held to the contract before it is played

    family: str = setting(MISSING, "kind of env; chosen by env=")
    id: str = setting(MISSING, "Gymnasium id of the env")
    max_steps: int | None = setting(None, "turns before an episode is truncated; null: the env's own limit", low=1)
    invalid_penalty: float = setting(0.1, "taken off the reward of a turn whose reply held no legal action", low=0)
    workers: bool = setting(False, "step each env in a process of its own")
    timeout_s: float = setting(
        60.0, "seconds; a worker that answers later is restarted, its episode marked env_error", positive=True
    )
    expert: str | None = setting(
        None, "a scripted expert of your own, as package.module:attribute, called with the env; null: the env's own"
    )

    counts_tools: ClassVar[bool] = False  # do its metrics say `tool_calls` and `tool_pictures`?
    actions_vary: ClassVar[bool] = False  # do its legal actions differ from turn to turn?
    free_text: ClassVar[bool] = False  # are actions texts of any kind? Then there are no random ones

    @property
    def one_turn(self) -> bool:
        """Does every episode end with its first turn?"""
        return self.max_steps == 1

    @property
    def bare(self) -> "EnvConfig | None":
        """The same game without the help whose worth an evaluation tells; None where there is none to leave out."""
        return None

    @property
    def success_remedy(self) -> str:
        """What of the settings may help where no episode succeeds, because they say what success is; empty: none."""
        return ""


@dataclass
class EchoConfig(EnvConfig):
    """A picture shows a colour, its name is the action; `turns` colours make an episode."""

    makes = "vlm_agents.envs.echo:EchoEnv"
    advises = "vlm_agents.experts.echo:EchoExpert"

    family: str = "echo"
    id: str = "vlm_agents/Echo-v0"
    colors: int = setting(4, "how many colours there are", low=2, high=8)
    turns: int = setting(3, "colours that make an episode", low=1)

    @property
    def one_turn(self) -> bool:
        return self.turns == 1 or super().one_turn


@dataclass
class MiniGridConfig(EnvConfig):
    """Any MiniGrid-* or BabyAI-* id."""

    makes = "vlm_agents.envs.minigrid:MiniGrid"
    advises = "vlm_agents.experts.minigrid:grid_expert"

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

    makes = "vlm_agents.envs.gym_cards:CardEnv"
    advises = "vlm_agents.experts.gym_cards:card_expert"

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

    def check(self, run: "RunConfig") -> None:
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


@dataclass
class GymnasiumConfig(EnvConfig):
    """Any Gymnasium env that has Discrete actions and can be drawn (rgb_array)."""

    makes = "vlm_agents.envs.gymnasium_env:GymnasiumEnv"
    foreign = True

    family: str = "gymnasium"
    module: str | None = setting(None, "package or module that registers the id when it is imported")
    kwargs: Any = setting(None, "what gymnasium.make is given besides the id", wanted="settings or null")
    actions: list[str] = setting(MISSING, "a word for each action 0, 1, ..., as in [left,down,right,up]")
    instructions: str = setting(MISSING, "what the game is, for the system prompt; the actions are added")
    picture: int | None = setting(None, "longest side of the picture in pixels; null: as the env draws it", low=8)
    legal: str | None = setting(None, "key of info with a mask of the legal actions; null: all are legal, always")
    success: str | None = setting(
        None, "key of info that is true where the episode succeeded; null: it ended as success_return says"
    )
    success_return: float | None = setting(
        None,
        "an episode that terminates with at least this return succeeded; null: one whose last reward is above 0",
    )
    state: str = setting(
        "observation", "what names the state, so that loops can be counted: observation, picture, or a key of info"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.module is None and ":" in self.id:  # as Gymnasium has it
            self.module, _, self.id = self.id.partition(":")
        check_kwargs("env.kwargs", self.kwargs)
        if self.actions != MISSING and (not all(self.actions) or len(set(self.actions)) < len(self.actions)):
            raise ConfigError(f"env.actions={self.actions}: each action needs a word of its own")
        if self.success is not None and self.success_return is not None:
            raise ConfigError("env.success and env.success_return both say what success is: leave one out")

    @property
    def success_remedy(self) -> str:
        rule = f"an info with {self.success} true" if self.success else "a last reward above 0"
        if self.success_return is not None:
            rule = f"a return of {self.success_return:g} or more"
        return f"another env.success or env.success_return, for success is now a game that terminates with {rule}"


@dataclass
class SandboxConfig(Part, place="env.sandbox"):
    """Limits of what an agent's Python may do; see docs/sandbox.md."""

    require: str = setting(SandboxSettings.require, MEANINGS["require"], choices=Require)
    turn_s: float = setting(SandboxSettings.turn_s, MEANINGS["turn_s"], positive=True)
    cpu_s: int = setting(SandboxSettings.cpu_s, MEANINGS["cpu_s"], low=LEAST["cpu_s"])
    memory_mib: int = setting(SandboxSettings.memory_mib, MEANINGS["memory_mib"], low=LEAST["memory_mib"])
    file_mib: int = setting(SandboxSettings.file_mib, MEANINGS["file_mib"], low=LEAST["file_mib"])
    tmp_mib: int = setting(SandboxSettings.tmp_mib, MEANINGS["tmp_mib"], low=LEAST["tmp_mib"])
    tmp_files: int = setting(SandboxSettings.tmp_files, MEANINGS["tmp_files"], low=LEAST["tmp_files"])
    output_chars: int = setting(SandboxSettings.output_chars, MEANINGS["output_chars"], low=LEAST["output_chars"])
    pictures: int = setting(SandboxSettings.pictures, MEANINGS["pictures"], low=LEAST["pictures"])
    picture_pixels: int = setting(
        SandboxSettings.picture_pixels, MEANINGS["picture_pixels"], low=LEAST["picture_pixels"]
    )
    start_s: float = setting(SandboxSettings.start_s, MEANINGS["start_s"], positive=True)


@dataclass
class VisualSearchConfig(EnvConfig):
    """Questions on large pictures, and Python to look closer."""

    makes = "vlm_agents.envs.visual_search.env:VisualSearch"
    advises = "vlm_agents.experts.visual_search:VisualSearchExpert"
    free_text = counts_tools = True

    family: str = "visual_search"
    id: str = "vlm_agents/VisualSearch-v0"
    max_steps: int | None = setting(5, "turns before an episode is truncated; null: no limit", low=1)
    level: str = setting(
        "easy",
        "how hard made-up scenes are",
        choices=Literal["tiny", "easy", "medium", "hard", "extreme"],
    )
    data: list[str] = setting(list, "files of questions to train on, in place of made-up scenes")
    eval_data: list[str] = setting(list, "files of held-out questions, in place of made-up scenes")
    pictures: str | None = setting(None, "folder that their pictures' paths start from; null: the file's own")
    skip_bad: bool = setting(False, "leave out broken rows of these files, each with a warning, instead of stopping")
    tool: bool = setting(True, "run the agent's Python; if not, it has to answer from what it is shown")
    picture_in: str = setting(
        "prompt",
        "where the question's pictures are: shown, and in Python; or in Python alone",
        choices=Literal["prompt", "runtime"],
    )
    side: int | None = setting(
        None, "longest side in pixels of a picture that is shown; null: as it is, or as the level has it", low=28
    )
    max_pictures: int = setting(32, "pictures of an episode that Python may show", low=0)
    on_error: str = setting(
        "tell",
        "what an error of the agent's Python does: the traceback is told; or the episode ends, as PyVision-RL's do",
        choices=Literal["tell", "end"],
    )
    sandbox: SandboxConfig = setting(SandboxConfig, "limits of the agent's Python")

    @property
    def files(self) -> bool:
        """Are its questions from files?"""
        return bool(self.data or self.eval_data)

    @property
    def bare(self) -> EnvConfig | None:
        return replace(self, tool=False, max_steps=1) if self.tool and self.picture_in == "prompt" else None

    def check(self, run: "RunConfig") -> None:
        if getattr(run.stage, "policy", "") == "random" or getattr(run.stage, "noise", 0) > 0:
            raise ConfigError(
                f"env={self.family} takes free text, and nobody can draw that at random: set stage.noise=0 and another "
                "stage.policy than random"
            )
        if run.prompt.history != "full" and not self.one_turn:
            raise ConfigError(
                f"with prompt.history={run.prompt.history} the agent would see the question in its first turn alone: "
                "set prompt=tool_call, or prompt.history=full"
            )
        if self.workers and self.timeout_s <= self.sandbox.turn_s:
            raise ConfigError(
                f"env.timeout_s={self.timeout_s:g} would end a worker before its code is by "
                f"env.sandbox.turn_s={self.sandbox.turn_s:g}: have more of the one or less of the other"
            )
        if self.picture_in == "runtime" and not self.tool:
            raise ConfigError("env.picture_in=runtime shows nothing, and env.tool=false runs no Python: set one")


@dataclass
class AlfWorldConfig(EnvConfig):
    """Household tasks of ALFWorld: its own games, or games made here."""

    makes = "vlm_agents.envs.alfworld.env:AlfWorld"
    advises = "vlm_agents.experts.alfworld:AlfWorldExpert"
    actions_vary = True

    family: str = "alfworld"
    id: str = "vlm_agents/ALFWorld-v0"
    max_steps: int | None = setting(50, "turns before an episode is truncated; null: no limit", low=1)
    invalid_penalty: float = 1.0
    level: str = setting(
        "small",
        "how large households are that are made here: 4 to 5 receptacles (of few kinds), 6 to 9, 10 to 18, 20 to 30",
        choices=Literal["tiny", "small", "medium", "large"],
    )
    tasks: list[str] = setting(list, "kinds of tasks, as ALFWorld names them; empty: all six")
    data: str | None = setting(
        None, "folder of ALFWorld's own games, with train, valid_seen and valid_unseen in it; null: games made here"
    )
    eval_split: str = setting(
        "valid_unseen", "folder in env.data whose games are held out", choices=Literal["valid_seen", "valid_unseen"]
    )
    observation: str = setting(
        "both",
        "what the agent gets: a schematic picture, what the game tells, or both; blank: an empty picture, by which is "
        "measured what the listed commands tell alone",
        choices=Literal["image", "text", "both", "blank"],
    )
    tile_size: int = setting(
        84, "pixels of each receptacle and object in the picture; from 56 on their names are written", low=14, high=256
    )
    thor: str | None = setting(
        None, "a Python with ai2thor: it plays the games of env.data in THOR, whose frames are then the picture"
    )
    success_reward: float = setting(50.0, "what success earns", low=0)
    goal_reward: float = setting(1.0, "what all goal conditions together earn, as far as they are met", low=0)
    compat: str = setting(
        "ours",
        "rl4vlm: the share of goal conditions that are met is paid in every turn, not its growth",
        choices=Compat,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.tasks:
            if kind not in ALFWORLD_TASKS:
                hint = did_you_mean(kind, ALFWORLD_TASKS)
                raise ConfigError(f"env.tasks: there is no '{kind}'; known: {', '.join(ALFWORLD_TASKS)}.{hint}")
        if self.thor is not None and self.data is None:
            raise ConfigError("env.thor plays ALFWorld's own games alone: name their folder by env.data")

    def check(self, run: "RunConfig") -> None:
        if self.thor is not None and "expert" in (getattr(run.stage, "policy", ""), getattr(run.stage, "rater", "")):
            raise ConfigError(
                "the planner knows the world of ALFWorld's texts, and env.thor plays in another: leave out env.thor, "
                "or set stage.policy=model or random, and stage.rater=none"
            )


@dataclass
class CustomConfig(EnvConfig):
    """An env of your own, from an import path."""

    makes = "vlm_agents.envs.custom:make"
    foreign = True

    family: str = "custom"
    factory: str = setting(MISSING, "package.module:attribute that is called with `kwargs` and gives the env")
    id: str = setting("", "name of the env in the record; empty: the factory's path")
    kwargs: Any = setting(
        None, "what the factory is given; env.max_steps is added where it is set", wanted="settings or null"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kwargs("env.kwargs", self.kwargs)
        self.id = self.id or self.factory

    @property
    def success_remedy(self) -> str:
        return "a look at what the steps of env.factory's env call a success"


def families(part: type[EnvConfig]) -> Iterator[type[EnvConfig]]:
    """The classes below `part` that are a family."""
    for kind in part.__subclasses__():
        if vars(kind).get("family", MISSING) != MISSING:
            yield kind
        yield from families(kind)


FAMILIES = {kind.family: kind for kind in families(EnvConfig)}
