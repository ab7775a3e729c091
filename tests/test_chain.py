"""`run`: what each stage is given, what is refused before the first one starts, what is passed over, and signals."""

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from vlm_agents.chain import composed, config_dirs, outcome, planned
from vlm_agents.config import register
from vlm_agents.errors import ConfigError, VlmAgentsError
from vlm_agents.preflight import check_before_a_chain
from vlm_agents.stopping import STATUS

FAST = ["env=echo", "tracking=jsonl", "hardware.threads=1", "collect.stage.num_envs=4", "name=a"]


def chain(folder: Path, *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "vlm_agents", "run", *words]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refusal(names: list[str], words: list[str]) -> str:
    register()
    with pytest.raises(ConfigError) as error:
        composed(planned(names, words, "a"))
    return str(error.value)


def test_each_stage_gets_what_is_its_own_and_what_is_for_all() -> None:
    words = ["stage.num_envs=4", "ppo.stage.num_envs=8", "seed=1", "sft.+x=1", "+sft.stage.y=2", "name=b"]
    assert planned(["empty_room"], words, "a") == {
        "collect": ["experiment=empty_room/collect", "stage.num_envs=4", "seed=1", "name=a"],
        "preprocess": ["experiment=empty_room/preprocess", "stage.num_envs=4", "seed=1", "name=a"],
        "sft": ["experiment=empty_room/sft", "stage.num_envs=4", "seed=1", "name=a", "+x=1", "+stage.y=2"],
        "ppo": ["experiment=empty_room/ppo", "stage.num_envs=8", "seed=1", "name=a"],
        "eval": ["experiment=empty_room/eval", "stage.num_envs=4", "seed=1", "name=a"],
    }
    assert list(planned(["rl4vlm_points24"], [], "a")) == ["ppo"]
    assert planned([], [], "a")["sft"] == ["stage=sft", "name=a"]


@pytest.mark.parametrize(
    ("names", "word", "said"),
    [
        ([], "algo.lr=1e-5", "algo.lr=1e-5: stage=collect can't take that. Say whose it is: ppo.algo.lr=1e-5"),
        ([], "stage.num_envs=4", "collect.stage.num_envs=4 or ppo.stage.num_envs=4 or eval.stage.num_envs=4"),
        ([], "modle=tiny", "modle: no such setting. Did you mean 'model'?"),
        ([], "seed=0,1", "seed=0,1: a chain isn't swept"),
        ([], "ppo.seed=range(3)", "ppo.seed=range(3): a chain isn't swept"),
        ([], "ppo.stage.episdoes=3", "ppo.stage.episdoes: no such setting. Did you mean 'ppo.stage.episodes'?"),
        ([], "ppo.stage.iterations=0", "ppo.stage.iterations=0 must be at least 1"),
        ([], "sweep=seeds", "one command for each"),
        ([], "run_dir=there", "a chain lies in outputs/<name>"),
        ([], "experiment=number_line", "as in 'run number_line'"),
        ([], "stage=ppo", "as in sft.stage.epochs=3"),
        ([], "ppo.name=b", "one name is that of all stages"),
        (["rl4vlm_points24"], "sft.stage.lr=1", "rl4vlm_points24 has no stage=sft, it has ppo"),
        (["number_lin"], "seed=1", "number_lin is no experiment. Did you mean 'number_line'?"),
        (["scratch", "more"], "seed=1", "more is no experiment"),
    ],
)
def test_what_a_stage_cannot_take_is_refused_before_the_first_starts(names: list[str], word: str, said: str) -> None:
    assert said in refusal(names, [word])


