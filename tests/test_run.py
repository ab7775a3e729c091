"""Run directories: refusal and resume, atomic checkpoints, files cut back, seeds, summary."""

import errno
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from vlm_agents import files
from vlm_agents.config import RunConfig
from vlm_agents.errors import ConfigError, DataError
from vlm_agents.files import append_line, atomic_write, hold
from vlm_agents.inputs import content_hash
from vlm_agents.run import Checkpoint, Run, commit, finished_metrics


@pytest.fixture
def cfg(compose_run) -> RunConfig:
    return compose_run("stage=ppo")


def weights(text: str):
    return lambda folder: (folder / "weights.txt").write_text(text)


def newest(run: Run) -> Checkpoint:
    found = run.latest_checkpoint()
    assert found is not None
    return found


def lines(run: Run, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in run.path(name).read_text().splitlines()]


# ---- opening ---------------------------------------------------------------------------------------------------------
def test_a_new_run_leaves_its_snapshot(cfg: RunConfig) -> None:
    with Run.open(cfg, ["stage=ppo", "seed=0"]) as run:
        settings = yaml.safe_load(run.path("config.yaml").read_text())
        assert settings["env"]["id"] == "MiniGrid-DoorKey-6x6-v0"
        assert settings["algo"]["lr"] == 1e-4
        assert run.path("overrides").read_text() == "stage=ppo\nseed=0\n"
        assert run.path("commit").read_text().strip() == commit()


