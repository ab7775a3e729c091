"""Blackjack by the rules of Sutton and Barto, which are Gymnasium's, with cards to look at."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from vlm_agents.config import Compat, one_of
from vlm_agents.envs.base import check_action
from vlm_agents.envs.gym_cards import drawing
from vlm_agents.envs.gym_cards.cards import Card, draw, with_suit

MOST_TURNS = 20  # two aces and nineteen more are 21, the next card busts: only turns that pass make it last longer


def total(hand: list[Card]) -> int:
    """The best total of a hand: an ace counts 11 where that doesn't bust."""
    low = sum(card.points for card in hand)
    return low + 10 if low <= 11 and any(card.rank == 1 for card in hand) else low


def is_natural(hand: list[Card]) -> bool:
    return len(hand) == 2 and total(hand) == 21


class BlackjackGame(gymnasium.Env[np.ndarray, Any]):
    """`vlm_agents/Blackjack-v0`: beat the dealer, who draws to 17 and stands on soft 17. The deck never ends.

    A win earns 1, a loss costs 1, a draw is 0; with `natural`, a win by an ace and a ten earns 1.5. The dealer's second
    card is hidden until the hand is over. `compat="rl4vlm"`: naturals earn nothing, tens are court cards, the dealer's
    hand stays hidden, and the player's fifth card lies beyond the picture's edge.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012 (Gymnasium reads it off the class)
    words = ("stand", "hit")
    text = ""

    def __init__(
        self,
        natural: bool = False,
        compat: str = "ours",
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        one_of("compat", compat, Compat)
        self.original = compat == "rl4vlm"
        self.natural = natural and not self.original
        self.max_turns = MOST_TURNS if max_turns is None else max_turns
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(len(self.words))
        self.observation_space = drawing.SPACE
        self.dealer: list[Card] = []
        self.player: list[Card] = []
        self.over = self.won = False
        self.turn = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.dealer = [self._draw(), self._draw()]
        self.player = [self._draw(), self._draw()]
        self.over = self.won = False
        self.turn = 0
        return self.render(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        check_action(self, action)
        self.turn += 1
        reward = self._hit() if action else self._stand()
        self.won = reward > 0
        return self.render(), reward, self.over, not self.over and self.turn >= self.max_turns, self._info()

    def render(self) -> np.ndarray:
        return drawing.blackjack(self._dealer_seen, self.player, cut=self.original)

    @property
    def rules(self) -> str:
        return "Blackjack: come closer to 21 than the dealer, but not over it. The dealer draws to 17."

    @property
    def state(self) -> tuple[object, ...]:
        """What the player can tell this situation from another one by."""
        return self._dealer_seen, self.player, self.over

    def describe(self) -> str:
        """The picture in words."""
        hands = (("Dealer", self._dealer_seen), ("Player", self.player))
        return "\n".join(" ".join([f"{who}:", *(card.label if card else "?" for card in hand)]) for who, hand in hands)

    @property
    def _dealer_seen(self) -> list[Card] | list[Card | None]:
        """The dealer's hand as the player sees it: a card face down is None."""
        return self.dealer if self.over and not self.original else [self.dealer[0], None]

    def _hit(self) -> float:
        self.player.append(self._draw())
        self.over = total(self.player) > 21
        return -1.0 if self.over else 0.0

    def _stand(self) -> float:
        while total(self.dealer) < 17:
            self.dealer.append(self._draw())
        self.over = True
        mine, theirs = total(self.player), total(self.dealer)
        if mine > theirs or theirs > 21:
            return 1.5 if self.natural and is_natural(self.player) else 1.0
        return 0.0 if mine == theirs else -1.0

    def _draw(self) -> Card:
        card = draw(self.np_random)
        if self.original and card.rank == 10:
            return with_suit(int(self.np_random.integers(11, 14)), self.np_random)
        return card

    def _info(self) -> dict[str, Any]:
        return {
            "player_cards": [str(card) for card in self.player],
            "dealer_card": str(self.dealer[0]),
            "success": self.won,
            "legal": True,
        }
