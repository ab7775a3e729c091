"""The same households in TextWorld and here: `python benchmarks/textworld_side.py [--games 6] [--turns 20]`.

Random commands, the same in both, whose texts and commands must be equal. Told: milliseconds until a game is ready,
and a turn. `make extras` installs TextWorld.
"""

import argparse
import os
import random
import sys
import tempfile
import time

import numpy as np

from vlm_agents.config import ALFWORLD_TASKS
from vlm_agents.envs.alfworld.generator import LEVELS, generate
from vlm_agents.envs.alfworld.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=6, help="of each level")
    parser.add_argument("--turns", type=int, default=20)
    asked = parser.parse_args()
    os.environ.setdefault("ALFWORLD_DATA", tempfile.mkdtemp())  # made when alfworld is imported
    argv = list(sys.argv)
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler  # pyright: ignore[reportMissingImports]
    from textworld import EnvInfos  # pyright: ignore[reportMissingImports]
    from textworld.envs import PddlEnv  # pyright: ignore[reportMissingImports]

    theirs = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)), shuffle=False)
    print("| level | ready, TextWorld | here | a turn, TextWorld | here | ratio of all |\n|---|---|---|---|---|---|")
    for level in LEVELS:
        ready, turns = np.zeros(2), np.zeros(2)
        played = 0
        for seed in range(asked.games):
            game, rng = generate(level, ALFWORLD_TASKS, seed), random.Random(seed)
            began = time.perf_counter()
            theirs.load({"pddl_domain": game.domain, "grammar": game.grammar, "pddl_problem": game.problem})
            state = theirs.reset()
            between = time.perf_counter()
            world = World(game)
            ready += between - began, time.perf_counter() - between
            for _ in range(asked.turns):
                told = (world.text, world.commands, world.won)
                assert (state.feedback, tuple(state["admissible_commands"]), state["won"]) == told
                if world.won:
                    break
                command = rng.choice(world.commands)
                began = time.perf_counter()
                state, _, _ = theirs.step(command)
                between = time.perf_counter()
                world.step(command)
                turns += between - began, time.perf_counter() - between
                played += 1
        ratio = (ready + turns)[0] / (ready + turns)[1]
        figures = (*(ready / asked.games * 1000), *(turns / max(1, played) * 1000))
        print(
            f"| `{level}` | " + " | ".join(f"{figure:.1f} ms" for figure in figures) + f" | {ratio:.0f} |", flush=True
        )
    sys.argv[:] = argv  # Fast Downward writes there


if __name__ == "__main__":
    main()
