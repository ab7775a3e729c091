"""Others' files: sound rows become questions, each broken one is told by file, row, what and the fix, nothing else."""

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_agents.envs.visual_search import question as limits
from vlm_agents.envs.visual_search.benchmarks import read_benchmark
from vlm_agents.envs.visual_search.parquet import read_parquet
from vlm_agents.envs.visual_search.pyvision import read_rl
from vlm_agents.envs.visual_search.question import Question
from vlm_agents.errors import DataError

Read = Callable[..., Iterator[Question]]


def png(color: str, size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


RED, BLUE = png("red"), png("blue")
RED64 = base64.b64encode(RED).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "red.png").write_bytes(RED)
    (folder / "pictures" / "blue.png").write_bytes(BLUE)
    (folder / "pictures" / "cut.png").write_bytes(RED[:40])
    return folder


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def whole(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def read_all(read: Read, path: Path) -> tuple[list[Question], list[str]]:
    problems: list[DataError] = []
    return list(read(path, broken=problems.append)), [str(problem) for problem in problems]


# ---- PyVision's rows -------------------------------------------------------------------------------------------------
RAW = {
    "id": 7,
    "question": "Which colour?",
    "answer": "red",
    "ability": "search",
    "data_source": "vs",
    "image_path": "pictures/red.png",
}
VERL = {
    "prompt": [{"role": "user", "content": "<image>\nYou are an agent. Which colour?"}],
    "data_source": "vs",
    "ability": "search",
    "env_name": "pyvision_gym_w_image_hint",
    "reward_model": {"ground_truth": "blue", "style": "model"},
    "extra_info": {"answer": "blue", "index": 3, "question": "Which colour?", "split": "train"},
    "mm_hint": {"hint_path": "pictures/blue.png", "hint_type": "image"},
}


@pytest.mark.parametrize("write", [whole, lines])
def test_both_kinds_of_rl_rows(folder: Path, write: Callable[..., Path]) -> None:
    one, other = read_rl(write(folder / "rl.json", RAW, VERL))
    assert (one.ident, one.text, one.answer, one.category, one.source) == ("7", "Which colour?", "red", "search", "vs")
    assert (other.ident, other.text, other.answer) == ("3", "Which colour?", "blue")
    assert [question.pictures[0]().image.getpixel((0, 0)) for question in (one, other)] == [(255, 0, 0), (0, 0, 255)]


def test_a_picture_s_mark_is_no_word_of_the_question(folder: Path) -> None:
    rows = {**RAW, "question": "<image>\nWhich colour?"}, {**VERL, "extra_info": {"question": "<image> Which colour?"}}
    assert [one.text for one in read_rl(whole(folder / "marked.json", *rows))] == ["Which colour?"] * 2


def test_without_a_question_of_its_own_the_prompt_is_asked(folder: Path) -> None:
    row = {**VERL, "extra_info": {"index": 0, "answer": "green"}}
    (asked,) = read_rl(whole(folder / "prompt.json", row))
    assert (asked.ident, asked.text, asked.answer) == ("0", "You are an agent. Which colour?", "blue")


BROKEN_RL = [
    ("no object", 5, "the row is 5: make it an object"),
    ("no question", {**RAW, "question": " "}, "no question: write it"),
    ("no answer", {**RAW, "answer": None}, "no ground_truth or answer: write it"),
    ("a video", {**RAW, "image_path": None, "video_path": "a.mp4"}, "about a video"),
    ("no picture", {**RAW, "image_path": "no.png"}, "no picture 'no.png' in .*: put it there, .*env.pictures"),
    ("no path", {**RAW, "image_path": 4}, "path is 4: make it a text"),
    (
        "outside",
        {**RAW, "image_path": "../../etc/passwd"},
        r"lies outside of .*: name a folder above it \(env.pictures\)",
    ),
    ("absolute", {**RAW, "image_path": "/etc/passwd"}, "lies outside of "),
    ("a nul", {**RAW, "image_path": "a\0.png"}, "no picture 'a"),
    ("half a character", {**RAW, "question": "\ud83d"}, "question has half a character"),
    ("a list", {**RAW, "answer": ["red"]}, r"answer is \['red'\]: make it a text"),
    ("a hint", {**VERL, "mm_hint": "pictures/blue.png"}, "mm_hint is 'pictures/blue.png': make it an object"),
]


@pytest.mark.parametrize(("row", "problem"), [case[1:] for case in BROKEN_RL], ids=[case[0] for case in BROKEN_RL])
def test_a_broken_rl_row_is_told_and_left_out(folder: Path, row: Any, problem: str) -> None:
    path = whole(folder / "broken.json", RAW, row, VERL)
    good, problems = read_all(read_rl, path)
    assert [question.ident for question in good] == ["7", "3"]
    assert len(problems) == 1
    with pytest.raises(DataError, match=f"^{path}, row 1: .*{problem}"):
        list(read_rl(path))


@pytest.mark.parametrize("content", [b"[1, ", b"\xff\xfe", b"[" * 100_000], ids=["cut", "binary", "deep"])
def test_a_file_that_is_no_json(folder: Path, content: bytes) -> None:
    (folder / "no.json").write_bytes(content)
    with pytest.raises(DataError, match=r"no\.json is not JSON .*: mend it"):
        list(read_rl(folder / "no.json"))
    with pytest.raises(DataError, match=r"can't read .*gone\.json"):
        list(read_rl(folder / "gone.json"))


# ---- limits of pictures ----------------------------------------------------------------------------------------------
def test_a_broken_picture_is_told_when_it_is_loaded(folder: Path) -> None:
    (asked,) = read_rl(whole(folder / "rl.json", {**RAW, "image_path": "pictures/cut.png"}))
    with pytest.raises(DataError, match=r"rl\.json, row 0: can't read the picture \(.*\)\. Mend it"):
        asked.pictures[0]()


def test_a_bomb_is_refused_before_it_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8,200 x 8,200 = 67.2 million pixels, in some 100 KB; 2^26 = 67.1 million are read."""
    file = io.BytesIO()
    Image.new("1", (8200, 8200)).save(file, "PNG")
    (folder / "pictures" / "bomb.png").write_bytes(file.getvalue())
    (asked,) = read_rl(whole(folder / "rl.json", {**RAW, "image_path": "pictures/bomb.png"}))
    with pytest.raises(DataError, match=r"row 0: .*it is 8200x8200, and at most 67,108,864 pixels"):
        asked.pictures[0]()
    monkeypatch.setattr(limits, "MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"row 0: .*bytes, and at most 100 are read"):
        asked.pictures[0]()


def test_a_link_in_the_folder_may_lead_out(folder: Path, tmp_path: Path) -> None:
    """As those of a hub's cache do: whoever made the link wanted that."""
    os.symlink(folder / "pictures" / "red.png", tmp_path / "link.png")
    (asked,) = read_rl(whole(tmp_path / "rl.json", {**RAW, "image_path": "link.png"}))
    assert asked.pictures[0]().size == (4, 3)


# ---- Parquet ---------------------------------------------------------------------------------------------------------
def parquet(path: Path, rows: list[dict[str, Any]], group: int = 100) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def deep_eyes(number: int, *pictures: bytes | None) -> dict[str, Any]:
    marks = "<image>" * len(pictures)
    said = [{"role": "system", "content": "Zoom."}, {"role": "user", "content": f"{marks}\nNumber {number}?"}]
    row = {key: VERL[key] for key in ("data_source", "ability")}
    row |= {"prompt": said, "reward_model": {"ground_truth": str(number), "style": "model"}}
    row |= {"extra_info": {"index": number}, "env_name": "visual_toolbox_v2"}
    return row | {"images": [{"bytes": picture, "path": None} for picture in pictures]}


@pytest.mark.parametrize("group", [100, 3])
def test_pictures_in_rows_are_read_in_any_order(tmp_path: Path, group: int) -> None:
    rows = [deep_eyes(number, png("red", (number + 1, 2)), BLUE) for number in range(20)]
    asked = list(read_parquet(parquet(tmp_path / "eyes.parquet", rows, group)))
    assert [(question.text, question.answer) for question in asked] == [(f"Number {n}?", str(n)) for n in range(20)]
    for number in (19, 0, 7, 8, 13):
        first, second = asked[number].pictures
        assert (first().size, second().size) == ((number + 1, 2), (4, 3))


def test_one_picture_a_row_as_pyvision_had_it(tmp_path: Path) -> None:
    row = {**{key: VERL[key] for key in VERL if key != "mm_hint"}, "image": {"bytes": BLUE}}
    (asked,) = read_parquet(parquet(tmp_path / "old.parquet", [row]))
    assert (asked.ident, asked.text, asked.answer) == ("3", "Which colour?", "blue")
    assert asked.pictures[0]().image.getpixel((0, 0)) == (0, 0, 255)


def test_what_can_be_wrong_with_a_parquet_file(tmp_path: Path) -> None:
    nothing = {**deep_eyes(1, RED), "reward_model": {"ground_truth": "", "style": "model"}}
    path = parquet(tmp_path / "rows.parquet", [deep_eyes(0, RED), nothing, deep_eyes(2, None), deep_eyes(3, b"GIF")])
    good, problems = read_all(read_parquet, path)
    assert [question.answer for question in good] == ["0", "2", "3"]
    assert problems == [f"{path}, row 1: no ground_truth or answer: write it, or remove the row"]
    with pytest.raises(DataError, match=r"rows\.parquet, row 2: picture 0 of images has no bytes"):
        good[1].pictures[0]()
    with pytest.raises(DataError, match=r"rows\.parquet, row 3: can't read the picture"):
        good[2].pictures[0]()
    with pytest.raises(DataError, match=r"it needs prompt, and images or image"):
        list(read_parquet(parquet(tmp_path / "other.parquet", [{"a": 1}])))
    with pytest.raises(DataError, match="name a Parquet file that is whole"):
        list(read_parquet(tmp_path / "gone.parquet"))


def test_a_parquet_file_that_was_exchanged_is_told(tmp_path: Path) -> None:
    asked = list(read_parquet(parquet(tmp_path / "rows.parquet", [deep_eyes(n, RED) for n in range(20)])))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"row 19: can't read images .*fetch it again"):
        asked[19].pictures[0]()


