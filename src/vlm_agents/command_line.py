"""The command line: compose a configuration, check it, run one stage. With chain, completion,
hydra_errors and config it alone knows Hydra.

What a user can mend is told in one line, with exit status 2; any other exception is a bug of ours and keeps its
traceback. Nothing heavy is imported before the configuration is known to be good.
"""

import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vlm_agents import completion, cores
from vlm_agents.config import RunConfig, command, conf_dir, described, groups, listing, parse, refuse_secrets, register
from vlm_agents.errors import ConfigError, VlmAgentsError, harmless
from vlm_agents.files import writing
from vlm_agents.hydra_errors import REFUSALS, check_flags, explain, first_of_sweep, is_override, jobs_of
from vlm_agents.progress import hush
from vlm_agents.versions import versions

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its CPU kernels are optional, and fetched from a hub

Task = Callable[[DictConfig], Any]
HELP_FLAGS = {"--help", "-h"}

HELP = """\
Train a vision-language model as an agent. One run is one stage (stage=...):
{stages}

group=option chooses a part, key=value sets anything inside one:
{groups}

Examples:
  python -m vlm_agents stage=ppo env=minigrid
  python -m vlm_agents stage=eval stage.policy=expert env.id=MiniGrid-FourRooms-v0 stage.episodes=50
  python -m vlm_agents run name=mine env.id=MiniGrid-Empty-8x8-v0 ppo.stage.iterations=4
      all stages, from collect to eval; `run number_line`: those of an experiment

stage=ppo --help lists every setting of that run with its meaning; --cfg job prints the composed
configuration; -m seed=0,1,2 sweeps; name=<name> continues a run; --dry-run says what
would be done; --version; --debug shows tracebacks.
"""


class Carried(BaseException):
    """Carries an error past Hydra, which would add a line of its own to an Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def run(argv: list[str]) -> int:
    """Run the command line `argv`, which is `sys.argv` and is put into Hydra's order; the exit status."""
    hush()
    arguments = argv[1:]
    debug = "--debug" in arguments or os.environ.get("HYDRA_FULL_ERROR", "") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come through to us
    try:
        if (text := answer(arguments)) is not None:
            print(text)
            return 0
        words = check_flags([open_setting(word) for word in arguments if word not in ("--debug", *HELP_FLAGS)])
        for word in words:
            setting, _, value = word.lstrip("+").partition("=")
            refuse_secrets(setting, value.strip("'\""))
            refuse_other_places(setting, value)
        register()
        cores.forget_nonsense()
        if "run" in words:
            from vlm_agents import chain

            return chain.main([word for word in words if word != "run"], debug)
        if HELP_FLAGS & set(arguments):
            print(settings_help(argv, words))
        elif "--dry-run" in words:
            compose_first(would_do, argv, words)
        else:
            compose_and_run(run_stage, argv, words)
    except Carried as carried:
        if not isinstance(carried.error, VlmAgentsError):
            raise carried.error from None
        return report(carried.error, debug)
    except VlmAgentsError as error:
        return report(error, debug)
    return 0


def answer(arguments: Sequence[str]) -> str | None:
    """What a command prints that composes nothing; None for others."""
    if "--version" in arguments:
        return versions()
    if HELP_FLAGS & set(arguments) and not any(word.startswith(("stage=", "experiment=")) for word in arguments):
        return help_text()
    if {"--shell-completion", "-sc"} & set(arguments):
        return completion.answer(arguments[-1])
    return None


def open_setting(word: str) -> str:
    """A setting of DeepSpeed's own, which no schema of ours lists, as Hydra takes one: with ++."""
    return f"++{word}" if word.startswith("hardware.deepspeed.") else word


def refuse_other_places(setting: str, value: str) -> None:
    """ConfigError for what would have Hydra make folders where no run of ours belongs, before anybody can check it."""
    if setting == "hydra.run.dir":
        raise ConfigError(f"hydra.run.dir={value}: a run makes its own directory; set run_dir={value}")
    if setting == "name" and "/" in value and "${" not in value:
        raise ConfigError(f"name={value!r} names a folder: use letters, digits and . _ + - only")


def compose_and_run(task: Task, argv: list[str], words: Sequence[str]) -> None:
    """Hand the words over to Hydra, which reads `argv` and calls `task` once, or once a job of a sweep."""
    argv[1:] = sorted(words, key=is_override)  # argparse: flags first
    jobs = Jobs(task)
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(jobs)()  # pyright: ignore
    except (VlmAgentsError, BrokenPipeError):
        raise
    except (*REFUSALS, OSError) as error:
        if any(frame.name == task.__name__ for frame in traceback.extract_tb(error.__traceback__)):
            raise  # it was composed, and a stage begun: a bug
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            with writing(Path(error.filename or "multirun")):  # where Hydra makes the directories of a sweep
                raise
        raise explain(error, words) from error
    finally:
        for folder in jobs.sweeps:
            remove_idle_sweep(folder)
    for folder, ends in jobs.sweeps.items():
        end_sweep(folder, ends)


