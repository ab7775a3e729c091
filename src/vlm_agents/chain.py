"""`python -m vlm_agents run [experiment] [overrides]`: all stages one after another under one name.

Each is a process of its own. What is done is passed over, so that the same command with its name= goes on. Knows no
stage from within.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vlm_agents.config import RunConfig, command, conf_dir, parse
from vlm_agents.errors import ConfigError, VlmAgentsError, did_you_mean
from vlm_agents.hydra_errors import REFUSALS, explain, first_of_sweep, is_override
from vlm_agents.metrics import headline, shortcoming
from vlm_agents.processes import end_with_parent
from vlm_agents.stopping import Stopped

ORDER = ("collect", "preprocess", "sft", "ppo", "eval")
EACH = "a chain isn't swept: give one command for each of the values, each with a name=... of its own"
OURS = {
    "stage": "all stages are run; an override of one alone begins with its name, as in sft.stage.epochs=3",
    "experiment": "name it after run, as in 'run number_line'",
    "run_dir": "a chain lies in outputs/<name>: set name=...",
    "sweep": EACH,
}
OF_A_STAGE = "stage", "algo"  # the parts of a run that not all stages have alike
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


def main(arguments: Sequence[str], debug: bool) -> int:
    """Run the chain that the words after `run` ask for; the exit status of the first stage that fails, else 0.

    ConfigError, before anything is run, where a stage can't take what it is given.
    """
    words = [word for word in arguments if is_override(word)]
    given = next((word.removeprefix("name=") for word in reversed(words) if word.startswith("name=")), None)
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}" if given is None else given
    names, folders = config_dirs([word for word in arguments if word not in words])
    plan = planned(names, words, name, folders)
    cfgs = composed(plan)
    from vlm_agents import preflight
    from vlm_agents.run import finished_metrics
    from vlm_agents.snapshot import settled

    made: list[Path] = []  # run directories of the stages so far
    for stage, cfg in cfgs.items():
        if not (Path(cfg.run_dir) / "DONE").exists():
            with in_words_of_a_chain(stage):
                preflight.check_before_a_chain(cfg, made)
        made.append(Path(cfg.run_dir).resolve())
    if given is None:
        print(f"continue with: {command(['run', *arguments, f'name={name}'])}", flush=True)
    for stage, overrides in plan.items():
        with in_words_of_a_chain(stage):
            finished = finished_metrics(settled(cfgs[stage])) is not None
        if finished:
            print(f"{stage} was finished before: {os.path.relpath(cfgs[stage].run_dir)}", flush=True)
            continue
        print(command(overrides), flush=True)
        if status := run_stage(overrides, debug):
            return status
    for stage, cfg in cfgs.items():
        print(outcome(stage, Path(os.path.relpath(cfg.run_dir))), flush=True)
    return 0


def config_dirs(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The words without `--config-dir`, and the folders that it names: looked at before, and absolute."""
    rest, folders, left = list[str](), list[Path](), iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value if equals else next(left)))
        else:
            rest.append(word)
    return rest, folders


def planned(
    names: Sequence[str], words: Sequence[str], name: str, folders: Sequence[Path] = ()
) -> dict[str, list[str]]:
    """The overrides of each stage of the chain, in the order of its stages; `folders` have groups beside conf/."""
    refuse_flags_and_sweeps([*names, *words])
    places = [folder / "experiment" for folder in (conf_dir(), *folders)]
    experiment = experiment_of(names, places)
    stages = [
        stage
        for stage in ORDER
        if experiment is None or any((place / experiment / f"{stage}.yaml").is_file() for place in places)
    ]
    own: dict[str, dict[str, str]] = {stage: {} for stage in stages}
    shared: dict[str, str] = {}
    for word in words:
        sign = word[: len(word) - len(word.lstrip("+~"))]
        stage, dot, rest = word[len(sign) :].partition(".")
        if stage in ORDER and dot:
            if stage not in own:
                raise ConfigError(f"{word}: {experiment} has no stage={stage}, it has {', '.join(stages)}")
            own[stage][key_of(rest)] = sign + rest
        else:
            shared[key_of(word)] = word
    for key in (key for overrides in (shared, *own.values()) for key in overrides):
        if key in OURS or (key == "name" and key not in shared):
            raise ConfigError(f"{key}=: {OURS.get(key, 'one name is that of all stages')}")
    first = {stage: f"stage={stage}" if experiment is None else f"experiment={experiment}/{stage}" for stage in stages}
    rest = {stage: (shared | own[stage] | {"name": f"name={name}"}).values() for stage in stages}
    quoted = ["'file://{}'".format(str(folder).replace("'", r"\'")) for folder in folders]
    paths = [f"hydra.searchpath=[{','.join(quoted)}]"] if folders else []
    return {stage: [first[stage], *paths, *rest[stage]] for stage in stages}


