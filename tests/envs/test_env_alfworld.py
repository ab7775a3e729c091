"""ALFWorld: PDDL, texts, layouts, goals and rewards; and TextWorld, where it is installed, to the letter."""

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_agents.config import ALFWORLD_TASKS, AlfWorldConfig
from vlm_agents.envs import check_contract, make_env
from vlm_agents.envs.alfworld import games, generator
from vlm_agents.envs.alfworld.env import AlfWorld
from vlm_agents.envs.alfworld.game import Game
from vlm_agents.envs.alfworld.generator import FRACTIONS, LEVELS, generate, package
from vlm_agents.envs.alfworld.goals import HEAT, LIGHT, SIMPLE, TWO, Progress, progress
from vlm_agents.envs.alfworld.grammar import read_grammar
from vlm_agents.envs.alfworld.pddl import State, read_problem
from vlm_agents.envs.alfworld.world import NOTHING, World
from vlm_agents.errors import ConfigError, DataError, EnvError
from vlm_agents.experts import NoExpert, with_expert
from vlm_agents.seeds import TRAINING_SEEDS, panel_seeds
from vlm_agents.types import Step

# A domain of its own: two lamps, of which each can be switched, and a door that opens once both are on.
DOMAIN = """
(define (domain lamps) ; a comment (with brackets
  (:types lamp door - object)
  (:predicates (on ?l - lamp) (open ?d - door) (at ?x))
  (:action switch :parameters (?l - lamp) :precondition (at ?l)
    :effect (and (increase (total-cost) 1) (when (on ?l) (not (on ?l))) (when (not (on ?l)) (on ?l))))
  (:action unlock :parameters (?d - door) :precondition (and (at ?d) (not (open ?d)) (forall (?l - lamp) (on ?l)))
    :effect (open ?d))
  (:action stay :parameters (?d - door) :precondition (open ?d) :effect (open ?d)))
"""
PROBLEM = """
(define (problem p) (:domain lamps) (:objects l1 l2 - lamp d - door)
  (:init (at l1) (at l2) (at d) (= (total-cost) 0)) (:goal (exists (?d - door) (open ?d)))
  (:metric minimize (total-cost)))
"""


def named(state: State) -> set[str]:
    return {" ".join((one.action.name, *one.objects)) for one in state.actions()}


def do(state: State, words: str) -> None:
    state.apply(next(one for one in state.actions() if " ".join((one.action.name, *one.objects)) == words))


# ---- PDDL ------------------------------------------------------------------------------------------------------------
def test_conditions_and_effects() -> None:
    state = State(read_problem(DOMAIN, PROBLEM))
    assert named(state) == {"switch l1", "switch l2"}  # the door asks for both lamps
    do(state, "switch l1")
    assert named(state) == {"switch l1", "switch l2"}
    do(state, "switch l2")
    assert named(state) == {"switch l1", "switch l2", "unlock d"}
    do(state, "switch l2")  # the condition is of the state before: on, so it goes out
    assert named(state) == {"switch l1", "switch l2"}
    assert state.denied == {("on", "l2")}
    do(state, "switch l2")
    assert not state.won()
    do(state, "unlock d")
    assert state.won()
    assert named(state) == {"switch l1", "switch l2"}  # to stay would change nothing, and is no action


@pytest.mark.parametrize("broken", ["(define (problem p)", "", "(define (problem p) (:domain lamps))", "nonsense"])
def test_broken_pddl_is_an_error(broken: str) -> None:
    with pytest.raises(DataError, match=r"its PDDL can't be read .* fetch it again"):
        read_problem(DOMAIN, broken)


def test_a_fact_of_an_unknown_object_is_an_error() -> None:
    with pytest.raises(DataError, match="l9"):
        read_problem(DOMAIN, PROBLEM.replace("(at l1)", "(at l9)"))


