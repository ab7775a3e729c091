"""Recorded episodes and LLaVA files to SFT data: one chat a turn, as Parquet.

`datasets`, TRL and LLaMA-Factory read it, each its own columns; docs/data.md says how.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from vlm_agents.chats import FLAWS, GROUP_BYTES, ChatWriter, digest, flaw
from vlm_agents.config import PreprocessConfig, RunConfig
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import DataError
from vlm_agents.llava_data import read_llava
from vlm_agents.marks import marked
from vlm_agents.pictures import Picture
from vlm_agents.progress import say, track
from vlm_agents.prompting import PromptFormat, make_format
from vlm_agents.run import Run
from vlm_agents.seeds import held_out, stable_hash
from vlm_agents.stages.cards import write_dataset_card
from vlm_agents.types import Prompt, Trajectory, Turn
from vlm_agents.weights import unfinished

SPLITS = ("train", "validation")
# Why something isn't in the data, by the name that it is counted under.
LEFT_OUT = {
    "episodes_unsuccessful": "of {episodes} episodes without success (stage.success_only)",
    "episodes_broken": "of {episodes} episodes that an error of the env ended, or that nobody scored",
    "turns_illegal": "turns whose reply holds no legal action",
    "turns_badly_rated": "turns rated under {stage.min_score:g} (stage.min_score)",
    "turns_not_rated": "turns without a rating (stage.min_score)",
    "turns_unadvised": "turns that an expert's advice would label, and without any (stage.label={stage.label})",
    "duplicates": "chats that are there already",
    "records_skipped": "of {records} records, named above",
    **dict.fromkeys(FLAWS, "rows that no model can take, named above ({name})"),
}

logger = logging.getLogger(__name__)


def main(cfg: RunConfig, stage: PreprocessConfig, run: Run) -> dict[str, float]:
    run.restore()  # an interrupted one starts anew
    counts: Counter[str] = Counter()
    pngs = Pngs()
    envs: set[str] = set()
    with ExitStack() as stack:
        files = {split: stack.enter_context(ChatWriter(run.path(f"{split}.parquet"))) for split in SPLITS}
        rows = sound_rows(stage, make_format(cfg.prompt), counts, pngs)
        for row, key in track(rows, "preprocess", None, "rows"):
            split = SPLITS[stable_hash("split", row["env"], row["seed"]) % 10_000 < stage.val_fraction * 10_000]
            files[split].add(row, key)
            envs.add(row["env"])
        if counts["turns_unrated"] and not counts["turns_rated"]:
            raise DataError(
                f"stage.min_score={stage.min_score:g} asks for ratings, and no step in {', '.join(stage.data)} has "
                "one: run stage=collect with stage.rater=expert or remote, or set stage.min_score=0"
            )
        if not files["train"]:
            why = left_out(counts, stage)
            if held := len(files["validation"]):
                why.append(f"{held} rows held out (stage.val_fraction={stage.val_fraction:g})")
            raise DataError(
                f"no turn of {', '.join(stage.data)} is left to learn from (left out: {', '.join(why) or 'nothing'}): "
                "collect more episodes, or loosen the settings that are named here"
            )
        run.begin()
        for file in files.values():
            file.publish()
    metrics = {f"preprocess/{name}": float(count) for name, count in counts.items()}
    metrics |= {f"preprocess/{split}": float(len(file)) for split, file in files.items()}
    metrics["preprocess/pictures"] = float(len(pngs.seen))
    written = " and ".join(f"{len(file)} in {file.path.name}" for file in files.values() if len(file))
    say(f"rows to learn from: {written}, with {len(pngs.seen)} distinct pictures")
    if out := left_out(counts, stage):
        say(f"left out: {', '.join(out)}")
    run.env = ", ".join(sorted(envs))
    write_dataset_card(run, stage.data, {split: len(file) for split, file in files.items() if len(file)})
    run.log(0, metrics)
    return run.finish(metrics, {split: file.path for split, file in files.items() if len(file)})


def left_out(counts: Counter[str], stage: PreprocessConfig) -> list[str]:
    """What isn't in the data, with how many and by which setting."""
    return [
        f"{counts[name]} {words.format(stage=stage, name=name, episodes=counts['episodes'], records=counts['records'])}"
        for name, words in LEFT_OUT.items()
        if counts[name]
    ]


def sound_rows(
    stage: PreprocessConfig, prompt_format: PromptFormat, counts: Counter[str], pngs: "Pngs"
) -> Iterator[tuple[dict, bytes]]:
    """The rows of all sources and their digests, each chat once; one that no model can take is named, counted and left
    out."""
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
            yield row, key


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
    broken = not trajectory.known
    if broken or (stage.success_only and not trajectory.success):
        counts["episodes_left_out"] += 1
        counts["episodes_broken" if broken else "episodes_unsuccessful"] += 1
        return
    for index, turn in enumerate(trajectory.turns):
        if stage.label == "reply" and stage.min_score > 0:
            counts["turns_unrated" if turn.rating is None else "turns_rated"] += 1
        text, lacking = label(turn, stage, prompt_format)
        if text is None:
            counts["turns_left_out"] += 1
            counts[lacking] += 1
            continue
        yield chat(turn.prompt, text, pngs) | {"env": trajectory.env, "seed": trajectory.seed, "turn": index}


def chat(prompt: Prompt, answer: str, pngs: "Pngs") -> dict:
    """The columns of a row that sft reads."""
    messages = [{"role": m.speaker, "content": marked(m.parts)} for m in prompt]
    images = [image for message in prompt for image in message.images]
    return {
        "messages": [*messages, {"role": "assistant", "content": answer}],
        "images": [{"bytes": pngs.of(image), "path": None} for image in images],
    }


def label(turn: Turn, stage: PreprocessConfig, prompt_format: PromptFormat) -> tuple[str | None, str]:
    """What to learn to say here: the reply if its step was good enough, or what the expert would have said; or None,
    and which of LEFT_OUT is why.

    Random moves are no label: there the expert's advice is taken, where it gave any.
    """
    if stage.label == "reply" and turn.reply.source != "random":
        if turn.parsed.error is not None:
            return None, "turns_illegal"
        if (turn.rating or 0.0) < stage.min_score:
            return None, "turns_not_rated" if turn.rating is None else "turns_badly_rated"
        return turn.reply.text, ""
    advice = turn.observation.advice
    if advice is None:
        return None, "turns_unadvised"
    action = turn.parsed.action if stage.label == "played" else advice.action
    if action is None:
        return None, "turns_illegal"
    return prompt_format.write(advice.thought, action, turn.observation.legal_actions), ""


class Pngs:
    """Pictures as PNGs. Each distinct one is compressed once in as many bytes of them as a row group has."""

    def __init__(self) -> None:
        self.seen: set[str] = set()  # the key of each distinct picture
        self._made: dict[str, bytes] = {}
        self._size = 0

    def of(self, picture: Picture) -> bytes:
        key = picture.key
        if key not in self._made:
            buffer = io.BytesIO()
            picture.image.save(buffer, "PNG")
            if self._size > GROUP_BYTES:
                self._made.clear()
                self._size = 0
            self._made[key] = buffer.getvalue()
            self._size += len(self._made[key])
            self.seen.add(key)
        return self._made[key]
