import copy
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn.algorithm import make_algorithm
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.critic import Critic
from vlm_agents.learn.learner import Learner
from vlm_agents.learn.samples import Sample
from vlm_agents.learn.update import PREFIX
from vlm_agents.tensors import Renderer, reply_row
from vlm_agents.types import Trajectory, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Trajectory]
MakeSamples = Callable[..., list[Sample]]
Play = Callable[..., list[Trajectory]]
WHOLE = 10_000  # tokens: everything in one micro-batch


def make_learner(
    agent: Any,
    renderer: Renderer,
    tokens: int = WHOLE,
    iterations: int = 10,
    shapers: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Learner:
    plain = {"lr": 1e-2, "epochs": 1, "minibatch_turns": 1000, "value_warmup": 0, "value_epochs": 0}
    plain["max_mismatch_kl"] = None  # what episodes by hand say of log-probs is made up
    algo = AlgoConfig(name="ppo", **plain | changes)
    return Learner(agent, renderer, make_algorithm(algo, 64, tempered=False), algo, iterations, Shares(tokens), shapers)


def update(learner: Learner, samples: Sequence[Sample]) -> dict[str, float]:
    """What `learn` does with the samples that it made."""
    metrics = learner._update(samples, np.random.default_rng(0))
    return {f"{PREFIX}{name}": value for name, value in metrics.items()}


def run(
    agent: Any, renderer: Renderer, samples: Sequence[Sample], tokens: int = WHOLE, **changes: Any
) -> dict[str, float]:
    return update(make_learner(agent, renderer, tokens, **changes), samples)


def learn(learner: Learner, episodes: Sequence[Trajectory], seed: int = 0) -> dict[str, float]:
    shaped, told = learner.shape(episodes)
    return told | learner.learn(shaped, len(shaped), np.random.default_rng(seed))


def state_of(agent: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


@pytest.fixture
def play(make_turn: MakeTurn, make_episode: MakeEpisode) -> Play:
    """Episodes of one turn each, `agent`'s rows of these lengths, with random tokens and rewards."""

    def made(agent: Any, lengths: Sequence[int], rng_seed: int = 3) -> list[Trajectory]:
        rng, episodes = np.random.default_rng(rng_seed), []
        for seed, length in enumerate(lengths):
            ids = rng.integers(2, 12, length).tolist()
            with torch.no_grad():
                scores = agent.score([reply_row("played", ids[:2], ids[2:], ())])
                value = agent.value(scores.states[:1]).item()
            turn = make_turn(ids[:2], ids[2:], rng.normal(), value, scores.logprobs.tolist())
            episodes.append(make_episode(turn, seed=seed))
        return episodes

    return made


def test_micro_batches_change_no_weight(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agents = [tiny_agent().double() for _ in range(2)]
    metrics = []
    for agent, tokens in zip(agents, (WHOLE, 16), strict=True):
        samples = make_samples(tiny_agent(), [8] * 8)
        metrics.append(run(agent, renderer, samples, tokens, epochs=3, minibatch_turns=4))
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6, abs=1e-6)
    for one, other in zip(*(agent.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# ---- ratios ----------------------------------------------------------------------------------------------------------
def test_the_ratio_is_one_before_the_first_step(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agent = tiny_agent()
    metrics = run(agent, renderer, make_samples(agent, range(4, 20)), tokens=40, epochs=4, minibatch_turns=4)
    assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["ppo/updates"] == 16
    assert metrics["ppo/approx_kl"] > 1e-4  # while later ones differ


def test_the_ratio_at_start_tells_the_worst_turn_of_either_side(
    tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples
):
    agent = tiny_agent()
    samples = make_samples(agent, [6] * 8)
    for index, off in ((2, 0.1), (5, 0.3)):  # as if sampled with a probability e^off times too large
        shift = np.array([off, 0, 0, 0], dtype=np.float32)
        samples[index] = replace(samples[index], old=samples[index].old + shift)
    assert run(agent, renderer, samples)["ppo/ratio_at_start"] == pytest.approx(np.exp(-0.3), rel=1e-5)


def test_what_an_inexact_model_scores_takes_the_place_of_what_was_sampled(
    tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples
):
    """In half precision sampling and scoring differ: the ratio is then between two passes of the update."""
    agent = tiny_agent()
    agent.exact = False
    samples = make_samples(agent, [6] * 8)
    for index, off in ((2, 0.1), (5, 0.3)):  # as if sampled with a probability e^off times too large
        shift = np.array([off, 0, 0, 0], dtype=np.float32)
        samples[index] = replace(samples[index], behaviour=samples[index].behaviour + shift)
    metrics = run(agent, renderer, samples, tokens=40, epochs=2, minibatch_turns=4, kl_coef=0.1)
    assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    # k3(-0.1) = e^-0.1 - 1 + 0.1 = 0.0048374, k3(-0.3) = 0.0408182, and six turns of 0
    assert metrics["ppo/mismatch_kl"] == pytest.approx((0.0048374 + 0.0408182) / 8, rel=1e-4)
    assert metrics["ppo/approx_kl"] > 0


def test_an_exact_model_tells_the_mismatch_of_its_first_mini_batch(
    tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples
):
    agent = tiny_agent()
    off = np.array([0.3, 0, 0, 0], dtype=np.float32)
    samples = [replace(sample, old=sample.old + off) for sample in make_samples(agent, [6] * 8)]
    metrics = run(agent, renderer, samples, epochs=2, minibatch_turns=4)
    assert metrics["ppo/mismatch_kl"] == pytest.approx(0.0408182, rel=1e-4)


def test_target_kl_skips_the_remaining_updates(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    settings = {"lr": 0.1, "epochs": 4, "minibatch_turns": 4}
    free, held = ({} for _ in range(2))
    for metrics, target in ((free, None), (held, 1e-3)):
        agent = tiny_agent()
        metrics |= run(agent, renderer, make_samples(agent, [6] * 8), target_kl=target, **settings)
    assert free["ppo/updates"] == 8
    # the first mini-batch has a KL of 0; the second sees what the first step did, and is the last
    assert held["ppo/updates"] == 2
    assert held["ppo/approx_kl"] > 1e-3 / 2


# ---- what each coefficient does --------------------------------------------------------------------------------------
def test_the_entropy_bonus_raises_entropy(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agent = tiny_agent()
    still = [replace(sample, advantages=np.zeros(4, np.float32)) for sample in make_samples(agent, [6] * 8)]
    before = run(agent, renderer, still, epochs=1, entropy_coef=1.0)["ppo/entropy"]
    after = run(agent, renderer, still, epochs=1, entropy_coef=1.0)["ppo/entropy"]
    assert after > before + 1e-3


def test_the_reference_kl_holds_the_policy_back(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    final = []
    for kl_coef in (1e-9, 10.0):
        agent = tiny_agent()
        samples = make_samples(agent, [6] * 8)
        run(agent, renderer, samples, epochs=20, kl_coef=kl_coef, clip=10.0)
        final.append(run(agent, renderer, samples, kl_coef=kl_coef)["ppo/kl_reference"])
    assert final[1] < final[0] / 2


def test_the_reference_is_computed_once_and_matched_to_its_rows(
    tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples
):
    agent = tiny_agent()
    metrics = run(agent, renderer, make_samples(agent, range(4, 20)), tokens=40, minibatch_turns=1000, kl_coef=1.0)
    assert metrics["ppo/kl_reference"] == pytest.approx(0.0, abs=1e-9)  # nothing was learnt before the only update
    assert "ppo/kl_reference" not in run(agent, renderer, make_samples(agent, [6]))


def test_the_value_head_learns_the_returns(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agent = tiny_agent()
    samples = [replace(sample, returns=np.full(4, 2.0, np.float32)) for sample in make_samples(agent, [6] * 8)]
    first = run(agent, renderer, samples, epochs=1, value_lr=0.1)["ppo/value_loss"]
    run(agent, renderer, samples, epochs=50, value_lr=0.1)
    assert run(agent, renderer, samples, epochs=1)["ppo/value_loss"] < first / 10


def test_further_passes_fit_the_critic_alone(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agent = tiny_agent()
    samples = make_samples(agent, range(4, 36))
    with torch.no_grad():
        states = torch.cat([agent.score([sample.row]).states[:1] for sample in samples])
    returns = (states @ torch.linspace(-1, 1, 8) + 0.5).numpy()  # within reach of a linear critic
    samples = [
        replace(sample, returns=np.full_like(sample.returns, return_))
        for sample, return_ in zip(samples, returns, strict=True)
    ]
    before = state_of(agent)
    metrics = run(agent, renderer, samples, lr=0.0, epochs=2, value_lr=0.02, value_epochs=500, minibatch_turns=8)
    with torch.no_grad():
        assert np.abs(agent.value(states).numpy() - returns).max() < 0.02
    assert metrics["ppo/updates"] == 8
    moved = {name for name, tensor in agent.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"critic.weight", "critic.bias"}


def test_each_turn_is_gone_over_as_often_as_value_epochs_says(
    tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples
):
    agent = tiny_agent()
    learner = make_learner(agent, renderer, epochs=3, minibatch_turns=4, value_epochs=5)
    steps = {role: spied(engine) for role, engine in engines_of(learner).items()}
    update(learner, make_samples(agent, [6] * 8))
    # 3 epochs of 2 mini-batches, then 5 of the head alone
    assert {role: len(norms) for role, norms in steps.items()} == {"policy": 6, "value": 6 + 10}
    assert all(norm > 0 for norm in steps["value"])
    assert steps["policy"][0] > 0


def critic_of(learner: Learner) -> Critic:
    assert learner.critic is not None
    return learner.critic


def engines_of(learner: Learner) -> dict[str, Any]:
    return {**learner.engines, "value": critic_of(learner).engine}


def rates_of(learner: Learner) -> list[float]:
    """Of policy and critic, in this iteration."""
    return [learner.rate("policy"), critic_of(learner).rate(learner.iteration)]


def spied(engine: Any) -> list[float]:
    """Will hold the norms of the engine's steps."""
    step, norms = engine.step, []
    engine.step = lambda lr: norms.append(step(lr)) or norms[-1]
    return norms


def test_a_critic_that_runs_away_is_found_out_at_once(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agent = tiny_agent()
    with pytest.raises(TrainingError, match="ppo/value_grad_norm isn't finite over 8 rows"):
        run(agent, renderer, make_samples(agent, [6] * 8), value_lr=1e30, value_epochs=5)
    assert agent.critic.weight.isfinite().all()  # it went no further


def test_a_critic_that_warms_up_learns_alone_from_one_reading(tiny_agent: Any, renderer: Renderer, play: Play):
    agent, reads = tiny_agent(), []
    learner = make_learner(agent, renderer, epochs=3, minibatch_turns=4, value_lr=0.1, value_warmup=1, value_epochs=5)
    episodes, score = play(agent, [6] * 8), agent.score
    agent.score = lambda rows: reads.append(torch.is_grad_enabled()) or score(rows)
    before = state_of(agent)
    metrics = learn(learner, episodes)
    assert reads == [False] * 2  # two mini-batches
    assert metrics["ppo/updates"] == metrics["ppo/lr"] == 0
    assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    moved = {name for name, tensor in agent.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"critic.weight", "critic.bias"}
    reads.clear()
    metrics = learn(learner, episodes)
    assert reads == [True] * 6
    assert metrics["ppo/updates"] == 6
    assert metrics["ppo/lr"] == 1e-2


def test_a_critic_that_warms_up_learns_what_came_and_not_its_own_guesses(
    tiny_agent: Any, renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    episode = make_episode(make_turn([2], [9], 1.0, 3.0), make_turn([3], [9], 2.0, 5.0))
    learner = make_learner(tiny_agent(), renderer, value_warmup=1, value_epochs=1, gamma=0.5, gae_lambda=0.0)
    found = [learn(learner, [episode])["ppo/advantage_std"] for _ in range(2)]
    # returns 1 + 0.5 * 2 = 2 and 2: advantages -1 and -3; and by lambda 0 the first is 1 + 0.5 * 5 - 3 = 0.5
    assert found == [pytest.approx(1.0), pytest.approx(1.75)]


def test_the_critic_goes_over_each_turn_once_though_a_later_epoch_is_cut_short(
    tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples
):
    agent, seen = tiny_agent(), []
    agent.embedding.requires_grad_(False)  # so that a row's state stays what it is
    samples, value = make_samples(agent, [6] * 16), agent.value
    agent.value = lambda states: seen.extend(states.tolist()) or value(states)
    metrics = run(agent, renderer, samples, lr=0.03, epochs=4, minibatch_turns=4, value_epochs=1, target_kl=0.1)
    assert 4 < metrics["ppo/updates"] < 8  # it stopped inside the second epoch
    assert len(seen) == 4 * metrics["ppo/updates"] + 16
    assert sorted(seen[-16:]) == sorted(agent.score([sample.row]).states[0].tolist() for sample in samples)


def test_metrics_of_the_rollout(tiny_agent: Any, renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    pairs = [(0.0, 0.0), (0.0, 2.0), (1.0, 1.0), (5.0, 5.0)]  # values and rewards
    episodes = [make_episode(make_turn([2, 3], [9, 1], reward, value)) for value, reward in pairs]
    metrics = learn(make_learner(tiny_agent(), renderer), episodes)
    # raw advantages 0, 2, 0, 0 have variance 0.75; returns 0, 2, 1, 5 have variance 3.5
    assert metrics["ppo/explained_variance"] == pytest.approx(1 - 0.75 / 3.5)
    assert metrics["ppo/advantage_std"] == pytest.approx(0.75**0.5)
    assert metrics["ppo/zero_advantage"] == 0.75
    assert metrics["ppo/lr"] == 1e-2
    assert metrics["ppo/nothing_to_learn"] == 0


# ---- roles -----------------------------------------------------------------------------------------------------------
def test_each_role_has_its_learning_rate_and_iterations_move_both(tiny_agent: Any, renderer: Renderer, play: Play):
    agent = tiny_agent()
    learner = make_learner(
        agent, renderer, iterations=2, epochs=2, lr=0.1, value_lr=0.01, minibatch_turns=4, min_lr_ratio=0.1
    )
    episodes = play(agent, [6] * 8)
    by_step = []
    for engine in engines_of(learner).values():
        step = engine.step
        engine.step = lambda lr, step=step: by_step.append(lr) or step(lr)  # type: ignore[method-assign]
    assert learn(learner, episodes)["ppo/lr"] == 0.1
    assert sorted(set(by_step)) == [0.01, 0.1]  # whatever the number of steps
    assert learn(learner, episodes)["ppo/lr"] == pytest.approx(0.01)
    assert rates_of(learner) == pytest.approx([0.01, 0.001])


def test_the_first_step_of_a_role_is_its_learning_rate(tiny_agent: Any, renderer: Renderer, play: Play):
    agent = tiny_agent()
    episodes, before = play(agent, [6] * 8), state_of(agent)
    learn(make_learner(agent, renderer, lr=0.1, value_lr=0.01), episodes)
    # the first step of Adam is the learning rate against the gradient's sign
    for name, lr in (("policy.bias", 0.1), ("critic.bias", 0.01)):
        step = (agent.state_dict()[name] - before[name]).abs()
        torch.testing.assert_close(step, torch.full_like(step, lr), rtol=1e-3, atol=0)


def test_each_role_is_clipped_apart(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agent = tiny_agent()
    samples = [replace(sample, returns=sample.returns + 100) for sample in make_samples(agent, [6] * 8)]
    learner = make_learner(agent, renderer, max_grad_norm=2.0)
    metrics = update(learner, samples)
    norms = {role: metrics[f"ppo/{role}_grad_norm"] for role in ("policy", "value")}
    assert norms["value"] > 20
    assert 0.1 < norms["policy"] < 2
    for role, engine in engines_of(learner).items():
        means = [engine.optimizer.state[parameter]["exp_avg"].flatten() for parameter in engine.parameters]
        # Adam's mean takes a tenth of the gradient
        assert torch.cat(means).norm().item() == pytest.approx(0.1 * min(norms[role], 2.0), rel=1e-5)


def test_the_schedule_of_the_policy_begins_after_the_critics_warm_up(tiny_agent: Any, renderer: Renderer):
    learner = make_learner(tiny_agent(), renderer, iterations=4, lr=0.1, value_lr=1.0, value_warmup=1, value_epochs=1)
    rates, alone = [], []
    for iteration in range(4):
        learner.iteration = iteration
        rates.append(rates_of(learner))
        alone.append(learner.warming)
    assert alone == [True, False, False, False]
    # 0.1 + 0.45 * (1 + cos(pi * progress)), the policy's of 0, 1/2, 1 in iterations 2 to 4, the critic's of 0 to 3/3
    assert rates == [pytest.approx(both) for both in ([0.0, 1.0], [0.1, 0.775], [0.055, 0.325], [0.01, 0.1])]


def test_the_only_iteration_is_no_warm_up(tiny_agent: Any, renderer: Renderer):
    learner = make_learner(tiny_agent(), renderer, iterations=1, lr=0.1, value_warmup=1, value_epochs=1)
    assert not learner.warming
    assert learner.rate("policy") == 0.1


@pytest.mark.parametrize("role", ["policy", "value"])
def test_a_role_may_be_empty(tiny_agent: Any, renderer: Renderer, play: Play, role: str):
    agent = tiny_agent()
    frozen = agent.parameters_by_role()[role]
    for parameter in frozen:
        parameter.requires_grad_(False)
    roles = agent.parameters_by_role() | {role: []}
    agent.parameters_by_role = lambda: roles
    before = state_of(agent)
    metrics = learn(make_learner(agent, renderer), play(agent, [6] * 4))
    assert sorted(name for name in metrics if name.endswith("grad_norm")) == [
        f"ppo/{other}_grad_norm" for other in ("policy", "value") if other != role
    ]
    moved = {name.split(".")[0] for name, tensor in agent.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == ({"critic"} if role == "policy" else {"embedding", "policy"})


# ---- what shapes rewards ---------------------------------------------------------------------------------------------
class Counting:
    """Pays 1 for each of its first three episodes of a run, and tells what it was given."""

    def __init__(self) -> None:
        self.paid, self.learned = 0, []

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], dict[str, float]]:
        shaped = []
        for trajectory in trajectories:
            bonus = 1.0 if self.paid < 3 else 0.0
            self.paid += 1
            (turn,) = trajectory.turns
            shaped.append(replace(trajectory, turns=(replace(turn, bonuses={"counting": bonus}),)))
        return shaped, {"counting/paid": float(self.paid)}

    def learn(self, trajectories: Sequence[Trajectory], rng: np.random.Generator) -> dict[str, float]:
        self.learned.append(list(trajectories))
        return {"counting/draw": float(rng.random())}

    def state_dict(self) -> dict[str, Any]:
        return {"paid": self.paid}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.paid = state["paid"]


def test_a_shaper_adds_to_what_is_learned_from_and_learns_from_what_was_played(
    tiny_agent: Any, renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    shaper, agent = Counting(), tiny_agent()
    episodes = [make_episode(make_turn([2, 3], [9, 1], 0.0, 0.0), seed=seed) for seed in range(4)]
    metrics = learn(make_learner(agent, renderer, shapers={"counting": shaper}), episodes)
    # returns 1, 1, 1, 0 where all that the env paid is 0; values are 0
    assert metrics["ppo/advantage_std"] == pytest.approx((3 / 16) ** 0.5)
    assert metrics["ppo/zero_advantage"] == 0.25
    assert metrics["ppo/nothing_to_learn"] == 0
    assert metrics["counting/paid"] == 4
    assert "counting/draw" in metrics
    assert [[turn.step for one in played for turn in one.turns] for played in shaper.learned] == [
        [turn.step for one in episodes for turn in one.turns]
    ]


def test_episodes_that_an_env_broke_are_left_out(
    tiny_agent: Any, renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    good, broken = make_episode(make_turn([2], [9])), make_episode(make_turn([3], [9]), stop="env_error")
    agent, seen = tiny_agent(), []
    score = agent.score
    agent.score = lambda rows: seen.extend(rows) or score(rows)
    learn(make_learner(agent, renderer), [broken, good])
    assert [row.input_ids[0] for row in seen] == [2]
    with pytest.raises(TrainingError, match=r"none of 2 episodes is usable \(worker died\)"):
        learn(make_learner(agent, renderer), [broken, broken])


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def test_a_checkpoint_continues_bit_for_bit(tiny_agent: Any, renderer: Renderer, play: Play):
    """The schedule, the critic's warm-up, both optimizers and a shaper among it; through the file that a run writes."""

    def make(agent: Any) -> Learner:
        changes = {"epochs": 2, "minibatch_turns": 4, "value_warmup": 1, "value_epochs": 2, "weight_decay": 0.1}
        return make_learner(agent, renderer, iterations=4, shapers={"counting": Counting()}, **changes)

    def train(learner: Learner, agent: Any, iterations: range) -> list[dict[str, float]]:
        return [learn(learner, play(agent, [6] * 8, 10 + index), 20 + index) for index in iterations]

    whole = tiny_agent()
    all_metrics = train(make(whole), whole, range(4))
    half = tiny_agent()
    learner = make(half)
    assert train(learner, half, range(2)) == all_metrics[:2]
    torch.save(learner.state_dict(), file := io.BytesIO())
    file.seek(0)
    other_half = copy.deepcopy(half)
    resumed = make(other_half)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.iteration == 2
    assert train(resumed, other_half, range(2, 4)) == all_metrics[2:]
    assert all_metrics[3]["counting/paid"] == 32
    for name, tensor in whole.state_dict().items():
        assert torch.equal(other_half.state_dict()[name], tensor)
        assert not torch.equal(half.state_dict()[name], tensor)


# ---- what can't go on ------------------------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_names_its_rows(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agent = tiny_agent()
    samples = make_samples(agent, [6] * 8)
    for index in (3, 6):
        samples[index] = replace(samples[index], returns=np.full(4, np.nan, np.float32))
    with pytest.raises(TrainingError, match=r"value_loss isn't finite over 2 rows .*: lower algo\.lr ") as caught:
        run(agent, renderer, samples)
    assert sorted(re.findall(r"words/seed (\d)/turn 0", str(caught.value))) == ["3", "6"]


def test_many_bad_rows_are_counted_and_three_are_named(tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples):
    agent = tiny_agent()
    samples = [replace(sample, advantages=sample.advantages * np.inf) for sample in make_samples(agent, [6] * 5)]
    with pytest.raises(TrainingError, match=r"ppo/policy_loss isn't finite over 5 rows \(([^,]+, ){3}\.\.\.\)"):
        run(agent, renderer, samples)


def test_a_gradient_that_is_not_finite_raises_before_it_reaches_the_weights(
    tiny_agent: Any, renderer: Renderer, make_samples: MakeSamples
):
    agent = tiny_agent()
    value = agent.value
    # through sqrt at 0: finite, with an infinite slope
    agent.value = lambda states: value(states) + (agent.critic.weight.sum() * 0).sqrt()
    with pytest.raises(TrainingError, match=r"ppo/value_grad_norm isn't finite over 4 rows \(words/seed \d/turn 0, "):
        run(agent, renderer, make_samples(agent, [6] * 4))
    assert all(torch.equal(tensor, agent.born[name]) for name, tensor in agent.state_dict().items())


# ---- it learns -------------------------------------------------------------------------------------------------------
def test_ppo_solves_a_two_armed_bandit(
    tiny_agent: Any, renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    """Token 0 asks, the reply is arm 0 (pays 1 with probability 0.4) or arm 1 (0.6)."""
    agent, rng = tiny_agent(vocabulary=2), np.random.default_rng(0)
    learner = make_learner(agent, renderer, iterations=20, lr=0.03, value_lr=0.03, epochs=4, minibatch_turns=32)

    def look() -> tuple[np.ndarray, float]:
        """Log-probs of the arms and the value."""
        with torch.no_grad():
            scores = agent.score([reply_row("question", [0], [arm], ()) for arm in range(2)])
            return scores.logprobs.numpy(), agent.value(scores.states)[0].item()

    for iteration in range(20):
        logprobs, value = look()
        arms = (rng.random(64) < np.exp(logprobs[1])).astype(int)
        pays = (rng.random(64) < np.where(arms == 1, 0.6, 0.4)).astype(float)
        episodes = [
            make_episode(make_turn([0], [arm], reward, value, [logprobs[arm]]), seed=64 * iteration + index)
            for index, (arm, reward) in enumerate(zip(arms.tolist(), pays.tolist(), strict=True))
        ]
        metrics = learner.learn(episodes, len(episodes), rng)
        assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    logprobs, value = look()
    assert np.exp(logprobs[1]) > 0.95
    assert value == pytest.approx(0.6, abs=0.15)
