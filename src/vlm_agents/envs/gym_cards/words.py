"""The card games played by words: one adapter for all four."""

import numpy as np
from PIL import Image

from vlm_agents.config import BlackjackConfig, CardsConfig, NumberLineConfig, PointsConfig
from vlm_agents.envs.base import out_of_turn, state_key
from vlm_agents.envs.gym_cards.blackjack import BlackjackGame
from vlm_agents.envs.gym_cards.number_line import NumberLineGame
from vlm_agents.envs.gym_cards.points import PointsGame
from vlm_agents.errors import EnvError
from vlm_agents.pictures import Picture
from vlm_agents.types import Observation, Step

Game = NumberLineGame | BlackjackGame | PointsGame


class CardEnv:
    """One card game. `game` is the Gymnasium env, which experts read and nobody else does.

    `compat=rl4vlm` plays a random action where none was legal, and says so in `metrics["random_action"]`; and there
    success takes a positive return, which in NumberLine means that no step went astray.
    """

    def __init__(self, cfg: CardsConfig) -> None:
        self.cfg = cfg
        self.name = cfg.id
        self.game = _make(cfg)
        self.words = self.game.words
        self.instructions = f"{self.game.rules} Actions: {', '.join(self.words)}."
        self._original = cfg.compat == "rl4vlm"
        self._running = False
        self._key = ""
        self._return = 0.0

    def reset(self, seed: int) -> Observation:
        pixels, _ = self.game.reset(seed=seed)
        self._running = True
        self._return = 0.0
        return self._observe(pixels)

    def step(self, action: str | None) -> Step:
        if not self._running:
            raise out_of_turn(self.name)
        before = self._key
        legal = action in self.words
        if legal:
            played = self.game.step(self.words.index(action))
        elif self._original:
            played = self.game.step(int(self.game.np_random.integers(len(self.words))))
        else:
            played = self._pass()
        pixels, reward, terminated, truncated, info = played
        self._running = not (terminated or truncated)
        self._return += reward
        observation = self._observe(pixels)
        success = info["success"] and (self._return > 0 or not self._original)
        metrics = {"random_action": float(not legal)} if self._original else {}
        return Step(observation, reward, terminated, truncated, success, legal, self._key != before, metrics)

    def close(self) -> None:
        self.game.close()
        self._running = False

    def _pass(self) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Time passes and nothing happens."""
        self.game.turn += 1
        return self.game.render(), 0.0, False, self.game.turn >= self.game.max_turns, {"success": False}

    def _observe(self, pixels: np.ndarray) -> Observation:
        self._key = state_key(*self.game.state)
        parts = [self.game.text] if self.cfg.observation == "image" else [self.game.describe(), self.game.text]
        picture = Image.fromarray(pixels)
        if picture.width != self.cfg.size:
            picture = picture.resize((self.cfg.size, self.cfg.size), Image.Resampling.BICUBIC)
        images = () if self.cfg.observation == "text" else (Picture(picture),)
        return Observation("\n".join(filter(None, parts)), images, self.words, self._key)


def _make(cfg: CardsConfig) -> Game:
    match cfg:
        case NumberLineConfig():
            return NumberLineGame(cfg.highest, cfg.max_steps)
        case BlackjackConfig():
            return BlackjackGame(cfg.natural, cfg.compat, cfg.max_steps)
        case PointsConfig():
            return PointsGame(
                cfg.family, cfg.target, cfg.cards, cfg.faces, cfg.solvable_only, cfg.compat, cfg.max_steps
            )
        case _:
            raise EnvError(f"{cfg.family} is no card game")
