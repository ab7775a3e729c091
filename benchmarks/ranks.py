"""Do several ranks learn what one does?

    python benchmarks/ranks.py
    python benchmarks/ranks.py --time

The first runs PPO and GRPO on echo, with full training, LoRA and QLoRA of two models, each by one rank and by two: DDP,
ZeRO-2, ZeRO-3. All start from weights that a short stage=sft made, which know the words of the game and not what they
mean: rewards differ, and so gradients aren't noise. Printed is a table: how far the two ranks' figures are from the one
rank's in any line of metrics.jsonl, and how far the saved weights are, tensor by tensor, as a share of a tensor's norm.

Ranks sum in another order, so that numbers differ by rounding; where a draw falls between two roundings, another token
is sampled, and from there on the two runs play different episodes. "same episodes" counts the iterations up to there,
by all figures of what was played and the recorded replies, of half of the episodes; lines after it aren't compared, and
neither are weights.

"one, cut" is one rank again, with smaller micro-batches: what rounding alone does.

The second measures seconds an iteration of MiniGrid by one rank and by two on this machine.

Goes on where it was stopped: a run that is finished is not run again. CPU only: gloo, fp32, one thread a rank.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kill_drill import plain
from safetensors.torch import load_file
from torch import Tensor

ITERATIONS = 5
COMMON = ["env=echo", "env.turns=2", "prompt=action_only", "prompt.max_reply_tokens=4", "hardware.threads=1"]
COMMON += ["tracking=jsonl"]
SFT = ["stage=sft", "stage.data=outputs/made/preprocess", "stage.epochs=3", "stage.batch_size=16"]
PPO = ["stage=ppo", f"stage.iterations={ITERATIONS}", "stage.episodes=8", "stage.num_envs=8", "stage.eval_episodes=4"]
PPO += [f"stage.checkpoint_every={ITERATIONS}", "algo.minibatch_turns=8", "algo.epochs=2"]
MODELS = "tiny", "tiny_qwen3_vl"
MODES = {
    "full": ["model/train=all"],
    "LoRA": ["model/lora=adapter"],
    "QLoRA": ["model/lora=adapter", "model.quantize=nf4"],
}
ALGORITHMS = {"ppo": ["algo=ppo"], "grpo": ["algo=grpo", "algo.group_size=4"]}
RANKS = {
    "one": [],
    "one, cut": ["hardware.tokens_per_microbatch=400"],
    "ddp": ["hardware.processes=2"],
    "zero2": ["hardware.processes=2", "hardware.zero=2"],
    "zero3": ["hardware.processes=2", "hardware.zero=3"],
}
CLOCKS = "time/", "speed/", "memory/"
PLAYED = "rollout/"
LOSSES = "ppo/policy_loss", "ppo/value_loss"
TIMED = ["stage=ppo", "model=tiny", "env=minigrid", "stage.iterations=4", "stage.checkpoint_every=4"]
TIMED += ["stage.episodes=16", "stage.num_envs=16", "stage.eval_episodes=0", "tracking=jsonl"]
TIMES = {
    "one rank, 1 thread": ["hardware.threads=1"],
    "one rank, 2 threads": ["hardware.threads=2"],
    "two ranks, ddp": ["hardware.threads=1", "hardware.processes=2"],
    "two ranks, zero2": ["hardware.threads=1", "hardware.processes=2", "hardware.zero=2"],
    "two ranks, zero3": ["hardware.threads=1", "hardware.processes=2", "hardware.zero=3"],
}


def finish(folder: Path, name: str, words: Sequence[str]) -> Path:
    """The finished run of that name, which is begun or continued if it has to be."""
    stage = words[0].removeprefix("stage=")
    run = folder / f"outputs/{name}/{stage}"
    if not (run / "DONE").exists():
        plain(folder, [*words, f"name={name}"])
    return run


def make_weights(folder: Path, model: str) -> Path:
    """Weights that answer with the words of the game."""
    random = ["stage=collect", *COMMON, "stage.policy=random", "stage.episodes=300", "stage.num_envs=8"]
    source = finish(folder, "made", random)
    chats = ["stage=preprocess", *COMMON, f"stage.data=[{source}]", "stage.success_only=false", "stage.label=played"]
    finish(folder, "made", chats)
    return finish(folder, f"made_{model}", [*SFT, *COMMON, f"model={model}"])


# ---- equality --------------------------------------------------------------------------------------------------------
@dataclass
class Apart:
    """How far a run is from that of one rank."""

    same: int  # iterations with the same episodes; those after them, and weights made by them, aren't compared
    loss: float = 0.0  # the furthest that a loss is
    figure: float = 0.0  # the furthest that any other figure is, as a share of it, or of 1 where it is smaller
    which: str = "-"
    ratio: float = 0.0  # the furthest that ratio_at_start is from 1
    tensors: dict[str, float] = field(default_factory=dict)  # each saved tensor's distance as a share of its norm
    all: float = float("nan")  # that of all tensors as one

    @property
    def sound(self) -> bool:
        """Within the bars? A tensor whose gradient is little but rounding may be further; such are listed."""
        return self.same == ITERATIONS and self.loss <= 1e-6 and self.ratio <= 1e-4 and self.all <= 1e-5


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def replies(run: Path) -> list[Any]:
    """Seed and tokens of each recorded episode."""
    told = map(json.loads, (run / "episodes.jsonl").read_text().splitlines())
    return [(one["seed"], [turn["reply"]["token_ids"] for turn in one["turns"]]) for one in told]


def weights(run: Path) -> dict[str, Tensor]:
    """All that the run saved of its model, by file and name."""
    return {
        f"{path.stem}/{name}": tensor.double()
        for path in sorted((run / "model").rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
        if tensor.is_floating_point()
    }


def numbers(line: Mapping[str, Any], begun: tuple[str, ...] = ("",)) -> Iterator[tuple[str, float]]:
    """All but the clock's whose name begins so."""
    for name, value in line.items():
        if isinstance(value, int | float) and name.startswith(begun) and not name.startswith(CLOCKS):
            yield name, value


