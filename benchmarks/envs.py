"""How fast are the card games? Frames a second of each: random steps, drawn, in one process.

The Gymnasium envs by themselves and, beside them, played by words. What they draw is checked in tests/envs, not here.
"""

import argparse
import time

import numpy as np

from vlm_agents.config import BlackjackConfig, CardsConfig, EZPointsConfig, NumberLineConfig, PointsConfig
from vlm_agents.envs.gym_cards import CardEnv


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast are the card games?")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each")
    args = parser.parse_args()
    print(f"{'frames/s':<14}{'game':>10}{'in words':>12}")
    for cfg in (NumberLineConfig(), BlackjackConfig(), EZPointsConfig(), PointsConfig()):
        print(f"{cfg.family:<14}{game_speed(cfg, args.seconds):>10.0f}{word_speed(cfg, args.seconds):>12.0f}")


def game_speed(cfg: CardsConfig, seconds: float) -> float:
    game, rng = CardEnv(cfg).game, np.random.default_rng(0)
    start, frames, over = time.perf_counter(), 0, True
    while (spent := time.perf_counter() - start) < seconds:
        if over:
            game.reset(seed=frames)
            over = False
        else:
            _, _, terminated, truncated, _ = game.step(int(rng.integers(len(game.words))))
            over = terminated or truncated
        frames += 1
    return frames / spent


def word_speed(cfg: CardsConfig, seconds: float) -> float:
    env, rng = CardEnv(cfg), np.random.default_rng(0)
    start, frames, over = time.perf_counter(), 0, True
    while (spent := time.perf_counter() - start) < seconds:
        if over:
            env.reset(seed=frames)
            over = False
        else:
            step = env.step(env.words[rng.integers(len(env.words))])
            over = step.terminated or step.truncated
        frames += 1
    return frames / spent


if __name__ == "__main__":
    main()
