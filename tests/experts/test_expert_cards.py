"""The thoughts of the card experts, word by word, and that the experts play to the end by them."""

from typing import Any

import pytest

from vlm_agents.config import BlackjackConfig, CardsConfig, EZPointsConfig, NumberLineConfig, PointsConfig
from vlm_agents.envs import make_env
from vlm_agents.envs.gym_cards import CardEnv
from vlm_agents.envs.gym_cards.cards import Card
from vlm_agents.envs.gym_cards.formula import BLANK
from vlm_agents.experts import with_expert
from vlm_agents.experts.gym_cards import BlackjackExpert, NumberLineExpert, PointsExpert, card_expert
from vlm_agents.types import Advice


def cards(*ranks: int) -> list[Card]:
    return [Card(rank, suit) for rank, suit in zip(ranks, "CDHSCDHSCDHS", strict=False)]


def number_line(target: int, current: int) -> Advice | None:
    env = CardEnv(NumberLineConfig())
    expert = card_expert(env)
    assert isinstance(expert, NumberLineExpert)
    env.reset(0)
    expert.game.target, expert.game.current = target, current
    return expert.start()


def blackjack(dealer: int, *mine: int) -> Advice | None:
    env = CardEnv(BlackjackConfig())
    expert = card_expert(env)
    assert isinstance(expert, BlackjackExpert)
    env.reset(0)
    expert.game.dealer, expert.game.player = cards(dealer, 5), cards(*mine)
    return expert.start()


def points(cfg: PointsConfig, ranks: tuple[int, ...], formula: str) -> Advice | None:
    """What is said to these ranks and this formula; `_` in it is a blank."""
    env = CardEnv(cfg)
    expert = card_expert(env)
    assert isinstance(expert, PointsExpert)
    game = expert.game
    env.reset(0)
    game.cards = tuple(cards(*ranks))
    game.numbers = tuple(min(rank, game.highest) for rank in ranks)
    game.formula = [BLANK if word == "_" else word for word in formula.split()]
    return expert.start()


def test_number_line():
    assert number_line(3, 1) == Advice("target 3, current 1, so more", "+", 2)
    assert number_line(0, 5) == Advice("target 0, current 5, so less", "-", 5)


def test_blackjack_adds_up_card_by_card():
    assert blackjack(13, 10, 6) == Advice("dealer 10, mine 10 6, total hard 16: stand", "stand")
    assert blackjack(7, 12, 6) == Advice("dealer 7, mine 10 6, total hard 16: hit", "hit")
    assert blackjack(1, 1, 5) == Advice("dealer A, mine A 5, total soft 16: hit", "hit")
    assert blackjack(2, 1, 5, 11, 4) == Advice(
        "dealer 2, mine A 5 10 4, total soft 16, hard 16, hard 20: stand", "stand"
    )


def test_the_other_objective():
    env = CardEnv(BlackjackConfig())
    expert = card_expert(env)
    assert isinstance(expert, BlackjackExpert)
    game = expert.game
    env.reset(0)
    game.dealer, game.player = cards(10, 5), cards(10, 6)
    assert BlackjackExpert(game, "value").start() == Advice("dealer 10, mine 10 6, total hard 16: hit", "hit")


EIGHTS, TENS = "cards 8 3 8 3, sorted 8 8 3 3", "cards 10 1 10 3, sorted 10 10 3 1"  # how such a thought begins
FACES = (8, 3, 8, 3)


