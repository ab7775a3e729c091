"""The MiniGrid adapter: words, pictures, limits and keys, each against minigrid itself."""

from importlib.resources import files

import numpy as np
import pytest
from minigrid.core.world_object import Key

from vlm_agents.config import MiniGridConfig
from vlm_agents.envs import make_env
from vlm_agents.envs.minigrid import MiniGrid
from vlm_agents.errors import EnvError
from vlm_agents.types import Step

MOVES = ("turn left", "turn right", "go forward")
# Empty-5x5: from (1,1) facing right to the goal at (3,3)
WAY = ("go forward", "go forward", "turn right", "go forward", "go forward")


def play(game: MiniGrid, *actions: str | None) -> Step:
    """The last of several steps."""
    return [game.step(action) for action in actions][-1]


def started(env_id: str, seed: int = 0, **settings: object) -> MiniGrid:
    game = MiniGrid(MiniGridConfig(id=env_id, **settings))  # type: ignore[arg-type]
    game.reset(seed)
    return game


@pytest.mark.parametrize(
    ("env_id", "view", "size"),
    [
        ("MiniGrid-DoorKey-6x6-v0", "full", (168, 168)),  # 6 * 28
        ("MiniGrid-RedBlueDoors-6x6-v0", "full", (336, 168)),  # 12 * 28 wide, 6 * 28 high
        ("MiniGrid-RedBlueDoors-6x6-v0", "agent", (196, 196)),  # 7 * 28
        ("BabyAI-GoToLocal-v0", "agent", (196, 196)),
    ],
)
def test_a_cell_is_28_pixels(env_id: str, view: str, size: tuple[int, int]) -> None:
    assert MiniGrid(MiniGridConfig(id=env_id, view=view)).reset(0).images[0].size == size


@pytest.mark.parametrize("env_id", ["MiniGrid-DoorKey-8x8-v0", "MiniGrid-RedBlueDoors-8x8-v0", "BabyAI-BossLevel-v0"])
def test_the_full_view_is_minigrids_picture_without_the_highlight(env_id: str) -> None:
    game = started(env_id)
    for action in ("turn left", "go forward", "go forward", "pick up", "toggle"):
        picture = np.asarray(game.step(action).observation.images[0].image)
        np.testing.assert_array_equal(picture, game.world.get_full_render(highlight=False, tile_size=28))


def test_minigrids_own_observation_is_made_when_it_is_read() -> None:
    """By an env of somebody's own, say."""
    world = started("MiniGrid-DoorKey-8x8-v0").world
    observation, *_ = world.step(world.actions.left)
    assert not observation
    expected = type(world).gen_obs(world)
    np.testing.assert_array_equal(observation["image"], expected["image"])
    assert observation["mission"] == expected["mission"]
    assert observation["direction"] == expected["direction"]


def test_the_agent_view_is_minigrids_partial_view() -> None:
    game = started("MiniGrid-DoorKey-8x8-v0", view="agent")
    picture = np.asarray(game.step("turn left").observation.images[0].image)
    np.testing.assert_array_equal(picture, game.world.get_pov_render(tile_size=28))


@pytest.mark.parametrize(
    ("env_id", "actions"),
    [
        ("MiniGrid-DoorKey-6x6-v0", (*MOVES, "pick up", "drop", "toggle")),
        ("MiniGrid-PutNear-6x6-N2-v0", (*MOVES, "pick up", "drop", "toggle")),  # ended by dropping, not by done
        ("BabyAI-GoToLocal-v0", (*MOVES, "pick up", "drop", "toggle")),
        ("MiniGrid-GoToDoor-5x5-v0", (*MOVES, "pick up", "drop", "toggle", "done")),
        ("MiniGrid-GoToObject-6x6-N2-v0", (*MOVES, "pick up", "drop", "toggle", "done")),
        ("MiniGrid-Dynamic-Obstacles-5x5-v0", MOVES),
    ],
)
def test_actions_are_those_that_can_matter(env_id: str, actions: tuple[str, ...]) -> None:
    game = MiniGrid(MiniGridConfig(id=env_id))
    assert game.reset(0).legal_actions == actions
    assert game.instructions == f"You are the red triangle in a grid. Actions: {', '.join(actions)}."


def test_the_mission_is_the_text() -> None:
    assert MiniGrid(MiniGridConfig()).reset(0).text == "use the key to open the door and then get to the goal"


def test_reward_is_minigrids_formula_under_our_limit() -> None:
    last = play(started("MiniGrid-Empty-5x5-v0", max_steps=10), *WAY)
    assert last.reward == pytest.approx(0.55, rel=1e-12)  # 1 - 0.9 * 5/10
    assert (last.terminated, last.truncated, last.success) == (True, False, 1.0)
    own = play(started("MiniGrid-Empty-5x5-v0"), *WAY)
    assert own.reward == pytest.approx(0.955, rel=1e-12)  # its own limit is 4 * 5 * 5: 1 - 0.9 * 5/100


def test_success_on_the_last_turn_is_not_truncated() -> None:
    last = play(started("MiniGrid-Empty-5x5-v0", max_steps=5), *WAY)
    assert last.reward == pytest.approx(0.1, rel=1e-12)  # 1 - 0.9 * 5/5
    assert (last.terminated, last.truncated, last.success) == (True, False, 1.0)


