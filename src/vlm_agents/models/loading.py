"""Folders, hub ids and bare dimensions to agents."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from vlm_agents.config import HardwareConfig, ModelConfig, TrainableConfig
from vlm_agents.errors import ConfigError, ModelError
from vlm_agents.models.actor_critic import Agent
from vlm_agents.models.adapters import refuse_full_training
from vlm_agents.models.architectures import tokenizer_for, whole_config
from vlm_agents.models.damage import refusing
from vlm_agents.models.families import Family, family_of, kind_of
from vlm_agents.models.heads import TemperatureHead, ValueHead, load_heads
from vlm_agents.models.machine import refuse_no_bitsandbytes, refuse_no_gpu
from vlm_agents.models.probing import verify
from vlm_agents.models.processing import (
    PROCESSOR_FILE,
    adjusted,
    load_image_processor,
    make_image_processor,
    prove_settings,
)
from vlm_agents.models.sources import TINY, WHOLE, base_of, check_source
from vlm_agents.progress import say, under_way
from vlm_agents.weights import ADAPTER_FILE, init_folder

PROBE = "What do you see?"

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_agent(cfg: ModelConfig, hardware: HardwareConfig, init: str | None = None) -> Agent:
    """The model of `cfg`, with the weights of `init` (a run directory or an HF folder) where given.

    `init` may hold whole weights, or an adapter: then its base is the folder that it names, and else `cfg`'s model,
    which must be the one that it was trained on.
    """
    use_hardware(hardware)
    refuse_no_bitsandbytes(cfg.quantize)
    os.environ.setdefault("DS_ACCELERATOR", hardware.device.split(":")[0])  # else deepspeed, once imported, warns
    if hardware.device == "cpu":  # there torch reads shared heads as they are; transformers copies them out for a mask
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    folder = init_folder(init) if init else None
    adapter = folder if folder and (folder / ADAPTER_FILE).is_file() else None
    if adapter:
        refuse_full_training(adapter, cfg.lora)
    base = base_of(adapter, cfg) if adapter else folder
    if adapter and base and cfg.path:  # of the settings, as a rule: an earlier stage trained that model further
        say(f"the adapter in {adapter} was trained on {base}: so that is taken, not model.path={cfg.path}")
    source = str(base or cfg.path or TINY)
    random = cfg.weights == "random" and base is None
    drawn = random and cfg.architecture is not None
    with under_way(f"making model={cfg.name}" if drawn else f"reading model {source}"):
        parts = make_parts(cfg, hardware) if drawn else load_parts(source, random, hardware, cfg)
    model, tokenizer, image_processor = parts
    keep_packing(model)
    with refusing(f"model {adapter or source}", WHOLE, adapter or source):
        if adapter and (adapter / PROCESSOR_FILE).is_file():  # its pictures may be others than the base's
            image_processor = load_image_processor(str(adapter))
        image_processor = adjusted(image_processor, cfg.image_processor or {})
        family = family_of(model, image_processor)
    prove_settings(family, cfg.image_processor or {})
    if cfg.lora is None:
        keep_gradients(model, family, cfg.train)
    else:
        from vlm_agents.models import lora  # peft imports bitsandbytes: seconds that a run without an adapter saves

        if adapter:
            remedy = "Set stage.init to a whole adapter of the model that model.path names"
            with refusing(f"adapter {adapter}", remedy, adapter):
                model = lora.load(model, adapter, family, cfg)
        else:
            model = lora.add(model, family, cfg.lora, cfg.train)
    if cfg.gradient_checkpointing:
        # renamed in the middle of transformers 5; version 6 forgets the older name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    width = model.config.get_text_config().hidden_size
    head = cfg.temperature_head and TemperatureHead(width, cfg.temperature_head, cfg.temperature)
    agent = Agent(model, family, tokenizer, image_processor, ValueHead(width, cfg.value_head), cfg.temperature, head)
    if folder or not random:
        load_heads(agent.heads(), folder or Path(source))
    agent = agent.to(hardware.device).eval()
    verify(agent)
    return agent


def use_hardware(hardware: HardwareConfig) -> None:
    """ConfigError where torch knows no such device, or this machine has none.

    A GPU with a number becomes the one that libraries take where they don't ask.
    """
    try:
        device = torch.device(hardware.device)
    except RuntimeError as error:
        raise ConfigError(f"hardware.device={hardware.device} is no device of torch: set cpu or cuda") from error
    if device.type == "cpu":  # where there is a mask, transformers copies keys and values for each of a group's heads
        os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"  # torch's kernel on a CPU takes them as they are
    if device.type == "cuda":
        refuse_no_gpu(hardware.device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)


def keep_gradients(model: nn.Module, family: Family, train: TrainableConfig) -> None:
    """Full training of the chosen parts, the others frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(train, family.part_of(name)))


