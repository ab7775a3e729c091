"""What must hold whatever the settings: what is trained is what was sampled, how work is cut up changes nothing, and a
run that was killed ends like one that was not."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_drill import differences

from vlm_agents.config import AlgoConfig, RunConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.envs import make_env
from vlm_agents.learn.algorithm import make_algorithm
from vlm_agents.learn.batches import Shares, microbatches
from vlm_agents.learn.credit import Gae, normalised, sampled_values
from vlm_agents.learn.learner import Learner
from vlm_agents.learn.samples import Sample, build, credited, to_targets
from vlm_agents.learn.shaping import penalised
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.policies import ModelPolicy
from vlm_agents.prompting import make_format
from vlm_agents.rollout import collect
from vlm_agents.seeds import Deal
from vlm_agents.types import Sampling, Trajectory

ComposeRun = Callable[..., RunConfig]
RunStage = Callable[..., Path]
ALGO = AlgoConfig("ppo", epochs=2, minibatch_turns=8)


def load(cfg: RunConfig) -> Agent:
    torch.manual_seed(0)  # the value head is drawn
    return load_agent(cfg.model, cfg.hardware)


def play(
    cfg: RunConfig, agent: Agent, seeds: Sequence[int], num_envs: int = 8, workers: bool = False
) -> list[Trajectory]:
    policy = ModelPolicy(HFSampler(agent), make_format(cfg.prompt), Sampling(cfg.prompt.max_reply_tokens))
    with EnvPool(partial(make_env, cfg.env), num_envs, workers) as envs:
        return list(penalised(collect(envs, policy, [Deal(seed) for seed in seeds], run_seed=0), 0.1))


# ---- what is trained is what was sampled -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["env=echo"], id="echo"),
        pytest.param(["env=echo", "prompt.history=full", "prompt=cot_json"], id="whole chat"),
        pytest.param(
            ["env=echo", "prompt.history=full", "model/train=all", "hardware.tokens_per_microbatch=400"],
            id="vision trained",
        ),
        pytest.param(["env=echo", "model.temperature=0.7", "model/lora=adapter"], id="adapter"),
        pytest.param(["env=echo", "model/temperature_head=learned", "algo.turn_entropy_coef=0.1"], id="temperature"),
        pytest.param(["env=echo", "model/lora=adapter", "algo.novelty.coef=0.1"], id="novelty"),
        pytest.param(
            ["env=minigrid", "env.id=MiniGrid-Empty-Random-5x5-v0", "env.max_steps=4", "prompt=cot_json"],
            id="minigrid",
        ),
    ],
)
def test_every_ratio_is_one_before_the_first_update(run_stage: RunStage, tmp_path: Path, words: list[str]):
    """On envs whose prompt changes each turn, and in every iteration, for the weights move in between."""
    folder = run_stage(
        tmp_path,
        *("stage=ppo", "stage.iterations=3", "stage.episodes=5", "stage.num_envs=3", "stage.eval_episodes=0"),
        *("algo.lr=1e-3", "algo.value_warmup=0", "algo.epochs=2", "prompt.max_reply_tokens=6", *words),
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-4)
        assert line["ppo/approx_kl"] > 1e-4  # the second epoch's ratios are others


def test_in_bfloat16_the_ratio_is_one_by_the_updates_own_passes(run_stage: RunStage, tmp_path: Path):
    """What was sampled, token by token over a cache, is a little off, and that is told."""
    folder = run_stage(
        tmp_path,
        *("stage=ppo", "env=echo", "prompt=cot_json", "prompt.history=full", "hardware.dtype=bfloat16"),
        *("stage.iterations=2", "stage.episodes=5", "stage.num_envs=3", "stage.eval_episodes=0", "algo.lr=1e-3"),
        *("algo.value_warmup=0", "algo.epochs=2", "prompt.max_reply_tokens=6", "model.gradient_checkpointing=true"),
        *("algo.minibatch_turns=6", "hardware.tokens_per_microbatch=400"),
    )
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        assert line["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-4)
        assert 1e-7 < line["ppo/mismatch_kl"] < 0.1


def learner_of(agent: Agent, algo: AlgoConfig, tokens: int) -> Learner:
    return Learner(agent, agent.renderer, make_algorithm(algo, 96, tempered=False), algo, 1, Shares(tokens))


def samples_of(episodes: Sequence[Trajectory], agent: Agent) -> list[Sample]:
    credit = normalised(Gae(ALGO.gamma, ALGO.gae_lambda)(episodes, sampled_values(episodes), 0.0))
    return credited(build(episodes, agent.renderer, ALGO.thought_coef), episodes, credit)


def alone(sample: Sample) -> Iterator[Sample]:
    """The turns of a sample as samples of their own. In Echo each turn brings one picture."""
    row = sample.row
    ends = np.cumsum(row.reply_lengths)
    for turn, (start, end) in enumerate(row.spans):
        tokens = slice(ends[turn] - row.reply_lengths[turn], ends[turn])
        yield replace(
            sample,
            row=replace(row, input_ids=row.input_ids[:end], images=row.images[: turn + 1], spans=((start, end),)),
            behaviour=sample.behaviour[tokens],
            old=sample.old[tokens],
            emphasis=sample.emphasis[tokens],
            advantages=sample.advantages[tokens],
            returns=sample.returns[tokens],
        )


def test_merged_rows_have_the_loss_and_gradients_of_single_ones(echo_run: ComposeRun, tmp_path: Path):
    cfg = echo_run(tmp_path, "stage=ppo", "prompt.history=full", "prompt.max_reply_tokens=6")
    agent = load(cfg)
    merged = samples_of(play(cfg, agent, range(4)), agent)
    assert [len(sample.row.spans) for sample in merged] == [3, 3, 3, 3]
    single = [part for sample in merged for part in alone(sample)]
    objective = learner_of(agent, ALGO, 10_000).objective
    with torch.no_grad():  # away from where it was sampled: ratios differ from 1, some are clipped
        for parameter in agent.parameters():
            parameter += 0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for batch in (merged, single):
        agent.zero_grad()
        rows = [sample.row for sample in batch]
        scores, targets = agent.score(rows), to_targets(batch, objective.average(rows), agent.device)
        terms = [(coef, loss(scores, targets)) for coef, loss in objective.terms]
        loss = torch.stack([coef * term.loss for coef, term in terms]).sum(0)
        (targets.weight * loss).sum().backward()
        gradients = torch.cat(
            [parameter.grad.flatten() for parameter in agent.parameters() if parameter.grad is not None]
        )
        seen = {name: values.detach() for _, term in terms for name, values in term.seen.items()}
        found.append((seen | {"loss": loss.detach(), "weight": targets.weight}, gradients))
    (seen, gradients), (other_seen, other_gradients) = found
    assert 0 < seen["clip_fraction"].mean() < 1
    assert seen.keys() == other_seen.keys() > {"policy_loss", "value_loss", "entropy", "ratio", "approx_kl"}
    for name, values in seen.items():  # token by token, in the same order
        torch.testing.assert_close(values, other_seen[name], rtol=1e-5, atol=1e-5)
    assert float((gradients - other_gradients).norm() / gradients.norm()) < 1e-5


# ---- how work is cut up changes nothing ------------------------------------------------------------------------------
def test_four_micro_batches_of_two_are_one_of_eight(echo_run: ComposeRun, tmp_path: Path):
    cfg = echo_run(tmp_path, "stage=ppo", "env.turns=2", "prompt.max_reply_tokens=6")
    episodes = play(cfg, load(cfg), range(4))
    found = []
    for in_one in (8, 2, 3):
        agent = load(cfg)
        samples = samples_of(episodes, agent)
        tokens = in_one * max(map(len, samples))
        sizes = [len(part) for part in microbatches(samples, tokens)]
        assert sizes == {8: [8], 2: [2, 2, 2, 2], 3: [3, 3, 2]}[in_one]
        learner = learner_of(agent, replace(ALGO, lr=0.1, value_lr=0.1), tokens)
        # plain descent: where a gradient is nothing but rounding, Adam would make a whole step of it all the same
        assert learner.critic is not None
        for engine in (*learner.engines.values(), learner.critic.engine):
            engine.optimizer = torch.optim.SGD(engine.parameters)  # type: ignore[assignment]
        metrics = learner._update(samples, np.random.default_rng(0))
        found.append((metrics, torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])))
    (metrics, weights), *cut = found
    start = torch.cat([parameter.detach().flatten() for parameter in load(cfg).parameters()])
    assert float((weights - start).abs().max()) > 1e-3
    for other_metrics, other_weights in cut:
        assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)  # losses are of order 1 before they cancel
        assert float((weights - other_weights).abs().max()) < 1e-6


@pytest.mark.parametrize("history", ["last_k", "full"])
def test_the_number_of_envs_changes_no_episode(echo_run: ComposeRun, tmp_path: Path, history: str):
    cfg = echo_run(tmp_path, "stage=ppo", f"prompt.history={history}", "prompt.max_reply_tokens=6")
    agent = load(cfg)
    alone, together = (play(cfg, agent, range(10), num_envs) for num_envs in (1, 8))
    for one, other in zip(alone, together, strict=True):
        assert one.seed == other.seed
        assert [turn.observation for turn in one.turns] == [turn.observation for turn in other.turns]
        for turn, same in zip(one.turns, other.turns, strict=True):
            assert turn.reply.token_ids == same.reply.token_ids
            np.testing.assert_allclose(turn.reply.logprobs, same.reply.logprobs, rtol=1e-5, atol=1e-5)
    assert len({turn.reply.token_ids for episode in alone for turn in episode.turns}) > 20


def test_worker_processes_change_nothing_at_all(echo_run: ComposeRun, tmp_path: Path):
    cfg = echo_run(tmp_path, "stage=ppo")
    agent = load(cfg)
    assert play(cfg, agent, range(5), num_envs=2, workers=True) == play(cfg, agent, range(5), num_envs=2)


# ---- a killed run ends like one that was not -------------------------------------------------------------------------
# Runs command lines in processes forked from one that has imported everything: a restart then costs no ten seconds.
# The first word says when to die: `step=n` by SIGKILL in front of the n-th step towards the disk, where a crash hurts
# most; `cpu=s` wherever it is after s seconds of work, by a signal that nothing catches, so like SIGKILL.
SERVER = """
import itertools, os, signal, sys
import vlm_agents.stages.collect, vlm_agents.stages.ppo, vlm_agents.stages.sft
from vlm_agents.__main__ import main

