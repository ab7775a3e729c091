"""Collecting: the seeds played, the score of each step, and going on after an interruption."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_agents.episodes import read_episodes
from vlm_agents.seeds import training_seed
from vlm_agents.stages.collect import quality
from vlm_agents.types import Advice, Observation, Parsed, Reply, Step, Turn

RunStage = Callable[..., Path]


BY_MODEL = ("stage=collect", "stage.policy=model", "stage.episodes=20", "stage.num_envs=2")


@pytest.fixture(scope="module")
def played_by_model(run_stage: RunStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage(tmp_path_factory.mktemp("model"), *BY_MODEL)


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_the_episodes_are_those_of_the_training_seeds(echo_episodes: Path):
    episodes = list(read_episodes(echo_episodes))
    assert [episode.seed for episode in episodes] == [training_seed(0, -1, index) for index in range(40)]
    assert {episode.policy for episode in episodes} == {"expert+noise0.3"}
    assert {len(episode.turns) for episode in episodes} == {3}
    assert (echo_episodes / "report.html").stat().st_size > 10_000


def test_the_metrics_are_those_of_the_episodes(echo_episodes: Path):
    episodes = list(read_episodes(echo_episodes))
    turns = [turn for episode in episodes for turn in episode.turns]
    metrics = metrics_of(echo_episodes)
    assert metrics["collect/success"] == sum(episode.success for episode in episodes) / 40
    assert metrics["collect/random_rate"] == pytest.approx(sum(turn.reply.source == "random" for turn in turns) / 120)
    # 120 draws at 0.3: mean 36, standard deviation sqrt(120 * 0.21) = 5.0; four of them are 20
    assert abs(120 * metrics["collect/random_rate"] - 36) < 20
    assert metrics["collect/invalid_rate"] == 0.0
    (line,) = (echo_episodes / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, **metrics}


def test_an_expert_that_strays_on_purpose_is_called_so(echo_episodes: Path):
    told = json.loads((echo_episodes / "report.html").read_text().split('id="block">', 1)[1].split("</script>", 1)[0])
    words = "expert, 30% at random"
    assert told["results"][0]["policy"] == dict(told["facts"])["model"] == words
    assert {one["policy"] for one in told["episodes"]} == {words}


def test_in_echo_a_right_answer_is_worth_ten_and_a_wrong_one_nothing(echo_episodes: Path):
    """Right brings success one step nearer, or is what the expert says though success is lost; wrong loses it."""
    turns = [turn for episode in read_episodes(echo_episodes) for turn in episode.turns]
    for turn in turns:
        assert turn.observation.advice is not None
        right = turn.parsed.action == turn.observation.advice.action
        assert turn.rating == (10.0 if right else 0.0)
    assert {turn.rating for turn in turns} == {0.0, 10.0}


# ---- the score -------------------------------------------------------------------------------------------------------
def scored(before: Advice | None, after: Advice | None, said: str = "go", **how: bool) -> float:
    success, terminated = how.get("success", False), how.get("terminated", False)
    step = Step(Observation("next", advice=after), 0.0, terminated, False, success, True, True)
    return quality(Turn(Observation("now", advice=before), (), Reply(said), Parsed(said), step))


def away(distance: int | None, action: str = "go") -> Advice:
    return Advice("so far away", action, distance)


@pytest.mark.parametrize(
    ("before", "after", "score"),
    [(4, 3, 10.0), (4, 4, 5.0), (4, 5, 0.0), (4, 9, 0.0), (9, 2, 10.0)],  # 5 - 5 * (after - before), within 0 and 10
)
def test_a_step_is_scored_by_what_it_did_to_the_distance(before: int, after: int, score: float):
    assert scored(away(before), away(after)) == score


def test_the_ends_of_the_scale():
    assert scored(away(1), None, success=True, terminated=True) == 10.0
    assert scored(away(4), None) == 0.0  # from here the expert knows no way
    assert scored(away(4), away(None)) == 0.0
    assert scored(away(4), away(3), terminated=True) == 0.0  # the end, and no success


def test_where_nobody_counts_steps_the_advice_itself_is_the_measure():
    assert scored(away(None), away(None)) == 10.0
    assert scored(away(None), away(None), said="stay") == 0.0
    assert scored(None, away(3)) == 0.0


# ---- interruptions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("lines", "rest"), [(0, 0), (1, 70), (17, 0), (39, 1), (40, 0)])
def test_an_interrupted_run_plays_the_rest_and_nothing_twice(
    run_stage: RunStage, echo_episodes: Path, tmp_path: Path, lines: int, rest: int
):
    """As if killed after `lines` episodes and `rest` bytes of the next one."""
    folder = tmp_path / "run"
    shutil.copytree(echo_episodes, folder)
    for name in ("DONE", "summary.json"):
        (folder / name).unlink()
    whole = (folder / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    os.truncate(folder / "episodes.jsonl", sum(map(len, whole[:lines])) + rest)
    run_stage(folder, "stage=collect", "stage.episodes=40", "stage.num_envs=8")
    for name in ("episodes.jsonl", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (echo_episodes / name).read_bytes()
    assert metrics_of(folder) == metrics_of(echo_episodes)


@pytest.mark.parametrize("lost", [[3], [0, 11], [11]])
def test_an_episode_whose_line_was_deleted_is_played_again(
    run_stage: RunStage, echo_episodes: Path, tmp_path: Path, lost: list[int]
):
    """As if killed after 12 of 40 episodes, some of which somebody then took out."""
    folder = tmp_path / "run"
    shutil.copytree(echo_episodes, folder)
    for name in ("DONE", "summary.json"):
        (folder / name).unlink()
    whole = (folder / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for index, line in enumerate(whole[:12]) if index not in lost]
    (folder / "episodes.jsonl").write_bytes(b"".join(kept))
    run_stage(folder, "stage=collect", "stage.episodes=40", "stage.num_envs=8")
    after = (folder / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    assert after[: len(kept)] == kept
    assert sorted(after) == sorted(whole)
    assert metrics_of(folder) == pytest.approx(metrics_of(echo_episodes))  # sums in another order


@pytest.mark.parametrize("lines", [3, 9, 16])
def test_a_model_that_was_interrupted_plays_in_the_same_company_again(
    run_stage: RunStage, tmp_path: Path, played_by_model: Path, lines: int
):
    """Blocks of 4 times 2 episodes: log-probs are rounded by what is in a batch, and must be equal to the last bit."""
    folder = tmp_path / "run"
    shutil.copytree(played_by_model, folder)
    for name in ("DONE", "summary.json"):
        (folder / name).unlink()
    whole = (folder / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    os.truncate(folder / "episodes.jsonl", sum(map(len, whole[:lines])) + 5)
    run_stage(folder, *BY_MODEL)
    assert (folder / "episodes.jsonl").read_bytes() == b"".join(whole)


# ---- other policies and raters ---------------------------------------------------------------------------------------
def test_a_model_may_play_and_nobody_rate(run_stage: RunStage, tmp_path: Path):
    words = ["stage=collect", "stage.policy=model", "stage.noise=0", "stage.rater=none", "stage.episodes=3"]
    episodes = list(read_episodes(run_stage(tmp_path, *words)))
    replies = [turn.reply for episode in episodes for turn in episode.turns]
    assert all(1 <= len(reply.token_ids) == len(reply.logprobs) <= 4 for reply in replies)
    assert not any(turn.rating is not None for episode in episodes for turn in episode.turns)


def test_chance_may_play_where_there_is_no_expert(run_stage: RunStage, tmp_path: Path):
    words = ["env=minigrid", "env.id=MiniGrid-Dynamic-Obstacles-5x5-v0", "env.max_steps=3"]
    words += ["stage=collect", "stage.policy=random", "stage.rater=none", "stage.episodes=2"]
    episodes = list(read_episodes(run_stage(tmp_path, *words)))
    assert all(turn.observation.advice is None for episode in episodes for turn in episode.turns)
    assert metrics_of(tmp_path)["collect/random_rate"] == 1.0