# ---- texts -----------------------------------------------------------------------------------------------------------
GRAMMAR = '''
grammar :: """
  {"intro": [{"rhs": "  You see [{l.name + ' lamp' | on(l:lamp)}]."}],
   "list_empty": [{"rhs": "no lamp"}], "list_separator": [{"rhs": ", "}], "list_last_separator": [{"rhs": ", and "}]}
""";
action switch { template :: "switch {l}"; feedback :: "#lit#";
  grammar :: """{"lit": [{"condition": "on(l:lamp)", "rhs": "{l.name or l.id} is on."}, {"rhs": "It is dark."}]}"""; }
'''


def test_texts_are_made_from_facts() -> None:
    state, grammar = State(read_problem(DOMAIN, PROBLEM)), read_grammar(GRAMMAR)
    names = {"l1": "left", "l2": "right", "d": "door"}
    assert grammar.intro(state, names) == "You see no lamp."  # blanks at the beginning are dropped, as TextWorld does
    switch = next(one for one in state.actions() if one.objects == ("l1",))
    assert grammar.command(switch, state, names) == "switch left"
    state.apply(switch)
    assert grammar.feedback(switch, state, names) == "left is on."
    assert grammar.intro(state, names) == "You see left lamp."
    do(state, "switch l2")
    assert grammar.intro(state, names) == "You see left lamp, and right lamp."
    state.apply(switch)
    assert grammar.feedback(switch, state, names) == "It is dark."


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("", "no intro"),
        ('grammar :: """{""";', "can't be read"),
        (GRAMMAR.replace("{l}", "{k}"), "names .k."),
    ],
)
def test_a_broken_grammar_is_an_error(broken: str, told: str) -> None:
    state = State(read_problem(DOMAIN, PROBLEM))
    with pytest.raises(DataError, match=told):
        read_grammar(broken).command(state.actions()[0], state, {"l1": "a", "l2": "b", "d": "c"})


def test_nothing_of_a_grammar_is_run() -> None:
    state, said = State(read_problem(DOMAIN, PROBLEM)), "{().__class__.__name__}"
    grammar = read_grammar(GRAMMAR.replace("{l.name or l.id} is on.", said))
    switch = state.actions()[0]
    state.apply(switch)
    with pytest.raises(DataError, match="isn't known there"):
        grammar.feedback(switch, state, {"l1": "a", "l2": "b", "d": "c"})


# ---- games made here -------------------------------------------------------------------------------------------------
EACH = pytest.mark.parametrize("level", LEVELS)


@EACH
def test_a_seed_decides_the_game_and_every_kind_can_be_made(level: str) -> None:
    for index, kind in enumerate(ALFWORLD_TASKS):
        game = generate(level, (kind,), index)
        assert game == generate(level, (kind,), index)
        assert game.kind == kind
        world = World(game)
        assert not world.won
        low, high = LEVELS[level].receptacles
        assert low <= len(world.state.with_predicate("receptacleatlocation")) <= high
        assert game.named("object_target") in world.text


def test_held_out_layouts_are_held_out_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[generator.Layout] = []
    whole = generator._problem
    monkeypatch.setattr(generator, "_problem", lambda *known: drawn.append(known[1]) or whole(*known))
    for seed in range(60):
        generate("tiny", ALFWORLD_TASKS, seed)
        generate("tiny", ALFWORLD_TASKS, TRAINING_SEEDS + seed)
    training, panel = {one.identity for one in drawn[::2]}, {one.identity for one in drawn[1::2]}
    assert training.isdisjoint(panel)
    assert all(identity % FRACTIONS for identity in training)
    assert not any(identity % FRACTIONS for identity in panel)
    assert len(training) > 50
    assert len(panel) > 50


def test_a_layout_is_the_same_whatever_its_numbers() -> None:
    one = generator.Layout((("Shelf", 1), ("Shelf", 2)), ((("Mug", 1), ("Shelf", 1)), (("Book", 1), ("Shelf", 2))))
    other = generator.Layout((("Shelf", 2), ("Shelf", 1)), ((("Mug", 2), ("Shelf", 2)), (("Book", 1), ("Shelf", 1))))
    third = one._replace(things=one.things[:1])
    assert one.identity == other.identity != third.identity


