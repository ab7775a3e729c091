"""What a run's weights, or its data, were taught, in which env and asked how, and what can't go with its settings.

Read from run directories, back to the data. What is no run of ours says nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_agents.config import AUTO, CollectConfig, EvalConfig, PpoConfig, PreprocessConfig, RunConfig, SftConfig, flat
from vlm_agents.errors import ConfigError
from vlm_agents.weights import (
    ADAPTER_FILE,
    RUN_MODEL,
    TEMPERATURE_FILE,
    flat_settings,
    has_model,
    init_of,
    inside,
    part_of,
    run_of,
    told_by,
)

# Settings of env and prompt that change nothing in what a model sees and how it is asked.
UNSEEN = {
    *(f"env.{name}" for name in ("family", "max_steps", "invalid_penalty", "workers", "timeout_s")),
    *(f"env.{name}" for name in ("expert", "success", "success_return", "state")),
    *(f"prompt.{name}" for name in ("max_prompt_tokens", "max_reply_tokens", "score_temperature")),
}

Taught = dict[str, list[Any]]  # settings by dotted names, each with every value that was met


def taught(folder: Path) -> Taught:
    """How the model, or the data, in a run directory was asked, and in which env: empty where nobody can tell.

    A stage that asks nothing itself passes on what its data did: sft -> preprocess -> collect.
    """
    settings = told_by(folder)
    if settings.get("stage.name") in ("collect", "ppo"):
        asked = {key: [value] for key, value in settings.items() if key.split(".")[0] in ("env", "prompt")}
        ppo = settings["stage.name"] == "ppo"
        return asked | ({"model.temperature": [settings.get("model.temperature")]} if ppo else {})
    origin = {"sft": "stage.data", "preprocess": "stage.data", "merge": "stage.init"}
    sources = settings.get(origin.get(settings.get("stage.name", ""), ""), [])
    return together(found_from(folder, source) for source in ([sources] if isinstance(sources, str) else sources))


def together(folders: Iterable[Path]) -> Taught:
    """What several taught."""
    union: Taught = {}
    for folder in folders:
        for key, values in taught(folder).items():
            union[key] = [*(known := union.get(key, [])), *(value for value in values if value not in known)]
    return union


def found_from(folder: Path, source: str) -> Path:
    """What the run in `folder` called `source`: as a rule it was started some folders above its own."""
    above = (parent / source for parent in folder.resolve().parents)
    return next((path for path in above if path.is_dir()), Path(source))


def differences(cfg: RunConfig) -> list[str]:
    """A line for each setting in which this run asks otherwise than its weights, or its data, were taught."""
    now = dict(flat({"env": vars(cfg.env), "prompt": vars(cfg.prompt)})) | {"model.temperature": cfg.model.temperature}
    if isinstance(cfg.stage, SftConfig):
        return [
            f"the data asks with {key}={words}, and this run's setting is {now[key]}: what is learned is the data's"
            for key, words in otherwise(taught(Path(cfg.stage.data)), now)
        ]
    init = init_of(cfg)
    run = run_of(init) if init else None
    if init is None or run is None or not isinstance(cfg.stage, PpoConfig | EvalConfig | CollectConfig):
        return []
    lines = [
        f"these weights learned {key}={words}, and this run has {key}={now[key]}"
        for key, words in otherwise(taught(run), now)
    ]
    settings, model = told_by(run), cfg.model
    for key, value in {"image_processor": model.image_processor, "quantize": model.quantize}.items():
        then = part_of(settings, f"model.{key}") or settings.get(f"model.{key}")
        if then != value and (key == "quantize" or value is not None):  # its pictures' settings lie in the folder
            lines.append(f"these weights learned model.{key}={then}, and this run has model.{key}={value}")
    if model.temperature_head and cfg.stage.name != "ppo" and not (inside(init) / TEMPERATURE_FILE).is_file():
        lines.append(f"these weights learned no temperature: it stays at model.temperature={model.temperature:g}")
    return lines


def otherwise(known: Taught, now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings whose value `now` is none of the known ones, and those in words."""
    for key, values in known.items():
        moot = key in UNSEEN or (key == "prompt.last_k" and now["prompt.history"] != "last_k")
        another_env = key.startswith("env.") and key != "env.id" and now["env.id"] not in known.get("env.id", [])
        if key in now and now[key] not in values and not moot and not another_env:
            yield key, " or ".join(map(str, values))


# ---- what can have no sense ------------------------------------------------------------------------------------------
def refuse_nonsense(cfg: RunConfig) -> None:
    """ConfigError where what the run starts from, or reads, can't go with its settings."""
    refuse_idle_init(cfg)
    refuse_other_model(cfg)
    refuse_other_labels(cfg)
    refuse_moving_reference(cfg)


def refuse_idle_init(cfg: RunConfig) -> None:
    """Nobody would read it, and the record would name weights that never played."""
    init = getattr(cfg.stage, "init", None)
    if init not in (None, AUTO) and not has_model(cfg):
        policy = getattr(cfg.stage, "policy", "")
        raise ConfigError(
            f"stage.policy={policy} plays without a model, and stage.init={init} names one: leave stage.init out, or "
            "set stage.policy=model"
        )


def refuse_other_model(cfg: RunConfig) -> None:
    """The run at `stage.init` had another model than `cfg` says: the record would name the wrong one."""
    init = init_of(cfg)
    run = run_of(init) if init else None
    if run is None:
        return
    trained = flat_settings(run / "config.yaml", f"put it back, or set stage.init={init}/{RUN_MODEL}").get("model.name")
    if trained not in (None, cfg.model.name):
        raise ConfigError(f"stage.init={init} is a run of model={trained}, not {cfg.model.name}: set model={trained}")


def refuse_other_labels(cfg: RunConfig) -> None:
    """Labels written in one format under prompts that ask for another."""
    if not isinstance(cfg.stage, PreprocessConfig):
        return
    for source in cfg.stage.data:
        asked = told_by(Path(source)).get("prompt.format", cfg.prompt.format)
        if asked != cfg.prompt.format:
            raise ConfigError(
                f"{source} asked with prompt={asked}, and labels would be written as prompt={cfg.prompt.format} wants "
                f"them: set prompt={asked}"
            )


def refuse_moving_reference(cfg: RunConfig) -> None:
    """Switching the adapter off must give the policy that training started from."""
    init = init_of(cfg)
    if cfg.algo and cfg.algo.kl_coef > 0 and init and (inside(init) / ADAPTER_FILE).is_file():
        raise ConfigError(
            f"algo.kl_coef > 0 holds the policy near the one that it starts from, and stage.init={init} is an "
            "adapter that training would change: merge it into its model first (stage=merge), or set algo.kl_coef=0"
        )
