"""The command line: what a user can mend is one line and exit status 2; bugs keep their traceback; sweeps and names."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path

import pytest

from vlm_agents.config import RunConfig, StageConfig, flat
from vlm_agents.errors import DataError
from vlm_agents.hydra_errors import check_flags
from vlm_agents.run import Run


@pytest.fixture
def as_stage(monkeypatch: pytest.MonkeyPatch):
    """Makes a function the `main` of stage=eval: to the command line a stage is a module with such a `main`."""

    def install(function) -> None:
        module = types.ModuleType("vlm_agents.stages.eval")
        module.main = function  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def draw(cfg: RunConfig, stage: StageConfig, run: Run) -> dict[str, float]:
    """A stage in two lines."""
    run.log(1, {"eval/seed": cfg.seed})
    return run.finish({"eval/success": 0.5})


BAD = [
    ("", "run name=mine env.id=MiniGrid-Empty-8x8-v0", "stage=<collect|doctor|eval|merge|ppo|preprocess|serve|sft>"),
    ("env.id=x", "nothing says what to run", "python -m vlm_agents stage=ppo"),
    ("-m run", "-m: a chain isn't swept", "one command for each of the values"),
    ("run --cfg job", "--cfg: run takes an experiment and key=value", "stage=ppo --cfg job"),
    ("run name=", "name= is empty", "use letters"),
    ("stage=ppo stage.epochs=3", "stage.epochs: no such setting", "Did you mean algo.epochs?"),
    ("stage=ppo hardware.threads=100000", "hardware.threads=100000", "between 1 and 1024"),
    ("stage=collect env.tile_size=100000", "env.tile_size=100000", "between 4 and 256"),
    ("stage=pop", "stage=pop: no such option", "Did you mean 'ppo'?"),
    ("stage=ppo env=minigird", "env=minigird: no such option", "Did you mean 'minigrid'?"),
    ("stage=ppo algo=pppo", "algo=pppo: no such option", "Did you mean 'ppo'?"),
    ("stage=ppo hydra/launcher=slrum", "hydra/launcher=slrum: no such option", "Did you mean 'slurm'?"),
    ("stage=ppo experiment=nope", "experiment=nope: no such option", "Options:"),
    ("stage=ppo modle=tiny", "modle: no such setting", "Did you mean 'model'?"),
    ("stage=ppo swep=seeds", "swep: no such setting", "Did you mean 'sweep'?"),
    ("stage=ppo stage.episdoes=3", "stage.episdoes: no such setting", "Did you mean 'stage.episodes'?"),
    ("stage=ppo env.zzz=3", "env.zzz: no such setting", "There are: family, id, max_steps"),
    ("stage=ppo +stage.foo=1", "stage.foo: no such setting", "remove +stage.foo"),
    ("stage=ppo stage.episodes=many", "'many' of type 'str' could not be", "For example stage.episodes=64"),
    ("stage=ppo env=alfworld env.tasks=all", "str is not a ListConfig", "Write 'env.tasks=[...]', with brackets"),
    ("stage=ppo env.workers=maybe", "'maybe' is not a valid bool", "For example env.workers=False"),
    ("stage=preprocess stage.data=here", "stage.data: Invalid value", "Write 'stage.data=[...]'"),
    ("stage=ppo seed=null", "seed: field 'seed' is not Optional", "For example seed=0"),
    ("stage=ppo seed=1,2", "seed=1,2: -m runs each value", "is one word"),
    ("stage=ppo env=null", "env=null: no such option", "Options: alfworld, blackjack, custom"),
    ("stage=ppo ~env", "env has no value", "give env="),
    ("stage=sft stage.data=???", "stage.data has no value", "give stage.data="),
    (
        "stage=collect env=gymnasium",
        "env.id, env.actions, env.instructions have no value",
        "give env.id=... env.actions=... env.instructions=...",
    ),
    ("stage=ppo stage.init=${nme}", "'nme' not found", "no such setting"),
    ("stage=ppo name", "name: not of the form key=value", "missing EQUAL"),
    ("stage=ppo name=..", "name='..' names a folder", "use letters"),
    ("stage=ppo stage.init=outputs/lr=1e-4/m", "not of the form", "quoted: 'stage.init=\"outputs/lr=1e-4/m\"'"),
    (
        "stage=preprocess stage.data=[[x]]",
        "stage.data=[['x']] must be a list of paths",
        "stage.data=[outputs/a/collect]",
    ),
    ("stage=ppo hydra.run.dir=x", "a run makes its own directory", "set run_dir=x"),
    ("stage=sft algo.clip=0.1", "algo.clip=0.1: this run has no 'algo'", "stage=ppo brings it in"),
    ("stage=sft algo=ppo", "algo=ppo: this run has no 'algo'", "stage=ppo brings it in"),
    ("stage=ppo model.lora.rank=8", "model.lora.rank=8: this run has no 'model.lora'", "add model/lora=adapter"),
    ("stage=ppo rollout=vllm", "rollout=vllm: the server is handed an adapter", "add model/lora=adapter"),
    ("stage=ppo rollout=vllm model/lora=adapter", "log-probs are never quite", "set algo.correction=truncate"),
    ("stage=eval rollout=vllm", "stage=eval trains no policy", "leave it out"),
    (
        "stage=ppo rollout.tolerance=1",
        "rollout.tolerance=1.0 is read with rollout.engine=vllm",
        "rollout.tolerance=0.1",
    ),
    (
        "stage=ppo rollout=vllm model/lora=adapter model/train=all",
        "vLLM takes adapters of the language part alone",
        "set model/train=language",
    ),
    (
        "stage=ppo rollout=vllm model/lora=adapter model/temperature_head=learned",
        "a server knows one temperature",
        "model/temperature_head=null",
    ),
    ("stage=ppo rollout=vllm model/lora=adapter model.temperature=3", "from 0.01 to 2", "not at model.temperature=3"),
    ("stage=ppo rollout=vllm model/lora=adapter model.quantize=nf4", "the server's weights aren't", "quantize=null"),
    ("stage=ppo stage.staleness=1", "the weights that play are those that learn", "set rollout=vllm"),
    (
        "stage=ppo stage.staleness=1 rollout=vllm model/lora=adapter algo.correction=truncate",
        "algo=ppo has a critic",
        "such as algo=grpo",
    ),
    (
        "stage=ppo stage.staleness=1 rollout=vllm model/lora=adapter algo=grpo algo.correction=mask hardware=ddp",
        "ranks play together",
        "set hardware.processes=1",
    ),
    (
        "stage=ppo stage.staleness=1 stage.keep_best=true rollout=vllm algo=grpo model/lora=adapter",
        "stage.keep_best judges weights by how they play",
        "leave it out",
    ),
    ("stage=serve stage.lora_rank=8", "vLLM alone takes adapters while it serves", "install vLLM"),
    ("stage=ppo algo.kl_coef=0.1", "algo.kl_coef > 0 needs a reference policy", "add model/lora=adapter"),
    ("stage=ppo stage.iterations=0", "stage.iterations=0", "must be at least 1"),
    ("stage=ppo env.view=agnet", "env.view=agnet is not one of full, agent", "Did you mean 'agent'?"),
    ("stage=ppo env=MiniGrid-DoorKey-5x5-v0", "the id of an env", "write env.id=MiniGrid-DoorKey-5x5-v0"),
    ("stage=ppo env=vlm_agents/NumberLine-v0", "the id of an env", "write env=number_line"),
    ("stage=ppo model=Qwen/Qwen2.5-VL-3B-Instruct", "a path or a hub's id", "write model.path=Qwen/Qwen2.5-VL-3B"),
    ("stage=train", "stage=train: no such option", "stage=sft trains on data"),
    ("stage=ppo hardware=2", "hardware=2: no such option", "hardware.threads=2"),
    ("stage=ppo algo=qqq", "algo=qqq: no such option", "Options: bilevel_ppo"),
    ("stage=ppo experiment=empty_room", "no such option", "Options: empty_room/base, empty_room/collect"),
    ("stage=ppo model.lora=adapter", "model.lora: ", "Write model/lora=adapter"),
    ("stage=ppo lr=1e-3", "lr: no such setting", "algo.lr"),
    ("stage=ppo lora=adapter", "lora: no such setting", "Did you mean model/lora=...?"),
    ("ppo", "ppo: not of the form key=value", "stage=ppo?"),
    ("help", "help: not of the form key=value", "Did you mean --help?"),
    ("stage=ppo --help=all", "--help=all: --help takes no value", ""),
    ("stage ppo", "stage: not of the form key=value", "stage=<collect|doctor|"),
    ("stage=ppo name='a", "name='a: not of the form", "quotation mark isn't closed"),
    ("stage=ppo env.id=[a", "env.id=[a: not of the form", "[ isn't closed by a ]"),
    ("stage=ppo -cn nope", "no nope.yaml in", "leave -cn and -cp out"),
    ("stage=ppo -cn", "-cn takes a file of conf/", "config.yaml"),
    ("stage=ppo -cn env/echo", "-cn env/echo", "env=echo"),
    ("stage=ppo -cp nope", "-cp nope: no such folder", "with a config.yaml"),
    ("stage=ppo -cp .", "-cp .: there is no config.yaml", "stands for conf/"),
    ("stage=ppo --config-path=/dev/null", "--config-path /dev/null: no such folder", "with a config.yaml"),
    ("stage=ppo -cd nope", "-cd nope: no such folder", "groups of your own"),
    ("stage=ppo -cd . --config-dir=.", "--config-dir: one may be given", "takes several"),
    ("stage=ppo --cfg jbo", "--cfg jbo", "job, hydra or all"),
    ("stage=ppo --experimental-rerun x", "--experimental-rerun: no such flag", "key=value"),  # it reads a pickle
    ("-sc install=tcsh", "completion is for bash", "-sc install=bash"),
    ("stage=ppo env=minigird --help", "env=minigird: no such option", "Did you mean 'minigrid'?"),
    ("stage=ppo --mutlirun", "--mutlirun: no such flag", "Did you mean '--multirun'?"),
]


@pytest.mark.parametrize(("command", "what", "fix"), BAD, ids=[command for command, _, _ in BAD])
def test_bad_input_is_one_line_with_the_fix(cli, capsys, tmp_path: Path, command: str, what: str, fix: str) -> None:
    assert cli(*command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert what in err
    assert fix in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list((tmp_path / "outputs").glob("*")) or "name=" in command


@pytest.mark.parametrize("words", [["stage=ppo", "algo.lr=-1"], ["stage=pop"]], ids=["check", "composition"])
def test_debug_shows_the_traceback(cli, capsys, words: list[str]) -> None:
    assert cli("--debug", *words) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_a_real_process_exits_with_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlm_agents", "stage=collect", "stage.episdoes=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: stage.episdoes: no such setting. Did you mean 'stage.episodes'?\n"


def test_full_error_of_hydra_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlm_agents", "stage=pop"]
    environ = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_entry_point_is_the_module(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("vlm-agents")
    done = [
        subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for command in ([str(script)], [sys.executable, "-m", "vlm_agents"])
    ]
    assert done[0] == done[1]


def test_help_names_stages_groups_and_commands(cli, capsys) -> None:
    assert cli("--help") == 0
    text = capsys.readouterr().out
    for word in ("collect", "preprocess", "sft", "ppo", "eval", "minigrid", "cot_json", "tiny", "mlflow", "jsonl"):
        assert word in text
    assert text.count("python -m vlm_agents") == 3
    assert max(map(len, text.splitlines())) <= 120


def test_cfg_prints_the_composition(cli, capsys) -> None:
    assert cli("stage=ppo", "--cfg", "job", "algo.clip=0.3") == 0  # flags may stand anywhere
    assert "  clip: 0.3\n" in capsys.readouterr().out


def test_a_setting_of_deepspeed_needs_no_plus(cli, capsys) -> None:
    """No schema of ours lists them, so that Hydra alone would refuse it."""
    word = "hardware.deepspeed.zero_optimization.overlap_comm=true"
    assert cli("stage=ppo", "hardware=zero2", word, "--cfg", "job") == 0
    assert "  deepspeed:\n    zero_optimization:\n      overlap_comm: true\n" in capsys.readouterr().out


def test_a_run_says_how_to_continue_it(cli, capsys, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    assert cli("stage=eval", "tracking=jsonl") == 0
    first, last = capsys.readouterr().out.splitlines()
    (folder,) = (tmp_path / "outputs").iterdir()
    assert first == f"continue with: python -m vlm_agents stage=eval tracking=jsonl name={folder.name}"
    assert last.endswith(f"outputs/{folder.name}/eval")
    assert (folder / "eval/overrides").read_text() == "stage=eval\ntracking=jsonl\n"
    assert (folder / "eval/DONE").exists()


def test_a_folder_for_conf_and_one_beside_it_go_together(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    words = [f"--config-path={tmp_path}", f"--config-dir={tmp_path}", "stage=ppo"]
    assert check_flags(words) == words


@pytest.mark.parametrize("way", ["--config-dir={}", "hydra.searchpath=[file://{}]"])
def test_a_command_to_give_again_has_the_folder_of_ones_own_yaml(cli, capsys, as_stage, tmp_path: Path, way) -> None:
    as_stage(draw)
    (tmp_path / "mine/prompt").mkdir(parents=True)
    (tmp_path / "mine/prompt/terse.yaml").write_text("defaults: [action_only]\n")
    assert cli("stage=eval", "tracking=jsonl", "prompt=terse", way.format(tmp_path / "mine")) == 0
    first = capsys.readouterr().out.splitlines()[0].partition("vlm_agents ")[2]
    assert first.startswith(f"--config-dir={tmp_path}/mine stage=eval tracking=jsonl prompt=terse name=")
    assert cli(*first.split()) == 0
    assert "was finished before" in capsys.readouterr().out


def test_a_finished_run_says_so_and_is_left_alone(cli, capsys, as_stage, tmp_path: Path) -> None:
    """Killed between its last byte and its exit, it is no failure."""
    as_stage(draw)
    assert cli("stage=eval", "tracking=jsonl", "name=a") == 0
    assert "continue with" not in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*")}
    assert cli("stage=eval", "tracking=jsonl", "name=a") == 0
    said = capsys.readouterr()
    start = "eval was finished before: outputs/a/eval, with the weights the model's own: the shipped tiny ones. "
    assert said.out == f"{start}Nothing was done; another name= runs it again\n"
    assert said.err == ""
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*")} == before
    assert cli("stage=eval", "tracking=jsonl", "name=a", "seed=1") == 2
    assert "holds a run with seed=0, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("  show_actions: false\n", "prompt.show_actions=true"),
        ("  baselines: true\n", "stage.baselines=false"),
        ("    dropout: 0.0\n", "model.lora.dropout=0.1"),
    ],
)
def test_a_run_from_before_a_setting_goes_on(cli, as_stage, tmp_path: Path, line: str, other: str) -> None:
    as_stage(draw)
    words = ("stage=eval", "tracking=jsonl", "name=a", "model/lora=adapter")
    assert cli(*words) == 0
    config = tmp_path / "outputs/a/eval/config.yaml"
    said = config.read_text()
    assert line in said
    config.write_text(said.replace(line, ""))
    assert cli(*words) == 0
    assert cli(*words, other) == 2


def test_a_run_killed_in_front_of_its_end_is_finished(cli, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    assert cli("stage=eval", "tracking=jsonl", "name=a") == 0
    (tmp_path / "outputs/a/eval/DONE").unlink()
    assert cli("stage=eval", "tracking=jsonl", "name=a") == 0
    assert (tmp_path / "outputs/a/eval/DONE").exists()


def test_a_finished_run_with_a_damaged_summary_says_how_to_have_it_again(cli, capsys, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    sweep = ("stage=eval", "-m", "seed=3", "tracking=jsonl", "name=a")
    assert cli(*sweep) == 0
    (tmp_path / "multirun/a/eval/0/summary.json").write_bytes(b"{\xff")
    assert cli(*sweep) == 2
    assert "summary.json is unreadable: delete " in capsys.readouterr().err
    (tmp_path / "multirun/a/eval/0/DONE").unlink()  # the fix that the message names
    assert cli(*sweep) == 0
    assert json.loads((tmp_path / "multirun/a/eval/0/summary.json").read_text())["metrics"] == {"eval/success": 0.5}


def test_runs_without_a_name_that_start_together_have_each_a_directory(cli, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    for _ in range(3):  # within a second or two
        assert cli("stage=eval", "tracking=jsonl") == 0
    names = [path.name for path in (tmp_path / "outputs").iterdir()]
    assert len(names) == 3
    assert len({name.rpartition("_")[2] for name in names}) == 3  # by more than the second


@pytest.mark.parametrize("words", [["run_dir=mine/empty"], ["hydra.run.dir=mine/empty"], ["name=../mine/empty"]])
def test_a_refused_command_leaves_folders_alone(cli, as_stage, tmp_path: Path, words: list[str]) -> None:
    as_stage(draw)
    (tmp_path / "mine/empty/eval").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert cli("stage=eval", "tracking=jsonl", "stage.episodes=0", *words) == 2
    assert cli("-m", "stage=eval", "tracking=jsonl", "seed=1,2", *words) == 2
    assert [path for path in sorted(tmp_path.rglob("*")) if path.parts[-1] == "empty" or "mine" in path.parts] == before


def in_the_way(folder: Path) -> None:
    (folder / "outputs").touch()
    (folder / "multirun").touch()


def dead_links(folder: Path) -> None:
    (folder / "outputs").symlink_to("nowhere")
    (folder / "multirun").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("obstacle", "name", "fix"),
    [
        (in_the_way, "a", "A file or a dead link is where a folder should be: move it away"),
        (dead_links, "a", "A file or a dead link is where a folder should be: move it away"),
        (lambda folder: None, "a" * 300, "Choose a shorter name"),
    ],
)
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_directory_that_cannot_be_made_is_one_line(
    cli, capsys, as_stage, tmp_path: Path, obstacle, name: str, fix: str, sweep: list[str]
) -> None:
    as_stage(draw)
    obstacle(tmp_path)
    assert cli(*sweep, "stage=eval", "tracking=jsonl", f"name={name}") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: can't write ")
    assert err.endswith(f"{fix}\n")
    assert err.count("\n") == 1


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A command that collects for minutes, once it has begun to."""
    line = [sys.executable, "-m", "vlm_agents", "stage=collect", "env=echo", "tracking=jsonl", "name=a"]
    process = subprocess.Popen([*line, "stage.episodes=100000"], cwd=folder, stderr=subprocess.PIPE, text=True)
    while not (folder / "outputs/a/collect/episodes.jsonl").exists():
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_a_run_in_one_line(tmp_path: Path, number: int, status: int, word: str) -> None:
    process = started(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, f"{word}; the same command with the run's name= continues it\n")


