"""EZPoints and Points24 against their rules, told again with Python's eval, and the exact chances of their hands."""

from collections import Counter
from fractions import Fraction
from itertools import combinations_with_replacement, product
from math import factorial, prod

import numpy as np
import pytest

from vlm_agents.config import EZPointsConfig, PointsConfig
from vlm_agents.envs.gym_cards import CardEnv
from vlm_agents.envs.gym_cards.cards import Card
from vlm_agents.envs.gym_cards.formula import evaluate, evaluate_as_python, solvable
from vlm_agents.envs.gym_cards.points import PointsGame
from vlm_agents.errors import EnvError

EZ = {"kind": "ezpoints", "target": 12, "cards": 2}
SIGNS = ("+", "-", "*", "/", "(", ")")


class Blind(PointsGame):
    """The game without its pictures."""

    def render(self) -> np.ndarray:
        return np.zeros((300, 300, 3), np.uint8)


# ---- what a formula is worth -----------------------------------------------------------------------------------------
def exactly(symbols: list[str]) -> Fraction | None:
    """By Python: every number is a Fraction, and a space keeps two symbols from becoming one."""
    return number(" ".join(f"Fraction({word})" if word.isdigit() else word for word in symbols))


def loosely(symbols: list[str]) -> complex | None:
    return number("".join(symbols))


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def number(source: str):
    try:
        value = eval(source.strip(), {"Fraction": Fraction})
    except (SyntaxError, TypeError, ArithmeticError):
        return None
    return None if isinstance(value, tuple) else value  # "()" is an empty tuple


def some_symbols(rng: np.random.Generator) -> list[str]:
    """Any symbols, or a sound formula with at most two of them changed."""
    if rng.random() < 0.3:
        words = (*map(str, range(1, 11)), *SIGNS, " ")
        return [words[rng.integers(len(words))] for _ in range(rng.integers(0, 9))]
    symbols = tree([str(rng.integers(1, 11)) for _ in range(rng.integers(1, 5))], rng)
    for _ in range(rng.integers(3)):
        place = int(rng.integers(len(symbols) + 1))
        symbols[place : place + int(rng.integers(2))] = [(*SIGNS, " ", "2")[rng.integers(8)]][: int(rng.integers(2))]
    return symbols


def tree(leaves: list[str], rng: np.random.Generator) -> list[str]:
    """A random formula of these, in this order."""
    if len(leaves) == 1:
        return leaves
    cut = int(rng.integers(1, len(leaves)))
    symbols = [*tree(leaves[:cut], rng), SIGNS[rng.integers(4)], *tree(leaves[cut:], rng)]
    return ["(", *symbols, ")"] if rng.random() < 0.6 else symbols


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_formulas_are_worth_what_python_says() -> None:
    rng = np.random.default_rng(0)
    values = Counter()
    for _ in range(10_000):
        symbols = some_symbols(rng)
        assert evaluate(symbols) == exactly(symbols), symbols
        if "**" not in "".join(symbols).replace("***", ""):  # Python may take for ever there; powers come below
            assert evaluate_as_python(symbols) == loosely(symbols), symbols
        values[evaluate(symbols) is None] += 1
    assert min(values.values()) > 2000


@pytest.mark.parametrize(
    ("formula", "value", "as_python"),
    [
        ("8 / ( 3 - 8 / 3 )", 24, 23.99999999999999),
        ("4 / ( 1 - 5 / 6 )", 24, 24.000000000000007),
        ("6 / ( 1 - 3 / 4 )", 24, 24.0),
        ("5 * ( 5 - 1 / 5 )", 24, 24.0),
        ("2 4", None, 24),
        ("2 4 * 1", None, 24),
        ("1 10 - 5", None, 105),
        ("5 * * 2 - 1", None, 24),
        ("2 * * - 2", None, 0.25),
        ("- 2 * * 2", None, -4),
        ("2 * * 3 * * 2", None, 512),
        ("10 / / 4", None, 2),
        ("- 10 / / 4", None, -3),
        ("1 * * ( 10 * * 10 )", None, 1),
        ("9 * * 9 * * 9 * * 9", None, None),  # Python's own answer would never come
        ("( - 8 ) * * ( 1 / 3 )", None, (-8) ** (1 / 3)),
        ("5 / ( 3 - 3 )", None, None),
        ("5 / / ( 3 - 3 )", None, None),
        ("( 5 + 7", None, None),
        ("5 + 7 )", None, None),
        ("5 ( 7 )", None, None),
        ("5 +", None, None),
        ("- 5 + 10", 5, 5),
        ("5 - - 7", 12, 12),
        ("( )", None, None),
        ("", None, None),
        ("* 5", None, None),
    ],
)
def test_formulas_of_interest(formula: str, value: int | None, as_python: complex | None) -> None:
    assert evaluate(formula.split()) == value
    assert evaluate_as_python(formula.split()) == as_python


