"""What can be seen to be wrong within a second, before torch is imported or a model read: data, env, machine, model,
prompt and disk. Writes nothing; what isn't cheap to know is left to whoever needs it.
"""

import math
import shutil
from pathlib import Path

from vlm_agents.config import (
    CollectConfig,
    DoctorConfig,
    EvalConfig,
    MergeConfig,
    PpoConfig,
    PreprocessConfig,
    RunConfig,
    SftConfig,
    StageConfig,
)
from vlm_agents.errors import ConfigError, DataError
from vlm_agents.files import writing
from vlm_agents.models.adapters import named_base, read_settings, refuse_no_adapter_weights
from vlm_agents.models.machine import refuse_no_bitsandbytes, refuse_no_driver
from vlm_agents.models.sources import adapter_folder, check_source, config_of, parameters_of, source_of
from vlm_agents.weights import ADAPTER_FILE, has_model, holds_work, init_folder, unfinished

MOMENTS = 8  # bytes that AdamW keeps of a trained parameter
COPY = 4  # and its copy in fp32, where the weights are in another precision
MIB = 1 << 20


def check(cfg: RunConfig) -> None:
    """VlmAgentsError where the run of `cfg` can't be: in one line what, where, and the fix."""
    check_data(cfg.stage)
    check_env_and_machine(cfg)
    if has_model(cfg):
        source = check_weights(cfg)
        check_prompt(cfg, source)
        check_disk(cfg, source)


def check_before_a_chain(cfg: RunConfig) -> None:
    """What of `check` needs nothing that an earlier stage writes."""
    check_env_and_machine(cfg)
    if has_model(cfg) and cfg.model.path:
        check_source(cfg.model.path, weights=cfg.model.weights != "random")


def check_env_and_machine(cfg: RunConfig) -> None:
    stage = cfg.stage
    if not isinstance(stage, PreprocessConfig | SftConfig):
        check_env(cfg)
    if has_model(cfg) and not isinstance(stage, DoctorConfig):  # which says itself what lacks
        refuse_no_driver(cfg.hardware.device)
        if not isinstance(stage, MergeConfig):
            refuse_no_bitsandbytes(cfg.model.quantize)


def check_data(stage: StageConfig) -> None:
    """That what sft or preprocess reads is there and of the right kind; its rows aren't looked at, but for a first."""
    if isinstance(stage, SftConfig):
        path = Path(stage.data) / "train.parquet"
        if unfinished(Path(stage.data)):
            raise DataError(f"no whole {path}: its stage=preprocess isn't finished; give that command again first")
        from vlm_agents.chats import read_chats  # pyarrow

        next(read_chats(path), None)
    elif isinstance(stage, PreprocessConfig):
        from vlm_agents.episodes import LINES, read_episodes
        from vlm_agents.llava_data import refuse_no_list

        for source in map(Path, stage.data):
            if source.suffix == ".json":
                refuse_no_list(source)
            elif source.is_file():
                raise DataError(f"{source}: chats in LLaVA's layout are one JSON list in a file named *.json")
            else:
                ours = any((source / name).is_file() for name in (LINES, "config.yaml"))
                if not ours and (files := sorted(source.glob("*.json"))):
                    raise DataError(
                        f"{source} is no run directory: name the files in it that hold chats in LLaVA's layout, as in "
                        f"stage.data=[{files[0]}] stage.images={source}"
                    )
                next(read_episodes(source, pictures=False), None)


def check_env(cfg: RunConfig) -> None:
    """That the env can be made, and has an expert where one is asked for."""
    from vlm_agents.stages.playing import has_expert, open_envs

    with open_envs(cfg.env, 1, advised=False):
        pass
    stage = cfg.stage
    if isinstance(stage, CollectConfig):
        wanted, fix = "expert" in (stage.policy, stage.rater), "stage.policy and stage.rater to something else"
    else:
        wanted, fix = isinstance(stage, EvalConfig) and stage.policy == "expert", "stage.policy=model or random"
    if wanted and not has_expert(cfg.env):
        raise ConfigError(f"{cfg.env.id} has no expert: set {fix}")


def check_weights(cfg: RunConfig) -> str | None:
    """The folder or hub id whose config.json the model has, with weights where they are needed; None: it has none."""
    stage, source = cfg.stage, source_of(cfg.model)
    if isinstance(stage, DoctorConfig):  # it needs none, and dimensions do for what isn't here
        if cfg.model.path is not None and not Path(cfg.model.path).is_dir() and cfg.model.architecture is not None:
            return None
        if source:
            check_source(source, weights=False)
        return source
    folder = Path(cfg.run_dir)
    if folder.is_dir() and holds_work(folder):  # what it needs of others is in its checkpoint
        return source
    if init := getattr(stage, "init", None):
        start = adapter_folder(init) if isinstance(stage, MergeConfig) else init_folder(init)
        if not (start / ADAPTER_FILE).is_file():
            check_source(str(start))
            return str(start)
        read_settings(start)
        refuse_no_adapter_weights(start)
        base = named_base(start)
        if Path(base).is_dir() or source is None:
            return base or None
    if source:
        check_source(source, weights=cfg.model.weights != "random")
    return source


def check_prompt(cfg: RunConfig, source: str | None) -> None:
    """That prompts and replies as long as the settings allow aren't more than the model's config has positions for."""
    from vlm_agents.stages.playing import refuse_too_long

    said = config_of(source) if source else cfg.model.architecture or {}
    text = said.get("text_config")
    context = (text if isinstance(text, dict) else said).get("max_position_embeddings")
    if not isinstance(context, int):
        return
    prompt = cfg.prompt
    refuse_too_long(context, "prompt.max_prompt_tokens", prompt.max_prompt_tokens, prompt.max_reply_tokens)
    if isinstance(cfg.stage, DoctorConfig):
        refuse_too_long(context, "stage.prompt_tokens", cfg.stage.prompt_tokens, prompt.max_reply_tokens)


def check_disk(cfg: RunConfig, source: str | None) -> None:
    """DataError where the run's model and checkpoints surely don't fit: of whole weights, counted without activations,
    adapters or records."""
    stage = cfg.stage
    if not isinstance(stage, SftConfig | PpoConfig | MergeConfig) or not source:
        return
    if cfg.model.lora and not isinstance(stage, MergeConfig):
        return
    width = 4 if cfg.hardware.dtype == "float32" else 2
    model = parameters_of(source) * width
    checkpoints = kept = size = 0
    if not isinstance(stage, MergeConfig):
        trained = cfg.model.train.settled(isinstance(stage, PpoConfig) and stage.freeze_vision)
        whole = trained.vision and trained.projector and trained.language
        size = model + (parameters_of(source) * (MOMENTS + (COPY if width < 4 else 0)) if whole else 0)
        written = math.ceil(stage.iterations / stage.checkpoint_every) if isinstance(stage, PpoConfig) else 1
        kept, checkpoints = min(written, stage.keep_checkpoints), min(written, stage.keep_checkpoints + 1)
    need = max(checkpoints * size, kept * size + model)
    folder = Path(cfg.run_dir)
    there = sum(path.stat().st_size for path in folder.glob("checkpoints/**/*") if path.is_file())
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with writing(place):
        free = shutil.disk_usage(place).free + there
    if need > free:
        fits = max(min(checkpoints, 2) * size, size + model) <= free
        fewer = ", or set stage.keep_checkpoints=1" if kept > 1 and fits else ""
        raise DataError(
            f"can't write {folder}: its model and checkpoints take {need / MIB:,.0f} MiB at least, and "
            f"{free / MIB:,.0f} MiB are free there. Make room{fewer}"
        )