def test_the_package_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    package.cache_clear()
    with pytest.raises(EnvError, match=r"pip install --no-deps alfworld==0\.4\.2"):
        generate("tiny", (SIMPLE,), 0)


# ---- the env ---------------------------------------------------------------------------------------------------------
KITCHEN = {
    "receptacles": (("CounterTop", 1), ("Fridge", 1), ("GarbageCan", 1), ("Microwave", 1)),
    "things": ((("Potato", 1), ("Fridge", 1)), (("Potato", 2), ("CounterTop", 1)), (("Mug", 1), ("CounterTop", 1))),
}


def kitchen(kind: str, target: str, parent: str) -> Game:
    known, task = package(), generator.Task(kind, target, parent)
    goal = generator._filled(known.goals[kind]["pddl"], {"obj": target, "recep": parent, "toggle": parent})
    problem = generator._problem(known, generator.Layout(**KITCHEN), task, goal)
    return Game("kitchen", known.domain, known.grammar.replace("UNKNOWN GOAL", "do it"), problem, task.record)


def started(game: Game, **settings: Any) -> AlfWorld:
    env = make_env(AlfWorldConfig(**settings))
    assert isinstance(env, AlfWorld)
    env._game = lambda seed: game
    env.reset(0)
    return env


def play(env: AlfWorld, *actions: str | None) -> Step:
    return [env.step(action) for action in actions][-1]


HEATED = (
    "go to fridge 1",
    "open fridge 1",
    "take potato 2 from fridge 1",  # numbers go down in the order of the ids: Potato_bar_1 is potato 2
    "go to microwave 1",
    "heat potato 2 with microwave 1",
    "go to garbagecan 1",
)


def test_what_is_seen_and_told() -> None:
    env = started(kitchen(HEAT, "Potato", "GarbageCan"))
    seen = env.reset(0)
    assert seen.task == "Your task is to: do it."
    assert seen.text == (
        "You are in the middle of a room. Looking quickly around you, you see a countertop 1, a fridge 1, "
        "a garbagecan 1, and a microwave 1."
    )
    assert seen.legal_actions
    assert "help" not in seen.legal_actions
    assert "help" in env.world.commands
    assert seen.tags == {"task": HEAT, "game": "kitchen"}
    step = play(env, "go to fridge 1", "open fridge 1")
    assert step.observation.text == "You open the fridge 1. The fridge 1 is open. In it, you see a potato 2."
    assert step.observation.task == seen.task
    step = env.step("fly")
    assert (step.legal, step.changed, step.observation.text) == (False, False, NOTHING)


def test_rewards_are_fifty_and_the_growth_of_the_goal_s_conditions() -> None:
    """Of three conditions: something hot, something in its place, something hot in its place. A cold potato in the bin
    meets one and wins nothing; when it is taken out again, that third is paid back."""
    env = started(kitchen(HEAT, "Potato", "GarbageCan"))
    paid = [env.step(action).reward for action in HEATED]
    assert paid == pytest.approx([0, 0, 0, 0, 1 / 3, 0])
    last = env.step("move potato 2 to garbagecan 1")
    assert (last.reward, last.terminated, last.success) == (pytest.approx(50 + 2 / 3), True, True)
    assert last.metrics == {"goal_conditions": 1.0}

    env = started(kitchen(HEAT, "Potato", "GarbageCan"))
    fetch = ("go to countertop 1", "take potato 1 from countertop 1", "go to garbagecan 1")
    step = play(env, *fetch, "move potato 1 to garbagecan 1")
    assert (step.reward, step.terminated) == (pytest.approx(1 / 3), False)
    assert env.step("take potato 1 from garbagecan 1").reward == pytest.approx(-1 / 3)

    env = started(kitchen(HEAT, "Potato", "GarbageCan"), success_reward=10, goal_reward=0)
    paid = [env.step(action).reward for action in (*HEATED, "move potato 2 to garbagecan 1")]
    assert paid == [0, 0, 0, 0, 0, 0, 10]


