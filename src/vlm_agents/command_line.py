"""The command line: compose a configuration, check it, run one stage. Alone with config.py it knows Hydra.

What a user can mend is told in one line, with exit status 2; any other exception is a bug of ours and keeps its
traceback. Nothing heavy is imported before the configuration is known to be good.
"""

import importlib
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from vlm_agents.config import conf_dir, parse, refuse_secrets, register
from vlm_agents.errors import ConfigError, VlmAgentsError, did_you_mean, harmless
from vlm_agents.files import writing

FLAGS = (
    *("--help", "-h", "--debug", "--cfg", "-c", "--multirun", "-m", "--run", "-r", "--resolve", "--info", "-i"),
    *("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--hydra-help"),
    *("--version", "--shell-completion", "-sc", "--experimental-rerun"),
)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its CPU kernels are optional, and fetched from a hub

OFF_BY_DEFAULT = {
    "algo": "stage=ppo brings it in",
    "model.lora": "add model/lora=adapter",
    "model.temperature_head": "add model/temperature_head=learned",
}

HELP = """\
Train a vision-language model as an agent. One run is one stage (stage=...):
{stages}

group=option chooses a part, key=value sets anything inside one:
{groups}

Examples:
  python -m vlm_agents stage=ppo env=minigrid
  python -m vlm_agents stage=eval stage.policy=expert env.id=MiniGrid-FourRooms-v0 stage.episodes=50

--cfg job prints the composed configuration; -m seed=0,1,2 sweeps; name=<name> continues a run;
--debug shows tracebacks.
"""


class Refused(BaseException):
    """Carries an error of the user past Hydra, which would add a line of its own to an Exception."""

    def __init__(self, error: VlmAgentsError) -> None:
        super().__init__(error)
        self.error = error


def run(argv: list[str]) -> int:
    """Run the command line `argv`, which is `sys.argv` and is put into Hydra's order; the exit status."""
    arguments = argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(help_text())
        return 0
    debug = "--debug" in arguments or os.environ.get("HYDRA_FULL_ERROR", "") == "1"
    argv[1:] = sorted((word for word in arguments if word != "--debug"), key=is_override)  # argparse: flags first
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come through to us
    try:
        check_flags(arguments)
        for word in arguments:
            setting, _, value = word.lstrip("+").partition("=")
            refuse_secrets(setting, value.strip("'\""))
            refuse_other_places(setting, value)
        register()
        compose_and_run(arguments)
    except Refused as refused:
        return report(refused.error, debug)
    except VlmAgentsError as error:
        return report(error, debug)
    return 0


def refuse_other_places(setting: str, value: str) -> None:
    """ConfigError for what would have Hydra make folders where no run of ours belongs, before anybody can check it."""
    if setting == "hydra.run.dir":
        raise ConfigError(f"hydra.run.dir={value}: a run makes its own directory; set run_dir={value}")
    if setting == "name" and "/" in value and "${" not in value:
        raise ConfigError(f"name={value!r} names a folder: use letters, digits and . _ + - only")


def compose_and_run(arguments: Sequence[str]) -> None:
    """Hand over to Hydra, which calls `run_stage` once, or once a job of a sweep."""
    sweeps: set[Path] = set()

    def job(composed: DictConfig) -> dict[str, float]:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sweeps.add(Path(HydraConfig.get().sweep.dir))
        return run_stage(composed)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    except VlmAgentsError:
        raise
    except (HydraException, OmegaConfBaseException, AssertionError, AttributeError, ValueError, OSError) as error:
        if any(frame.name == "run_stage" for frame in traceback.extract_tb(error.__traceback__)):
            raise  # it was composed, and a stage begun: a bug
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            with writing(Path(error.filename or "multirun")):  # where Hydra makes the directories of a sweep
                raise
        raise explain(error, arguments) from error
    finally:
        for folder in sweeps:
            remove_idle_sweep(folder)


def remove_idle_sweep(folder: Path) -> None:
    """Remove what Hydra made for jobs of a sweep that left nothing behind, and the sweep's folder if none left any."""
    with suppress(OSError):  # it holds more
        for job in folder.iterdir():
            if job.is_dir() and not any(job.iterdir()):
                job.rmdir()
        if [path.name for path in folder.iterdir()] == ["multirun.yaml"]:
            (folder / "multirun.yaml").unlink()
            for path in (folder, *folder.parents[:2]):
                path.rmdir()


def run_stage(composed: DictConfig) -> dict[str, float]:
    """Check one composed configuration and run its stage, in its run directory."""
    job = HydraConfig.get()
    sweep = job.mode == RunMode.MULTIRUN
    try:
        try:
            cfg = parse(composed)
        except OmegaConfBaseException as error:
            raise explain(error, ()) from error
        overrides = list(job.overrides.task)
        if sweep:
            if any(word.startswith("run_dir=") for word in overrides):
                raise ConfigError(
                    "run_dir=... is the directory of one run: set hydra.sweep.dir=... for those of a sweep"
                )
            cfg = replace(cfg, run_dir=job.runtime.output_dir)
        from vlm_agents import preflight
        from vlm_agents.run import Run, finished_metrics, settled

        cfg = settled(cfg)
        if (metrics := finished_metrics(cfg)) is not None:
            where = os.path.relpath(cfg.run_dir)
            print(
                f"{cfg.stage.name} was finished before: {where}. Nothing was done; another name= runs it again",
                flush=True,
            )
            return metrics
        preflight.check(cfg)
        if not sweep and not any(word.startswith("name=") for word in overrides):
            print(f"continue with: python -m vlm_agents {shlex.join([*overrides, f'name={cfg.name}'])}", flush=True)
        start = time.monotonic()
        with Run.open(cfg, overrides, sweep=Path(job.sweep.dir) if sweep else None) as run:
            metrics = importlib.import_module(f"vlm_agents.stages.{cfg.stage.name}").main(cfg, run)
        print(f"{cfg.stage.name} finished in {time.monotonic() - start:.0f} s: {os.path.relpath(run.dir)}", flush=True)
        return metrics
    except VlmAgentsError as error:
        if sweep:
            report(error, debug=False)
            raise  # Hydra keeps it until the sweep's other jobs are done
        raise Refused(error) from error


