"""The scene of a thought: order, caps, focus."""

from minigrid.core.world_object import Ball, Box, Door, Key, Lava

from vlm_agents.config import MiniGridConfig
from vlm_agents.envs.minigrid import MiniGrid
from vlm_agents.experts.scene import scene


def empty_world() -> MiniGrid:
    """8x8 with the agent at (1,1) facing right and the goal at (6,6)."""
    game = MiniGrid(MiniGridConfig(id="MiniGrid-Empty-8x8-v0", tile_size=4))
    game.reset(0)
    return game


def test_things_come_by_type_then_in_reading_order() -> None:
    world = empty_world().world
    world.grid.set(2, 1, Box("red"))
    world.grid.set(3, 1, Ball("blue"))
    world.grid.set(1, 3, Key("green"))
    world.grid.set(4, 2, Key("grey"))
    world.grid.set(0, 4, Door("purple", is_locked=True))
    world.carrying = Ball("yellow")
    assert scene(world) == (
        "agent (1,1) facing right, carrying the yellow ball, grey key (4,2), green key (1,3), "
        "purple door (0,4) locked, blue ball (3,1), red box (2,1), goal (6,6)"
    )


def test_only_the_six_nearest_and_the_focus_are_named() -> None:
    world = empty_world().world
    for column in range(2, 7):
        world.grid.set(column, 1, Ball("blue"))  # 1 to 5 steps away
    world.grid.set(1, 4, Ball("red"))  # 3
    far = Key("green")
    world.grid.set(6, 5, far)  # 9
    balls = ", ".join(f"blue ball ({column},1)" for column in range(2, 7))
    assert scene(world) == f"agent (1,1) facing right, {balls}, red ball (1,4), goal (6,6)"
    assert scene(world, far) == (
        "agent (1,1) facing right, green key (6,5), "
        + ", ".join(f"blue ball ({column},1)" for column in range(2, 6))
        + ", red ball (1,4), goal (6,6)"
    )


def test_lava_is_summed_up_by_its_nearest_cells() -> None:
    world = empty_world().world
    for row in range(2, 7):
        world.grid.set(3, row, Lava())
    assert scene(world) == "agent (1,1) facing right, goal (6,6), lava (3,2) (3,3) (3,4)"
