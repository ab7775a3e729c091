"""Play episodes and label them: episodes.jsonl with the pictures, each step rated 0-10. What is there already is kept.

What was done is read off the episodes themselves: a run that was killed, or lost a line, plays the seeds that lack.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vlm_agents.config import CollectConfig, RunConfig
from vlm_agents.episodes import EpisodeWriter, read_episodes
from vlm_agents.errors import TrainingError
from vlm_agents.policies import NoisyPolicy
from vlm_agents.progress import say, track
from vlm_agents.rater import Rater
from vlm_agents.ratings import quality
from vlm_agents.referee import Referee
from vlm_agents.remote import ChatClient
from vlm_agents.run import Run
from vlm_agents.seeds import Deal, training_seed
from vlm_agents.stages.playing import (
    RefereedPool,
    check_first_prompt,
    load_sampler,
    make_policy,
    open_envs,
    play,
)
from vlm_agents.stages.remedies import success_remedy, tell_unread
from vlm_agents.stages.reporting import Album, report, shown
from vlm_agents.summary import summarise
from vlm_agents.types import Trajectory, Turn

LOOKED_AT = 48  # episodes of which the report shows some
BLOCK = 4  # episodes of each env that a model plays together, and again where one of them lacks
SAMPLES = 3  # of a remote policy's reply, until one holds a legal action: what is sought here is data, not a grade


def main(cfg: RunConfig, stage: CollectConfig, run: Run) -> dict[str, float]:
    sampler = load_sampler(cfg, stage.init) if stage.policy == "model" else None
    remote = "remote" in (stage.policy, stage.rater)
    client = ChatClient(stage.remote, run.path("remote"), run.begin) if remote else None
    policy = make_policy(cfg, stage.policy, sampler, client, SAMPLES)
    if stage.noise:
        policy = NoisyPolicy(policy, stage.noise)
    run.restore()
    writer = EpisodeWriter(run.dir)
    blocks = run.world.of_main(lambda: lacking((one.seed for one in read_episodes(run.dir)), cfg.seed, stage))

    def playing(envs: RefereedPool) -> Iterator[Trajectory]:
        for block in blocks:
            if sampler:
                sampler.sync()
            deals = [Deal(seed) for seed, _ in block]
            together = play(cfg, envs, policy, deals, cfg.seed, world=run.world)
            yield from (trajectory for trajectory, (_, lacks) in zip(together, block, strict=True) if lacks)

    there = already(blocks, stage.episodes)
    with (
        open_envs(cfg.env, stage.num_envs, "always", run.world, Referee(cfg.referee, run.path("referee"))) as envs,
        closing(client) if client else nullcontext(),
    ):
        if sampler:
            check_first_prompt(cfg, envs, sampler)
        if not client:  # a server may not be there, or take no request of ours: its first answer begins the run
            run.begin()
        played = track(playing(envs), "collect", stage.episodes, "episodes", there)
        unscored = record(played, writer if run.world.main else None, stage, client)
    if not run.world.main:  # the record is the first rank's
        return {}
    writer.sync()
    return conclude(cfg, stage, run, client, unscored)


def record(
    played: Iterable[Trajectory], writer: EpisodeWriter | None, stage: CollectConfig, client: ChatClient | None
) -> int:
    """Rate and write the episodes, in the rank that has a writer: else each would ask a remote rater. How many were
    left out, as nobody could judge their answers: should the run be stopped, they are played again."""
    unscored, why = 0, ""
    for trajectory in played:
        if trajectory.stop == "unscored":
            unscored, why = unscored + 1, why or str(trajectory.error)
        elif writer:
            writer.append(rated(trajectory, ratings(trajectory.turns, stage, client)))
    if unscored:
        say(f"{unscored} episodes were left out, whose answers nobody could judge. The first: {why}")
    return unscored


def conclude(
    cfg: RunConfig, stage: CollectConfig, run: Run, client: ChatClient | None, unscored: int
) -> dict[str, float]:
    """Metrics and report of all episodes that are there, and the run's end."""
    there = stage.episodes - unscored
    if not there:
        raise TrainingError(
            f"none of {unscored} episodes was judged, so that there is nothing to learn from: see to the server, then "
            "give the same command again"
        )
    metrics = {"collect/episodes": float(there)}
    metrics |= summarise(read_episodes(run.dir, pictures=False), "collect") | {"collect/unscored": float(unscored)}
    if client:
        metrics |= {f"collect/{name}": count for name, count in client.counts().items()}
        unrated = tell_unread(run.dir, client, stage.policy == "remote", stage.rater == "remote")
        if stage.rater == "remote":
            metrics["collect/unrated"] = float(unrated)
    tell(cfg, metrics, there, run.path("episodes.jsonl"))
    run.log(0, metrics)
    album = Album()
    for trajectory in islice(read_episodes(run.dir), LOOKED_AT):
        album.keep(trajectory)
    page = report(run, metrics, shown(album.episodes))
    return run.finish(metrics, {"report": page, "episodes": run.path("episodes.jsonl")})


