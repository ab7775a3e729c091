"""What users meet: broken files, wrong names, a model that never answers, a full disk. Each is one clear line or a
count, and nothing written before is lost. Wrong settings are in test_cli, single files in test_episodes and test_run.
"""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm_agents.episodes import read_episodes
from vlm_agents.errors import ConfigError, DataError, EnvError, ModelError

RunStage = Callable[..., Path]


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, with `folder` as its working directory."""
    line = [sys.executable, "-m", "vlm_agents", "env=echo", "tracking=jsonl", "name=mine", "hardware.threads=1", *words]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit status 2, and one line on stderr that says all of `said`."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for words in said:
        assert words in done.stderr


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """The run directory of five episodes, made by a command in tmp_path."""
    assert command(tmp_path, "stage=collect", "stage.episodes=5", "stage.noise=0").returncode == 0
    return tmp_path / "outputs/mine/collect"


def test_a_corrupted_episode_line_is_named_and_stays_where_it_is(collected: Path, tmp_path: Path):
    path = collected / "episodes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1][:-40] + b"\n", *lines[2:]]))
    broken = path.read_bytes()
    assert_refused(command(tmp_path, "stage=preprocess"), "episodes.jsonl:2", "not an episode", "Delete this line")
    assert path.read_bytes() == broken
    path.write_bytes(b"".join([lines[0], *lines[2:]]))  # the fix that the message names
    assert command(tmp_path, "stage=preprocess").returncode == 0


def test_an_episode_cut_short_at_the_end_is_left_out_and_told(collected: Path, tmp_path: Path):
    path = collected / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    done = command(tmp_path, "stage=preprocess")
    assert done.returncode == 0, done.stderr
    assert "episodes.jsonl:5: skipped an unfinished last line" in done.stdout + done.stderr
    metrics = json.loads((tmp_path / "outputs/mine/preprocess/summary.json").read_text())["metrics"]
    assert metrics["preprocess/episodes"] == 4


def test_a_missing_picture_is_named_with_the_line_that_wants_it(collected: Path, tmp_path: Path):
    for image in (collected / "images").iterdir():
        image.unlink()
    assert_refused(command(tmp_path, "stage=preprocess"), "episodes.jsonl:1", "can't read image", "Put it back")


def test_what_data_is_called_and_says_can_not_steer_the_terminal(tmp_path: Path):
    """Names in a LLaVA file reach a warning, or the error if no record is sound; either stays one line on stderr."""
    said = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    records = [{"image": name, "conversations": said} for name in ("\x1b[2Jgone\x9b\nerror: no.png", "../it.png")]
    (tmp_path / "chats.json").write_text(json.dumps(records))
    done = command(tmp_path, "stage=preprocess", "stage.data=[chats.json]")
    assert_refused(done, "no picture", "\\x1b[2Jgone\\x9b error: no.png")
    assert not {"\x1b", "\x9b"} & set(done.stdout + done.stderr)
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    (tmp_path / "chats.json").write_text(json.dumps([*records, {"image": "red.png", "conversations": said}]))
    done = command(tmp_path, "stage=preprocess", "stage.data=[chats.json]")
    assert "skipped" not in done.stdout
    assert not {"\x1b", "\x9b"} & set(done.stderr)
    warned = [line for line in done.stderr.splitlines() if "; skipped" in line]
    assert len(warned) == 2
    assert "\\x1b[2Jgone\\x9b\\nerror: no.png; skipped" in warned[0]
    assert "'../it.png' lies outside of" in warned[1]


def test_data_that_nobody_wrote_names_its_stage(tmp_path: Path):
    assert_refused(command(tmp_path, "stage=preprocess"), "outputs/mine/collect/episodes.jsonl", "stage=collect")
    assert_refused(command(tmp_path, "stage=sft"), "outputs/mine/preprocess/train.parquet", "stage=preprocess")


def test_a_torn_dataset_is_no_dataset(run_stage: RunStage, echo_chats: Path, tmp_path: Path):
    (tmp_path / "torn").mkdir()
    whole = (echo_chats / "train.parquet").read_bytes()
    (tmp_path / "torn/train.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"torn/train.parquet is no readable Parquet file.*run stage=preprocess again"):
        run_stage(tmp_path / "run", "stage=sft", f"stage.data={tmp_path / 'torn'}")


def test_names_that_nobody_knows(run_stage: RunStage, tmp_path: Path):
    with pytest.raises(EnvError, match=r"MiniGrid-DorKey-6x6-v0 is not an id.*Did you mean 'MiniGrid-DoorKey-6x6-v0'"):
        run_stage(tmp_path / "a", "stage=eval", "stage.policy=random", "env=minigrid", "env.id=MiniGrid-DorKey-6x6-v0")
    no_expert = "Obstacles-5x5-v0 has no expert: set stage.policy=random stage.rater=none, or env.expert="
    with pytest.raises(ConfigError, match=no_expert):
        run_stage(tmp_path / "b", "stage=collect", "env=minigrid", "env.id=MiniGrid-Dynamic-Obstacles-5x5-v0")


def test_a_run_that_is_not_finished_has_no_weights_to_start_from(run_stage: RunStage, tmp_path: Path):
    (tmp_path / "sft/checkpoints").mkdir(parents=True)
    with pytest.raises(DataError, match=r"stage.init=.*/sft holds no model: it needs a finished run"):
        run_stage(tmp_path / "run", "stage=ppo", f"stage.init={tmp_path / 'sft'}")


def test_a_run_of_another_model_gives_no_weights(run_stage: RunStage, tmp_path: Path):
    trained = run_stage(tmp_path / "sft", *PPO)
    with pytest.raises(ConfigError, match=r"stage.init=.*/sft is a run of model=tiny, not tiny_llava: set model=tiny$"):
        run_stage(tmp_path / "run", "stage=eval", "model=tiny_llava", f"stage.init={trained}")
    assert not (tmp_path / "run").exists()
    for stage in ("eval", "collect"):  # nobody would read it
        with pytest.raises(ConfigError, match=r"policy=random plays without a model, and .*: leave stage.init out, or"):
            run_stage(tmp_path / "run", f"stage={stage}", "stage.policy=random", f"stage.init={trained}")
    (trained / "config.yaml").write_text("torn: [")
    with pytest.raises(DataError, match=r"config.yaml is unreadable: put back a whole one$"):
        run_stage(tmp_path / "again", "stage=eval", f"stage.init={trained}")


def test_torn_weights_are_no_weights(run_stage: RunStage, tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match=r"model .*/model can't be loaded: .*Set model.path or stage.init to a whole"):
        run_stage(tmp_path / "run", "stage=ppo", f"stage.init={folder}")


PPO = ("stage=ppo", "stage.iterations=2", "stage.episodes=4", "stage.num_envs=4", "stage.eval_episodes=0")
SFT = ("stage=sft", "stage.batch_size=8", "stage.checkpoint_every=3", "stage.epochs=1", "stage.warmup_steps=0")


@pytest.fixture(scope="module", params=["ppo", "sft"])
def training(
    request: pytest.FixtureRequest, run_stage: RunStage, echo_chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, ...], Path]:
    """The settings of a short training that leaves two checkpoints, and its folder when nothing went wrong."""
    words = PPO if request.param == "ppo" else (*SFT, f"stage.data={echo_chats}")
    return words, run_stage(tmp_path_factory.mktemp(request.param), *words)


def unfinish(finished: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a run as it was before its end; its newest checkpoint, and the one before."""
    shutil.copytree(finished, folder)
    for name in ("DONE", "summary.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "model")
    before, newest = sorted((folder / "checkpoints").iterdir())
    return newest, before


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def test_a_torn_newest_checkpoint_gives_way_to_the_one_before(
    run_stage: RunStage, training: tuple[tuple[str, ...], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The run that goes on from there ends like the one whose checkpoint was whole."""
    (words, unbroken), torn = training, tmp_path / "torn"
    newest, _ = unfinish(unbroken, torn)
    path = newest / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    run_stage(torn, *words)
    assert f"{newest} is damaged: going on from the one before it" in caplog.text
    assert weights(torn) == weights(unbroken)


@pytest.mark.parametrize("cure", ["left as it is", "deleted"])
def test_a_damaged_line_costs_a_training_run_no_more_than_that_line(
    run_stage: RunStage,
    training: tuple[tuple[str, ...], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    cure: str,
):
    (words, unbroken), folder = training, tmp_path / "run"
    unfinish(unbroken, folder)
    names = [name for name in ("metrics.jsonl", "episodes.jsonl") if (folder / name).exists()]
    for name in names:
        _, *rest = (unbroken / name).read_bytes().splitlines(keepends=True)
        damaged = [b"\xff, no JSON\n"] if cure == "left as it is" else []
        (folder / name).write_bytes(b"".join([*damaged, *rest]))
    run_stage(folder, *words)
    assert weights(folder) == weights(unbroken)
    for name in names:
        whole, after = ((path / name).read_bytes().splitlines() for path in (unbroken, folder))
        assert len(after) == len(whole) - (cure == "deleted")
    if words[0] == "stage=ppo" and cure == "left as it is":
        assert "metrics.jsonl, line 1 is not" in caplog.text
        assert "left out: " in caplog.text


@pytest.mark.parametrize("file", ["weights", "optimizer"])
def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(
    run_stage: RunStage, training: tuple[tuple[str, ...], Path], tmp_path: Path, file: str
):
    """A real limit on the size of a file, one byte too small for what safetensors' writer, or torch's, has to write."""
    (words, unbroken), full = training, tmp_path / "full"
    newest, before = unfinish(unbroken, full)
    optimizer = "learner.pt" if words is PPO else "optimizer.pt"
    name = "model/model.safetensors" if file == "weights" else optimizer
    room = (newest / name).stat().st_size - 1  # the optimizer's file is the larger one
    shutil.rmtree(newest)
    kept = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(DataError, match=rf"can't write {newest}: .*Make room there, then give the same command"):
            run_stage(full, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in kept} == kept
    assert not newest.exists()
    run_stage(full, *words)
    assert weights(full) == weights(unbroken)


def test_a_model_that_never_answers_is_counted_and_costs(run_stage: RunStage, tmp_path: Path):
    """Random weights write no JSON: every turn is invalid and costs 0.1, and is trained on."""
    words = ("stage.iterations=1", "stage.episodes=6", "stage.num_envs=6", "stage.eval_episodes=0")
    folder = run_stage(tmp_path, "stage=ppo", "prompt=cot_json", *words)
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["rollout/invalid_rate"] == 1.0
    assert metrics["rollout/return"] == pytest.approx(-0.3)  # 3 turns
    assert metrics["ppo/updates"] == 1
    for episode in read_episodes(folder):
        assert all(turn.parsed.action is None and turn.parsed.error for turn in episode.turns)


def test_a_full_disk_ends_the_run_with_its_episodes_intact(tmp_path: Path):
    """No file may grow past 20 kB (a real limit): some episodes fit. With room again, the same command goes on."""
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
from vlm_agents.__main__ import main
sys.exit(main())
"""
    sizes = ("stage.episodes=30", "stage.num_envs=1")
    words = ["env=echo", "tracking=jsonl", "name=mine", "stage=collect", "hardware.threads=1", *sizes]
    line = [sys.executable, "-c", code, *words]
    assert_refused(
        subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False),
        "can't write", "episodes.jsonl", "Make room there, then give the same command again",
    )  # fmt: skip
    kept = [episode.seed for episode in read_episodes(tmp_path / "outputs/mine/collect")]
    assert 0 < len(kept) < 30
    assert command(tmp_path, "stage=collect", *sizes).returncode == 0
    after = [episode.seed for episode in read_episodes(tmp_path / "outputs/mine/collect")]
    assert after[: len(kept)] == kept
    assert len(set(after)) == 30
