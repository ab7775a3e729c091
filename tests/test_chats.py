"""Chats as Parquet: what is written reads back, in any version of `datasets`, within what a reader takes at once."""

import json
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from vlm_agents import chats
from vlm_agents.chats import GROUP_BYTES, SCHEMA, ChatWriter, digest, flaw, in_parts, read_chats
from vlm_agents.errors import DataError


def row(question: str = "<image>Which colour?", answer: str = "red", *pngs: bytes, seed: int = 0) -> dict[str, Any]:
    said = [("user", question), ("assistant", answer)]
    return {
        "messages": [{"role": role, "content": content} for role, content in said],
        "images": [{"bytes": png, "path": None} for png in pngs or (b"png",)],
        "env": "hand",
        "seed": seed,
        "turn": 0,
    }


def written(path: Path, *added: dict[str, Any]) -> Path:
    with ChatWriter(path) as file:
        for each in added:
            file.add(each, digest(each))
        file.publish()
    return path


def types(node: Any) -> Iterator[str]:
    """Every `_type` below."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from [child] if key == "_type" else types(child)


def test_datasets_is_told_the_features_in_words_that_its_version_3_knew_too(tmp_path: Path):
    """Version 4 renamed what holds a list, to a name that 3 refuses; a list in brackets is known to all."""
    path = written(tmp_path / "a.parquet", row(), row("no picture", "so", seed=1) | {"images": []})
    features = json.loads(pyarrow.parquet.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert set(types(features)) == {"Value", "Image"}
    opened = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    assert isinstance(opened, datasets.Dataset)
    assert opened.features.arrow_schema.remove_metadata() == SCHEMA.remove_metadata()
    assert isinstance(opened.features["images"].feature, datasets.Image)


def test_row_groups_are_bounded_by_what_they_take_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three pictures of 10 kB in turn, 60 rows: 600 kB unpacked; with their texts 9 of them fit into 100 kB."""
    assert GROUP_BYTES < 1 << 31  # where most readers end
    monkeypatch.setattr(chats, "GROUP_BYTES", 100_000)
    pngs = [os.urandom(10_000) for _ in range(3)]
    added = [row(f"<image>What is {i}?", f"noise {i % 3}", pngs[i % 3], seed=i) for i in range(60)]
    path = written(tmp_path / "a.parquet", *added)
    file = pyarrow.parquet.ParquetFile(path)
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [9] * 6 + [6]
    assert list(read_chats(path)) == [{name: each[name] for name in ("messages", "images")} for each in added]
    assert 210_000 < path.stat().st_size < 240_000  # 7 groups of 3 pictures


def test_a_row_larger_than_a_group_is_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chats, "GROUP_BYTES", 10_000)
    path = written(tmp_path / "a.parquet", row(), row("<image>", "large", os.urandom(20_000)), row())
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3


def test_without_rows_there_is_no_file_nor_one_from_before(tmp_path: Path):
    path = written(tmp_path / "a.parquet", row())
    assert path.exists()
    written(path)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_read_back_as_it_was_added_takes_no_place(tmp_path: Path):
    path = written(tmp_path / "a.parquet", row())
    before = path.read_bytes()
    changed = row(answer="blue")
    with ChatWriter(path) as file:
        file.add(changed, digest(changed))
        changed["messages"][-1]["content"] = "green"  # as a fault in memory would
        with pytest.raises(DataError, match=r"a\.parquet does not read back as it was written"):
            file.publish()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path):
    """No file may grow past 50 kB: a real limit, met in the middle and at the very end."""
    path = written(tmp_path / "a.parquet", row())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (90_000, 49_900):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(DataError, match=r"can't write .*a\.parquet: .*Make room there"):
                written(path, row("<image>", "noise", os.urandom(size)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        ({}, None, ""),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "no_chat", "last message is of role user"),
        ({"messages": []}, "no_chat", "it has no messages"),
        ({"messages": None}, "no_chat", "it has no messages"),
        ({"messages": [{"role": "assistant", "content": None}]}, "no_chat", "its message 0 lacks role or content"),
        ({"messages": [{"role": "bot", "content": "<image>"}]}, "no_chat", "its role 'bot' is none of system, user"),
        ({"images": []}, "mark_in_text", "1 <image> for 0 pictures"),
        ({"messages": row(answer=" \n")["messages"]}, "no_chat", "its last message, which would be learned, is empty"),
        ({"images": None}, "no_chat", "its images are null"),
        ({"messages": row("First: <image> which?")["messages"]}, None, ""),
        ({"messages": row("Which? <image>")["messages"]}, None, ""),
        ({"messages": row("Which?", "<image> red")["messages"]}, "mark_in_text", "message 1 is an assistant's"),
        ({"messages": row("<image>\n<image>\nWhich?")["messages"], "images": [{"bytes": b"a"}] * 2}, None, ""),
        ({"images": [{"bytes": b"a"}] * 2}, "mark_in_text", "1 <image> for 2 pictures"),
        ({"messages": row(answer="\ud83d")["messages"]}, "half_character", r"half a surrogate pair, \\ud83d,"),
        ({"env": "\ude00"}, "half_character", r"half a surrogate pair, \\ude00,"),
    ],
)
def test_what_no_model_can_take_is_told(change: dict[str, Any], name: str | None, text: str):
    found = flaw(row() | change)
    assert (found and found.name) == name
    assert re.search(text, found.text if found else "")


def test_in_parts_each_picture_is_before_the_text_of_its_message():
    said = [("system", "rules"), ("user", "<image><image>Which?"), ("assistant", "red"), ("user", "<image>")]
    messages = [{"role": role, "content": content} for role, content in [*said, ("assistant", "blue")]]
    picture, text = {"type": "image"}, [{"type": "text", "text": word} for word in ("rules", "Which?", "red", "blue")]
    assert in_parts(messages) == {
        "prompt": [
            {"role": "system", "content": [text[0]]},
            {"role": "user", "content": [picture, picture, text[1]]},
            {"role": "assistant", "content": [text[2]]},
            {"role": "user", "content": [picture]},
        ],
        "completion": [{"role": "assistant", "content": [text[3]]}],
    }


def test_parts_keep_the_places_of_pictures():
    messages = row("First <image>, then <image>\nwhich?")["messages"]
    picture, texts = {"type": "image"}, [{"type": "text", "text": text} for text in ("First ", ", then ", "\nwhich?")]
    assert in_parts(messages)["prompt"] == [
        {"role": "user", "content": [texts[0], picture, texts[1], picture, texts[2]]}
    ]


def test_a_file_of_an_older_version_has_no_parts_and_is_read(tmp_path: Path):
    columns = ["messages", "images"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row()], SCHEMA).select(columns), tmp_path / "a.parquet")
    assert list(read_chats(tmp_path / "a.parquet")) == [{name: row()[name] for name in columns}]


def test_rows_differ_by_what_is_said_and_shown():
    same = digest(row(seed=1))
    assert digest(row(seed=2)) == same
    assert len({same, digest(row("<image>What?")), digest(row(answer="blue")), digest(row("a", "b", b"other"))}) == 4


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match=r"no .*a\.parquet: it is written by stage=preprocess"):
        list(read_chats(path))
    for content in (b"", b"PAR1 and no more"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet is no readable Parquet file of chats"):
            list(read_chats(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet is no readable Parquet file of chats"):
        list(read_chats(path))
