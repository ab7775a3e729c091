"""DeepSpeed's settings: ours, those of `hardware.deepspeed`, and what is wrong with them. Starts nothing."""

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_agents.config import HardwareConfig
from vlm_agents.errors import ConfigError, did_you_mean

BUCKET = 500_000_000  # DeepSpeed's own: gradients that are summed at a time, in a buffer of so many
REFUSALS = (AssertionError, AttributeError, KeyError, TypeError, ValueError)  # DeepSpeed's, of settings
OURS = {  # DeepSpeed's settings that say what one of ours does
    "train_batch_size": "algo.minibatch_turns",
    "train_micro_batch_size_per_gpu": "hardware.tokens_per_microbatch",
    "gradient_accumulation_steps": "hardware.tokens_per_microbatch",
    "managed_gradient_accumulation": "hardware.tokens_per_microbatch",
    "gradient_clipping": "algo.max_grad_norm",
    "gradient_allreduce_op": "hardware.processes",
    "sequence_parallel_size": "hardware.processes",
    "optimizer": "algo.lr and algo.weight_decay",
    "scheduler": "algo.warmup_updates and algo.min_lr_ratio",
    "zero_allow_untested_optimizer": "hardware.offload",
    "zero_force_ds_cpu_optimizer": "hardware.offload",
    "fp16": "hardware.dtype",
    "bf16": "hardware.dtype",
    "bfloat16": "hardware.dtype",
    "amp": "hardware.dtype",
    "torch_autocast": "hardware.dtype",
    "zero_optimization.stage": "hardware.zero",
    "checkpoint": "stage.checkpoint_every",
}


class Asked(dict[str, Any]):
    """Remembers what it was asked for: what it is that DeepSpeed knows is written nowhere else."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.names = set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)


def load_deepspeed(device: str) -> None:
    """Import it. What it computes on it asks but once, then: not whether there is a GPU, but what the run is to use."""
    os.environ["DS_ACCELERATOR"] = device.partition(":")[0]
    import deepspeed  # noqa: F401 - for what it does

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def zero_config(hardware: HardwareConfig, max_grad_norm: float, trained: int) -> dict[str, Any]:
    """DeepSpeed's settings for so many trained numbers. ConfigError where `hardware.deepspeed` isn't right."""
    zero: dict[str, Any] = {"stage": hardware.zero, "reduce_bucket_size": min(BUCKET, trained)}
    pinned = {"device": "cpu", "pin_memory": hardware.device.startswith("cuda")}
    if hardware.offload != "none":
        zero["offload_optimizer"] = pinned
    if hardware.offload == "all":
        zero["offload_param"] = dict(pinned)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # of what it counts alone
        "managed_gradient_accumulation": False,  # as many backward passes a step as there are
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": hardware.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own are compiled when they are first used
        "zero_force_ds_cpu_optimizer": False,
    }
    given: dict[str, Any] = hardware.deepspeed or {}
    for name in names_of(given):
        if name in OURS:
            raise ConfigError(f"hardware.deepspeed.{name} is ours to set: see {OURS[name]}")
    merged = merge(config, given)
    load_deepspeed(hardware.device)
    check(merged, given)
    return merged


def names_of(settings: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Of all settings, at any depth: `zero_optimization`, `zero_optimization.stage`, ..."""
    for name, value in settings.items():
        yield f"{place}{name}"
        if isinstance(value, Mapping):
            yield from names_of(value, f"{place}{name}.")


def merge(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in more.items():
        before = merged.get(name)
        merged[name] = merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def check(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ConfigError for what DeepSpeed refuses, and for what it would pass over."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = Asked(config)
    try:
        DeepSpeedConfig(asked)  # type: ignore[arg-type]
    except REFUSALS as error:
        raise (invalid if hasattr(error, "errors") else refused)(given, error) from error
    for name in given:
        if name not in asked.names:
            raise unknown(name, name, asked.names - set(OURS))


def invalid(given: Mapping[str, Any], error: Any) -> ConfigError:
    """For what pydantic, which checks DeepSpeed's settings, says on a page."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    wrong = error.errors()[0]
    name = ".".join(map(str, wrong["loc"]))
    path = next((path for path in names_of(given) if path.endswith(f".{name}")), name)
    if wrong["type"] != "extra_forbidden":
        return ConfigError(f"hardware.deepspeed.{path}={wrong['input']}: {wrong['msg']}")
    known: set[str] = set()
    if error.title == DeepSpeedZeroConfig.__name__ and path.count(".") == 1:
        known = {word for key, field in DeepSpeedZeroConfig.model_fields.items() for word in (key, field.alias) if word}
    return unknown(path, name, known)


def refused(given: Any, error: Exception) -> ConfigError:
    told = str(error).strip().partition("\n")[0] or "it doesn't say why"
    return ConfigError(f"hardware.deepspeed={given} is refused by DeepSpeed: {told}")


def unknown(path: str, name: str, known: Any) -> ConfigError:
    return ConfigError(f"hardware.deepspeed.{path}: DeepSpeed knows no such setting.{did_you_mean(name, known)}")
