"""What is refused before torch is imported: one line each, and nothing left behind. Wrong settings are in test_cli."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_agents import preflight
from vlm_agents.errors import ConfigError, DataError, ModelError, VlmAgentsError
from vlm_agents.models.sources import TINY

COMMAND = """
import sys
from vlm_agents.command_line import run
status = run(["vlm_agents", *sys.argv[1:]])
print(status, {"torch", "transformers", "mlflow"} & set(sys.modules) or "light")
"""
HUB = """
import sys
from vlm_agents.models import sources
sources.HUB_WAIT_S = 0.3
try:
    sources.check_source(sys.argv[1])
    from huggingface_hub import is_offline_mode
    print("taken", is_offline_mode())
except Exception as error:
    print(type(error).__name__, error)
"""


def python(folder: Path, code: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=settings, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=eval", "env=minigrid", "env.id=MiniGrid-DorKey-6x6-v0"], "Did you mean 'MiniGrid-DoorKey-6x6-v0'"),
        (["-m", "seed=0,1", "stage=merge", "stage.init=nowhere"], "stage.init=nowhere holds no model"),
    ],
)
def test_told_without_torch_and_nothing_is_left(tmp_path: Path, words: list[str], said: str):
    done = python(tmp_path, COMMAND, *words)
    assert done.stdout.splitlines()[-1] == "2 light"
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_each_choice_is_looked_at(compose_run, tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    shutil.copytree(TINY, tmp_path / "bare")
    (tmp_path / "bare/model.safetensors").unlink()
    (tmp_path / "rows.jsonl").touch()
    ppo = ("stage=ppo", "env=echo")
    questions = ("env=visual_search", "prompt=tool_call", f"env.data=[{tmp_path / 'rows.jsonl'}]")
    wrong: list[tuple[type[VlmAgentsError], str, tuple[str, ...]]] = [
        (DataError, "is no list of records", ("stage=preprocess", f"stage.data=[{tmp_path / 'x.json'}]")),
        (
            DataError,
            f"name the files in it.*stage.data=.{tmp_path / 'x.json'}",
            ("stage=preprocess", f"stage.data=[{tmp_path}]"),
        ),
        (DataError, "no nowhere/train.parquet: it is written by", ("stage=sft", "stage.data=nowhere")),
        (ConfigError, "no GPU here", (*ppo, "hardware.device=cuda")),
        (ModelError, "there is no such folder", (*ppo, "model.path=/no/where")),
        (ModelError, "model.safetensors is missing", (*ppo, f"model.path={tmp_path / 'bare'}")),
        (
            ModelError,
            "adapter_model.safetensors is missing",
            (*ppo, f"stage.init={tmp_path / 'adapter'}", "model/lora=adapter"),
        ),
        (
            ConfigError,
            "adapter is an adapter, and a whole model is served: give first python -m vlm_agents stage=merge name=test",
            ("stage=serve", f"stage.init={tmp_path / 'adapter'}"),
        ),
        # the tiny model has positions for 4096 tokens; a prompt has one at least
        (ConfigError, "that is 4097 tokens", (*ppo, "prompt.max_reply_tokens=4096")),
        (ConfigError, "stage.prompt_tokens=5000 and", ("stage=doctor", "env=echo", "stage.prompt_tokens=5000")),
        (
            ConfigError,
            "Dynamic-Obstacles-5x5-v0 has no expert: set stage.policy=model or random, or env.expert=",
            ("stage=eval", "stage.policy=expert", "env.id=MiniGrid-Dynamic-Obstacles-5x5-v0"),
        ),
        (
            ConfigError,
            "Dynamic-Obstacles-5x5-v0 has no expert: set stage.rater=none, or env.expert=",
            ("stage=collect", "stage.policy=random", "env.id=MiniGrid-Dynamic-Obstacles-5x5-v0"),
        ),
        (
            ConfigError,
            "VisualSearch-v0 has no expert: set stage.policy=model, or env.expert=",
            ("stage=eval", "stage.policy=expert", *questions),
        ),
        (
            ConfigError,
            "VisualSearch-v0 has no expert: set stage.policy=model stage.rater=none, or env.expert=",
            ("stage=collect", "stage.noise=0", *questions),
        ),
        (
            ConfigError,
            "Dynamic-Obstacles-5x5-v0 has no expert: set algo.utility_share=0, or env.expert=",
            ("stage=ppo", "algo.utility_share=0.5", "env.id=MiniGrid-Dynamic-Obstacles-5x5-v0"),
        ),
    ]
    for kind, said, words in wrong:
        with pytest.raises(kind, match=said):
            preflight.check(compose_run(*words))


def test_weights_of_another_architecture(compose_run, tmp_path: Path):
    """As another folder's config.json has it; an adapter's is that of its base, of which its loader says what lacks."""
    other = shutil.copytree(TINY, tmp_path / "other")
    other.joinpath("config.json").write_text('{"model_type": "llava_next"}')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(other)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    kind = "has weights of model_type=llava_next, and model=tiny is one of qwen2_5_vl: set model= to .* model.path="
    for init in (other, adapter):
        with pytest.raises(ConfigError, match=kind):
            preflight.check(compose_run("stage=ppo", "env=echo", f"stage.init={init}"))
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/no/where"}))
    with pytest.raises(ModelError, match="was trained on /no/where, which isn't there: put it back"):
        preflight.check(compose_run("stage=ppo", "env=echo", f"stage.init={adapter}"))


def test_weights_are_looked_at_until_a_checkpoint_has_some(compose_run, tmp_path: Path):
    """Whatever else the run has done; and from a folder where a relative stage.init leads nowhere."""
    cfg = compose_run("stage=ppo", "env=echo", "stage.init=nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"stage\.init=nowhere holds no model"):
        preflight.check(cfg)
    (tmp_path / "run/checkpoints/step_000001").mkdir(parents=True)
    preflight.check(cfg)


def test_what_a_choice_does_not_need_is_not_asked_for(compose_run):
    """A scripted policy has no model and no device, the doctor says itself what lacks."""
    preflight.check(compose_run("stage=eval", "env=echo", "stage.policy=expert", "model.path=/no", "hardware=gpu"))
    preflight.check(compose_run("stage=doctor", "env=echo", "hardware=gpu", "model=qwen2_5_vl_3b"))


def test_a_disk_that_surely_is_too_small(compose_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tiny model has 1.7 M numbers of 4 bytes; nothing is trained but its language part, so optimizer states aren't
    counted. Two checkpoints, a third while it is written: 20 MB."""
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((30 << 20, True), (10 << 20, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        cfg = compose_run("stage=ppo", "env=echo")
        if fits:
            preflight.check(cfg)
            continue
        with pytest.raises(DataError, match=r"model and checkpoints take 19 MiB at least, and 10 MiB are free there"):
            preflight.check(cfg)
    preflight.check(compose_run("stage=ppo", "env=echo", "model/lora=adapter"))  # adapters are small


# ---- the hub ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A home of the hub's cache with a whole model a/b in it, and c/d, of which only config.json has come."""
    for name, files in (("models--a--b", None), ("models--c--d", ["config.json"])):
        model = tmp_path / "hf/hub" / name
        (model / "refs").mkdir(parents=True)
        (model / "refs/main").write_text("0" * 40)
        snapshot = model / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        for path in filter(Path.is_file, TINY.iterdir()):
            if files is None or path.name in files:
                shutil.copy(path, snapshot)
    return tmp_path / "hf"


def test_a_hub_that_is_out_of_reach(cache: Path, tmp_path: Path):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.socket() as closed,
    ):  # one takes calls, and says nothing
        closed.bind(("127.0.0.1", 0))
        for server in (silent, closed):
            place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(cache)}
            online = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}
            done = python(tmp_path, HUB, "e/f", **place, **online)
            assert "ModelError model e/f can't be loaded: no such folder, not in the hub's cache" in done.stdout
            assert "can't be reached (" in done.stdout
            assert "(hf download e/f --local-dir FOLDER), and set model.path=FOLDER" in done.stdout
        done = python(tmp_path, HUB, "a/b", **place, **online)
        assert done.stdout == "taken True\n", done.stderr  # and the files themselves aren't asked for anew
        assert "taking the copy of a/b in its cache" in done.stderr
    done = python(tmp_path, HUB, "c/d", HF_HOME=str(cache))
    assert "not in the hub's cache, and HF_HUB_OFFLINE is set" in done.stdout  # its weights aren't


def test_a_name_under_which_nothing_has_run(tmp_path: Path):
    done = tmp_path / "outputs/mine/collect/DONE"
    done.parent.mkdir(parents=True)
    done.touch()
    for words, hint in ((["name=mien"], "Did you mean 'mine'? "), ([], "")):
        told = python(tmp_path, COMMAND, "stage=preprocess", *words)
        assert told.stdout.splitlines()[-1] == "2 light"
        assert told.stderr.endswith(f"that has its stage=collect done. {hint}There are: mine\n")
