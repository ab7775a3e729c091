"""Shortest plans in a grid world: A* over minigrid's exact dynamics.

Searches compact states of its own and never steps an env. It knows nothing of ids or words: `experts.minigrid` says
what the mission is and what to make of the plan. Boxes are solid: what they contain isn't planned with.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from minigrid.core.actions import Actions
from minigrid.core.world_object import Door, Key, WorldObj
from minigrid.minigrid_env import MiniGridEnv

from vlm_agents.envs.minigrid import door_state

FAR = 10_000  # the walk to a cell that can't be reached, larger than any plan


class State(NamedTuple):
    """Where everything is. A cell is `row * width + column`."""

    cell: int
    facing: int
    carried: int | None  # index into Layout.things
    places: tuple[int, ...]  # cell of each of Layout.things; -1 for the carried and for destroyed ones
    doors: tuple[str, ...]  # open, closed or locked, for each of Layout.doors


Plan = list[tuple[State, Actions]]  # each state on the way and the action to take in it


@dataclass(frozen=True)
class Mission:
    """What ends the episode well: standing in one of `cells`, holding one of `lift`, or door `opened` being open.

    `say_done`: standing there, beside `thing`, isn't enough, and toggling anything ends the episode badly.
    """

    cells: frozenset[int] = frozenset()
    lift: frozenset[int] = frozenset()
    opened: int | None = None
    say_done: bool = False
    thing: WorldObj | None = None
    hands_off: bool = False  # lifting anything that isn't in `lift` ends the episode badly

    def met(self, state: State) -> bool:
        return (
            state.cell in self.cells
            or state.carried in self.lift
            or (self.opened is not None and state.doors[self.opened] == "open")
        )


class Layout:
    """What stays the same during an episode, and how the rest is read from the world."""

    def __init__(self, world: MiniGridEnv) -> None:
        self.world = world
        self.steps = (1, world.width, -1, -world.width)
        grid = list(enumerate(world.grid.grid))
        self.things = [thing for _, thing in grid if thing and thing.can_pickup()]
        self.doors = {cell: thing for cell, thing in grid if isinstance(thing, Door)}
        self.door_index = {cell: index for index, cell in enumerate(self.doors)}
        self.solid = frozenset(cell for cell, thing in grid if thing and thing.type in ("wall", "lava"))
        self.bare = frozenset(cell for cell, thing in grid if thing is None or thing.can_pickup())
        # keys[i]: the things that unlock door i
        self.keys = [
            frozenset(n for n, thing in enumerate(self.things) if isinstance(thing, Key) and thing.color == door.color)
            for door in self.doors.values()
        ]

    def state(self) -> State:
        """The world as it is now."""
        world = self.world
        x, y = (int(part) for part in world.agent_pos)
        at = {id(thing): cell for cell, thing in enumerate(world.grid.grid) if thing}
        carried = next((n for n, thing in enumerate(self.things) if thing is world.carrying), None)
        places = tuple(at.get(id(thing), -1) for thing in self.things)
        doors = tuple(door_state(door) for door in self.doors.values())
        return State(y * world.width + x, int(world.agent_dir), carried, places, doors)

    def walk(self, sources: Iterable[int], closed: Iterable[int] = ()) -> list[int]:
        """Cells between each cell and the nearest source, when nothing but walls, lava and `closed` is in the way."""
        distance = [FAR] * len(self.world.grid.grid)
        blocked = self.solid.union(closed)
        frontier = list(sources)
        for cell in frontier:
            distance[cell] = 0
        for cell in frontier:  # grows while it is read: a queue
            for near in self.neighbours(cell):
                if near not in blocked and distance[near] == FAR:
                    distance[near] = distance[cell] + 1
                    frontier.append(near)
        return distance

    def front(self, state: State) -> int:
        """The cell that the agent faces."""
        return state.cell + self.steps[state.facing]

    def neighbours(self, cell: int) -> frozenset[int]:
        return frozenset(cell + step for step in self.steps if 0 <= cell + step < len(self.world.grid.grid))

    def moves(self, state: State, mission: Mission) -> Iterator[tuple[Actions, State]]:
        """The actions that could serve a plan, and what minigrid makes of each."""
        _, facing, carried, places, doors = state
        yield Actions.left, state._replace(facing=(facing - 1) % 4)
        yield Actions.right, state._replace(facing=(facing + 1) % 4)
        front = self.front(state)
        if front in self.solid:
            return
        door = self.door_index.get(front)
        if door is not None and doors[door] != "open":
            if not mission.say_done and (doors[door] == "closed" or carried in self.keys[door]):
                opened = (*doors[:door], "open", *doors[door + 1 :])
                yield Actions.toggle, state._replace(doors=opened)
        elif front in places:
            thing = places.index(front)
            if carried is None and (thing in mission.lift or not mission.hands_off):
                yield Actions.pickup, state._replace(carried=thing, places=_put(places, thing, -1))
        else:
            yield Actions.forward, state._replace(cell=front)
            # empty hands serve nothing but lifting another thing
            if carried is not None and front in self.bare and len(places) > 1:
                yield Actions.drop, state._replace(carried=None, places=_put(places, carried, front))


def _put(places: tuple[int, ...], thing: int, cell: int) -> tuple[int, ...]:
    return (*places[:thing], cell, *places[thing + 1 :])


class Search:
    """A* for one mission in one layout. The bound never exceeds the true cost, so plans are shortest."""

    def __init__(self, layout: Layout, mission: Mission) -> None:
        self.layout = layout
        self.mission = mission
        self.walk = cache(lambda *cells: layout.walk(cells))
        self.door_cells = tuple(layout.doors)
        self.gate = self._gate()

    def _gate(self) -> int | None:
        """A locked door without which no end of the mission can be reached, with a single key."""
        start = self.layout.state()
        for door, cell in enumerate(self.door_cells):
            if start.doors[door] == "locked" and len(self.layout.keys[door]) == 1:
                reached = self.layout.walk([start.cell], closed=[cell])
                if all(reached[end] == FAR for end in self._ends(start)):
                    return door
        return None

    def _ends(self, state: State) -> tuple[int, ...]:
        """The cells that the mission wants entered or faced."""
        if self.mission.opened is not None:
            return (self.door_cells[self.mission.opened],)
        if self.mission.lift:
            return tuple(state.places[thing] for thing in self.mission.lift if state.places[thing] >= 0)
        return tuple(self.mission.cells)

    def bound(self, state: State) -> int:
        """At least so many actions are left: walks through doors and things, the turns at once due, and each grip."""
        if self.mission.met(state):
            return 0
        ends = self._ends(state)
        if not ends:
            return FAR
        lift = bool(self.mission.lift)
        if self.gate is None or state.doors[self.gate] != "locked":
            spare = int(lift and state.carried is not None) + int(not self.mission.cells)
            return self._leg(state, ends, enter=bool(self.mission.cells)) + spare
        gate = self.door_cells[self.gate]
        (key,) = self.layout.keys[self.gate]
        rest = 1 if self.mission.opened == self.gate else 2 + self.walk(*ends)[gate] + int(lift)
        if state.carried == key:
            return self._leg(state, (gate,)) + rest
        place = state.places[key]
        fetch = int(state.carried is not None) + self._leg(state, (place,)) + 1
        return fetch + max(self.walk(gate)[place] - 2, 0) + rest

    def _leg(self, state: State, ends: tuple[int, ...], enter: bool = False) -> int:
        """Moves and first turns until one of `ends` is faced, or entered."""
        walk = self.walk(*ends)
        here = walk[state.cell]
        if here == 0:
            return 0
        turns = 2
        for turn in (0, 1, -1):
            if walk[state.cell + self.layout.steps[(state.facing + turn) % 4]] < here:
                turns = abs(turn)
                break
        return here - (not enter) + turns

    def plan(self, start: State) -> Plan | None:
        """The states of a shortest plan with the action to take in each; None if there is no plan."""
        order = itertools.count()
        came: dict[State, tuple[State, Actions] | None] = {start: None}
        cost = {start: 0}
        frontier = [(self.bound(start), 0, start)]
        while frontier:
            bound, _, state = heapq.heappop(frontier)
            if bound >= FAR:
                return None
            if self.mission.met(state):
                return self._trace(came, state)
            spent = cost[state] + 1
            for action, then in self.layout.moves(state, self.mission):
                if spent < cost.get(then, FAR):
                    cost[then] = spent
                    came[then] = (state, action)
                    heapq.heappush(frontier, (spent + self.bound(then), -next(order), then))
        return None

    def _trace(self, came: dict[State, tuple[State, Actions] | None], end: State) -> Plan:
        plan = [(end, Actions.done)] if self.mission.say_done else []
        while (link := came[end]) is not None:
            plan.append(link)
            end = link[0]
        return plan[::-1]
