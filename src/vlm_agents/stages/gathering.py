"""The episodes of an iteration: groups of plays of its own starts, in waves, until enough of them are kept."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, Self

import numpy as np

from vlm_agents import imports
from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.errors import ConfigError
from vlm_agents.experts import Advising
from vlm_agents.learn.learner import Learner
from vlm_agents.policies import Policy, TrainingSampler
from vlm_agents.progress import track, under_way
from vlm_agents.rollout import collect
from vlm_agents.run import Run
from vlm_agents.seeds import Deal, training_seed
from vlm_agents.stages.playing import RefereedPool, judged, play
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


class Player(Protocol):
    """Plays the waves of a training run, of starts that no other wave or iteration plays. Is a Waves, and a context."""

    @property
    def seconds(self) -> float:
        """That the last wave took beside others' work; 0 where it was played while it was waited for."""
        ...

    def __call__(self, iteration: int, wave: int) -> list[Trajectory]: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def synced(self) -> AbstractContextManager[None]:
        """Within it the waves of one iteration are asked for."""
        ...

    def begin(self, iteration: int) -> None:
        """Before an update after which that iteration is gathered, and nobody else plays in between."""
        ...

    def figures(self) -> dict[str, float]:
        """Of the iteration that asked last."""
        ...


def as_asked(stage: PpoConfig, player: "PlayerInTurn", sampler: TrainingSampler, critic: bool) -> Player:
    """`player`, or one ahead of it, with the same `sampler`; `critic`: are there values to be computed of what is
    played? ConfigError where the thread that plays would need them."""
    if not stage.staleness:
        return player
    if critic:
        raise ConfigError(
            f"stage.staleness={stage.staleness}: algo.factory brings a critic, and it would read what is played with "
            "weights that are being trained: set stage.staleness=0"
        )
    assert isinstance(sampler, VllmSampler)
    return PlayerAhead(player, sampler)


class PlayerInTurn:
    """Each wave is played when it is asked for, by the weights as they are then."""

    seconds = 0.0

    def __init__(
        self,
        cfg: RunConfig,
        stage: PpoConfig,
        run: Run,
        envs: RefereedPool,
        policy: Policy,
        sampler: TrainingSampler,
    ) -> None:
        assert cfg.algo is not None
        self._cfg, self._algo, self._episodes, self._run = cfg, cfg.algo, stage.episodes, run
        self._envs, self._policy, self._sampler = envs, policy, sampler

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def synced(self) -> AbstractContextManager[None]:
        return self._sampler.synced()

    def begin(self, iteration: int) -> None: ...

    def figures(self) -> dict[str, float]:
        return {}

    def __call__(self, iteration: int, wave: int) -> list[Trajectory]:
        deals, run_seed, advice = self.task(iteration, wave)
        playing = play(self._cfg, self._envs, self._policy, deals, run_seed, advice, self._run.world)
        return list(track(playing, f"rollout {iteration + 1}:", len(deals), "episodes"))

    def task(self, iteration: int, wave: int) -> tuple[list[Deal], int, Advising]:
        """What is played: the starts, each as often as a group is large, the seed of their draws, and which of their
        turns the expert is asked about."""
        members = self._algo.group_size
        starts = self._algo.played(self._episodes) // members
        seeds = (training_seed(self._cfg.seed, iteration, start) for start in range(wave * starts, (wave + 1) * starts))
        deals = [Deal(seed, member) for seed in seeds for member in range(members)]
        # at every turn only where that is learned from; else for rollout/steps_over_expert alone
        advice = "always" if self._algo.advised else "first"
        return deals, self._run.seed_for("rollout", iteration), advice

    def unjudged(self, iteration: int) -> list[Trajectory]:
        """The first wave, before anybody has said whether its answers are right."""
        deals, run_seed, advice = self.task(iteration, 0)
        return list(collect(self._envs, self._policy, deals, run_seed=run_seed, advice=advice))

    def judged(self, episodes: Sequence[Trajectory]) -> list[Trajectory]:
        return list(judged(self._cfg, self._envs, episodes))


class PlayerAhead:
    """A server plays an iteration's first wave while the one before is learned from: by weights one update older.

    Its thread touches nothing that learns. Values would have to be computed there, so that there can be no critic; the
    first replies of an adapter are waited for, as they are compared with the weights here; and answers are judged by
    whoever learns, since rules may need the main thread's alarms.
    """

    def __init__(self, player: PlayerInTurn, sampler: VllmSampler) -> None:
        self._player, self._sampler, self._thread = player, sampler, ThreadPoolExecutor(1, "player")
        self._under_way: Future[tuple[list[Trajectory], float]] | None = None
        self._stale, self.seconds = False, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sampler.cancel()
        self._thread.shutdown()

    def synced(self) -> AbstractContextManager[None]:
        self._stale = self._under_way is not None
        return nullcontext() if self._stale else self._player.synced()

    def begin(self, iteration: int) -> None:
        self._sampler.sync()
        self._under_way = future = self._thread.submit(self._play, iteration)
        with under_way(f"rollout {iteration + 1}: until its first replies are compared"):
            while not (self._sampler.compared or future.done()):
                time.sleep(POLLED_S)
        self._sampler.compare_no_more()

    def figures(self) -> dict[str, float]:
        return {"rollout/staleness": float(self._stale)}

    def __call__(self, iteration: int, wave: int) -> list[Trajectory]:
        future, self._under_way = self._under_way, None
        if future is None:
            self.seconds = 0.0
            return self._player(iteration, wave)
        with under_way(f"rollout {iteration + 1}: until what is played meanwhile is over"):
            episodes, self.seconds = future.result()
        return self._player.judged(episodes)

    def _play(self, iteration: int) -> tuple[list[Trajectory], float]:
        start = time.monotonic()
        return self._player.unjudged(iteration), time.monotonic() - start
