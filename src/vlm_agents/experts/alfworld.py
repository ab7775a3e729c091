"""Experts of ALFWorld's games. The planner knows where everything is, which no agent does, and goes a shortest way, by
breadth-first search over what matters for the goal. The searcher knows what it has seen: it looks into one receptacle
after the other until it has seen what it needs, and goes the planner's way then.
"""

from collections.abc import Iterator, Set
from functools import cached_property
from typing import NamedTuple

from vlm_agents.envs.alfworld.env import AlfWorld
from vlm_agents.envs.alfworld.goals import KINDS, LIGHT, TREATMENTS, TWO
from vlm_agents.envs.alfworld.world import World
from vlm_agents.experts import NoExpert
from vlm_agents.types import Advice

ENOUGH = 3  # receptacles, of those that would do alike, that are thought of


class Step(NamedTuple):
    """An action of the domain on a thing, which may be none, and a receptacle."""

    action: str
    thing: str
    place: str


class Standing(NamedTuple):
    """What of the world changes and matters: where the agent is, what it holds, and of each thing where it is."""

    here: str
    held: str
    things: tuple[str, ...]  # the place of each of the plan's things; empty: in the hand
    opened: frozenset[str]
    done: frozenset[str]  # things that were cleaned, heated or cooled as asked
    lit: frozenset[str]  # lamps
    due: str = ""  # the place that it went to or opened, which has to be used next: no shortest way does so in vain


class AlfWorldExpert:
    """None where no way is left."""

    def __init__(self, env: AlfWorld) -> None:
        if env.cfg.thor is not None:
            raise NoExpert("env=alfworld has an expert of its texts' world alone, and env.thor plays in another")
        self.env = env

    def start(self) -> Advice | None:
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        world = self.env.world
        assert isinstance(world, World)
        if world.won or world.game.kind not in KINDS:
            return None
        way = Planner(world).way()
        return self._next(world, way) if way else None

    def _next(self, world: World, way: list[Step]) -> Advice | None:
        return Advice(thought(world, way), command(world, way[0]), len(way))


class Searcher(AlfWorldExpert):
    """What it says an agent can know: for clones, by `env.expert=`. `distance` is the planner's: what is left for one
    who knows."""

    def start(self) -> Advice | None:
        self.seen = set[str]()
        return super().start()

    def _next(self, world: World, way: list[Step]) -> Advice | None:
        known = Planner(world)
        self.seen |= known.in_sight
        known.forget_all_but(self.seen)
        if steps := known.way():
            said, step = thought(world, steps), steps[0]
        elif unseen := sorted(known.spot.keys() - self.seen):
            step = known.look(next((place for place in unseen if known.spot[place] == known.here), unseen[0]))
            said = search(known, step)
        else:
            return None
        return Advice(said, command(world, step), len(way))


def command(world: World, step: Step) -> str:
    """How the game wants the step written."""
    wanted = {step.place, step.thing} - {""}
    return next(
        words
        for words, ground in world.does.items()
        if ground.action.name == step.action and wanted <= set(ground.objects)
    )


def thought(world: World, way: list[Step]) -> str:
    """What it is after, and what it does for that."""
    step, game = way[0], world.game
    thing, place = (world.names[name].strip() if name else "" for name in (step.thing, step.place))
    after = next((world.names[one.thing].strip() for one in way[1:] if one.thing), "")
    holds = any(True for _ in world.state.with_predicate("holds"))
    if step.action == "gotolocation":
        purpose = {
            "pickupobject": f"I need a {game.named('object_target')}",
            "putobject": f"I have the {after}, and it belongs there",
            "toggleobject": f"I have the {game.named('object_target')}, and need light",
        }
        last = "toggleobject"  # on the way to a lamp that is lit already
        then = next((one.action for one in way[1:] if one.action not in ("gotolocation", "openobject")), last)
        verb = then.removesuffix("object")
        return f"{purpose.get(then, f'I have the {after}, and have to {verb} it')}. I go to the {place}."
    said = {
        "openobject": f"The {place} is closed. I open it" + (f" for the {after}." if holds else "."),
        "pickupobject": f"Here is the {thing}. I take it.",
        "putobject": f"I leave the {thing} here, in or on the {place}.",
        "toggleobject": f"Here is the {thing}. I turn it on.",
    }
    return said.get(step.action, f"Here is the {place}. I {step.action.removesuffix('object')} the {thing}.")


