"""LLaVA's layout: sound records become chats that sft reads; broken ones are skipped, named and counted."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image

from vlm_agents.errors import DataError
from vlm_agents.llava_data import read_llava
from vlm_agents.types import Message

RunStage = Callable[..., Path]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def record(*said: Any, image: Any = "7/red.png") -> dict[str, Any]:
    return {"id": "0", "image": image, "conversations": list(said)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures: 7/red.png, 7/blue.jpg, cut.png, which ends too early, and pipe.png, which never begins."""
    (tmp_path / "7").mkdir()
    Image.new("RGBA", (28, 28), "red").save(tmp_path / "7" / "red.png")
    Image.new("RGB", (28, 28), "blue").save(tmp_path / "7" / "blue.jpg")
    (tmp_path / "cut.png").write_bytes((tmp_path / "7" / "red.png").read_bytes()[:50])
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


def written(folder: Path, *records: Any) -> Path:
    path = folder / "cards.json"
    path.write_text(json.dumps(records))
    return path


def test_each_thing_that_gpt_said_is_an_example(folder: Path):
    path = written(
        folder,
        record(human("<image>\nWhich colour?"), gpt("red")),
        record(
            {"from": "system", "value": "Be terse."},
            human("<image>\n<image>\nCompare"),
            gpt("red, blue"),
            human("And mixed?"),
            gpt("purple"),
            image=["7/red.png", "7/blue.jpg"],
        ),
    )
    counts = Counter()
    one, two, three = read_llava(path, folder, counts)
    (picture,) = one.prompt[0].images
    assert (one.record, one.turn, one.answer) == (0, 0, "red")
    assert one.prompt == (Message("user", (picture, "Which colour?")),)
    assert (picture.image.mode, picture.image.getpixel((0, 0))) == ("RGB", (255, 0, 0))
    assert (two.record, two.turn, two.answer) == (1, 0, "red, blue")
    assert [(m.role, m.text, len(m.images)) for m in two.prompt] == [("system", "Be terse.", 0), ("user", "Compare", 2)]
    assert (three.record, three.turn, three.answer) == (1, 1, "purple")
    assert three.prompt == (*two.prompt, Message("assistant", ("red, blue",)), Message("user", ("And mixed?",)))
    assert counts == {"records": 2, "records_skipped": 0}


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("<image>\nWhich?", (None, "Which?")),
        ("Which?\n<image>", ("Which?", None)),
        (" <image> Which?", (None, "Which?")),
        ("<image>", (None,)),
        ("Which?<image>\n", ("Which?", None)),
        ("\nIn <image>, which? \n", ("In ", None, ", which?")),
        ("<image>\nor\n<image>", (None, "or", None)),
        ("<image>\n<image>\nWhich?", (None, None, "Which?")),
        ("First: <image> Second: <image>", ("First: ", None, " Second:", None)),
    ],
)
def test_a_mark_is_where_a_picture_stands(folder: Path, said: str, parts: tuple[str | None, ...]):
    (one,) = read_llava(
        written(folder, record(human(said), gpt("red"), image=TWO[: parts.count(None)])), folder, Counter()
    )
    (message,) = one.prompt
    assert tuple(part if isinstance(part, str) else None for part in message.parts) == parts


