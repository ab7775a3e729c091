"""Where a tracker's copy goes: MLflow, TensorBoard or Weights & Biases, each behind the same few calls.

Knows no threads and no queue, those are the tracker's. Each package is imported when its backend is made. A call may
raise whatever the package raises, and is then made again; `refuses` tells what no other try would mend.
"""

import json
import math
import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from PIL import Image

from vlm_agents import stores
from vlm_agents.config import command
from vlm_agents.errors import harmless
from vlm_agents.files import atomic_write
from vlm_agents.metrics import headline, parts

# What MLflow shows first, by the part of a name before the slash. It makes a section of charts of each such part, in
# the order of the alphabet, and draws every metric of it: of these parts the rest goes to sections at the end.
FIRST = {
    "eval": ("success", "return", "success_greedy"),
    "rollout": ("success", "return"),
    "ppo": ("approx_kl", "entropy", "explained_variance"),
    "time": (),
    "speed": (),
    "memory": (),
}


class Point(NamedTuple):
    """One number of a curve. Its time stays the same however often it is sent: MLflow knows it again."""

    key: str
    value: float
    time: int  # milliseconds
    step: int


class Backend(Protocol):
    """One run's copy. `connect` comes first and last `end`, then files, then `close`; any may fail and be repeated."""

    title: str

    def connect(self) -> None:
        """Find or make all that the run needs there."""

    def log(self, points: Sequence[Point]) -> None:
        """Add points, but for those that are there already."""

    def file(self, path: Path, key: str, step: int) -> None:
        """Add a picture of the curve `key`, or, where that is empty, a file of the run."""

    def end(self, status: str) -> None:
        """The run is FINISHED, FAILED or KILLED."""

    def close(self) -> None:
        """Nothing more comes."""

    def refuses(self, error: Exception) -> bool:
        """Would the same thing never be taken?"""
        ...


def make(settings: Mapping[str, Any], folder: Path, sweep: Path | None) -> Backend:
    """The backend that `tracking.name` names; ImportError, with what to install, where its package is missing."""
    kinds: dict[str, tuple[Callable[..., Backend], str]] = {
        "mlflow": (Mlflow, "mlflow"),
        "tensorboard": (Tensorboard, "tensorboardX tensorboard"),
        "wandb": (Wandb, "wandb"),
    }
    kind, packages = kinds[settings["tracking"]["name"]]
    try:
        return kind(settings, folder, sweep)
    except ImportError as error:
        raise ImportError(f"{error}: pip install {packages}") from error


def shown_as(key: str) -> str:
    """MLflow's name of a metric: its own for what is to be seen first, `variants/...` for a bound of that or what
    another player had, `verbose/...` for the long tail."""
    group, _, name = key.rpartition("/")
    if group not in FIRST or name in FIRST[group]:
        return key
    name = parts(key).base.removesuffix("_low").removesuffix("_high")
    return f"variants/{key}" if name in FIRST[group] else f"verbose/{key}"


def command_of(folder: Path) -> str:
    words = (folder / "overrides").read_text().splitlines() if (folder / "overrides").exists() else []
    return command(words)