def iterations(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "ppo/updates" in line]


def same_episodes(one: Path, other: Path) -> int:
    """Iterations up to the first whose episodes differ."""
    mine, its = ([dict(numbers(line, (PLAYED,))) for line in iterations(run)] for run in (one, other))
    wrote, others = replies(one), replies(other)
    recorded = len(wrote) // ITERATIONS
    for step in range(ITERATIONS):
        part = slice(step * recorded, (step + 1) * recorded)
        if wrote[part] != others[part] or mine[step].keys() != its[step].keys():
            return step
        if any(distance(its[step][name], value) > 1e-5 for name, value in mine[step].items()):
            return step
    return ITERATIONS


def distance(value: float, wanted: float) -> float:
    return abs(value - wanted) / max(1.0, abs(wanted))


def compare(one: Path, other: Path) -> Apart:
    same = same_episodes(one, other)
    read = lines if same == ITERATIONS else lambda run: iterations(run)[:same]
    apart = Apart(same)
    for line, its in zip(read(other), read(one), strict=True):
        found, wanted = dict(numbers(line)), dict(numbers(its))
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            if name in LOSSES:
                apart.loss = max(apart.loss, abs(value - wanted[name]))
            elif (far := distance(value, wanted[name])) > apart.figure:
                apart.figure, apart.which = far, f"{name} at step {line['step']}"
        apart.ratio = max(apart.ratio, abs(found.get("ppo/ratio_at_start", 1.0) - 1))
    if same == ITERATIONS:
        mine, right = weights(other), weights(one)
        assert mine.keys() == right.keys()
        apart.tensors = {name: share(mine[name], right[name]) for name in right}
        total = sum(tensor.square().sum().item() for tensor in right.values()) ** 0.5
        apart.all = sum((mine[name] - right[name]).square().sum().item() for name in right) ** 0.5 / total
    return apart


def share(found: Tensor, wanted: Tensor) -> float:
    """As a share of its norm; of what is all zeros, 0 or 1."""
    away = (found - wanted).norm().item()
    return away and away / (wanted.norm().item() or away)


def equality(folder: Path, models: Sequence[str], modes: Sequence[str], algorithms: Sequence[str]) -> bool:
    columns = ["model", "trained", "algo", "ranks", "same episodes", "losses", "ratio - 1", "weights"]
    columns += ["furthest tensor, tensors past 1e-5"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    sound, notes = True, []
    for model in models:
        init = make_weights(folder, model)
        for mode in modes:
            for algorithm in algorithms:
                words = [*PPO, *COMMON, f"model={model}", f"stage.init={init}", *MODES[mode], *ALGORITHMS[algorithm]]
                kind = f"{model}_{mode}_{algorithm}"
                runs = {
                    name: finish(folder, f"{kind}_{name.replace(', ', '_')}", [*words, *more])
                    for name, more in RANKS.items()
                }
                for name in list(RANKS)[1:]:
                    apart = compare(runs["one"], runs[name])
                    sound &= apart.sound
                    further = [f"    {size:.1e} {one}" for one, size in apart.tensors.items() if size > 1e-5]
                    furthest = f"{max(apart.tensors.values(), default=float('nan')):.1e}"
                    print(
                        f"| {model} | {mode} | {algorithm} | {name} | {apart.same} of {ITERATIONS} | {apart.loss:.1e} "
                        f"| {apart.ratio:.0e} | {apart.all:.0e} | {furthest}, {len(further)} of {len(apart.tensors)} |",
                        flush=True,
                    )
                    notes += [f"{model} {mode} {algorithm} {name}: {apart.figure:.0e} {apart.which}", *further]
    print("\nThe figure beside losses that is furthest, and tensors that are further than 1e-5:", *notes, sep="\n")
    return sound


# ---- time ------------------------------------------------------------------------------------------------------------
def times(folder: Path) -> None:
    """Of each kind the median over iterations, without the first, in which much is done once."""
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
    print("| | rollout | update | seconds an iteration | load meanwhile |\n|---|---|---|---|---|")
    for name, words in TIMES.items():
        run = finish(folder, f"time_{name.replace(' ', '_').replace(',', '')}", [*TIMED, *words])
        told = [line for line in lines(run) if "time/rollout" in line][1:]
        rollout, update = (median(line[f"time/{phase}"] for line in told) for phase in ("rollout", "update"))
        total = median(line["time/rollout"] + line["time/update"] for line in told)
        print(f"| {name} | {rollout:.2f} | {update:.2f} | {total:.2f} | {os.getloadavg()[0]:.1f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Do several ranks learn what one does?")
    parser.add_argument("--folder", type=Path, default=Path("outputs/ranks"), help="where to run; kept")
    parser.add_argument("--time", action="store_true", help="measure seconds an iteration instead")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.time:
        times(folder)
        return 0
    return 0 if equality(folder, args.models, args.modes, args.algorithms) else 1


if __name__ == "__main__":
    sys.exit(main())
