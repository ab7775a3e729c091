"""Small real things for the tests of `learn`: a renderer over a handful of tokens, and episodes written by hand."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row, Tokens
from vlm_agents.types import Message, Observation, Parsed, Reply, Step, Stop, Trajectory, Turn


class WordRenderer:
    """Token i reads as `words[i]`. Token 0 pads, token 1 ends a turn: both are empty."""

    context = 1000
    words = ("", "", "go", "é", "日本", '{"t":"', '","a":"', '"}', ' "', "x", "y", "z")

    def collate(self, rows: Sequence[Row]) -> Tokens:
        shape = (len(rows), max(len(row.input_ids) for row in rows))
        input_ids = torch.zeros(shape, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        reply_mask = torch.zeros(shape, dtype=torch.bool)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.input_ids)] = torch.from_numpy(row.input_ids)
            attention_mask[index, : len(row.input_ids)] = 1
            for start, end in row.spans:
                reply_mask[index, start:end] = True
        return Tokens(input_ids, attention_mask, reply_mask, {})

    def offsets(self, token_ids: Sequence[int]) -> np.ndarray:
        ends = np.cumsum([len(self.words[token]) for token in token_ids])
        return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)


@pytest.fixture
def renderer() -> WordRenderer:
    return WordRenderer()


@pytest.fixture
def make_turn() -> Callable[..., Turn]:
    def make(
        prompt: Sequence[int],
        reply: Sequence[int],
        reward: float = 0.0,
        value: float | None = 0.0,
        logprobs: Sequence[float] | None = None,
        images: tuple[Picture, ...] = (),
    ) -> Turn:
        return Turn(
            observation=Observation("now"),
            prompt=(Message("system", ("play",)), Message("user", (*images, "now"))),
            reply=Reply(
                text="".join(WordRenderer.words[token] for token in reply),
                prompt_token_ids=tuple(prompt),
                token_ids=tuple(reply),
                logprobs=tuple(logprobs or [-1.0] * len(reply)),
                value=value,
            ),
            parsed=Parsed("go"),
            step=Step(Observation("next"), reward, False, False, False, True, True),
        )

    return make


@pytest.fixture
def make_episode() -> Callable[..., Trajectory]:
    def make(*turns: Turn, seed: int = 0, stop: Stop = "success", bootstrap: float = 0.0) -> Trajectory:
        error = "worker died" if stop == "env_error" else None
        return Trajectory("words", seed, "model", turns, stop, bootstrap, error)

    return make
