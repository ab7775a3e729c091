"""Every conf/algo/*.yaml, from episodes to its first gradient, against its paper's loss in plain loops.

A textbook here reads what was played, and what the model says of one reply at a time. It uses nothing of `learn`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_agents.config import AlgoConfig, RunConfig, conf_dir
from vlm_agents.learn.algorithm import make_algorithm
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.learner import Learner
from vlm_agents.stages.learning import make_learner
from vlm_agents.tensors import Renderer, reply_row
from vlm_agents.types import Parsed, Stop, Trajectory, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Trajectory]
Table = dict[int, float]  # of each play, by its place
LIMIT = 12  # tokens of a reply


@dataclass
class Said:
    """A turn: so many tokens of thought, what it earned, what a critic expected, and where it was said."""

    thoughts: int
    reward: float
    value: float
    place: str
    prompt: list[int] = field(default_factory=list)
    reply: list[int] = field(default_factory=list)
    old: Tensor = field(default_factory=lambda: torch.zeros(0))  # [L] log-probs when it was sampled
    new: Tensor = field(default_factory=lambda: torch.zeros(0))  # [L] log-probs now
    values: Tensor = field(default_factory=lambda: torch.zeros(0))  # [L] of the critic now, before each token
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0))  # [L] now

    @property
    def emphasis(self) -> Tensor:
        """{"t":" then thoughts, then ","a":" go "} and the end: thoughts weigh 0.2."""
        return torch.tensor([1.0] + [0.2] * self.thoughts + [1.0] * 4).double()


@dataclass
class Play:
    seed: int
    turns: list[Said]
    stop: Stop = "success"
    bootstrap: float = 0.0

    @property
    def rewards(self) -> list[float]:
        return [said.reward for said in self.turns]


def plays() -> list[Play]:
    """Four starts, their members mixed up; replies of 5 to 12 tokens.

    Start 1 came to 0.5 whatever was played; start 2 has the largest spread, and a member that broke; start 3 has one
    that is small. Places a and b are met by several members of a start, or twice by one.
    """
    return [
        Play(0, [Said(0, 0.0, 0.1, "a"), Said(2, 1.0, 0.4, "b")]),
        Play(1, [Said(1, 0.5, 0.3, "a")]),
        Play(2, [Said(3, 0.0, 0.2, "a"), Said(1, 0.0, -0.1, "a"), Said(2, 2.0, 0.7, "c")]),
        Play(0, [Said(4, -0.1, 0.2, "a"), Said(0, 0.0, 0.1, "d")], "time_limit", bootstrap=0.6),
        Play(3, [Said(2, 0.2, 0.3, "a")]),
        Play(2, [Said(7, -1.0, 0.0, "a")], "failure"),
        Play(1, [Said(2, 0.0, 0.2, "a"), Said(0, 0.5, 0.4, "b")]),
        Play(2, [Said(1, -0.1, 0.5, "a"), Said(6, -0.1, 0.2, "b")], "invalid"),
        Play(3, [Said(0, 0.0, 0.1, "a"), Said(3, 0.1, 0.3, "b")]),
        Play(0, [Said(1, 0.0, 0.3, "a"), Said(2, 0.3, 0.2, "b"), Said(5, 0.4, 0.1, "b")]),
    ]


def play_out(agent: Any, chained: bool) -> list[Play]:
    """With tokens: each prompt holds all before it, or is its own. Sampled by a policy a little off the agent's, so
    that ratios fall in and out of every clip range."""
    rng, played = np.random.default_rng(5), plays()
    for number, play in enumerate(played):
        before: list[int] = []
        for said in play.turns:
            said.prompt = [*before, *rng.integers(2, 12, 2).tolist()]
            said.reply = [5, *rng.integers(9, 12, said.thoughts).tolist(), 6, 2, 7, 1]
            before = [*said.prompt, *said.reply] if chained else []
            scores = agent.score([reply_row("now", said.prompt, said.reply, ())])
            said.new, said.values = scores.logprobs, agent.value(scores.states)
            off = 1e-4 if number % 4 == 0 else 0.4
            said.entropy = scores.entropy
            said.old = said.new.detach() + torch.from_numpy(off * rng.normal(size=len(said.reply)))
            if play.stop == "failure":
                said.old[2] -= 1.5  # a ratio of more than 3, of a bad reply
    return played


def recorded(played: Sequence[Play], make_turn: MakeTurn, make_episode: MakeEpisode) -> list[Trajectory]:
    episodes = []
    for play in played:
        turns = []
        for said in play.turns:
            turn = make_turn(said.prompt, said.reply, said.reward, said.value, said.old.tolist())
            end = 6 + said.thoughts  # of the thought, after {"t":" ; the action stands after 7 more of ","a":"
            parsed = Parsed("go", thought_span=(6, end), action_span=(end + 7, end + 9))
            turns.append(replace(turn, parsed=parsed, observation=replace(turn.observation, state_key=said.place)))
        episodes.append(make_episode(*turns, seed=play.seed, stop=play.stop, bootstrap=play.bootstrap))
    return episodes


# ---- what the papers share -------------------------------------------------------------------------------------------
def discounted(rewards: Sequence[float], gamma: float) -> float:
    return sum(gamma**later * reward for later, reward in enumerate(rewards))


def by_gae(play: Play, gamma: float, lam: float) -> list[float]:
    """Sum over l of (gamma lam)^l times the surprise of turn t + l; what follows the last is the bootstrap."""
    values = [said.value for said in play.turns] + [play.bootstrap]
    surprises = [said.reward + gamma * values[t + 1] - values[t] for t, said in enumerate(play.turns)]
    return [discounted(surprises[t:], gamma * lam) for t in range(len(surprises))]


def standardised(numbers: Sequence[Sequence[float]]) -> list[list[float]]:
    every = [number for some in numbers for number in some]
    return [[(number - fmean(every)) / pstdev(every) for number in some] for some in numbers]


def group_of(played: Sequence[Play], place: int) -> list[int]:
    return [other for other, play in enumerate(played) if play.seed == played[place].seed]


def in_group(played: Sequence[Play], gamma: float, std: bool) -> Table:
    """(R - mean) / std of the group, or R - mean; 0 where the group is constant."""
    returns, found = [discounted(play.rewards, gamma) for play in played], {}
    for place in range(len(played)):
        others = [returns[other] for other in group_of(played, place)]
        spread = pstdev(others)
        found[place] = 0.0 if spread < 1e-9 else (returns[place] - fmean(others)) / (spread if std else 1)
    return found


def clip(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A)."""
    bounded = max(1 - low, min(1 + high, ratio.item()))
    other = ratio.new_tensor(bounded) if bounded != ratio.item() else ratio
    return ratio * advantage if ratio.item() * advantage <= other.item() * advantage else other * advantage