class Jobs:
    """The task of a command, which in a sweep also knows what stopped each job. A launcher may take it to another
    process, where what stops a job is raised; it has to `tell` it here."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.sweeps: dict[Path, list[Exception | None]] = {}  # what stopped each job, None: nothing
        self._here = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        hush()
        register()

    def __call__(self, composed: DictConfig) -> Any:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            return self.task(composed)
        ends = self.sweeps.setdefault(Path(HydraConfig.get().sweep.dir), [])
        try:
            result = self.task(composed)
        except Exception as error:
            ends.append(error)
            if os.getpid() == self._here and isinstance(error, VlmAgentsError):
                return None  # it is told; Hydra would tell it again, after a line of its own
            raise
        ends.append(None)
        return result

    def tell(self, sweep: Path, number: int, error: Exception | None) -> None:
        """How a job of another process ended."""
        self.sweeps.setdefault(sweep, []).append(error)
        if error is None:
            print(f"job {number} finished", flush=True)
        else:
            said = " ".join(str(error).split()) or type(error).__name__
            print(f"error: job {number}: {harmless(said)}", file=sys.stderr, flush=True)


def end_sweep(folder: Path, ends: Sequence[Exception | None]) -> None:
    """Tell the tracker how a sweep ended; VlmAgentsError where a job failed. `ends` is what stopped each job."""
    failed = [error for error in ends if error]
    if (folder / "mlflow_run_id").exists():
        from vlm_agents import tracking

        tracking.end_sweep(folder, "FAILED" if failed else "FINISHED")
    if failed:
        count = f"{len(failed)} of {len(ends)} jobs"
        bugs = [error for error in failed if not isinstance(error, VlmAgentsError)]
        kind = RuntimeError if bugs else VlmAgentsError
        raise kind(f"{count} of {os.path.relpath(folder)} failed") from (bugs or failed)[0]


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


def settings_help(argv: list[str], words: Sequence[str]) -> str:
    """What every setting of the composed run means. It needn't be good: who asks for help may have it wrong.

    Of a sweep, the settings of its first run.
    """
    texts: list[str] = []

    def explain_settings(composed: DictConfig) -> None:
        width = max(80, min(120, shutil.get_terminal_size((100, 24)).columns))
        try:
            texts.append(listing(composed, HydraConfig.get().runtime.choices, width))
        except OmegaConfBaseException as error:
            raise Carried(explain(error, ())) from error

    compose_first(lambda composed, _: explain_settings(composed), argv, words)
    return texts[0]


def compose_first(task: Callable[[DictConfig, Sequence[str]], None], argv: list[str], words: Sequence[str]) -> None:
    """Call `task` with the first job of a sweep, or the one run, and with the words that set something."""
    others = [word for word in words if word not in ("-m", "--multirun", "--dry-run")]
    settings = list(filter(is_override, others))
    swept = "-m" in words or "--multirun" in words

    def first(composed: DictConfig) -> None:
        task(composed, settings if swept or HydraConfig.get().sweeper.params else [])

    compose_and_run(first, argv, [*(first_of_sweep(word) or word for word in others), "hydra.mode=RUN"])


def would_do(composed: DictConfig, swept: Sequence[str]) -> None:
    """Print what would be done: how many jobs there are, where, how much memory one needs, and what Slurm is given.
    `swept` are the words of a sweep; none: it is one run."""
    from vlm_agents.snapshot import settled
    from vlm_agents.stages import doctor

    try:
        cfg = settled(parse(composed))
        hydra = HydraConfig.get()
        refuse_idle_launcher(bool(swept))
        place = str(hydra.sweep.dir if swept else cfg.run_dir)
    except OmegaConfBaseException as error:
        raise Carried(explain(error, ())) from error
    except VlmAgentsError as error:
        raise Carried(error) from error
    from vlm_agents.launch import idle

    count = jobs_of(swept, hydra.sweeper.params or {}) if swept else 1
    print(f"{count} job{'s' if count > 1 else ''} of stage={cfg.stage.name} in {os.path.relpath(place)}")
    if (need := doctor.expected(cfg)) is not None:
        print(f"memory of one{', the first' if count > 1 else ''}, as stage=doctor expects it: {need}")
    if line := idle(cfg):
        print(line)
    if hydra.launcher._target_.endswith(".SlurmLauncher") and swept:
        from hydra_plugins.vlm_agents_launchers.slurm import script

        print(script(hydra.launcher, Path(place), count))
    print("nothing was started")


def refuse_idle_launcher(sweep: bool) -> None:
    """ConfigError where a launcher was chosen that one run, which is no job of a `sweep`, doesn't use."""
    name = HydraConfig.get().runtime.choices["hydra/launcher"]
    if not sweep and name != "basic":
        raise ConfigError(f"hydra/launcher={name} is for jobs of a sweep, even of one: add -m, or leave it out")


