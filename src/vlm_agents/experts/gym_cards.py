"""The experts of the card games, and their thoughts: what is seen, then small steps to the action.

All of a thought can be read off the picture and the prompt. The play itself is worked out in `points` and `blackjack`.
"""

from vlm_agents.envs.gym_cards import CardEnv
from vlm_agents.envs.gym_cards.blackjack import BlackjackGame
from vlm_agents.envs.gym_cards.formula import BLANK
from vlm_agents.envs.gym_cards.number_line import NumberLineGame
from vlm_agents.envs.gym_cards.points import PointsGame
from vlm_agents.experts.blackjack import Hand, Objective, best, hand
from vlm_agents.experts.points import complete
from vlm_agents.types import Advice


class NumberLineExpert:
    """Walks straight to the target. None where too few turns are left for that."""

    def __init__(self, game: NumberLineGame) -> None:
        self.game = game

    def start(self) -> Advice | None:
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        target, current = self.game.target, self.game.current
        distance = abs(target - current)
        if distance > self.game.max_turns - self.game.turn:
            return None
        side, action = ("more", "+") if target > current else ("less", "-")
        return Advice(f"target {target}, current {current}, so {side}", action, distance)


class BlackjackExpert:
    """Plays for the most hands won, which is what success counts, or for the most expected reward."""

    def __init__(self, game: BlackjackGame, objective: Objective = "win") -> None:
        self.game = game
        self.objective: Objective = objective

    def start(self) -> Advice | None:
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        dealer, *mine = (card.points for card in (self.game.dealer[0], *self.game.player))
        action, _ = best(hand(mine), dealer, self.objective)
        totals = ", ".join(_total(hand(mine[:count])) for count in range(2, len(mine) + 1))
        cards = " ".join(map(_rank, mine))
        return Advice(f"dealer {_rank(dealer)}, mine {cards}, total {totals}: {action}", action)


def _rank(points: int) -> str:
    return "A" if points == 1 else str(points)


def _total(mine: Hand) -> str:
    return f"{'soft' if mine.soft else 'hard'} {mine.total}"


class PointsExpert:
    """Writes the canonical formula, or whatever completes what is written already.

    None for a hand that can't make the target, and where it can't any more, or not before the formula gets too long or
    the turns run out. It is exact under `compat=rl4vlm` too, where Python's floats miss a few of its formulas.
    """

    def __init__(self, game: PointsGame) -> None:
        self.game = game

    def start(self) -> Advice | None:
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        game = self.game
        done = [symbol for symbol in game.formula if symbol != BLANK]
        room = game.longest - (len(game.formula) - len(done))
        left = complete(done, game.numbers, game.target, game.symbols, room)
        if left is None or len(left) + 1 > game.max_turns - game.turn:
            return None
        symbol = left[0] if left else "="
        cards, falling = (" ".join(map(str, numbers)) for numbers in (game.numbers, sorted(game.numbers, reverse=True)))
        plan = " ".join((*done, *left))
        thought = f"cards {cards}, sorted {falling}, plan {plan}, done {' '.join(done) or 'nothing'}, next {symbol}"
        return Advice(thought, symbol, len(left) + 1)


def card_expert(env: CardEnv) -> NumberLineExpert | BlackjackExpert | PointsExpert:
    match env.game:
        case NumberLineGame():
            return NumberLineExpert(env.game)
        case BlackjackGame():
            return BlackjackExpert(env.game)
        case PointsGame():
            return PointsExpert(env.game)
