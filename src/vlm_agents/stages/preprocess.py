"""Recorded episodes and LLaVA files to SFT data: one chat a turn, as Parquet with `messages` and `images`.

`datasets` and LLaMA-Factory read that; docs/data.md says what TRL wants.
"""

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from PIL.Image import Image

from vlm_agents.chats import GROUP_BYTES, IMAGE_MARK, ChatWriter, digest, flaw
from vlm_agents.config import PreprocessConfig, RunConfig
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import DataError
from vlm_agents.llava_data import read_llava
from vlm_agents.pictures import as_shown
from vlm_agents.policies import is_random
from vlm_agents.progress import say, track
from vlm_agents.prompting import PromptFormat, make_format
from vlm_agents.run import Run, held_out, stable_hash
from vlm_agents.types import Prompt, Trajectory, Turn
from vlm_agents.weights import unfinished

SPLITS = ("train", "validation")

logger = logging.getLogger(__name__)


def main(cfg: RunConfig, run: Run) -> dict[str, float]:
    stage = cfg.stage
    assert isinstance(stage, PreprocessConfig)
    run.restore()  # an interrupted one starts anew
    counts: Counter[str] = Counter()
    pngs = Pngs()
    with ExitStack() as stack:
        files = {split: stack.enter_context(ChatWriter(run.path(f"{split}.parquet"))) for split in SPLITS}
        for row in track(sound_rows(stage, make_format(cfg.prompt), counts, pngs), "preprocess", None, "rows"):
            split = SPLITS[stable_hash("split", row["env"], row["seed"]) % 10_000 < stage.val_fraction * 10_000]
            files[split].add(row)
        if counts["turns_unrated"] and not counts["turns_rated"]:
            raise DataError(
                f"stage.min_score={stage.min_score:g} asks for ratings, and no step in {', '.join(stage.data)} has "
                "one: run stage=collect with stage.rater=expert or remote, or set stage.min_score=0"
            )
        if not files["train"]:
            lack = left_out(stage, counts)
            if held := len(files["validation"]):
                lack.append(f"{held} rows are held out by stage.val_fraction={stage.val_fraction:g}")
            raise DataError(
                f"no turn of {', '.join(stage.data)} is left to learn from ({dict(counts)}): "
                f"{''.join(f'{line}; ' for line in lack)}collect more episodes, or loosen stage.success_only and "
                "stage.min_score"
            )
        run.begin()
        for file in files.values():
            file.publish()
    metrics = {f"preprocess/{name}": float(count) for name, count in counts.items()}
    metrics |= {f"preprocess/{split}": float(len(file)) for split, file in files.items()}
    metrics["preprocess/pictures"] = float(len(pngs.seen))
    say(", ".join(f"{value:.0f} {name.removeprefix('preprocess/')}" for name, value in metrics.items()))
    for line in left_out(stage, counts):
        say(line)
    run.log(0, metrics)
    return run.finish(metrics, {split: file.path for split, file in files.items() if len(file)})


def left_out(stage: PreprocessConfig, counts: Counter[str]) -> list[str]:
    """Which settings left how much out."""
    lines = []
    if episodes := counts["episodes_left_out"]:
        why = (
            "by stage.success_only=true, or since their env failed" if stage.success_only else "since their env failed"
        )
        lines.append(f"{episodes} of {counts['episodes']} episodes are left out {why}")
    if turns := counts["turns_left_out"]:
        score = f" and stage.min_score={stage.min_score:g}" if stage.label == "reply" and stage.min_score else ""
        lines.append(f"{turns} turns are left out by stage.label={stage.label}{score}")
    return lines


def sound_rows(
    stage: PreprocessConfig, prompt_format: PromptFormat, counts: Counter[str], pngs: "Pngs"
) -> Iterator[dict]:
    """The rows of all sources, each chat once; one that no model can take is named, counted and left out."""
    learned: set[bytes] = set()
    for source in map(Path, stage.data):
        record = "record" if source.suffix == ".json" else "the episode of seed"
        for row in rows_of(source, stage, prompt_format, counts, pngs):
            if problem := flaw(row):
                counts[problem.name] += 1
                logger.warning(
                    "%s, %s %d, turn %d: %s; skipped", source, record, row["seed"], row["turn"], problem.text
                )
                continue
            key = digest(row)
            if key in learned and stage.label != "played":  # how often a move was played is what is learned there
                counts["duplicates"] += 1
                continue
            learned.add(key)
            yield row


