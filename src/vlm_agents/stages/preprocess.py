"""Recorded episodes and LLaVA files to SFT data: one chat a turn, as Parquet with `messages` and `images`.

`messages` are role and content, a picture's place marked by `<image>`; `images` are PNGs, in order. That is what
`datasets` and LLaMA-Factory read; the README says what TRL wants.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from PIL.Image import Image

from vlm_agents.config import PreprocessConfig, RunConfig
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import DataError
from vlm_agents.files import atomic_write
from vlm_agents.llava_data import read_llava
from vlm_agents.policies import is_random
from vlm_agents.progress import say
from vlm_agents.prompting import PromptFormat, make_format
from vlm_agents.run import Run, held_out, stable_hash
from vlm_agents.types import Prompt, Trajectory, Turn

FEATURES = datasets.Features(
    {
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "images": [datasets.Image()],
        "env": datasets.Value("string"),
        "seed": datasets.Value("int64"),
        "turn": datasets.Value("int32"),
    }
)
IMAGE_MARK = "<image>"
SPLITS = ("train", "validation")


def main(cfg: RunConfig, run: Run) -> dict[str, float]:
    stage = cfg.stage
    assert isinstance(stage, PreprocessConfig)
    run.restore()  # an interrupted one starts anew
    prompt_format = make_format(cfg.prompt)
    counts: Counter[str] = Counter()
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    seen: set[int] = set()
    pngs: dict[bytes, bytes] = {}
    for source in map(Path, stage.data):
        for row in rows_of(source, stage, prompt_format, counts, pngs):
            if sum(m["content"].count(IMAGE_MARK) for m in row["messages"]) != len(row["images"]):
                counts["mark_in_text"] += 1  # every reader would look for a picture there
                continue
            split = SPLITS[stable_hash("split", row["env"], row["seed"]) % 10_000 < stage.val_fraction * 10_000]
            key = stable_hash(row["messages"], [image["bytes"] for image in row["images"]])
            if key in seen and stage.label != "played":  # how often a move was played is what is learned there
                counts["duplicates"] += 1
                continue
            seen.add(key)
            rows[split].append(row)
    if counts["turns_unrated"] and not counts["turns_rated"]:
        raise DataError(
            f"stage.min_score={stage.min_score:g} asks for ratings, and no step in {', '.join(stage.data)} has one: "
            "run stage=collect with stage.rater=expert or remote, or set stage.min_score=0"
        )
    if not rows["train"]:
        raise DataError(
            f"no turn of {', '.join(stage.data)} is left to learn from ({dict(counts)}): collect more episodes, "
            "or loosen stage.success_only and stage.min_score"
        )
    for split, content in rows.items():
        parquet = io.BytesIO()
        # Not through `datasets`: it stores a picture anew in every row, and where the disk is full the process dies.
        # A dictionary page as large as needed stores each distinct picture of a row group once.
        table = pyarrow.Table.from_pylist(content, schema=FEATURES.arrow_schema)
        pyarrow.parquet.write_table(table, parquet, dictionary_pagesize_limit=1 << 30)
        atomic_write(run.path(f"{split}.parquet"), parquet.getvalue())
    metrics = {f"preprocess/{name}": float(count) for name, count in counts.items()}
    metrics |= {f"preprocess/{split}": float(len(content)) for split, content in rows.items()}
    metrics["preprocess/pictures"] = float(len(pngs))
    say(", ".join(f"{value:.0f} {name.removeprefix('preprocess/')}" for name, value in metrics.items()))
    run.log(0, metrics)
    return run.finish(metrics, {split: run.path(f"{split}.parquet") for split in SPLITS})


def rows_of(
    source: Path, stage: PreprocessConfig, prompt_format: PromptFormat, counts: Counter[str], pngs: dict[bytes, bytes]
) -> Iterator[dict]:
    """The rows of a run directory, or of a file in LLaVA's layout, which says itself what is to be learned."""
    if source.suffix != ".json":
        if source.is_file():
            raise DataError(f"{source}: chats in LLaVA's layout are one JSON list in a file named *.json")
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
    pngs: dict[bytes, bytes],
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


def chat(prompt: Prompt, answer: str, pngs: dict[bytes, bytes]) -> dict:
    """The columns of a row that sft reads."""
    messages = [{"role": m.role, "content": IMAGE_MARK * len(m.images) + m.text} for m in prompt]
    images = [image for message in prompt for image in message.images]
    return {
        "messages": [*messages, {"role": "assistant", "content": answer}],
        "images": [{"bytes": png(image, pngs), "path": None} for image in images],
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


def png(image: Image, made: dict[bytes, bytes]) -> bytes:
    """The picture as PNG, each distinct one compressed once."""
    key = hashlib.blake2b(image.tobytes() + repr(image.size).encode(), digest_size=16).digest()
    if key not in made:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        made[key] = buffer.getvalue()
    return made[key]