def test_a_signal_while_modules_are_imported_ends_in_one_line(tmp_path: Path) -> None:
    """As if Ctrl-C came within the first tenths of a second: a module that is imported then sends it."""
    (tmp_path / "hydra.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    line = [sys.executable, "-m", "vlm_agents", "stage=eval"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command with the run's name= continues it\n")


def test_an_error_of_a_stage_is_one_line(cli, capsys, as_stage, tmp_path: Path) -> None:
    def stage(cfg: RunConfig, stage: StageConfig, run: Run) -> dict[str, float]:
        raise DataError("no data under outputs/a/collect:\n  run stage=collect name=a first")

    as_stage(stage)
    assert cli("stage=eval", "tracking=jsonl", "name=a") == 2
    assert capsys.readouterr().err == "error: no data under outputs/a/collect: run stage=collect name=a first\n"
    as_stage(draw)  # nothing was done yet, so other settings are no reason to refuse
    assert cli("stage=eval", "tracking=jsonl", "name=a", "seed=3") == 0


def test_a_bug_keeps_its_traceback(cli, as_stage) -> None:
    def stage(cfg: RunConfig, stage: StageConfig, run: Run) -> dict[str, float]:
        raise ValueError("a bug")

    as_stage(stage)
    with pytest.raises(ValueError, match="a bug"):  # so that Python prints it, and exits with 1
        cli("stage=eval", "tracking=jsonl")


