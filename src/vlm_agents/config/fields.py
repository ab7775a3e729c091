"""What stands beside a setting: its meaning, bounds and choices; and the one check that reads them.

    lr: float = setting(1e-4, "learning rate of the policy", low=0)

Checks across fields stand in the `__post_init__` of the part that holds them, those across parts in the `check` of the
part that asks for something of another.
"""

import math
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from omegaconf import MISSING

from vlm_agents.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from vlm_agents.config.run import RunConfig


def one_of(what: str, value: Any, allowed: Any) -> None:
    """Raise unless `value` is one of the `allowed` Literal's."""
    if value not in get_args(allowed):
        words = list(map(str, get_args(allowed)))
        raise ConfigError(f"{what}={value} is not one of {', '.join(words)}.{did_you_mean(str(value), words)}")


def at_least(what: str, value: float, bound: float) -> None:
    if not value >= bound:  # a value that is no number fails too
        raise ConfigError(f"{what}={value} must be at least {bound}")
    if value == math.inf:
        raise ConfigError(f"{what}={value} must be a finite number")


def between(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{what}={value} must lie between {low} and {high}")


def check_kwargs(what: str, kwargs: Any) -> None:
    if not (kwargs is None or (isinstance(kwargs, dict) and all(isinstance(name, str) for name in kwargs))):
        raise ConfigError(f"{what} must be settings: '{what}={{size: 8}}'")


@dataclass(frozen=True)
class Setting:
    """Meaning and rules of one setting. Its type and default are the dataclass field's; null is the type's business."""

    help: str
    choices: Any = None  # a Literal
    low: float | None = None
    high: float | None = None  # with `low`
    positive: bool = False  # more than 0
    infinite: bool = False  # with `positive`: .inf will do
    wanted: str = ""  # what the value must look like, in words, where the part itself checks that
    reason: str = ""  # added to what a refused value is told
    bring_in: str = ""  # of a part that is off by default: how to have it
    may_change: bool = False  # a resumed run may have it different, as it changes nothing in what the run does
    # (another setting of the part, what that is where this is read; empty: any number above 0)
    only: tuple[str, tuple[str, ...]] | None = None

    def check(self, name: str, value: Any) -> None:
        """ConfigError, which calls the setting `name`, for a value that the rules don't allow."""
        if self.choices is not None:
            one_of(name, value, self.choices)
        elif self.positive and not (0 < value < math.inf or (value == math.inf and self.infinite)):
            raise ConfigError(f"{name}={value} must be a positive number{self.reason}")
        elif self.high is not None and self.low is not None:
            between(name, value, self.low, self.high)
        elif self.low is not None:
            at_least(name, value, self.low)

    @property
    def allowed(self) -> str:
        """The rules in a few characters: `>= 0`, `full, agent`, `with credit=gae`; empty where there are none."""
        readers = f"with {_needed(*self.only)}" if self.only else ""
        return "; ".join(filter(None, (self._values, readers)))

    @property
    def _values(self) -> str:
        if self.choices is not None:
            return ", ".join(map(str, get_args(self.choices)))
        if self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return self.wanted or ("> 0" if self.positive else "" if self.low is None else f">= {self.low:g}")


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field with a meaning, and with the rules of `Setting`. A class as default makes a new one."""
    metadata = {"setting": Setting(help, **rules)}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


class Part:
    """A part of the configuration: a dataclass whose settings are checked when it is made."""

    place: ClassVar[str]  # where it stands in a run: `env`, `model.lora`; the run itself: empty

    def __init_subclass__(cls, place: str | None = None) -> None:
        if place is not None:
            cls.place = place

    def __post_init__(self) -> None:
        for name, (_, rules) in settings_of(type(self)).items():
            value = getattr(self, name)
            if value is not None and value != MISSING:
                rules.check(dotted(type(self), name), value)
        for name, (declared, rules) in settings_of(type(self)).items():
            if rules.only and getattr(self, name) != declared.default:
                self._refuse_unread(name, declared.default, *rules.only)

    def _refuse_unread(self, name: str, default: Any, other: str, readers: tuple[str, ...]) -> None:
        """ConfigError where the `other` setting is none of the `readers`: what was set would change nothing.

        It may have been set by the YAML that was chosen, so that leaving it out wouldn't do.
        """
        value, chosen = getattr(self, name), getattr(self, other)
        read = set(readers) & set(chosen if isinstance(chosen, list) else [chosen]) if readers else chosen > 0
        if not read:
            name, other = dotted(type(self), name), dotted(type(self), other)
            needed = _needed(other, tuple(f"[{one}]" for one in readers) if isinstance(chosen, list) else readers)
            raise ConfigError(
                f"{name}={value} is read with {needed} alone, and that is {chosen}: set {name}="
                f"{'null' if default is None else default} (the chosen option may have changed it), or change {other}"
            )

    def check(self, run: "RunConfig") -> None:
        """ConfigError where the rest of the run doesn't go with this part. Called once the run is whole."""


def _needed(other: str, readers: tuple[str, ...]) -> str:
    return f"{other}={' or '.join(readers)}" if readers else f"{other} > 0"


def dotted(part: type[Part], name: str) -> str:
    """The name by which a user sets a field of a part."""
    return f"{part.place}.{name}".lstrip(".")


def settings_of(part: type[Part]) -> dict[str, tuple[Field[Any], Setting]]:
    """Every field of a part with its meaning: a subclass that gives a field another default keeps the rest."""
    return {one.name: (one, _rules(part, one.name)) for one in fields(part)}  # pyright: ignore[reportArgumentType]


def _rules(part: type[Part], name: str) -> Setting:
    for kind in part.__mro__:
        declared = vars(kind).get("__dataclass_fields__", {}).get(name)
        if declared is not None and "setting" in declared.metadata:
            return declared.metadata["setting"]
    raise TypeError(f"{part.__name__}.{name} has no meaning: declare it by setting(...)")