def test_pictures_are_as_a_viewer_shows_them(folder: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored as 28 wide is 14 wide
    Image.new("RGB", (28, 14), "blue").save(folder / "turned.jpg", exif=exif)
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("I;16", (28, 28), 0x8000).save(folder / "deep.png")
    names = ["turned.jpg", "clear.png", "deep.png"]
    path = written(folder, *(record(*SOUND, image=name) for name in names))
    turned, clear, deep = (example.prompt[0].images[0].image for example in read_llava(path, folder, Counter()))
    assert (turned.size, dict(turned.getexif())) == ((14, 28), {})
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert deep.getpixel((0, 0)) == (128, 128, 128)


def test_a_folder_of_pictures_holds_what_its_own_links_point_to(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (28, 28), "lime").save(other / "lime.png")
    (folder / "linked").symlink_to(other)
    names = ["linked/lime.png", str(folder / "7" / "red.png"), "7/../7/red.png"]
    path = written(
        folder, *(record(*SOUND, image=name) for name in names), record(*SOUND, image=str(other / "lime.png"))
    )
    assert [example.record for example in read_llava(path, folder, Counter())] == [0, 1, 2]
    assert [example.record for example in read_llava(path, other, Counter())] == [3]  # its absolute path lies there


def test_conversations_of_pyvision_are_read(folder: Path):
    """Each reply is an example, with what code gave as the user says it."""
    said = [
        ("user", "<image_clue_0><image></image_clue_0>\n\nWhich colour?"),
        ("assistant", "Look.\n<code>\n```python\nimage_clue_0.show()\n```\n</code>"),
        ("user", "<interpreter><image_clue_1><image></image_clue_1></interpreter>"),
        ("assistant", "Red.\n<answer>\n\\boxed{red}\n</answer>"),
    ]
    rows = [{"role": role, "content": text} for role, text in said]
    row = {"conversations": rows, "images": ["7/red.png", "7/blue.jpg"], "source_dataset": "mmpr"}
    look, answer = read_llava(written(folder, row), folder, Counter())
    assert (look.turn, look.answer) == (0, said[1][1])
    assert (answer.turn, answer.answer) == (1, said[3][1])
    assert [message.role for message in answer.prompt] == ["user", "assistant", "user"]
    assert [picture.image.getpixel((0, 0)) for message in answer.prompt for picture in message.images] == [
        (255, 0, 0),
        (0, 0, 254),
    ]


SOUND = (human("<image>\nWhich colour?"), gpt("red"))
TWO = ["7/red.png", "7/blue.jpg"]
BROKEN = [
    ("a text", "no conversations in 'a text'"),
    ({"image": "7/red.png"}, "no conversations in {'image': '7/red.png'}"),
    (record(), "conversations is []"),
    ({"conversations": list(SOUND)}, "no image in {'conversations': "),
    (record(*SOUND, image=None), "image is None"),
    (record(human("Which colour?"), gpt("red"), image=[]), "image is []"),
    (record(*SOUND, image=[5]), "can't read picture 5 "),
    (record(*SOUND, image="7/green.png"), "no picture {folder}/7/green.png"),
    (record(*SOUND, image="cut.png"), "can't read picture 'cut.png' "),
    (record(*SOUND, image="7"), "can't read picture '7' "),
    (record(SOUND[0]), "no gpt turn in conversations"),
    (record(gpt("red"), SOUND[0]), "conversations begin with a gpt turn"),
    (record({"from": "bot", "value": "red"}), "from is 'bot', not one of system, human, gpt"),
    (record({"role": "bot", "content": "red"}), "role is 'bot', not one of system, human, gpt"),
    (record({"value": "red"}), "no from in {'value': 'red'}"),
    (record(SOUND[0], {"from": "gpt"}), "no value in {'from': 'gpt'}"),
    (record(SOUND[0], {"from": "gpt", "value": 3}), "value is 3"),
    (record(human("Which colour?"), gpt("red")), "0 <image> for 1 pictures"),
    (record(human("<image><image>"), gpt("red")), "2 <image> for 1 pictures"),
    (record(human("Which colour?"), gpt("<image>red")), "<image> outside of the human turns"),
    (record(*SOUND, image="../outside.png"), "picture '../outside.png' lies outside of {folder}: "),
    (record(*SOUND, image="7/../../outside.png"), "picture '7/../../outside.png' lies outside of {folder}: "),
    (record(*SOUND, image="/outside.png"), "picture '/outside.png' lies outside of {folder}: "),
    (record(*SOUND, image="pipe.png"), "can't read picture 'pipe.png' (it is no ordinary file)"),
    (record(*SOUND, image="a\0.png"), "can't read picture 'a\\x00.png' "),
    (record(*SOUND, image="x" * 300), "can't read picture 'xxx"),
]


@pytest.mark.parametrize(("broken", "problem"), BROKEN, ids=[problem for _, problem in BROKEN])
def test_a_broken_record_is_skipped_named_and_counted(
    folder: Path, broken: Any, problem: str, caplog: pytest.LogCaptureFixture
):
    path = written(folder, record(*SOUND), broken, record(*SOUND))
    counts = Counter()
    with caplog.at_level(logging.WARNING):
        assert [example.record for example in read_llava(path, folder, counts)] == [0, 2]
    assert counts == {"records": 3, "records_skipped": 1}
    (line,) = [logged.getMessage() for logged in caplog.records]
    assert line.startswith(f"{path}, record 1: {problem.replace('{folder}', str(folder))}")
    assert line.endswith("; skipped")


def test_many_broken_records_are_few_lines(folder: Path, caplog: pytest.LogCaptureFixture):
    path = written(folder, record(*SOUND), *[record(*SOUND, image="gone.png")] * 800)
    counts = Counter()
    assert [example.record for example in read_llava(path, folder, counts)] == [0]
    assert counts == {"records": 801, "records_skipped": 800}
    *named, rest = [logged.getMessage() for logged in caplog.records]
    assert len(named) == 5
    assert rest == f"{path}, 795 more records, to record 800: no picture {folder}/gone.png; skipped"


def test_nothing_sound_is_an_error(folder: Path, caplog: pytest.LogCaptureFixture):
    path = written(folder, record(SOUND[0]), record())
    with pytest.raises(DataError, match=r"no sound record; record 0: no gpt turn .*, 2 in all.* stage\.images"):
        list(read_llava(path, folder, Counter()))
    assert not caplog.records  # one line says it
    with pytest.raises(DataError, match="no sound record; it is empty"):
        list(read_llava(written(folder), folder, Counter()))


@pytest.mark.parametrize(
    ("content", "message"), [(b"[{", "is not JSON"), (b"\xff", "is not JSON"), (b"{}", "is no list of records")]
)
def test_a_file_of_another_kind_is_an_error(folder: Path, content: bytes, message: str):
    path = folder / "cards.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_llava(path, folder, Counter()))
    with pytest.raises(DataError, match=r"can't read .*nowhere\.json"):
        list(read_llava(folder / "nowhere.json", folder, Counter()))


# ---- as a source of stage=preprocess ---------------------------------------------------------------------------------
def test_preprocess_takes_it_beside_episodes_and_sft_learns_from_it(
    run_stage: RunStage, echo_episodes: Path, folder: Path, tmp_path: Path
):
    path = written(folder, record(*SOUND), record(SOUND[0]), record(*SOUND), record(*SOUND, image="7/blue.jpg"))
    source = f"stage.data=[{path},{echo_episodes}]"
    chats = run_stage(tmp_path / "chats", "stage=preprocess", source, "stage.val_fraction=0")
    rows = pyarrow.parquet.read_table(chats / "train.parquet").to_pylist()
    imported = [row for row in rows if row["env"] == "cards.json"]
    assert [(row["seed"], row["turn"]) for row in imported] == [(0, 0), (3, 0)]  # record 2 says what record 0 says
    assert imported[0]["messages"] == [
        {"role": "user", "content": "<image>Which colour?"},
        {"role": "assistant", "content": "red"},
    ]
    assert len(rows) > 2
    metrics = json.loads((chats / "summary.json").read_text())["metrics"]
    assert (metrics["preprocess/records"], metrics["preprocess/records_skipped"]) == (4, 1)
    assert json.loads((chats / "summary.json").read_text())["env"] == "cards.json, vlm_agents/Echo-v0"

    source = f"stage.data={chats}"
    trained = run_stage(tmp_path / "sft", "stage=sft", source, "stage.batch_size=8", "stage.warmup_steps=1")
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    assert metrics["sft/rows"] == len(rows)
    assert "Which colour?" not in (trained / "model/README.md").read_text()  # somebody's own data isn't told


def test_half_a_character_is_skipped_in_preprocess_by_record_and_turn(
    run_stage: RunStage, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """What was said before it is learned."""
    path = written(folder, record(*SOUND, human("And now?"), gpt("cut \ude00")), record(*SOUND, image="7/blue.jpg"))
    chats = run_stage(tmp_path / "chats", "stage=preprocess", f"stage.data=[{path}]", "stage.val_fraction=0")
    assert pyarrow.parquet.read_table(chats / "train.parquet")["seed"].to_pylist() == [0, 1]
    metrics = json.loads((chats / "summary.json").read_text())["metrics"]
    assert (metrics["preprocess/records_skipped"], metrics["preprocess/half_character"]) == (0, 1)
    assert r"cards.json, record 0, turn 1: half a surrogate pair, \ude00, in a text; skipped" in caplog.text


def test_pictures_may_lie_elsewhere(run_stage: RunStage, folder: Path, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    path = written(tmp_path / "texts", record(*SOUND))
    with pytest.raises(DataError, match=r"no picture .*texts/7/red\.png"):
        run_stage(tmp_path / "a", "stage=preprocess", f"stage.data=[{path}]")
    words = ["stage=preprocess", f"stage.data=[{path}]", f"stage.images={folder}", "stage.val_fraction=0"]
    chats = run_stage(tmp_path / "b", *words)
    assert pyarrow.parquet.read_table(chats / "train.parquet").num_rows == 1


def test_a_file_with_another_ending_is_told_what_it_should_be(run_stage: RunStage, tmp_path: Path):
    (tmp_path / "chats.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"one JSON list in a file named \*\.json"):
        run_stage(tmp_path / "run", "stage=preprocess", f"stage.data=[{tmp_path}/chats.jsonl]")
