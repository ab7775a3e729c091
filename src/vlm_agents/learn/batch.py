"""Episodes to rows, rows to batches: the only builder between what was sampled and what is trained.

Ids, log-probs and values are the sampler's own; nothing is rendered or tokenised anew here. Rows live on the host and
are padded late, one micro-batch at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn.advantages import gae, normalise
from vlm_agents.tensors import Batch, Renderer, Row
from vlm_agents.types import Parsed, Reply, Trajectory, Turn


def usable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The episodes that say something about the policy: those that no broken env cut short."""
    return [trajectory for trajectory in trajectories if trajectory.turns and trajectory.stop != "env_error"]


def rows(trajectories: Sequence[Trajectory], renderer: Renderer, algo: AlgoConfig) -> list[Row]:
    """Rows of all `usable` episodes, advantages normalised over all their turns.

    Consecutive turns whose token ids extend each other share a row. TrainingError if nothing can be trained on.
    """
    episodes = usable(trajectories)
    if not episodes:
        first = next((trajectory.error or trajectory.stop for trajectory in trajectories), "there is none")
        raise TrainingError(f"none of {len(trajectories)} episodes is usable ({first}): mend the env first")
    credit = [_credit(episode, algo) for episode in episodes]
    normalised = iter(normalise(np.concatenate([advantages for advantages, _ in credit])))
    built: list[Row] = []
    for episode, (_, returns) in zip(episodes, credit, strict=True):
        merged: list[Row] = []
        for index, turn in enumerate(episode.turns):
            weight = token_weights(turn.reply, turn.parsed, renderer, algo.thought_coef)
            row = _turn_row(_ident(episode, index), turn, weight, next(normalised), returns[index])
            if merged and _extends(row, merged[-1]):
                merged[-1] = _merge(merged[-1], row)
            else:
                merged.append(row)
        built.extend(merged)
    return built


def token_weights(reply: Reply, parsed: Parsed, renderer: Renderer, thought_coef: float) -> np.ndarray:
    """[L] weight of each reply token's log-prob in its turn's: `thought_coef` wholly inside the thought, 1 elsewhere.

    Keys, quotes, braces and the end of turn weigh 1, and so does a token that straddles an end of the thought: they
    are how the reply stays legible, and where it does not, every token weighs 1, so that keeping the format is
    rewarded as strongly as breaking it is punished. A token that touches the action belongs to the action.
    """
    weights = np.ones(len(reply.token_ids), dtype=np.float32)
    if parsed.error is not None or parsed.thought_span is None:
        return weights
    starts, ends = renderer.offsets(reply.token_ids).T
    # An empty range is the first bytes of the character that stands there or, past the text, the end of turn.
    ends = np.maximum(ends, starts + 1)
    thought = (starts >= parsed.thought_span[0]) & (ends <= parsed.thought_span[1])
    if parsed.action_span is not None:
        thought &= (ends <= parsed.action_span[0]) | (starts >= parsed.action_span[1])
    weights[thought] = thought_coef
    return weights


def collate(rows: Sequence[Row], renderer: Renderer) -> Batch:
    """One padded batch on the host."""
    reply_lengths = torch.tensor([end - start for row in rows for start, end in row.spans])
    return Batch(
        tokens=renderer.collate(rows),
        token_weight=_tensor(row.token_weight for row in rows),
        old_logprobs=_tensor(row.old_logprobs for row in rows),
        turn_of_token=torch.arange(len(reply_lengths)).repeat_interleave(reply_lengths),
        old_values=_tensor(row.old_values for row in rows),
        advantages=_tensor(row.advantages for row in rows),
        returns=_tensor(row.returns for row in rows),
        idents=tuple(row.ident for row in rows),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The per-token and per-turn fields beside the model's scores; where `tokens` go is the model's business."""
    names = ("token_weight", "old_logprobs", "turn_of_token", "old_values", "advantages", "returns")
    return replace(batch, **{name: getattr(batch, name).to(device) for name in names})


def minibatches(rows: Sequence[Row], turns: int, rng: np.random.Generator) -> list[list[Row]]:
    """Shuffled rows in mini-batches of about `turns` turns, as even as rows allow.

    Even, because a left-over of two turns would move the weights as far as a full mini-batch does.
    """
    shuffled = [rows[index] for index in rng.permutation(len(rows))]
    lengths = np.array([len(row.spans) for row in shuffled])
    number = max(1, round(lengths.sum() / turns))
    middles = lengths.cumsum() - lengths / 2  # a row goes where the middle of its turns falls
    places = (middles * number / lengths.sum()).astype(int)
    return [[row for row, at in zip(shuffled, places, strict=True) if at == place] for place in np.unique(places)]


def microbatches(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Rows by length, cut where padding would pass `max_tokens`; a row larger than that goes alone.

    Longest first: where memory is too small, that shows at once.
    """
    parts: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids), reverse=True):
        if parts and len(parts[-1][0].input_ids) * (len(parts[-1]) + 1) <= max_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _credit(episode: Trajectory, algo: AlgoConfig) -> tuple[np.ndarray, np.ndarray]:
    values = [turn.reply.value for turn in episode.turns if turn.reply.value is not None]
    if len(values) < len(episode.turns):
        raise TrainingError(
            f"{_ident(episode, 0)}: replies of policy {episode.policy} carry no value: "
            "this algorithm trains on what its own model sampled (policy=model)"
        )
    rewards = [turn.reward for turn in episode.turns]
    return gae(rewards, values, episode.bootstrap, algo.gamma, algo.gae_lambda)


def _turn_row(ident: str, turn: Turn, weight: np.ndarray, advantage: float, return_: float) -> Row:
    prompt, reply = turn.reply.prompt_token_ids, turn.reply.token_ids
    return Row(
        ident=ident,
        input_ids=np.array(prompt + reply, dtype=np.int64),
        images=tuple(image for message in turn.prompt for image in message.images),
        spans=((len(prompt), len(prompt) + len(reply)),),
        token_weight=weight,
        old_logprobs=np.array(turn.reply.logprobs, dtype=np.float32),
        old_values=np.array([turn.reply.value], dtype=np.float32),
        advantages=np.array([advantage], dtype=np.float32),
        returns=np.array([return_], dtype=np.float32),
    )


def _extends(later: Row, earlier: Row) -> bool:
    """Does the prompt of the one-turn row `later` start with all that `earlier` holds, pictures too?"""
    length, prompt_length = len(earlier.input_ids), later.spans[0][0]
    return (
        length <= prompt_length
        and np.array_equal(later.input_ids[:length], earlier.input_ids)
        and later.images[: len(earlier.images)] == earlier.images
    )


def _merge(earlier: Row, later: Row) -> Row:
    return Row(
        ident=earlier.ident,
        input_ids=later.input_ids,
        images=later.images,
        spans=earlier.spans + later.spans,
        token_weight=np.concatenate([earlier.token_weight, later.token_weight]),
        old_logprobs=np.concatenate([earlier.old_logprobs, later.old_logprobs]),
        old_values=np.concatenate([earlier.old_values, later.old_values]),
        advantages=np.concatenate([earlier.advantages, later.advantages]),
        returns=np.concatenate([earlier.returns, later.returns]),
    )


def _ident(episode: Trajectory, turn: int) -> str:
    return f"{episode.env}/seed {episode.seed}/turn {turn}"


def _tensor(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays)))