def already(blocks: Sequence[Sequence[tuple[int, bool]]], episodes: int) -> int:
    """How many of the episodes are there, which is said where there are any; `blocks` are what `lacking` found."""
    there = episodes - sum(lacks for block in blocks for _, lacks in block)
    if there:
        say(f"continues with {there} of {episodes} episodes that are there already")
    return there


def tell(cfg: RunConfig, metrics: Mapping[str, float], episodes: int, where: Path) -> None:
    """Say what was collected, and where a model can learn nothing from it."""
    success, illegal = metrics["collect/success"], metrics["collect/invalid_rate"]
    say(
        f"{episodes} episodes: success {success:.3f}, return {metrics['collect/return']:.2f}, turns "
        f"{metrics['collect/episode_length']:.1f}, illegal replies {illegal:.3f}: {os.path.relpath(where)}"
    )
    if illegal == 1:
        say("every reply is illegal: nothing to learn from. Choose another stage.policy=, prompt= or model")
    elif success == 0:
        *first, last = ("another stage.policy=", "less stage.noise", "an easier env", *success_remedy(cfg, success))
        say(
            "no episode succeeds, and stage=preprocess leaves such out, unless with stage.success_only=false: choose "
            f"{', '.join(first)}, or {last}"
        )


def lacking(done: Iterable[int], run_seed: int, stage: CollectConfig) -> list[list[tuple[int, bool]]]:
    """The seeds to play, in blocks that are played together, and whether an episode lacks; `done`: those on file.

    How a model's log-probs are rounded depends on what else is in its batch. So it plays the same blocks however often
    a run is killed, and one that isn't whole from its start. Other policies play what lacks and no more.
    """
    model = stage.policy == "model"
    seeds = [training_seed(run_seed, -1, episode) for episode in range(stage.episodes)]
    there = Counter(done)
    flagged = []
    for seed in seeds:
        flagged.append((seed, not there[seed]))
        there[seed] -= there[seed] > 0
    size = BLOCK * stage.num_envs if model else 1
    blocks = [flagged[start : start + size] for start in range(0, len(flagged), size)]
    blocks = [block for block in blocks if any(lacks for _, lacks in block)]
    return blocks if model else [[pair for block in blocks for pair in block]]


def ratings(turns: Sequence[Turn], stage: CollectConfig, client: ChatClient | None) -> Sequence[float | None]:
    """What the rater gives each step, 0-10, or None."""
    if stage.rater == "expert":
        return [quality(turn) for turn in turns]
    if stage.rater == "remote":
        assert client is not None
        return Rater(client).rate(turns)
    return [None] * len(turns)


def rated(trajectory: Trajectory, ratings: Sequence[float | None]) -> Trajectory:
    """The episode with the ratings of its turns."""
    pairs = zip(trajectory.turns, ratings, strict=True)
    return replace(trajectory, turns=tuple(replace(turn, rating=rating) for turn, rating in pairs))
