"""What the launchers have in common.

Hydra's own launcher runs one job after another in the process of the command line. Here each job has a process, to
which the launcher goes as a pickle. The command waits for all of them, whatever becomes of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

Overrides = Sequence[str]
POLL_S = 1.0
GRACE_S = 30  # that a process, or a Slurm job, has to end in


class Plan(NamedTuple):
    """What is known of a job before it is begun."""

    settings: dict[str, Any]  # nested, as config.yaml of its run has them
    resources: Mapping[str, Any]


class SideBySide(Launcher):
    """What both launchers have in common; `resources`, `prepare` and `results` are theirs."""

    given: Mapping[str, Any]  # what `resources` said of every job

    def __init__(self, **params: Any) -> None:
        self.params: dict[str, Any] = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config  # without what is swept over
        self.task = task_function  # a vlm_agents.command_line.Jobs

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Overrides], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs. Those that are finished, or can't be composed, are told of here and not started."""
        setup_globals()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task.sweeps.setdefault(self.folder, [])
        jobs = dict(enumerate(map(list, job_overrides), initial_job_idx))
        good = {number: plan for number, words in jobs.items() if (plan := self.plan(words, number))}
        started = {number: jobs[number] for number in good if not (self.folder / f"{number}/DONE").exists()}
        if started:
            self.given = same({number: good[number].resources for number in started}, jobs)
            self.prepare()
        for number in jobs.keys() - started.keys():
            self.run(jobs[number], number)
        if started:
            from vlm_agents import tracking
            from vlm_agents.errors import VlmAgentsError

            settings = next(iter(good.values())).settings
            tracking.begin_sweep(settings, self.folder)
            try:
                for number, error in self.results(started):
                    self.task.tell(self.folder, number, error)
            except VlmAgentsError:  # no job was begun
                tracking.end_sweep(self.folder, "FAILED", settings)
                raise
        return []  # the task knows how each ended

    def resources(self, config: DictConfig) -> Mapping[str, Any]:
        """What this launcher gives a job that is composed so, by name."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Raise what is wrong with this launcher, before anything is made."""

    def results(self, jobs: Mapping[int, Overrides]) -> Iterator[tuple[int, Exception | None]]:
        """Run the jobs; each one's number as it ends, and what stopped it."""
        raise NotImplementedError

    def composed(self, overrides: Overrides, number: int) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def plan(self, overrides: Overrides, number: int) -> Plan | None:
        """A job's; None where its settings are refused, which the job itself will tell."""
        from vlm_agents.config import parse
        from vlm_agents.hydra_errors import REFUSALS

        before = HydraConfig.instance().cfg
        try:
            config = self.composed(overrides, number)
            HydraConfig.instance().set_config(config)
            resources = self.resources(config)
            with open_dict(config):
                del config["hydra"]
            return Plan(asdict(parse(config)), resources)
        except REFUSALS:
            return None
        finally:
            HydraConfig.instance().cfg = before

    def run(self, overrides: Overrides, number: int) -> JobReturn:
        """Run a job in this process."""
        keys: dict[str, Any] = {"job_dir_key": "hydra.sweep.dir", "job_subdir_key": "hydra.sweep.subdir"}
        config = self.composed(overrides, number)
        return run_job(hydra_context=self.context, task_function=self.task, config=config, **keys)

    def __call__(self, overrides: Overrides, number: int, state: dict[type, Any]) -> JobReturn:
        """The same in another process, to which Hydra's `state` came along."""
        Singleton.set_state(state)
        setup_globals()
        return self.run(overrides, number)


def same(resources: Mapping[int, Mapping[str, Any]], jobs: Mapping[int, Overrides]) -> Mapping[str, Any]:
    """What all jobs are given; ConfigError where that isn't the same for all."""
    from vlm_agents.errors import ConfigError

    (first, given), *others = resources.items()
    for number, its in others:
        if name := next((name for name in given if given[name] != its[name]), None):
            pair = {first: jobs[first], number: jobs[number]}
            one, other = (told(pair, job) for job in pair)
            raise ConfigError(
                f"jobs of one sweep are all given the same by hydra/launcher, and with {one} that is "
                f"{name}={given[name]}, with {other} {name}={its[name]}: give one command with -m {one} "
                f"name=<a name>, and another with -m {other} name=<another name>"
            )
    return given


def told(jobs: Mapping[int, Overrides], number: int) -> str:
    """The overrides that not all jobs have."""
    common = set.intersection(*map(set, jobs.values())) if len(jobs) > 1 else set()
    return " ".join(filter_overrides([word for word in jobs[number] if word not in common]))
