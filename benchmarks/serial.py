"""RL4VLM's way of playing and learning (arXiv 2405.10292), on our envs, prompts and weights: what speeds are held to.

One env. transformers' `generate` gives a reply; a second pass over the whole row, its reply padded to twice the longest
one, gives log-probs over the whole vocabulary, and the value. The update makes that pass again, for one turn at a time,
with an optimizer step after as many turns as we have in a mini-batch. The pixels of a picture are made once for both
passes of a turn; nothing else is kept from one pass to the next.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_agents.models import Agent
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Renderer
from vlm_agents.types import Prompt, Reply, Sampling, Trajectory

CLIP, VALUE_COEF = 0.2, 0.5


class SerialSampler:
    """Implements policies.Sampler, one prompt after the other."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.model: Any = deepcopy(agent.model)  # transformers' own, of which we use the parts

    @property
    def renderer(self) -> Renderer:
        return self.agent.renderer

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], rngs: Sequence[np.random.Generator], sampling: Sampling
    ) -> list[Reply]:
        return [self._reply(prompt, rng, sampling) for prompt, rng in zip(prompts, rngs, strict=True)]

    def _reply(self, prompt: Prompt, rng: np.random.Generator, sampling: Sampling) -> Reply:
        agent = self.agent
        rendered, end = agent.renderer.render(prompt), agent.renderer.end_of_turn
        ids = torch.from_numpy(rendered.ids)[None]
        pictures = self._pictures(rendered.images)
        torch.manual_seed(int(rng.integers(2**31)))
        output = self.model.generate(
            **self._inputs(ids, pictures),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.max_tokens,
            suppress_tokens=agent.banned.nonzero().squeeze().tolist(),
            eos_token_id=end,
            pad_token_id=agent.tokenizer.pad_token_id,
        )
        said = output[0, ids.shape[1] :].tolist()
        logprobs, value = self._evaluate(rendered.ids, said, pictures, sampling.max_tokens)
        return Reply(
            text=agent.renderer.decode(said),
            prompt_token_ids=tuple(rendered.ids.tolist()),
            token_ids=tuple(said),
            logprobs=tuple(logprobs.tolist()),
            value=float(value),
            finish="stop" if said[-1] == end else "length",
        )

    def _pictures(self, images: Sequence[Picture]) -> dict[str, Tensor]:
        return dict(self.agent.image_processor(images=[picture.image for picture in images], return_tensors="pt"))

    def _inputs(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds = (ids == self.agent.family.image_token_id).int()
        inputs = {"input_ids": ids, "mm_token_type_ids": kinds, **pictures}
        return {name: tensor.to(self.agent.device) for name, tensor in inputs.items()}

    def evaluate(
        self, prompt: Sequence[int] | np.ndarray, said: Sequence[int], images: Sequence[Picture], longest: int
    ) -> tuple[Tensor, Tensor]:
        """[L] log-probs of the reply, and the value: of the state behind the prompt, from which no gradient goes on."""
        return self._evaluate(prompt, said, self._pictures(images), longest)

    def _evaluate(
        self, prompt: Sequence[int] | np.ndarray, said: Sequence[int], pictures: Mapping[str, Tensor], longest: int
    ) -> tuple[Tensor, Tensor]:
        row = torch.full((1, len(prompt) + 2 * longest), self.agent.tokenizer.pad_token_id)
        row[0, : len(prompt)] = torch.as_tensor(prompt)
        row[0, len(prompt) : len(prompt) + len(said)] = torch.tensor(said)
        output = self.model(**self._inputs(row, pictures), output_hidden_states=True, use_cache=False)
        distribution = output.logits.float().log_softmax(-1)
        before = slice(len(prompt) - 1, len(prompt) - 1 + len(said))
        targets = torch.tensor(said, device=distribution.device)
        logprobs = distribution[0, before].gather(-1, targets[:, None]).squeeze(-1)
        state = output.hidden_states[-1][:, len(prompt) - 1].detach()
        return logprobs, self.agent.value(state)[0]

    def values(self, prompts: Sequence[Prompt]) -> list[float]:
        rendered = [self.agent.renderer.render(prompt) for prompt in prompts]
        end = [self.agent.renderer.end_of_turn]
        with torch.no_grad():
            return [float(self.evaluate(one.ids, end, one.images, 1)[1]) for one in rendered]

    def sync(self) -> None:
        """It keeps nothing."""


def learn(sampler: SerialSampler, episodes: Sequence[Trajectory], longest: int, turns_a_step: int, lr: float) -> None:
    """One epoch of PPO over the turns of these episodes, each with the episode's reward as its advantage and return.

    What the credit is costs nothing, and speed alone is measured.
    """
    model = sampler.model
    head = sampler.agent.value_head
    trained = [parameter for parameter in (*model.parameters(), *head.parameters()) if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr)
    turns = [(turn, sum(one.step.reward for one in episode.turns)) for episode in episodes for turn in episode.turns]
    for place, (turn, earned) in enumerate(turns, 1):
        images = [image for message in turn.prompt for image in message.images]
        reply = turn.reply
        logprobs, value = sampler.evaluate(reply.prompt_token_ids, reply.token_ids, images, longest)
        ratio = (logprobs - torch.tensor(reply.logprobs, device=logprobs.device)).sum().exp()
        policy = -torch.minimum(ratio * earned, ratio.clamp(1 - CLIP, 1 + CLIP) * earned)
        ((policy + VALUE_COEF * (value - earned).square()) / turns_a_step).backward()
        if place % turns_a_step == 0 or place == len(turns):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
