"""Episodes to samples, samples to the tensors of a loss: the only way from what was sampled to what is trained.

Ids, log-probs and values are the sampler's own; nothing is rendered or tokenised anew here. Samples live on the host,
and become tensors late, one micro-batch at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlm_agents.errors import TrainingError
from vlm_agents.learn.credit import Credit, lengths_of, spread
from vlm_agents.tensors import Renderer, Row, joined, reply_row
from vlm_agents.types import Parsed, Reply, Trajectory, Turn


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A row and what is known of its replies, fp32, one number for each of its k reply tokens, in order.

    What belongs to a turn is repeated for each token of its reply. Two samples are equal only if they are one.
    """

    row: Row
    behaviour: np.ndarray  # log-probs under which the tokens were sampled
    emphasis: np.ndarray  # weight of a token's log-prob in its turn's
    advantages: np.ndarray
    returns: np.ndarray  # what a critic should expect before the token; 0 where there is no critic
    old: np.ndarray  # log-probs that ratios are taken to: the sampler's, or the update's own
    reference: np.ndarray | None = None  # log-probs of the policy that training started from, where a loss needs them

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Targets:
    """What losses need of a micro-batch beside the model's scores. [K] each but `first`."""

    behaviour: Tensor
    old: Tensor
    emphasis: Tensor
    advantages: Tensor
    returns: Tensor
    reference: Tensor | None
    weight: Tensor  # of each token in the mean over the mini-batch
    turn: Tensor  # int64: the turn, and below the row, that a token belongs to, counted from 0
    row: Tensor
    first: Tensor  # [M] int64: where each turn's reply begins


def usable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The episodes that say something about the policy: those of which it is known what came of them.

    TrainingError where there is none.
    """
    found = [trajectory for trajectory in trajectories if trajectory.turns and trajectory.known]
    if not found:
        first = next((trajectory.error or trajectory.stop for trajectory in trajectories), "there is none")
        raise TrainingError(f"none of {len(trajectories)} episodes is usable ({first}): mend that first")
    return found


def build(episodes: Sequence[Trajectory], renderer: Renderer, thought_coef: float) -> list[Sample]:
    """Samples without credit: advantages and returns are 0 until they are `credited`.

    Consecutive turns of an episode whose token ids extend each other share a row.
    """
    built: list[Sample] = []
    for episode in episodes:
        merged: list[Sample] = []
        for index, turn in enumerate(episode.turns):
            emphasis = token_emphasis(turn.reply, turn.parsed, renderer, thought_coef)
            sample = _turn_sample(f"{episode.ident}/turn {index}", turn, emphasis)
            if merged and (row := joined(merged[-1].row, sample.row)):
                merged[-1] = _merge(row, merged[-1], sample)
            else:
                merged.append(sample)
        built.extend(merged)
    return built


def credited(samples: Sequence[Sample], episodes: Sequence[Trajectory], credit: Sequence[Credit]) -> list[Sample]:
    """The samples of these episodes, in their order, with the credit of each."""

    def by_sample(name: str) -> list[np.ndarray]:
        pairs = zip(episodes, credit, strict=True)
        found = [spread(getattr(its, name), episode, sum(lengths_of(episode))) for episode, its in pairs]
        return np.split(np.concatenate(found), np.cumsum([len(sample.old) for sample in samples])[:-1])

    earned = [replace(one, advantages=its) for one, its in zip(samples, by_sample("advantages"), strict=True)]
    if any(its.returns is None for its in credit):
        return earned
    return [replace(one, returns=its) for one, its in zip(earned, by_sample("returns"), strict=True)]


def token_emphasis(reply: Reply, parsed: Parsed, renderer: Renderer, thought_coef: float) -> np.ndarray:
    """[L] weight of each reply token's log-prob in its turn's: `thought_coef` wholly inside the thought, 1 elsewhere.

    Keys, quotes, braces and the end of turn weigh 1, and so does a token that straddles an end of the thought: they
    are how the reply stays legible, and where it does not, every token weighs 1, so that keeping the format is
    rewarded as strongly as breaking it is punished. A token that touches the action belongs to the action.
    """
    weights = np.ones(len(reply.token_ids), dtype=np.float32)
    if thought_coef == 1 or parsed.error is not None or parsed.thought_span is None:
        return weights
    starts, ends = renderer.offsets(reply.token_ids).T
    # An empty range is the first bytes of the character that stands there or, past the text, the end of turn.
    ends = np.maximum(ends, starts + 1)
    thought = (starts >= parsed.thought_span[0]) & (ends <= parsed.thought_span[1])
    if parsed.action_span is not None:
        thought &= (ends <= parsed.action_span[0]) | (starts >= parsed.action_span[1])
    weights[thought] = thought_coef
    return weights


def to_targets(samples: Sequence[Sample], weights: Sequence[np.ndarray], device: torch.device) -> Targets:
    """`weights` of each sample's reply tokens."""
    lengths = torch.tensor([length for sample in samples for length in sample.row.reply_lengths])
    tokens = torch.tensor([len(sample.old) for sample in samples])
    references = [sample.reference for sample in samples if sample.reference is not None]
    return Targets(
        behaviour=_tensor((sample.behaviour for sample in samples), device),
        old=_tensor((sample.old for sample in samples), device),
        emphasis=_tensor((sample.emphasis for sample in samples), device),
        advantages=_tensor((sample.advantages for sample in samples), device),
        returns=_tensor((sample.returns for sample in samples), device),
        reference=_tensor(references, device) if references else None,
        weight=_tensor(weights, device),
        turn=torch.arange(len(lengths)).repeat_interleave(lengths).to(device),
        row=torch.arange(len(tokens)).repeat_interleave(tokens).to(device),
        first=(lengths.cumsum(0) - lengths).to(device),
    )


def _turn_sample(ident: str, turn: Turn, emphasis: np.ndarray) -> Sample:
    reply, images = turn.reply, tuple(image for message in turn.prompt for image in message.images)
    row = reply_row(ident, reply.prompt_token_ids, reply.token_ids, images)
    logprobs, none = np.array(reply.logprobs, dtype=np.float32), np.zeros(len(reply.token_ids), dtype=np.float32)
    return Sample(row, logprobs, emphasis, advantages=none, returns=none, old=logprobs)


def _merge(row: Row, earlier: Sample, later: Sample) -> Sample:
    names = ("behaviour", "emphasis", "advantages", "returns", "old")
    return Sample(row, *(np.concatenate([getattr(earlier, name), getattr(later, name)]) for name in names))


def _tensor(arrays: Iterable[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays))).to(device)
