"""A model served to other runs: a labeller, a judge, or one that was trained here. It trains and plays nothing.

Its run is never finished, so that the same command starts the server again. A Slurm job whose time is over does so too,
once it is queued again.
"""

import hashlib
import os
import secrets
import socket
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

from vlm_agents.config import RunConfig, ServeConfig
from vlm_agents.errors import ModelError
from vlm_agents.handover import FILE, LOOK_S, Served, handed_over, places_of
from vlm_agents.inputs import hashes
from vlm_agents.models.sources import source_of
from vlm_agents.progress import duration, say, under_way
from vlm_agents.run import Run
from vlm_agents.server import adapter_options, address_of, command_of, engine_of, last_words, port_of, running
from vlm_agents.weights import init_folder

LOG = "server.log"
SHOWN = 15  # lines of a dead server's log


def main(cfg: RunConfig, stage: ServeConfig, run: Run) -> dict[str, float]:
    source, engine, host = source_for(cfg, stage), engine_of(stage, cfg.hardware), address_of(stage.host)
    port = port_of(host, stage.port)
    key = secrets.token_urlsafe(32) if engine == "vllm" else None
    options = adapter_options(stage.lora_rank) | (stage.options or {})
    words = command_of(engine, source, host, port, cfg.hardware, options)
    environ = os.environ | ({"VLLM_API_KEY": key} if key else {})  # in `words` all users of the machine could read it
    environ |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if stage.lora_rank is not None else {}
    environ |= {"OMP_NUM_THREADS": str(cfg.hardware.threads)}
    files = hashes(sorted(Path(source).glob("*")))  # none of what lies in the hub's cache
    weights = hashlib.sha256(" ".join(files.values()).encode()).hexdigest()[:32] if files else ""
    log = run.path(LOG)
    run.path(FILE).unlink(missing_ok=True)  # of a server that was killed
    run.begin()
    start, begun = log.stat().st_size if log.exists() else 0, time.monotonic()
    with running(words, environ, log) as process:
        served = Served(
            url=f"http://{host}:{port}/v1",
            model=source,
            weights=weights,
            key=key,
            engine=engine,
            host=socket.gethostname(),
            pid=process.pid,
            job=os.environ.get("SLURM_JOB_ID"),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        with under_way(f"loading {source} into {engine}, see {os.path.relpath(log)}"):
            while not served.answers():
                wait(run, process, start, f"before it served {source}")
        metrics = {"serve/loading_s": time.monotonic() - begun}
        run.log(0, metrics)
        begun = time.monotonic()
        with handed_over(run.path(FILE), served):
            say(f"{engine} serves {source} at {served.url}: other runs ask it by {words_for(cfg, stage)}")
            while not (why := over(stage, begun)):
                wait(run, process, start, f"after {duration(time.monotonic() - begun)}")
    say(f"the server has ended: {why}")
    metrics["serve/served_s"] = time.monotonic() - begun
    run.log(0, metrics)
    return metrics


def source_for(cfg: RunConfig, stage: ServeConfig) -> str:
    """The folder, from its root, or hub id that is served; servers call the model so too."""
    source = str(init_folder(stage.init)) if stage.init else str(source_of(cfg.model))
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def over(stage: ServeConfig, begun: float) -> str:
    """Why the server shall end now; empty while it shall not."""
    if stage.until and (Path(stage.until) / "DONE").exists():
        return f"{stage.until} is finished"
    if stage.minutes is not None and time.monotonic() >= begun + 60 * stage.minutes:
        return f"stage.minutes={stage.minutes:g} are over"
    return ""


def wait(run: Run, process: subprocess.Popen[bytes], start: int, when: str) -> None:
    """For a moment, while the server is up. Stopped where the run was asked to stop; ModelError where the server has
    ended by itself, after the last lines that it left in its log behind byte `start`."""
    if run.asked_to_stop():
        run.stop()
    status = process.poll()
    if status is None:
        time.sleep(LOOK_S)
        return
    log = run.path(LOG)
    lines = last_words(log, start, SHOWN)
    for line in lines:
        say(line)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    last = f" ({lines[-1].strip()})" if lines else ""
    raise ModelError(
        f"the server {how} {when}{last}: mend what the end of {os.path.relpath(log)} tells, then start again"
    )


def words_for(cfg: RunConfig, stage: ServeConfig) -> str:
    """The settings by which another run finds the server."""
    own = Path(cfg.run_dir).resolve()
    name = cfg.name if own in [place.resolve() for place in places_of(cfg.name)] else os.path.relpath(own)
    part = "stage" if stage.lora_rank is None else "rollout"
    return f"{part}.remote.url=auto {part}.remote.server={name}"
