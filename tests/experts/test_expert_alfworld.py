"""The planner of ALFWorld: wins every game in as many steps as it says, from wherever one has gone astray."""

import random

import pytest

from vlm_agents.config import ALFWORLD_TASKS, AlfWorldConfig
from vlm_agents.envs import make_env
from vlm_agents.envs.alfworld import generator
from vlm_agents.envs.alfworld.env import AlfWorld
from vlm_agents.envs.alfworld.game import Game
from vlm_agents.envs.alfworld.generator import Layout, Task, package
from vlm_agents.envs.alfworld.goals import LIGHT, SIMPLE, TWO
from vlm_agents.envs.alfworld.world import World
from vlm_agents.experts import with_expert
from vlm_agents.experts.alfworld import Planner, Searcher


@pytest.mark.parametrize("kind", ALFWORLD_TASKS)
def test_it_wins_each_game_in_as_many_steps_as_it_says(kind: str) -> None:
    for level, games in (("tiny", 20), ("small", 20), ("medium", 6), ("large", 4)):
        cfg = AlfWorldConfig(level=level, tasks=[kind], observation="text")
        env = with_expert(make_env(cfg), cfg)
        for seed in range(games):
            advice, said = env.reset(seed).advice, []
            assert advice
            steps = advice.distance
            step = None
            while advice:
                step = env.step(advice.action)
                said.append(advice.distance)
                advice = step.observation.advice
            assert step
            assert step.success
            assert said == list(range(steps or 0, 0, -1))


@pytest.mark.parametrize("kind", ALFWORLD_TASKS)
def test_it_finds_back_from_anywhere(kind: str) -> None:
    """After thirty random moves: things lie elsewhere, something else is in the hand."""
    cfg = AlfWorldConfig(level="small", tasks=[kind], observation="text", max_steps=80)
    env = with_expert(make_env(cfg), cfg)
    for seed in range(10):
        now, rng, step = env.reset(seed), random.Random(seed), None
        for _ in range(30):
            step = env.step(rng.choice(now.legal_actions or ()))
            now = step.observation
            if step.terminated:
                break
        while not (step and step.terminated):
            assert now.advice
            step = env.step(now.advice.action)
            now = step.observation
        assert step.success


SEARCHER = "vlm_agents.experts.alfworld:Searcher"


@pytest.mark.parametrize("kind", ALFWORLD_TASKS)
def test_who_searches_wins_too(kind: str) -> None:
    """In no more steps than the planner takes and two for each receptacle."""
    cfg = AlfWorldConfig(level="tiny", tasks=[kind], observation="text", expert=SEARCHER)
    env = with_expert(make_env(cfg), cfg)
    for seed in range(20):
        now, step, turns = env.reset(seed), None, 0
        assert now.advice
        most = (now.advice.distance or 0) + 2 * len([action for action in now.legal_actions or () if "go to" in action])
        while now.advice:
            assert now.advice.action in (now.legal_actions or ())
            step, turns = env.step(now.advice.action), turns + 1
            now = step.observation
        assert step
        assert step.success
        assert turns <= most


def test_who_searches_knows_what_it_has_seen_alone() -> None:
    """The mug is in the cabinet or in the drawer: until one of them is open, the same is done for the same reason."""
    layouts = [
        Layout((("Cabinet", 1), ("Drawer", 1), ("SideTable", 1)), ((("Mug", 1), (home, 1)),))
        for home in ("Cabinet", "Drawer")
    ]
    ways = []
    for layout in layouts:
        world = household(Task(SIMPLE, "Mug", "SideTable"), layout)
        expert, said = searching(world), []
        advice = expert.start()
        while advice:
            said.append((advice.thought, advice.action))
            world.step(advice.action)
            advice = expert.follow(advice.action)
        assert world.won
        ways.append(said)
    one, other = ways
    opened = [action for _, action in one].index("open cabinet 1")
    assert one[: opened + 1] == other[: opened + 1]
    assert one[opened + 1][1].startswith("take mug 1")
    assert [action for _, action in other[opened + 1 : opened + 3]] == ["go to drawer 1", "open drawer 1"]


def told(world: World) -> list[str]:
    """What the searcher thinks until the game is won."""
    expert, said = searching(world), list[str]()
    advice = expert.start()
    while advice:
        said.append(advice.thought)
        world.step(advice.action)
        advice = expert.follow(advice.action)
    assert world.won
    return said


