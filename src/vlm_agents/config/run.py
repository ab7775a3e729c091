"""One run: its parts, the checks between them, and the way from Hydra's composition to plain dataclasses."""

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm_agents.config.algo import AlgoConfig
from vlm_agents.config.env import FAMILIES, EnvConfig
from vlm_agents.config.fields import Part, dotted, setting, settings_of
from vlm_agents.config.hardware import HardwareConfig
from vlm_agents.config.model import ModelConfig
from vlm_agents.config.prompt import PromptConfig
from vlm_agents.config.referee import JudgeConfig, RefereeConfig
from vlm_agents.config.remote import RemoteConfig
from vlm_agents.config.rollout import EngineConfig, RolloutConfig
from vlm_agents.config.stage import (
    CollectConfig,
    DoctorConfig,
    EvalConfig,
    MergeConfig,
    PpoConfig,
    PreprocessConfig,
    ServeConfig,
    SftConfig,
    StageConfig,
)
from vlm_agents.config.tracking import TrackingConfig
from vlm_agents.errors import ConfigError, DataError

OF_EVERY_VERSION = {"env.id", "stage.episodes", "stage.init"}  # a file that lacks them is damaged
STAGES = (CollectConfig, PreprocessConfig, SftConfig, PpoConfig, EvalConfig, MergeConfig, ServeConfig, DoctorConfig)


@dataclass
class RunConfig(Part, place=""):
    """One run: one stage, on one env, with one model, on one hardware."""

    name: str = setting(MISSING, "of the run: give it again to continue a run, or to chain stages; it names a folder")
    seed: int = setting(0, "of everything random in the run", low=0)
    run_dir: str = setting(
        MISSING, "directory that the run writes into; a sweep's lie below hydra.sweep.dir", may_change=True
    )
    env: EnvConfig = setting(MISSING, "what is played")
    prompt: PromptConfig = setting(MISSING, "how the agent is asked, and answers")
    model: ModelConfig = setting(MISSING, "the model, and which parts of it learn")
    hardware: HardwareConfig = setting(MISSING, "what the run computes on")
    tracking: TrackingConfig = setting(MISSING, "where metrics go besides metrics.jsonl", may_change=True)
    stage: StageConfig = setting(MISSING, "what the run does")
    referee: RefereeConfig = setting(RefereeConfig, "who says whether an answer is right")
    rollout: RolloutConfig = setting(RolloutConfig, "who samples in stage=ppo")
    algo: AlgoConfig | None = setting(None, "how the policy learns from reward", bring_in="stage=ppo brings it in")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            wrong = f"name={self.name!r} names a folder" if self.name else "name= is empty, and it names a folder"
            raise ConfigError(f"{wrong}: use letters, digits and . _ + - only")
        if self.prompt.show_actions is None:
            self.prompt.show_actions = self.env.actions_vary
        for part in parts_of(self):
            part.check(self)


SCHEMAS: dict[str, type[Part]] = {
    "run": RunConfig,
    "prompt": PromptConfig,
    "model": ModelConfig,
    "hardware": HardwareConfig,
    "tracking": TrackingConfig,
    "referee": RefereeConfig,
    "rollout": RolloutConfig,
    "algo": AlgoConfig,
    **{f"env/{family}": env for family, env in FAMILIES.items()},
    **{f"stage/{stage.name}": stage for stage in STAGES},
}


def parts_of(part: Part) -> Iterator[Part]:
    """The parts within a part, at any depth."""
    for one in fields(part):  # pyright: ignore[reportArgumentType]
        value = getattr(part, one.name)
        if isinstance(value, Part):
            yield value
            yield from parts_of(value)


