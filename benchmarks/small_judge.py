"""A judge of 1.6 M parameters for failing_judge.py, taught by stage=sft and served by `transformers serve`."""

import json
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from random import Random

from jobs import Job, play

from vlm_agents.chats import ChatWriter, digest
from vlm_agents.envs.visual_search.generator import generate
from vlm_agents.models.adapters import SHIPPED
from vlm_agents.models.tiny import build
from vlm_agents.referee import prompt_for
from vlm_agents.remote import message_json
from vlm_agents.seeds import training_seed
from vlm_agents.types import Claim

SCENES = 4000


def claims(scenes: int) -> Iterator[Claim]:
    """Half of them right, about training scenes of `visual_search_tiny`."""
    rng = Random(0)
    for number in range(scenes):
        scene = generate("tiny", training_seed(0, 0, number))
        wrong = [option for option in scene.options if option != scene.answer]
        answer = scene.answer if rng.random() < 0.5 else rng.choice(wrong)
        yield Claim(scene.text, answer, scene.answer, scene.options, "visual_search")


def verdict(claim: Claim) -> str:
    """Names both before it compares them: so small a model doesn't learn to do it at once."""
    return f"{claim.right} and {claim.answer}. Judgement: {int(claim.answer == claim.right)}"


def teach(folder: Path) -> Path:
    """A tiny model that has learned to compare two answers: the folder of its weights."""
    chats = folder / "chats/train.parquet"
    if not chats.exists():
        chats.parent.mkdir(parents=True)
        with ChatWriter(chats) as file:
            for turn, claim in enumerate(claims(SCENES)):
                reply = {"role": "assistant", "content": verdict(claim)}
                messages = [*map(message_json, prompt_for(claim)), reply]
                row = {"messages": messages, "images": [], "env": "claims", "seed": turn, "turn": 0}
                file.add(row, digest(row))
            file.publish()
    tiny = folder / "tiny"
    if not (tiny / "config.json").exists():
        texts = ((*(one.text for one in prompt_for(claim)), verdict(claim)) for claim in claims(SCENES))
        build(tiny, chain.from_iterable(texts), start=SHIPPED)
    base = ("experiment=visual_search_tiny/sft", "stage=sft", "tracking=jsonl", "hardware.threads=1")
    words = (*base, f"model.path={tiny}", f"stage.data={chats.parent}", "stage.epochs=12", "stage.batch_size=16")
    learned = Job(folder / "sft", words)
    play(learned)
    return learned.folder / "model"


def asking(claim: Claim) -> dict:
    """The request about it."""
    return {"messages": [message_json(one) for one in prompt_for(claim)], "temperature": 0, "max_tokens": 256}


class SmallJudge:
    """What the served model says to a request."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def __call__(self, request: dict) -> str:
        body = json.dumps(request | {"model": self.model}).encode()
        asked = urllib.request.Request(f"{self.url}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read())["choices"][0]["message"]["content"]


@contextmanager
def serving(python: str, model: Path) -> Iterator[SmallJudge]:
    """`python` has transformers' extra `serving`. Port 0: any that is free; the server says which."""
    command = [python, "-u", "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", "0", "--device", "cpu", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout
            found = next((up for line in process.stdout if (up := re.search(r"(http://127\.0\.0\.1:\d+)", line))), None)
            assert found, "the server ended before it listened"
            threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
            yield SmallJudge(f"{found[1]}/v1", str(model))
        finally:
            process.kill()