# ---- files to evaluate on --------------------------------------------------------------------------------------------
V_STAR = {
    "image": "pictures/red.png",
    "text": "What is it made of?\n(A) rubber\n(B) cotton\n"
    "Answer with the option's letter from the given choices directly.",
    "category": "direct_attributes",
    "label": "B",
    "question_id": 0,
}


def test_rows_of_v_star(folder: Path) -> None:
    (folder / "pictures" / "red.json").write_text(json.dumps({"bbox": [[1, 0, 2, 3]], "target_object": ["glove"]}))
    (asked,) = read_benchmark(lines(folder / "test_questions.jsonl", V_STAR))
    assert (asked.ident, asked.text, asked.category) == ("0", "What is it made of?", "direct_attributes")
    assert (asked.options, asked.answer) == (("rubber", "cotton"), "cotton")
    assert asked.boxes == ((1, 0, 3, 3),)  # left, top, width, height
    assert asked.pictures[0]().size == (4, 3)


def test_options_with_blank_lines_between(folder: Path) -> None:
    text = "What is it made of?\n(A) rubber\n\n(B) cotton\n(C) wool\n"
    (asked,) = read_benchmark(lines(folder / "test_questions.jsonl", {**V_STAR, "text": text}))
    assert (asked.options, asked.answer) == (("rubber", "cotton", "wool"), "cotton")


