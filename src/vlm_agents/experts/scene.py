"""The first half of a MiniGrid expert's thought: what there is to see, with coordinates.

Always in the same order, so that a small model can learn to read it off the picture. The plan is not its business.
"""

from minigrid.core.world_object import WorldObj
from minigrid.minigrid_env import MiniGridEnv

from vlm_agents.envs.minigrid import agent_words, named

ORDER = ("key", "door", "ball", "box", "goal")
NEAREST_THINGS = 6
NEAREST_LAVA = 3
Placed = tuple[tuple[int, int], WorldObj]


def scene(world: MiniGridEnv, focus: WorldObj | None = None) -> str:
    """`agent (1,2) facing down, carrying the red key, blue door (3,1) locked, goal (4,4), lava (2,3) (2,4)`.

    Of the things only the nearest are named, and `focus` wherever it is; of lava the nearest cells.
    """
    width = world.width
    cells = [((index % width, index // width), thing) for index, thing in enumerate(world.grid.grid) if thing]
    by_type = {kind: [placed for placed in cells if placed[1].type == kind] for kind in (*ORDER, "lava")}
    things = [placed for kind in ORDER[:-1] for placed in by_type[kind]]
    kept = _nearest(world, things, NEAREST_THINGS, focus) + by_type["goal"]
    parts = [agent_words(world), *(named(thing, at) for at, thing in kept)]
    lava = _nearest(world, by_type["lava"], NEAREST_LAVA)
    if lava:
        parts.append("lava " + " ".join(f"({x},{y})" for (x, y), _ in lava))
    return ", ".join(parts)


def _nearest(world: MiniGridEnv, placed: list[Placed], most: int, focus: WorldObj | None = None) -> list[Placed]:
    """`focus` and the nearest to the agent, `most` in all, in the order in which they came."""
    x, y = world.agent_pos

    def rank(index: int) -> int:
        (column, row), thing = placed[index]
        return -1 if thing is focus else abs(column - x) + abs(row - y)

    return [placed[index] for index in sorted(sorted(range(len(placed)), key=rank)[:most])]
