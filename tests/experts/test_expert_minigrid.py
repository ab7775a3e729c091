"""The planner's advice on real MiniGrid worlds: it wins, is shortest, recovers, and says what is there."""

import copy
import re

import numpy as np
import pytest
from minigrid.core.world_object import Door
from minigrid.minigrid_env import MiniGridEnv

from vlm_agents.config import MiniGridConfig
from vlm_agents.envs import make_env
from vlm_agents.envs.minigrid import FACING, MiniGrid, door_state
from vlm_agents.errors import ConfigError
from vlm_agents.experts import with_expert
from vlm_agents.experts.minigrid import PlanExpert, mission_of
from vlm_agents.experts.planner import Layout, Search, State
from vlm_agents.types import Advice

COVERED = [
    f"MiniGrid-{name}-v0"
    for name in (
        "Empty-8x8", "Empty-Random-5x5", "DoorKey-5x5", "DoorKey-6x6", "DoorKey-8x8", "FourRooms",
        "SimpleCrossingS9N3", "LavaGapS6", "LavaCrossingS9N2", "DistShift1", "Unlock", "UnlockPickup",
        "BlockedUnlockPickup", "MultiRoom-N2-S4", "MultiRoom-N6", "KeyCorridorS3R2", "KeyCorridorS4R3", "LockedRoom",
        "GoToDoor-6x6", "GoToObject-6x6-N2", "Fetch-6x6-N2", "Fetch-8x8-N3",
    )
]  # fmt: skip
COORDINATES = r"\((\d+),(\d+)\)"
THING = rf"(?:\w+ (?:key|ball|box) {COORDINATES}|\w+ door {COORDINATES} (?:locked|closed|open)|goal {COORDINATES})"
THOUGHT = re.compile(
    rf"agent {COORDINATES} facing (?:right|down|left|up)(?:, carrying the \w+ (?:key|ball|box))?(?:, {THING})*"
    rf"(?:, lava(?: {COORDINATES}){{1,3}})?"
    rf"; (?:go to|pick up|open|drop|stop at) the (?:\w+ (?:key|door|ball|box)|goal), next {COORDINATES}"
)


def advised(env_id: str) -> tuple[MiniGrid, PlanExpert]:
    game = MiniGrid(MiniGridConfig(id=env_id, tile_size=4))
    return game, PlanExpert(game)


@pytest.mark.parametrize("env_id", COVERED)
def test_expert_wins_in_as_many_steps_as_it_said(env_id: str) -> None:
    cfg = MiniGridConfig(id=env_id, tile_size=4)
    env = with_expert(make_env(cfg), cfg)
    for seed in range(20):
        advice = env.reset(seed).advice
        distances, steps = [], []
        while advice:
            distances.append(advice.distance)
            steps.append(env.step(advice.action))
            advice = steps[-1].observation.advice
        assert distances == list(range(len(steps), 0, -1))  # one less at each step: nothing was mispredicted
        assert steps[-1].success == 1.0
        assert steps[-1].reward > 0


def brute_force(world: MiniGridEnv, doing: list[int]) -> int:
    """Steps to a reward by breadth-first search through copies of the real env."""

    def key(world: MiniGridEnv) -> tuple:
        held = world.carrying.encode() if world.carrying else None
        return world.grid.encode().tobytes(), tuple(map(int, world.agent_pos)), int(world.agent_dir), held

    level, seen, steps = [world], {key(world)}, 0
    while level:
        steps += 1
        reached = []
        for parent in level:
            for action in doing:
                child = copy.deepcopy(parent)
                _, reward, terminated, _, _ = child.step(action)
                if float(reward) > 0:
                    return steps
                if not terminated and key(child) not in seen:
                    seen.add(key(child))
                    reached.append(child)
        level = reached
    raise AssertionError("no way to a reward")