def report(error: VlmAgentsError, debug: bool) -> int:
    if debug:
        print(harmless("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print("error: " + harmless(" ".join(str(error).split())), file=sys.stderr)
    return 2


def is_override(word: str) -> bool:
    return ("=" in word and not word.startswith("-")) or word.startswith("~")


def check_flags(arguments: Iterable[str]) -> None:
    """Refuse an unknown --flag in one line, where Hydra prints a page."""
    for word in arguments:
        flag = word.split("=", 1)[0]
        if flag.startswith("-") and flag not in FLAGS:
            raise ConfigError(f"{flag}: no such flag.{did_you_mean(flag, FLAGS)} Settings are written key=value")


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """What Hydra or OmegaConf found wrong with the overrides, in our words: where, what, the fix."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(cause).split("\n    full_key", 1)[0].split("\nSee https", 1)[0].split())
    match cause:
        case ConfigKeyError() | ConfigAttributeError():
            text = f"{cause.full_key}: no such setting.{suggestion(cause)}"
        case ValidationError():
            text = f"{cause.full_key}: {text.rstrip('.')}.{example(cause)}"
        case MissingMandatoryValue():
            text = f"{cause.full_key} has no value: give {cause.full_key}=..."
        case MissingConfigException():
            missing = str(cause.missing_cfg_file)
            given = (word.split("=", 1) for word in overrides if "=" in word)  # an option may hold a slash itself
            group, option = next((pair for pair in given if "/".join(pair) == missing), missing.rsplit("/", 1))
            nested = conf_dir().glob("experiment/*/*.yaml") if group == "experiment" else ()
            names = (path.relative_to(conf_dir() / group).with_suffix("").as_posix() for path in nested)
            options = sorted({*(cause.options or ()), *names})
            hint = f"{did_you_mean(option, options)} Options: {', '.join(options) or 'none'}"
            text = f"{group}={option}: no such option.{hint}"
        case OverrideParseException():
            text = f"{cause.override}: not of the form key=value ({text}){quoted(str(cause.override))}"
        case InterpolationResolutionError():
            text = f"{text}: a value refers to it as ${{...}}, and there is no such setting"
        case ValueError():
            text = f"{' '.join(overrides)}: {text}. Write group=option"
        case _ if isinstance(error, AssertionError | AttributeError) or "No match in the defaults list" in text:
            text = below_nothing(overrides) or text
    return ConfigError(text)


def suggestion(error: OmegaConfBaseException) -> str:
    """` Did you mean ...?` for an unknown key, else what there is at that place."""
    known = [str(key) for key in error.parent_node]
    path = str(error.full_key).rpartition(".")[0]
    if not known:  # any may be given, such as model.image_processor's
        return f" Write '{path}={{{error.key}: ...}}'"
    hint = did_you_mean(str(error.key), known if path else [*known, *groups()])
    return hint.replace("'", f"'{path}.", 1) if path and hint else hint or f" There are: {', '.join(known)}"


def example(error: OmegaConfBaseException) -> str:
    """` For example key=value`, with the value that the setting has by default."""
    value = OmegaConf.select(error.parent_node, str(error.key), throw_on_missing=False)
    return "" if value is None else f" For example {error.full_key}={value}"


def quoted(word: str) -> str:
    """`. Write ...` for an override whose value Hydra's grammar takes for more than a word."""
    setting, _, value = word.partition("=")
    quote = "'" if '"' in value else '"'
    return (
        f". A value that isn't one word is quoted: {shlex.quote(f'{setting}={quote}{value}{quote}')}" if value else ""
    )


def below_nothing(overrides: Iterable[str]) -> str:
    """Names the override that reaches into a part that this run doesn't have; Hydra has only an assertion there."""
    for word in overrides:
        for part, fix in OFF_BY_DEFAULT.items():
            if word.lstrip("+~").startswith((f"{part}.", f"{part}=")):
                return f"{word}: this run has no '{part}'; {fix}"
    return ""


def groups() -> dict[str, list[str]]:
    """Every group of conf/ and its options."""
    found: dict[str, list[str]] = {}
    for path in sorted(conf_dir().rglob("*.yaml")):
        group = path.parent.relative_to(conf_dir()).as_posix()
        if group not in (".", "local"):
            found.setdefault(group, []).append(path.stem)
    return found


def help_text() -> str:
    """Stages and groups as they stand in conf/; a stage is described by the first line of its file."""
    options = groups()
    first_lines = {name: (conf_dir() / f"stage/{name}.yaml").read_text().split("\n", 1)[0] for name in options["stage"]}
    stages = [f"  {name:<12}{line.lstrip('# ')}" for name, line in first_lines.items()]
    width = max(map(len, options)) + 2
    chosen = [
        fill(f"  {group:<{width}}{', '.join(names)}", width=120, subsequent_indent=" " * (width + 2))
        for group, names in options.items()
        if group != "stage"
    ]
    return HELP.format(stages="\n".join(stages), groups="\n".join(chosen)).rstrip()
