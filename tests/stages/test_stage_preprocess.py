"""Preprocessing: which turns are kept and what is learned to be said there; and that others can read the Parquet."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from vlm_agents.config import HardwareConfig, ModelConfig
from vlm_agents.envs.echo import COLORS
from vlm_agents.episodes import EpisodeWriter, read_episodes
from vlm_agents.errors import DataError
from vlm_agents.models import load_agent
from vlm_agents.pictures import Picture
from vlm_agents.stages.sft import Chats
from vlm_agents.types import Advice, Message, Observation, Parsed, Reply, Step, Stop, Trajectory, Turn

RunStage = Callable[..., Path]


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


def artifacts_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "summary.json").read_text())["artifacts"]


def table(folder: Path, split: str = "train") -> Any:
    """As a user opens it, outside this package's own reader."""
    opened = datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"), cache_dir=str(folder / "cache"))
    assert isinstance(opened, datasets.Dataset)
    return opened


def answers(folder: Path) -> list[str]:
    return [messages[-1]["content"] for messages in table(folder)["messages"]]


# ---- what Echo's expert said -----------------------------------------------------------------------------------------
def test_every_row_is_a_chat_about_its_picture(echo_chats: Path):
    for split in ("train", "validation"):
        rows = table(echo_chats, split)
        for row in rows:
            assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
            assert [message["content"].count("<image>") for message in row["messages"]] == [0, 1, 0]
            assert row["messages"][1]["content"].startswith(f"<image>Turn {row['turn'] + 1} of 3.")
            (image,) = row["images"]
            assert image.size == (56, 56)
            assert image.getcolors() == [(56 * 56, COLORS[row["messages"][2]["content"]])]  # the label is its colour


def test_load_dataset_reads_both_splits(echo_chats: Path, tmp_path: Path):
    files = {split: str(echo_chats / f"{split}.parquet") for split in ("train", "validation")}
    both = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert isinstance(both, datasets.DatasetDict)
    metrics = metrics_of(echo_chats)
    for split in files:
        assert len(both[split]) == metrics[f"preprocess/{split}"] > 0
    assert isinstance(both["train"].features["images"], datasets.List)
    assert isinstance(both["train"].features["images"].feature, datasets.Image)
    assert artifacts_of(echo_chats) == {split: f"{split}.parquet" for split in files}


def test_without_rows_to_hold_out_there_is_no_validation_file(run_stage: RunStage, echo_episodes: Path, tmp_path: Path):
    """Neither an empty one, which `datasets` can't load, nor that of an earlier, interrupted try."""
    words = ["stage=preprocess", f"stage.data=[{echo_episodes}]", "stage.val_fraction=0"]
    folder = run_stage(tmp_path / "chats", *words)
    (folder / "DONE").unlink()
    (folder / "validation.parquet").write_bytes(b"of an earlier try")
    run_stage(folder, *words)
    assert not (folder / "validation.parquet").exists()
    assert artifacts_of(folder) == {"train": "train.parquet"}
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded, datasets.DatasetDict)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": metrics_of(folder)["preprocess/train"]}

    trained = run_stage(tmp_path / "sft", "stage=sft", "stage.batch_size=64", f"stage.data={folder}")
    assert "sft/val_loss" not in metrics_of(trained)


def test_load_dataset_has_the_columns_for_each_reader(echo_chats: Path, tmp_path: Path):
    """TRL refuses to learn a completion alone where it sees `messages` as well."""
    named: dict[str, Any] = {
        name: datasets.load_dataset(str(echo_chats), name, split="train", cache_dir=str(tmp_path))
        for name in ("default", "trl")
    }
    assert set(named["default"].column_names) == {"messages", "images", "env", "seed", "turn"}
    assert set(named["trl"].column_names) == {"prompt", "completion", "images"}
    for row, given in zip(named["default"], named["trl"], strict=True):
        *asked, answer = row["messages"]
        assert as_messages(given["prompt"]) == asked
        assert as_messages(given["completion"]) == [answer]
        assert given["images"] == row["images"]