def result_of(folder: Path) -> str:
    """The end of a run in a sentence, from its summary.json; empty before that."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        summary = json.loads((folder / "summary.json").read_text())
        return headline(summary["stage"], summary["metrics"])
    return ""


class Mlflow:
    """A run of an MLflow store, whose id the run directory remembers."""

    title = "MLflow"

    def __init__(self, settings: Mapping[str, Any], folder: Path, sweep: Path | None) -> None:
        stores.quieten()
        self._settings, self._folder, self._sweep = settings, folder, sweep
        self._uri = stores.address(settings["tracking"])
        if not settings["tracking"]["uri"] and self._uri != stores.DEFAULT:
            print(f"MLflow: {harmless(stores.masked(self._uri))}, which MLFLOW_TRACKING_URI names", flush=True)
        self._experiment = (
            settings["tracking"]["experiment"] or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "vlm_agents"
        )
        self._began, self._ended = stores.times_of(folder)
        self._client: Any = None
        self._run_id = ""
        self._goes_on = False
        self._steps: dict[str, set[int]] = {}  # at which MLflow has a metric

    def connect(self) -> None:
        where = self._uri, self._experiment, self._folder, self._sweep
        self._client, self._run_id, self._goes_on = stores.connect(*where, self._settings, self._tags(), self._began)

    def begin_sweep(self, sweep: Path) -> None:
        """Make what the jobs of a sweep have in common."""
        stores.begin_sweep(self._uri, self._experiment, sweep, self._settings, self._tags())

    def _tags(self) -> dict[str, str]:
        settings, stage = self._settings, self._settings["stage"]
        policy, model = stage.get("policy", "model"), settings["model"]["name"]
        plays = policy == "model" and stage["name"] != "preprocess"
        commit = self._folder / "commit"
        tags = {
            "stage": stage["name"],
            "env": settings["env"]["id"],
            "model": model if policy == "model" else stage["remote"]["model"] if policy == "remote" else policy,
            "weights": (stage.get("init") or f"model={model}") if plays else "",
            "run_dir": os.path.relpath(self._folder),
            "command": command_of(self._folder),
            "mlflow.source.name": command([f"stage={stage['name']}"]),  # its pages show what follows the last slash
            "mlflow.source.type": "LOCAL",
            "mlflow.user": stores.user(),
            "mlflow.source.git.commit": commit.read_text().strip() if commit.exists() else "",
        }
        if settings["algo"] is not None:
            tags["algo"] = settings["algo"]["name"]
        return {name: value for name, value in tags.items() if value}

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        points = [point._replace(key=shown_as(point.key)) for point in points]
        new = {(point.key, point.step): point for point in points if point.step not in self._steps_of(point.key)}
        if new:
            self._client.log_batch(self._run_id, metrics=[Metric(*point) for point in new.values()])
        for key, step in new:
            self._steps[key].add(step)

    def _steps_of(self, key: str) -> set[int]:
        if key not in self._steps:
            history = self._client.get_metric_history(self._run_id, key) if self._goes_on else ()
            self._steps[key] = {point.step for point in history}
        return self._steps[key]

    def file(self, path: Path, key: str, step: int) -> None:
        if key:
            with Image.open(path) as image:
                self._client.log_image(self._run_id, image, key=key, step=step)
        else:
            self._client.log_artifact(self._run_id, str(path))

    def end(self, status: str) -> None:
        note = "\n\n".join(part for part in (result_of(self._folder), f"`{command_of(self._folder)}`") if part)
        self._client.set_tag(self._run_id, "mlflow.note.content", note)
        self._client.set_terminated(self._run_id, status, end_time=self._ended)
        if self._sweep is not None:
            stores.end_parent(self._client, self._uri, self._run_id, self._sweep)

    def close(self) -> None:
        pass

    def refuses(self, error: Exception) -> bool:
        return stores.refused(error)


class Tensorboard:
    """Event files in the run's `tensorboard/`, written anew by each process from what the run directory holds: what a
    killed process had written beyond its checkpoint is in them no more."""

    title = "TensorBoard"

    def __init__(self, settings: Mapping[str, Any], folder: Path, sweep: Path | None) -> None:
        # not torch's own writer, which would bring torch into stages that need none
        import tensorboardX  # pyright: ignore[reportMissingImports]  # noqa: F401

        self._folder = folder
        self._writer: Any = None
        self._written: set[tuple[str, int]] = set()

    def connect(self) -> None:
        pass  # what is there is left alone until something new comes

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

            place = self._folder / "tensorboard"
            place.mkdir(exist_ok=True)
            for old in place.glob("events.out.tfevents.*"):
                old.unlink()
            self._writer = SummaryWriter(str(place), flush_secs=10)
            for picture in sorted((self._folder / "pictures").glob("*_*.png")):
                key, _, step = picture.stem.rpartition("_")
                self._picture(picture, key, int(step))
        return self._writer

    def _is_new(self, key: str, step: int) -> bool:
        new = (key, step) not in self._written
        self._written.add((key, step))
        return new

    def log(self, points: Sequence[Point]) -> None:
        writer = self._open()
        for key, value, at, step in points:
            if self._is_new(key, step):
                writer.add_scalar(key, value, step, walltime=at / 1000)

    def file(self, path: Path, key: str, step: int) -> None:
        if path.suffix in (".png", ".gif"):
            self._picture(path, key.replace("/", "_") or path.stem, step)  # the name under pictures/
        elif path.suffix in (".yaml", ".json") and self._is_new(path.name, step):
            text = path.read_text().replace("\n", "\n    ")  # Markdown: a block of code
            self._open().add_text(path.name, f"    {text}", step)

    def _picture(self, path: Path, tag: str, step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports]

        writer = self._open()
        if self._is_new(tag, step):
            with Image.open(path) as image:
                width, height = image.size
            picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes())
            writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    def end(self, status: str) -> None:
        pass

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def refuses(self, error: Exception) -> bool:
        return not isinstance(error, OSError) or isinstance(error, FileNotFoundError)


class Wandb:
    """A run of Weights & Biases. Without a key, or with WANDB_MODE=offline, it lies in the run's `wandb/` alone, until
    `wandb sync` sends it: nobody is asked to log in. `wandb/told.json` remembers its id and what it was told."""

    title = "Weights & Biases"

    def __init__(self, settings: Mapping[str, Any], folder: Path, sweep: Path | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # pyright: ignore[reportMissingImports]  # noqa: F401

        self._settings, self._folder, self._sweep = settings, folder, sweep
        self._mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        self._note = folder / "wandb" / "told.json"
        self._told: dict[str, Any] = {"id": secrets.token_hex(8), "last": {}}  # last step of each key
        with suppress(OSError, ValueError):
            self._told |= json.loads(self._note.read_text())
        self._run: Any = None
        self._exit_code = 0

    def connect(self) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._remember()
        name = f"{self._settings['name']}/{self._settings['stage']['name']}"
        limit = stores.PATIENCE
        self._run = wandb.init(
            project=self._settings["tracking"]["experiment"] or os.environ.get("WANDB_PROJECT") or "vlm_agents",
            id=self._told["id"],
            resume="allow",
            name=f"{name}/{self._folder.name}" if self._sweep else name,
            group=name if self._sweep else None,
            job_type=self._settings["stage"]["name"],
            config=dict(self._settings),
            notes=command_of(self._folder),
            dir=str(self._folder),
            mode=self._mode,  # type: ignore[arg-type] - a word of the environment
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", init_timeout=limit, finish_timeout=limit),
        )
        self._run.define_metric("*", step_metric="step")
        if self._mode == "offline":
            print(f"Weights & Biases: offline; wandb sync {os.path.relpath(Path(self._run.dir).parent)}", flush=True)

    def _remember(self) -> None:
        self._note.parent.mkdir(exist_ok=True)
        atomic_write(self._note, json.dumps(self._told), durable=False)

    def log(self, points: Sequence[Point]) -> None:
        rows: dict[int, dict[str, float]] = {}
        for key, value, _, step in points:
            if step > self._told["last"].get(key, -math.inf):
                rows.setdefault(step, {})[key] = value
        for step, row in rows.items():
            self._row(step, row)
        self._remember()

    def _row(self, step: int, row: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **row})
        self._told["last"] |= dict.fromkeys(row, step)

    def file(self, path: Path, key: str, step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        if not key:
            self._run.save(str(path), base_path=str(path.parent), policy="now")
        elif step > self._told["last"].get(key, -math.inf):
            self._row(step, {key: wandb.Image(str(path))})
            self._remember()

    def end(self, status: str) -> None:
        self._exit_code = 0 if status == "FINISHED" else 1
        self._run.notes = "\n\n".join(part for part in (result_of(self._folder), command_of(self._folder)) if part)

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)

    def refuses(self, error: Exception) -> bool:
        return isinstance(error, ValueError | TypeError | FileNotFoundError)


def has_key() -> bool:
    """Does wandb find a key of the user's, so that it needn't ask for one?"""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