def test_a_finished_run_refuses(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        run.finish({})
    with pytest.raises(ConfigError, match=r"is finished: choose another name=, or delete that directory"):
        Run.open(cfg, [])


def test_other_settings_refuse_once_something_was_done(cfg: RunConfig, compose_run) -> None:
    other = compose_run("stage=ppo", "algo.clip=0.3")
    with Run.open(cfg, []):
        pass
    with Run.open(other, []) as run:  # nothing was done before
        run.log(1, {"a": 1})
    with Run.open(other, []):
        pass
    with pytest.raises(ConfigError, match=r"with algo\.clip=0\.3, not 0\.2: give algo\.clip=0\.3 to continue"):
        Run.open(cfg, [])
    with pytest.raises(ConfigError, match="with env=minigrid, not number_line: give env=minigrid to continue"):
        Run.open(compose_run("stage=ppo", "env=number_line", "algo.clip=0.3"), [])


def test_a_run_that_failed_before_it_did_anything_may_be_corrected(cfg: RunConfig, compose_run) -> None:
    with Run.open(cfg, []) as run:
        run.path("images").mkdir()
        run.path("episodes.jsonl").touch()
    with Run.open(compose_run("stage=ppo", "algo.clip=0.3"), []):
        assert "clip: 0.3" in run.path("config.yaml").read_text()


def test_settings_that_nobody_can_read_are_told(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        run.log(1, {"a": 1})
    run.path("config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"config\.yaml is unreadable: delete"):
        Run.open(cfg, [])


# ---- what it reads from outside --------------------------------------------------------------------------------------
@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").write_bytes(b"these rows")
    return tmp_path / "data"


def test_other_data_at_the_same_path_refuses_once_something_was_done(compose_run, data: Path) -> None:
    cfg = compose_run("stage=sft", f"stage.data={data}")
    with Run.open(cfg, []):
        (data / "train.parquet").write_bytes(b"corrected!")
    with Run.open(cfg, []) as run:  # nothing was done before
        run.log(1, {"a": 1})
    os.utime(data / "train.parquet", (0, 0))  # copied, with the same content
    with Run.open(cfg, []):
        (data / "train.parquet").write_bytes(b"other rows")
    with pytest.raises(ConfigError, match=r"read another .*train\.parquet: put that back to continue it, or delete"):
        Run.open(cfg, [])
    (data / "train.parquet").unlink()
    with Run.open(cfg, []):  # who reads it will miss it
        pass


@pytest.mark.parametrize("stage", ["ppo", "eval", "merge", "collect stage.policy=model"])
@pytest.mark.parametrize("setting", ["stage.init", "model.path"])
def test_other_weights_at_the_same_path_refuse(compose_run, tmp_path: Path, stage: str, setting: str) -> None:
    """Of a run directory only its model counts."""
    (tmp_path / "a/model/heads").mkdir(parents=True)
    (tmp_path / "a/model/heads/value_head.safetensors").write_bytes(b"one")
    words = [f"stage={stage.split()[0]}", *stage.split()[1:], "stage.init=nowhere", f"{setting}={tmp_path / 'a'}"]
    cfg = compose_run(*{word.split("=")[0]: word for word in words}.values())
    with Run.open(cfg, []) as run:
        run.log(1, {"a": 1})
    (tmp_path / "a/summary.json").write_text("of another day")
    with Run.open(cfg, []):
        (tmp_path / "a/model/heads/value_head.safetensors").write_bytes(b"two")
    with pytest.raises(ConfigError, match=r"value_head\.safetensors"):
        Run.open(cfg, [])


def test_a_finished_run_of_other_data_is_not_this_one(compose_run, data: Path) -> None:
    cfg = compose_run("stage=sft", f"stage.data={data}")
    with Run.open(cfg, []) as run:
        run.finish({"a": 1.0})
    assert finished_metrics(cfg) == {"a": 1.0}
    (data / "train.parquet").write_bytes(b"other rows")
    with pytest.raises(ConfigError, match=r"read another .*train\.parquet"):
        finished_metrics(cfg)


def test_a_change_anywhere_in_a_large_file_is_seen_where_it_is_read(tmp_path: Path) -> None:
    """Of 80 MB, 64 MiB are read: its first and last bytes among them."""
    path, seen = tmp_path / "large", set()
    with open(path, "wb") as file:
        file.truncate(80_000_000)
    for at in (0, 0, 79_999_999):
        seen.add(content_hash(path))
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"x")
    assert len(seen | {content_hash(path)}) == 3


def test_tracking_may_change_on_resume(cfg: RunConfig, compose_run) -> None:
    with Run.open(cfg, []) as run:
        run.log(1, {"a": 1})
    with Run.open(compose_run("stage=ppo", "tracking.experiment=other"), []):
        pass


def test_other_ranks_may_go_on_with_a_run_but_not_with_other_rules(cfg: RunConfig, compose_run) -> None:
    with Run.open(cfg, []) as run:
        run.log(1, {"a": 1})
    with Run.open(compose_run("stage=ppo", "hardware.processes=3", "hardware.nodes=2", "hardware.restarts=0"), []):
        pass
    with pytest.raises(ConfigError, match=r"with hardware\.zero=0, not 2"):
        Run.open(compose_run("stage=ppo", "hardware.processes=3", "hardware.zero=2"), [])


def test_the_server_of_a_remote_policy_may_move_on_resume_and_its_model_may_not(compose_run) -> None:
    words = ("stage=collect", "stage.policy=remote", "stage.remote.model=big")
    with Run.open(compose_run(*words), []) as run:
        run.log(1, {"a": 1})
    with Run.open(compose_run(*words, "stage.remote.url=http://127.0.0.1:9/v1", "stage.remote.retries=9"), []):
        pass
    with pytest.raises(ConfigError, match=r"with stage\.remote\.model=big, not small"):
        Run.open(compose_run(*words[:2], "stage.remote.model=small"), [])


def test_two_processes_never_share_a_run(cfg: RunConfig, tmp_path: Path) -> None:
    code = """
import sys
from hydra import compose, initialize_config_dir
from vlm_agents.config import conf_dir, parse, register
from vlm_agents.run import Run
register()
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    cfg = parse(compose("config", ["stage=ppo", "name=test", "tracking=jsonl", f"run_dir={sys.argv[1]}"]))
Run.open(cfg, [])
"""
    command = [sys.executable, "-c", code, cfg.run_dir]
    with Run.open(cfg, []):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "ConfigError" in done.stderr
        assert "is in use by another process" in done.stderr
        again = os.environ | {"SLURM_RESTART_COUNT": "1"}  # the job's earlier self may be about to end
        waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=again)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(5)
    _, err = waiting.communicate()
    assert (waiting.returncode, err) == (0, "")
    assert subprocess.run(command, check=False).returncode == 0


# ---- metrics ---------------------------------------------------------------------------------------------------------
def test_metrics_are_strict_json(cfg: RunConfig) -> None:
    numbers: Any = {"loss": 0.1, "bad": float("nan"), "worse": -np.inf, "n": np.int64(3), "x": np.float32(0.5)}
    with Run.open(cfg, []) as run:
        run.log(1, numbers)
        assert lines(run) == [{"step": 1, "loss": 0.1, "bad": None, "worse": None, "n": 3, "x": 0.5}]


def test_pictures_are_kept(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        run.image("eval/frame", Image.new("RGB", (2, 3)), step=4)
        assert Image.open(run.path("pictures/eval_frame_000004.png")).size == (2, 3)


def test_summary_is_for_machines(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        run.path("report.html").touch()
        assert run.finish({"eval/success": np.float64(0.75)}, {"report": run.path("report.html")}) == {
            "eval/success": 0.75
        }
        summary = json.loads(run.path("summary.json").read_text())
        assert summary.pop("wall_seconds") >= 0
        assert summary == {
            "stage": "ppo",
            "env": "MiniGrid-DoorKey-6x6-v0",
            "model": "tiny",
            "weights": "the model's own: the shipped tiny ones",
            "differs": [],
            "algo": "ppo",
            "seed": 0,
            "metrics": {"eval/success": 0.75},
            "artifacts": {"report": "report.html"},
        }
        assert run.path("DONE").exists()


@pytest.mark.parametrize(
    ("policy", "name"), [("model", "tiny"), ("expert", "expert"), ("random", "random"), ("remote", "big")]
)
def test_the_summary_names_who_played(compose_run, policy: str, name: str) -> None:
    words = ("stage=collect", f"stage.policy={policy}", "stage.rater=none", "stage.remote.model=big")
    with Run.open(compose_run(*words), []) as run:
        run.finish({})
        assert json.loads(run.path("summary.json").read_text())["model"] == name


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def test_newest_checkpoints_are_kept(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        for step in (1, 2, 10):
            run.save_checkpoint(step, weights(str(step)), {"lr": 0.1 * step}, keep=2)
        assert sorted(os.listdir(run.path("checkpoints"))) == ["step_000002", "step_000010"]
        found = newest(run)
        assert (found.step, found.state, (found.path / "weights.txt").read_text()) == (10, {"lr": 1.0}, "10")


def test_no_checkpoint_is_none(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        assert run.latest_checkpoint() is None


def test_a_crash_while_writing_leaves_the_last_one(cfg: RunConfig) -> None:
    def crash(folder: Path) -> None:
        weights("half")(folder)
        raise KeyboardInterrupt

    with Run.open(cfg, []) as run:
        run.save_checkpoint(1, weights("one"), {})
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(2, crash, {})
        assert newest(run).step == 1
        run.save_checkpoint(2, weights("two"), {})
        assert newest(run).step == 2


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "weights.txt", 1)


def flip_a_byte(folder: Path) -> None:
    (folder / "weights.txt").write_text("twO")


def lose_weights(folder: Path) -> None:
    (folder / "weights.txt").unlink()


def truncate_state(folder: Path) -> None:
    os.truncate(folder / "state.json", 10)


def no_state(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


@pytest.mark.parametrize("damage", [truncate_weights, flip_a_byte, lose_weights, truncate_state, no_state])
def test_a_damaged_checkpoint_is_passed_over(cfg: RunConfig, caplog: pytest.LogCaptureFixture, damage) -> None:
    with Run.open(cfg, []) as run:
        run.save_checkpoint(1, weights("one"), {})
        run.save_checkpoint(2, weights("two"), {})
        damage(run.path("checkpoints/step_000002"))
        with caplog.at_level(logging.WARNING):
            assert newest(run).step == 1
        assert "checkpoints/step_000002 is damaged" in caplog.text
        run.save_checkpoint(2, weights("again"), {})
        assert (newest(run).path / "weights.txt").read_text() == "again"


def test_none_whole_is_an_error(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        run.save_checkpoint(1, weights("one"), {})
        truncate_state(run.path("checkpoints/step_000001"))
        with pytest.raises(DataError, match=r"every checkpoint under .*checkpoints is damaged: delete"):
            run.latest_checkpoint()


def test_what_a_user_put_beside_the_checkpoints_is_passed_over(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        run.path("checkpoints/step_backup").mkdir(parents=True)
        assert run.latest_checkpoint() is None
        run.save_checkpoint(1, weights("one"), {})
        assert newest(run).step == 1
        assert run.path("checkpoints/step_backup").is_dir()


def test_a_run_killed_before_it_removed_older_checkpoints_does_so_later(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        for step in (1, 2, 3):
            run.save_checkpoint(step, weights(""), {}, keep=9)
        state = run.path("checkpoints/step_000003/state.json")
        state.write_text(json.dumps({**json.loads(state.read_text()), "keep": 2}))
        run.restore()
        assert sorted(os.listdir(run.path("checkpoints"))) == ["step_000002", "step_000003"]


def test_what_a_killed_process_had_begun_to_write_goes_at_the_next_start(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        for name in ("images", "checkpoints/.step_000012.7.tmp"):
            run.path(name).mkdir(parents=True)
        begun = [run.path(name) for name in (".DONE.71.tmp", "images/.a.png.7.tmp", "checkpoints/.step_000012.7.tmp/x")]
        mine = [run.path(name) for name in (".notes", "images/.tmp", "checkpoints/.old.tmp", "a.7.tmp")]
        for path in (*begun, *mine):
            path.touch()
    with Run.open(cfg, []):
        assert not any(path.exists() or path.parent.name[0] == "." for path in begun if path.parent.exists())
        assert all(path.exists() for path in mine)


# ---- resume ----------------------------------------------------------------------------------------------------------
def train(cfg: RunConfig, stop_after: int | None = None) -> Run:
    """Six iterations with a checkpoint every second one; perhaps killed between two checkpoints."""
    with Run.open(cfg, []) as run:
        run.append_only("episodes.jsonl")
        episodes = run.path("episodes.jsonl")
        checkpoint = run.restore()
        total = 0 if checkpoint is None else checkpoint.state["total"]
        for step in range(1 if checkpoint is None else checkpoint.step + 1, 7):
            total += step
            append_line(episodes, json.dumps({"episode": step}))
            run.log(step, {"total": total})
            if step == stop_after:
                return run
            if step % 2 == 0:
                run.save_checkpoint(step, weights(str(total)), {"total": total})
        run.finish({"total": total})
    return run


def test_a_folder_of_somebody_s_own_is_no_run_directory(cfg: RunConfig) -> None:
    path = Path(cfg.run_dir) / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is no run directory, and not empty: choose another run_dir= or name="):
        Run.open(cfg, [])
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    assert path.read_text() == "mine"


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5, 6])
def test_a_killed_run_ends_like_an_unbroken_one(compose_run, tmp_path: Path, stop_after: int) -> None:
    unbroken = train(compose_run("stage=ppo", f"run_dir={tmp_path / 'unbroken'}"))
    cfg = compose_run("stage=ppo")
    train(cfg, stop_after)
    resumed = train(cfg)
    assert [line["total"] for line in lines(resumed)] == [1, 3, 6, 10, 15, 21]
    for name in ("metrics.jsonl", "episodes.jsonl", "checkpoints/step_000006/weights.txt"):
        assert resumed.path(name).read_bytes() == unbroken.path(name).read_bytes()


@pytest.mark.parametrize(
    ("left", "resumed", "warned"),
    [
        pytest.param([1, 2, 3, 4, 5], [1, 2, 3, 4], False, id="nothing happened"),
        pytest.param([1, "damaged", 3, 4, 5], [1, "damaged", 3, 4], False, id="one damaged"),
        pytest.param([1, 3, 4, 5], [1, 3, 4], False, id="one deleted"),
        pytest.param([1, 2, 3, "damaged, at length" * 9], [1, 2, 3], True, id="the checkpoint's own damaged"),
        pytest.param([1, 2, 3], [1, 2, 3], True, id="the checkpoint's own deleted"),
        pytest.param([1, 2, 3, 5], [1, 2, 3], True, id="the checkpoint's own deleted, and one came after it"),
        pytest.param([1, 5], [1], True, id="the last three deleted"),
    ],
)
def test_a_file_that_lost_lines_is_cut_behind_the_one_that_its_checkpoint_saw(
    cfg: RunConfig, caplog: pytest.LogCaptureFixture, left: list, resumed: list, warned: bool
) -> None:
    """The checkpoint saw lines 1 to 4; line 5 came after it."""
    with Run.open(cfg, []) as run:
        path = run.path("metrics.jsonl")
        path.write_text("".join(f"line {number}\n" for number in range(1, 5)))
        run.save_checkpoint(1, weights(""), {})
        path.write_text("".join(f"line {number}\n" for number in left))
        run.restore()
        assert path.read_text() == "".join(f"line {number}\n" for number in resumed)
        assert ("metrics.jsonl lost lines that its checkpoint saw" in caplog.text) == warned


def test_a_checkpoint_of_an_older_version_goes_by_length(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        run.log(1, {"a": 1})
        before = run.path("metrics.jsonl").read_bytes()
        state = run.save_checkpoint(1, weights(""), {"a": 1}) / "state.json"
        record = json.loads(state.read_text())
        state.write_text(json.dumps({key: record[key] for key in record if key not in ("last_lines", "keep")}))
        run.log(2, {"a": 2})
        found = run.restore()
        assert found is not None
        assert found.state == {"a": 1}
        assert run.path("metrics.jsonl").read_bytes() == before


def test_wall_seconds_add_up_over_a_resume(cfg: RunConfig) -> None:
    with Run.open(cfg, []) as run:
        run._started -= 100  # a run that began 100 s ago
        run.save_checkpoint(1, weights(""), {})
    with Run.open(cfg, []) as run:
        run.restore()
        run.finish({})
        assert 100 <= json.loads(run.path("summary.json").read_text())["wall_seconds"] < 110


# ---- a full disk -----------------------------------------------------------------------------------------------------
def test_atomic_write_replaces(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "old")
    atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(DataError, match=r"can't write .*/a: No space left on device"):
        atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A real limit on the file's size, in a process of its own: 10 bytes fit, the second line would end at 12."""
    code = """
import resource, signal, sys
from pathlib import Path
from typing import Any
from vlm_agents.errors import DataError
from vlm_agents.files import append_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
path = Path(sys.argv[1])
append_line(path, "first")
try:
    append_line(path, "other")
except DataError as error:
    print(error)
"""
    path = tmp_path / "lines"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert f"can't write {path}" in done.stdout
    assert path.read_text() == "first\n"


def test_a_full_disk_leaves_the_last_checkpoint(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.open(cfg, []) as run:
        run.save_checkpoint(1, weights("one"), {})
        with pytest.raises(DataError, match=r"can't write .*step_000002"):
            run.save_checkpoint(2, no_space, {})
        assert newest(run).step == 1


# ---- seeds -----------------------------------------------------------------------------------------------------------
def test_seeds_of_a_run_depend_on_its_seed_and_purpose(cfg: RunConfig, compose_run, tmp_path: Path) -> None:
    with (
        Run.open(cfg, []) as run,
        Run.open(compose_run("stage=ppo", "seed=1", f"run_dir={tmp_path / 'b'}"), []) as other,
    ):
        assert run.seed_for("model") == run.seed_for("model")
        assert len({run.seed_for("model"), run.seed_for("data"), run.seed_for("data", 1), other.seed_for("model")}) == 4


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_before_it_begins_leaves_nothing(
    compose_run, tmp_path: Path, stop: type[BaseException]
) -> None:
    """Of three folders that it would have made one is there, with what is in it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    cfg = compose_run("stage=ppo", f"run_dir={tmp_path / 'mine/deep/run'}")
    with suppress(stop), Run.open(cfg, []) as run:
        run.path("part").mkdir()
        raise stop
    assert tree(tmp_path) == ["mine", "mine/notes.txt"]
    (tmp_path / "mine/deep/run").mkdir(parents=True)  # somebody's: it stays, empty as it was
    with suppress(stop), Run.open(cfg, []):
        raise stop
    assert tree(tmp_path / "mine") == ["deep", "deep/run", "notes.txt"]


def test_a_run_that_has_begun_stays(cfg: RunConfig) -> None:
    for begin in (True, False):  # the second goes on with the first
        with suppress(RuntimeError), Run.open(cfg, []) as run:
            if begin:
                run.begin()
                run.log(1, {"loss": 1.0})
            raise RuntimeError
        assert (Path(cfg.run_dir) / "metrics.jsonl").exists()
        assert (Path(cfg.run_dir) / "config.yaml").exists()


def test_a_lock_that_was_removed_is_none(tmp_path: Path) -> None:
    """As by a run that left nothing, between another one's opening of the file and its lock."""
    with open(tmp_path / "lock", "ab") as file:
        assert hold(file)
        (tmp_path / "lock").unlink()
        assert not hold(file)
        (tmp_path / "lock").touch()
        assert not hold(file)
