"""Every term is checked for its value and for the direction of its gradient: a flipped sign fails both."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_agents.learn.averages import over_budget, over_rows, over_tokens, over_turns
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.losses import (
    ESTIMATORS,
    Loss,
    Pool,
    Unit,
    advantage_weighted,
    clipped,
    clipped_weight,
    corrected,
    entropy_bonus,
    k3,
    pooled_mean,
    pooled_sum,
    reference_kl,
    reinforce,
    turn_entropy,
    value_loss,
)
from vlm_agents.learn.samples import Sample, Targets
from vlm_agents.learn.update import Objective, go_through
from vlm_agents.tensors import Row, Scores

# two turns: the first has tokens 0 and 1, the second token 2
TURN_OF_TOKEN = torch.tensor([0, 0, 1])


def gradient(loss: Tensor, of: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(loss.sum(), of)
    return found.tolist()


def scores(logprobs: Tensor) -> Scores:
    nothing = torch.zeros(len(logprobs))
    return Scores(logprobs, nothing, nothing[:, None])


def make_targets(
    old: Tensor,
    advantages: Sequence[float] | None = None,
    emphasis: Sequence[float] | None = None,
    reference: Tensor | None = None,
    turn: Tensor = TURN_OF_TOKEN,
) -> Targets:
    """In one row; `advantages` of each token."""
    nothing = torch.zeros(len(old))
    return Targets(
        behaviour=old,
        old=old,
        emphasis=nothing + 1 if emphasis is None else torch.tensor(emphasis),
        advantages=nothing if advantages is None else torch.tensor(advantages),
        returns=nothing,
        reference=reference,
        weight=nothing,
        turn=turn,
        row=torch.zeros_like(turn),
        first=torch.tensor([0]),
    )


def test_sums_and_means_of_a_unit_are_each_of_its_tokens():
    per_token = torch.tensor([1.0, 3.0, 5.0])
    assert pooled_sum(per_token, TURN_OF_TOKEN).tolist() == [4.0, 4.0, 5.0]
    assert pooled_mean(per_token, TURN_OF_TOKEN).tolist() == [2.0, 2.0, 5.0]


# ---- the clipped surrogate -------------------------------------------------------------------------------------------
def test_policy_loss_by_hand():
    term = clipped(0.2, 0.2)(
        scores(torch.tensor([-1.0, -0.5, -2.0])),
        make_targets(torch.tensor([-1.4, -0.6, -1.9]), [2.0, 2.0, -1.0], emphasis=[0.5, 1.0, 1.0]),
    )
    # turn 0: log ratio 0.5*0.4 + 0.1 = 0.3, ratio 1.349859, clipped to 1.2, times 2, negated
    # turn 1: log ratio -0.1, ratio 0.904837, inside the clip range, times -1, negated
    torch.testing.assert_close(term.loss, torch.tensor([-2.4, -2.4, 0.904837]), rtol=1e-6, atol=0)
    torch.testing.assert_close(term.seen["policy_loss"], term.loss, rtol=0, atol=0)
    torch.testing.assert_close(term.seen["ratio"], torch.tensor([1.349859, 1.349859, 0.904837]), rtol=1e-6, atol=0)
    # of the tokens unweighted, exp(d) - 1 - d: d is 0.5 and -0.1
    kl = torch.tensor([0.148721, 0.148721, 0.004837])
    torch.testing.assert_close(term.seen["approx_kl"], kl, rtol=1e-4, atol=0)
    assert term.seen["clip_fraction"].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("unit", "pool", "log_ratios"),
    [
        ("token", "sum", [0.2, 0.1, -0.1]),  # a token's own, with its emphasis
        ("turn", "mean", [0.15, 0.15, -0.1]),
        ("row", "sum", [0.2, 0.2, 0.2]),
        ("row", "mean", [0.2 / 3, 0.2 / 3, 0.2 / 3]),
    ],
)
def test_ratios_of_other_units_by_hand(unit: Unit, pool: str, log_ratios: list[float]):
    targets = make_targets(torch.tensor([-1.4, -0.6, -1.9]), [2.0, 2.0, -1.0], emphasis=[0.5, 1.0, 1.0])
    new = torch.tensor([-1.0, -0.5, -2.0])
    term = clipped(0.2, 0.2, unit, pool)(scores(new), targets)  # type: ignore[arg-type]
    torch.testing.assert_close(term.seen["ratio"], torch.tensor(log_ratios).exp(), rtol=1e-6, atol=0)
    # whatever the unit, of the tokens of a turn
    kl = torch.tensor([0.148721, 0.148721, 0.004837])
    torch.testing.assert_close(term.seen["approx_kl"], kl, rtol=1e-4, atol=0)


def test_policy_loss_raises_the_probability_of_good_turns_by_emphasis():
    logprobs = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    targets = make_targets(logprobs.detach(), [2.0, 2.0, -3.0], emphasis=[0.5, 1.0, 1.0])
    loss = clipped(0.2, 0.2)(scores(logprobs), targets).loss
    # a turn's loss once, as its tokens' weights make it
    loss = loss * torch.tensor([0.5, 0.5, 1.0])
    # at ratio 1: -advantage * emphasis; negative, so descent raises the log-probs of the turn with the good advantage
    assert gradient(loss, logprobs) == pytest.approx([-1.0, -2.0, 3.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.3, 1.0, 0.0),  # good and already more likely: enough
        (1.3, -1.0, 1.3),  # bad and yet more likely: still pulled back
        (0.7, 1.0, -0.7),  # good and yet less likely: still pulled up
        (0.7, -1.0, 0.0),  # bad and already less likely: enough
        (1.1, 1.0, -1.1),  # inside the range nothing is clipped
        (0.9, -1.0, 0.9),
    ],
)
@pytest.mark.parametrize("unit", ["token", "turn", "row"])
def test_clip_kills_the_gradient_exactly_where_it_must(unit: Unit, ratio: float, advantage: float, slope: float):
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    targets = make_targets(torch.zeros(1), [advantage], turn=torch.zeros(1, dtype=torch.int64))
    term = clipped(0.2, 0.2, unit)(scores(logprobs), targets)
    # d(-ratio * advantage) / d log-prob = -ratio * advantage
    assert gradient(term.loss, logprobs) == pytest.approx([slope])
    assert term.seen["clip_fraction"].tolist() == [float(abs(ratio - 1) > 0.2)]


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope", "fraction"),
    [(1.25, 1.0, -1.25, 0.0), (1.35, 1.0, 0.0, 1.0), (0.85, -1.0, 0.85, 0.0), (0.75, -1.0, 0.0, 1.0)],
)
def test_the_two_ends_of_the_clip_range_are_apart(ratio: float, advantage: float, slope: float, fraction: float):
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    targets = make_targets(torch.zeros(1), [advantage], turn=torch.zeros(1, dtype=torch.int64))
    term = clipped(0.2, 0.3)(scores(logprobs), targets)  # from 0.8 to 1.3
    assert gradient(term.loss, logprobs) == pytest.approx([slope])
    assert term.seen["clip_fraction"].tolist() == [fraction]


# ---- other terms -----------------------------------------------------------------------------------------------------
def test_value_loss_moves_values_to_returns():
    values = torch.tensor([1.0, 5.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([3.0, 4.0]))
    # 0.5 * 2^2 and 0.5 * 1^2; gradient value - return
    assert loss.tolist() == [2.0, 0.5]
    assert gradient(loss, values) == [-2.0, 1.0]


def test_the_entropy_bonus_raises_entropy():
    entropy = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
    targets = make_targets(torch.zeros(3))
    term = entropy_bonus(replace(scores(torch.zeros(3)), entropy=entropy), targets)
    assert term.seen["entropy"].tolist() == [0.5, 2.0, 1.0]
    assert gradient(term.loss, entropy) == [-1.0] * 3


def test_reference_kl_pulls_the_policy_to_the_reference():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    reference = torch.tensor([-1.5, -1.5, -0.5])
    term = reference_kl(k3)(scores(logprobs), make_targets(logprobs.detach(), reference=reference))
    # exp(-0.5) - 1 + 0.5 = 0.106531 and exp(0.5) - 1 - 0.5 = 0.148721; token 2 agrees with the reference
    torch.testing.assert_close(term.loss, torch.tensor([0.106531, 0.148721, 0.0]), rtol=1e-5, atol=1e-7)
    assert term.seen["kl_reference"].tolist() == term.loss.tolist()
    # 1 - exp(-0.5) above the reference, 1 - exp(0.5) below it
    assert gradient(term.loss, logprobs) == pytest.approx([0.3934693, -0.6487213, 0.0], abs=1e-6)


def test_turn_entropy_pulls_the_temperature_to_the_target():
    tempered = torch.tensor([1.0, 3.0, 0.5], requires_grad=True)
    temperature = torch.tensor([0.7, 0.7, 1.2])
    given = replace(scores(torch.zeros(3)), temperature=temperature, tempered_entropy=tempered)
    term = turn_entropy(1.5)(given, make_targets(torch.zeros(3)))
    # turn 0: mean 2, 0.5 * 0.5^2; turn 1: 0.5 * 1^2
    assert term.loss.tolist() == [0.125, 0.125, 0.5]
    assert term.seen["temperature"].tolist() == temperature.tolist()
    assert term.seen["turn_entropy_loss"].tolist() == term.loss.tolist()
    # a turn's loss once: mean - target, shared by its tokens
    assert gradient(term.loss * torch.tensor([0.5, 0.5, 1.0]), tempered) == [0.25, 0.25, -1.0]


def test_k3_is_the_kl_in_expectation_and_exact_near_zero():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * k3((q / p).log())).sum(), expected, rtol=1e-6, atol=0)
    # x^2 / 2, where exp(x) - 1 - x in fp32 would be off by ten times as much
    torch.testing.assert_close(k3(torch.tensor([1e-4])), torch.tensor([5e-9]), rtol=1e-2, atol=0)


# ---- every surrogate against loops -----------------------------------------------------------------------------------
# two rows: the first of turns of 2 and 1 tokens, the second of turns of 3 and 2
UNITS = {
    "token": [[0], [1], [2], [3], [4], [5], [6], [7]],
    "turn": [[0, 1], [2], [3, 4, 5], [6, 7]],
    "row": [[0, 1, 2], [3, 4, 5, 6, 7]],
}
RATIOS: list[tuple[Unit, Pool]] = [("token", "sum"), ("turn", "sum"), ("turn", "mean"), ("row", "sum"), ("row", "mean")]


def place_of(units: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([place for place, unit in enumerate(units) for _ in unit])


def drawn(seed: int) -> tuple[Tensor, Targets]:
    """Log-probs now, and all else, of these rows, in fp64; advantages differ by token."""
    rng = np.random.default_rng(seed)
    old, drift, behaviour, advantages, reference = rng.normal(size=(5, 8))
    turn, row = place_of(UNITS["turn"]), place_of(UNITS["row"])
    targets = Targets(
        behaviour=torch.from_numpy(old + 0.3 * behaviour),
        old=torch.from_numpy(old),
        emphasis=torch.from_numpy(rng.choice([0.25, 1.0], 8)),
        advantages=torch.from_numpy(advantages),
        returns=torch.zeros(8).double(),
        reference=torch.from_numpy(old + reference),
        weight=torch.from_numpy(rng.uniform(0.1, 1.0, 8)),
        turn=turn,
        row=row,
        first=torch.tensor([0, 2, 3, 6]),
    )
    return torch.from_numpy(old + 0.3 * drift).requires_grad_(), targets


def by_clip(low: float, high: float, dual: float | None = None) -> Callable[..., tuple[float, float]]:
    """A token's loss, and its derivative in the log of its unit's ratio, from the definition case by case."""

    def rule(ratio: float, log_prob: float, advantage: float) -> tuple[float, float]:
        if advantage >= 0:
            return (-(1 + high) * advantage, 0.0) if ratio > 1 + high else (-ratio * advantage, -ratio * advantage)
        if dual is not None and ratio > dual:
            return -dual * advantage, 0.0
        return (-(1 - low) * advantage, 0.0) if ratio < 1 - low else (-ratio * advantage, -ratio * advantage)

    return rule


def by_weight(weigh: Callable[[float, float], float]) -> Callable[..., tuple[float, float]]:
    def rule(ratio: float, log_prob: float, advantage: float) -> tuple[float, float]:
        weight = weigh(ratio, advantage)
        return -weight * log_prob, -weight

    return rule


SURROGATES: dict[str, tuple[Callable[[Unit, Pool], Loss], Callable[..., tuple[float, float]]]] = {
    "clip": (lambda unit, pool: clipped(0.2, 0.2, unit, pool), by_clip(0.2, 0.2)),
    "asymmetric": (lambda unit, pool: clipped(0.1, 0.4, unit, pool), by_clip(0.1, 0.4)),
    "dual": (lambda unit, pool: clipped(0.2, 0.2, unit, pool, dual=1.3), by_clip(0.2, 0.2, 1.3)),
    "reinforce": (reinforce, by_weight(lambda ratio, advantage: advantage)),
    "cispo": (
        lambda unit, pool: clipped_weight(0.3, 0.2, unit, pool),
        by_weight(lambda ratio, advantage: min(1.2, max(0.7, ratio)) * advantage),
    ),
    "awr": (
        lambda unit, pool: advantage_weighted(0.5, 3.0, unit, pool),
        by_weight(lambda ratio, advantage: min(3.0, math.exp(advantage / 0.5))),
    ),
}


@pytest.mark.parametrize("correction", [None, "truncate", "mask"])
@pytest.mark.parametrize(("unit", "pool"), RATIOS)
@pytest.mark.parametrize("name", SURROGATES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=4)
def test_a_surrogate_is_what_loops_over_its_definition_give(
    name: str, unit: Unit, pool: Pool, correction: Any, seed: int
):
    make, rule = SURROGATES[name]
    new, targets = drawn(seed)
    loss = make(unit, pool)
    loss = loss if correction is None else corrected(loss, correction, 1.2, "token" if pool == "mean" else unit)
    term = loss(Scores(new, new, new[:, None]), targets)
    (found,) = torch.autograd.grad((targets.weight * term.loss).sum(), new)

    now, old, behaviour, emphasis, advantages, weight = (
        tensor.tolist()
        for tensor in (new, targets.old, targets.behaviour, targets.emphasis, targets.advantages, targets.weight)
    )
    losses, slopes = [0.0] * 8, [0.0] * 8
    for members in UNITS[unit]:
        share = 1 / len(members) if pool == "mean" else 1.0
        ratio = math.exp(share * sum(emphasis[k] * (now[k] - old[k]) for k in members))
        log_prob = share * sum(emphasis[k] * now[k] for k in members)
        for k in members:
            off = math.exp(sum(old[j] - behaviour[j] for j in ([k] if pool == "mean" else members)))
            factor = {
                None: 1.0,
                "truncate": min(off, 1.2),
                "mask": off if 1 / 1.2 <= off <= 1.2 else 0.0,
            }[correction]
            value, slope = rule(ratio, log_prob, advantages[k])
            losses[k] = factor * value
            for j in members:  # every token of a unit moves what each of them is worth
                slopes[j] += weight[k] * factor * slope * emphasis[j] * share
    np.testing.assert_allclose(term.loss.detach().numpy(), losses, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.numpy(), slopes, rtol=1e-10, atol=1e-12)


@given(seed=st.integers(0, 10_000))
def test_estimators_of_the_reference_kl_are_those_of_their_definitions(seed: int):
    new, targets = drawn(seed)
    assert targets.reference is not None
    ratios = (targets.reference - new.detach()).tolist()  # log reference - log policy
    forms = {
        "k2": ([r * r / 2 for r in ratios], [-r for r in ratios]),
        "k3": ([math.exp(r) - 1 - r for r in ratios], [1 - math.exp(r) for r in ratios]),
    }
    for name, (values, slopes) in forms.items():
        term = reference_kl(ESTIMATORS[name])(Scores(new, new, new[:, None]), targets)
        np.testing.assert_allclose(term.loss.detach().numpy(), values, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gradient(term.loss, new), slopes, rtol=1e-9, atol=1e-12)


# ---- what holds whatever is trained on -------------------------------------------------------------------------------
@pytest.mark.parametrize(("unit", "pool"), RATIOS)
@pytest.mark.parametrize("name", SURROGATES)
@given(
    sizes=st.lists(st.floats(0.01, 3.0), min_size=2, max_size=2), good=st.lists(st.booleans(), min_size=2, max_size=2)
)
@settings(max_examples=8)
def test_good_rows_become_likelier_and_bad_ones_less(
    name: str, unit: Unit, pool: Pool, sizes: list[float], good: list[bool]
):
    """At the first step, where all ratios are 1. Regression makes none less likely, and those that are better more."""
    new, targets = drawn(1)
    by_row = torch.tensor([size if its else -size for size, its in zip(sizes, good, strict=True)]).double()
    targets = replace(targets, old=new.detach(), advantages=by_row[targets.row])
    term = SURROGATES[name][0](unit, pool)(Scores(new, new, new[:, None]), targets)
    (found,) = torch.autograd.grad(term.loss.sum(), new)
    if name == "awr":
        assert (found < 0).all()
        return
    assert (found.sign() == -targets.advantages.sign()).all()


AVERAGES = {"turns": over_turns, "tokens": over_tokens, "rows": over_rows, "budget": over_budget(64)}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", SURROGATES)
@given(
    replies=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=6),
    unit=st.sampled_from(RATIOS),
    budget=st.integers(1, 60),
    data=st.data(),
)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixture gives a class
def test_order_padding_and_micro_batches_change_no_gradient(
    tiny_agent: Any, name: str, average: str, replies: list[list[int]], unit: tuple[Unit, Pool], budget: int, data: Any
):
    """Row by row nothing is padded; in one micro-batch all are, to the longest."""
    rng, samples = np.random.default_rng(len(replies)), list[Sample]()
    for number, lengths in enumerate(replies):
        ends = np.cumsum([3 + length for length in lengths]).tolist()
        spans = tuple((end - length, end) for end, length in zip(ends, lengths, strict=True))
        numbers = rng.normal(size=(5, sum(lengths)))
        old, emphasis = -2.5 + 0.3 * numbers[0], np.where(numbers[1] > 0, 1.0, 0.25)
        samples.append(
            Sample(
                Row(f"row {number}", rng.integers(2, 12, ends[-1]), (), spans),
                behaviour=old + 0.1 * numbers[2],
                emphasis=emphasis,
                advantages=numbers[3],
                returns=numbers[4],
                old=old,
                reference=old + 0.2 * numbers[4],
            )
        )
    terms = [(1.0, corrected(SURROGATES[name][0](*unit), "truncate", 2.0, unit[0])), (0.1, entropy_bonus)]
    objective = Objective([*terms, (0.3, reference_kl(k3))], AVERAGES[average])
    agent, found = tiny_agent().double(), []
    for tokens, order in (
        (10_000, range(len(samples))),
        (budget, data.draw(st.permutations(range(len(samples))))),
        (1, range(len(samples))),
    ):
        losses: list[float] = []

        def backward(loss: Tensor, losses: list[float] = losses) -> None:
            losses.append(loss.item())
            loss.backward()

        passed = go_through(agent, [samples[place] for place in order], objective, None, Shares(tokens), backward)
        slopes = [parameter.grad.flatten() for parameter in agent.parameters() if parameter.grad is not None]
        found.append(
            torch.cat([*slopes, torch.tensor([sum(losses), passed.mean("approx_kl"), passed.mean("entropy")])])
        )
        agent.zero_grad()
    assert found[0].abs().max() > 1e-4
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)  # weights of averages are fp32
