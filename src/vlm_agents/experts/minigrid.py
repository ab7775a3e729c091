"""The expert of MiniGrid-*: which ids it can plan, what each asks for, and the plan put into words.

It sees the whole grid, not the agent's view. Ids with hidden contents, moving obstacles, ordered missions or no mission
have no expert.
"""

# pyright: reportPrivateImportUsage=false
# minigrid.envs is where minigrid's own documentation takes the classes from

from minigrid import envs
from minigrid.core.actions import Actions
from minigrid.core.world_object import WorldObj

from vlm_agents.envs.minigrid import WORDS, MiniGrid
from vlm_agents.experts import Expert, NoExpert
from vlm_agents.experts.babyai import BotExpert
from vlm_agents.experts.planner import Layout, Mission, Plan, Search, State
from vlm_agents.experts.scene import scene
from vlm_agents.types import Advice

REACH = (
    envs.EmptyEnv, envs.DoorKeyEnv, envs.FourRoomsEnv, envs.CrossingEnv, envs.LavaGapEnv, envs.DistShiftEnv,
    envs.MultiRoomEnv, envs.LockedRoomEnv,
)  # fmt: skip
LIFT = (envs.UnlockPickupEnv, envs.BlockedUnlockPickupEnv, envs.KeyCorridorEnv)
BESIDE = (envs.GoToDoorEnv, envs.GoToObjectEnv)
PLANNED = (
    "MiniGrid-Empty, DoorKey, FourRooms, SimpleCrossing, LavaCrossing, LavaGap, DistShift, MultiRoom, LockedRoom, "
    "Unlock, UnlockPickup, BlockedUnlockPickup, KeyCorridor, Fetch, GoToDoor and GoToObject"
)


def grid_expert(game: MiniGrid) -> Expert:
    """The expert of this id; NoExpert where nobody wrote one."""
    return BotExpert(game) if game.name.startswith("BabyAI-") else PlanExpert(game)


class PlanExpert:
    """Advises by the shortest plan. Every state on a plan made before is remembered, so most steps need no search."""

    def __init__(self, game: MiniGrid) -> None:
        self.world = game.world
        if not isinstance(self.world, (*REACH, *LIFT, *BESIDE, envs.UnlockEnv, envs.FetchEnv)):
            raise NoExpert(f"env.id={game.name} has no expert; those with one: BabyAI-*, {PLANNED}")

    def start(self) -> Advice | None:
        self.layout = Layout(self.world)
        self.mission = mission_of(self.layout)
        self.search = Search(self.layout, self.mission)
        self.known: dict[State, tuple[Plan, int]] = {}
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        state = self.layout.state()
        if state not in self.known:
            plan = self.search.plan(state)
            if plan is None:
                return None
            self.known |= {passed: (plan, index) for index, (passed, _) in enumerate(plan)}
        plan, index = self.known[state]
        left = plan[index:]
        return Advice(self._thought(left), WORDS[left[0][1]], len(left))

    def _thought(self, plan: Plan) -> str:
        """The scene, the next thing to grip or to get to, and the next cell to be entered or faced."""
        state, action = next((step for step in plan if step[1] > Actions.forward), plan[-1])
        verb, thing = self._grip(state, action)
        if action not in (plan[0][1], Actions.drop):
            verb = "go to"
        state, _ = next((step for step in plan if step[1] > Actions.right), plan[-1])
        row, column = divmod(self.layout.front(state), self.world.width)
        what = f"{thing.color} {thing.type}" if thing else "goal"
        return f"{scene(self.world, thing)}; {verb} the {what}, next ({column},{row})"

    def _grip(self, state: State, action: Actions) -> tuple[str, WorldObj | None]:
        """What `action` does to which thing; None is the goal."""
        front = self.layout.front(state)
        match action:
            case Actions.pickup:
                return "pick up", self.layout.things[state.places.index(front)]
            case Actions.drop:
                return "drop", self.world.carrying
            case Actions.toggle:
                return "open", self.layout.doors[front]
            case Actions.done:
                return "stop at", self.mission.thing
            case _:
                return "go to", None


def mission_of(layout: Layout) -> Mission:
    """What the world of `layout` asks for, read from minigrid's own fields, not from the mission's text."""
    world = layout.world
    match world:
        case envs.UnlockEnv():
            return Mission(opened=list(layout.doors.values()).index(world.door))
        case envs.FetchEnv():
            wanted = (world.targetType, world.targetColor)
            lift = frozenset(n for n, thing in enumerate(layout.things) if (thing.type, thing.color) == wanted)
            return Mission(lift=lift, hands_off=True)
        case envs.GoToDoorEnv() | envs.GoToObjectEnv():
            x, y = (int(part) for part in world.target_pos)
            cells = layout.neighbours(y * world.width + x) - layout.solid
            return Mission(cells=cells, say_done=True, thing=world.grid.get(x, y))
        case _ if isinstance(world, LIFT):
            return Mission(lift=frozenset({layout.things.index(world.obj)}))
        case _:
            goals = (cell for cell, thing in enumerate(world.grid.grid) if thing and thing.type == "goal")
            return Mission(cells=frozenset(goals))
