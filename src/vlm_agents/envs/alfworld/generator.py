"""Makes household games: a pure function of a level, the kinds of tasks and a seed.

The domain, the texts, the goals and what goes into what are ALFWorld's own, from the files of its package: two of them
are tables in Python, and nothing of it is imported. Held-out seeds draw from layouts of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from vlm_agents.draws import between, pick, shuffled
from vlm_agents.envs.alfworld.game import Game
from vlm_agents.envs.alfworld.goals import CLEAN, LIGHT, SIMPLE, TREATMENTS, TWO
from vlm_agents.errors import EnvError
from vlm_agents.seeds import held_out, stable_hash

FRACTIONS = 5  # one in so many layouts is held out
LAMP = "DeskLamp"
STANDS = ("Desk", "SideTable", "Dresser")  # that a lamp may stand on
SUITED = ("Heatable", "Coolable", "Cleanable", "Sliceable")
DOMAIN_TYPES = ("Knife", "ButterKnife"), ("SinkBasin", "Microwave", "Fridge")  # which the domain names


@dataclass(frozen=True, slots=True)
class Level:
    """The least and most receptacles and objects; of how many kinds each, the commonest of a room; None: of all."""

    receptacles: tuple[int, int]
    objects: tuple[int, int]
    kinds: int | None = None


LEVELS = {
    "tiny": Level((4, 5), (2, 4), 6),
    "small": Level((6, 9), (5, 10)),
    "medium": Level((10, 18), (10, 20)),
    "large": Level((20, 30), (20, 45)),
}


class Room(NamedTuple):
    """How many there may be of each receptacle, and which objects lie about; the commonest first."""

    receptacles: dict[str, int]
    objects: tuple[str, ...]

    def of(self, kinds: int | None) -> "Room":
        """With so many kinds of each."""
        return Room(dict(list(self.receptacles.items())[:kinds]), self.objects[:kinds])


ROOMS = {
    "Kitchen": Room(
        {
            "CounterTop": 3,
            "Fridge": 1,
            "Microwave": 1,
            "SinkBasin": 1,
            "Cabinet": 8,
            "DiningTable": 1,
            "Drawer": 6,
            "StoveBurner": 4,
            "Shelf": 3,
            "SideTable": 1,
            "GarbageCan": 1,
            "CoffeeMachine": 1,
        },
        (
            *("Apple", "Egg", "Potato", "Mug", "Cup", "Plate", "Bread", "Lettuce", "Tomato", "Bowl", "Pan", "Pot"),
            *("Kettle", "Fork", "Knife", "ButterKnife", "Spoon", "Spatula", "Ladle", "DishSponge", "SaltShaker"),
            *("PepperShaker", "SoapBottle", "WineBottle", "Glassbottle", "PaperTowel", "Vase"),
        ),
    ),
    "Bedroom": Room(
        {
            "Bed": 2,
            "Desk": 2,
            "SideTable": 2,
            "Drawer": 8,
            "Shelf": 6,
            "Dresser": 2,
            "Cabinet": 4,
            "ArmChair": 2,
            "GarbageCan": 1,
            "LaundryHamper": 1,
            "Safe": 1,
        },
        (
            *("Book", "CellPhone", "KeyChain", "Pen", "Pencil", "CD", "AlarmClock", "CreditCard", "Laptop", "Pillow"),
            *("Mug", "Bowl", "BaseballBat", "BasketBall", "TennisRacket", "Cloth", "TissueBox"),
        ),
    ),
    "LivingRoom": Room(
        {
            "Sofa": 2,
            "CoffeeTable": 2,
            "SideTable": 3,
            "Shelf": 6,
            "Drawer": 6,
            "Dresser": 1,
            "ArmChair": 2,
            "DiningTable": 1,
            "Cabinet": 4,
            "GarbageCan": 1,
            "Safe": 1,
            "Ottoman": 1,
        },
        (
            *("Book", "RemoteControl", "KeyChain", "Vase", "Newspaper", "Watch", "Laptop", "Pillow", "CreditCard"),
            *("CellPhone", "Statue", "WateringCan", "Box", "TissueBox", "Plate"),
        ),
    ),
    "Bathroom": Room(
        {
            "SinkBasin": 2,
            "CounterTop": 2,
            "Toilet": 1,
            "Cabinet": 8,
            "Shelf": 4,
            "Drawer": 8,
            "SideTable": 1,
            "Cart": 1,
            "GarbageCan": 1,
            "HandTowelHolder": 2,
            "ToiletPaperHanger": 1,
            "BathtubBasin": 1,
        },
        (
            *("Cloth", "SoapBar", "SoapBottle", "ToiletPaper", "Candle", "SprayBottle", "HandTowel", "DishSponge"),
            *("TissueBox", "PaperTowel", "Plunger"),
        ),
    ),
}


class Package(NamedTuple):
    """What ALFWorld's package says of households."""

    domain: str
    grammar: str
    goals: dict[str, Any]
    holds: dict[str, set[str]]  # a receptacle, and which objects go into it
    suits: dict[str, set[str]]  # an action, and which objects it can be done to
    opens: frozenset[str]


