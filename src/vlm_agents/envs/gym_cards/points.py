"""EZPoints and Points24: write a formula of the cards' numbers, symbol by symbol, that is worth the target."""

from collections import Counter
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from vlm_agents.config import Compat, Faces, at_least, between, one_of
from vlm_agents.envs.base import check_action
from vlm_agents.envs.gym_cards import drawing
from vlm_agents.envs.gym_cards.cards import Card, draw, with_suit
from vlm_agents.envs.gym_cards.formula import BLANK, evaluate, evaluate_as_python, solvable
from vlm_agents.errors import EnvError

DEALS = 20_000  # without one solvable hand: there is none, or next to none
Kind = Literal["ezpoints", "points24"]
SIGNS = {"ezpoints": ("+", "*"), "points24": ("+", "-", "*", "/", "(", ")")}


class PointsGame(gymnasium.Env[np.ndarray, Any]):
    """`vlm_agents/EZPoints-v0` and `vlm_agents/Points24-v0`: each action appends a symbol, `=` ends the formula.

    A formula that is worth `target` and uses each card once earns 10, any other costs 1. A number that isn't (left) in
    the hand costs 1 and puts a blank into the formula, which means nothing but makes it longer. Once the formula is
    longer than `longest` the next action is in vain: truncated, -1. `compat="rl4vlm"`: Python's arithmetic on the
    symbols written in a row, and a formula in its font and place, whose one line may leave the picture.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012 (Gymnasium reads it off the class)

    def __init__(
        self,
        kind: str = "points24",
        target: int = 24,
        cards: int = 4,
        faces: str = "ten",
        solvable_only: bool = False,
        compat: str = "ours",
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        one_of("kind", kind, Kind)
        one_of("faces", faces, Faces)
        one_of("compat", compat, Compat)
        between("cards", cards, 2, 4)  # five find no place in the picture
        at_least("target", target, 1)
        self.plain = kind == "ezpoints"
        self.target = target
        self.count = cards
        self.highest = 10 if faces == "ten" else 13
        self.solvable_only = solvable_only
        self.original = compat == "rl4vlm"
        self.longest = 3 * cards - 1 if self.plain else 5 * cards
        self.max_turns = self.longest + 2 if max_turns is None else max_turns
        self.render_mode = render_mode
        self.words = self.symbols = (*map(str, range(1, self.highest + 1)), *SIGNS[kind], "=")
        self.action_space = spaces.Discrete(len(self.symbols))
        self.observation_space = drawing.SPACE
        self.cards: tuple[Card, ...] = ()
        self.numbers: tuple[int, ...] = ()
        self.formula: list[str] = []
        self.over = False
        self.turn = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cards = self._deal()
        self.numbers = tuple(min(card.rank, self.highest) for card in self.cards)
        self.formula = []
        self.over = False
        self.turn = 0
        return self.render(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        check_action(self, action)
        self.turn += 1
        symbol = self.symbols[action]
        if len(self.formula) > self.longest:
            return self.render(), -1.0, False, True, self._info()
        if symbol == "=":
            self.over = True
            success = self.solved
            return self.render(), 10.0 if success else -1.0, True, False, self._info(success)
        legal = not symbol.isdigit() or int(symbol) in self.left
        self.formula.append(symbol if legal else BLANK)
        return self.render(), 0.0 if legal else -1.0, False, self.turn >= self.max_turns, self._info(legal=legal)

    def render(self) -> np.ndarray:
        return drawing.points(self.cards, self._shown(), original=self.original)

    @property
    def left(self) -> tuple[int, ...]:
        """The numbers that the formula hasn't used yet."""
        return tuple((Counter(self.numbers) - Counter(int(word) for word in self.formula if word.isdigit())).elements())

    @property
    def solved(self) -> bool:
        """Does the formula use every card and make the target?"""
        value = evaluate_as_python(self.formula) if self.original else evaluate(self.formula)
        return not self.left and value == self.target

    @property
    def rules(self) -> str:
        faces = "J, Q, K count 10" if self.highest == 10 else "J, Q, K count 11, 12, 13"
        return (
            f"Write a formula that makes {self.target} and uses each of the {self.count} cards once; {faces}. "
            "Each turn appends one symbol, = ends it."
        )

    @property
    def text(self) -> str:
        return " ".join(["Formula:", *self._shown()])

    @property
    def state(self) -> tuple[object, ...]:
        """What tells this situation from another one."""
        return self.cards, self.formula, self.over

    def describe(self) -> str:
        """The cards in words."""
        return "Cards: " + " ".join(card.label for card in self.cards)

    def _shown(self) -> list[str]:
        """The symbols as one sees them: a blank takes a place of its own, which the original's doesn't show."""
        return self.formula if self.original else ["_" if word == BLANK else word for word in self.formula]

    def _deal(self) -> tuple[Card, ...]:
        if self.plain and (self.target, self.count, self.highest) == (12, 2, 10):
            return self._deal_twelve()
        for _ in range(DEALS):
            cards = tuple(draw(self.np_random) for _ in range(self.count))
            numbers = [min(card.rank, self.highest) for card in cards]
            if not self.solvable_only or solvable(numbers, self.target, self.plain):
                return cards
        raise EnvError(
            f"none of {DEALS} hands of {self.count} cards makes {self.target}: "
            "choose another env.target, or solvable_only=false"
        )

    def _deal_twelve(self) -> tuple[Card, ...]:
        """Two cards that make 12 by + or *, with the chances that the original gives them."""
        first = int(self.np_random.integers(2, 14))
        value = min(first, 10)
        multiply = 12 % value == 0 and self.np_random.random() < 0.5
        hand = (first, 12 // value if multiply else 12 - value)
        if self.np_random.random() < 0.5:
            hand = hand[::-1]
        return tuple(with_suit(rank, self.np_random) for rank in hand)

    def _info(self, success: bool = False, legal: bool = True) -> dict[str, Any]:
        return {
            "cards": [str(card) for card in self.cards],
            "numbers": list(self.numbers),
            "formula": list(self.formula),
            "success": success,
            "legal": legal,
        }
