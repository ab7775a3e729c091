"""stage=serve, over a command that has vLLM's words and serves nothing but its list of models, to who has the key."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vlm_agents import stages, stopping
from vlm_agents.config import RunConfig
from vlm_agents.errors import ConfigError, ModelError
from vlm_agents.handover import Served
from vlm_agents.models.adapters import SHIPPED
from vlm_agents.run import Run
from vlm_agents.snapshot import settled
from vlm_agents.stages import serve

VLLM = """#!/usr/bin/python3 -S
import http.server, json, os, sys
words = dict(zip(sys.argv[3::2], sys.argv[4::2]))
print("loading", sys.argv[2], flush=True)
if "--crash" in words:
    sys.exit("CUDA out of memory")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if known and self.path == "/v1/models" else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": words["--served-model-name"]}]}).encode())
http.server.HTTPServer((words["--host"], int(words["--port"])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/vllm").write_text(VLLM.replace("/usr/bin/python3", sys.executable))
    (tmp_path / "bin/vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(serve, "LOOK_S", 0.02)


def run(cfg: RunConfig) -> dict[str, float]:
    with Run.open(cfg, ["stage=serve"]) as opened:
        return stages.main(cfg, opened)


def test_it_hands_itself_over_until_the_run_that_it_serves_is_finished(
    tmp_path: Path, compose_run: Callable[..., RunConfig]
):
    other, file = tmp_path / "other", tmp_path / "run/server.json"
    cfg = compose_run("stage=serve", "hardware.device=cuda", f"stage.until={other}")
    other.mkdir()
    seen: list[Served] = []

    def ask() -> None:
        while not file.exists():
            time.sleep(0.01)
        seen.append(Served(**json.loads(file.read_text())))
        try:
            assert seen[-1].answers()
            assert not replace(seen[-1], key="another").answers()
            assert not replace(seen[-1], model="another").answers()
            asked.set()
        finally:
            (other / "DONE").touch()

    asked = threading.Event()
    for _ in range(2):  # it is never finished itself: the same command starts it again
        (other / "DONE").unlink(missing_ok=True)
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        metrics = run(cfg)
        asking.join()
        assert asked.is_set()
        asked.clear()
        assert not file.exists()
        assert not seen[-1].answers()
        assert metrics["serve/loading_s"] > 0 < metrics["serve/served_s"]
    first, second = seen
    assert first.model == str(SHIPPED)
    assert (first.weights, len(first.weights)) == (second.weights, 32)
    assert first.key != second.key
    written = [path.read_text() for path in (tmp_path / "run").iterdir()]
    assert not any(str(first.key) in text for text in written)
    assert (tmp_path / "run/server.log").read_text().count("loading") == 2


def test_it_ends_after_its_minutes(tmp_path: Path, compose_run: Callable[..., RunConfig], capsys):
    words = ("stage=serve", "hardware.device=cuda", "stage.minutes=0.001")
    assert 0.06 <= run(compose_run(*words))["serve/served_s"] < 5  # 0.001 min are 0.06 s
    assert "stage.remote.url=auto stage.remote.server=" in capsys.readouterr().err


def test_it_ends_when_it_is_asked_to(tmp_path: Path, compose_run: Callable[..., RunConfig]):
    """As by Slurm, whose job then starts it again elsewhere."""
    file = tmp_path / "run/server.json"

    def ask() -> None:
        while not file.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    cfg = compose_run("stage=serve", "hardware.device=cuda", "stage.minutes=0.05")  # 3 s, which it doesn't wait for
    threading.Thread(target=ask, daemon=True).start()
    with stopping.heeded(), pytest.raises(stopping.Stopped):
        run(cfg)
    assert not file.exists()


def test_a_server_that_dies_is_told_with_the_end_of_its_log(
    tmp_path: Path, compose_run: Callable[..., RunConfig], capsys
):
    words = ("stage=serve", "hardware.device=cuda")
    with pytest.raises(ModelError, match=r"ended with status 1 before .*\(CUDA out of memory\): .*server.log"):
        run(compose_run(*words, "stage.options={crash: 1}"))
    assert "loading /" in capsys.readouterr().err
    assert "CUDA out of memory" in (tmp_path / "run/server.log").read_text()
    assert not (tmp_path / "run/server.json").exists()
    run(compose_run(*words, "model.temperature=0.9", "stage.minutes=0.001"))  # it may be corrected


def test_what_no_server_knows_is_refused(tmp_path: Path, compose_run: Callable[..., RunConfig]):
    for words, message in (
        (["model.weights=random"], "a server reads a folder"),
        (["model.image_processor={max_pixels: 9}"], "model.image_processor isn't known to servers"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_run("stage=serve", *words)


def test_auto_serves_what_was_merged_before_what_was_trained(
    tmp_path: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    cfg = compose_run("stage=serve")
    assert settled(cfg).stage.init is None  # pyright: ignore[reportAttributeAccessIssue]
    for stage in ("sft", "ppo", "merge"):
        folder = tmp_path / "outputs/test" / stage
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("seed: 0\n")
        (folder / "DONE").touch()
        cfg = compose_run("stage=serve", "stage.init=auto")
        assert cfg.stage.init == f"outputs/test/{stage}"  # pyright: ignore[reportAttributeAccessIssue]