@pytest.mark.parametrize(
    ("ranks", "formula", "advice"),
    [
        (FACES, "", Advice(f"{EIGHTS}, plan 8 / ( 3 - 8 / 3 ), done nothing, next 8", "8", 10)),
        (FACES, "8 /", Advice(f"{EIGHTS}, plan 8 / ( 3 - 8 / 3 ), done 8 /, next (", "(", 8)),
        (
            FACES,
            "8 / ( 3 - 8 / 3 )",
            Advice(f"{EIGHTS}, plan 8 / ( 3 - 8 / 3 ), done 8 / ( 3 - 8 / 3 ), next =", "=", 1),
        ),
        ((11, 1, 13, 3), "", Advice(f"{TENS}, plan 10 + 10 + 3 + 1, done nothing, next 10", "10", 8)),
        ((11, 1, 13, 3), "3", Advice(f"{TENS}, plan 3 + 10 + 10 + 1, done 3, next +", "+", 7)),
        # a blank means nothing, and takes a place
        ((11, 1, 13, 3), "10 _ +", Advice(f"{TENS}, plan 10 + 10 + 3 + 1, done 10 +, next 10", "10", 6)),
        ((11, 1, 13, 3), "10 + 10 + 3 + 1" + " _" * 13, Advice(
            f"{TENS}, plan 10 + 10 + 3 + 1, done 10 + 10 + 3 + 1, next =", "=", 1
        )),
        ((11, 1, 13, 3), "10 + 10 + 3 + 1" + " _" * 14, None),
        (FACES, "3", None),  # dead
        ((1, 1, 1, 1), "", None),  # unsolvable
    ],
)  # fmt: skip
def test_points24(ranks: tuple[int, ...], formula: str, advice: Advice | None):
    assert points(PointsConfig(), ranks, formula) == advice


def test_faces_by_their_rank():
    assert points(PointsConfig(faces="rank"), (13, 11, 1, 1), "") == Advice(
        "cards 13 11 1 1, sorted 13 11 1 1, plan 13 + 11 + 1 - 1, done nothing, next 13", "13", 8
    )


def test_ezpoints():
    assert points(EZPointsConfig(), (4, 3), "") == Advice(
        "cards 4 3, sorted 4 3, plan 4 * 3, done nothing, next 4", "4", 4
    )
    assert points(EZPointsConfig(), (2, 10), "2 +") == Advice(
        "cards 2 10, sorted 10 2, plan 2 + 10, done 2 +, next 10", "10", 2
    )
    assert points(EZPointsConfig(), (4, 3), "4 +") is None


@pytest.mark.parametrize(
    "cfg", [NumberLineConfig(), EZPointsConfig(), PointsConfig(solvable_only=True)], ids=lambda cfg: cfg.family
)
def test_what_can_be_solved_is_solved_in_as_many_steps_as_said(cfg: CardsConfig):
    env = with_expert(make_env(cfg), cfg)
    for seed in range(20):
        advice = env.reset(seed).advice
        step: Any = None
        while advice:
            distance = advice.distance
            step = env.step(advice.action)
            advice = step.observation.advice
            assert distance
            assert advice is None or advice.distance == distance - 1
        assert step.terminated
        assert step.success == 1


def test_blackjack_is_advised_until_it_is_over():
    cfg = BlackjackConfig()
    env = with_expert(make_env(cfg), cfg)
    won = 0.0
    for seed in range(20):
        advice = env.reset(seed).advice
        step: Any = None
        while step is None or not step.terminated:
            assert advice
            step = env.step(advice.action)
            advice = step.observation.advice
        assert advice is None
        won += step.success
    assert 0 < won < 20


def test_no_way_leads_to_success_where_the_turns_run_out() -> None:
    env = CardEnv(NumberLineConfig(max_steps=2))  # 3 is three steps from 0
    expert = card_expert(env)
    assert isinstance(expert, NumberLineExpert)
    env.reset(0)
    expert.game.target, expert.game.current = 3, 0
    assert expert.start() is None
    expert.game.current = 1
    advice = expert.start()
    assert advice is not None
    assert advice.distance == 2

    env = CardEnv(EZPointsConfig(max_steps=4))  # 5 + 7 = takes just four
    expert = card_expert(env)
    assert isinstance(expert, PointsExpert)
    env.reset(0)
    expert.game.cards, expert.game.numbers = tuple(cards(5, 7)), (5, 7)
    advice = expert.start()
    assert advice is not None
    assert advice.distance == 4
    env.step(None)
    assert expert.start() is None