def test_a_blank_means_nothing_but_keeps_digits_apart() -> None:
    for worth in (evaluate, evaluate_as_python):
        assert worth([" ", "5", " ", "+", "7", " "]) == 12
        assert worth(["1", " ", "2"]) is None
        assert worth(["5", "*", " ", "*", "2"]) is None
    assert evaluate_as_python(["1", "2"]) == 12


# ---- what can be solved ----------------------------------------------------------------------------------------------
def every_value(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """By joining any two numbers until one is left."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in product(range(len(numbers)), repeat=2):
        if i != j:
            a, b = numbers[i], numbers[j]
            rest = tuple(n for place, n in enumerate(numbers) if place not in (i, j))
            for c in {a + b, a - b, a * b, *([a / b] if b else [])}:
                found |= every_value((*rest, c))
    return found


def test_solvable_is_true_where_a_value_is_the_target() -> None:
    for hand in combinations_with_replacement(range(1, 11), 3):
        values = every_value(tuple(map(Fraction, hand)))
        for target in (1, 6, 13, 24, 100):
            assert solvable(hand, target) == (target in values), (hand, target)
    for hand in np.random.default_rng(0).integers(1, 11, size=(12, 4)).tolist():
        assert solvable(hand, 24) == (24 in every_value(tuple(map(Fraction, hand)))), hand


def test_the_solvable_share_is_the_published_one() -> None:
    """566 of 715 hands of values, 0.7309 of what is dealt: 1 to 9 have 1/13 each, ten 4/13."""
    hands, share = 0, 0.0
    for hand in combinations_with_replacement(range(1, 11), 4):
        if solvable(hand, 24):
            hands += 1
            ways = factorial(4) / prod(factorial(n) for n in Counter(hand).values())
            share += ways * prod(4 / 13 if n == 10 else 1 / 13 for n in hand)
    assert hands == 566
    assert share == pytest.approx(0.7309, abs=5e-5)


def test_plain_formulas_have_neither_brackets_nor_minus() -> None:
    assert solvable((2, 10), 12, plain=True)
    assert not solvable((1, 13), 12, plain=True)  # 13 - 1
    assert solvable((1, 13), 12)
    assert not solvable((2, 3, 4), 20, plain=True)  # (2 + 3) * 4
    assert solvable((2, 3, 4), 14, plain=True)


# ---- the game --------------------------------------------------------------------------------------------------------
def replay(numbers: list[int], symbols: list[str], target: int, limit: int) -> list[tuple[float, bool, bool]]:
    """(reward, terminated, truncated) of each turn, from the rules as they are written down."""
    rows, unused, written = [], list(numbers), []
    for symbol in symbols:
        if len(written) > limit:
            return [*rows, (-1.0, False, True)]
        if symbol == "=":
            right = not unused and exactly(written) == target
            return [*rows, (10.0 if right else -1.0, True, False)]
        if symbol.isdigit() and int(symbol) not in unused:
            written.append(" ")
            rows.append((-1.0, False, False))
            continue
        if symbol.isdigit():
            unused.remove(int(symbol))
        written.append(symbol)
        rows.append((0.0, False, False))
    return rows


def plan(game: PointsGame, rng: np.random.Generator) -> list[str]:
    """Any symbols; or a formula of the hand, mostly undisturbed."""
    symbols = [game.symbols[i] for i in rng.integers(len(game.symbols), size=game.longest + 2)]
    if rng.random() < 0.8:
        order = [str(n) for n in rng.permutation(game.numbers)]
        sound = [word for word in tree(order, rng) if word in game.symbols]
        symbols = [*sound, "=", *symbols] if rng.random() < 0.8 else [*sound[:2], symbols[0], *sound[2:], *symbols]
    return symbols[: game.longest + 2]


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize(
    "settings", [EZ, {}, {"faces": "rank", "cards": 3, "target": 10}], ids=["ezpoints", "points24", "rank"]
)
def test_random_episodes_follow_the_rules(settings: dict) -> None:
    game, rng = Blind(**settings), np.random.default_rng(2)
    wins, cuts, misses = 0, 0, 0
    for seed in range(10_000):
        _, info = game.reset(seed=seed)
        numbers = info["numbers"]
        assert sorted(game.left) == sorted(numbers)
        symbols = plan(game, rng)
        terminated = truncated = False
        for symbol, row in zip(symbols, replay(numbers, symbols, game.target, game.longest), strict=False):
            before = info["formula"]
            _, reward, terminated, truncated, info = game.step(game.symbols.index(symbol))
            assert (reward, terminated, truncated) == row, (numbers, symbols)
            assert info["numbers"] == numbers
            assert info["success"] == (reward == 10)
            assert info["legal"] == (reward != -1 or terminated or truncated)
            added = [] if terminated or truncated else [symbol if info["legal"] else " "]
            assert info["formula"] == before + added
            misses += not info["legal"]
        assert terminated or truncated
        wins += info["success"]
        cuts += truncated
    assert min(wins, cuts, misses) > 50


def test_ezpoints_hands_have_the_original_s_chances() -> None:
    game, count = Blind(**EZ), 24_000
    pairs, ordered, ranks = Counter(), Counter(), Counter()
    for seed in range(count):
        game.reset(seed=seed)
        pairs[tuple(sorted(game.numbers))] += 1
        ordered[game.numbers] += 1
        ranks.update(card.rank for card in game.cards)
    # In 24ths: the first card's value is 2 to 9 with 2 each and ten with 8; 2, 3, 4 and 6 go by half each to their
    # other factor and to what is missing to 12.
    shares = {(2, 10): 9, (5, 7): 4, (3, 9): 3, (4, 8): 3, (2, 6): 2, (3, 4): 2, (6, 6): 1}
    assert set(pairs) == set(shares)
    for pair, share in shares.items():
        assert abs(pairs[pair] - 1000 * share) < 350, pairs  # sd of 9000 in 24000: 75
        if pair != (6, 6):
            assert abs(ordered[pair] - 500 * share) < 300
    # The first ten is 10, J, Q or K, 1/12 each; a second ten is always 10, in 1/24 of the hands.
    for rank, share in ((1, 0), (10, 3), (11, 2), (12, 2), (13, 2)):
        assert abs(ranks[rank] - 1000 * share) < 250 * (share > 0) + 1, ranks


@pytest.mark.parametrize("solvable_only", [False, True])
def test_points24_hands_are_uniform(solvable_only: bool) -> None:
    game, count = Blind(solvable_only=solvable_only), 6500
    cards, can = Counter(), 0
    for seed in range(count):
        game.reset(seed=seed)
        cards.update(map(str, game.cards))
        can += solvable(game.numbers, 24)
    if solvable_only:
        assert can == count
    else:  # 26000 cards are 500 of each, sd 22; the share's sd is 0.55 %
        assert can / count == pytest.approx(0.7309, abs=0.022)
        assert len(cards) == 52
        assert all(abs(number - 500) < 110 for number in cards.values())


def hold(cfg: PointsConfig, *ranks: int) -> CardEnv:
    """The game with this hand."""
    env = CardEnv(cfg)
    env.reset(0)
    game = env.game
    assert isinstance(game, PointsGame)
    game.cards = tuple(Card(rank, "S") for rank in ranks)
    game.numbers = tuple(min(rank, game.highest) for rank in ranks)
    return env


def play(env: CardEnv, formula: str):
    return [env.step(word) for word in formula.split()]


@pytest.mark.parametrize("compat", ["ours", "rl4vlm"])
@pytest.mark.parametrize(
    ("ranks", "formula", "ours", "theirs"),
    [
        ((8, 3, 8, 3), "8 / ( 3 - 8 / 3 ) =", 10.0, -1.0),
        ((1, 4, 5, 6), "4 / ( 1 - 5 / 6 ) =", 10.0, -1.0),
        ((1, 3, 4, 6), "6 / ( 1 - 3 / 4 ) =", 10.0, 10.0),
        ((2, 4, 1, 1), "2 4 * 1 * 1 =", -1.0, 10.0),
        ((5, 2, 1, 1), "( 5 * * 2 - 1 ) * 1 =", -1.0, 10.0),
        ((10, 10, 12, 4), "10 * 10 / / 4 - 10 =", -1.0, -1.0),
        ((1, 10, 5, 4), "10 / / 4 * 1 * 5 =", -1.0, -1.0),
        ((7, 2, 8, 1), "7 / / 2 * 8 * 1 =", -1.0, 10.0),
        ((1, 2, 3, 4), "2 * 3 * 4 =", -1.0, -1.0),  # one card is left
        ((11, 12, 2, 2), "10 + 10 + 2 + 2 =", 10.0, 10.0),
        ((1, 2, 3, 4), "=", -1.0, -1.0),
    ],
)
def test_arithmetic_is_exact_here_and_python_s_there(
    compat: str, ranks: tuple[int, ...], formula: str, ours: float, theirs: float
) -> None:
    last = play(hold(PointsConfig(compat=compat), *ranks), formula)[-1]
    reward = ours if compat == "ours" else theirs
    assert (last.reward, last.terminated, last.success) == (reward, True, float(reward > 0))


def test_a_number_that_is_not_in_the_hand_costs_one_and_leaves_a_blank() -> None:
    env = hold(EZPointsConfig(), 5, 7)
    steps = play(env, "5 5 + 9 7 =")
    assert [step.reward for step in steps] == [0, -1, 0, -1, 0, 10]
    assert [step.legal for step in steps] == [1.0] * 6
    assert steps[4].observation.text == "Formula: 5 _ + _ 7"
    assert sum(step.changed for step in steps) == 6
    assert play(hold(EZPointsConfig(compat="rl4vlm"), 5, 7), "5 5 +")[-1].observation.text == "Formula: 5   +"


@pytest.mark.parametrize(("cfg", "turns"), [(EZPointsConfig(), 7), (PointsConfig(), 22)], ids=["ezpoints", "points24"])
def test_a_formula_that_grows_too_long_is_cut_off(cfg: PointsConfig, turns: int) -> None:
    steps = play(hold(cfg, 5, 7), "+ " * turns)
    assert [step.reward for step in steps] == [0.0] * (turns - 1) + [-1.0]
    assert [step.truncated for step in steps] == [False] * (turns - 1) + [True]
    # Even "=" comes too late.
    steps = play(hold(cfg, 5, 7), "+ " * (turns - 1) + "=")
    assert (steps[-1].reward, steps[-1].terminated, steps[-1].truncated) == (-1.0, False, True)


def test_symbols_stand_in_the_original_s_order() -> None:
    numbers = tuple(map(str, range(1, 11)))
    assert CardEnv(EZPointsConfig()).words == (*numbers, "+", "*", "=")
    assert CardEnv(PointsConfig()).words == (*numbers, "+", "-", "*", "/", "(", ")", "=")
    by_rank = CardEnv(PointsConfig(faces="rank"))
    assert by_rank.words == (*map(str, range(1, 14)), "+", "-", "*", "/", "(", ")", "=")
    assert play(hold(PointsConfig(faces="rank"), 13, 11, 1, 1), "13 + 11 + 1 - 1 =")[-1].reward == 10
    assert play(hold(PointsConfig(), 13, 11, 1, 1), "13")[-1].legal == 0


def test_info_is_a_copy() -> None:
    game = PointsGame()
    _, info = game.reset(seed=0)
    for value in info.values():
        if isinstance(value, list):
            value.append(5)
    assert (game.formula, len(game.numbers), len(game.cards)) == ([], 4, 4)


def test_an_impossible_target_is_refused() -> None:
    with pytest.raises(EnvError, match="none of 20000 hands of 2 cards makes 1000"):
        Blind(target=1000, cards=2, solvable_only=True).reset(seed=0)


@pytest.mark.parametrize("cards", [2, 3, 4])
def test_other_targets_deal_hands_that_can_make_them(cards: int) -> None:
    game = Blind(kind="ezpoints", target=20, cards=cards, solvable_only=True)
    for seed in range(100):
        game.reset(seed=seed)
        assert len(game.numbers) == cards
        assert solvable(game.numbers, 20, plain=True)


def test_what_it_says() -> None:
    env = hold(PointsConfig(observation="text"), 8, 13, 1, 10)
    assert play(env, "8 / (")[-1].observation.text == "Cards: 8 K A 10\nFormula: 8 / ("
    assert CardEnv(EZPointsConfig()).reset(0).text == "Formula:"
    assert "J, Q, K count 10" in env.instructions
    assert "J, Q, K count 11, 12, 13" in CardEnv(PointsConfig(faces="rank")).instructions