def test_rows_of_hr_bench(tmp_path: Path) -> None:
    """A quoted question of two lines; the second row's picture is the first's, by its index."""
    names = "index\tquestion\tanswer\tcategory\tA\tB\tC\tD\tcycle_category\timage\n"
    first = f'0\t"What does the ""sign""\nsay?"\tC\tsingle\tUp\tDown\tLeft\tRight\t0\t{RED64}\r\n'
    second = 'x\tWhich 5" disc?\tA\tcross\tOne\tTwo\t\t\t1\t0\n'
    path = tmp_path / "hr_bench_4k.tsv"
    path.write_text(names + first + second, newline="")
    one, other = read_benchmark(path)
    assert (one.text, one.options, one.answer) == (
        'What does the "sign"\nsay?',
        ("Up", "Down", "Left", "Right"),
        "Left",
    )
    assert (other.ident, other.text, other.options, other.category) == ("x", 'Which 5" disc?', ("One", "Two"), "cross")
    assert one.pictures[0]() == other.pictures[0]()
    assert one.pictures[0]().image.getpixel((0, 0)) == (255, 0, 0)
    assert one.source == "hr_bench_4k"


def test_pictures_in_json_lines(tmp_path: Path) -> None:
    row = {"question": "Which?", "answer": "two", "options": ["one", "two"], "image": f"data:image/png;base64,{RED64}"}
    (asked,) = read_benchmark(lines(tmp_path / "own.jsonl", row))
    assert (asked.answer, asked.pictures[0]().size) == ("two", (4, 3))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": "C"}, r"the answer 'C' is none of \('rubber', 'cotton'\)"),
        ({"label": None}, "no answer or label"),
        ({"options": ["same", "same"]}, "give two or more that differ"),
        ({"A": "", "B": "rubber", "C": "cotton"}, "is empty before another"),
        ({"text": "Of what?\n(A) rubber\n(C) cotton"}, r"'\(C\) cotton' stands among its options and is none"),
        ({"text": "Of what?\n(A) rubber\n(B) cotton\nor\n(C) wool"}, "'or' stands among its options"),
        ({"image": "../../red.png"}, "lies outside of"),
        ({"image": "41"}, "no path, no base64, and no row before"),
        ({"image": None}, "no image: write it"),
    ],
)
def test_a_broken_row_to_evaluate_on(folder: Path, change: dict[str, Any], problem: str) -> None:
    path = lines(folder / "broken.jsonl", V_STAR, {**V_STAR, **change})
    with pytest.raises(DataError, match=rf"broken\.jsonl, row 1: .*{problem}"):
        list(read_benchmark(path))


