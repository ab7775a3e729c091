"""The policy's replies from a vLLM server, which is handed the adapter after every update, under a new name.

What is trained is what was sampled there: the ids of prompt and reply are the server's own, and so are the log-probs
under which they were sampled. What the trained weights say of the same tokens is computed here, before the update, and
the first replies of each adapter are compared at once. Knows nothing of envs, or of how a policy is asked.
"""

import asyncio
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from vlm_agents.config import RolloutConfig
from vlm_agents.endpoint import CHAT, PATIENCE_S, Endpoint, UnknownModel, Unreadable, all_at, give_up
from vlm_agents.errors import ModelError
from vlm_agents.models import Agent, HFSampler
from vlm_agents.remote import message_json
from vlm_agents.stopwatch import Stopwatch
from vlm_agents.tensors import Rendered, Row, reply_row
from vlm_agents.types import Prompt, Reply, Sampling
from vlm_agents.world import ALONE, World

COMPARED = 8  # replies of a new adapter of which the log-probs are computed here too
LACKING = "it has to be vLLM, 0.12 or newer, with nothing between that leaves out token ids and their log-probs"
MOVED_ON = 2**31  # stands for a number of those: the weights here are others since
MOVED = 1e-3  # nats a token that an adapter changes, from which on it can be told whether the server plays with it
UNLOADING_S = 10.0  # a run that ends waits no longer for a server that may hang
NEVER = -100.0  # what is added to the logit of a token that isn't to be sampled; more vLLM doesn't take
MOST_BANNED = 1024  # of such tokens vLLM takes
NO_LOGPROB = -9999.0  # stands for minus infinity


