"""The examples, as docs/extending.md has them: every command of that page is run, and the pieces train a model."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_agents.chats import read_chats
from vlm_agents.config import conf_dir
from vlm_agents.episodes import read_episodes

ROOT = conf_dir().parent
PAGE = (ROOT / "docs/extending.md").read_text()
COMMANDS = re.findall(r"^ *python -m (vlm_agents .*)$", PAGE, re.MULTILINE)
OWN = (
    "env=custom",
    "env.factory=examples.own_env:make",
    "env.expert=examples.own_expert:Guide",
    "prompt=custom",
    "prompt.factory=examples.own_prompt:Lines",
    "prompt.max_reply_tokens=8",
)
RunStage = Callable[..., Path]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_the_page_names_it(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    assert f"../examples/{path.name}" in PAGE
    assert f"examples.{path.stem}:" in (ROOT / "examples/README.md").read_text()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: shlex.split(command)[-1])
def test_every_command_of_the_page_runs(
    command: str, cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported everything."""
    monkeypatch.chdir(ROOT)
    assert cli(*shlex.split(command)[1:], f"run_dir={tmp_path / 'run'}", "name=a", "tracking=jsonl") == 0
    assert len(list(read_episodes(tmp_path / "run"))) == 4


def test_the_page_has_a_command_for_each_thing() -> None:
    words = ("gymnasium", "factory", "expert", "-dir")
    assert [sum(word in command for command in COMMANDS) for word in words] == [1, 5, 1, 1]


def test_own_env_expert_and_format_go_through_the_stages(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    played, chats, trained = (tmp_path / name for name in ("collect", "preprocess", "ppo"))
    few = ("stage.episodes=4", "stage.num_envs=2")
    run_stage(played, "stage=collect", *OWN, *few, "stage.noise=0", "env.workers=true")
    episodes = list(read_episodes(played))
    assert all(episode.success and episode.env == "Corridor" for episode in episodes)
    assert re.fullmatch(r"Because: red \d, green \d, so (left|right)\nDo: \1", episodes[0].turns[0].reply.text)
    run_stage(chats, "stage=preprocess", *OWN, f"stage.data=[{played}]")
    rows = list(read_chats(chats / "train.parquet"))
    assert len(rows) == sum(len(episode.turns) for episode in episodes)
    run_stage(trained, "stage=ppo", *OWN, *few, "stage.init=null", "stage.iterations=1", "stage.eval_episodes=2")
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    assert metrics["eval/success_expert"] == 1.0
    assert metrics["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-4)


def test_what_is_imported_comes_from_the_working_directory(tmp_path: Path) -> None:
    """`vlm-agents`, the script, has another folder first in its path than `python -m` has."""
    (tmp_path / "lake.py").write_text((ROOT / "examples/own_env.py").read_text())
    code = "import sys; sys.path.pop(0); from vlm_agents.command_line import run; sys.exit(run(['', *sys.argv[1:]]))"
    words = ["stage=eval", "stage.policy=random", "stage.episodes=2", "stage.num_envs=1", "tracking=jsonl", "name=a"]
    words += ["env=custom", "env.factory=lake:make", "env.workers=true"]
    line = [sys.executable, "-c", code, *words]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
