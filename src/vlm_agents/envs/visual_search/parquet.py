"""Rows as verl has them in Parquet, PyVision's of 2025 and DeepEyes': the pictures lie in the rows.

They are read when they are called for, and for that the row group's rows before them are, too.
"""

import logging
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from vlm_agents.envs.visual_search.pyvision import asked
from vlm_agents.envs.visual_search.question import Question, load
from vlm_agents.envs.visual_search.rows import Broken, questions, refuse
from vlm_agents.errors import DataError, short
from vlm_agents.marks import IMAGE_MARK
from vlm_agents.pictures import Picture

logger = logging.getLogger(__name__)

AT_ONCE = 8  # rows whose pictures are read together
LARGE = 1 << 28  # bytes of a row group that takes long to be read from
COLUMNS = ("prompt", "data_source", "ability", "reward_model", "extra_info")


def read_parquet(path: Path, broken: Broken = refuse) -> Iterator[Question]:
    """The questions of a file. DataError for a file that can't be read, and to `broken` one for each row.

    A picture that is broken is one when it is loaded.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, meta = file.schema_arrow.names, file.metadata
            groups = [meta.row_group(index) for index in range(meta.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"can't read {path} ({error}): name a Parquet file that is whole") from error
    column = next((name for name in ("images", "image") if name in names), None)
    if column is None or "prompt" not in names:
        raise DataError(f"{path} has the columns {short(names)}: it needs prompt, and images or image")
    if max((size for _, size in sizes), default=0) > LARGE:
        logger.warning("%s has large row groups, so that pictures come slowly: write it with row_group_size=16", path)

    def read(row: tuple[int, int, dict[str, Any]], where: str) -> Question:
        group, index, values = row
        count = str(values["prompt"]).count(IMAGE_MARK)
        pictures = [partial(_picture, path, column, group, index, place, where) for place in range(max(1, count))]
        return asked(values, where, *pictures)

    return questions(path, _rows(path, [name for name in COLUMNS if name in names]), read, broken)


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Row group, place in it, and the row without its pictures."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                index = 0
                for batch in file.iter_batches(1024, row_groups=[group], columns=columns):
                    for values in batch.to_pylist():
                        yield group, index, values
                        index += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"can't read {path} ({error}): it is damaged, fetch it again") from error


def _picture(path: Path, column: str, group: int, index: int, place: int, where: str) -> Picture:
    try:
        found = _batch(path, column, group, index // AT_ONCE)[index % AT_ONCE]
    except (OSError, ValueError, StopIteration, IndexError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{where}: can't read {column} ({error}). The file is damaged or changed: fetch it again"
        ) from error
    cells = found if isinstance(found, list) else [found]
    cell = cells[place] if place < len(cells) else None
    content = cell.get("bytes") if isinstance(cell, dict) else None
    if not isinstance(content, bytes):
        raise DataError(f"{where}: picture {place} of {column} has no bytes: write them there, or remove the row")
    return load(content, where)


@lru_cache(maxsize=8)
def _batch(path: Path, column: str, group: int, number: int) -> list[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        batches = file.iter_batches(AT_ONCE, row_groups=[group], columns=[column])
        return next(islice(batches, number, None)).column(0).to_pylist()