def of_tokens(said: Said, advantages: Sequence[float], low: float = 0.2, high: float = 0.2) -> list[Tensor]:
    """A token's clipped objective each."""
    ratios = [torch.exp(new - old) for new, old in zip(said.new, said.old, strict=True)]
    return [clip(ratio, one, low, high) for ratio, one in zip(ratios, advantages, strict=True)]


def of_group(
    played: Sequence[Play], advantages: Table, low: float = 0.2, high: float = 0.2
) -> list[list[list[Tensor]]]:
    """The same with one advantage an episode, of the plays that have any: play, turn, token."""
    return [
        [of_tokens(said, [advantages[place]] * len(said.reply), low, high) for said in play.turns]
        for place, play in enumerate(played)
        if place in advantages
    ]


def mean(numbers: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(numbers)).sum() / len(numbers)


def over_tokens(objectives: Sequence[Sequence[Sequence[Tensor]]]) -> Tensor:
    return mean([token for play in objectives for turn in play for token in turn])


def over_sequences(objectives: Sequence[Sequence[Sequence[Tensor]]], chained: bool, budget: int | None) -> Tensor:
    """1/N sum_i 1/|o_i| sum_t, or 1/budget; a sequence is an episode if it was one chat, else a turn."""
    if chained:
        sequences = [[token for turn in play for token in turn] for play in objectives]
    else:
        sequences = [list(turn) for play in objectives for turn in play]
    return mean([torch.stack(tokens).sum() / (budget or len(tokens)) for tokens in sequences])


def turns_value(played: Sequence[Play], returns: Sequence[Sequence[float]]) -> Tensor:
    """1/2 * 1/2 (V - R)^2 before each turn."""
    pairs = [
        (said, worth)
        for play, some in zip(played, returns, strict=True)
        for said, worth in zip(play.turns, some, strict=True)
    ]
    return 0.5 * mean([0.5 * (said.values[0] - worth) ** 2 for said, worth in pairs])