def test_rl4vlm_pays_the_conditions_that_are_met_in_each_turn() -> None:
    env = started(kitchen(HEAT, "Potato", "GarbageCan"), compat="rl4vlm", success_reward=10)
    paid = [env.step(action).reward for action in HEATED]
    assert paid == pytest.approx([0, 0, 0, 0, 1 / 3, 1 / 3])
    assert env.step("move potato 2 to garbagecan 1").reward == pytest.approx(11)


def test_a_game_ends_at_its_limit() -> None:
    env = started(kitchen(SIMPLE, "Mug", "Microwave"), max_steps=2)
    assert not env.step("look").truncated
    step = env.step(None)
    assert (step.truncated, step.terminated, step.success) == (True, False, False)
    with pytest.raises(EnvError, match="no episode is running"):
        env.step("look")


def test_to_look_changes_no_state_and_to_open_does() -> None:
    env = started(kitchen(SIMPLE, "Mug", "Microwave"))
    assert not env.step("look").changed
    assert not env.step("inventory").changed
    assert env.step("go to microwave 1").changed
    assert env.step("open microwave 1").changed
    assert not env.step("examine microwave 1").changed
    opened = env._key
    env.step("close microwave 1")
    env.step("open microwave 1")
    assert env._key == opened


@pytest.mark.parametrize(
    ("kind", "target", "parent", "actions", "met"),
    [
        (SIMPLE, "Mug", "Microwave", (), Progress(0, 1)),
        (TWO, "Potato", "GarbageCan", (), Progress(0, 2)),
        (TWO, "Potato", "GarbageCan", (*HEATED, "move potato 2 to garbagecan 1"), Progress(1, 2)),
        (TWO, "Potato", "CounterTop", (), Progress(1, 2)),
        (HEAT, "Potato", "CounterTop", (), Progress(1, 3)),  # a cold one is there
        (HEAT, "Potato", "CounterTop", HEATED, Progress(2, 3)),  # and one is hot, elsewhere
    ],
)
def test_conditions_are_counted(kind: str, target: str, parent: str, actions: tuple[str, ...], met: Progress) -> None:
    world = World(kitchen(kind, target, parent))
    for action in actions:
        assert world.step(action)
    assert progress(world.game, world.state) == met


def test_light_asks_for_the_object_in_the_hand_and_the_lamp() -> None:
    world = World(generate("tiny", (LIGHT,), 0))
    assert progress(world.game, world.state) == Progress(0, 2)
    lamp = next(name for name in world.names.values() if name.startswith("desklamp "))
    spots = [command for command in world.commands if command.startswith("go to")]
    for spot in spots:
        world.step(spot)
        for command in ("open " + spot[6:], f"use {lamp}"):
            world.step(command)
        lit = f"use {lamp}" in world.commands
        assert progress(world.game, world.state).met == lit  # elsewhere its light is of no use
        assert not world.won


def test_a_lamp_counts_where_the_agent_is() -> None:
    """All conditions are met where the game is won, and only there."""
    expert = with_expert(make_env(cfg := AlfWorldConfig(level="tiny", tasks=[LIGHT], observation="text")), cfg)
    for seed in range(10):
        now = expert.reset(seed)
        while now.advice:
            step = expert.step(now.advice.action)
            assert (step.metrics["goal_conditions"] == 1) == step.success
            now = step.observation


def test_every_env_keeps_the_contract() -> None:
    check_contract(lambda: make_env(AlfWorldConfig(level="tiny", max_steps=12)))