def make_parts(cfg: ModelConfig, hardware: HardwareConfig) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor out of `cfg.architecture` alone, with the tiny model's vocabulary."""
    architecture = cfg.architecture or {}
    with refusing(f"model {cfg.name}", "See model.architecture"):
        kind = kind_of(str(architecture.get("model_type")))
        tokenizer = tokenizer_for(kind, AutoTokenizer.from_pretrained(str(TINY), trust_remote_code=False))
        image_processor = make_image_processor(kind, architecture.get("image_processor") or {})
        return draw_weights(whole_config(architecture, kind, tokenizer), cfg, hardware), tokenizer, image_processor


def draw_weights(config: Any, cfg: ModelConfig, hardware: HardwareConfig) -> Any:
    """A model with random weights, drawn where it will stay: on a CPU billions of them take minutes."""
    with torch.random.fork_rng(), torch.device(hardware.device):
        torch.manual_seed(cfg.seed)
        model = AutoModelForImageTextToText.from_config(config, **hf_settings(cfg, hardware))
    # saved under the names that the hub's files have, as a model that was loaded from one: version 4 knows no others
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    if not cfg.quantize:
        return model
    settings = hf_settings(cfg, hardware) | four_bit(config.model_type, hardware)
    quantised = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), **settings)
    quantised.name_or_path = model.name_or_path  # else an adapter on it would name "None" as its base
    return quantised


def load_parts(source: str, random: bool, hardware: HardwareConfig, cfg: ModelConfig) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor. Random weights have the same architecture and need no weight files.

    The processor class is not used: those of the Qwen families need torchvision for videos.
    """
    with refusing(f"model {source}", WHOLE, source):
        check_source(source, weights=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind_of(config.model_type)
        check_source(source, weights=not random)
        if "/" in (kernel := str(config._attn_implementation)):  # transformers would take it, before our own setting
            raise ModelError(f"{source}/config.json asks for code from the hub, {kernel}: remove _attn_implementation")
        if (weights := str(getattr(config, "transformers_weights", None) or "")).endswith(".bin"):
            raise ModelError(f"{source}/config.json names weights in {weights}: save them as safetensors")
        if random:
            model = draw_weights(config, cfg, hardware)
        else:
            settings = hf_settings(cfg, hardware)
            if cfg.quantize:
                settings |= four_bit(config.model_type, hardware)
            model = load_whole(source, settings)
        return model, load_tokenizer(source), load_image_processor(source)


def load_tokenizer(source: str) -> Any:
    """The tokenizer, with the chat template of the processor where that has its own, in its older file."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    older = cached_file(source, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    if older:
        tokenizer.chat_template = json.loads(Path(older).read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source} has no eos_token, which ends a turn: see its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:  # some have none; what fills a row is read by nobody
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {source} has no chat template: add its chat_template.jinja to the folder")
    said = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    if PROBE not in tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True):
        raise ModelError(f"the chat template of {source} leaves out what users say: see its chat_template.jinja")
    return tokenizer


def load_whole(source: str, settings: dict[str, Any]) -> Any:
    """A model with all of its weights: transformers draws at random what a file lacks, and only warns."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        source,
        **settings,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    absent = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if absent:
        raise ValueError(f"its weights lack {len(absent)} tensors, or have them in other shapes: {min(absent)}")
    return model


def hf_settings(cfg: ModelConfig, hardware: HardwareConfig) -> dict[str, Any]:
    # without trust_remote_code=False transformers asks whether to run the code of a model, and takes a y on stdin
    dtype = getattr(torch, hardware.dtype)
    return {"dtype": dtype, "attn_implementation": cfg.attention, "trust_remote_code": False}


def four_bit(model_type: str, hardware: HardwareConfig) -> dict[str, Any]:
    """What makes `from_pretrained` quantise as QLoRA does (arXiv 2305.14314): NF4, its constants quantised once more.

    What sees and the output layer keep their weights: they are few, and rounding hurts them most.
    """
    dtype = getattr(torch, hardware.dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if hardware.zero == 3 else torch.uint8,  # DeepSpeed divides weights of one type
        llm_int8_skip_modules=[*kind_of(model_type).seeing, "lm_head"],  # of 4 bits too
    )
    return {"quantization_config": config, "device_map": {"": hardware.device}}


def keep_packing(model: nn.Module) -> None:
    """Have bitsandbytes leave weights in 4 bits as they are.

    On some CPUs it packs them anew for its bfloat16 kernel as soon as a pass needs no gradient: sampling would round
    otherwise than scoring does, and training would fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