@cache
def register() -> None:
    """Tell Hydra the schemas, once. They live under `schema/` so that they never show up as options of a group.

    `${token:}` is new in every process: it keeps apart the runs without a name that start in one second. `${cores:}`
    and `${gpus:}` are what a launcher asks a cluster for.
    """
    OmegaConf.register_new_resolver("token", partial(secrets.token_hex, 3), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("cores", cores_of, replace=True)
    OmegaConf.register_new_resolver("gpus", gpus_of, replace=True)
    store = ConfigStore.instance().store
    for place, part in SCHEMAS.items():
        store(name=place.split("/")[-1], group="/".join(["schema", *place.split("/")[:-1]]), node=part)


def cores_of(processes: int, threads: int | None) -> int:
    """Cores on each node."""
    return processes * (threads or 8)


def gpus_of(device: str, processes: int, gres: str | None) -> int | None:
    """GPUs on each node; None where there is nothing to ask for, or `gres` asks already."""
    return processes if device.startswith("cuda") and gres is None else None


def may_change() -> set[str]:
    """Settings, or whole parts, that a resumed run may have different: they change nothing in what it does."""
    servers = (RemoteConfig, JudgeConfig, EngineConfig)
    parts = (RunConfig, HardwareConfig, *servers, RefereeConfig, RolloutConfig, ServeConfig)
    return {dotted(part, name) for part in parts for name, (_, rules) in settings_of(part).items() if rules.may_change}


def off_by_default() -> dict[str, str]:
    """The parts that a run may lack, and how to bring each in."""
    parts = (RunConfig, ModelConfig)
    return {
        dotted(part, name): rules.bring_in
        for part in parts
        for name, (_, rules) in settings_of(part).items()
        if rules.bring_in
    }


def env_of_id(env_id: str) -> str | None:
    """The option of `env=` that has this id by default."""
    return next((family for family, env in FAMILIES.items() if env.id == env_id), None)


def env_of(settings: Mapping[str, Any]) -> EnvConfig:
    """The env of these settings, by dotted names; KeyError or ConfigError where they are of another
    version."""
    node = OmegaConf.structured(FAMILIES[settings["family"]])
    try:
        for name, value in settings.items():
            OmegaConf.update(node, name, value)
        found = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(f"env: {error}") from error
    assert isinstance(found, EnvConfig)
    return found


def parse(cfg: DictConfig) -> RunConfig:
    """The composed configuration as checked plain dataclasses; ConfigError says which value is off."""
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    for key in unknown_keys(run):
        raise ConfigError(f"{key}: no such setting. A leading + doesn't add one; remove +{key}")
    return run


def read(folder: Path) -> RunConfig:
    """The configuration of the run in `folder`, from its config.yaml. DataError where it is of another version."""
    path = folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        schema = OmegaConf.structured(RunConfig)
        schema.env, schema.stage = SCHEMAS[f"env/{tree['env']['family']}"], SCHEMAS[f"stage/{tree['stage']['name']}"]
        if tree["algo"] is not None:
            schema.algo = AlgoConfig
        whole = OmegaConf.merge(schema, with_defaults(tree))
        assert isinstance(whole, DictConfig)
        return parse(whole)
    except OSError as error:
        raise DataError(f"{folder} is no run directory: it has no config.yaml") from error
    except (yaml.YAMLError, OmegaConfBaseException, LookupError, TypeError, ConfigError) as error:
        told = str(error).splitlines()[0]
        raise DataError(f"{path} isn't the configuration of a run of this version ({told})") from error


def with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.yaml as an older version may have written them, those that it didn't know at today's
    defaults, which as a rule do what it did."""
    if isinstance(tree.get("prompt"), Mapping):
        tree = {**tree, "prompt": {"show_actions": False, **tree["prompt"]}}  # today's default is the env's
    parts = {name: SCHEMAS.get(name) for name in tree}
    for name, choice in (("env", "family"), ("stage", "name")):
        if isinstance(tree.get(name), Mapping):
            parts[name] = SCHEMAS.get(f"{name}/{tree[name].get(choice)}")
    known = {name: known_to(part, tree[name]) for name, part in parts.items() if part and isinstance(tree[name], dict)}
    younger = {name: known_to(SCHEMAS[name], {}) for name in ("referee", "rollout")}  # than the first runs
    return {**younger, **tree, **known}


def known_to(part: type[Part], said: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a part: as they were said, else by default; those without one, or of every version, stay away."""
    defaults = OmegaConf.to_container(OmegaConf.structured(part))
    assert isinstance(defaults, dict)
    found = {
        str(name): value
        for name, value in defaults.items()
        if value != MISSING and dotted(part, str(name)) not in OF_EVERY_VERSION
    }
    found |= dict(said)
    for name, kind in get_type_hints(part).items():
        inner = next((one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, Part)), None)
        if inner and isinstance(said.get(name), Mapping):
            found[name] = known_to(inner, said[name])
    return found


def unknown_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Settings that no schema knows: `+key=value` brings them in, and nothing would ever read them."""
    names = [one.name for one in fields(node)]
    yield from (prefix + name for name in vars(node) if name not in names)
    for name in names:
        if is_dataclass(getattr(node, name)):
            yield from unknown_keys(getattr(node, name), f"{prefix}{name}.")


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings, under dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
