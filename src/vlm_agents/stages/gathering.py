"""The episodes of an iteration: groups of plays of its own starts, in waves, until enough of them are kept."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import Self

import numpy as np

from vlm_agents import imports
from vlm_agents.config import AlgoConfig, PpoConfig, RunConfig
from vlm_agents.learn.learner import Learner
from vlm_agents.policies import Policy, TrainingSampler
from vlm_agents.progress import track, under_way
from vlm_agents.run import Run
from vlm_agents.seeds import Deal, training_seed
from vlm_agents.stages.playing import RefereedPool, make_policy, play
from vlm_agents.types import Trajectory
from vlm_agents.vllm_sampler import VllmSampler

POLLED_S = 0.02
Waves = Callable[[int, int], list[Trajectory]]  # plays an iteration's first, second ... wave


def gather(
    cfg: RunConfig, stage: PpoConfig, waves: Waves, learner: Learner
) -> tuple[list[Trajectory], list[Trajectory], dict[str, float]]:
    """Whole episodes for the learner's next iteration: as they were played, as they are learned from, and what the
    shapers tell of them, a mean over waves.

    A further wave is played while fewer than `stage.episodes` are kept, `algo.waves` in all at most.
    """
    assert cfg.algo is not None
    played: list[Trajectory] = []
    shaped: list[Trajectory] = []
    told: list[dict[str, float]] = []
    for wave in range(cfg.algo.waves):
        trajectories = waves(learner.iteration, wave)
        bonused, figures = learner.shape(trajectories)
        played, shaped, told = played + trajectories, shaped + bonused, [*told, figures]
        with imports.blamed("algo.factory", cfg.algo.factory):
            kept = learner.kept(shaped, stage.episodes)
        if len(kept) >= stage.episodes:
            break
    names = dict.fromkeys(name for figures in told for name in figures)
    return played, shaped, {name: float(np.mean([one[name] for one in told if name in one])) for name in names}


def make_player(cfg: RunConfig, stage: PpoConfig, run: Run, envs: RefereedPool, sampler: TrainingSampler) -> "Player":
    parts = cfg, stage, run, envs, make_policy(cfg, "model", sampler)
    if not stage.staleness:
        return Player(*parts, sampler)
    assert isinstance(sampler, VllmSampler)
    return EagerPlayer(*parts, sampler)


class Player:
    """Plays the waves of a training run, each when it is asked for. Implements Waves."""

    def __init__(
        self,
        cfg: RunConfig,
        stage: PpoConfig,
        run: Run,
        envs: RefereedPool,
        policy: Policy,
        sampler: TrainingSampler,
    ) -> None:
        """`sampler` is the policy's."""
        self._cfg, self._stage, self._run, self._envs = cfg, stage, run, envs
        self._policy, self._sampler = policy, sampler

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def synced(self) -> AbstractContextManager[None]:
        """Within it an iteration may ask for its waves, which these weights play."""
        return self._sampler.synced()

    def begin(self, iteration: int) -> None:
        """That iteration comes next, and this one is about to be learned from."""

    def wait(self) -> None:
        """Until nothing is played: then envs and sampler are free for others."""

    def figures(self) -> dict[str, float]:
        """Of the iteration that asked last."""
        return {}

    def __call__(self, iteration: int, wave: int) -> list[Trajectory]:
        playing = self._wave(iteration, wave)
        return list(track(playing, f"rollout {iteration + 1}:", self._size, "episodes"))

    @property
    def _algo(self) -> AlgoConfig:
        assert self._cfg.algo is not None
        return self._cfg.algo

    @property
    def _size(self) -> int:
        """Episodes of a wave."""
        return self._algo.played(self._stage.episodes)

    def _wave(self, iteration: int, wave: int) -> Iterator[Trajectory]:
        """Of starts that no other wave or iteration plays, each as often as a group is large."""
        cfg, members, run_seed = self._cfg, self._algo.group_size, self._run.seed_for("rollout", iteration)
        starts = self._size // members
        seeds = (training_seed(cfg.seed, iteration, start) for start in range(wave * starts, (wave + 1) * starts))
        deals = [Deal(seed, member) for seed in seeds for member in range(members)]
        # the expert is asked at every turn only where that is learned from; else for rollout/steps_over_expert alone
        advice = "always" if self._algo.advised else "first"
        return play(cfg, self._envs, self._policy, deals, run_seed, advice, self._run.world)


class EagerPlayer(Player):
    """Has a server play the next iteration's first wave while this one is learned from: by weights one update older.

    Nothing that learns is touched by the thread that plays: values would have to be, so no algorithm with a critic may
    have this, and the first replies of an adapter are waited for, as they are compared with the weights here.
    """

    def __init__(
        self, cfg: RunConfig, stage: PpoConfig, run: Run, envs: RefereedPool, policy: Policy, sampler: VllmSampler
    ) -> None:
        super().__init__(cfg, stage, run, envs, policy, sampler)
        self._server, self._thread = sampler, ThreadPoolExecutor(1, "player")
        self._under_way: Future[list[Trajectory]] | None = None
        self._over, self._stale = threading.Event(), False

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.shutdown()

    def synced(self) -> AbstractContextManager[None]:
        self._stale = self._under_way is not None
        return nullcontext() if self._stale else super().synced()

    def begin(self, iteration: int) -> None:
        self._server.sync()
        self._under_way = future = self._thread.submit(self._ahead, iteration)
        while not (self._server.compared or future.done()):
            time.sleep(POLLED_S)

    def wait(self) -> None:
        if self._under_way:
            wait([self._under_way])

    def figures(self) -> dict[str, float]:
        return {"rollout/staleness": float(self._stale)}

    def __call__(self, iteration: int, wave: int) -> list[Trajectory]:
        future, self._under_way = self._under_way, None
        if future is None:
            return super().__call__(iteration, wave)
        with under_way(f"rollout {iteration + 1}: waiting for what is played meanwhile"):
            return future.result()

    def _ahead(self, iteration: int) -> list[Trajectory]:
        """No bar tells of it: those of the update are there."""
        return list(takewhile(lambda _: not self._over.is_set(), self._wave(iteration, 0)))
