"""What the reports of the stages have in common: which results, curves and episodes a person is shown first."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlm_agents.config import CollectConfig, EvalConfig, PpoConfig, RunConfig
from vlm_agents.episodes import LINES, EpisodeWriter, read_episodes
from vlm_agents.frames import captioned_frame
from vlm_agents.metrics import headline, wilson_interval
from vlm_agents.policies import NOISE
from vlm_agents.progress import say
from vlm_agents.report import Curve, Example, Result, Shown, read_curves, write_report
from vlm_agents.run import METRICS, Run
from vlm_agents.summary import COUNTED, unknown
from vlm_agents.types import Trajectory
from vlm_agents.weights import init_of, run_of

REPORTED, FAILURES = 12, 4  # episodes of a panel in report.html: the first ones, and failures behind those
# The curves that stand in front, by stage; the others are folded away.
FIRST = {
    "ppo": ("rollout/success", "rollout/return", "ppo/approx_kl", "ppo/entropy"),
    "sft": ("sft/loss", "sft/grad_norm"),
}
AXES = {"ppo": "iteration", "sft": "optimizer step"}
COLUMNS = {"return": "return", "turns": "episode_length", "loops": "loop_rate", "illegal replies": "invalid_rate"}
SAMPLED, GREEDY = "model, sampled", "model, greedy"
POLICIES = {"model": SAMPLED, "model_greedy": GREEDY}  # as an episode has it, as a person reads it
# How an episode ends, and the metric of its share. What is left ran out of turns.
ENDS = {
    "success": "success",
    "failure": "failure_rate",
    "invalid": "all_invalid_rate",
    "too_long": "too_long_rate",
}
REPORT = "report.html"
BEFORE = "before"  # the folder of a run directory that holds episodes of the panel before training
# The rows of the results, by what the metrics' names end in.
PANELS = {
    "_before": f"{SAMPLED}, before",
    "": SAMPLED,
    "_greedy_before": f"{GREEDY}, before",
    "_greedy": GREEDY,
    "_random": "random",
    "_expert": "expert",
    "_bare": f"{SAMPLED}, without its tool",
    "_votes": "the same, by vote in equal time",
}


class Album:
    """The episodes that are kept for the report: of each policy the `first` ones, and some failures behind those."""

    def __init__(self, first: int = REPORTED, failures: int = FAILURES) -> None:
        self.episodes: list[Trajectory] = []
        self._room = defaultdict(lambda: {"first": first, "failures": failures if first else 0})

    def keep(self, trajectory: Trajectory) -> None:
        room = self._room[trajectory.policy]
        if room["first"]:
            room["first"] -= 1
        elif room["failures"] and not trajectory.success:
            room["failures"] -= 1
        else:
            return
        self.episodes.append(trajectory)

    def keep_too(self, trajectory: Trajectory) -> None:
        """One of the expert, where another's episode of that seed is kept: how it would have been done."""
        if trajectory.policy == "expert" and any(trajectory.seed == kept.seed for kept in self.episodes):
            self.episodes.append(trajectory)


def display_name(policy: str) -> str:
    """A policy's name in the record, for a person: `expert+noise0.3` is no expert."""
    name, _, noise = policy.partition(NOISE)
    return with_noise(POLICIES.get(name, name), float(noise or 0))


def with_noise(player: str, noise: float) -> str:
    return f"{player}, {noise:.0%} at random" if noise else player


def shown(episodes: Iterable[Trajectory], when: str = "") -> list[Shown]:
    return [Shown(trajectory, display_name(trajectory.policy), when) for trajectory in episodes]


def remember(run: Run, album: Album) -> None:
    """Put the episodes of before training where a run that is continued finds them."""

    def write(folder: Path) -> None:
        writer = EpisodeWriter(folder)
        writer.append(*album.episodes)
        writer.sync()

    run.save_folder(BEFORE, write)


def remembered(run: Run) -> list[Shown]:
    if not run.path(BEFORE, LINES).is_file():  # a run of an older version, or without a panel
        return []
    return shown(read_episodes(run.path(BEFORE), skip_damaged=True), "before training")


def tell(run: Run, iteration: int, iterations: int, metrics: Mapping[str, float], first: Trajectory) -> None:
    """Log an iteration, print a line of it, and keep the last turn of one episode as a picture."""
    run.log(iteration + 1, metrics)
    seconds = metrics["time/rollout"] + metrics["time/update"]
    still = "the critic alone learns" if metrics.get("ppo/kept", 1) else "algo.filters kept nothing"
    moved = f"kl {metrics['ppo/approx_kl']:.4f}" if metrics["ppo/updates"] else still
    say(
        f"iteration {iteration + 1:3d}/{iterations}  success {metrics['rollout/success']:.2f}  "
        f"return {metrics['rollout/return']:.2f}  turns {metrics['rollout/episode_length']:.1f}  "
        f"invalid {metrics['rollout/invalid_rate']:.3f}  {moved}  {seconds:.0f} s"
    )
    if first.turns:
        last = len(first.turns) - 1
        run.image("rollout/last_turn", captioned_frame(first.turns[last], last), iteration + 1)