def test_interrupt(cli, capsys, as_stage) -> None:
    def stage(cfg: RunConfig, stage: StageConfig, run: Run) -> dict[str, float]:
        raise KeyboardInterrupt

    as_stage(stage)
    assert cli("stage=eval", "tracking=jsonl", "name=a") == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_a_sweep_gives_each_job_its_directory(cli, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    assert cli("stage=eval", "-m", "seed=3,4", "tracking=jsonl", "name=a") == 0
    jobs = sorted((tmp_path / "multirun/a/eval").glob("*/summary.json"))
    assert [(path.parent.name, json.loads(path.read_text())["seed"]) for path in jobs] == [("0", 3), ("1", 4)]


def test_a_sweep_goes_on_where_it_was_stopped(cli, capsys, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    assert cli("stage=eval", "-m", "seed=3", "tracking=jsonl", "name=a") == 0
    assert cli("stage=eval", "-m", "seed=3,4", "tracking=jsonl", "name=a") == 0
    assert "eval was finished before: multirun/a/eval/0" in capsys.readouterr().out
    assert (tmp_path / "multirun/a/eval/1/DONE").exists()
    assert cli("stage=eval", "-m", "seed=5", "tracking=jsonl", "name=a") == 2
    assert "holds a run with seed=3, not 5" in capsys.readouterr().err


def test_the_command_of_a_job_runs_it_alone(cli, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    assert cli("stage=eval", "sweep=seeds", "tracking=jsonl", "name=a") == 0
    job = tmp_path / "multirun/a/eval/2"
    words = (job / "overrides").read_text().splitlines()
    assert "sweep=seeds" not in words
    assert cli(*words) == 0
    alone = tmp_path / "outputs/a/eval_2"
    assert (
        (alone / "metrics.jsonl").read_text() == (job / "metrics.jsonl").read_text() == '{"step": 1, "eval/seed": 2}\n'
    )


def test_an_odd_number_of_threads_is_left_out(cli, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for odd, said in (("two", True), ("99999", True), ("0", True), ("", False)):
        monkeypatch.setenv("OMP_NUM_THREADS", odd)
        assert cli("stage=pop") == 2
        assert capsys.readouterr().out.startswith(f"OMP_NUM_THREADS={odd} is left out" if said else "")
        assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "2, 1")
    assert cli("stage=pop") == 2
    assert os.environ["OMP_NUM_THREADS"] == "2, 1"


def test_the_jobs_of_a_sweep_share_no_directory(cli, capsys, as_stage) -> None:
    as_stage(draw)
    assert cli("stage=eval", "-m", "seed=3,4", "tracking=jsonl", "run_dir=mine") == 2
    assert "set hydra.sweep.dir=... for those of a sweep" in capsys.readouterr().err


def test_one_bad_job_stops_no_other(cli, capsys, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    assert cli("-m", "stage=eval", "seed=-1,4", "tracking=jsonl", "name=a") == 2
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if "error" in line.lower()] == [  # each once
        "error: seed=-1 must be at least 0",
        "error: 1 of 2 jobs of multirun/a/eval failed",
    ]
    assert (tmp_path / "multirun/a/eval/1/DONE").exists()


def test_a_ready_made_sweep_needs_no_flag(cli, as_stage, tmp_path: Path) -> None:
    as_stage(draw)
    assert cli("stage=eval", "sweep=seeds", "tracking=jsonl", "name=a") == 0
    assert len(list((tmp_path / "multirun/a/eval").glob("*/DONE"))) == 3


def test_help_of_a_run_lists_each_of_its_settings(
    cli, capsys, compose_run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it would be in that run, and though the run would be refused: learning rates aren't negative."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli("stage=ppo", "algo.lr=-1", "env=number_line", "--help", "name=a") == 0
    text = capsys.readouterr().out
    known = [name for name, _ in flat(asdict(compose_run("stage=ppo", "env=number_line")))]
    for name in known:
        assert f"  {name}=" in text
    assert f"  run_dir={tmp_path}/outputs/a/ppo\n" in text
    assert "  algo.lr=-1.0                      learning rate of the policy (>= 0)\n" in text
    assert "env=number_line: Walk from a number to another one" in text
    assert "off here: add" in text
    assert max(len(line) for line in text.splitlines() if "run_dir" not in line) <= 80
    assert not list(tmp_path.iterdir())


def test_help_of_a_sweep_is_that_of_its_first_run(cli, capsys) -> None:
    assert cli("-m", "stage=choice(eval,ppo)", "seed=range(3,5)", "algo.lr=1,2", "--help") == 2  # eval has no algo
    capsys.readouterr()
    assert cli("-m", "stage=choice(eval,ppo)", "seed=range(3,5)", "model.seed=1,2", "--help") == 0
    text = capsys.readouterr().out
    assert "stage=eval: " in text
    assert "  seed=3 " in text
    assert "algo=null how the policy learns from reward; off here: stage=ppo brings it in" in " ".join(text.split())


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from vlm_agents.__main__ import main; main(); assert not {'torch', 'PIL'} & set(sys.modules)"
    line = [sys.executable, "-c", code, "stage=ppo", "--help"]
    subprocess.run(line, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_versions_are_told_and_kept(cli, capsys, as_stage, tmp_path: Path) -> None:
    assert cli("--version") == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == ["vlm-agents", "torch", "transformers", "python"]
    as_stage(draw)
    assert cli("stage=eval", "tracking=jsonl", "name=a") == 0
    assert (tmp_path / "outputs/a/eval/versions").read_text() == told


@pytest.mark.parametrize("words", ["stage=ppo --help", "stage=ppo --cfg all", "stage=pop"])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, words: str) -> None:
    """As `| head` may; here the pipe has no reader from the start. 141 is what a shell says of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "vlm_agents", *words.split()]
    out, err = (None, writer) if words == "stage=pop" else (writer, subprocess.PIPE)
    done = subprocess.run(line, cwd=tmp_path, check=False, stdout=out, stderr=err)
    os.close(writer)
    assert (done.returncode, done.stderr or b"") == (141, b"")


def test_bash_completes_names_and_then_values(tmp_path: Path) -> None:
    """The script in a real bash, which has words begin after = as readline does."""
    folder = Path(sys.executable).parent
    tries = ["stage=ppo env.vi", "stage=ppo env.view=", "experiment=empty_room/pp"]
    asked = "; ".join(f"ask '{folder}/python -m vlm_agents {words}'" for words in tries)
    script = f"""eval "$({folder}/python -m vlm_agents -sc install=bash)"
ask() {{ COMP_LINE=$1 COMP_POINT=${{#1}}; read -ra COMP_WORDS <<< "$1"; _vlm_agents; echo "${{COMPREPLY[*]}}"; }}
{asked}; ask "python other.py stage="
"""
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["env.view=", "agent full", "empty_room/ppo", ""]