def returns_of(played: Sequence[Play], advantages: Sequence[Sequence[float]]) -> list[list[float]]:
    return [
        [one + said.value for one, said in zip(some, play.turns, strict=True)]
        for play, some in zip(played, advantages, strict=True)
    ]


# ---- the algorithms --------------------------------------------------------------------------------------------------
def ppo(played: list[Play], chained: bool) -> Tensor:
    """Turns: one ratio, of which a thought's tokens count 0.2 (RL4VLM, arXiv 2405.10292)."""
    raw = [by_gae(play, 0.98, 0.95) for play in played]
    found = []
    for play, advantages in zip(played, standardised(raw), strict=True):
        for said, advantage in zip(play.turns, advantages, strict=True):
            ratio = torch.exp((said.emphasis * said.new).sum() - (said.emphasis * said.old).sum())
            found.append(-clip(ratio, advantage, 0.2, 0.2))
    return mean(found) + turns_value(played, returns_of(played, raw))


def vl_dac(played: list[Play], chained: bool) -> Tensor:
    """A turn's advantage for each of its tokens' ratios; the mean over tokens within a turn, then over turns, as the
    authors' code has it."""
    raw = [by_gae(play, 0.98, 0.95) for play in played]
    found = [
        -mean(of_tokens(said, [advantage] * len(said.reply)))
        for play, advantages in zip(played, standardised(raw), strict=True)
        for said, advantage in zip(play.turns, advantages, strict=True)
    ]
    return mean(found) + turns_value(played, returns_of(played, raw))


def by_token(played: list[Play], worth: Callable[[Play, int], float]) -> Tensor:
    """Tokens' PPO, of advantages `worth` of the turn minus the value before the token."""
    raw, errors = [], []
    for play in played:
        returns = [worth(play, t) for t in range(len(play.turns))]
        raw.append([r - value for said, r in zip(play.turns, returns, strict=True) for value in said.values.tolist()])
        errors += [
            (value - r) ** 2 for said, r in zip(play.turns, returns, strict=True) for value in said.values.unbind()
        ]
    objectives = []
    for play, advantages in zip(played, standardised(raw), strict=True):
        for said in play.turns:
            now, advantages = advantages[: len(said.reply)], advantages[len(said.reply) :]
            objectives += of_tokens(said, now)
    return -mean(objectives) + 0.5 * 0.5 * mean(errors)


def ppo_token(played: list[Play], chained: bool) -> Tensor:
    """Discount and lambda of tokens are 1: what is earned from the turn on, and the bootstrap, discounted by turn."""
    return by_token(played, lambda play, t: discounted([*play.rewards[t:], play.bootstrap], 0.98))


def bilevel_ppo(played: list[Play], chained: bool) -> Tensor:
    """Over turns by the value before a turn's first token; within one, by discount and lambda of 1, its return."""

    def worth(play: Play, t: int) -> float:
        seen = Play(play.seed, [replace(said, value=said.values[0].item()) for said in play.turns])
        seen.bootstrap = play.bootstrap
        return by_gae(seen, 0.98, 0.95)[t] + seen.turns[t].value

    return by_token(played, worth)


def reinforce(played: list[Play], chained: bool) -> Tensor:
    returns = [[discounted(play.rewards[t:], 0.98) for t in range(len(play.turns))] for play in played]
    pairs = zip(played, standardised(returns), strict=True)
    return -mean([said.new.sum() * one for play, some in pairs for said, one in zip(play.turns, some, strict=True)])


def rlef(played: list[Play], chained: bool) -> Tensor:
    """exp(A), at most 10, of returns minus values."""
    raw = [by_gae(play, 0.98, 1.0) for play in played]
    pairs = zip(played, standardised(raw), strict=True)
    found = [
        -min(10.0, math.exp(one)) * said.new.sum()
        for play, some in pairs
        for said, one in zip(play.turns, some, strict=True)
    ]
    return mean(found) + turns_value(played, returns_of(played, raw))


def rloo(played: list[Play], chained: bool) -> Tensor:
    returns, found = [discounted(play.rewards, 1.0) for play in played], []
    for place, play in enumerate(played):
        others = [returns[other] for other in group_of(played, place) if other != place]
        found += [-(returns[place] - fmean(others)) * said.new.sum() for said in play.turns]
    return mean(found)