@pytest.mark.parametrize(
    ("observation", "pictures", "told"),
    [("image", 1, False), ("text", 0, True), ("both", 1, True), ("blank", 1, False)],
)
def test_by_picture_or_text(observation: str, pictures: int, told: bool) -> None:
    seen = make_env(AlfWorldConfig(observation=observation)).reset(3)
    assert (len(seen.images), bool(seen.text)) == (pictures, told)
    assert seen.task.startswith("Your task is to: ")
    assert all((np.ptp(np.asarray(picture.image)) == 0) == (observation == "blank") for picture in seen.images)


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(ConfigError, match="pick_and_place_simple"):
        AlfWorldConfig(tasks=["pick_and_place"])


def test_the_picture_shows_what_is_in_sight_and_no_more() -> None:
    """A tile is 28 pixels. What is in a shut fridge isn't in the picture."""
    open_fridge, shut = World(kitchen(SIMPLE, "Mug", "Microwave")), World(kitchen(SIMPLE, "Mug", "Microwave"))
    empty = World(
        Game(
            "empty",
            shut.game.domain,
            shut.game.grammar,
            shut.game.problem.replace("(inReceptacle Potato_bar_1 Fridge_bar_1)", ""),
            shut.game.task,
        )
    )
    for world in (open_fridge, shut, empty):
        world.step("go to fridge 1")
    assert shut.picture(28) == empty.picture(28)
    open_fridge.step("open fridge 1")
    empty.step("open fridge 1")
    assert open_fridge.picture(28) != empty.picture(28)
    # four receptacles in two columns and rows, a row of what is in sight, one of what is held
    assert shut.picture(28).size == (56, 112)


def test_kinds_of_things_look_different() -> None:
    rooms = generator.ROOMS.values()
    kinds = {name.lower() for room in rooms for name in (*room.receptacles, *room.objects, generator.LAMP)}
    from vlm_agents.envs.alfworld.schematic import _pattern

    assert len({np.asarray(_pattern(kind)).tobytes() for kind in kinds}) == len(kinds)


# ---- games of ALFWorld's files ---------------------------------------------------------------------------------------
@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, seeds in (("train", range(3)), ("valid_unseen", range(10, 14)), ("valid_seen", range(20, 22))):
        for seed in seeds:
            kind = ALFWORLD_TASKS[seed % 2]
            write(generate("tiny", (kind,), seed), tmp_path / split / f"{kind}-{seed}" / "trial")
    write(generate("tiny", (SIMPLE,), 0), tmp_path / "train" / "Sliced" / "trial")
    return tmp_path


def write(game: Game, folder: Path) -> None:
    folder.mkdir(parents=True)
    whole = {"pddl_domain": game.domain, "grammar": game.grammar, "pddl_problem": game.problem, "solvable": True}
    (folder / "game.tw-pddl").write_text(json.dumps(whole))
    (folder / "traj_data.json").write_text(json.dumps(dict(game.task)))


def test_a_panel_plays_each_held_out_game_once(data: Path) -> None:
    cfg = AlfWorldConfig(data=str(data))
    env = make_env(cfg)
    played = [env.reset(seed).tags["game"] for seed in panel_seeds(cfg.id, 4)]
    assert len(set(played)) == 4
    assert all(game.startswith("valid_unseen/") for game in played)
    trained = {env.reset(seed).tags["game"] for seed in range(40)}
    assert len(trained) == 3  # not the sliced one
    assert all(game.startswith("train/") for game in trained)