def test_who_searches_says_what_it_lacks() -> None:
    places = (("Desk", 1), ("Drawer", 1), ("Shelf", 1), ("SideTable", 1))
    pens = ((("Pen", 1), ("Desk", 1)), (("Pen", 2), ("Shelf", 1)))
    said = told(household(Task(TWO, "Pen", "SideTable"), Layout(places, pens)))
    assert said[0] == "I have not seen the pen yet. I go to the desk 1."
    assert any(thought.startswith("I need another pen. I go to the ") for thought in said)
    assert sum("not seen" in thought for thought in said) == 1
    places = (("Bed", 1), ("Desk", 1), ("Dresser", 1))
    things = ((("Book", 1), ("Bed", 1)), (("DeskLamp", 1), ("Dresser", 1)))
    said = told(household(Task(LIGHT, "Book", "DeskLamp"), Layout(places, things)))
    assert said[:2] == [
        "I have not seen the book and the desklamp yet. I go to the bed 1.",
        "I have not seen the desklamp yet. I go to the desk 1.",
    ]


def searching(world: World) -> Searcher:
    """The searcher of an env that is in this world."""
    env = make_env(AlfWorldConfig(level="tiny"))
    assert isinstance(env, AlfWorld)
    env.world = world
    return Searcher(env)


def test_it_says_what_it_is_after() -> None:
    cfg = AlfWorldConfig(level="tiny", tasks=["pick_heat_then_place_in_recep"], observation="text")
    env = with_expert(make_env(cfg), cfg)
    advice, thoughts = env.reset(1).advice, []
    while advice:
        thoughts.append(advice.thought)
        advice = env.step(advice.action).observation.advice
    assert thoughts[0].startswith("I need a ")
    assert any(" and have to heat it. I go to the microwave 1." in thought for thought in thoughts)
    assert any(thought.startswith("Here is the microwave 1. I heat the ") for thought in thoughts)
    assert thoughts[-1].startswith("I leave the ")


def household(task: Task, layout: Layout, *moved: tuple[str, str]) -> World:
    """`moved`: texts of the problem, and what stands there instead."""
    goal = generator._filled(
        package().goals[task.kind]["pddl"], {"obj": task.target, "recep": task.parent, "toggle": task.parent}
    )
    problem = generator._problem(package(), layout, task, goal)
    for old, new in moved:
        assert old in problem
        problem = problem.replace(old, new)
    return World(Game("made", package().domain, package().grammar, problem, task.record))


def test_of_two_lamps_the_one_that_is_lit_counts() -> None:
    places, book = (("Bed", 1), ("Desk", 1), ("Dresser", 1)), (("Book", 1), ("Bed", 1))
    lamps = (("DeskLamp", 1), ("Desk", 1)), (("DeskLamp", 2), ("Dresser", 1))
    world = household(Task(LIGHT, "Book", "DeskLamp"), Layout(places, (book, *lamps)))
    for words in ("go to desk 1", "use desklamp 2", "go to bed 1", "take book 1 from bed 1", "go to dresser 1"):
        assert world.step(words)
    assert not world.won
    assert len(Planner(world).way()) == 1


def test_a_receptacle_beside_the_thing_is_nearest() -> None:
    """ALFWorld's own games have several receptacles at one location: the sixth shelf needs no way."""
    places = (("Bed", 1), *(("Shelf", number) for number in range(1, 7)))
    layout = Layout(places, ((("Book", 1), ("Bed", 1)),))
    assert len(Planner(household(Task(SIMPLE, "Book", "Shelf"), layout)).way()) == 4
    beside = ("(receptacleAtLocation Shelf_bar_6 loc_bar_7)", "(receptacleAtLocation Shelf_bar_6 loc_bar_1)")
    assert len(Planner(household(Task(SIMPLE, "Book", "Shelf"), layout, beside)).way()) == 3


@pytest.mark.timeout(5)
def test_many_things_in_shut_drawers_take_no_longer() -> None:
    drawers = tuple(("Drawer", number) for number in range(1, 17))
    pens = tuple((("Pen", number), place) for number, place in enumerate(drawers, 1))
    world = household(Task(TWO, "Pen", "Desk"), Layout((("Desk", 1), *drawers), pens))
    assert len(Planner(world).way()) == 10