@pytest.mark.parametrize(
    ("env_id", "doing"),
    [
        ("MiniGrid-Empty-5x5-v0", [0, 1, 2]),
        ("MiniGrid-DoorKey-5x5-v0", [0, 1, 2, 3, 5]),  # dropping the only key can't shorten anything
        ("MiniGrid-GoToDoor-5x5-v0", [0, 1, 2, 6]),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_way_is_shorter(env_id: str, doing: list[int], seed: int) -> None:
    game, expert = advised(env_id)
    game.reset(seed)
    advice = expert.start()
    assert advice
    assert advice.distance == brute_force(game.world, doing)


class Blind(Search):
    """The same search without a bound: plain uniform cost, shortest for sure."""

    def bound(self, state: State) -> int:
        return 0


@pytest.mark.parametrize(
    "env_id",
    [
        "MiniGrid-DoorKey-8x8-v0", "MiniGrid-FourRooms-v0", "MiniGrid-LavaCrossingS9N2-v0", "MiniGrid-Unlock-v0",
        "MiniGrid-UnlockPickup-v0", "MiniGrid-BlockedUnlockPickup-v0", "MiniGrid-KeyCorridorS3R1-v0",
        "MiniGrid-KeyCorridorS4R3-v0", "MiniGrid-MultiRoom-N4-S5-v1",
        "MiniGrid-GoToObject-8x8-N2-v0", "MiniGrid-Fetch-8x8-N3-v0",
    ],
)  # fmt: skip
def test_the_bound_costs_no_length(env_id: str) -> None:
    game, _ = advised(env_id)
    for seed in range(3):
        game.reset(seed)
        layout = Layout(game.world)
        plans = [search(layout, mission_of(layout)).plan(layout.state()) for search in (Search, Blind)]
        assert plans[0]
        assert plans[1]
        assert len(plans[0]) == len(plans[1])


@pytest.mark.parametrize(
    "env_id",
    [
        "MiniGrid-DoorKey-6x6-v0", "MiniGrid-FourRooms-v0", "MiniGrid-SimpleCrossingS9N3-v0", "MiniGrid-Unlock-v0",
        "MiniGrid-MultiRoom-N6-v0", "MiniGrid-KeyCorridorS3R3-v0", "MiniGrid-LockedRoom-v0",
    ],
)  # fmt: skip
def test_expert_recovers_from_random_moves(env_id: str) -> None:
    cfg = MiniGridConfig(id=env_id, tile_size=4)
    env = with_expert(make_env(cfg), cfg)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        now, success = env.reset(seed), None
        while success is None:
            assert now.advice
            assert now.legal_actions
            strays = rng.random() < 0.3
            step = env.step(str(rng.choice(now.legal_actions)) if strays else now.advice.action)
            success = step.success if step.terminated or step.truncated else None
            now = step.observation
        assert success == 1.0


def test_most_steps_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    plan = Search.plan
    monkeypatch.setattr(Search, "plan", lambda self, start: searched.append(start) or plan(self, start))
    cfg = MiniGridConfig(tile_size=4)
    env = with_expert(make_env(cfg), cfg)
    advice = env.reset(0).advice
    for action in (None, "turn left", "turn right"):  # seed 0 begins with a left turn, which the right turn undoes
        advice = env.step(action).observation.advice
    while advice:
        advice = env.step(advice.action).observation.advice
    assert len(searched) == 1


@pytest.mark.parametrize("env_id", COVERED)
def test_thoughts_say_what_is_there(env_id: str) -> None:
    game, expert = advised(env_id)
    for seed in range(2):
        game.reset(seed)
        advice = expert.start()
        while advice:
            check_thought(advice, game.world)
            advice = None if game.step(advice.action).terminated else expert.follow(advice.action)


def check_thought(advice: Advice, world: MiniGridEnv) -> None:
    """Every word of the scene against the grid, and the next cell against the agent's reach."""
    assert THOUGHT.fullmatch(advice.thought), advice.thought
    seen, todo = advice.thought.split("; ")
    x, y = world.agent_pos
    agent, *parts = seen.split(", ")
    assert agent == f"agent ({x},{y}) facing {FACING[world.agent_dir]}"
    carried = f"carrying the {world.carrying.color} {world.carrying.type}" if world.carrying else None
    assert [part for part in parts if part.startswith("carrying")] == ([carried] if carried else [])
    for name, column, row, state in re.findall(rf"(\w+ \w+|goal) {COORDINATES} ?(\w*)", seen.split(" facing ")[1]):
        thing = world.grid.get(int(column), int(row))
        assert thing
        assert name in (f"{thing.color} {thing.type}", thing.type)
        assert state == (door_state(thing) if isinstance(thing, Door) else "")
    for column, row in re.findall(COORDINATES, seen.partition("lava ")[2]):
        thing = world.grid.get(int(column), int(row))
        assert thing
        assert thing.type == "lava"
    column, row = (int(part) for part in re.findall(COORDINATES, todo)[0])
    assert abs(column - int(x)) + abs(row - int(y)) == 1
    if advice.action == "go forward":
        assert (column, row) == tuple(world.front_pos)


def test_thoughts_of_a_whole_episode() -> None:
    game, expert = advised("MiniGrid-DoorKey-5x5-v0")
    game.reset(0)
    advice, said = expert.start(), []
    while advice:
        said.append((advice.action, advice.thought))
        advice = None if game.step(advice.action).terminated else expert.follow(advice.action)
    rest = "yellow door (2,1) locked, goal (3,3)"
    held = f"carrying the yellow key, {rest}"
    gone = "carrying the yellow key, yellow door (2,1) open, goal (3,3)"
    assert said == [
        ("turn right", f"agent (1,3) facing left, yellow key (1,2), {rest}; go to the yellow key, next (1,2)"),
        ("pick up", f"agent (1,3) facing up, yellow key (1,2), {rest}; pick up the yellow key, next (1,2)"),
        ("go forward", f"agent (1,3) facing up, {held}; go to the yellow door, next (1,2)"),
        ("go forward", f"agent (1,2) facing up, {held}; go to the yellow door, next (1,1)"),
        ("turn right", f"agent (1,1) facing up, {held}; go to the yellow door, next (2,1)"),
        ("toggle", f"agent (1,1) facing right, {held}; open the yellow door, next (2,1)"),
        ("go forward", f"agent (1,1) facing right, {gone}; go to the goal, next (2,1)"),
        ("go forward", f"agent (2,1) facing right, {gone}; go to the goal, next (3,1)"),
        ("turn right", f"agent (3,1) facing right, {gone}; go to the goal, next (3,2)"),
        ("go forward", f"agent (3,1) facing down, {gone}; go to the goal, next (3,2)"),
        ("go forward", f"agent (3,2) facing down, {gone}; go to the goal, next (3,3)"),
    ]


def test_a_dead_end_has_no_advice() -> None:
    game, expert = advised("MiniGrid-UnlockPickup-v0")
    game.reset(0)
    assert expert.start()
    x, y = game.world.obj.cur_pos  # type: ignore[attr-defined]
    game.world.grid.set(x, y, None)  # what toggling the box does to it
    assert expert.follow("toggle") is None


@pytest.mark.parametrize("env_id", ["MiniGrid-Dynamic-Obstacles-5x5-v0", "MiniGrid-Playground-v0"])
def test_an_id_without_expert_says_which_have_one(env_id: str) -> None:
    cfg = MiniGridConfig(id=env_id)
    with pytest.raises(ConfigError, match=rf"{env_id} has no expert.*DoorKey.*KeyCorridor"):
        with_expert(make_env(cfg), cfg)
