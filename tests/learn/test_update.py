import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vlm_agents.learn.batch import microbatches, rows

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn.engine import TorchEngine
from vlm_agents.learn.update import accumulate, objective, update
from vlm_agents.tensors import Renderer, Row, Scores, Tokens
from vlm_agents.types import Trajectory, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Trajectory]
WHOLE = 10_000  # tokens: everything in one micro-batch


class TinyAgent(nn.Module):
    """A policy and a critic over the mean embedding of all tokens so far; the reference is how it was born."""

    exact = True

    def __init__(self, vocabulary: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, 8)
        self.policy = nn.Linear(8, vocabulary)
        self.critic = nn.Linear(8, 1)
        self.born = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def forward(self, tokens: Tokens) -> Scores:
        ids, reply = tokens.input_ids, tokens.reply_mask[:, 1:]
        hidden = self.embedding(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        hidden = hidden[:, :-1]
        logprobs = self.policy(hidden).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        taken = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        starts = reply & ~tokens.reply_mask[:, :-1]
        states = hidden.detach()[starts]
        return Scores(taken[reply], entropy[reply], self.value(states), states)

    def score(self, tokens: Tokens) -> Scores:
        return self(tokens)

    def value(self, states: Tensor) -> Tensor:
        return self.critic(states).squeeze(-1)

    @torch.no_grad()
    def reference_logprobs(self, tokens: Tokens) -> Tensor:
        return torch.func.functional_call(self, self.born, (tokens,)).logprobs

    def parameters_by_role(self) -> Mapping[str, list[nn.Parameter]]:
        policy = [*self.embedding.parameters(), *self.policy.parameters()]
        return {"policy": policy, "value": list(self.critic.parameters())}


def make_algo(**changes: Any) -> AlgoConfig:
    plain = {"lr": 1e-2, "epochs": 1, "minibatch_turns": 1000, "value_warmup": 0, "value_epochs": 0}
    return AlgoConfig(name="ppo", **plain | changes)


def make_engine(agent: TinyAgent, algo: AlgoConfig) -> TorchEngine:
    return TorchEngine(agent.parameters_by_role(), algo, iterations=10)


def run(
    agent: TinyAgent, renderer: Renderer, rows: Sequence[Row], tokens: int = WHOLE, **changes: Any
) -> dict[str, float]:
    algo = make_algo(**changes)
    return update(agent, renderer, make_engine(agent, algo), rows, algo, np.random.default_rng(0), tokens)


def as_sampled(row: Row, agent: TinyAgent, renderer: Renderer) -> Row:
    """The row with the log-probs and values that the agent gives it now, on its own."""
    with torch.no_grad():
        scores = agent.score(renderer.collate([row]))
    return replace(row, old_logprobs=scores.logprobs.numpy(), old_values=scores.values.numpy())


@pytest.fixture
def make_rows(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode) -> Callable[..., list[Row]]:
    """One-turn rows of the given lengths with random tokens and returns, sampled by `agent`."""

    def make(agent: TinyAgent, lengths: Sequence[int]) -> list[Row]:
        rng = np.random.default_rng(3)
        episodes = []
        for seed, length in enumerate(lengths):
            ids = rng.integers(2, 12, length).tolist()
            episodes.append(make_episode(make_turn(ids[:2], ids[2:], reward=rng.normal()), seed=seed))
        return [as_sampled(row, agent, renderer) for row in rows(episodes, renderer, make_algo())]

    return make


MakeRows = Callable[..., list[Row]]


def flat_gradient(agent: TinyAgent) -> Tensor:
    """All gradients in one vector; afterwards there are none."""
    found = torch.cat([parameter.grad.flatten() for parameter in agent.parameters() if parameter.grad is not None])
    agent.zero_grad()
    return found


# ---- exact accumulation ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lengths", "budget", "sizes"),
    [
        ([8] * 8, WHOLE, [8]),
        ([8] * 8, 16, [2, 2, 2, 2]),
        ([8] * 8, 24, [3, 3, 2]),
        ([8] * 8, 1, [1] * 8),
        ([4, 4, 6, 6, 8, 8, 10, 10], 20, [2, 2, 3, 1]),
        ([3, 4, 5, 6, 7, 8, 9, 30], 30, [1, 3, 4]),
    ],
    ids=["8x1", "4x2", "uneven", "8 alone", "ragged", "one long"],
)
def test_micro_batches_change_nothing(
    renderer: Renderer, make_rows: MakeRows, lengths: list[int], budget: int, sizes: list[int]
):
    agent = TinyAgent()
    all_rows = make_rows(agent, lengths)
    with torch.no_grad():  # away from where it was sampled: ratios differ, some are clipped
        agent.policy.bias.add_(0.1 * torch.randn(12))
    algo = make_algo(kl_coef=0.1, entropy_coef=0.1)
    reference = {id(row): torch.from_numpy(row.old_logprobs) for row in all_rows}
    loss, at_once = objective(agent, renderer, all_rows, algo, reference)
    whole = at_once.terms
    loss.mean().backward()
    expected = flat_gradient(agent)
    assert expected.norm() > 0.1
    assert 0 < whole["clip_fraction"].mean() < 1
    assert [len(part) for part in microbatches(all_rows, budget)] == sizes
    cut = accumulate(agent, renderer, make_engine(agent, algo), all_rows, algo, reference, budget).terms
    torch.testing.assert_close(flat_gradient(agent), expected, rtol=0, atol=1e-6)
    for name, values in whole.items():
        torch.testing.assert_close(cut[name].mean(), values.mean(), rtol=1e-6, atol=1e-6)


