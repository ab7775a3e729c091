"""What can be seen to be wrong within a second, before torch is imported or a model read: data, env, machine, model,
prompt and disk. Writes nothing; what isn't cheap to know is left to whoever needs it.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlm_agents import imports
from vlm_agents.checkpoints import newest_first
from vlm_agents.config import (
    AUTO,
    CollectConfig,
    DoctorConfig,
    EvalConfig,
    MergeConfig,
    PpoConfig,
    PreprocessConfig,
    RunConfig,
    ServeConfig,
    SftConfig,
    StageConfig,
    command,
)
from vlm_agents.errors import ConfigError, DataError, did_you_mean
from vlm_agents.files import writing
from vlm_agents.launch import Nodes, has_ranks
from vlm_agents.lineage import refuse_nonsense
from vlm_agents.models.adapters import read_settings, refuse_no_adapter_weights
from vlm_agents.models.machine import refuse_no_bitsandbytes, refuse_no_driver
from vlm_agents.models.sources import adapter_folder, base_of, check_source, config_of, parameters_of, source_of
from vlm_agents.server import address_of, engine_of, port_of
from vlm_agents.weights import ADAPTER_FILE, has_model, init_folder, run_of, told_by, unfinished

MOMENTS = 8  # bytes that AdamW keeps of a trained parameter
COPY = 4  # and its copy in fp32, where the weights are in another precision
MIB = 1 << 20
NAMED = 8  # of the newest runs, in an error


def check(cfg: RunConfig) -> None:
    """VlmAgentsError where the run of `cfg` can't be: in one line what, where, and the fix."""
    refuse_other_name(cfg)
    check_data(cfg.stage)
    check_env_and_machine(cfg)
    check_own_parts(cfg)
    if has_model(cfg):
        refuse_nonsense(cfg)  # what a run says of its model is told before what its files look like
        source = check_weights(cfg)
        if not isinstance(cfg.stage, ServeConfig):
            check_prompt(cfg, source)
        check_disk(cfg, source)
    check_server(cfg)


def check_before_a_chain(cfg: RunConfig, made: Sequence[Path]) -> None:
    """What of `check` needs nothing that an earlier stage, whose directories are `made`, writes."""
    init = getattr(cfg.stage, "init", None)
    if init == AUTO or (init and any(Path(init).resolve().is_relative_to(folder) for folder in made)):
        cfg = replace(cfg, stage=replace(cfg.stage, init=None))
    elif init:
        refuse_nonsense(cfg)
    check_env_and_machine(cfg)
    check_own_parts(cfg)
    if has_model(cfg):
        check_prompt(cfg, check_weights(cfg))


def check_env_and_machine(cfg: RunConfig) -> None:
    stage = cfg.stage
    if not isinstance(stage, PreprocessConfig | SftConfig | ServeConfig):
        check_env(cfg)
    if has_model(cfg) and not isinstance(stage, DoctorConfig):  # which says itself what lacks
        ranks = has_ranks(cfg)
        refuse_no_driver(cfg.hardware.device, cfg.hardware.processes if ranks else 1)
        if ranks:
            Nodes.here(cfg.hardware.nodes)
        if not isinstance(stage, MergeConfig):
            refuse_no_bitsandbytes(cfg.model.quantize)
        if cfg.hardware.deepspeed:
            from vlm_agents.learn.zero_settings import zero_config  # it imports deepspeed: seconds

            zero_config(cfg.hardware, max_grad_norm=1.0, trained=1)


def refuse_other_name(cfg: RunConfig) -> None:
    """DataError where the stage reads what an earlier one left under its name, and only other names have such."""
    match cfg.stage:
        case PreprocessConfig(data=sources):
            pass
        case SftConfig(data=source) | MergeConfig(init=source):
            sources = [source]
        case _:
            return
    for folder in map(Path, sources):
        if folder.parent.name == cfg.name and not folder.parent.exists():
            runs = sorted(folder.parent.parent.glob(f"*/{folder.name}/DONE"), key=lambda path: -path.stat().st_mtime)
            names = [path.parent.parent.name for path in runs]
            if names:
                hint = did_you_mean(cfg.name, names)
                raise DataError(
                    f"nothing has run under name={cfg.name}: give the name of a run that has its "
                    f"stage={folder.name} done.{hint} There are: {', '.join(names[:NAMED])}"
                )


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
    """That the env can be made, keeps the contract if somebody else wrote it, and has an expert if one is asked for.

    A family that can tell an id without making an env isn't asked for more.
    """
    from vlm_agents.envs import is_known
    from vlm_agents.stages.playing import open_envs

    stage = cfg.stage
    fix = "stage.policy=model" if cfg.env.free_text else "stage.policy=model or random"
    if isinstance(stage, CollectConfig):
        other = "stage.policy=model" if cfg.env.free_text else "stage.policy=random"
        others = {other: stage.policy, "stage.rater=none": stage.rater}
        needless = [setting for setting, value in others.items() if value == "expert"]
        wanted, fix = bool(needless), " ".join(needless)
    elif isinstance(stage, PpoConfig) and cfg.algo and cfg.algo.advised:
        wanted, fix = True, " ".join(f"algo.{name}=0" for name in cfg.algo.advised)
    else:
        wanted = isinstance(stage, EvalConfig) and stage.policy == "expert"
    wanted = wanted or cfg.env.expert is not None
    if is_known(cfg.env) and not wanted and not cfg.env.foreign:
        return
    with open_envs(cfg.env, 1, "always" if wanted else "never") as envs:
        if wanted and not envs.has_expert:
            raise ConfigError(f"{cfg.env.id} has no expert: set {fix}, or env.expert=my_package.my_module:MyExpert")
        if cfg.env.foreign:
            envs.check_contract()