def rows_of(
    source: Path, stage: PreprocessConfig, prompt_format: PromptFormat, counts: Counter[str], pngs: "Pngs"
) -> Iterator[dict]:
    """The rows of a run directory, or of a file in LLaVA's layout, which says itself what is to be learned."""
    if source.suffix != ".json":
        if unfinished(source):
            say(f"{source} isn't finished: what it has so far is taken")
        for trajectory in read_episodes(source):
            if held_out(trajectory.seed):
                raise DataError(
                    f"{source} played held-out seeds, such as {trajectory.seed}: trained on, they would say nothing of "
                    "a model any more. Collect episodes of your own with stage=collect"
                )
            yield from chats(trajectory, stage, prompt_format, counts, pngs)
        return
    for example in read_llava(source, Path(stage.images or source.parent), counts):
        origin = {"env": source.name, "seed": example.record, "turn": example.turn}
        yield chat(example.prompt, example.answer, pngs) | origin


def chats(
    trajectory: Trajectory,
    stage: PreprocessConfig,
    prompt_format: PromptFormat,
    counts: Counter[str],
    pngs: "Pngs",
) -> Iterator[dict]:
    """The turns of an episode that are worth learning from; `counts` says why the others aren't."""
    counts["episodes"] += 1
    if trajectory.stop == "env_error" or (stage.success_only and not trajectory.success):
        counts["episodes_left_out"] += 1
        return
    for index, turn in enumerate(trajectory.turns):
        if stage.label == "reply" and stage.min_score > 0:
            counts["turns_rated" if "quality" in turn.step.metrics else "turns_unrated"] += 1
        text = label(turn, stage, prompt_format)
        if text is None:
            counts["turns_left_out"] += 1
            continue
        yield chat(turn.prompt, text, pngs) | {"env": trajectory.env, "seed": trajectory.seed, "turn": index}


def chat(prompt: Prompt, answer: str, pngs: "Pngs") -> dict:
    """The columns of a row that sft reads."""
    messages = [{"role": m.role, "content": IMAGE_MARK * len(m.images) + m.text} for m in prompt]
    images = [image for message in prompt for image in message.images]
    return {
        "messages": [*messages, {"role": "assistant", "content": answer}],
        "images": [{"bytes": pngs.of(image), "path": None} for image in images],
    }


def label(turn: Turn, stage: PreprocessConfig, prompt_format: PromptFormat) -> str | None:
    """What to learn to say here: the reply if its step was good enough, or what the expert would have said.

    Random moves are no label: there the expert's advice is taken, where it gave any.
    """
    meant = stage.label == "reply" and not is_random(turn.reply)
    if meant and turn.parsed.error is None and turn.step.metrics.get("quality", 0.0) >= stage.min_score:
        return turn.reply.text
    advice = turn.observation.advice
    action = turn.parsed.action if stage.label == "played" or advice is None else advice.action
    if meant or advice is None or action is None:
        return None
    return prompt_format.write(advice.thought, action, turn.observation.legal_actions)


class Pngs:
    """Pictures as PNGs. Each distinct one is compressed once in as many bytes of them as a row group has."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()  # a hash of each distinct picture
        self._made: dict[bytes, bytes] = {}
        self._size = 0

    def of(self, image: Image) -> bytes:
        image = as_shown(image)  # for readers who take a frame's palette or alpha otherwise
        key = hashlib.blake2b(image.tobytes() + repr(image.size).encode(), digest_size=16).digest()
        if key not in self._made:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            if self._size > GROUP_BYTES:
                self._made.clear()
                self._size = 0
            self._made[key] = buffer.getvalue()
            self._size += len(self._made[key])
            self.seen.add(key)
        return self._made[key]
