"""An OpenAI-compatible server of a model as a process of ours: vLLM's, or that of transformers.

Knows how each is called, started and ended. Nothing of runs, or of what it is asked.
"""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm_agents.config import HardwareConfig, ServeConfig
from vlm_agents.errors import ConfigError
from vlm_agents.files import writing
from vlm_agents.processes import end, end_with_parent

NEEDED = ("fastapi", "openai", "torchvision", "uvicorn")  # by transformers serve, and not by us
OLDEST = (5, 23)  # of transformers: before, its server listed the models of the hub's cache, and not its own
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM can be told of
GRACE_S = 20.0  # for a server to end by itself


def vllm() -> str | None:
    """vLLM's command, beside this Python or on $PATH: it may have an environment of its own."""
    return shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")


def engine_of(stage: ServeConfig, hardware: HardwareConfig) -> str:
    """`vllm` or `transformers`; ConfigError where what is asked for can't be had here."""
    gpu = hardware.device != "cpu"
    if stage.engine == "vllm" or (stage.engine == "auto" and gpu and vllm()):
        if not vllm():
            raise ConfigError(
                "stage.engine=vllm: there is no command vllm beside this Python or on $PATH. pip install vllm, into an "
                "environment of its own as well, whose bin/ goes onto $PATH; or set stage.engine=transformers"
            )
        if hardware.device != "cuda":
            raise ConfigError(
                f"hardware.device={hardware.device}: vLLM takes the first GPU that it sees. Set hardware=gpu, and "
                "CUDA_VISIBLE_DEVICES before the command for another one; or set stage.engine=transformers"
            )
        if stage.lora_rank is not None and hardware.dtype == "float32":
            raise ConfigError("stage.lora_rank: vLLM has no adapters in float32: set hardware.dtype=bfloat16")
        return "vllm"
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if tuple(map(int, version("transformers").split(".")[:2])) < OLDEST:
        lacking.append("transformers>={}.{}".format(*OLDEST))
    if stage.lora_rank is not None:
        raise ConfigError(
            f"stage.lora_rank={stage.lora_rank}: vLLM alone takes adapters while it serves, and transformers would "
            "serve here: install vLLM and set hardware=gpu, or stage.lora_rank=null"
        )
    if lacking:
        where = "vLLM isn't installed" if gpu else "vLLM is for GPUs"
        raise ConfigError(
            f"no server for hardware.device={hardware.device}: {where}, and transformers serve lacks "
            f"{', '.join(lacking)}: pip install 'vlm-agents[serve]'"
        )
    if not stage.host.startswith("127."):
        raise ConfigError(
            f"stage.host={stage.host}: transformers serve demands no key, so it takes requests of this machine alone. "
            "Leave stage.host out, or install vLLM"
        )
    return "transformers"


def address_of(host: str) -> str:
    """`host`, or the address of this machine where that is `node`, by the name that Slurm has for it."""
    if host != "node":
        return host
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError:
        found = ""
    if not found or found.startswith("127."):
        raise ConfigError(
            f"stage.host=node: the name of this machine, {name}, leads {f'to {found}' if found else 'nowhere'}: set "
            "stage.host to its address that others reach"
        )
    return found


def port_of(host: str, port: int | None) -> int:
    """A free port of that address: `port`, else any. ConfigError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"stage.port={port} of {host} is taken by another process: end that, or leave stage.port out, "
                    "which takes one that is free"
                ) from error
            raise ConfigError(
                f"stage.host={host} stage.port={port}: no server may listen there ({error.strerror or error}). "
                "Leave them out, or set an address of this machine"
            ) from error
        return probe.getsockname()[1]


def command_of(
    engine: str, source: str, host: str, port: int, hardware: HardwareConfig, options: Mapping[str, Any] | None
) -> list[str]:
    """The words that start the server; the model's name is `source`, a folder or hub id."""
    words = {"host": host, "port": port, "dtype": hardware.dtype}
    if engine == "vllm":
        begin = [vllm() or "vllm", "serve", source]
        words |= {"served-model-name": source, "load-format": "safetensors"}  # no pickle
    else:
        begin = [sys.executable, "-u", "-m", "transformers.cli.transformers", "serve", source]
        words |= {"device": hardware.device}
    words |= {name.replace("_", "-"): value for name, value in (options or {}).items()}
    return [*begin, *(part for name, value in words.items() for part in option(name, value))]


def adapter_options(rank: int | None) -> dict[str, Any]:
    """Options of vLLM with which it takes adapters up to this rank, and says under which log-probs it sampled."""
    if rank is None:
        return {}
    most = next(one for one in RANKS if one >= rank)
    return {"enable-lora": True, "max-lora-rank": most, "logprobs-mode": "processed_logprobs"}


def option(name: str, value: Any) -> list[str]:
    """One option as a command line has it: true and false are flags, and null leaves it out."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]


@contextmanager
def running(words: Sequence[str], environ: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, for as long as the block lasts; what it says is appended to `log`.

    It and what it starts have a process group of their own, so that what a terminal sends comes through us alone, and
    nothing is left of them in the end. Where we are killed (SIGKILL), Linux sends it SIGTERM.
    """
    with writing(log), open(log, "ab") as file:
        process = subprocess.Popen(
            words,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=prepare,
        )
    try:
        yield process
    finally:
        end([process], GRACE_S)


def prepare() -> None:
    """Called in the new process, before it is the server."""
    end_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # by which Slurm tells all processes of a job that it will be over


def last_words(log: Path, start: int, count: int) -> list[str]:
    """The last `count` lines that stand in `log` behind byte `start`."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]