def test_a_small_panel_has_games_of_all_kinds_whatever_the_folder_is_called(tmp_path: Path) -> None:
    for seed in range(24):
        kind = ALFWORLD_TASKS[seed // 12]
        write(generate("tiny", (kind,), seed), tmp_path / "movable" / f"{kind}-{seed}" / "trial")
    found = games.found(tmp_path / "movable", ALFWORLD_TASKS)
    assert len(found) == 24
    assert len({path.parts[-3].partition("-")[0] for path in found[:8]}) == 2


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("pddl_problem", "(inReceptacle ", "(inReceptacle lost"),  # an object that isn't there
        ("pddl_problem", "(:goal", "(:goal (exists (?o -) (and))"),
        ("pddl_domain", "(atLocation ?a ?l)", "((atLocation) ?a (?l))"),
        ("pddl_problem", "(objectType ", "(objectType agent1 "),
        ("grammar", "#task#", "#tusk#"),
        ("grammar", "receptacleatlocation(r:receptacle, l:location)", "receptacleatlocation(r:receptacle)"),
    ],
)
def test_a_broken_game_is_named(data: Path, part: str, old: str, new: str) -> None:
    for path in (data / "train").rglob("game.tw-pddl"):
        whole = json.loads(path.read_text())
        assert old in whole[part]
        path.write_text(json.dumps({**whole, part: whole[part].replace(old, new)}))
    with pytest.raises(DataError, match=r"train/.*trial: .*fetch"):
        make_env(AlfWorldConfig(data=str(data))).reset(0)


def test_what_cannot_be_won_is_not_played(data: Path) -> None:
    for path in (data / "train").rglob("game.tw-pddl"):
        path.write_text(path.read_text().replace('"solvable": true', '"solvable": false'))
    with pytest.raises(DataError, match=r"no game\.tw-pddl of .* below .*train"):
        make_env(AlfWorldConfig(data=str(data))).reset(0)


def test_kinds_of_tasks_are_chosen(data: Path) -> None:
    env = make_env(AlfWorldConfig(data=str(data), eval_split="valid_seen", tasks=[LIGHT]))
    assert {env.reset(seed).tags["task"] for seed in (*range(9), TRAINING_SEEDS)} == {LIGHT}


def test_wrong_data_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="train, valid_seen and valid_unseen"):
        make_env(AlfWorldConfig(data=str(data / "train")))
    monkeypatch.setenv("ALFWORLD_DATA", str(data))
    env = make_env(AlfWorldConfig(data="$ALFWORLD_DATA"))
    for path in (data / "train").rglob("game.tw-pddl"):
        path.write_text('{"solvable": true}')
    with pytest.raises(DataError, match="needs pddl_domain, grammar and pddl_problem"):
        env.reset(0)
    games.found.cache_clear()
    for path in (data / "train").rglob("traj_data.json"):
        path.write_text('{"task_type": "pick_and_place_simple", "pddl_params": {}}')
    with pytest.raises(DataError, match=r"traj_data\.json is no task: it needs pddl_params with an object_target"):
        make_env(AlfWorldConfig(data=str(data))).reset(0)
    monkeypatch.delenv("ALFWORLD_DATA")
    with pytest.raises(DataError, match=r"env\.data=\$ALFWORLD_DATA: that variable isn't set"):
        make_env(AlfWorldConfig(data="$ALFWORLD_DATA"))
    shutil.rmtree(data / "valid_seen")
    (data / "valid_seen").mkdir()
    with pytest.raises(DataError, match=r"no game\.tw-pddl below .*valid_seen"):
        make_env(AlfWorldConfig(data=str(data), eval_split="valid_seen"))