def refuse_flags_and_sweeps(words: Sequence[str]) -> None:
    for word in words:
        if word in ("-m", "--multirun") or first_of_sweep(word):
            raise ConfigError(f"{word}: {EACH}")
        if word.startswith("-"):
            raise ConfigError(
                f"{word}: run takes an experiment and key=value; flags are for one stage, as in 'stage=ppo --cfg job'"
            )


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def experiment_of(names: Sequence[str], places: Iterable[Path]) -> str | None:
    """The experiment named after `run`, a folder in one of the places; None where none is."""
    if not names:
        return None
    known = sorted({path.parent.name for place in places for stage in ORDER for path in place.glob(f"*/{stage}.yaml")})
    if names[0] not in known or len(names) > 1:
        wrong = names[0] if names[0] not in known else names[1]
        raise ConfigError(
            f"run {' '.join(names)}: {wrong} is no experiment.{did_you_mean(wrong, known)} One may be named, of "
            f"{', '.join(known)}, and what follows is key=value"
        )
    return names[0]


def composed(plan: Mapping[str, Sequence[str]]) -> dict[str, RunConfig]:
    """The checked configuration of each stage; ConfigError, with what to write, for a word that one can't take."""
    cfgs = {}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for stage, overrides in plan.items():
            try:
                with in_words_of_a_chain(stage):
                    cfgs[stage] = checked(overrides)
                    if (other := cfgs[stage].stage.name) != stage:
                        raise ConfigError(f"{overrides[0]} is a stage={other}: its file must choose stage={stage}")
            except ConfigError as error:
                for word in (word for word in overrides[1:] if key_of(word).split(".")[0] in OF_A_STAGE):
                    fits = [other for other, (first, *rest) in plan.items() if word in rest and takes([first, word])]
                    if fits and not takes([overrides[0], word]):
                        choice = " or ".join(f"{other}.{word}" for other in fits)
                        raise ConfigError(
                            f"{word}: stage={stage} can't take that. Say whose it is: {choice}"
                        ) from error
                raise
    return cfgs


@contextmanager
def in_words_of_a_chain(stage: str) -> Iterator[None]:
    """Errors of the block name a setting as a chain is given it: those of one stage begin with its name."""
    try:
        yield
    except VlmAgentsError as error:
        of_one = rf"(?<![\w.])(?=({'|'.join(OF_A_STAGE)})\.[a-z])"
        raise type(error)(re.sub(of_one, f"{stage}.", str(error))) from error


def checked(overrides: Sequence[str]) -> RunConfig:
    """One stage's configuration, as a process of its own would have it."""
    try:
        found = compose("config", list(overrides))
        raw = OmegaConf.to_container(found)  # only a process that Hydra started could resolve its run_dir
        assert isinstance(raw, dict)
        found.run_dir = raw["run_dir"].replace("${hydra:runtime.cwd}", str(Path.cwd()))
        return parse(found)
    except VlmAgentsError:
        raise
    except REFUSALS as error:
        raise explain(error, overrides) from error


def takes(overrides: Sequence[str]) -> bool:
    with suppress(ConfigError):
        return bool(checked([*overrides, "name=any"]))
    return False


def run_stage(overrides: Iterable[str], debug: bool) -> int:
    """Run one stage in a process of its own, and pass on the signals that end it: it tells of them, once.

    It has a process group to itself: what a terminal sends comes through us alone. Where we are killed (SIGKILL), Linux
    sends it SIGTERM. Returns its exit status, as a shell has it.
    """
    came: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in (number for number in SIGNALS if before[number] != signal.SIG_IGN):  # as nohup has it
            signal.signal(number, pass_on)
        line = [sys.executable, "-m", "vlm_agents", *overrides]
        environ = os.environ | {"HYDRA_FULL_ERROR": str(int(debug))}
        children.append(subprocess.Popen(line, env=environ, process_group=0, preexec_fn=end_with_parent))
        for number in came:  # before it was there
            children[0].send_signal(number)
        status = children[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came and status == 0:  # it was done already: then nobody has told yet
        if came[0] == signal.SIGUSR2:
            raise Stopped
        signal.raise_signal(came[0])
    return 128 - status if status < 0 else status


def outcome(stage: str, folder: Path) -> str:
    """A finished stage in one line: its figures, and where to read on."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    page = summary["artifacts"].get("report")
    lack = shortcoming(summary["metrics"])
    words = f"{headline(stage, summary['metrics'])}{f'; no agent yet: {lack}' if lack else ''}"
    return f"{stage:<12}{words}; {folder / page if page else folder}"
