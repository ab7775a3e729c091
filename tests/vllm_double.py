"""A server that speaks vLLM's part of OpenAI's API, and answers with a tiny model and the adapters it is handed."""

import base64
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from chat_server import Answer, Server
from PIL import Image

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.pictures import Picture
from vlm_agents.types import Message, Part, Prompt, Sampling

FIELDS = {"model", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
FIELDS |= {"presence_penalty", "frequency_penalty"}
FIELDS |= {"logit_bias", "logprobs", "return_token_ids", "stop", "include_stop_str_in_output"}


class VllmDouble(Server):
    def __init__(self, base: Path, lora: LoraConfig) -> None:
        super().__init__()
        self.cfg = ModelConfig("tiny", path=str(base), lora=lora)
        self.adapters: dict[str, Agent] = {}
        self.loaded: list[str] = []  # every name that there was
        self.changed: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
        self.serial = threading.Lock()  # the adapters share nothing, but torch's settings

    def post(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        request = json.loads(body)
        with self.serial:
            match path:
                case "/v1/load_lora_adapter":
                    return self.load(request["lora_name"], request["lora_path"])
                case "/v1/unload_lora_adapter":
                    known = self.adapters.pop(request["lora_name"], None)
                    return Answer(200, b"Success") if known else Answer(404, b"cannot be found")
                case "/v1/chat/completions":
                    return self.complete(request)
        return Answer(404, b"no such page")

    def load(self, name: str, path: str) -> Answer:
        if name in self.adapters:
            return Answer(400, b"has already been loaded")
        self.adapters[name] = load_agent(self.cfg, HardwareConfig(name="cpu"), path)
        self.loaded.append(name)
        return Answer(200, b"Success")

    def complete(self, request: dict[str, Any]) -> Answer:
        assert set(request) == FIELDS
        self.requests.append(request)
        if (agent := self.adapters.get(request["model"])) is None:
            return Answer(404, f"The model `{request['model']}` does not exist.".encode())
        assert set(request["logit_bias"]) == {str(token) for token in agent.banned.nonzero().flatten().tolist()}
        greedy = request["temperature"] == 0
        agent.temperature = request["temperature"] or 1.0
        sampling = Sampling(request["max_tokens"], tuple(request["stop"]), greedy)
        rng = np.random.default_rng(request["seed"])
        (reply,) = HFSampler(agent).generate([prompt_of(request["messages"])], [rng], sampling)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": reply.finish,
            "token_ids": list(reply.token_ids),
            "logprobs": {"content": [{"token": "", "logprob": one} for one in reply.logprobs]},
        }
        answer = {"id": "x", "choices": [choice], "prompt_token_ids": list(reply.prompt_token_ids)}
        return Answer(200, json.dumps(self.changed(answer)).encode())


def prompt_of(messages: list[dict[str, Any]]) -> Prompt:
    return tuple(Message(message["role"], parts_of(message["content"])) for message in messages)


def parts_of(content: str | list[dict[str, Any]]) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (content,)
    return tuple(part["text"] if part["type"] == "text" else picture_of(part["image_url"]["url"]) for part in content)


def picture_of(url: str) -> Picture:
    return Picture(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))
