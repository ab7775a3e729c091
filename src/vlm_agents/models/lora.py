"""Low-rank adapters (peft) on chosen parts of a model. Not full training: that is `loading.keep_gradients`."""

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

from vlm_agents.config import LoraConfig, ModelConfig, TrainableConfig
from vlm_agents.errors import ConfigError, ModelError
from vlm_agents.models.adapters import ADAPTER_FILE, MEANT, adapter_settings, named_base, refuse_no_adapter_weights
from vlm_agents.models.families import Family
from vlm_agents.models.fingerprint import differing
from vlm_agents.progress import say


def add(model: Any, family: Family, lora: LoraConfig, train: TrainableConfig) -> PeftModel:
    """A fresh adapter on every linear layer of the chosen parts, by full module path, so that frozen means frozen.

    Dropout acts in training passes only; `Agent` is in eval mode while it samples and in PPO's updates.
    """
    head = family.lm_head
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and getattr(train, family.part_of(name))
    ]
    if not targets:
        raise ConfigError("model.lora has nothing to adapt: set one of model.train.{vision,projector,language}=true")
    config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return wrap(model, config)


def load(model: Any, folder: Path, family: Family, cfg: ModelConfig) -> PeftModel:
    """A saved adapter, trainable in the chosen parts. Refused where it isn't one of this model, or not as `cfg` has it.

    peft itself would drop tensors that the model has no place for, and only warn of those that the file lacks.
    """
    assert cfg.lora is not None
    refuse_another_base(model, folder)
    saved = config_of(folder)
    if (saved.r, saved.lora_alpha) != (cfg.lora.rank, cfg.lora.alpha):
        raise ConfigError(
            f"the adapter in {folder} has rank {saved.r} and alpha {saved.lora_alpha}: set model.lora.rank={saved.r} "
            f"model.lora.alpha={saved.lora_alpha}"
        )
    if saved.lora_dropout != cfg.lora.dropout:
        named = f"model.lora.dropout={cfg.lora.dropout:g}"
        say(f"the adapter in {folder} was made with dropout {saved.lora_dropout:g}: so that is taken, not {named}")
    adapted = wrap(model, saved)
    read(adapted, folder, "default")
    parts = {family.part_of(name) for name, _ in adapted.named_parameters() if "lora_" in name}
    learning = parts & set(cfg.train.parts)
    if not learning:
        raise ConfigError(
            f"nothing would learn: the adapter in {folder} is on {', '.join(sorted(parts))} alone, which model.train "
            "freezes"
        )
    if without := set(cfg.train.parts) - parts:
        stay = " and ".join(sorted(without))
        say(f"the adapter in {folder} is on {', '.join(sorted(parts))} alone: {stay} stay as they are")
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name and family.part_of(name) in learning)
    return adapted


def refuse_another_base(model: Any, folder: Path) -> None:
    """ModelError where what lies beside the adapter says that it was trained on other weights than those of `model`."""
    if not (others := differing(model, folder)):
        return
    named = named_base(folder)
    where = f"set model.path to where {named} lies now" if named else "set model.path"
    if named and Path(named).is_dir():  # where the settings can't overrule it
        where = f"put them back there, or write their place into {ADAPTER_FILE} as base_model_name_or_path"
    raise ModelError(
        f"the adapter in {folder} was trained on other weights than these: {len(others)} tensors differ from those of "
        f"{named or 'its base'}, {others[0]} for one. Find those: {where}. Random "
        "weights are the same again by model.weights, model.seed and hardware (device and dtype count) of that run"
    )


def config_of(folder: Path) -> PeftLoraConfig:
    """The settings of a saved adapter, as peft takes them: those that are known here, and no others."""
    saved = adapter_settings(folder)
    try:
        return PeftLoraConfig(**{key: value for key, value in saved.items() if key in MEANT})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / ADAPTER_FILE}: {error}: put a whole copy of the adapter there") from error


def read(adapted: PeftModel, folder: Path, name: str) -> None:
    """Fill the adapter `name` from `folder`. ModelError where its tensors aren't those that this model has for it."""
    refuse_no_adapter_weights(folder)
    report = adapted.load_adapter(str(folder), name, is_trainable=True)
    if report.missing_keys or report.unexpected_keys:
        raise ModelError(
            f"the adapter in {folder} is one of another model: it lacks {len(report.missing_keys)} tensors and has "
            f"{len(report.unexpected_keys)} too many, {min([*report.missing_keys, *report.unexpected_keys])} for one. "
            "Set model.path to the model that it was trained on"
        )


def wrap(model: Any, config: PeftLoraConfig) -> PeftModel:
    with warnings.catch_warnings():  # peft asks for a property that transformers has renamed: no business of the user
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)
