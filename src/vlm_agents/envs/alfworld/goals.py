"""ALFWorld's kinds of tasks, and how much of one is done.

The counting is that of ALFWorld's THOR env, `goal_conditions_met`, done on the facts of the game.
"""

from collections import Counter
from typing import NamedTuple

from vlm_agents.config import ALFWORLD_TASKS
from vlm_agents.envs.alfworld.game import Game
from vlm_agents.envs.alfworld.pddl import State

SIMPLE, LIGHT, CLEAN, HEAT, COOL, TWO = KINDS = ALFWORLD_TASKS


class Treatment(NamedTuple):
    """What a task asks to be done to the object: the verb, what it is afterwards, and the receptacle that does it."""

    verb: str
    state: str
    appliance: str


TREATMENTS = {
    CLEAN: Treatment("clean", "isclean", "SinkBasin"),
    HEAT: Treatment("heat", "ishot", "Microwave"),
    COOL: Treatment("cool", "iscool", "Fridge"),
}


class Progress(NamedTuple):
    met: int
    of: int

    @property
    def rate(self) -> float:
        return self.met / self.of


def progress(game: Game, state: State) -> Progress:
    """The conditions of the goal that are met now; of a task of another kind, whether it is won."""
    wanted = _of_type(state, "objecttype", game.named("object_target"))
    targets = _of_type(state, "receptacletype", game.named("parent_target"))
    inside = [(thing, place) for _, thing, place in state.with_predicate("inreceptacle")]
    there = [(thing, place) for thing, place in inside if thing in wanted and place in targets]
    if game.kind == SIMPLE:
        return Progress(int(bool(there)), 1)
    if game.kind == TWO:
        return Progress(min(2, max(Counter(place for _, place in there).values(), default=0)), 2)
    if game.kind == LIGHT:
        lamps = _of_type(state, "objecttype", game.named("toggle_target"))
        lit = {thing for _, thing in state.with_predicate("istoggled")} & lamps
        here = {spot for _, _, spot in state.with_predicate("atlocation")}
        near = {place for _, place, spot in state.with_predicate("receptacleatlocation") if spot in here}
        held = any(thing in wanted for _, _, thing in state.with_predicate("holds"))
        return Progress(held + any(thing in lit and place in near for thing, place in inside), 2)
    if game.kind in TREATMENTS:
        done = {thing for _, thing in state.with_predicate(TREATMENTS[game.kind].state)} & wanted
        return Progress(bool(there) + bool(done) + any(thing in done for thing, _ in there), 3)
    return Progress(int(state.won()), 1)


def _of_type(state: State, predicate: str, kind: str) -> set[str]:
    return {name for _, name, one in state.with_predicate(predicate) if one == f"{kind}type"}
