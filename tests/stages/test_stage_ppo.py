"""PPO as a stage: what a run leaves behind, what is logged when, and which weights move."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import ConfigError, DataError, TrainingError
from vlm_agents.metrics import parts
from vlm_agents.models import load_agent
from vlm_agents.outcomes import read_outcomes
from vlm_agents.prompting import make_format
from vlm_agents.run import Run
from vlm_agents.seeds import panel_seeds, training_seed
from vlm_agents.stages.learning import best_of
from vlm_agents.stages.playing import fitted
from vlm_agents.types import Observation, Parsed, Reply, Step, Turn

ComposeRun = Callable[..., RunConfig]
RunStage = Callable[..., Path]
SMALL = ("stage=ppo", "algo.epochs=2", "stage.episodes=6", "stage.num_envs=6", "stage.eval_episodes=5", "algo.epochs=2")


FAILING = """
from dataclasses import replace
def gae(*arguments): return 1 / 0
gae.reads = "turns"
def rule(algorithm, algo): return replace(algorithm, warming=None, credit=gae)
def keep(algorithm, algo): return replace(algorithm, filters=(lambda groups: None,))
def loss(scores, targets): return 1 / 0
def terms(algorithm, algo): return replace(algorithm, terms=((1.0, loss),))
"""


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(run_stage: RunStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    return run_stage(folder, *SMALL, "stage.iterations=3", "stage.eval_every=2", "stage.checkpoint_every=2")


def test_every_iteration_and_every_evaluation_is_a_line(trained: Path):
    assert [(line["step"], "eval/success" in line) for line in lines(trained)] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (3, True)
    ]  # fmt: skip
    for line in lines(trained):
        if "eval/success" not in line:
            assert line["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-4)
            # 18 turns, less than one mini-batch of 128, and two epochs; in the first iteration the critic warms up
            assert line["ppo/updates"] == (0 if line["step"] == 1 else 2)


def test_while_the_critic_warms_up_credit_is_what_really_came(run_stage: RunStage, tmp_path: Path):
    words = ("stage.iterations=2", "stage.episodes=4", "stage.eval_episodes=0", "algo.gamma=0.5", "algo.gae_lambda=0")
    folder = run_stage(tmp_path, *SMALL, *words)
    first = list(read_episodes(folder))[:4]  # all of the first iteration
    rewards = [[turn.reward for turn in episode.turns] for episode in first]
    # the critic expects nothing yet, so advantages are returns: r0 + r1 / 2 + r2 / 4, with lambda as it is r0 alone
    discounted = [sum(r / 2**k for k, r in enumerate(episode[i:])) for episode in rewards for i in range(len(episode))]
    found = next(line["ppo/advantage_std"] for line in lines(folder) if line["step"] == 1)
    assert found == pytest.approx(float(np.std(discounted)), rel=1e-5)
    assert found != pytest.approx(float(np.std(np.concatenate(rewards))), rel=1e-2)


def test_the_learning_rate_falls_as_a_cosine_over_the_iterations(trained: Path):
    rates = [line["ppo/lr"] for line in lines(trained) if "ppo/lr" in line]
    # the critic alone learns at first, then 1e-4 * (0.1 + 0.9 * 0.5 * (1 + cos(pi * t))) at t = 0, 1
    assert rates == pytest.approx([0.0, 1e-4, 0.1e-4], rel=1e-6)


def test_the_summary_has_before_and_after(trained: Path):
    metrics = summary(trained)["metrics"]
    first, last = lines(trained)[0], lines(trained)[-1]
    assert metrics["eval/success_before"] == first["eval/success"]
    assert metrics["eval/success_greedy_before"] == first["eval/success_greedy"]
    assert metrics["eval/positive_return_before"] == first["eval/positive_return"]
    assert {name: metrics[name] for name in last if name != "step"} == {n: v for n, v in last.items() if n != "step"}
    assert metrics["rollout/return"] == lines(trained)[-2]["rollout/return"]
    assert metrics["time/training"] == pytest.approx(
        sum(line[name] for line in lines(trained) for name in ("time/rollout", "time/update") if name in line)
    )


def test_each_iteration_tells_what_its_rollout_took(trained: Path):
    """What is measured apart lies within it; panels, which the same envs and sampler play, count for nothing."""
    iterations = [line for line in lines(trained) if "time/rollout" in line]
    assert len(iterations) == 3
    for line in iterations:
        parts = [line[f"time/{name}"] for name in ("env", "prefill", "decode")]
        assert min(parts) > 0
        assert sum(parts) <= line["time/rollout"]


def test_the_run_directory_is_complete(trained: Path):
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    assert (trained / "report.html").is_file()
    assert len(list((trained / "pictures").glob("*.png"))) == 3
    panel = panel_seeds("vlm_agents/Echo-v0", 5)
    kept = [(episode.policy, episode.seed) for episode in read_episodes(trained / "before")]
    assert kept == [(policy, seed) for policy in ("model", "model_greedy") for seed in panel]
    assert (trained / "model/model.safetensors").read_bytes() == (
        trained / "checkpoints/step_000003/model/model.safetensors"
    ).read_bytes()
    assert summary(trained)["artifacts"] == {
        "model": "model", "report": "report.html", "episodes": "episodes.jsonl"
    }  # fmt: skip


def test_what_came_of_each_held_out_episode_is_a_line(trained: Path):
    outcomes = read_outcomes(trained, trained=True)
    seeds = panel_seeds("vlm_agents/Echo-v0", 5)
    played = [(step, variant) for step in (0, 2, 3) for variant in ("", "_greedy")] + [(3, "_random"), (3, "_expert")]
    assert [(one.step, one.variant, one.seed) for one in outcomes] == [
        (*which, seed) for which in played for seed in seeds
    ]
    for step, variant in played:
        line = next(line for line in lines(trained) if line["step"] == step and "eval/success" in line)
        those = [one for one in outcomes if (one.step, one.variant) == (step, variant)]
        assert line[f"eval/success{variant}"] == np.mean([one.success for one in those])
        assert line[f"eval/return{variant}"] == pytest.approx(np.mean([one.total_reward for one in those]))
        assert line[f"eval/episode_length{variant}"] == np.mean([one.turns for one in those])
        assert {one.success == (one.stop == "success") for one in those} == {True}


def page(folder: Path) -> dict:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(text.split('id="block">', 1)[1].split("</script>", 1)[0])


def test_the_report_holds_the_same_seeds_before_against_after(trained: Path):
    told, metrics = page(trained), summary(trained)["metrics"]
    after, before = (f"{metrics[f'eval/success{when}']:.3f} [" for when in ("", "_before"))
    assert told["sentence"].startswith(f"Success on 5 held-out seeds of vlm_agents/Echo-v0: {before}")
    assert f" -> {after}" in told["sentence"]
    assert [(result["policy"], result["success"][0]) for result in told["results"]] == [
        ("model, sampled, before", metrics["eval/success_before"]),
        ("model, sampled, after", metrics["eval/success"]),
        ("model, greedy, before", metrics["eval/success_greedy_before"]),
        ("model, greedy, after", metrics["eval/success_greedy"]),
        ("random", metrics["eval/success_random"]),
        ("expert", 1.0),
    ]
    first, *_ = told["curves"]
    assert (first["name"], len(first["points"]), len(first["bounds"])) == ("rollout/success", 3, 3)
    assert [mark[0] for mark in first["marks"]] == [0, 2, 3]
    assert [(one["when"], one["policy"], int(one["seed"])) for one in told["episodes"]] == [
        (f"{when} training", f"model, {how}", seed)
        for when in ("after", "before")
        for how in ("sampled", "greedy")
        for seed in panel_seeds("vlm_agents/Echo-v0", 5)
    ]


def test_a_continued_run_still_shows_what_was_played_before(run_stage: RunStage, tmp_path: Path):
    words = [*SMALL, "stage.iterations=1", "stage.eval_episodes=2"]
    told = page(run_stage(tmp_path, *words))["episodes"]
    for name in ("DONE", "report.html", "summary.json"):
        (tmp_path / name).unlink()
    assert page(run_stage(tmp_path, *words))["episodes"] == told
    assert len(told) == 8  # two seeds, sampled and greedy, before and after


def test_every_metric_of_a_run_is_explained(trained: Path):
    logged = {name for line in [*lines(trained), summary(trained)["metrics"]] for name in line if name != "step"}
    assert [name for name in sorted(logged) if parts(name).metric is None] == []


def test_four_episodes_of_each_iteration_are_kept_and_none_is_of_the_panel(trained: Path):
    seeds = [episode.seed for episode in read_episodes(trained)]
    assert seeds == [training_seed(0, iteration, index) for iteration in range(3) for index in range(4)]
    assert not set(seeds) & set(panel_seeds("vlm_agents/Echo-v0", 200))


def test_the_vision_part_stays_unless_it_is_trained(trained: Path, run_stage: RunStage, tiny_model: Path, tmp_path):
    words = [*SMALL, "stage.iterations=1", "stage.eval_episodes=0"]
    thawed = run_stage(tmp_path, *words, "model/train=all")
    start = load_file(tiny_model / "model.safetensors")
    for folder, vision_moves in ((trained, False), (thawed, True)):
        end = load_file(folder / "model/model.safetensors")
        moved = {name: not torch.equal(end[name], start[name]) for name in start}
        assert all(moved[name] for name in moved if name.startswith("model.layers") and name.endswith("proj.weight"))
        assert {moved[name] for name in moved if name.startswith("visual.") and name.endswith("weight")} == {
            vision_moves
        }


def test_without_a_panel_nothing_is_evaluated(run_stage: RunStage, tmp_path: Path):
    folder = run_stage(tmp_path, *SMALL, "stage.iterations=1", "stage.eval_episodes=0")
    assert not any(name.startswith("eval/") for line in lines(folder) for name in line)
    assert not any(name.startswith("eval/") for name in summary(folder)["metrics"])
    assert (folder / "report.html").is_file()


def test_why_an_iteration_moved_nothing_is_told(run_stage: RunStage, tmp_path: Path, capsys):
    words = ("stage=ppo", "stage.episodes=4", "stage.iterations=2", "stage.eval_episodes=0", "env.turns=1")
    run_stage(tmp_path / "warm", *words, "stage.env_steps=1")
    told = capsys.readouterr().err
    assert "the critic alone learns" in told
    assert "stage.env_steps=1 were played while the critic learned alone: the policy is what it was" in told
    # untrained, no reply is legal, and all plays of a start come to the same
    run_stage(tmp_path / "alike", *words, "algo=grpo", "algo.group_size=2", "algo.filters=[outcome]")
    told = capsys.readouterr().err
    assert told.count("algo.filters kept nothing") == 2
    assert "the critic" not in told


def test_a_part_of_ones_own_that_fails_is_one_line(run_stage: RunStage, tmp_path: Path, monkeypatch):
    (tmp_path / "failing_of_a_test.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("stage=ppo", "stage.episodes=2", "stage.iterations=1", "stage.eval_episodes=0", "env.turns=1")
    for name, place in (
        ("rule", r" \(.*failing_of_a_test.py, line 3\)"),
        ("keep", ""),
        ("terms", r" \(.*failing_of_a_test.py, line 7\)"),
    ):
        factory = f"algo.factory=failing_of_a_test:{name}"
        with pytest.raises(
            TrainingError, match=rf"^{factory}: training with what it gives fails: [^()]*{place}.* See docs"
        ):
            run_stage(tmp_path / name, *words, factory)


def test_an_adapter_is_trained_towards_the_reward_and_held_to_its_base(run_stage: RunStage, tmp_path: Path):
    words = [*SMALL, "stage.iterations=2", "stage.eval_episodes=0", "model/lora=adapter", "model.lora.rank=2"]
    folder = run_stage(tmp_path / "moves", *words, "algo.kl_coef=0.1", "algo.lr=1e-3", "algo.value_warmup=0")
    assert (folder / "model/adapter_config.json").is_file()
    assert not (folder / "model/model.safetensors").exists()
    # a fresh adapter is its base: nothing apart in the first pass over the rows, but in the second
    assert all(line["ppo/kl_reference"] > 1e-4 for line in lines(folder))
    still = run_stage(tmp_path / "still", *words, "algo.kl_coef=0.1", "algo.lr=0")
    assert all(abs(line["ppo/kl_reference"]) < 1e-9 for line in lines(still))


def test_a_reference_that_is_not_the_start_is_refused(run_stage: RunStage, tmp_path: Path):
    """An adapter to go on from: switched off, it leaves a policy from before it."""
    words = ("stage=ppo", "stage.iterations=1", "stage.episodes=2", "stage.eval_episodes=0", "model/lora=adapter")
    first = run_stage(tmp_path / "first", *words)
    for coef in ("algo.kl_coef", "algo.kl_reward_coef"):
        with pytest.raises(ConfigError, match=rf"stage.init=.*first is an adapter .*: merge it .*, or set {coef}=0"):
            run_stage(tmp_path / "second", *words, f"stage.init={first}", f"{coef}=0.1")


def test_the_next_stage_starts_from_the_weights_that_are_left(trained: Path, run_stage: RunStage, tmp_path: Path):
    """A learning rate of 0 and the same panel: what was measured after is what is measured before."""
    again = run_stage(tmp_path, *SMALL, "stage.iterations=1", f"stage.init={trained}", "algo.lr=0", "algo.value_lr=0")
    then, now = lines(trained)[-1], lines(again)[0]
    beside = {name for name in then if name.endswith(("_random", "_expert"))} - set(now)  # played in the end alone
    assert then.keys() - beside == now.keys()
    assert {name: now[name] for name in now if name != "step"} == {name: then[name] for name in now if name != "step"}
    end, start = (load_file(folder / "model/model.safetensors") for folder in (again, trained))
    assert all(torch.equal(end[name], start[name]) for name in start)


@pytest.mark.parametrize(
    "stage",
    [
        ("ppo", "stage.iterations=1", "stage.eval_episodes=0"),
        ("collect", "stage.policy=model", "stage.noise=0"),
        ("eval", "stage.baselines=false"),
    ],
    ids=["ppo", "collect", "eval"],
)
def test_a_chat_stays_within_its_budget(run_stage: RunStage, tmp_path: Path, stage: tuple[str, ...]):
    """Wherever a model plays."""
    words = [f"stage={stage[0]}", *stage[1:], "stage.episodes=4", "stage.num_envs=4", "env.turns=4"]
    folder = run_stage(tmp_path, *words, "prompt.history=full", "prompt.max_prompt_tokens=120")
    if stage[0] == "ppo":
        assert lines(folder)[0]["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-4)
    for episode in read_episodes(folder):
        kept = [sum(message.role == "user" for message in turn.prompt) for turn in episode.turns]
        assert max(len(turn.reply.prompt_token_ids) for turn in episode.turns) <= 120
        assert kept[:2] == [1, 2]
        assert kept[-1] < 4
        assert all(turn.prompt[0].role == "system" for turn in episode.turns)


def test_a_budget_that_holds_no_first_prompt_is_told_before_anything_is_left(run_stage: RunStage, tmp_path: Path):
    words = [*SMALL, "stage.iterations=1", "stage.eval_episodes=0", "prompt.max_prompt_tokens=20"]
    with pytest.raises(DataError, match=r"are a prompt of \d+ tokens with its 1 pictures: raise prompt.max_p"):
        run_stage(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "stage", [(*SMALL, "stage.iterations=1", "stage.eval_episodes=0"), ("stage=eval", "stage.episodes=1")]
)
def test_prompt_and_reply_stay_within_the_models_positions(run_stage: RunStage, tmp_path: Path, stage: tuple[str, ...]):
    """The tiny model has 4096."""
    words = ["prompt.max_prompt_tokens=4090", "prompt.max_reply_tokens=7"]
    with pytest.raises(ConfigError, match=r"^prompt.max_prompt_tokens=4090 and prompt.max_reply_tokens=7: .* 4097 "):
        run_stage(tmp_path / "both", *stage, *words)
    with pytest.raises(ConfigError, match=r"^prompt.max_reply_tokens=4096: that is 4097 tokens"):
        run_stage(tmp_path / "reply", *stage, "prompt.max_reply_tokens=4096")


def test_by_default_a_chat_is_cut_to_the_models_positions(echo_run: ComposeRun, tmp_path: Path):
    """Turns of 1500 tokens and more: of the tiny model's 4096 positions two fit, and one beside a longer reply."""
    cfg = echo_run(tmp_path, "stage=eval", "prompt.history=full")
    agent = load_agent(cfg.model, cfg.hardware)
    seen = Observation("go " * 1500)
    turn = Turn(seen, (), Reply("red"), Parsed("red"), Step(seen, 0.0, False, False, False, True, True))
    for reply, kept in ((4, 2), (2000, 1)):
        cfg = echo_run(tmp_path, "stage=eval", "prompt.history=full", f"prompt.max_reply_tokens={reply}")
        prompt = fitted(cfg, make_format(cfg.prompt), agent.renderer).prompt("Play.", [turn] * 3, seen)
        assert len(agent.renderer.render(prompt).ids) <= 4096 - reply
        assert sum(message.role == "user" for message in prompt) == kept
    short = replace(cfg, prompt=replace(cfg.prompt, max_reply_tokens=4))
    prompt_format = fitted(short, make_format(cfg.prompt), agent.renderer)
    with pytest.raises(DataError, match=r"its reply takes 4, and the model has positions for 4096 in all: show fewer"):
        prompt_format.prompt("Play.", (), Observation("go " * 4096))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_tells_its_peaks(run_stage: RunStage, tmp_path: Path):
    on_gpu = ("hardware=gpu", "hardware.dtype=float32", "stage.iterations=1", "stage.eval_episodes=0")
    metrics = summary(run_stage(tmp_path, *SMALL, *on_gpu))["metrics"]
    weights = (tmp_path / "model/model.safetensors").stat().st_size
    assert metrics["memory/rollout_bytes"] > weights
    assert metrics["memory/update_bytes"] > 2 * weights  # gradients and two moments of the text part come on top


def test_the_checkpoint_whose_weights_played_best_is_kept_too(echo_run: ComposeRun, tmp_path: Path):
    cfg = echo_run(tmp_path / "ppo", *SMALL, "stage.keep_best=true")
    assert isinstance(cfg.stage, PpoConfig)
    best = None
    with Run.open(cfg, []) as run:
        for step, success in enumerate((0.2, 0.6, 0.6, 0.1)):  # of an iteration that this checkpoint's weights play
            run.save_checkpoint(step, lambda _: None, {}, keep=1, best=best[0] if best else None)
            best = best_of(run, cfg.stage, best, step, success)
        assert best_of(run, cfg.stage, best, 9, 1.0) == best == (1, 0.6)  # there is no checkpoint 9
        assert best_of(run, replace(cfg.stage, keep_best=False), None, 3, 1.0) is None
        run.save_checkpoint(4, lambda _: None, {}, keep=1, best=1)
        assert {path.name for path in (run.dir / "checkpoints").iterdir()} == {"step_000001", "step_000004"}
        assert run.restore() is not None
        assert (run.dir / "checkpoints/step_000001").is_dir()
