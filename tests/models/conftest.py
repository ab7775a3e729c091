"""A small random model, chats with pictures, and rows by hand, for the tests of `models`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from vlm_agents.config import HardwareConfig, ModelConfig, TrainableConfig
from vlm_agents.models import Agent, load_agent
from vlm_agents.models.tiny import build
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row, Scores, reply_row
from vlm_agents.types import Message, Prompt, Reply

SPARE_ROWS = 16  # of the vocabulary, which no token has


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """What the tokenizers of these tests learn from."""
    said = [
        f'{{"thoughts": "key ({x},{y}), door ({y},{x}): turn {side}", "action": "turn {side}"}}'
        for x in range(6)
        for y in range(6)
        for side in ("left", "right")
    ]
    return [*said, "You play a game on a grid. Answer as JSON with your thoughts and one action.", "café 日本 🙂"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A tiny model with random weights, and with spare rows as real checkpoints have them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build(folder, texts)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + SPARE_ROWS, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load(tiny_folder: Path) -> Callable[..., Agent]:
    """`load(init=None, freeze_vision=False, **model settings)`: always the same weights, in the value head too."""

    def loaded(init: Path | None = None, freeze_vision: bool = False, **settings: Any) -> Agent:
        train = TrainableConfig(not freeze_vision, not freeze_vision)
        settings = {"name": "tiny", "path": str(tiny_folder), "train": train, **settings}
        cfg = ModelConfig(**settings)
        agent = load_agent(cfg, HardwareConfig(name="cpu"), str(init) if init else None)
        if init is None:  # a fresh value head says 0
            torch.manual_seed(0)
            for parameter in agent.value_head.parameters():
                nn.init.normal_(parameter, std=0.1)
        return agent

    return loaded


class Deprecations(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in (text := record.getMessage()):
            raise FutureWarning(text)


@pytest.fixture(autouse=True)
def _logged_deprecations_are_errors() -> Iterator[None]:
    """transformers logs some of them, where others warn: as pyproject.toml has it for warnings."""
    logger, handler = logging.getLogger("transformers"), Deprecations(logging.WARNING)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def agent(load: Callable[..., Agent]) -> Agent:
    """For reading only."""
    return load()


@pytest.fixture(scope="session")
def end_soon() -> Callable[[Agent], Agent]:
    """Makes an agent end its turns after some ten tokens, where random weights would hardly ever do so."""

    def changed(agent: Agent) -> Agent:
        bias = torch.zeros(agent.banned.shape)
        bias[agent.renderer.end_of_turn] = 4.0
        agent.family.lm_head.bias = nn.Parameter(bias.to(agent.family.lm_head.weight.dtype))
        return agent

    return changed


@pytest.fixture(scope="session")
def brief_agent(load: Callable[..., Agent], end_soon: Callable[[Agent], Agent]) -> Agent:
    """For reading only."""
    return end_soon(load())


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    def noise(width: int, height: int, seed: int = 0) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

    return noise


@pytest.fixture(scope="session")
def chats(picture: Callable[..., Image.Image]) -> list[Prompt]:
    """Prompts of mixed length with none, one or two pictures, some to be resized, after the same system message."""
    system = Message("system", ("You play a game on a grid. Answer as JSON with your thoughts and one action.",))
    pictures = [
        (picture(84, 56, 1),),
        (),
        (picture(56, 56, 2), picture(100, 75, 3)),
        (picture(84, 56, 4),),
        (picture(75, 100, 5),),
    ]
    return [
        (system, Message("user", (*map(Picture, now), "what now? " * index + "go")))
        for index, now in enumerate(pictures)
    ]


@pytest.fixture(scope="session")
def make_row() -> Callable[..., Row]:
    """`make_row(agent, prompt, *replies)`: the row of an episode in which the env only ever says `on`."""

    def made(agent: Agent, prompt: Prompt, *replies: Sequence[int], ident: str = "row") -> Row:
        spans = []
        for index, reply in enumerate(replies):
            if index:
                said = Message("assistant", ("",), token_ids=tuple(replies[index - 1]))
                prompt = (*prompt, said, Message("user", ("on",)))
            start = len(agent.renderer.render(prompt).ids)
            spans.append((start, start + len(reply)))
        rendered = agent.renderer.render(prompt)
        ids = np.concatenate([rendered.ids, replies[-1]]).astype(np.int64)
        return Row(ident, ids, rendered.images, tuple(spans))

    return made


@pytest.fixture(scope="session")
def row_of() -> Callable[..., Row]:
    """`row_of(prompt, reply)`: the row that trains on a sampled reply."""

    def made(prompt: Prompt, reply: Reply) -> Row:
        images = tuple(image for message in prompt for image in message.images)
        return reply_row("sampled", reply.prompt_token_ids, reply.token_ids, images)

    return made


@pytest.fixture(scope="session")
def values_of() -> Callable[..., Tensor]:
    """`values_of(agent, rows, scores)`: [M] what the critic expects of each turn, where the scores of rows say it."""

    def read(agent: Agent, rows: Sequence[Row], scores: Scores) -> Tensor:
        lengths = torch.tensor([length for row in rows for length in row.reply_lengths])
        return agent.value(scores.states[lengths.cumsum(0) - lengths])

    return read
