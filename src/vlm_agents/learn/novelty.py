"""The novelty bonus: a second adapter predicts an episode's actions from its first picture.

Its surprise, how unlikely it found what was then done, is a bonus for the agent: episodes that go as they always go
earn none. It learns from every iteration's episodes after they were judged. Not a value of states, and not part of the
policy: its adapter is off while the agent samples and learns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vlm_agents.config import NoveltyConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.engine import TorchEngine
from vlm_agents.learn.samples import usable
from vlm_agents.learn.shaping import Shaper, with_bonuses
from vlm_agents.tensors import Renderer, Row, Scores, reply_row
from vlm_agents.types import Message, Trajectory

QUESTION = "Which actions will be taken here, from the first to the last?"
SEPARATOR = "; "
EPISODES_A_STEP = 8


class ActionPredictor(Protocol):
    """A model with a second adapter."""

    def score(self, rows: Sequence[Row]) -> Scores: ...

    def predicting(self) -> AbstractContextManager[None]:
        """The second adapter instead of the policy's."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]: ...


class Novelty(Shaper):
    """Judges episodes, then learns from them."""

    def __init__(self, model: ActionPredictor, renderer: Renderer, config: NoveltyConfig, shares: Shares) -> None:
        self.model, self.renderer, self.config, self.shares = model, renderer, config, shares
        self.engine = TorchEngine(model.parameters(), weight_decay=0.0, max_grad_norm=1.0, world=shares.world)

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], dict[str, float]]:
        """The episodes with `coef` times the surprise, in nats, added to each turn's reward; and its mean."""
        surprises = self.surprise(trajectories)
        judged = [
            with_bonuses(one, "novelty", (self.config.coef * surprise).tolist())
            for one, surprise in zip(trajectories, surprises, strict=True)
        ]
        return judged, {"novelty/surprise": float(np.concatenate(surprises).mean())}

    @torch.no_grad()
    def surprise(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Per episode, per turn: minus the log-probability of its action, nats, given those before it."""
        found = [np.zeros(len(trajectory.turns)) for trajectory in trajectories]
        places = {self.row(trajectory): index for index, trajectory in enumerate(trajectories) if trajectory.turns}
        deal = self.shares.deal(list(places))
        own = [logprobs.cpu() for part in deal.own for logprobs in self.logprobs(part)]
        for row, logprobs in zip(places, deal.gathered(own), strict=True):
            index = places[row]
            np.subtract.at(found[index], self.turns_of(row, trajectories[index]), logprobs.numpy())
        return found

    def learn(self, trajectories: Sequence[Trajectory], rng: np.random.Generator) -> dict[str, float]:
        """One pass over the episodes, a step of the optimizer every few; the mean loss, nats a token."""
        rows = [self.row(trajectory) for trajectory in usable(trajectories)]
        order = rng.permutation(len(rows))
        own = count = 0.0
        for start in range(0, len(rows), EPISODES_A_STEP):
            batch = [rows[index] for index in order[start : start + EPISODES_A_STEP]]
            length = sum(sum(row.reply_lengths) for row in batch)
            for part in self.shares.deal(batch).own:
                with self.model.predicting():
                    loss = -self.model.score(part).logprobs.sum()
                    self.engine.backward(loss / length)
                own += float(loss.detach())
            if not math.isfinite(norm := self.engine.step(self.config.lr)):
                raise TrainingError(f"the gradient of algo.novelty's predictor is {norm}: lower algo.novelty.lr")
            count += length
        return {"novelty/loss": sum(self.shares.world.gather(own)) / count}

    def logprobs(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """[L] of the reply tokens of each row."""
        with self.model.predicting():
            scores = self.model.score(rows)
        yield from scores.logprobs.split([sum(row.reply_lengths) for row in rows])

    def row(self, trajectory: Trajectory) -> Row:
        """The first picture and a question; the reply: every action, in order, as far as the model has positions."""
        prompt = (Message("user", (*trajectory.turns[0].observation.images[:1], QUESTION)),)
        rendered = self.renderer.render(prompt)
        reply = self.renderer.encode_reply(SEPARATOR.join(actions_of(trajectory)))
        room = self.renderer.context - len(rendered.ids)
        return reply_row(trajectory.ident, rendered.ids, reply[: max(0, room)], rendered.images)

    def turns_of(self, row: Row, trajectory: Trajectory) -> np.ndarray:
        """[L] which turn's action each reply token writes; a separator belongs to the action before it."""
        ((start, end),) = row.spans
        begins = self.renderer.offsets(row.input_ids[start:end].tolist())[:, 0]
        ends = np.cumsum([len(action) + len(SEPARATOR) for action in actions_of(trajectory)])
        return np.minimum(np.searchsorted(ends, begins, side="right"), len(trajectory.turns) - 1)

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.engine.load_state_dict(state)


def actions_of(trajectory: Trajectory) -> list[str]:
    return [turn.parsed.action or "invalid" for turn in trajectory.turns]