def test_experiments_of_ones_own_are_run_too(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "examples/conf"
    for words in (["--config-dir", "examples/conf"], [f"-cd={folder}"]):
        names, folders = config_dirs([*words, "corridor"])
        assert (names, [path.resolve() for path in folders]) == (["corridor"], [folder])
    plan = planned(names, ["env.max_steps=20"], "a", folders)
    assert list(plan) == ["collect"]
    register()
    assert composed(plan)["collect"].env.id == "Corridor"
    with pytest.raises(ConfigError, match=r"run corridr: corridr is no experiment. Did you mean 'corridor'\?"):
        planned(["corridr"], [], "a", folders)


def test_folders_and_stage_files_of_ones_own_are_as_a_single_stage_takes_them(tmp_path: Path) -> None:
    folder = tmp_path / "it's,[ü]/{b}"
    for name, stage in (("mini", "eval"), ("wrong", "eval")):
        (folder / "experiment" / name).mkdir(parents=True)
        text = f"# @package _global_\ndefaults: [override /env: echo, override /stage: {stage}]\n"
        (folder / "experiment" / name / ("eval.yaml" if name == "mini" else "ppo.yaml")).write_text(text)
    (folder / "experiment/broken").mkdir()
    (folder / "experiment/broken/eval.yaml").write_text("stage: [")
    (folder / "experiment/empty").mkdir()
    register()
    assert composed(planned(["mini"], [], "a", [folder]))["eval"].env.family == "echo"
    for name, said in (
        ("wrong", "experiment=wrong/ppo is a stage=eval"),
        ("broken", "broken/eval.yaml"),
        ("empty", "empty is no experiment"),
    ):
        with pytest.raises(ConfigError, match=said):
            composed(planned([name], [], "a", [folder]))


def test_it_passes_over_what_is_done_and_stops_at_the_first_failure(tmp_path: Path) -> None:
    """sft has nothing to learn from: the one episode is held out."""
    words = [*FAST, "collect.stage.episodes=1", "collect.stage.noise=0", "preprocess.stage.val_fraction=1"]
    first = chain(tmp_path, *words)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 2
    told, error = err.splitlines()
    assert told.startswith("1 episodes: success 1.000")  # of collect
    assert error.startswith("error: no turn of outputs/a/collect is left to learn from")
    assert "python -m vlm_agents stage=preprocess env=echo" in out
    assert "stage=sft" not in out
    again = chain(tmp_path, *words)
    out, _ = again.communicate(timeout=60)
    assert (again.returncode, out.splitlines()[0]) == (2, "collect was finished before: outputs/a/collect")


def test_a_finished_stage_is_told_by_its_figures_and_its_page(tmp_path: Path) -> None:
    metrics = {"eval/success": 0.995, "eval/success_expert": 1.0, "eval/return": 1.0}
    summary = {"metrics": metrics, "artifacts": {"report": "report.html"}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert outcome("eval", tmp_path) == f"eval        success 0.995; {tmp_path}/report.html"
    summary = {"metrics": metrics | {"eval/invalid_rate": 0.77}, "artifacts": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "success 0.995; no agent yet: 77% of its replies hold no legal action; " in outcome("eval", tmp_path)


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_reaches_the_stage_and_is_told_once(tmp_path: Path, number: int, status: int, word: str) -> None:
    process = chain(tmp_path, *FAST, "collect.stage.episodes=100000")
    while not (tmp_path / "outputs/a/collect/episodes.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, f"{word}; the same command with the run's name= continues it\n")


def test_a_chain_that_is_asked_to_stop_begins_no_other_stage(tmp_path: Path) -> None:
    process = chain(tmp_path, *FAST, "collect.stage.episodes=400")
    while not (tmp_path / "outputs/a/collect/episodes.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == STATUS
    assert err.endswith("stopped; the same command with the run's name= continues it\n")
    assert [path.name for path in (tmp_path / "outputs/a").iterdir()] == ["collect"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ppo.stage.init=nowhere", "stage.init=nowhere holds no model"),
        ("ppo.stage.init=outputs/b/sft", "outputs/b/sft is a run of model=other, not tiny"),
        ("ppo.prompt.max_reply_tokens=4096", "that is 4097 tokens"),
        ("eval.stage.init=outputs/a/sft/model", None),  # made by the chain
    ],
)
def test_an_init_that_no_stage_makes_is_looked_at_before_the_first(
    word: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/b/sft/model").mkdir(parents=True)
    (tmp_path / "outputs/b/sft/DONE").touch()
    (tmp_path / "outputs/b/sft/config.yaml").write_text("{stage: {name: sft}, model: {name: other}}")
    register()
    made: list[Path] = []
    with pytest.raises(VlmAgentsError, match=said) if said else nullcontext():
        for cfg in composed(planned([], [*FAST, word], "a")).values():
            check_before_a_chain(cfg, made)
            made.append(Path(cfg.run_dir).resolve())


def test_a_machine_or_model_that_a_later_stage_lacks_is_told_before_the_first(tmp_path: Path) -> None:
    for word, said in (("sft.hardware=gpu", "no GPU here"), ("sft.model.path=/no/where", "there is no such folder")):
        process = chain(tmp_path, *FAST, word)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err.count("\n")) == (2, 1)
        assert said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_a_stage_ends_with_its_chain_however_that_is_killed(tmp_path: Path) -> None:
    process = chain(tmp_path, *FAST, "collect.stage.episodes=100000")
    while not (tmp_path / "outputs/a/collect/episodes.jsonl").exists():
        time.sleep(0.02)
    process.kill()
    _, err = process.communicate(timeout=20)  # the pipe is closed once the stage has ended too
    assert err == "terminated; the same command with the run's name= continues it\n"