def grpo(played: list[Play], chained: bool) -> Tensor:
    return -over_sequences(of_group(played, in_group(played, 1.0, std=True)), chained, None)


def dr_grpo(played: list[Play], chained: bool) -> Tensor:
    return -over_sequences(of_group(played, in_group(played, 1.0, std=False)), chained, LIMIT)


def gspo(played: list[Play], chained: bool) -> Tensor:
    """The ratio of a whole episode, the geometric mean of its tokens'."""
    advantages, found = in_group(played, 1.0, std=True), []
    for place, play in enumerate(played):
        drifts = [new - old for said in play.turns for new, old in zip(said.new, said.old, strict=True)]
        found.append(-clip(torch.exp(mean(drifts)), advantages[place], 3e-4, 4e-4))
    return mean(found)


def cispo(played: list[Play], chained: bool) -> Tensor:
    """stop-gradient(min(r, 1.28)) A log p."""
    advantages, found = in_group(played, 1.0, std=True), []
    for place, play in enumerate(played):
        for said in play.turns:
            for new, old in zip(said.new, said.old, strict=True):
                found.append(-min(1.28, math.exp(new.item() - old.item())) * advantages[place] * new)
    return mean(found)


def dapo(played: list[Play], chained: bool) -> Tensor:
    """Start 1 is dropped for its outcomes, though the overlong penalty, over the last 2.4 tokens of 12, might tell its
    members apart; that of 11 and 12 tokens is paid."""
    for play in played:
        for said in play.turns:
            said.reward -= min(1.0, max(0.0, (len(said.reply) - 9.6) / 2.4))
    kept = {place: one for place, one in in_group(played, 1.0, std=True).items() if played[place].seed != 1}
    return -over_tokens(of_group(played, kept, 0.2, 0.28))


def gigpo(played: list[Play], chained: bool) -> Tensor:
    """The episode's whole return R(tau) within its group, plus each step's discounted one within its anchor's."""
    whole = in_group(played, 1.0, std=False)
    steps: dict[tuple[int, str], list[float]] = {}
    for play in played:
        for t, said in enumerate(play.turns):
            steps.setdefault((play.seed, said.place), []).append(discounted(play.rewards[t:], 0.95))
    found = []
    for place, play in enumerate(played):
        for t, said in enumerate(play.turns):
            step = discounted(play.rewards[t:], 0.95) - fmean(steps[play.seed, said.place])
            found += of_tokens(said, [whole[place] + step] * len(said.reply))
    return -mean(found)


def oversample_rank(played: list[Play], chained: bool) -> Tensor:
    """Five are wanted. Start 1 has no spread. Then come 2, of which one broke, and 0, which makes five; 3 is left out.
    Advantages are those among all that were played; a bad token's ratio counts up to 3."""
    kept = {
        place: one
        for place, one in in_group(played, 1.0, std=False).items()
        if played[place].seed in (2, 0) and played[place].stop != "invalid"
    }
    found = []
    for place, advantage in kept.items():
        for said in played[place].turns:
            for one in of_tokens(said, [advantage] * len(said.reply)):
                found.append(one if advantage > 0 or one.item() > 3 * advantage else one.new_tensor(3 * advantage))
    return -mean(found)


TEXTBOOKS: dict[str, Callable[[list[Play], bool], Tensor]] = {
    function.__name__: function
    for function in (
        bilevel_ppo,
        cispo,
        dapo,
        dr_grpo,
        gigpo,
        grpo,
        gspo,
        oversample_rank,
        ppo,
        ppo_token,
        reinforce,
        rlef,
        rloo,
        vl_dac,
    )
}
WANTED = {"oversample_rank": 5}
VALUED = ("ppo", "ppo_token", "vl_dac", "bilevel_ppo", "rlef")


def test_every_algorithm_has_its_textbook() -> None:
    assert sorted(TEXTBOOKS) == sorted(path.stem for path in (conf_dir() / "algo").glob("*.yaml"))


def gradients(agent: Any) -> dict[str, Tensor]:
    return {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in agent.named_parameters()}