class Sampled(NamedTuple):
    """A reply as the server has it."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]


class VllmSampler:
    """Implements policies.Sampler. The agent's own weights give values alone, where they are asked for, and the
    log-probs that are compared."""

    def __init__(self, cfg: RolloutConfig, agent: Agent, folder: Path, values: bool, world: World = ALONE) -> None:
        """`folder` holds the adapter that plays: the server has to see it under the same path."""
        self.agent, self.renderer = agent, agent.renderer
        self.stopwatch = Stopwatch()  # `swap`: of adapters; `decode`: until the server had answered; and `prefill`
        self._cfg, self._values, self._world = cfg, values, world
        self._own = HFSampler(agent)
        self._endpoint, self._loop = Endpoint(cfg.remote), asyncio.Runner()
        # the main rank's: another's is its own. The server may know adapters of a run before
        self._folder, self._token = world.of_main(lambda: (folder.resolve(), secrets.token_hex(4)))
        self._swaps, self._name, self._compared, self._cancelled = 0, "", 0, False
        self._banned = {str(token): NEVER for token in agent.banned.nonzero().flatten().tolist()}
        if len(self._banned) > MOST_BANNED:
            raise ModelError(
                f"rollout=vllm: {len(self._banned)} tokens of this model may not be sampled, and vLLM takes "
                f"{MOST_BANNED} such: set rollout=own"
            )
        if world.main:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        agent.sampled_elsewhere = True

    def close(self) -> None:
        self._unload()
        self._loop.run(self._endpoint.close())
        self._loop.close()

    # ---- weights -----------------------------------------------------------------------------------------------------
    def sync(self) -> None:
        """The server takes the adapter as it is now. Its name is new, so that nothing which the server kept of prompts
        that another one read is taken for its own."""
        self._own.sync()
        with self.stopwatch.phase("swap"):
            self._unload()
            self._swaps, self._compared = self._swaps + 1, 0
            self._name = f"adapter-{self._token}-{self._swaps}"
            if self._world.main:
                self.agent.save(self._folder / self._name)
                self._load()
            self._world.wait()

    @contextmanager
    def synced(self) -> Iterator[None]:
        self.sync()
        yield

    def _unload(self) -> None:
        """A server that doesn't have it any more, or is gone, needn't be told."""
        if not (self._name and self._world.main):
            return
        post = self._endpoint.post("unload_lora_adapter", {"lora_name": self._name}, bytes, 0, 0.0)
        with suppress(ModelError, TimeoutError):
            self._loop.run(asyncio.wait_for(post, UNLOADING_S))
        shutil.rmtree(self._folder / self._name, ignore_errors=True)
        self._name = ""

    def _load(self) -> None:
        request = {"lora_name": self._name, "lora_path": str(self._folder / self._name)}
        post = self._endpoint.post("load_lora_adapter", request, bytes, self._cfg.remote.retries, PATIENCE_S)
        try:
            self._loop.run(post)
        except ModelError as error:
            if "already been loaded" in str(error):  # by a try whose answer was lost
                return
            raise ModelError(
                f"{error}. The server has to take adapters: start it by stage=serve stage.lora_rank=<model.lora.rank>, "
                "or vllm as docs/scaling.md says, where it sees this run's directory under the same path"
            ) from error

    @property
    def compared(self) -> bool:
        """Have enough of this adapter's replies been compared, so that the weights here may change while it plays?"""
        return self._compared >= COMPARED

    def compare_no_more(self) -> None:
        """Until the next adapter: the weights here are about to change."""
        self._compared = MOVED_ON

    def cancel(self) -> None:
        """From now on `generate` raises CancelledError, in another thread too, which may be asking."""
        self._cancelled = True
        give_up(self._loop)

    # ---- replies -----------------------------------------------------------------------------------------------------
    def generate(
        self, prompts: Sequence[Prompt], rngs: Sequence[np.random.Generator], sampling: Sampling
    ) -> list[Reply]:
        """One reply a prompt. Greedy replies carry the log-probs at temperature 1; entropies are estimates, the mean of
        minus the log-probs that were drawn."""
        prompts = [self._escaped(prompt) for prompt in prompts]
        rendered = [self.renderer.render(prompt) for prompt in prompts]
        requests = [self._request(prompt, rng, sampling) for prompt, rng in zip(prompts, rngs, strict=True)]
        with self.stopwatch.phase("decode"):
            try:
                answers = self._loop.run(self._ask(requests))
            except UnknownModel:  # the server has been started again
                self._load()
                if self._compared < MOVED_ON:
                    self._compared = 0
                answers = self._loop.run(self._ask(requests))
        for row, said in zip(rendered, answers, strict=True):
            self._refuse_other_pictures(row, said)
        if not self.compared and not sampling.greedy:
            self._compare(prompts, rendered, answers)
        read = [Rendered(np.array(said.prompt_ids), row.images) for row, said in zip(rendered, answers, strict=True)]
        return [self._reply(said, value) for said, value in zip(answers, self._values_of(read), strict=True)]

    def values(self, prompts: Sequence[Prompt]) -> list[float]:
        return self._values_of([self.renderer.render(prompt) for prompt in prompts])

    def _values_of(self, rows: Sequence[Rendered]) -> list[float]:
        """The critic's estimate for each prompt, where there is a critic: it reads here what the server read."""
        if not self._values:
            return [0.0] * len(rows)
        with self.stopwatch.phase("prefill"):
            return self._own.values_of(rows)

    def _request(self, prompt: Prompt, rng: np.random.Generator, sampling: Sampling) -> dict[str, Any]:
        """What the server would take from the model's generation_config.json is said, too."""
        return {
            "model": self._name,
            "messages": [message_json(message, escaped=str) for message in prompt],
            "max_tokens": sampling.max_tokens,
            "temperature": 0.0 if sampling.greedy else self.agent.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": int(rng.integers(2**31)),
            "logit_bias": self._banned,
            "logprobs": True,
            "return_token_ids": True,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
        }

    def _escaped(self, prompt: Prompt) -> Prompt:
        """With an invisible word joiner in what spells one of this tokenizer's own control tokens, which the server
        would take for one. Nothing else is changed: it is what is trained on."""
        cut = self.renderer.vocabulary.cut
        if not any(len(cut(message.text)) > 1 for message in prompt):
            return prompt
        return tuple(
            replace(
                message,
                parts=tuple("\u2060".join(cut(part)) if isinstance(part, str) else part for part in message.parts),
            )
            for message in prompt
        )

    async def _ask(self, requests: Sequence[dict[str, Any]]) -> list[Sampled]:
        if self._cancelled:
            raise asyncio.CancelledError
        cfg, post = self._cfg.remote, self._endpoint.post
        return await all_at(
            cfg.concurrency, (post(CHAT, request, read, cfg.retries, PATIENCE_S) for request in requests)
        )

    def _reply(self, said: Sampled, value: float) -> Reply:
        return Reply(
            text=self.renderer.decode(said.ids),
            prompt_token_ids=said.prompt_ids,
            token_ids=said.ids,
            logprobs=said.logprobs,
            value=value,
            entropy=-float(np.mean(said.logprobs)),
            finish=said.finish,
        )

    # ---- the same model? ---------------------------------------------------------------------------------------------
    def _refuse_other_pictures(self, row: Rendered, said: Sampled) -> None:
        token = self.agent.family.image_token_id
        here, there = int((row.ids == token).sum()), said.prompt_ids.count(token)
        if here != there:
            raise ModelError(
                f"the pictures of a prompt are {there} tokens for the server, and {here} here: have it prepare them as "
                "model.image_processor does, by its option mm-processor-kwargs"
            )

    @torch.no_grad()
    def _compare(self, prompts: Sequence[Prompt], rendered: Sequence[Rendered], answers: Sequence[Sampled]) -> None:
        """ModelError where the server's model, or how it reads a prompt, isn't ours. A chat that goes on may be other
        tokens there, which are trained on as they are: a text that a model wrote can be split in more than one way."""
        first = list(zip(rendered, answers, strict=True))[: COMPARED - self._compared]
        opening = all(message.role != "assistant" for prompt in prompts for message in prompt)
        if opening and all(tuple(row.ids.tolist()) != said.prompt_ids for row, said in first):
            row, said = first[0]
            here, there = self.renderer.decode(row.ids.tolist()), self.renderer.decode(said.prompt_ids)
            raise ModelError(f"the server reads a prompt as {there!r}, which is {here!r} here: serve the same model")
        rows = [reply_row(self._name, said.prompt_ids, said.ids, row.images) for row, said in first]
        there, own = np.concatenate([said.logprobs for _, said in first]), self._scores(rows)
        with self.agent.reference():
            base = self._scores(rows)
        gap, moved = float(np.abs(own - there).mean()), float(np.abs(own - base).mean())
        if moved > MOVED and float(np.abs(base - there).mean()) < gap / 2:
            raise ModelError(
                f"the server plays without the adapter that it was handed: its log-probs are {gap:.3g} nats a token "
                "from those of the model with it, and half as far from those without. See its log for modules of "
                "adapters that it doesn't know, or set rollout=own"
            )
        if not gap <= self._cfg.tolerance:
            raise ModelError(
                f"the log-probs of a new adapter's first replies are {gap:.3g} nats a token from those computed here, "
                f"more than rollout.tolerance={self._cfg.tolerance:g}: is the server's model the one that is trained, "
                "in as fine a hardware.dtype, and was it started with logprobs-mode=processed_logprobs?"
            )
        self._compared += len(first)

    def _scores(self, rows: Sequence[Row]) -> np.ndarray:
        """Log-probs of the rows' replies, one row after the other: the update's memory is planned for no more."""
        return np.concatenate([self.agent.score([row]).logprobs.cpu().numpy() for row in rows])


def read(body: bytes) -> Sampled:
    """The ids and log-probs of a completion; Unreadable where it has none."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        said = Sampled(
            prompt_ids=tuple(map(int, answer["prompt_token_ids"])),
            ids=tuple(map(int, choice["token_ids"])),
            logprobs=tuple(float(one["logprob"]) for one in choice["logprobs"]["content"]),
            finish=choice["finish_reason"],
        )
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Unreadable(body, LACKING) from error
    if not said.ids or len(said.ids) != len(said.logprobs) or min(said.logprobs) <= NO_LOGPROB:
        raise Unreadable(body)
    if said.finish not in ("stop", "length"):
        raise Unreadable(body)
    return said