class Layout(NamedTuple):
    """Receptacles and their objects, each a class and a number."""

    receptacles: tuple[tuple[str, int], ...]
    things: tuple[tuple[tuple[str, int], tuple[str, int]], ...]

    @property
    def identity(self) -> int:
        """The same for layouts that differ in numbers and order alone."""
        inside = [
            (place[0], tuple(sorted(thing for (thing, _), there in self.things if there == place)))
            for place in self.receptacles
        ]
        return stable_hash("alfworld", sorted(inside))


class Task(NamedTuple):
    kind: str
    target: str
    parent: str  # of a light task the lamp

    @property
    def record(self) -> dict[str, Any]:
        """As `traj_data.json` has it."""
        light = self.kind == LIGHT
        names = {"object_target": self.target, "mrecep_target": "", "object_sliced": False}
        names |= {"parent_target": "" if light else self.parent, "toggle_target": self.parent if light else ""}
        return {"task_type": self.kind, "pddl_params": names}


def generate(level: str, kinds: Sequence[str], seed: int) -> Game:
    """The game of a seed, its layout held out if and only if the seed is. EnvError without ALFWorld's package."""
    known, rules = package(), LEVELS[level]
    rng = Random(stable_hash("alfworld", level, *kinds, seed))
    while True:
        task, layout = _drawn(rng, known, rules, pick(rng, kinds))
        if (layout.identity % FRACTIONS == 0) == held_out(seed):
            break
    names = {"obj": task.target, "recep": task.parent, "toggle": task.parent}
    goal = known.goals[task.kind]
    words = pick(rng, goal["templates"]).format(**{name: value.lower() for name, value in names.items()})
    return Game(
        f"{level}/{seed}",
        known.domain,
        known.grammar.replace("UNKNOWN GOAL", words),
        _problem(known, layout, task, _filled(goal["pddl"], names)),
        task.record,
    )


@cache
def package() -> Package:
    try:
        folder = Path(str(distribution("alfworld").locate_file("alfworld")))
    except PackageNotFoundError as error:
        raise EnvError(
            "games that are made here take their rules and texts from ALFWorld's package: pip install --no-deps "
            "alfworld==0.4.2; ALFWorld's own games need no package: env.data=<their folder>"
        ) from error
    constants = _tables(folder / "gen/constants.py")
    return Package(
        (folder / "data/alfred.pddl").read_text(),
        (folder / "data/alfred.twl2").read_text(),
        _tables(folder / "gen/goal_library.py")["gdict"],
        constants["VAL_RECEPTACLE_OBJECTS"],
        constants["VAL_ACTION_OBJECTS"],
        frozenset(constants["OPENABLE_CLASS_LIST"]),
    )


def _tables(path: Path) -> dict[str, Any]:
    """What a file of an installed package assigns. Unlike runpy, which changes sys.argv meanwhile, safe in threads."""
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(path.read_text(), path, "exec"), names)
    return names


# ---- layouts ---------------------------------------------------------------------------------------------------------
def _drawn(rng: Random, known: Package, level: Level, kind: str) -> tuple[Task, Layout]:
    room = ROOMS[pick(rng, _rooms(kind))].of(level.kinds)
    task, needed = _task(rng, known, room, kind)
    bag = [name for name, most in room.receptacles.items() for _ in range(most - (name in needed))]
    count = min(between(rng, *level.receptacles), len(needed) + len(bag))
    classes = sorted([*needed, *shuffled(rng, bag)[: max(0, count - len(needed))]])
    places = [(name, classes[: index + 1].count(name)) for index, name in enumerate(classes)]
    things: list[tuple[tuple[str, int], tuple[str, int]]] = []

    def put(name: str, where: Sequence[tuple[str, int]]) -> None:
        fits = [place for place in where if name in known.holds[place[0]]]
        if fits:
            number = 1 + sum(thing[0] == name for thing, _ in things)
            things.append(((name, number), pick(rng, fits)))

    elsewhere = [place for place in places if place[0] != task.parent]  # nothing is done at the beginning
    for _ in range(between(rng, 2, 3) if kind == TWO else between(rng, 1, 2)):
        put(task.target, elsewhere)
    if kind == LIGHT:
        things.append(((LAMP, 1), pick(rng, [place for place in places if place[0] in STANDS])))
    others = [name for name in room.objects if name != task.target]
    for _ in range(between(rng, *level.objects) - len(things)):
        put(pick(rng, others), places)
    return task, Layout(tuple(places), tuple(things))


