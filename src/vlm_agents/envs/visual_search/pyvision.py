"""PyVision-RL's questions in JSON, raw or as verl wants them. (Its conversations for SFT, stage=preprocess reads.)

A file is a list of rows, or has one on each line.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vlm_agents.envs.visual_search.question import Question, load
from vlm_agents.envs.visual_search.rows import Broken, inside, mapping, optional, questions, refuse, text, whole
from vlm_agents.errors import DataError, short
from vlm_agents.marks import IMAGE_MARK

MARKS = re.compile(rf"</?image_clue_\d+>|{IMAGE_MARK}")


def read_rl(path: Path, folder: Path | None = None, broken: Broken = refuse) -> Iterator[Question]:
    """The questions of a file. Pictures' paths start from `folder`, by default the file's own.

    DataError for a file that can't be read, and to `broken` one for each row.
    """
    folder = path.parent if folder is None else folder

    def read(row: Any, where: str) -> Question:
        row = mapping(row, "the row")
        hint = mapping(row["mm_hint"], "mm_hint") if "mm_hint" in row else {"hint_path": row.get("image_path")}
        if row.get("video_path") or hint.get("hint_type", "image") != "image":
            raise DataError("it is about a video, and pictures alone are read: remove the row")
        names = hint.get("hint_path")
        files = [inside(folder, name) for name in (names if isinstance(names, list) and names else [names])]
        return asked(row, where, *(partial(load, file, where) for file in files))

    return questions(path, _rows(path), read, broken)


def asked(row: dict[str, Any], where: str, *pictures: Any) -> Question:
    """A row of verl's columns, or a raw one, about these pictures."""
    extra = mapping(row.get("extra_info") or {}, "extra_info")
    truth = mapping(row.get("reward_model") or {}, "reward_model")
    if extra.get("question") or "prompt" not in row:
        question, column = text({**row, **extra}, "question"), "question"
    else:
        question, column = _last_of_user(_list(row, "prompt")), "prompt"
    question = MARKS.sub("", question).strip()
    if not question:
        raise DataError(f"no question in {column}: write it, or remove the row")
    return Question(
        ident=text({"index": extra.get("index"), "id": row.get("id"), "where": where}, "id", "index", "where"),
        text=question,
        pictures=pictures,
        answer=text(
            {"ground_truth": truth.get("ground_truth"), "answer": extra.get("answer", row.get("answer"))},
            "ground_truth",
            "answer",
        ),
        category=optional(row, "ability"),
        source=optional(row, "data_source"),
    )


def _last_of_user(messages: list[Any]) -> str:
    said = ""
    for message in messages:
        role, words = (mapping(message, "a message").get(key) for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(words, str):
            raise DataError(f"a message is {short(message)}: give it a role and a content, or remove the row")
        said = whole(words, "a message's content") if role == "user" else said
    return said


def _list(row: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(row.get(name), list) or not row[name]:
        raise DataError(f"{name} is {short(row.get(name))}: make it a list with something in it, or remove the row")
    return row[name]


def _rows(path: Path) -> list[Any]:
    """Of a list, or of lines. A line that is no JSON is a row that is a text: no object, and refused as such."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
        if content.lstrip().startswith("["):
            return json.loads(content)
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}. Name a file of rows in JSON") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): mend it, or fetch it again") from error
    return [_line(line) for line in content.split("\n") if line.strip()]


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line
