"""Rows to padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm_agents.errors import DataError
from vlm_agents.models.families import Family
from vlm_agents.models.prefix import shared_prefix
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row


@dataclass(frozen=True, slots=True)
class Tokens:
    """A padded batch on the host, of N rows, T tokens wide, for a text model with P rotary axes."""

    input_ids: Tensor  # [N T] int64
    reply_mask: Tensor  # [N T] bool
    positions: Tensor  # [P N T] int64
    images: tuple[Picture, ...]  # in the order of their placeholder tokens
    shared: int  # leading tokens that all rows have in common


def collate(rows: Sequence[Row], family: Family, pad_token_id: int, context: int) -> Tokens:
    """Right-padded rows. DataError where one is longer than `context`, or its placeholders don't match its pictures."""
    shape = (len(rows), max(len(row) for row in rows))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    reply_mask = np.zeros(shape, dtype=bool)
    positions = np.zeros((position_axes(family), *shape), dtype=np.int64)
    for index, row in enumerate(rows):
        check(row, family, context)
        input_ids[index, : len(row)] = row.input_ids
        positions[:, index, : len(row)] = family.positions(row.input_ids, [image.size for image in row.images])
        for start, end in row.spans:
            reply_mask[index, start:end] = True
    images = tuple(image for row in rows for image in row.images)
    prompts = [row.input_ids[: row.spans[0][0]] if row.spans else row.input_ids for row in rows]
    shared = shared_prefix(prompts, family.image_token_id, shape[1])
    ids, mask, places = map(torch.from_numpy, (input_ids, reply_mask, positions))
    return Tokens(ids, mask, places, images, shared)


def position_axes(family: Family) -> int:
    return family.positions(np.zeros(1, dtype=np.int64), []).shape[0]


def check(row: Row, family: Family, context: int) -> None:
    if len(row) > context:
        raise DataError(f"{row.ident}: {len(row)} tokens, and the model has positions for {context}")
    tokens = int((row.input_ids == family.image_token_id).sum())
    features = sum(family.image_tokens(image.size) for image in row.images)
    if tokens != features:
        raise DataError(
            f"{row.ident}: {tokens} image placeholder tokens for {len(row.images)} pictures that make {features}: "
            "the row was cut or a picture is missing; collect or preprocess it again"
        )
