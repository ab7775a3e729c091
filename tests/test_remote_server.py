"""Labelling against a server that isn't ours: `transformers serve` with the tiny model.

It needs `openai`, `fastapi`, `uvicorn` and `torchvision`, which the package doesn't, and is skipped without them.
"""

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

from vlm_agents import stages
from vlm_agents.config import RemoteConfig, RunConfig
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import ModelError
from vlm_agents.models import HFSampler, load_agent
from vlm_agents.models.loading import TINY
from vlm_agents.pictures import Picture
from vlm_agents.policies import ExpertPolicy
from vlm_agents.prompting import make_format
from vlm_agents.remote import ChatClient, data_url
from vlm_agents.rollout import collect
from vlm_agents.run import Run
from vlm_agents.seeds import Deal
from vlm_agents.stages.playing import open_envs
from vlm_agents.types import Message, Sampling

# What the server imports, and whether its pictures can be read: torchvision needs more than to be installed.
PROBE = """
import sys, fastapi, openai, torchvision, uvicorn
from transformers.image_utils import load_image_as_tensor
load_image_as_tensor(sys.argv[1])
"""
COUNTED = ("answers", "prompt_tokens", "completion_tokens")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # it imports torch in a second process


@dataclass
class Served:
    """A running server: what it has said so far, and where it listens."""

    lines: list[str] = field(default_factory=list)
    url: str = ""

    def asked(self) -> int:
        return sum("POST /v1/chat/completions" in line for line in self.lines)

    def listen(self, output: IO[str]) -> None:
        """Returns when the server is up, or gone."""
        for line in output:
            self.lines.append(line)
            if up := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                self.url = f"{up[1]}/v1"
                return


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    probe = [sys.executable, "-c", PROBE, data_url(Picture(Image.new("RGB", (1, 1))))]
    found = subprocess.run(probe, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"transformers serve can't run here: {found.stderr.strip().splitlines()[-1]}")
    command = [sys.executable, "-u", "-m", "transformers.cli.transformers", "serve", str(TINY)]
    command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]  # port 0: any that is free
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    server = Served()
    server.listen(process.stdout)
    drain = threading.Thread(target=server.lines.extend, args=(process.stdout,))  # a full pipe would stop the server
    drain.start()
    if server.url:
        yield server
    process.terminate()
    process.wait()
    drain.join()
    assert server.url, "".join(server.lines)


@pytest.fixture
def settings(served: Served, compose_run: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    def compose(name: str, *words: str) -> RunConfig:
        remote = {"url": served.url, "model": TINY, "cache": tmp_path / "cache", "timeout_s": 300, "concurrency": 3}
        words = (*words, *(f"stage.remote.{key}={value}" for key, value in remote.items()))
        cfg = compose_run("stage=collect", "env.id=MiniGrid-Empty-Random-5x5-v0", "hardware.threads=1", *words)
        cfg.run_dir = str(tmp_path / name)
        return cfg

    return compose


def test_it_says_what_the_same_model_says_here(settings: Callable[..., RunConfig], tmp_path: Path):
    """So the server saw the same pictures, in the same places of the same text."""
    cfg = settings("run")
    prompt_format = make_format(cfg.prompt)
    with open_envs(cfg.env, 2, "always") as envs:
        expert = ExpertPolicy(prompt_format)
        played = list(collect(envs, expert, [Deal(0), Deal(1)], run_seed=0))
    prompts = [turn.prompt for episode in played for turn in episode.turns][:8]
    rngs = [np.random.default_rng(0) for _ in prompts]
    sampler = HFSampler(load_agent(cfg.model, cfg.hardware))
    here = sampler.generate(prompts, rngs, Sampling(cfg.prompt.max_reply_tokens, greedy=True))
    client = ChatClient(cfg.stage.remote, tmp_path / "run")  # pyright: ignore[reportAttributeAccessIssue]
    there = client.complete(prompts, Sampling(cfg.prompt.max_reply_tokens), temperature=0.0)
    client.close()
    assert [answer.text for answer in there] == [reply.text for reply in here]
    assert len({reply.text for reply in here}) > 1
    assert [answer.finish for answer in there] == [reply.finish for reply in here]
    assert [answer.prompt_tokens for answer in there] == [len(reply.prompt_token_ids) for reply in here]
    assert [answer.completion_tokens for answer in there] == [len(reply.token_ids) for reply in here]


def test_collect_plays_and_rates_with_it_and_a_second_run_asks_nothing(
    served: Served, settings: Callable[..., RunConfig]
):
    words = ("stage.policy=remote", "stage.rater=remote", "stage.noise=0", "stage.episodes=1", "env.max_steps=3")

    def run(name: str) -> dict[str, float]:
        cfg = settings(name, *words)
        with Run.open(cfg, words) as opened:
            return stages.main(cfg, opened)

    before = served.asked()
    first = run("first")
    (episode,) = read_episodes(Path(settings("first").run_dir))
    turns, invalid = len(episode.turns), sum(turn.parsed.action is None for turn in episode.turns)
    assert turns > invalid  # it was taught to play
    assert first["collect/unrated"] == turns  # and never to rate
    assert first["collect/unparsable"] == 3 * invalid + 3 * turns  # each was asked for three times
    answers = turns + 2 * invalid + 3 * turns
    assert first["collect/answers"] == served.asked() - before == answers
    assert first["collect/prompt_tokens"] > answers * 25  # each question holds a picture of 25 tokens or two
    assert first["collect/completion_tokens"] > answers
    second = run("second")
    assert served.asked() - before == answers
    swapped = {f"collect/cached_{name}": first[f"collect/{name}"] for name in COUNTED}
    assert second == {**first, **swapped, **{f"collect/{name}": 0.0 for name in COUNTED}}


def test_it_refuses_another_model(served: Served, tmp_path: Path):
    client = ChatClient(RemoteConfig(served.url, "big", cache=str(tmp_path / "cache")), tmp_path / "run")
    with pytest.raises(ModelError, match=r"status 400 .*pinned to .*requested 'big'"):
        client.complete([(Message("user", ("hello",)),)], Sampling(8), 0.0)
    client.close()