def test_micro_batches_change_no_weight(renderer: Renderer, make_rows: MakeRows):
    agents = [TinyAgent().double() for _ in range(2)]
    metrics = []
    for agent, tokens in zip(agents, (WHOLE, 16), strict=True):
        all_rows = make_rows(TinyAgent(), [8] * 8)
        metrics.append(run(agent, renderer, all_rows, tokens, epochs=3, minibatch_turns=4))
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6, abs=1e-6)
    for one, other in zip(*(agent.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_chat_in_one_row_is_worth_the_same_as_a_row_per_turn(
    renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    turns = [
        make_turn([2, 3], [9, 1], reward=1.0, value=0.3, logprobs=[-2.0, -2.2]),
        make_turn([2, 3, 9, 1, 4], [10, 10, 1], reward=-1.0, value=0.1, logprobs=[-2.1, -2.0, -2.6]),
        make_turn([2, 3, 9, 1, 4, 10, 10, 1, 5], [11, 1], reward=0.5, value=0.2, logprobs=[-3.0, -2.5]),
    ]
    agent, algo = TinyAgent(), make_algo(gamma=0.0)  # gamma 0: a turn's credit doesn't depend on the next one
    as_chat = rows([make_episode(*turns)], renderer, algo)
    apart = rows([make_episode(turn) for turn in turns], renderer, algo)
    assert [len(row.spans) for row in as_chat] == [3]
    assert [len(row.spans) for row in apart] == [1, 1, 1]
    found = []
    for some_rows in (as_chat, apart):
        terms = accumulate(agent, renderer, make_engine(agent, algo), some_rows, algo, None, WHOLE).terms
        found.append((flat_gradient(agent), terms["policy_loss"].sum(), terms["value_loss"].sum()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


# ---- ratios ----------------------------------------------------------------------------------------------------------
def test_the_ratio_is_one_before_the_first_step(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    metrics = run(agent, renderer, make_rows(agent, range(4, 20)), tokens=40, epochs=4, minibatch_turns=4)
    assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["ppo/updates"] == 16
    assert metrics["ppo/approx_kl"] > 1e-4  # while later ones differ


def test_the_ratio_at_start_tells_the_worst_turn_of_either_side(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    all_rows = make_rows(agent, [6] * 8)
    for index, off in ((2, 0.1), (5, 0.3)):  # as if sampled with a probability e^off times too large
        shift = np.array([off, 0, 0, 0], dtype=np.float32)
        all_rows[index] = replace(all_rows[index], old_logprobs=all_rows[index].old_logprobs + shift)
    assert run(agent, renderer, all_rows)["ppo/ratio_at_start"] == pytest.approx(np.exp(-0.3), rel=1e-5)


def test_what_an_inexact_model_scores_takes_the_place_of_what_was_sampled(renderer: Renderer, make_rows: MakeRows):
    """In half precision sampling and scoring differ: the ratio is then between two passes of the update."""
    agent = TinyAgent()
    agent.exact = False
    all_rows = make_rows(agent, [6] * 8)
    for index, off in ((2, 0.1), (5, 0.3)):  # as if sampled with a probability e^off times too large
        shift = np.array([off, 0, 0, 0], dtype=np.float32)
        all_rows[index] = replace(all_rows[index], old_logprobs=all_rows[index].old_logprobs + shift)
    metrics = run(agent, renderer, all_rows, tokens=40, epochs=2, minibatch_turns=4, kl_coef=0.1)
    assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    # k3(-0.1) = e^-0.1 - 1 + 0.1 = 0.0048374, k3(-0.3) = 0.0408182, and six turns of 0
    assert metrics["ppo/mismatch_kl"] == pytest.approx((0.0048374 + 0.0408182) / 8, rel=1e-4)
    assert metrics["ppo/approx_kl"] > 0


def test_an_exact_model_tells_the_mismatch_of_its_first_mini_batch(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    off = np.array([0.3, 0, 0, 0], dtype=np.float32)
    all_rows = [replace(row, old_logprobs=row.old_logprobs + off) for row in make_rows(agent, [6] * 8)]
    metrics = run(agent, renderer, all_rows, epochs=2, minibatch_turns=4)
    assert metrics["ppo/mismatch_kl"] == pytest.approx(0.0408182, rel=1e-4)


def test_target_kl_skips_the_remaining_updates(renderer: Renderer, make_rows: MakeRows):
    settings = {"lr": 0.1, "epochs": 4, "minibatch_turns": 4}
    free, held = ({} for _ in range(2))
    for metrics, target in ((free, None), (held, 1e-3)):
        agent = TinyAgent()
        metrics |= run(agent, renderer, make_rows(agent, [6] * 8), target_kl=target, **settings)
    assert free["ppo/updates"] == 8
    # the first mini-batch has a KL of 0; the second sees what the first step did, and is the last
    assert held["ppo/updates"] == 2
    assert held["ppo/approx_kl"] > 1e-3 / 2


# ---- what each coefficient does --------------------------------------------------------------------------------------
def test_the_entropy_bonus_raises_entropy(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    still = [replace(row, advantages=np.zeros(1, np.float32)) for row in make_rows(agent, [6] * 8)]
    before = run(agent, renderer, still, epochs=1, entropy_coef=1.0)["ppo/entropy"]
    after = run(agent, renderer, still, epochs=1, entropy_coef=1.0)["ppo/entropy"]
    assert after > before + 1e-3


def test_the_reference_kl_holds_the_policy_back(renderer: Renderer, make_rows: MakeRows):
    final = []
    for kl_coef in (1e-9, 10.0):
        agent = TinyAgent()
        all_rows = make_rows(agent, [6] * 8)
        run(agent, renderer, all_rows, epochs=20, kl_coef=kl_coef, clip=10.0)
        final.append(run(agent, renderer, all_rows, kl_coef=kl_coef)["ppo/kl_reference"])
    assert final[1] < final[0] / 2


def test_the_reference_is_computed_once_and_matched_to_its_rows(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    metrics = run(agent, renderer, make_rows(agent, range(4, 20)), tokens=40, minibatch_turns=1000, kl_coef=1.0)
    assert metrics["ppo/kl_reference"] == pytest.approx(0.0, abs=1e-9)  # nothing was learnt before the only update
    assert "ppo/kl_reference" not in run(agent, renderer, make_rows(agent, [6]))


def test_the_value_head_learns_the_returns(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    all_rows = [replace(row, returns=np.full(1, 2.0, np.float32)) for row in make_rows(agent, [6] * 8)]
    first = run(agent, renderer, all_rows, epochs=1, value_lr=0.1)["ppo/value_loss"]
    run(agent, renderer, all_rows, epochs=50, value_lr=0.1)
    assert run(agent, renderer, all_rows, epochs=1)["ppo/value_loss"] < first / 10


def test_further_passes_fit_the_critic_alone(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    all_rows = make_rows(agent, range(4, 36))
    with torch.no_grad():
        states = torch.cat([agent.score(renderer.collate([row])).states for row in all_rows])
    returns = (states @ torch.linspace(-1, 1, 8) + 0.5).numpy()  # within reach of a linear critic
    all_rows = [replace(row, returns=returns[i : i + 1]) for i, row in enumerate(all_rows)]
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    metrics = run(agent, renderer, all_rows, lr=0.0, epochs=2, value_lr=0.02, value_epochs=500, minibatch_turns=8)
    with torch.no_grad():
        assert np.abs(agent.value(states).numpy() - returns).max() < 0.02
    assert metrics["ppo/updates"] == 8
    moved = {name for name, tensor in agent.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"critic.weight", "critic.bias"}


def test_each_turn_is_gone_over_as_often_as_value_epochs_says(renderer: Renderer, make_rows: MakeRows):
    agent, algo = TinyAgent(), make_algo(epochs=3, minibatch_turns=4, value_epochs=5)
    engine, steps = make_engine(agent, algo), []
    step = engine.step
    engine.step = lambda: steps.append(step()) or steps[-1]  # type: ignore[method-assign]
    update(agent, renderer, engine, make_rows(agent, [6] * 8), algo, np.random.default_rng(0), WHOLE)
    # 3 epochs of 2 mini-batches, then 5 of the head alone, in which no other role has a gradient
    assert len(steps) == 6 + 10
    assert all(norms["value"] > 0 for norms in steps)
    assert steps[0]["policy"] > 0
    assert not any(norms["policy"] for norms in steps[6:])


def test_a_critic_that_runs_away_is_found_out_at_once(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    with pytest.raises(TrainingError, match="ppo/value_grad_norm isn't finite over 8 turns"):
        run(agent, renderer, make_rows(agent, [6] * 8), value_lr=1e30, value_epochs=5)
    assert agent.critic.weight.isfinite().all()  # it went no further


def test_a_critic_that_warms_up_learns_alone_from_one_reading(renderer: Renderer, make_rows: MakeRows):
    agent, algo = TinyAgent(), make_algo(epochs=3, minibatch_turns=4, value_lr=0.1, value_warmup=1, value_epochs=5)
    engine, reads = make_engine(agent, algo), []
    score = agent.score
    agent.score = lambda tokens: reads.append(torch.is_grad_enabled()) or score(tokens)  # type: ignore[method-assign]
    all_rows = make_rows(TinyAgent(), [6] * 8)
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    metrics = update(agent, renderer, engine, all_rows, algo, np.random.default_rng(0), WHOLE)
    assert reads == [False] * 2  # two mini-batches
    assert metrics["ppo/updates"] == metrics["ppo/lr"] == 0
    assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    moved = {name for name, tensor in agent.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"critic.weight", "critic.bias"}
    reads.clear()
    metrics = update(agent, renderer, engine, all_rows, algo, np.random.default_rng(0), WHOLE)
    assert reads == [True] * 6
    assert metrics["ppo/updates"] == 6
    assert metrics["ppo/lr"] == 1e-2


def test_the_critic_goes_over_each_turn_once_though_a_later_epoch_is_cut_short(renderer: Renderer, make_rows: MakeRows):
    agent, algo = TinyAgent(), make_algo(lr=0.03, epochs=4, minibatch_turns=4, value_epochs=1, target_kl=0.1)
    agent.embedding.requires_grad_(False)  # so that a row's state stays what it is
    all_rows = make_rows(agent, [6] * 16)
    engine, seen = make_engine(agent, algo), []
    value = agent.value
    agent.value = lambda states: seen.extend(states.tolist()) or value(states)  # type: ignore[method-assign]
    metrics = update(agent, renderer, engine, all_rows, algo, np.random.default_rng(0), WHOLE)
    assert 4 < metrics["ppo/updates"] < 8  # it stopped inside the second epoch
    assert len(seen) == 4 * metrics["ppo/updates"] + 16
    assert sorted(seen[-16:]) == sorted(agent.score(renderer.collate(all_rows)).states.tolist())


def test_metrics_of_the_rollout(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    all_rows = make_rows(agent, [6] * 4)
    for index, (value, return_) in enumerate([(0.0, 0.0), (0.0, 2.0), (1.0, 1.0), (5.0, 5.0)]):
        old_values, returns = np.full(1, value, np.float32), np.full(1, return_, np.float32)
        all_rows[index] = replace(all_rows[index], old_values=old_values, returns=returns)
    metrics = run(agent, renderer, all_rows)
    # raw advantages 0, 2, 0, 0 have variance 0.75; returns 0, 2, 1, 5 have variance 3.5
    assert metrics["ppo/explained_variance"] == pytest.approx(1 - 0.75 / 3.5)
    assert metrics["ppo/advantage_std"] == pytest.approx(0.75**0.5)
    assert metrics["ppo/zero_advantage"] == 0.75
    assert metrics["ppo/lr"] == 1e-2


# ---- what can't go on ------------------------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_names_its_turns(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    all_rows = make_rows(agent, [6] * 8)
    for index in (3, 6):
        all_rows[index] = replace(all_rows[index], returns=np.full(1, np.nan, np.float32))
    with pytest.raises(TrainingError, match=r"value_loss isn't finite over 2 turns .*: lower algo\.lr=0\.01") as caught:
        run(agent, renderer, all_rows)
    assert sorted(re.findall(r"words/seed (\d)/turn 0", str(caught.value))) == ["3", "6"]


def test_many_bad_turns_are_counted_and_three_are_named(renderer: Renderer, make_rows: MakeRows):
    agent = TinyAgent()
    all_rows = [replace(row, advantages=row.advantages * np.inf) for row in make_rows(agent, [6] * 5)]
    with pytest.raises(TrainingError, match=r"ppo/policy_loss isn't finite over 5 turns \(([^,]+, ){3}\.\.\.\)"):
        run(agent, renderer, all_rows)


def test_a_gradient_that_is_not_finite_raises_before_it_reaches_the_weights(renderer: Renderer, make_rows: MakeRows):
    class Kinked(TinyAgent):
        """Its values pass through sqrt at 0: finite, with an infinite slope."""

        def score(self, tokens: Tokens) -> Scores:
            scores = self(tokens)
            return replace(scores, values=scores.values + (self.critic.weight.sum() * 0).sqrt())

    agent = Kinked()
    with pytest.raises(TrainingError, match=r"ppo/value_grad_norm isn't finite over 4 turns \(words/seed \d/turn 0, "):
        run(agent, renderer, make_rows(agent, [6] * 4))
    assert all(torch.equal(tensor, agent.born[name]) for name, tensor in agent.state_dict().items())


# ---- it learns -------------------------------------------------------------------------------------------------------
def test_ppo_solves_a_two_armed_bandit(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    """Token 0 asks, the reply is arm 0 (pays 1 with probability 0.4) or arm 1 (0.6)."""
    agent, rng = TinyAgent(vocabulary=2), np.random.default_rng(0)
    algo = make_algo(lr=0.03, value_lr=0.03, epochs=4, minibatch_turns=32)
    engine = TorchEngine(agent.parameters_by_role(), algo, iterations=20)

    def look() -> tuple[np.ndarray, float]:
        """Log-probs of the arms and the value."""
        question = torch.tensor([[0, 0], [0, 1]])
        with torch.no_grad():
            scores = agent.score(Tokens(question, torch.ones(2, 2).long(), torch.tensor([[False, True]] * 2), {}))
        return scores.logprobs.numpy(), scores.values[0].item()

    for iteration in range(20):
        logprobs, value = look()
        arms = (rng.random(64) < np.exp(logprobs[1])).astype(int)
        pays = (rng.random(64) < np.where(arms == 1, 0.6, 0.4)).astype(float)
        episodes = [
            make_episode(make_turn([0], [arm], reward, value, [logprobs[arm]]), seed=64 * iteration + index)
            for index, (arm, reward) in enumerate(zip(arms.tolist(), pays.tolist(), strict=True))
        ]
        metrics = update(agent, renderer, engine, rows(episodes, renderer, algo), algo, rng, WHOLE)
        assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    logprobs, value = look()
    assert np.exp(logprobs[1]) > 0.95
    assert value == pytest.approx(0.6, abs=0.15)