def run_stage(composed: DictConfig) -> dict[str, float]:
    """Check one composed configuration and run its stage, in its run directory."""
    job = HydraConfig.get()
    sweep = job.mode == RunMode.MULTIRUN
    try:
        refuse_idle_launcher(sweep)
        try:
            cfg = parse(composed)
        except OmegaConfBaseException as error:
            raise explain(error, ()) from error
        # without these nobody could give the command again
        folders = [source.path for source in job.runtime.config_sources if "command-line" in source.provider]
        overrides = [*(f"--config-dir={folder}" for folder in folders), *job.overrides.task]
        if sweep:
            if any(word.startswith("run_dir=") for word in overrides):
                raise ConfigError(
                    "run_dir=... is the directory of one run: set hydra.sweep.dir=... for those of a sweep"
                )
            cfg = replace(cfg, run_dir=job.runtime.output_dir)
            overrides = [word for word in overrides if word.partition("=")[0].lstrip("+") not in ("name", "sweep")]
            # what a person gives in order to have this job alone, again
            overrides += [f"name={cfg.name}", f"run_dir=outputs/{cfg.name}/{cfg.stage.name}_{job.job.num}"]
        from vlm_agents import handover, launch, preflight
        from vlm_agents.run import finished_metrics
        from vlm_agents.snapshot import settled
        from vlm_agents.weights import init_of, weights_of

        open_threads = cfg.hardware.threads is None
        cfg = settled(cfg)
        if (metrics := finished_metrics(cfg)) is not None:
            where = os.path.relpath(cfg.run_dir)
            whose = f", with the weights {weights}" if (weights := weights_of(cfg)) else ""
            start = f" with stage.init={init}" if (init := init_of(cfg)) else ""
            again = f"Nothing was done; another name={start} runs it again"
            print(f"{cfg.stage.name} was finished before: {where}{whose}. {again}", flush=True)
            return metrics
        preflight.check(cfg)
        cfg = handover.with_model(cfg)
        if open_threads and cfg.hardware.threads == (choice := cores.choose())[0] and choice[1]:
            print(choice[1], flush=True)
        if not sweep and not any(word.startswith("name=") for word in overrides):
            tell_name(cfg, overrides)
        start = time.monotonic()
        metrics = launch.do(launch.Job(cfg, overrides, Path(job.sweep.dir) if sweep else None))
        tell_end(cfg, time.monotonic() - start, metrics)
        return metrics
    except VlmAgentsError as error:
        if sweep:
            report(error, debug=False)
            raise  # kept until the sweep's other jobs are done
        raise Carried(error) from error
    except BrokenPipeError as error:
        raise Carried(error) from error


def tell_name(cfg: RunConfig, overrides: Sequence[str]) -> None:
    """Of a run that was given none. ConfigError where each node would give it another."""
    from vlm_agents.launch import has_ranks

    if has_ranks(cfg) and cfg.hardware.nodes > 1:
        raise ConfigError(f"hardware.nodes={cfg.hardware.nodes}: set name=, or each node has one of its own")
    print(f"continue with: {command([*overrides, f'name={cfg.name}'])}", flush=True)


def tell_end(cfg: RunConfig, seconds: float, metrics: Mapping[str, float]) -> None:
    """In a line, unless another node of the job tells it."""
    from vlm_agents.metrics import headline

    if metrics:
        came_of_it = f"{seconds:.0f} s: {headline(cfg.stage.name, metrics)}"
        page = Path(cfg.run_dir) / "report.html"
        where = os.path.relpath(page if page.exists() else page.parent)
        print(f"{cfg.stage.name} finished in {came_of_it}; look at {where}", flush=True)


def report(error: VlmAgentsError, debug: bool) -> int:
    if debug:
        print(harmless("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print("error: " + harmless(" ".join(str(error).split())), file=sys.stderr)
    return 2


def help_text() -> str:
    """Stages and groups as they stand in conf/; a stage is described by the first line of its file."""
    options = groups()
    stages = [f"  {name:<12}{described('stage', name)}" for name in options["stage"]]
    width = max(map(len, options)) + 2
    chosen = [
        fill(f"  {group:<{width}}{', '.join(names)}", width=120, subsequent_indent=" " * (width + 2))
        for group, names in options.items()
        if group != "stage"
    ]
    return HELP.format(stages="\n".join(stages), groups="\n".join(chosen)).rstrip()
