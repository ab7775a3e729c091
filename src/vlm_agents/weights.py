"""Whose weights: what `stage.init` names, how it is chosen, and what its folder says that the settings leave open.

Read from run directories as they lie there, by files alone: no model is loaded. What they were taught, `lineage` says.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from vlm_agents.config import (
    EvalConfig,
    LoraConfig,
    MergeConfig,
    ModelConfig,
    PpoConfig,
    PreprocessConfig,
    RunConfig,
    ServeConfig,
    TemperatureHeadConfig,
    flat,
    with_defaults,
)
from vlm_agents.errors import ConfigError, DataError

RUN_MODEL = "model"  # where a stage leaves its model inside its run directory
ADAPTER_FILE = "adapter_config.json"
TEMPERATURE_FILE = "heads/temperature_head.safetensors"
TRACKED = {"mlflow_run_id", "tensorboard", "wandb", "unsent"}  # what a tracker leaves
SERVED = {"server.json", "server.log"}  # what stage=serve does
# alone: no progress
BOOKKEEPING = {"config.yaml", "overrides", "commit", "versions", "inputs.json", "lock", *TRACKED, *SERVED}


# ---- run directories -------------------------------------------------------------------------------------------------
def unfinished(folder: Path) -> bool:
    """Is it a run directory whose run has not come to its end?"""
    return (folder / "config.yaml").is_file() and not (folder / "DONE").exists()


def holds_work(folder: Path) -> bool:
    """Has a run begun to do something here? One that failed on its way to that may be corrected under its name."""
    entries = (entry for entry in folder.iterdir() if entry.name not in BOOKKEEPING and entry.name[0] != ".")
    return any(
        path.is_file() and path.stat().st_size > 0
        for entry in entries
        for path in ([entry] if entry.is_file() else entry.rglob("*"))
    )


class WithoutAliases(yaml.SafeLoader):
    """No run writes aliases, of which few lines can make endless settings."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def flat_settings(snapshot: Path, mend: str) -> dict[str, Any]:
    """What a run's config.yaml says, by dotted names; DataError, with what to do, where it can't be read. What an older
    version didn't know of is as it is by default."""
    try:
        return dict(flat(with_defaults(yaml.load(snapshot.read_text(encoding="utf-8"), WithoutAliases))))
    except (OSError, AttributeError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{snapshot} is unreadable: {mend}") from error


def told_by(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`, by dotted names; none where nobody can tell."""
    try:
        return flat_settings(folder / "config.yaml", "")
    except DataError:
        return {}


def part_of(settings: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """The settings below `key`, by their last names; None where that part is off."""
    return {name.removeprefix(f"{key}."): settings[name] for name in settings if name.startswith(f"{key}.")} or None


# ---- what init names -------------------------------------------------------------------------------------------------
def init_folder(init: str) -> Path:
    """The folder of weights that `init` names: itself, or the model of that finished run directory."""
    folder = inside(init)
    if folder.name == RUN_MODEL or (folder / "config.json").is_file() or (folder / ADAPTER_FILE).is_file():
        return folder
    raise DataError(
        f"stage.init={init} holds no model: it needs a finished run of stage=sft or stage=ppo (with a folder "
        f"{RUN_MODEL}/), or an HF folder with config.json"
    )


def inside(source: str) -> Path:
    """Where the weights lie: a run, or a checkpoint, has them in a folder of its own."""
    folder = Path(source)
    return folder / RUN_MODEL if (folder / RUN_MODEL).is_dir() else folder


def run_of(init: str) -> Path | None:
    """The run directory that `init` is, or whose model or checkpoint it is. Weights alone say nothing of their run."""
    folder = Path(init)
    whole = folder.parent if folder.name == RUN_MODEL else folder
    run = whole.parent.parent if whole.parent.name == "checkpoints" else whole
    return run if (run / "config.yaml").is_file() and (run != folder or (run / "DONE").is_file()) else None


def init_of(cfg: RunConfig) -> str | None:
    """What `stage.init` names, where a model has a part in the run."""
    return getattr(cfg.stage, "init", None) if has_model(cfg) else None


def has_model(cfg: RunConfig) -> bool:
    """Do a model's weights play, or learn, in this run?"""
    return not isinstance(cfg.stage, PreprocessConfig) and getattr(cfg.stage, "policy", "model") == "model"


def weights_of(cfg: RunConfig) -> str:
    """Whose weights the run starts from, or plays, for a person; empty where it has no model."""
    if not has_model(cfg) or not hasattr(cfg.stage, "init"):
        return ""
    if init := init_of(cfg):
        name = str(Path(init).parent) if Path(init).name == RUN_MODEL and run_of(init) else init
        return f"{name}, an adapter" if (inside(init) / ADAPTER_FILE).is_file() else name
    model = cfg.model
    if model.weights == "random":
        return f"the model's own: random weights of seed {model.seed}"
    return f"the model's own: {model.path or 'the shipped tiny ones'}"


# ---- how it is chosen ------------------------------------------------------------------------------------------------
def earlier_model(cfg: RunConfig) -> str | None:
    """The run directory under `cfg.name` whose model this stage goes on with; None where there is none.

    ConfigError where that run isn't finished, or where a sweep leaves it open which one is meant.
    """
    if not has_model(cfg):
        return None
    for places in earlier_places(cfg):
        found = list(begun(places))
        jobs = list(begun(job for place in places for job in place.glob("*")))
        found += [job for job in jobs if told_by(job).get("seed") == cfg.seed]  # each seed goes on with its own
        if len(found) > 1 or (jobs and not found):
            runs = found or jobs
            raise ConfigError(
                f"stage.init could be {' or '.join(map(str, runs))}{'' if found else f', none of seed={cfg.seed}'}: "
                f"name one, as in stage.init={runs[0]}"
            )
        if found and not (found[0] / "DONE").exists():
            own = "" if isinstance(cfg.stage, MergeConfig) else ", stage.init=null for the model's own weights"
            raise ConfigError(
                f"{found[0]} isn't finished: give its command again first, or set stage.init to another model{own}"
            )
        if found:
            return str(found[0])
    return None


def earlier_places(cfg: RunConfig) -> list[list[Path]]:
    """For each earlier stage, the one that is asked first in front: where it would have left a run, or a sweep's jobs.

    Beside the usual places that is somewhere/sft for somewhere/ppo, and for its job somewhere/ppo/0.
    """
    own = Path(cfg.run_dir)
    above = [folder.parent for folder in (own, own.parent) if folder.name == cfg.stage.name]
    places = []
    stages = ("ppo", "sft") if isinstance(cfg.stage, EvalConfig | MergeConfig | ServeConfig) else ("sft",)
    for stage in ("merge", *stages) if isinstance(cfg.stage, ServeConfig) else stages:  # a server takes no adapter
        named: dict[Path, Path] = {}
        for root in (Path("outputs", cfg.name), Path("multirun", cfg.name), *above):
            named.setdefault((root / stage).resolve(), root / stage)
        places.append(list(named.values()))
    return places


def found_none(cfg: RunConfig, overrides: Iterable[str]) -> str:
    """A line that `stage.init=auto` found no earlier model, and where it was looked for; empty where it found one, or
    where nobody named a run that could have one."""
    stage, words = cfg.stage, {word.lstrip("+").partition("=")[0] for word in overrides}
    if not isinstance(stage, PpoConfig | EvalConfig) or not has_model(cfg) or stage.init or "stage.init" in words:
        return ""
    if "name" not in words and cfg.name in Path(cfg.run_dir).parts:
        return ""
    looked = f"no model in {', '.join(str(place) for places in earlier_places(cfg) for place in places)}"
    told = "warning: no earlier stage trained what plays" if stage.name == "eval" else "no earlier stage to go on from"
    return f"{told}, {looked}. stage.init=<its run> names one, stage.init=null says that these weights are meant"


def begun(folders: Iterable[Path]) -> Iterator[Path]:
    """Those that hold a run that has done something."""
    for folder in sorted(folders):
        if (folder / "config.yaml").is_file() and ((folder / "DONE").exists() or holds_work(folder)):
            yield folder


def as_saved(model: ModelConfig, init: str, old: Mapping[str, Any]) -> ModelConfig:
    """`model` with the adapter and the learned temperature that `init` has, where the settings say none.

    `old` are the settings of this run itself, where it has begun: they go on as they are.
    """
    folder, run = inside(init), run_of(init)
    if model.lora is None:
        then = part_of(old, "model.lora")
        model = replace(model, lora=LoraConfig(**then) if then else None if old else saved_adapter(folder))
    if model.temperature_head is None and (old or (folder / TEMPERATURE_FILE).is_file()):
        head = part_of(old or (told_by(run) if run else {}), "model.temperature_head")
        model = replace(model, temperature_head=TemperatureHeadConfig(**head) if head else None)
    return model


def saved_adapter(folder: Path) -> LoraConfig | None:
    """The shape of the adapter in `folder`; None where there is none, or who loads it will refuse it."""
    try:
        saved = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        return LoraConfig(saved["r"], saved["lora_alpha"], saved.get("lora_dropout", 0.0))
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