def _rooms(kind: str) -> tuple[str, ...]:
    if kind in (SIMPLE, TWO):
        return tuple(ROOMS)
    if kind == LIGHT:
        return "Bedroom", "LivingRoom"
    return ("Kitchen", "Bathroom") if kind == CLEAN else ("Kitchen",)


def _task(rng: Random, known: Package, room: Room, kind: str) -> tuple[Task, list[str]]:
    """A task in the room, and the receptacles without which it can't be done or would be done already."""
    treated = TREATMENTS.get(kind)
    appliance = treated.appliance if treated else ""
    suited = known.suits[f"{treated.verb}able".capitalize()] if treated else set(room.objects)
    targets = [name for name in room.objects if name in suited]
    while True:
        target = pick(rng, targets)
        homes = [name for name in room.receptacles if target in known.holds[name]]
        if kind == LIGHT and homes:
            stand = pick(rng, [name for name in STANDS if name in room.receptacles])
            return Task(kind, target, LAMP), [*dict.fromkeys((stand, pick(rng, homes)))]
        parents = [name for name in homes if name != appliance]
        if len(homes) > 1 and parents:
            parent = pick(rng, parents)
            home = pick(rng, [name for name in homes if name != parent])
            return Task(kind, target, parent), [*dict.fromkeys(filter(None, (appliance, parent, home)))]


# ---- PDDL ------------------------------------------------------------------------------------------------------------
def _problem(known: Package, layout: Layout, task: Task, goal: str) -> str:
    """As Fast Downward wants it: the sections in this order, no name declared twice."""
    otypes = {thing[0] for thing, _ in layout.things} | set(DOMAIN_TYPES[0]) | {task.target}
    rtypes = {place[0] for place in layout.receptacles} | set(DOMAIN_TYPES[1]) | ({task.parent} - otypes)
    spots = {place: f"loc_bar_{number}" for number, place in enumerate(layout.receptacles, 1)}
    objects = ["agent1 - agent", "loc_bar_0 - location"]
    objects += [f"{name}Type - otype" for name in sorted(otypes)] + [f"{name}Type - rtype" for name in sorted(rtypes)]
    init = ["(= (total-cost) 0)", "(atLocation agent1 loc_bar_0)"]
    for place, spot in spots.items():
        name = _ident(place)
        objects += [f"{name} - receptacle", f"{spot} - location"]
        init += [f"(receptacleType {name} {place[0]}Type)", f"(receptacleAtLocation {name} {spot})"]
        init += [f"(openable {name})"] if place[0] in known.opens else []
    for thing, place in layout.things:
        name = _ident(thing)
        objects.append(f"{name} - object")
        init += [f"(objectType {name} {thing[0]}Type)", f"(inReceptacle {name} {_ident(place)})"]
        init += [f"(objectAtLocation {name} {spots[place]})", f"({_use(thing[0])} {name})"]
        init += [f"({suited.lower()} {name})" for suited in SUITED if thing[0] in known.suits[suited]]
    for place, thing in product(sorted(rtypes), sorted(otypes)):
        init += [f"(canContain {place}Type {thing}Type)"] if thing in known.holds.get(place, ()) else []
    sections = f"(:objects {' '.join(objects)})\n(:init {' '.join(init)})\n{goal}\n(:metric minimize (total-cost))"
    return f"(define (problem made)\n(:domain alfred)\n{sections}\n)\n"


def _use(name: str) -> str:
    return "toggleable" if name == LAMP else "pickupable"


def _filled(goal: str, names: dict[str, str]) -> str:
    """The goal of ALFWorld's library, which also closes the definition that it stands in."""
    for name, value in names.items():
        goal = goal.replace(f"{{{name}}}", value)
    return goal.replace(" # ", " - ").strip().removesuffix(")")


def _ident(one: tuple[str, int]) -> str:
    """An id that the names for people are made from: `Sink_bar_1_bar_SinkBasin` is sinkbasin 1."""
    name, number = one
    whole = name.removesuffix("Basin")
    return f"{whole}_bar_{number}" + (f"_bar_{name}" if whole != name else "")