def as_messages(parts: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {"role": one["role"], "content": "".join(part["text"] or f"<{part['type']}>" for part in one["content"])}
        for one in parts
    ]


def test_what_trl_is_given_are_the_tokens_that_sft_learns(echo_chats: Path, tiny_model: Path):
    """As TRL's collator asks the template for them; it learns the line end after a reply too."""
    agent = load_agent(ModelConfig("tiny", path=str(tiny_model)), HardwareConfig("cpu"))
    ours = Chats(echo_chats / "train.parquet", agent.renderer)
    line_end = agent.tokenizer.encode("\n")
    for index, given in enumerate(table(echo_chats)):
        prompt = agent.tokenizer.apply_chat_template(given["prompt"], tokenize=False, add_generation_prompt=True)
        whole = agent.tokenizer.apply_chat_template([*given["prompt"], *given["completion"]], tokenize=False)
        completion = whole.removeprefix(prompt)
        # a picture of 56 pixels takes 4 tokens, which a processor puts into the place of one
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * 4)
        ((start, end),) = ours[index].spans
        assert agent.tokenizer.encode(prompt) == ours[index].input_ids[:start].tolist()
        assert agent.tokenizer.encode(completion) == ours[index].input_ids[start:end].tolist() + line_end


def test_no_episode_is_in_both_splits(echo_chats: Path, echo_episodes: Path):
    train, validation = (set(table(echo_chats, split)["seed"]) for split in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation
    assert train | validation <= {episode.seed for episode in read_episodes(echo_episodes)}


def test_every_turn_is_kept_or_counted_and_no_chat_is_kept_twice(echo_chats: Path):
    rows = [row for split in ("train", "validation") for row in table(echo_chats, split)]
    chats = {(str(row["messages"]), row["images"][0].tobytes()) for row in rows}
    metrics = metrics_of(echo_chats)
    assert len(chats) == len(rows)
    assert metrics["preprocess/episodes"] == 40
    assert metrics["preprocess/duplicates"] == 40 * 3 - len(rows)
    assert metrics["preprocess/duplicates"] > 0
    assert metrics["preprocess/pictures"] == 4
    (line,) = (echo_chats / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, **metrics}


def test_only_solved_episodes_by_default(run_stage: RunStage, echo_episodes: Path, tmp_path: Path):
    folder = run_stage(tmp_path, "stage=preprocess", f"stage.data=[{echo_episodes}]", "stage.val_fraction=0")
    solved = {episode.seed for episode in read_episodes(echo_episodes) if episode.success}
    assert 0 < len(solved) < 40
    assert set(table(folder)["seed"]) <= solved
    assert metrics_of(folder)["preprocess/episodes_left_out"] == 40 - len(solved)
    assert metrics_of(folder)["preprocess/validation"] == 0


def test_what_was_played_on_held_out_seeds_is_refused(run_stage: RunStage, tmp_path: Path):
    words = ("stage.policy=expert", "stage.episodes=2", "stage.num_envs=2")
    folder = run_stage(tmp_path / "eval", "stage=eval", *words)
    with pytest.raises(DataError, match=r"eval played held-out seeds, such as \d+: trained on, they would say nothing"):
        run_stage(tmp_path / "chats", "stage=preprocess", f"stage.data=[{folder}]")


def test_an_interrupted_run_starts_anew(run_stage: RunStage, echo_episodes: Path, tmp_path: Path):
    words = ["stage=preprocess", f"stage.data=[{echo_episodes}]"]
    folder = run_stage(tmp_path, *words)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".jsonl", ".parquet")}
    (folder / "DONE").unlink()
    run_stage(tmp_path, *words)
    assert {name: (folder / name).read_bytes() for name in before} == before


# ---- episodes written by hand ----------------------------------------------------------------------------------------
PIXELS = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)  # no PNG makes it small
NOISE = Picture(Image.fromarray(PIXELS))


