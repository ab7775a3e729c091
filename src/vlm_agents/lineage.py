"""What a run's weights, or its data, were taught, in which env and asked how, and what can't go with its settings.

Read from run directories, back to the data. What is no run of ours says nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_agents.config import (
    AUTO,
    CollectConfig,
    EvalConfig,
    PpoConfig,
    PreprocessConfig,
    PromptConfig,
    RunConfig,
    SftConfig,
    env_of,
    flat,
)
from vlm_agents.errors import ConfigError
from vlm_agents.weights import (
    ADAPTER_FILE,
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
    # held-out questions and games teach nobody
    *(f"env.{name}" for name in ("eval_data", "eval_split", "pictures", "skip_bad", "sandbox.require")),
    *(f"prompt.{name}" for name in ("max_prompt_tokens", "max_reply_tokens", "score_temperature")),
}

Taught = dict[str, list[Any]]  # settings by dotted names, each with every value that was met


def taught(folder: Path) -> Taught:
    """How the model, or the data, in a run directory was asked, and in which env: empty where nobody can tell."""
    union: Taught = {}
    for settings in map(told_by, teachers(folder)):
        temperature = "model.temperature" if settings["stage.name"] == "ppo" else None
        for key, value in settings.items():
            if key.split(".")[0] in ("env", "prompt") or key == temperature:
                known = union.setdefault(key, [])
                known += [] if value in known else [value]
    return union


def teachers(folder: Path, met: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The runs of collect, or of ppo, that asked what the model, or the data, in a run directory was taught.

    A stage that asks nothing itself passes on what its data did: sft -> preprocess -> collect.
    """
    stage = None if folder.resolve() in met else told_by(folder).get("stage.name")  # one renamed to its own source's
    if stage in ("collect", "ppo"):
        yield folder
    elif origin := {"sft": "data", "preprocess": "data", "merge": "init"}.get(stage or ""):
        for source in sources_of(folder, f"stage.{origin}"):
            yield from teachers(source, met | {folder.resolve()})


def sources_of(folder: Path, key: str) -> list[Path]:
    """The run directories that the setting `key` of the run in `folder` names."""
    sources = told_by(folder).get(key) or []
    found = [found_from(folder, source) for source in ([sources] if isinstance(sources, str) else sources)]
    return [run_of(str(path)) or path for path in found]


def line_of(init: str | None) -> Iterator[Path]:
    """The run whose weights `init` names, that whose weights it began from, and so on back."""
    run = run_of(init) if init else None
    met: set[Path] = set()
    while run and run.resolve() not in met:  # one that was renamed to its own source's name
        met.add(run.resolve())
        yield run
        run = next(iter(sources_of(run, "stage.init")), None)


def cloned_in(cfg: RunConfig) -> Path | None:
    """The stage=sft that the run's weights come from; None where they come from none, or nobody can tell."""
    return next((run for run in line_of(init_of(cfg)) if told_by(run).get("stage.name") == "sft"), None)


def found_from(folder: Path, source: str) -> Path:
    """What the run in `folder` called `source`: as a rule it was started some folders above its own."""
    above = (parent / source for parent in folder.resolve().parents)
    return next((path for path in above if path.is_dir()), Path(source))


def differences(cfg: RunConfig) -> list[str]:
    """A line for each setting in which this run asks otherwise than its weights, or its data, were taught."""
    now = dict(flat({"env": vars(cfg.env), "prompt": vars(cfg.prompt)})) | {"model.temperature": cfg.model.temperature}
    unread = unread_weights(cfg)
    if isinstance(cfg.stage, SftConfig):
        return unread + [
            f"the data asks with {key}={words}, and this run's setting is {now[key]}: what is learned is the data's"
            for key, words in otherwise(taught(Path(cfg.stage.data)), now)
        ]
    init = init_of(cfg)
    run = run_of(init) if init else None
    if init is None or run is None or not isinstance(cfg.stage, PpoConfig | EvalConfig | CollectConfig):
        return []
    lines = unread + [
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


def unread_weights(cfg: RunConfig) -> list[str]:
    """A line where the settings name weights that nobody reads: those at `stage.init`, of another origin, have their
    place. An adapter does need its base, and loading it says which one that is."""
    init, model = init_of(cfg), cfg.model
    run = run_of(init) if init else None
    if init is None or run is None or (inside(init) / ADAPTER_FILE).is_file():
        return []
    settings, named = told_by(run), list[str]()
    path = settings.get("model.path")
    if model.path and (path is None or found_from(run, path).resolve() != Path(model.path).resolve()):
        named += [f"model.path={model.path}"]
    if model.weights == "random" and settings.get("model.weights") != "random":
        named += ["model.weights=random"]
    return [f"{' '.join(named)} isn't used: the weights are {init}; stage.init=null has it used"] if named else []


def otherwise(known: Taught, now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings whose value `now` is none of the known ones, and those in words."""
    for key, values in known.items():
        moot = key in UNSEEN or (key == "prompt.last_k" and now["prompt.history"] not in ("last_k", "answers"))
        another_env = key.startswith("env.") and key != "env.id" and now["env.id"] not in known.get("env.id", [])
        if key in now and now[key] not in values and not moot and not another_env:
            yield key, " or ".join(map(str, values))


def as_taught(cfg: RunConfig, init: str, old: Mapping[str, Any]) -> RunConfig:
    """`cfg` with the env and the prompt that the adapter at `init` was taught in, where that can be told: it is proven
    there, and the record names it. `old` as for `as_saved`."""
    run = run_of(init)
    known = old or next(map(told_by, teachers(run) if run else ()), {})
    env, prompt = part_of(known, "env"), part_of(known, "prompt")
    if not env or not prompt:
        return cfg
    try:
        return replace(cfg, env=env_of(env), prompt=PromptConfig(**prompt))
    except (KeyError, TypeError, ConfigError):  # of another version
        return cfg


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
    trained = flat_settings(run / "config.yaml", "put back a whole one").get("model.name")
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
    if cfg.algo and init and (inside(init) / ADAPTER_FILE).is_file():
        for name in ("kl_coef", "kl_reward_coef"):
            if getattr(cfg.algo, name) > 0:
                raise ConfigError(
                    f"algo.{name} > 0 holds the policy near the one that it starts from, and stage.init={init} is an "
                    f"adapter that training would change: merge it into its model first (stage=merge), or set "
                    f"algo.{name}=0"
                )
