"""Low-rank adapters (peft) on chosen parts of a model. Not full training: that is `loading.keep_gradients`."""

from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

from vlm_agents.config import LoraConfig, TrainableConfig
from vlm_agents.errors import ConfigError
from vlm_agents.models.families import Family


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
    return get_peft_model(model, config)


def load(model: Any, folder: str, family: Family, lora: LoraConfig, train: TrainableConfig) -> PeftModel:
    """A saved adapter, trainable in the chosen parts. ConfigError where `lora` asks for another shape."""
    adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
    saved = adapted.peft_config["default"]
    assert isinstance(saved, PeftLoraConfig)
    if (saved.r, saved.lora_alpha) != (lora.rank, lora.alpha):
        raise ConfigError(
            f"the adapter in {folder} has rank {saved.r} and alpha {saved.lora_alpha}: set model.lora.rank={saved.r} "
            f"model.lora.alpha={saved.lora_alpha}"
        )
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name and getattr(train, family.part_of(name)))
    return adapted