def turn(
    said: str, rating: float | None = 10.0, *, text: str = "a door", drawn: bool = False, knows: bool = True
) -> Turn:
    """A turn in which `said` was said, and the expert would have said `knock`, if it `knows`."""
    now = Observation(text, (NOISE,), ("knock", "open", "wait"), advice=Advice("shut", "knock", 2) if knows else None)
    prompt = (Message("system", ("rules",)), Message("user", (NOISE, text)))
    step = Step(Observation("after"), 0.0, False, False, False, True, True)
    parsed = Parsed(said) if said in ("knock", "open", "wait") else Parsed(None, error="illegal action")
    return Turn(now, prompt, Reply(said, source="random" if drawn else "expert"), parsed, step, rating)


@pytest.fixture
def preprocess(run_stage: RunStage, tmp_path: Path):
    """`preprocess(episodes, ...)`: the folder of a finished stage=preprocess over these turns, nothing held out."""

    def run(episodes: Sequence[Sequence[Turn]], *words: str, stop: Stop = "success", name: str = "a") -> Path:
        source = tmp_path / f"{name}_collect"
        source.mkdir()
        writer = EpisodeWriter(source)
        for seed, turns in enumerate(episodes):
            writer.append(Trajectory("hand", seed, "hand", tuple(turns), stop))
        return run_stage(tmp_path / name, "stage=preprocess", f"stage.data=[{source}]", "stage.val_fraction=0", *words)

    return run


TURNS = [
    turn("open", 10.0, text="one"),
    turn("wait", 4.0, text="two"),
    turn("fly", 8.0, text="three"),  # no legal action
    turn("open", 0.0, text="four", drawn=True),
    turn("open", 0.0, text="five", drawn=True, knows=False),
]


def test_a_reply_is_learned_if_it_was_meant_and_legal_and_chance_gives_way_to_advice(preprocess):
    folder = preprocess([TURNS])
    assert answers(folder) == ["open", "wait", "knock"]
    assert table(folder)["turn"][:] == [0, 1, 3]
    assert metrics_of(folder)["preprocess/turns_left_out"] == 2


def test_replies_below_the_score_are_left_out(preprocess):
    folder = preprocess([TURNS], "stage.min_score=5")
    assert answers(folder) == ["open", "knock"]
    assert metrics_of(folder)["preprocess/turns_left_out"] == 3
    assert answers(preprocess([TURNS], "stage.min_score=4", name="b")) == ["open", "wait", "knock"]


def test_what_was_left_out_is_told_by_its_setting(preprocess, run_stage, tmp_path: Path, capsys):
    preprocess([TURNS, [*TURNS[:1], turn("knock", None)]], "stage.min_score=5")
    reasons = (
        "1 turns whose reply holds no legal action",
        "1 turns rated under 5 (stage.min_score)",
        "1 turns without a rating (stage.min_score)",
        "1 turns that an expert's advice would label, and without any (stage.label=reply)",
        "1 chats that are there already",
    )
    assert f"left out: {', '.join(reasons)}\n" in capsys.readouterr().err
    words = ("stage.success_only=true", "stage.val_fraction=0")
    EpisodeWriter(tmp_path / "a_collect").append(Trajectory("hand", 9, "hand", tuple(TURNS), "failure"))
    run_stage(tmp_path / "b", "stage=preprocess", f"stage.data=[{tmp_path / 'a_collect'}]", *words)
    assert "left out: 1 of 3 episodes without success (stage.success_only)" in capsys.readouterr().err


def test_a_step_that_nobody_rated_passes_only_where_no_score_is_asked_for(preprocess):
    turns = [turn("open", None), turn("knock", 5.0)]
    assert answers(preprocess([turns])) == ["open", "knock"]
    assert answers(preprocess([turns], "stage.min_score=0.1", name="b")) == ["knock"]


def test_steps_without_a_rating_are_counted_and_data_without_any_is_refused(preprocess):
    turns = [turn("open", None), turn("knock", 5.0), turn("wait", None, drawn=True)]
    metrics = metrics_of(preprocess([turns], "stage.min_score=4"))
    assert (metrics["preprocess/turns_rated"], metrics["preprocess/turns_unrated"]) == (1, 2)
    with pytest.raises(DataError, match=r"min_score=4 asks for ratings.*stage\.rater=expert or remote"):
        preprocess([turns[::2]], "stage.min_score=4", name="b")


