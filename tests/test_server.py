"""A server as a process: which one, by which words, and that nothing is left of it."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from vlm_agents.config import HardwareConfig, ServeConfig
from vlm_agents.errors import ConfigError
from vlm_agents.server import NEEDED, adapter_options, address_of, command_of, engine_of, last_words, port_of, running

CPU, GPU = HardwareConfig("cpu"), HardwareConfig("gpu", device="cuda", dtype="bfloat16")


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command of that name, in the only folder of $PATH."""
    path = tmp_path / "bin/vllm"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    return path


def test_vllm_takes_adapters_while_it_serves(vllm: Path):
    words = command_of("vllm", "org/model", "10.0.0.1", 8000, GPU, adapter_options(12))
    assert words[-5:] == ["--enable-lora", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs"]
    assert adapter_options(None) == {}


def test_vllm_serves_on_a_gpu_where_it_is_installed(vllm: Path):
    assert engine_of(ServeConfig(host="node"), GPU) == "vllm"
    options = {"tensor_parallel_size": 4, "limit-mm-per-prompt": {"image": 8}, "enforce-eager": True, "dtype": "auto"}
    words = command_of("vllm", "org/model", "10.0.0.1", 8000, GPU, options)
    assert words[:3] == [str(vllm), "serve", "org/model"]
    assert dict(zip(words[3:-3:2], words[4:-3:2], strict=True)) | {"--limit-mm-per-prompt": words[-2]} == {
        "--host": "10.0.0.1",
        "--port": "8000",
        "--dtype": "auto",
        "--served-model-name": "org/model",
        "--load-format": "safetensors",
        "--tensor-parallel-size": "4",
        "--limit-mm-per-prompt": '{"image": 8}',
    }
    assert words[-1] == "--enforce-eager"


def test_transformers_serves_else():
    words = command_of("transformers", "/m", "127.0.0.1", 8000, CPU, {"compile": False, "quantization": None})
    assert words[:6] == [sys.executable, "-u", "-m", "transformers.cli.transformers", "serve", "/m"]
    settings = ["--host", "127.0.0.1", "--port", "8000", "--dtype", "float32", "--device", "cpu", "--no-compile"]
    assert words[6:] == settings


def test_what_cannot_be_had_is_told(vllm: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"hardware.device=cpu: vLLM takes .* Set hardware=gpu"):
        engine_of(ServeConfig(engine="vllm"), CPU)
    vllm.unlink()
    with pytest.raises(ConfigError, match=r"no command vllm beside this Python or on \$PATH"):
        engine_of(ServeConfig(engine="vllm"), GPU)
    monkeypatch.setattr("vlm_agents.server.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"lacks {', '.join(NEEDED)}: pip install 'vlm-agents\[serve\]'"):
        engine_of(ServeConfig(), CPU)
    monkeypatch.setattr("vlm_agents.server.find_spec", lambda name: name)
    assert engine_of(ServeConfig(), GPU) == "transformers"
    with pytest.raises(ConfigError, match=r"stage.host=node: transformers serve demands no key"):
        engine_of(ServeConfig(host="node"), CPU)
    monkeypatch.setattr("vlm_agents.server.version", lambda name: "5.22.0")  # doesn't list what it serves
    with pytest.raises(ConfigError, match=r"lacks transformers>=5.23: pip install"):
        engine_of(ServeConfig(), CPU)


def test_addresses_and_ports(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    with pytest.raises(ConfigError, match=r"name of this machine, localhost, leads to 127\.0\.0\.1: set stage.host"):
        address_of("node")
    assert address_of("10.1.2.3") == "10.1.2.3"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"stage.port={port} of 127.0.0.1 is taken by another process"):
            port_of("127.0.0.1", port)
        assert port_of("127.0.0.1", None) not in (0, port)
    with pytest.raises(ConfigError, match="no server may listen there"):
        port_of("192.0.2.1", None)  # of a network for documents


@pytest.mark.parametrize("host", ["0.0.0.0", "a b", ""])
def test_an_address_is_one(host: str):
    with pytest.raises(ConfigError, match="must be one address of this machine"):
        ServeConfig(host=host)


def test_options_that_are_ours_are_refused():
    for name, why in {"api_key": "a new one", "trust-remote-code": "isn't run", "port": "set stage.port"}.items():
        with pytest.raises(ConfigError, match=f"stage.options can't have {name}: .*{why}"):
            ServeConfig(options={name: 1})


def test_nothing_is_left_of_a_server(tmp_path: Path):
    """Not even what it has started, which it leaves behind when it is told to end."""
    log = tmp_path / "log"
    log.write_text("of before\n")
    start = log.stat().st_size
    with running(["sh", "-c", "sleep 100 & echo $!; wait"], os.environ, log) as process:
        while not (told := last_words(log, start, 3)):
            time.sleep(0.01)
    assert process.poll() is not None
    end = time.monotonic() + 5
    while alive(int(told[0])) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(int(told[0]))
    assert log.read_text().startswith("of before\n")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"  # nobody may have buried it yet
    except (FileNotFoundError, ProcessLookupError):
        return False
