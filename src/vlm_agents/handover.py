"""How a run finds the server that a stage=serve started: by a file in the run directory of that one.

Knows the file, and whether the server that it names answers. Nothing of how one is started, or of what it is asked.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from vlm_agents.config import CollectConfig, EndpointConfig, EvalConfig, PpoConfig, RemoteConfig, RunConfig, command
from vlm_agents.errors import ConfigError, DataError, ModelError
from vlm_agents.files import atomic_write
from vlm_agents.progress import duration, say, under_way

FILE = "server.json"
LOOK_S = 1.0  # between two looks at whether it answers
ANSWER_S = 5.0  # for one answer


@dataclass(frozen=True, slots=True)
class Served:
    """A server: where it is, what it serves, and the key that it demands, None for none."""

    url: str  # up to and with /v1
    model: str
    weights: str  # a hash of the files that it read; empty for what came from the hub
    key: str | None
    engine: str
    host: str
    pid: int  # on that host
    job: str | None  # of Slurm
    since: str

    def answers(self) -> bool:
        """Does it list its model, now? Another server may have its port by now. No proxy is asked."""
        parts = urlsplit(self.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=ANSWER_S)
        try:
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            connection.request("GET", f"{parts.path}/models", headers=headers)
            answer = connection.getresponse()
            listed = json.load(answer)["data"] if answer.status == 200 else []
            return self.model in [one["id"] for one in listed]
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            return False
        finally:
            connection.close()

    @property
    def gone(self) -> bool:
        """Has its process surely ended? That of another machine can't be looked at."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


@contextmanager
def handed_over(path: Path, served: Served) -> Iterator[None]:
    """Have the file say for as long as the block lasts where the server is, to this user alone."""
    try:
        atomic_write(path, json.dumps(asdict(served), indent=2) + "\n", mode=0o600)
        yield
    finally:
        path.unlink(missing_ok=True)


def find(remote: EndpointConfig) -> Served:
    """The server of `remote`, whose url is auto, once it answers. ModelError where it doesn't within `wait_s`."""
    end, told = time.monotonic() + remote.wait_s, ""
    with under_way(f"waiting for the server of stage=serve name={remote.server}"):
        while isinstance(found := look(remote), str):
            if time.monotonic() >= end:
                raise ModelError(f"{found}. Waited for {duration(remote.wait_s)}; {remote.place}.wait_s says how long")
            if found != told:
                say(f"{found}. Waits for it, {duration(remote.wait_s)} at most")
                told = found
            time.sleep(min(LOOK_S, max(0.0, end - time.monotonic())))
    return found


def look(remote: EndpointConfig) -> Served | str:
    """The server of that name, or run directory, if it answers; else what is wrong with it, and the fix."""
    server, place = remote.server, remote.place
    places = places_of(server)
    there = [served for place in places if (served := read(place / FILE))]
    if not there:
        word = "run_dir" if len(Path(server).parts) > 1 else "name"
        start = command(["stage=serve", f"{word}={server}", "model=...", *remote.needs])
        return f"no server is up under {places[0]}: start one in another terminal or job, by {start}"
    served = max(there, key=lambda served: served.since)
    if served.host != socket.gethostname() and (urlsplit(served.url).hostname or "").startswith("127."):
        raise ConfigError(
            f"the server of {place}.server={server} takes requests on {served.host} alone: start it with "
            "stage.host=node, or this run there"
        )
    if served.answers():
        return served
    job = f", Slurm job {served.job}" if served.job else ""
    if served.gone:
        return f"the server of {server} has ended (process {served.pid} on {served.host}{job}): start it again"
    return f"the server of {server} doesn't answer at {served.url} (on {served.host}{job}): start it again"


def places_of(server: str) -> list[Path]:
    """The run directories where a server of that name, or run directory, would be; a sweep's jobs too."""
    if len(Path(server).parts) > 1:
        return [Path(server)]
    return [Path("outputs", server, "serve"), *sorted(Path("multirun", server, "serve").glob("*"))]


def read(path: Path) -> Served | None:
    """What the file says; None where there is none."""
    try:
        return Served(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise DataError(f"{path} is another user's: start a server of your own by stage=serve") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} names no server: delete it, and start stage=serve again") from error


def with_model(cfg: RunConfig) -> RunConfig:
    """`cfg` with the names of the models that servers give them, where `url=auto` leaves that open: waits for those."""
    for name, remote in asked(cfg).items():
        if remote.unnamed:
            named = replace(remote, model=find(remote).model)
            cfg = replace(cfg, **{name: replace(getattr(cfg, name), remote=named)})
    return cfg


def asked(cfg: RunConfig) -> dict[str, RemoteConfig]:
    """The servers that have a part in this run, by where they are set: one plays or rates, one judges."""
    stage, servers = cfg.stage, dict[str, RemoteConfig]()
    if isinstance(stage, CollectConfig | EvalConfig) and "remote" in (stage.policy, getattr(stage, "rater", None)):
        servers["stage"] = stage.remote
    if isinstance(stage, CollectConfig | EvalConfig | PpoConfig) and cfg.referee.name == "server":
        servers["referee"] = cfg.referee.remote
    return servers