@pytest.mark.parametrize(
    ("file", "text"), [("game.tw-pddl", ""), ("traj_data.json", '{"task_ty'), ("traj_data.json", None)]
)
def test_a_game_without_its_files_is_told_and_not_played(
    data: Path, file: str, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = min((data / "valid_unseen").rglob(file))
    path.unlink() if text is None else path.write_text(text)
    env = make_env(AlfWorldConfig(data=str(data)))
    played = {env.reset(seed).tags["game"] for seed in panel_seeds(env.name, 3)}
    assert len(played) == 3
    assert "1 of 4 games below" in caplog.text
    assert path.parent.parent.name in caplog.text


def test_links_to_folders_are_followed(data: Path, tmp_path: Path) -> None:
    (data / "valid_unseen").rename(tmp_path / "elsewhere")
    (data / "valid_unseen").mkdir()
    (data / "valid_unseen" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(data / "valid_unseen")
    assert len(list(games.files(data / "valid_unseen"))) == 4


def test_a_panel_of_more_games_than_there_are_is_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    env = make_env(AlfWorldConfig(data=str(data)))
    for seed in panel_seeds(env.name, 4):
        env.reset(seed)
    assert "too narrow" not in caplog.text
    env.reset(panel_seeds(env.name, 5)[-1])
    assert "more episodes than the 4 that are held out" in caplog.text


# ---- THOR ------------------------------------------------------------------------------------------------------------
# What of ALFWorld's package is called, in the shape that it has there: a kitchen with one apple, in two steps.
THOR = """
import json, numpy, subprocess, time
class Event: frame = numpy.full((300, 300, 3), (200, 100, 0), numpy.uint8)
class Env: last_event = Event()
class AlfredThorEnv:
    class Thor:
        def __init__(self, queue, train_eval): self.steps = 0
        def init_env(self, config): self.env = Env(); print("a line that is no answer")
        def reset(self, task):
            subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)  # as Unity's
            self.told("-= Welcome! =-\\n\\nYou see a sink.\\n\\nYour task is to: eat.")
        def step(self, command): self.told("You did: " + command + ".", command.startswith("put"))
        def told(self, text, won=False):
            if "fail" in text: raise KeyError("no such pose")
            if "hang" in text: time.sleep(60)
            self.results = (text, won, ["move apple 1 to sink 1", "look", "help", "fail"], won, float(won), [])
        def get_results(self): return self.results
"""


@pytest.fixture
def thor(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AlfWorldConfig:
    """A double of the packages that THOR needs, for the interpreter that runs our child."""
    fake = tmp_path / "fake"
    for name in ("alfworld", "alfworld/agents", "alfworld/agents/environment", "ai2thor", "cv2", "torchvision"):
        (fake / name).mkdir(parents=True)
        (fake / name / "__init__.py").touch()
    (fake / "alfworld-0.4.2.dist-info").mkdir()
    (fake / "alfworld-0.4.2.dist-info" / "METADATA").write_text("Name: alfworld\nVersion: 0.4.2\n")
    (fake / "alfworld/agents/environment/alfred_thor_env.py").write_text(THOR)
    (tmp_path / ".ai2thor/releases/thor-201909061227-Linux64").mkdir(parents=True)
    for task in data.rglob("traj_data.json"):
        task.write_text(json.dumps({**json.loads(task.read_text()), "scene": {}}))
    monkeypatch.setenv("PYTHONPATH", str(fake))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISPLAY", ":0")
    return AlfWorldConfig(data=str(data), thor=sys.executable)


def test_thor_plays_in_another_interpreter(thor: AlfWorldConfig) -> None:
    env = make_env(thor)
    seen = env.reset(0)
    assert (seen.text, seen.task) == ("You see a sink.", "Your task is to: eat.")
    assert seen.legal_actions == ("fail", "look", "move apple 1 to sink 1")
    assert seen.images[0].size == (300, 300)
    assert seen.images[0].image.getpixel((0, 0)) == (200, 100, 0)  # red is red
    assert env.step("look").reward == 0
    step = env.step("move apple 1 to sink 1")  # 0.4.2 lists move and understands put alone
    assert step.observation.text == "You did: put apple 1 in/on sink 1."
    assert (step.reward, step.success) == (51, True)
    env.reset(1)
    with pytest.raises(EnvError, match="no such pose"):
        env.step("fail")
    env.close()


@pytest.mark.parametrize("hangs", [False, True])
def test_what_thor_started_ends_with_it(thor: AlfWorldConfig, hangs: bool) -> None:
    env = make_env(thor)
    assert isinstance(env, AlfWorld)
    env.reset(0)
    assert env._thor
    process = env._thor._process
    members = Path("/proc").glob("[0-9]*/stat")
    group = [path for path in members if path.read_text().rpartition(")")[2].split()[2] == str(process.pid)]
    assert len(group) == 2  # the interpreter, and what stands for Unity's process
    if hangs:
        assert process.stdin
        process.stdin.write('{"command": "hang"}\n')
        process.stdin.flush()
    env.close()
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10  # a process that was killed may take a while to be gone
    while alive := [path for path in group if runs(path)]:
        assert time.monotonic() < deadline, alive


def runs(stat: Path) -> bool:
    """Is the process of that file of /proc there, and no zombie?"""
    try:
        return ") Z " not in stat.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_thor_that_has_ended_is_told_each_time_and_can_be_closed(thor: AlfWorldConfig) -> None:
    env = make_env(thor)
    assert isinstance(env, AlfWorld)
    env.reset(0)
    assert env._thor
    env._thor._process.kill()
    env._thor._process.wait()
    with pytest.raises(EnvError, match=r"ended \(exit code -9\)"):
        env.step("look")
    with pytest.raises(EnvError, match="make the env anew"):
        env.reset(1)
    env.close()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda monkeypatch: monkeypatch.delenv("DISPLAY"), "no DISPLAY"),
        (lambda monkeypatch: monkeypatch.setenv("HOME", "/nowhere"), "thor-201909061227-Linux64"),
        (lambda monkeypatch: monkeypatch.delenv("PYTHONPATH"), r"pip install 'alfworld\[vis\]==0\.4\.2'"),
    ],
)
def test_what_thor_lacks_is_told(thor: AlfWorldConfig, spoil: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    env = make_env(thor)
    with pytest.raises(EnvError, match=told):
        env.reset(0)
    env.close()


def test_no_thor_without_its_games_and_no_expert_in_it(thor: AlfWorldConfig) -> None:
    with pytest.raises(ConfigError, match=r"name their folder by env\.data"):
        AlfWorldConfig(thor="python")
    with pytest.raises(NoExpert, match=r"env\.thor plays in another"):
        with_expert(make_env(thor), thor)
    env = make_env(AlfWorldConfig(data=thor.data, thor="/no/python"))
    with pytest.raises(EnvError, match=r"env\.thor=/no/python can't be run"):
        env.reset(0)


# ---- TextWorld -------------------------------------------------------------------------------------------------------
@pytest.fixture
def textworld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))  # made when alfworld is imported
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # Fast Downward writes there
    tw = pytest.importorskip("textworld", reason="make extras installs TextWorld")
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler  # pyright: ignore[reportMissingImports]
    from textworld.envs import PddlEnv  # pyright: ignore[reportMissingImports]

    wanted = tw.EnvInfos(won=True, admissible_commands=True, policy_commands=True)
    return AlfredDemangler(PddlEnv(wanted), shuffle=False)


@pytest.mark.alfworld
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ALFWORLD_TASKS)
def test_textworld_says_and_allows_the_same_and_plans_no_shorter(kind: str, textworld: Any) -> None:
    from vlm_agents.experts.alfworld import Planner

    for level, seed in (("tiny", 0), ("small", 1)):
        game = generate(level, (kind,), seed)
        textworld.load({"pddl_domain": game.domain, "grammar": game.grammar, "pddl_problem": game.problem})
        theirs, ours, rng = textworld.reset(), World(game), random.Random(seed)
        for _ in range(30):
            assert (theirs.feedback, tuple(theirs["admissible_commands"]), theirs["won"]) == (
                ours.text,
                ours.commands,
                ours.won,
            )
            if ours.won:
                break
            plan = theirs["policy_commands"]
            assert 0 < len(Planner(ours).way()) <= len(plan)
            at_random = rng.random() < 0.6
            command = rng.choice(ours.commands) if at_random else plan[0]
            theirs, _, _ = textworld.step(command)
            ours.step(command)