def test_a_text_that_holds_the_mark_of_a_picture_is_left_out(preprocess, caplog: pytest.LogCaptureFixture):
    folder = preprocess([[turn("open"), turn("wait", text="a sign: <image>")]])
    assert answers(folder) == ["open"]
    assert metrics_of(folder)["preprocess/mark_in_text"] == 1
    assert "a_collect, the episode of seed 0, turn 1: it has 2 <image> for 1 pictures" in caplog.text


def test_a_text_with_half_a_character_is_named_and_left_out(preprocess, caplog: pytest.LogCaptureFixture):
    """JSON can spell half a surrogate pair, which no file and no tokenizer takes."""
    folder = preprocess([[turn("open"), turn("wait", text="a sign: \ud83d")]])
    assert answers(folder) == ["open"]
    assert metrics_of(folder)["preprocess/half_character"] == 1
    assert re.search(
        r"a_collect, the episode of seed 0, turn 1: half a surrogate pair, \\ud83d, in a text; skipped", caplog.text
    )


def test_advice_labels_every_turn_where_there_is_any(preprocess):
    assert answers(preprocess([TURNS], "stage.label=advice", "stage.min_score=5")) == ["knock"] * 4


def test_what_was_played_is_learned_as_often_as_it_was_played(preprocess):
    """With the expert's thought, whether it was meant or chance; but not where there is no thought or no action."""
    folder = preprocess([TURNS, TURNS[:1]], "stage.label=played", "prompt=cot_json")
    learned = [json.loads(answer) for answer in answers(folder)]
    assert learned == [{"thoughts": "shut", "action": action} for action in ("open", "wait", "open", "open")]


def test_the_thought_of_the_advice_is_learned_in_the_words_of_the_format(preprocess):
    folder = preprocess([TURNS[:1]], "stage.label=advice", "prompt=cot_json")
    assert json.loads(answers(folder)[0]) == {"thoughts": "shut", "action": "knock"}


def test_the_same_chat_is_kept_once_whoever_had_it(preprocess):
    folder = preprocess([[TURNS[0], TURNS[1]], [TURNS[1], replace(TURNS[0], reply=Reply("wait"))]])
    assert answers(folder) == ["open", "wait", "wait"]  # the last one says something else where `open` was said
    assert metrics_of(folder)["preprocess/duplicates"] == 1


def test_a_picture_that_comes_again_takes_no_room(preprocess):
    one, many = (
        preprocess([[turn("open", text=f"door {index}") for index in range(count)]], name=str(count))
        for count in (1, 60)
    )
    assert len(table(many)) == 60
    sizes = [(folder / "train.parquet").stat().st_size for folder in (one, many)]
    # 56 * 56 * 3 random bytes are one PNG of more than 9,408; 59 more of them would be 555 kB
    assert sizes[0] > 9_408
    assert sizes[1] - sizes[0] < 9_408


def test_episodes_of_several_runs_are_one_dataset(run_stage: RunStage, preprocess, echo_episodes: Path, tmp_path: Path):
    preprocess([TURNS])
    data = f"stage.data=[{tmp_path / 'a_collect'},{echo_episodes}]"
    folder = run_stage(tmp_path / "both", "stage=preprocess", data, "stage.val_fraction=0")
    assert set(table(folder)["env"]) == {"hand", "vlm_agents/Echo-v0"}
    assert json.loads((folder / "summary.json").read_text())["env"] == "hand, vlm_agents/Echo-v0"


def test_broken_episodes_teach_nothing_and_nothing_left_is_an_error(preprocess):
    with pytest.raises(DataError, match=r"left out: 1 of 1 episodes that an error of the env ended, or that nobody"):
        preprocess([TURNS], "stage.success_only=false", stop="env_error")
    with pytest.raises(DataError, match=r"left out: 1 turns rated under 9 \(stage\.min_score\)\).*or loosen"):
        preprocess([TURNS[1:2]], "stage.min_score=9", name="b")


def test_chance_is_told_from_meaning():
    assert [turn.reply.source for turn in TURNS] == ["expert"] * 3 + ["random"] * 2