def die_before_step(number):
    steps = itertools.count(1)
    def counted(real):
        def step(*args, **kwargs):
            if next(steps) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return step
    for name in ("fsync", "replace", "rename", "truncate", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))

for line in sys.stdin:
    moment, *words = line.split()
    pid = os.fork()
    if not pid:
        log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        kind, number = moment.split("=")
        if kind == "step":
            die_before_step(int(number))
        else:
            signal.setitimer(signal.ITIMER_PROF, float(number))
        sys.argv = ["vlm-agents", *words]
        os._exit(main())
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
NEVER = "step=0"
KILLED = (-signal.SIGKILL, -signal.SIGPROF)


class Launcher:
    """Runs command lines in a folder; the runs are in `outputs/<name>/<stage>` there."""

    def __init__(self, folder: Path, settings: Sequence[str]) -> None:
        self.folder, self.settings = folder, settings
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, moment: str, *words: str) -> int:
        """The exit status of one command line that was to die at this moment."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(" ".join([moment, *words, *self.settings]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def unbroken(self, *words: str) -> Path:
        """The folder of a run that nobody disturbed."""
        assert self.run(NEVER, "name=a", *words) == 0, (self.folder / "log").read_text()
        return self.folder / "outputs/a" / words[0].removeprefix("stage=")

    def killed(self, moments: Sequence[str], *words: str) -> Path:
        """The folder of a run that was killed at each of these moments and started again, until it was done."""
        shutil.rmtree(self.folder / "outputs", ignore_errors=True)  # of another test
        for moment in moments:
            status = self.run(moment, "name=a", *words)
            if status == 0 and moment.startswith("cpu="):
                break  # a fast machine was done before that
            assert status in KILLED, (moment, (self.folder / "log").read_text())
        else:
            assert self.run(NEVER, "name=a", *words) == 0, (self.folder / "log").read_text()
        (self.folder / "outputs/a").rename(self.folder / "outputs/killed")  # the unbroken one has the same name
        return self.folder / "outputs/killed" / words[0].removeprefix("stage=")


@pytest.fixture(scope="module")
def launcher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    settings = ["env=echo", "prompt=action_only", "prompt.max_reply_tokens=4", "tracking=jsonl"]
    launcher = Launcher(tmp_path_factory.mktemp("lives"), [*settings, f"model.path={tiny_model}", "hardware.threads=1"])
    yield launcher
    assert launcher.server.stdin is not None
    launcher.server.stdin.close()
    assert launcher.server.wait(timeout=10) == 0


def assert_same(killed: Path, unbroken: Path) -> None:
    """Every file of the run is equal bit for bit, but for what the clock and the name say, and nothing is left over."""
    assert (unbroken / "DONE").is_file()
    assert list(differences(unbroken, killed)) == []
    assert list(killed.rglob(".*")) == []


def test_a_killed_ppo_run_ends_like_an_unbroken_one(launcher: Launcher):
    words = ["stage=ppo", "env.turns=2", "stage.iterations=4", "stage.episodes=3", "stage.eval_episodes=3"]
    # the snapshot of the settings; the first checkpoint; anywhere; an iteration's episodes or checkpoint; the end
    moments = ["step=1", "step=20", "cpu=0.9", "step=32", "step=50", "step=60"]
    assert_same(launcher.killed(moments, *words), launcher.unbroken(*words))


def test_a_killed_sft_run_ends_like_an_unbroken_one(launcher: Launcher, echo_chats: Path):
    """With checkpoints between two lines of the curves, in the second of two and a half epochs, and at the end."""
    words = ["stage=sft", f"stage.data={echo_chats}", "stage.batch_size=8", "stage.epochs=2.5"]
    words += ["stage.warmup_steps=2", "stage.checkpoint_every=4"]
    moments = ["step=22", "step=40", "cpu=0.9", "step=45"]
    assert_same(launcher.killed(moments, *words), launcher.unbroken(*words))


def test_a_killed_collect_run_ends_like_an_unbroken_one(launcher: Launcher):
    words = ["stage=collect", "stage.episodes=100", "stage.num_envs=4"]
    moments = ["step=5", "step=14", "cpu=0.5", "cpu=0.6"]
    assert_same(launcher.killed(moments, *words), launcher.unbroken(*words))


def test_a_killed_collect_run_of_a_model_ends_like_an_unbroken_one(launcher: Launcher):
    """Blocks of 4 episodes: log-probs are rounded by what is in a batch, so it must be the same one again."""
    words = ["stage=collect", "stage.policy=model", "stage.episodes=12", "stage.num_envs=1"]
    assert_same(launcher.killed(["step=20", "cpu=0.5"], *words), launcher.unbroken(*words))


def test_two_runs_that_differ_are_told_apart(launcher: Launcher):
    """What the tests above hold against each other: another seed shows, in the settings and in what was played."""
    words = ["stage=eval", "stage.policy=random", "stage.episodes=3"]
    one = launcher.unbroken(*words)
    assert launcher.run(NEVER, "name=other", "seed=1", *words) == 0
    assert launcher.run(NEVER, "name=short", *words[:-1], "stage.episodes=2") == 0
    other, short = (launcher.folder / f"outputs/{name}/eval" for name in ("other", "short"))
    # a panel is every seed's; the report names the run's own
    assert list(differences(one, other)) == ["config.yaml", "overrides", "report.html", "summary.json"]
    assert {"config.yaml", "episodes.jsonl", "metrics.jsonl", "report.html"} <= set(differences(one, short))
    (other / "DONE").unlink()
    assert "DONE" in set(differences(one, other))