@pytest.mark.parametrize("chained", [True, False], ids=["one chat", "a chat a turn"])
@pytest.mark.parametrize("name", TEXTBOOKS)
def test_from_episodes_to_the_first_gradient(
    compose_run: Callable[..., RunConfig],
    tiny_agent: Any,
    renderer: Renderer,
    make_turn: MakeTurn,
    make_episode: MakeEpisode,
    name: str,
    chained: bool,
):
    if name == "gspo" and not chained:
        pytest.skip("refused: turns share no row")
    words = ["prompt.history=full"] if chained else []
    words += [f"prompt.max_reply_tokens={LIMIT}", f"algo={name}", "algo.minibatch_turns=1000"]
    words += ["algo.max_grad_norm=inf", "algo.max_mismatch_kl=null"]  # sampled elsewhere on purpose
    words += ["algo.value_warmup=0", "algo.value_epochs=0"] if name in VALUED else []
    cfg = compose_run("stage=ppo", *words)
    assert cfg.algo is not None

    book = tiny_agent().double()
    TEXTBOOKS[name](play_out(book, chained), chained).backward()
    expected = gradients(book)
    assert expected["policy.weight"].norm() > 1e-3
    assert (expected["critic.weight"].norm() > 1e-3) == (name in VALUED)

    agent = tiny_agent().double()
    agent.renderer = renderer
    learner = make_learner(cfg, cfg.algo, agent, None, iterations=10)
    episodes, _ = learner.shape(recorded(play_out(agent, chained), make_turn, make_episode))
    metrics = learner.learn(episodes, WANTED.get(name, len(episodes)), np.random.default_rng(0))
    assert metrics["ppo/updates"] == 1
    assert_moved_along(expected, agent, learner)


@pytest.mark.parametrize(("correction", "kl"), [("truncate", "k2"), ("mask", "k3")])
def test_the_terms_beside_the_surrogate_and_the_correction_of_it(
    tiny_agent: Any, renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode, correction: Any, kl: str
):
    """REINFORCE, the turn's ratio of old to behaviour probability before it, the KL to a reference, and entropy."""

    def moved() -> Any:
        agent = tiny_agent().double()
        torch.manual_seed(1)
        with torch.no_grad():
            agent.policy.bias.add_(0.5 * torch.randn(12).double())
        return agent

    book, born, found = moved(), tiny_agent().double(), []
    for play in play_out(book, chained=False):
        for t, said in enumerate(play.turns):
            now = said.new.detach()  # the model's own are old, of a model that isn't exact
            off = math.exp((now - said.old).sum().item())
            weight = min(off, 1.5) if correction == "truncate" else off * (1 / 1.5 <= off <= 1.5)
            loss = -weight * discounted(play.rewards[t:], 0.9) * said.new.sum()
            reference = born.score([reply_row("born", said.prompt, said.reply, ())]).logprobs.detach()
            ratio = reference - said.new
            penalty = ratio**2 / 2 if kl == "k2" else torch.exp(ratio) - 1 - ratio
            found.append(loss + 0.3 * penalty.mean() - 0.2 * said.entropy.mean())
    mean(found).backward()

    settings = {"credit": "returns", "surrogate": "reinforce", "gamma": 0.9, "normalise": False, "thought_coef": 1.0}
    settings |= {"correction": correction, "correction_bound": 1.5, "kl": kl, "kl_coef": 0.3, "entropy_coef": 0.2}
    settings |= {"minibatch_turns": 1000, "max_grad_norm": math.inf, "max_mismatch_kl": None}
    algo, agent = AlgoConfig(name="test", **settings), moved()
    agent.exact = False
    learner = Learner(agent, renderer, make_algorithm(algo, LIMIT, tempered=False), algo, 10, Shares(1000))
    episodes = recorded(play_out(agent, chained=False), make_turn, make_episode)
    metrics = learner.learn(episodes, len(episodes), np.random.default_rng(0))
    assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["ppo/mismatch_kl"] > 0.01
    assert_moved_along(gradients(book), agent, learner)


def assert_moved_along(expected: dict[str, Tensor], agent: Any, learner: Learner) -> None:
    """Adam's first mean is a tenth of the gradient."""
    engines = [*learner.engines.values(), *([learner.critic.engine] if learner.critic else [])]
    moved = {one: state["exp_avg"] * 10 for engine in engines for one, state in engine.optimizer.state.items()}
    for name, parameter in agent.named_parameters():
        found = moved.get(parameter, torch.zeros_like(parameter))
        # log-probs, advantages and weights are fp32 on their way
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=2e-6)