def check_own_parts(cfg: RunConfig) -> None:
    """That a prompt format of the user's own can be loaded and reads what it writes, and that an algorithm is there."""
    if cfg.algo is not None and cfg.algo.factory is not None:
        imports.attribute("algo.factory", cfg.algo.factory)
    if cfg.prompt.factory is not None:
        from vlm_agents.prompting import make_format

        make_format(cfg.prompt)


def check_server(cfg: RunConfig) -> None:
    """That there is a server to start, an address for it, and something left to wait for."""
    stage = cfg.stage
    if not isinstance(stage, ServeConfig):
        return
    engine_of(stage, cfg.hardware)
    port_of(address_of(stage.host), stage.port)
    if stage.until and (Path(stage.until) / "DONE").exists():
        raise ConfigError(f"stage.until={stage.until} is finished already: leave it out, or name a run that isn't")


def check_weights(cfg: RunConfig) -> str | None:
    """The folder or hub id whose config.json the model has, with weights where they are needed; None: it has none."""
    stage, source = cfg.stage, source_of(cfg.model)
    if isinstance(stage, DoctorConfig):  # it needs none, and dimensions do for what isn't here
        if cfg.model.path is not None and not Path(cfg.model.path).is_dir() and cfg.model.architecture is not None:
            return None
        if source:
            check_source(source, weights=False)
        return source
    if isinstance(stage, SftConfig | PpoConfig) and newest_first(Path(cfg.run_dir) / "checkpoints"):
        return source  # it goes on with the weights of a checkpoint
    if init := getattr(stage, "init", None):
        start = adapter_folder(init) if isinstance(stage, MergeConfig) else init_folder(init)
        base: Path | None = start
        if (start / ADAPTER_FILE).is_file() and isinstance(stage, ServeConfig):
            merge = command(["stage=merge", f"name={cfg.name}", f"stage.init={init}"])
            raise ConfigError(
                f"stage.init={init} is an adapter, and a whole model is served: give first {merge}, and then this "
                f"command with stage.init=outputs/{cfg.name}/merge"
            )
        if (start / ADAPTER_FILE).is_file():
            read_settings(start)
            refuse_no_adapter_weights(start)
            base = base_of(start, cfg.model)
        if base:
            check_source(str(base))
            refuse_other_kind(cfg, init, str(base))
            return str(base)
    if source:
        check_source(source, weights=cfg.model.weights != "random")
    return source


def refuse_other_kind(cfg: RunConfig, init: str, source: str) -> None:
    """ConfigError where the weights in `source`, to which `init` leads, are of another architecture than the model that
    is configured: the record would name that one."""
    own = source_of(cfg.model)
    wanted = config_of(own).get("model_type") if own else None
    wanted = wanted or (cfg.model.architecture or {}).get("model_type")
    found = config_of(source).get("model_type")
    if found and wanted and found != wanted:
        run = run_of(init)
        path = (told_by(run).get("model.path") if run else None) or source
        raise ConfigError(
            f"stage.init={init} has weights of model_type={found}, and model={cfg.model.name} is one of {wanted}: set "
            f"model= to what they were made of, or model.path={path}"
        )


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
        whole = len(cfg.model.train.parts) == 3
        size = model + (parameters_of(source) * (MOMENTS + (COPY if width < 4 else 0)) if whole else 0)
        written = math.ceil(stage.iterations / stage.checkpoint_every) if isinstance(stage, PpoConfig) else 1
        wanted = stage.keep_checkpoints + (stage.keep_best if isinstance(stage, PpoConfig) else 0)
        kept, checkpoints = min(written, wanted), min(written, wanted + 1)
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
