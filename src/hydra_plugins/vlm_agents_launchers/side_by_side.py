"""What the launchers have in common.

Hydra's own launcher runs one job after another in the process of the command line. Here each job has a process, to
which the launcher goes as a pickle. The command waits for all of them, whatever becomes of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

Overrides = Sequence[str]
POLL_S = 1.0
GRACE_S = 30  # that a process, or a Slurm job, has to end in


class SideBySide(Launcher):
    """What both launchers have in common; `prepare` and `results` are theirs."""

    def __init__(self, **params: Any) -> None:
        self.params: dict[str, Any] = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config  # a vlm_agents.command_line.Jobs

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Overrides], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs. Those that are finished, or can't be composed, are told of here and not started."""
        setup_globals()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task.sweeps.setdefault(self.folder, [])
        jobs = dict(enumerate(map(list, job_overrides), initial_job_idx))
        settings = {number: self.settings(overrides, number) for number, overrides in jobs.items()}
        started = {n: words for n, words in jobs.items() if settings[n] and not (self.folder / f"{n}/DONE").exists()}
        for number in jobs.keys() - started.keys():
            self.run(jobs[number], number)
        if started:
            from vlm_agents import tracking

            self.prepare()
            tracking.begin_sweep(next(filter(None, settings.values())), self.folder)
            for number, error in self.results(started):
                self.task.tell(self.folder, number, error)
        return []  # the task knows how each ended

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

    def settings(self, overrides: Overrides, number: int) -> dict[str, Any] | None:
        """A job's settings as nested dictionaries; None where they are refused, which the job itself will tell."""
        from vlm_agents.config import parse
        from vlm_agents.hydra_errors import REFUSALS

        before = HydraConfig.instance().cfg
        try:
            config = self.composed(overrides, number)
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                del config["hydra"]
            return asdict(parse(config))
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


def told(jobs: Mapping[int, Overrides], number: int) -> str:
    """The overrides that not all jobs have."""
    common = set.intersection(*map(set, jobs.values())) if len(jobs) > 1 else set()
    return " ".join(filter_overrides([word for word in jobs[number] if word not in common]))