def test_broken_lines_and_embedded_pictures(tmp_path: Path) -> None:
    good = {"question": "Which?", "answer": "two", "image": RED64}
    path = lines(tmp_path / "some.jsonl", good, {**good, "image": "!" * 80})
    path.write_text(path.read_text() + "{cut\n[1]\n")
    questions, problems = read_all(read_benchmark, path)
    assert [problem.partition(": ")[2][:20] for problem in problems] == ["it is not JSON ('Exp", "the row is [1]: make"]
    with pytest.raises(DataError, match=rf"^{path}, row 1: its image is no base64 \(.*: mend it"):
        questions[1].pictures[0]()
    (tmp_path / "few.tsv").write_text("index\tquestion\tanswer\timage\n0\tWhich?\n")
    with pytest.raises(DataError, match=r"few\.tsv, row 0: it has 2 fields for 4 columns"):
        list(read_benchmark(tmp_path / "few.tsv"))
    (tmp_path / "no.tsv").write_text("a\tb\n")
    with pytest.raises(DataError, match=r"no\.tsv begins with .*question, answer, image belongs there"):
        list(read_benchmark(tmp_path / "no.tsv"))


# ---- damage ----------------------------------------------------------------------------------------------------------
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, row: Any) -> Any:
    """The row with something in it exchanged or removed, at any depth."""
    if draw(st.booleans()) or not isinstance(row, dict | list) or not row:
        return draw(JSON)
    place = draw(st.sampled_from(list(row) if isinstance(row, dict) else range(len(row))))
    row = row.copy()
    if draw(st.booleans()):
        del row[place]
    else:
        row[place] = draw(damaged(row[place]))
    return row


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize(
    ("read", "row", "write"),
    [(read_rl, RAW, whole), (read_rl, VERL, whole), (read_benchmark, V_STAR, lines)],
    ids=["raw", "verl", "v_star"],
)
def test_a_damaged_row_is_a_question_or_a_data_error(
    folder: Path, read: Read, row: dict[str, Any], write: Callable[..., Path], data: st.DataObject
) -> None:
    path = write(folder / "damaged.jsonl", row, data.draw(damaged(row)), row)
    good, problems = read_all(read, path)
    assert len(good) + len(problems) == 3
    assert all(problem.startswith(f"{path}, row 1: ") for problem in problems)
    for question in good:
        assert question.text
        assert question.answer
        assert question.answer in question.options or not question.options
        for picture in question.pictures:
            picture()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["hr.tsv", "own.jsonl", "eyes.parquet"])
def test_a_file_with_wrong_bytes_gives_questions_or_a_data_error(folder: Path, name: str, data: st.DataObject) -> None:
    path = folder / name
    if name == "hr.tsv":
        path.write_text(f'index\tquestion\tanswer\timage\n0\t"Which\none?"\tred\t{RED64}\n1\tWhich?\tred\t0\n')
    elif name == "own.jsonl":
        lines(path, {"question": "Which?", "answer": "red", "image": RED64}, V_STAR)
    else:
        parquet(path, [deep_eyes(0, RED), deep_eyes(1, BLUE)])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = path.with_stem(f"damaged{len(content)}")
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    told = ""
    try:
        for question in read_all(read_parquet if name == "eyes.parquet" else read_benchmark, path)[0]:
            for picture in question.pictures:
                picture()
    except DataError as error:
        told = str(error)
    assert not told or str(path) in told