def search(known: "Planner", step: Step) -> str:
    """Why the searcher, who knows so much, looks into a receptacle."""
    place = known.world.names[step.place].strip()
    if step.action == "openobject":
        return f"The {place} is closed. I open it."
    target, lamp = (known.world.game.named(name) for name in ("object_target", "toggle_target"))
    lacking = [f"the {name}" for name, seen in ((target, known.wanted), (lamp, known.lamps)) if name and not seen]
    said = f"I have not seen {' and '.join(lacking)} yet" if lacking else f"I need another {target}"
    return f"{said}. I go to the {place}."


class Planner:
    """The world as it is now, and the search from there."""

    def __init__(self, world: World) -> None:
        self.world, game = world, world.game
        pairs = world.state.with_predicate
        self.spot = {place: spot for _, place, spot in pairs("receptacleatlocation")}
        self.inside = {thing: place for _, thing, place in sorted(pairs("inreceptacle"))}
        self.kind_of = {name: kind for name in ("objecttype", "receptacletype") for _, name, kind in pairs(name)}
        self.openable = {place for _, place in pairs("openable")}
        self.opened = frozenset(place for _, place in pairs("opened"))
        takeable = {thing for _, thing in pairs("pickupable")}
        self.fits = {(place, thing) for _, place, thing in pairs("cancontain")}
        (_, _, self.here), *_ = pairs("atlocation")
        self.held = next((thing for _, _, thing in pairs("holds")), "")
        self.wanted = self._of(f"{game.named('object_target')}type") & takeable
        self.parents = self._of(f"{game.named('parent_target')}type") & self.spot.keys()
        self.lamps = {thing for thing in self._of(f"{game.named('toggle_target')}type") if thing in self.inside}
        self.treatment = TREATMENTS.get(game.kind)
        self.appliances: set[str] = set()
        self.things = sorted(self.wanted | ({self.held} - {""}))
        if self.treatment:
            self.appliances = self._of(f"{self.treatment.appliance.lower()}type") & self.spot.keys()
            self.wanted &= {thing for _, thing in pairs(f"{self.treatment.verb}able")}

    @property
    def in_sight(self) -> set[str]:
        """The receptacles here that aren't shut."""
        closed = self.openable - self.opened
        return {place for place, spot in self.spot.items() if spot == self.here and place not in closed}

    def forget_all_but(self, seen: Set[str]) -> None:
        """Know of those things alone that are held, or in receptacles that were seen."""
        known = {thing for thing, place in self.inside.items() if place in seen} | {self.held}
        self.wanted &= known
        self.lamps &= known
        self.things = [thing for thing in self.things if thing in known]

    def look(self, place: str) -> Step:
        """What leads to seeing what a receptacle holds: it is gone to, and opened."""
        return Step("openobject" if self.spot[place] == self.here else "gotolocation", "", place)

    def way(self) -> list[Step]:
        """The steps of a shortest way; empty where there is none."""
        state = self.treatment.state if self.treatment else "none"
        done = frozenset(thing for _, thing in self.world.state.with_predicate(state))
        lit = frozenset(thing for _, thing in self.world.state.with_predicate("istoggled")) & self.lamps
        places = tuple("" if thing == self.held else self.inside.get(thing, "nowhere") for thing in self.things)
        start = Standing(self.here, self.held, places, self.opened, done, lit)
        came: dict[Standing, tuple[Standing, Step] | None] = {start: None}
        frontier = [start]
        for now in frontier:  # grows while it is read: a queue
            if self._met(now):
                way: list[Step] = []
                while (before := came[now]) is not None:
                    now, step = before
                    way.append(step)
                return way[::-1]
            for step, then in self._moves(now):
                if then not in came:
                    came[then] = now, step
                    frontier.append(then)
        return []

    def _met(self, now: Standing) -> bool:
        placed = [
            place for thing, place in zip(self.things, now.things, strict=True) if self._counts(thing, place, now)
        ]
        kind = self.world.game.kind
        if kind == LIGHT:
            return now.held in self.wanted and any(self._at(lamp, now) for lamp in now.lit)
        if kind == TWO:
            return len(set(placed)) < len(placed)
        return bool(placed)

    def _counts(self, thing: str, place: str, now: Standing) -> bool:
        return thing in self.wanted and place in self.parents and (not self.treatment or thing in now.done)

    def _at(self, thing: str, now: Standing) -> bool:
        return self.spot.get(self.inside.get(thing, "")) == now.here

    def _moves(self, now: Standing) -> Iterator[tuple[Step, Standing]]:
        for place in self._places:
            if self.spot[place] == now.here:
                if now.due in ("", place):
                    yield from self._uses(now, place)
            elif not now.due:
                yield Step("gotolocation", "", place), now._replace(here=self.spot[place], due=place)

    def _uses(self, now: Standing, place: str) -> Iterator[tuple[Step, Standing]]:
        by_hand = list(self._hand(now, place))
        if place not in self.openable or place in now.opened:
            yield from by_hand
        elif by_hand:
            yield Step("openobject", "", place), now._replace(opened=now.opened | {place}, due=place)
        if self.treatment and place in self.appliances and now.held in self.wanted - now.done:
            step = Step(f"{self.treatment.verb}object", now.held, place)
            yield step, now._replace(done=now.done | {now.held}, due="")
        for lamp in sorted(self.lamps - now.lit):
            if self.inside[lamp] == place:
                yield Step("toggleobject", lamp, place), now._replace(lit=now.lit | {lamp}, due="")

    def _hand(self, now: Standing, place: str) -> Iterator[tuple[Step, Standing]]:
        """Leave what is held in the receptacle, or take from it. What was taken on the way is left where it belongs
        alone."""
        if now.held:
            fits = (self.kind_of.get(place), self.kind_of.get(now.held)) in self.fits
            if fits and (place in self.parents or now.held == self.held):
                yield Step("putobject", now.held, place), self._moved(now, now.held, place)
            return
        for thing, there in zip(self.things, now.things, strict=True):
            if there == place and thing in self.wanted:
                yield Step("pickupobject", thing, place), self._moved(now, thing, "")

    def _moved(self, now: Standing, thing: str, place: str) -> Standing:
        where = tuple(place if one == thing else there for one, there in zip(self.things, now.things, strict=True))
        return now._replace(things=where, held=thing if not place else "", due="")

    @cached_property
    def _places(self) -> list[str]:
        """Where something is to be fetched, done or left."""
        needed = {self.inside[thing] for thing in (*self.things, *self.lamps) if thing in self.inside}
        needed |= self.appliances
        beside = {self.spot[place] for place in needed if place in self.spot}
        homes = self._easiest(self.parents, beside)
        if self.held and self.held not in self.wanted:
            kind = self.kind_of.get(self.held)
            homes |= self._easiest(
                {place for place in self.spot if (self.kind_of.get(place), kind) in self.fits}, beside
            )
        return sorted(needed | homes)

    def _easiest(self, places: set[str], beside: set[str]) -> set[str]:
        """A few of places that are equal but for what it takes to use them, and one at each spot where it may be
        anyway."""
        closed = self.openable - self.opened
        ranked = sorted(places, key=lambda place: (place in closed, self.spot[place] != self.here, place))
        near = {self.spot[place]: place for place in reversed(ranked)}  # the easiest at each spot
        return {*ranked[:ENOUGH], *(near[spot] for spot in beside | {self.here} if spot in near)}

    def _of(self, kind: str) -> set[str]:
        return {name for name, one in self.kind_of.items() if one == kind}