@pytest.mark.parametrize("env_id", ["MiniGrid-Empty-5x5-v0", "BabyAI-GoToLocal-v0"])
@pytest.mark.parametrize("action", ["pick up", None, "fly"])
def test_the_limit_truncates_and_then_refuses(env_id: str, action: str | None) -> None:
    game = started(env_id, max_steps=3)
    assert [game.step(action).truncated for _ in range(3)] == [False, False, True]
    with pytest.raises(EnvError, match="call reset"):
        game.step(action)
    game.reset(0)
    assert not game.step(action).truncated


def test_lava_ends_without_success() -> None:
    game = started("MiniGrid-LavaGapS5-v0")  # seed 0: lava at (2,1), right before the agent
    cell = game.world.grid.get(2, 1)
    assert cell
    assert cell.type == "lava"
    last = game.step("go forward")
    assert (last.terminated, last.truncated, last.reward, last.success) == (True, False, 0.0, 0.0)


@pytest.mark.parametrize("word", [None, "done", "Turn left", ""])
@pytest.mark.parametrize(
    "env_id", ["MiniGrid-DoorKey-6x6-v0", "MiniGrid-Dynamic-Obstacles-5x5-v0", "BabyAI-OpenDoor-v0"]
)
def test_no_legal_action_lets_the_turn_pass(env_id: str, word: str | None) -> None:
    game = started(env_id)
    before = game.reset(0)
    step = game.step(word)
    assert step.observation == before
    assert (step.success, step.legal, step.changed) == (False, False, False)
    assert game.world.step_count == 1


def test_no_action_is_not_done() -> None:
    game = started("MiniGrid-GoToDoor-5x5-v0")
    assert not game.step(None).terminated
    assert game.step("done").terminated


def test_changed_is_about_the_world_not_about_legality() -> None:
    game = started("MiniGrid-Empty-5x5-v0")  # at (1,1), a wall above
    assert play(game, "turn left").changed == 1.0
    bump = game.step("go forward")
    assert (bump.legal, bump.changed) == (1.0, 0.0)


def test_equal_situations_have_equal_keys() -> None:
    game = started("MiniGrid-DoorKey-6x6-v0")
    start = game.reset(0).state_key
    assert play(game, "turn left").observation.state_key != start
    assert play(game, "turn right").observation.state_key == start
    game.world.carrying = Key("yellow")
    assert play(game, None).observation.state_key != start


def test_a_reset_forgets_what_was_played() -> None:
    game, fresh = MiniGrid(MiniGridConfig(id="BabyAI-BossLevel-v0")), MiniGrid(MiniGridConfig(id="BabyAI-BossLevel-v0"))
    game.reset(1)
    play(game, "go forward", "pick up", "turn left", "toggle")
    assert game.reset(7) == fresh.reset(7)


def test_description_names_what_the_agent_sees() -> None:
    game = started("MiniGrid-DoorKey-6x6-v0", describe=True)  # seed 0: at (1,3) facing down, key (2,3), door (3,1)
    assert game.reset(0).text.splitlines()[1] == "agent (1,3) facing down, yellow key (2,3)"
    last = play(game, "turn left", "pick up", "turn left", "go forward")  # at (1,3) facing up, then (1,2)
    assert last.observation.text.splitlines()[1].startswith("agent (1,2) facing up, carrying the yellow key")
    last = play(game, "go forward", "turn right", "go forward", "toggle")  # at (2,1) before the door
    seen = "agent (2,1) facing right, carrying the yellow key, yellow door (3,1) open, goal (4,4)"
    assert last.observation.text.splitlines()[1] == seen


def test_rejected_layouts_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    game = MiniGrid(MiniGridConfig(id="BabyAI-PutNextLocal-v0", tile_size=4))
    for seed in range(30):
        game.reset(seed)
    assert capsys.readouterr().out == ""


def test_unknown_id_says_how_to_list_them() -> None:
    with pytest.raises(EnvError, match=r"Did you mean 'MiniGrid-DoorKey-6x6-v0'.*pprint_registry"):
        make_env(MiniGridConfig(id="MiniGrid-DorKey-6x6-v0"))
    with pytest.raises(EnvError, match="not an id of the minigrid package"):
        make_env(MiniGridConfig(id="CartPole-v1"))


@pytest.mark.filterwarnings("error")
def test_an_old_version_makes_no_noise() -> None:
    MiniGrid(MiniGridConfig(id="MiniGrid-MultiRoom-N4-S5-v0"))


@pytest.mark.skipif((files("minigrid") / "envs/wfc/patterns").is_dir(), reason="a minigrid with the pictures")
def test_a_level_that_the_package_cannot_grow_says_what_it_needs() -> None:
    with pytest.raises(EnvError, match=r"^env.id=MiniGrid-WFC-MazeSimple-v0 needs .* pip install -e 'Minigrid\[wfc\]'"):
        make_env(MiniGridConfig(id="MiniGrid-WFC-MazeSimple-v0"))
