"""One run: its parts, the checks between them, and the way from Hydra's composition to plain dataclasses."""

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from vlm_agents.config.algo import AlgoConfig
from vlm_agents.config.env import FAMILIES, CardsConfig, EnvConfig
from vlm_agents.config.fields import Part, dotted, setting, settings_of
from vlm_agents.config.hardware import HardwareConfig
from vlm_agents.config.model import ModelConfig
from vlm_agents.config.prompt import PromptConfig
from vlm_agents.config.remote import RemoteConfig
from vlm_agents.config.stage import (
    CollectConfig,
    DoctorConfig,
    EvalConfig,
    MergeConfig,
    PpoConfig,
    PreprocessConfig,
    SftConfig,
    StageConfig,
)
from vlm_agents.config.tracking import TrackingConfig
from vlm_agents.errors import ConfigError

STAGES = (CollectConfig, PreprocessConfig, SftConfig, PpoConfig, EvalConfig, MergeConfig, DoctorConfig)


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
    algo: AlgoConfig | None = setting(None, "how the policy learns from reward", bring_in="stage=ppo brings it in")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ConfigError(f"name={self.name!r} names a folder: use letters, digits and . _ + - only")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.hardware.device):
            raise ConfigError(
                f"hardware.device={self.hardware.device} isn't known here: set cpu, cuda or cuda:<number>"
            )
        if isinstance(self.env, CardsConfig) and self.env.compat == "rl4vlm" and self.env.invalid_penalty:
            raise ConfigError(
                "env.compat=rl4vlm plays a random action where none can be read and takes nothing off for it, and "
                f"env.invalid_penalty is {self.env.invalid_penalty:g}: set env.invalid_penalty=0"
            )
        if isinstance(self.stage, SftConfig) and self.hardware.device not in ("cpu", "cuda", "cuda:0"):
            number = self.hardware.device.removeprefix("cuda:")
            raise ConfigError(
                f"hardware.device={self.hardware.device}: stage=sft runs transformers' Trainer, which takes the first "
                f"GPU that it sees. Set hardware.device=cuda, and CUDA_VISIBLE_DEVICES={number} before the command"
            )
        if isinstance(self.stage, PpoConfig):
            if self.algo is None:
                raise ConfigError("stage=ppo needs an algo: add algo=ppo")
            if self.algo.value_warmup >= self.stage.iterations > 1:
                raise ConfigError(
                    f"algo.value_warmup={self.algo.value_warmup} leaves the policy none of "
                    f"stage.iterations={self.stage.iterations}: have fewer of the one or more of the other"
                )
            if self.stage.freeze_vision and (self.model.train.vision or self.model.train.projector):
                raise ConfigError(
                    "model.train.vision or projector is true, and stage.freeze_vision freezes both: "
                    "set stage.freeze_vision=false to train them, or leave their switches out"
                )
        if self.algo is not None:
            self._check_what_the_algo_needs(self.algo)
        self._check_that_something_learns()

    def _check_what_the_algo_needs(self, algo: AlgoConfig) -> None:
        if algo.turn_entropy_coef > 0 and self.model.temperature_head is None:
            raise ConfigError(
                "algo.turn_entropy_coef > 0 trains a learned temperature, and there is none: "
                "add model/temperature_head=learned, or set algo.turn_entropy_coef=0"
            )
        if algo.novelty.coef > 0 and self.model.lora is None:
            raise ConfigError(
                "algo.novelty.coef > 0 makes a second adapter, and the model has no first: add model/lora=adapter"
            )
        if algo.kl_coef > 0 and self.model.lora is None:
            raise ConfigError(
                "algo.kl_coef > 0 needs a reference policy, which is the model with its adapter off: "
                "add model/lora=adapter, or set algo.kl_coef=0"
            )

    def _check_that_something_learns(self) -> None:
        if not isinstance(self.stage, SftConfig | PpoConfig):
            return
        frozen = isinstance(self.stage, PpoConfig) and self.stage.freeze_vision
        tempered = isinstance(self.stage, PpoConfig) and self.model.temperature_head is not None
        if not tempered and not any(vars(self.model.train.settled(frozen)).values()):
            choice = "language=true, or stage.freeze_vision=false" if frozen else "vision, projector or language=true"
            raise ConfigError(f"nothing would learn: set model.train.{choice}")


SCHEMAS: dict[str, type[Part]] = {
    "run": RunConfig,
    "prompt": PromptConfig,
    "model": ModelConfig,
    "hardware": HardwareConfig,
    "tracking": TrackingConfig,
    "algo": AlgoConfig,
    **{f"env/{family}": env for family, env in FAMILIES.items()},
    **{f"stage/{stage.name}": stage for stage in STAGES},
}


def register() -> None:
    """Tell Hydra the schemas. They live under `schema/` so that they never show up as options of a group.

    `${token:}` is new in every process: it keeps apart the runs without a name that start in one second.
    """
    OmegaConf.register_new_resolver("token", partial(secrets.token_hex, 3), use_cache=True, replace=True)
    store = ConfigStore.instance().store
    for place, part in SCHEMAS.items():
        store(name=place.split("/")[-1], group="/".join(["schema", *place.split("/")[:-1]]), node=part)


def may_change() -> set[str]:
    """Settings, or whole parts, that a resumed run may have different: they change nothing in what it does."""
    parts = (RunConfig, RemoteConfig)
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


def parse(cfg: DictConfig) -> RunConfig:
    """The composed configuration as checked plain dataclasses; ConfigError says which value is off."""
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    for key in unknown_keys(run):
        raise ConfigError(f"{key}: no such setting. A leading + doesn't add one; remove +{key}")
    return run


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