def report(
    run: Run, metrics: Mapping[str, float], episodes: Iterable[Shown] = (), examples: Sequence[Example] = ()
) -> Path:
    """Write report.html of the run's stage, from its metrics, its metrics.jsonl and what is given; on the first rank
    alone."""
    cfg, path = run.cfg, run.path(REPORT)
    if not run.world.main:
        return path
    facts = run.facts()
    facts |= {"model": with_noise(facts["model"], getattr(cfg.stage, "noise", 0.0))} | earlier_page(run)
    sentence = headline(cfg.stage.name, metrics, where(cfg))
    write_report(
        path,
        title=f"{cfg.stage.name}: {run.env}",
        sentence=sentence[0].upper() + sentence[1:],
        facts=facts,
        results=results(cfg, metrics),
        metrics=metrics,
        curves=curves(run),
        episodes=list(episodes),
        examples=examples,
    )
    return path


def earlier_page(run: Run) -> dict[str, str]:
    """Where to read on about the weights that the run began from: the report of their run, as seen from this one."""
    init = init_of(run.cfg)
    folder = run_of(init) if init else None
    if folder is None or not (folder / REPORT).is_file():
        return {}
    return {"earlier report": os.path.relpath(folder / REPORT, run.dir)}


def where(cfg: RunConfig) -> str:
    """Over what the figures of a report's sentence are."""
    match cfg.stage:
        case PpoConfig(eval_episodes=episodes) | EvalConfig(episodes=episodes):
            return f" on {episodes} held-out seeds of {cfg.env.id}:"
        case CollectConfig():
            return f" of {cfg.env.id}"
    return ""


def results(cfg: RunConfig, metrics: Mapping[str, float]) -> list[Result]:
    """Each policy that was played, as far as `metrics` has its success."""
    stage = cfg.stage
    if isinstance(stage, CollectConfig):
        share, episodes = metrics["collect/success"], metrics["collect/episodes"] - unknown(metrics, "collect")
        interval = share, *wilson_interval(share * episodes, episodes)
        others = {words: metrics[f"collect/{name}"] for words, name in COLUMNS.items()}
        policy = with_noise(display_name(stage.policy), stage.noise)
        return [Result(policy, interval, others, ends(metrics, "collect", stage.episodes))]
    episodes = getattr(stage, "eval_episodes", 0) or getattr(stage, "episodes", 0)
    found = []
    for suffix, words in PANELS.items():
        if f"eval/success{suffix}" not in metrics:
            continue
        low, high = (metrics[f"eval/success{bound}{suffix}"] for bound in ("_low", "_high"))
        others = {words: metrics.get(f"eval/{name}{suffix}") for words, name in COLUMNS.items()}
        if isinstance(stage, EvalConfig) and stage.policy != "model" and not suffix:
            words = stage.policy
        elif "eval/success_before" in metrics and suffix in ("", "_greedy"):
            words = f"{words}, after"
        main = suffix in ("", "_greedy")
        interval = metrics[f"eval/success{suffix}"], low, high
        found.append(Result(words, interval, others, ends(metrics, "eval", episodes, suffix), main))
    return found


def ends(metrics: Mapping[str, float], group: str, episodes: int, suffix: str = "") -> dict[str, int]:
    """How many of the episodes ended how, by `Trajectory.stop`; {} where the metrics are older than their names."""
    names = {stop: f"{group}/{name}{suffix}" for stop, name in ENDS.items()}
    if not all(name in metrics for name in names.values()):
        return {}
    known = episodes - unknown(metrics, group, suffix)
    counts = {stop: round(metrics[name] * known) for stop, name in names.items()}
    others = {stop: round(metrics.get(f"{group}/{name}{suffix}", 0.0)) for stop, name in COUNTED.items()}
    return counts | {"time_limit": known - sum(counts.values())} | others


def curves(run: Run) -> list[Curve]:
    """All that is a curve in metrics.jsonl, those of FIRST in front."""
    stage = run.cfg.stage
    found = read_curves(run.path(METRICS))
    first = [name for name in FIRST.get(stage.name, ()) if name in found]
    rest = [name for name, points in found.items() if name not in first and len(points) > 1]
    drawn = [Curve(name, found[name], AXES.get(stage.name, "step"), name in first) for name in [*first, *rest]]
    if isinstance(stage, PpoConfig) and first:
        drawn[0] = with_intervals(drawn[0], found, stage.episodes)
    return drawn


def with_intervals(curve: Curve, found: Mapping[str, Sequence[tuple[float, float]]], episodes: int) -> Curve:
    """rollout/success with its 95 % intervals, and eval/success over it."""
    counts = [dict(found.get(f"rollout/{name}", ())) for name in COUNTED.values()]
    played = [(share, episodes - sum(each.get(step, 0) for each in counts)) for step, share in curve.points]
    bounds = [wilson_interval(share * count, count) for share, count in played]
    sides = [dict(found.get(f"eval/success_{bound}", ())) for bound in ("low", "high")]
    marks = [
        (step, share, *(side[step] for side in sides))
        for step, share in found.get("eval/success", ())
        if all(step in side for side in sides)
    ]
    return curve._replace(bounds=bounds, marks=marks, marked="held-out seeds")
