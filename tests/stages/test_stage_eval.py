"""Evaluation: the panel, the intervals, the baselines, and what a reader finds in the folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm_agents.episodes import read_episodes
from vlm_agents.errors import VlmAgentsError
from vlm_agents.metrics import parts
from vlm_agents.seeds import panel_seeds
from vlm_agents.stages.playing import wilson_interval

RunStage = Callable[..., Path]
SMALL = ("stage=eval", "stage.episodes=30", "stage.num_envs=16")


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def played(run_stage: RunStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage(tmp_path_factory.mktemp("eval"), *SMALL)


def test_the_panel_is_fixed_and_apart_from_what_is_trained_on(played: Path, echo_episodes: Path):
    seeds = [episode.seed for episode in read_episodes(played)]
    assert seeds == panel_seeds("vlm_agents/Echo-v0", 30)
    assert min(seeds) >= 2**30 > max(episode.seed for episode in read_episodes(echo_episodes))


def test_the_run_seed_changes_nothing(run_stage: RunStage, played: Path, tmp_path: Path):
    other = run_stage(tmp_path, *SMALL, "seed=5", "stage.num_envs=30")
    assert [episode.seed for episode in read_episodes(other)] == [episode.seed for episode in read_episodes(played)]
    before, after = (
        [turn.reply.token_ids for episode in read_episodes(folder) for turn in episode.turns]
        for folder in (played, other)
    )
    assert before == after


def test_model_greedy_random_and_expert_play_the_same_panel(played: Path):
    metrics = summary(played)["metrics"]
    for variant in ("", "_greedy", "_random", "_expert"):
        for name in ("success", "success_low", "success_high", "return", "episode_length", "loop_rate", "invalid_rate"):
            assert f"eval/{name}{variant}" in metrics
        for share in ("success", "positive_return"):
            low, high = wilson_interval(round(metrics[f"eval/{share}{variant}"] * 30), 30)
            assert (metrics[f"eval/{share}_low{variant}"], metrics[f"eval/{share}_high{variant}"]) == (low, high)
    assert metrics["eval/success_expert"] == metrics["eval/return_expert"] == 1.0
    assert metrics["eval/steps_over_expert_expert"] == 1.0
    # chance names one of four colours: 90 turns, mean return 1/4, standard deviation sqrt(3/16 / 90) = 0.046
    assert abs(metrics["eval/return_random"] - 0.25) < 4 * 0.046
    # the model of random weights says nothing legal: 3 turns at -0.1
    assert metrics["eval/return"] == pytest.approx(-0.3)
    assert metrics["eval/positive_return"] == 0.0 < metrics["eval/positive_return_random"] < 1.0
    assert metrics["eval/positive_return_expert"] == 1.0
    episodes = list(read_episodes(played))
    assert metrics["eval/success"] == sum(episode.success for episode in episodes) / 30
    (line,) = (played / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, **metrics}


def test_what_the_folder_holds(played: Path):
    page = (played / "report.html").read_text()
    assert "eval: vlm_agents/Echo-v0" in page
    for policy in ("model, sampled", "model, greedy", "random", "expert"):
        assert policy in page
    with Image.open(played / "episode.gif") as gif:
        assert getattr(gif, "n_frames", 1) >= 3
    found = summary(played)
    assert found.pop("wall_seconds") > 0
    assert found.pop("metrics")
    assert found.pop("weights").startswith("the model's own: /")
    assert found == {
        "stage": "eval",
        "env": "vlm_agents/Echo-v0",
        "model": "tiny",
        "differs": [],
        "algo": None,
        "seed": 0,
        "artifacts": {"report": "report.html", "episodes": "episodes.jsonl"},
    }
    assert (played / "DONE").is_file()


def test_the_report_shows_sampled_and_greedy_episodes(played: Path):
    told = json.loads((played / "report.html").read_text().split('id="block">', 1)[1].split("</script>", 1)[0])
    seeds = panel_seeds("vlm_agents/Echo-v0", 30)
    for policy in ("model, sampled", "model, greedy"):  # the first twelve, and four failures behind them
        assert [int(one["seed"]) for one in told["episodes"] if one["policy"] == policy] == seeds[:16]
    models = [one for one in told["episodes"] if one["policy"] != "expert"]
    assert {one["strayed"] for one in models} == {0}  # no reply of this model is legal
    experts = [int(one["seed"]) for one in told["episodes"] if one["policy"] == "expert"]
    assert experts == seeds[:16]  # how each of them would have been done
    chance, expert = (next(row for row in told["results"] if row["policy"] == name) for name in ("random", "expert"))
    none = dict.fromkeys(("success", "failure", "invalid", "too_long", "time_limit", "env_error", "unscored"), 0)
    assert told["results"][0]["ends"] == none | {"invalid": 30}
    assert expert["ends"] == none | {"success": 30}
    assert sum(chance["ends"].values()) == 30
    assert [name for name in summary(played)["metrics"] if parts(name).metric is None] == []


def test_an_interrupted_evaluation_starts_anew(run_stage: RunStage, tmp_path: Path):
    words = ["stage=eval", "stage.episodes=4", "stage.num_envs=4"]
    run_stage(tmp_path, *words)
    names = ("episodes.jsonl", "metrics.jsonl")
    before = [(tmp_path / name).read_bytes() for name in names]
    (tmp_path / "DONE").unlink()
    with open(tmp_path / "episodes.jsonl", "ab") as file:
        file.write(b'{"env": "half an epi')
    run_stage(tmp_path, *words)
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_a_start_that_fails_leaves_no_episodes(run_stage: RunStage, tmp_path: Path):
    words = ["stage=eval", "stage.episodes=2", "stage.num_envs=2"]
    with pytest.raises(VlmAgentsError):
        run_stage(tmp_path, *words, f"stage.init={tmp_path / 'nowhere'}")
    assert not (tmp_path / "episodes.jsonl").exists()
    run_stage(tmp_path, *words)  # so the mended command is not refused


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_a_scripted_policy_is_played_alone(run_stage: RunStage, played: Path, tmp_path: Path, policy: str):
    metrics = summary(run_stage(tmp_path, *SMALL, f"stage.policy={policy}"))["metrics"]
    assert "eval/success_greedy" not in metrics
    reference = summary(played)["metrics"]
    assert metrics == {name: reference[f"{name}_{policy}"] for name in metrics}


def test_baselines_may_be_left_out(run_stage: RunStage, tmp_path: Path):
    folder = run_stage(tmp_path, "stage=eval", "stage.episodes=2", "stage.baselines=false", "stage.report_episodes=0")
    metrics = summary(folder)["metrics"]
    assert "eval/success_greedy" in metrics
    assert not {"eval/success_random", "eval/success_expert"} & set(metrics)


# ---- numbers by hand -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # z^2 = 3.841459, p = 0.95: centre (0.95 + z^2/400) / (1 + z^2/200) = 0.9415196,
        # spread z sqrt(0.95 * 0.05/200 + z^2/160000) / (1 + z^2/200) = 0.0310978
        (190, 200, 0.910422, 0.972617),
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2) = 3.8415 / 13.8415
        (10, 10, 0.722467, 1.0),
        (1, 2, 0.094531, 0.905469),  # 1/2 +- z sqrt(1/8 + z^2/16) / (1 + z^2/2)
    ],
)
def test_wilsons_interval(successes: int, n: int, low: float, high: float):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=2e-6)
