"""The settings of a run: with all that was left open chosen, kept in its config.yaml, and held to when it goes on."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from vlm_agents import cores
from vlm_agents.config import (
    AUTO,
    UNNAMED,
    EvalConfig,
    MergeConfig,
    PpoConfig,
    RunConfig,
    ServeConfig,
    flat,
    may_change,
)
from vlm_agents.errors import ConfigError, DataError
from vlm_agents.lineage import as_taught
from vlm_agents.weights import as_saved, begun, earlier_model, flat_settings, has_model, init_of

# What an option of a group is called inside the group, and the word that chooses it: each brings settings of its own.
CHOSEN = {"env.family": "env", "prompt.format": "prompt", "rollout.engine": "rollout"}
CHOSEN |= {f"{group}.name": group for group in ("model", "hardware", "referee")}


def settled(cfg: RunConfig) -> RunConfig:
    """`cfg` with what was left open chosen: as the run that has begun in its directory has it, else by what is there.

    A run goes on with what it began with, though an earlier stage has been run since, or fewer cores are free.
    """
    folder = Path(cfg.run_dir)
    old: dict[str, Any] = {}
    if any(begun([folder])):
        old = flat_settings(folder / "config.yaml", f"delete {folder}, or choose another name=")
    stage, hardware = cfg.stage, cfg.hardware
    if isinstance(stage, PpoConfig | EvalConfig | MergeConfig | ServeConfig) and stage.init == AUTO:
        init = old["stage.init"] if "stage.init" in old else earlier_model(cfg)
        if isinstance(stage, MergeConfig):  # without an adapter it can't be: that it isn't there is told as of any
            init = init or f"outputs/{cfg.name}/ppo"
        cfg = dataclasses.replace(cfg, stage=dataclasses.replace(stage, init=init))
    for name in ("stage", "referee"):
        part = getattr(cfg, name)
        remote = getattr(part, "remote", None)
        if remote and remote.unnamed:  # of a new run, the server says it
            remote = dataclasses.replace(remote, model=old.get(f"{name}.remote.model", UNNAMED))
            cfg = dataclasses.replace(cfg, **{name: dataclasses.replace(part, remote=remote)})
    if hardware.threads is None and has_model(cfg):
        threads = (
            old["hardware.threads"] if "hardware.threads" in old else max(1, cores.choose()[0] // hardware.processes)
        )
        cfg = dataclasses.replace(cfg, hardware=dataclasses.replace(hardware, threads=threads))
    if isinstance(cfg.stage, MergeConfig):
        cfg = as_taught(cfg, cfg.stage.init, old)
    if init := init_of(cfg):
        cfg = dataclasses.replace(cfg, model=as_saved(cfg.model, init, old))
    return cfg


def as_yaml(cfg: RunConfig) -> str:
    """The configuration as it stands in config.yaml."""
    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)


def refuse_other_settings(snapshot: Path, settings: str) -> None:
    """ConfigError naming the first setting in which the run that is there differs from the one that is asked for."""
    folder = snapshot.parent
    old = flat_settings(snapshot, f"delete {folder}, or choose another name=")
    new = dict(flat(yaml.safe_load(settings)))
    if lacking := {key.split(".")[0] for key in new} - {key.split(".")[0] for key in old}:
        raise DataError(f"{snapshot} says nothing of {min(lacking)}: delete {folder}, or choose another name=")
    allowed = may_change()
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key not in CHOSEN, key)):
        if not {key, key.split(".")[0]} & allowed and old.get(key) != new.get(key):
            longer = key in ("stage.iterations", "stage.epochs") and (folder / "DONE").exists()
            # under another name nobody would find it
            init = os.path.relpath(folder) if longer else new.get("stage.init")
            start = f" with stage.init={init}" if init else ""
            aim = " to train its model further" if longer else ""
            name = CHOSEN.get(key, key)
            raise ConfigError(
                f"{folder} holds a run with {name}={old.get(key)}, not {new.get(key)}: give {name}={old.get(key)} to "
                f"continue it, choose another name={start}{aim}, or delete that directory"
            )
