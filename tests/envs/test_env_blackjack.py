"""Blackjack against its rules, told again from outside, and the chances that are known of it."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from vlm_agents.config import BlackjackConfig
from vlm_agents.envs.gym_cards import CardEnv
from vlm_agents.envs.gym_cards.blackjack import BlackjackGame
from vlm_agents.envs.gym_cards.cards import Card

VALUES = {"A": (1, 11), "J": (10,), "Q": (10,), "K": (10,)} | {str(n): (n,) for n in range(2, 11)}


class Blind(BlackjackGame):
    """The game without its pictures."""

    def render(self) -> np.ndarray:
        return np.zeros((300, 300, 3), np.uint8)


def best(cards: list[str]) -> int:
    """The best of all ways to count the aces; the least where all bust."""
    totals = {sum(way) for way in product(*(VALUES[card[:-1]] for card in cards))}
    return max((n for n in totals if n <= 21), default=min(totals))


def names(hand: list[Card]) -> list[str]:
    return [str(card) for card in hand]


def hands(text: str) -> list[Card]:
    labels = list(VALUES)
    order = ["A", *map(str, range(2, 11)), "J", "Q", "K"]
    assert set(order) == set(labels)
    return [Card(order.index(word[:-1]) + 1, word[-1]) for word in text.split()]


@pytest.mark.parametrize("natural", [False, True])
def test_random_episodes_follow_the_rules(natural: bool) -> None:
    game, rng = Blind(natural=natural), np.random.default_rng(1)
    rewards = Counter()
    for seed in range(10_000):
        _, info = game.reset(seed=seed)
        held, up = info["player_cards"], info["dealer_card"]
        hidden = names(game.dealer)
        assert (len(held), len(hidden), hidden[0]) == (2, 2, up)
        over, reward = False, 0.0
        while not over:
            hit = rng.random() < 0.5
            _, reward, over, truncated, info = game.step(int(hit))
            assert not truncated
            assert info["dealer_card"] == up
            assert info["player_cards"][: len(held)] == held
            assert len(info["player_cards"]) == len(held) + hit
            held = info["player_cards"]
            if hit:
                assert over == (best(held) > 21)
                assert reward == (-1 if over else 0)
                assert names(game.dealer) == hidden
            else:
                dealer = names(game.dealer)
                assert over
                assert dealer[:2] == hidden
                assert all(best(dealer[:n]) < 17 for n in range(2, len(dealer)))
                theirs = best(dealer)
                assert theirs >= 17
                margin = best(held) - (theirs if theirs <= 21 else 0)
                won = 1.5 if natural and len(held) == 2 and best(held) == 21 else 1.0
                assert reward == (won if margin > 0 else 0.0 if margin == 0 else -1.0)
            assert info["success"] == (reward > 0)
        rewards[reward] += 1
    # Published for uniformly random play: 28.1 % are won; sd 0.45 %.
    assert (rewards[1.0] + rewards[1.5]) / 10_000 == pytest.approx(0.281, abs=0.018)
    assert (rewards[1.5] > 0) == natural


def test_standing_at_once_wins_as_often_as_published() -> None:
    game, won = Blind(), 0
    for seed in range(20_000):
        game.reset(seed=seed)
        won += game.step(0)[1] > 0
    assert won / 20_000 == pytest.approx(0.381, abs=0.014)  # sd 0.34 %


@pytest.mark.parametrize("compat", ["ours", "rl4vlm"])
def test_every_card_is_as_likely_as_in_a_deck(compat: str) -> None:
    game = Blind(compat=compat)
    cards = Counter()
    for seed in range(6500):
        game.reset(seed=seed)
        cards.update(names(game.dealer + game.player))
    # 26000 cards are 500 of each of 52, sd 22; compat has no tens but as many more court cards: 16/12 * 500.
    for label, suit in product(VALUES, "CDHS"):
        share = 500 if compat == "ours" else 0 if label == "10" else 667 if label in "JQK" else 500
        assert abs(cards[label + suit] - share) <= (110 if share else 0), (label, suit, cards[label + suit])


def table(dealer: str, player: str, **settings) -> CardEnv:
    env = CardEnv(BlackjackConfig(**settings))
    env.reset(0)
    assert isinstance(env.game, BlackjackGame)
    env.game.dealer, env.game.player = hands(dealer), hands(player)
    return env


@pytest.mark.parametrize(
    ("dealer", "player", "reward"),
    [
        ("KH 7S", "9C 9D", 1.0),
        ("KH 8S", "9C 9D", 0.0),
        ("KH 9S", "9C 9D", -1.0),
        ("AH 6S", "KC 8D", 1.0),  # soft 17 stands
        ("AH 6S", "KC 7D", 0.0),
        ("KH 7S", "AC KD", 1.0),
        ("KH AS", "AC KD", 0.0),
        ("KH AS", "7C 7D 7H", 0.0),
    ],
)
def test_hands_are_compared(dealer: str, player: str, reward: float) -> None:
    step = table(dealer, player).step("stand")
    assert (step.reward, step.terminated, step.success) == (reward, True, float(reward > 0))


@pytest.mark.parametrize(
    ("player", "settings", "reward"),
    [
        ("AC KD", {"natural": True}, 1.5),
        ("10C AD", {"natural": True}, 1.5),
        ("7C 7D 7H", {"natural": True}, 1.0),
        ("AC KD", {}, 1.0),
        ("AC KD", {"natural": True, "compat": "rl4vlm"}, 1.0),
    ],
)
def test_a_natural_earns_more_where_it_shall(player: str, settings: dict, reward: float) -> None:
    assert table("KH 8S", player, **settings).step("stand").reward == reward


def test_no_hand_lasts_longer_than_the_limit() -> None:
    env = table("KH 8S", "AC AD")
    game = env.game
    assert isinstance(game, BlackjackGame)
    for _ in range(19):
        game.player.append(Card(1, "S"))
        assert not env.step(None).terminated
    last = env.step("hit")  # the 20th turn, on 21 aces
    assert (len(game.player), last.terminated, last.truncated, last.reward) == (22, True, False, -1.0)


def test_the_dealer_s_hand_is_seen_when_it_is_over_and_not_before() -> None:
    for compat in ("ours", "rl4vlm"):
        pictures = []
        for hidden in ("8S", "9D"):
            env = table(f"KH {hidden}", "2C 3D", compat=compat, observation="both")
            passed = env.game.render()
            last = env.step("stand").observation
            pictures.append((passed, np.asarray(last.images[0].image)))
            assert last.text.splitlines()[0] == (f"Dealer: K {hidden[0]}" if compat == "ours" else "Dealer: K ?")
        (before, after), (other_before, other_after) = pictures
        np.testing.assert_array_equal(before, other_before)
        assert (after != other_after).any() == (compat == "ours")


def test_every_card_shows_and_in_the_original_the_fifth_does_not() -> None:
    for count in range(2, 21):
        held = " ".join(["2C"] * (count - 1))
        for compat in ("ours", "rl4vlm"):
            one, other = (table("KH 8S", f"{held} {last}", compat=compat).game.render() for last in ("AS", "3D"))
            # Rows there are of five, the fifth outside; the third row lies below the picture.
            seen = compat == "ours" or (count % 5 != 0 and count <= 10)
            assert (one != other).any() == seen, (count, compat)


def test_what_it_says() -> None:
    env = table("KH 8S", "10C AD", observation="text")
    assert env.step(None).observation.text == "Dealer: K ?\nPlayer: 10 A"
    assert env.words == ("stand", "hit")
    assert CardEnv(BlackjackConfig()).reset(0).text == ""
    assert env.instructions.endswith("Actions: stand, hit.")
