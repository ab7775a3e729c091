"""Gradients to weights: the optimizer, gradient clipping, and the learning-rate schedule.

Knows nothing of losses, rows, or what its parameters are for.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm_agents.world import ALONE, World


class Engine(Protocol):
    """Some parameters and what steps them. All but `state_dict` is called by all ranks, in the same order.

    The gradient of a mini-batch is the sum of what each rank's `backward` gave.
    """

    @property
    def even(self) -> bool:
        """Must all ranks make equally many passes, forward and backward, between two steps? One that has fewer rows
        then makes passes of rows of weight 0."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this rank's share to the gradient; parameters of others that are in the graph get theirs as from
        `loss.backward()`."""
        ...

    def step(self, lr: float) -> float:
        """One optimizer step; the gradient's norm before clipping. If that isn't finite, the weights stay."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within it this rank has all weights, to be read, and passes that need no other rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What rank 0 keeps; the rest is `save`'s."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """What all ranks write, side by side."""
        ...

    def load(self, folder: Path) -> None:
        """What `save` wrote, by however many ranks."""
        ...


class AdamW(torch.optim.AdamW):
    """AdamW that steps in fp32 whatever the precision of the weights, of which it keeps its own copies.

    A bfloat16 near 0.02 is 1.2e-4 from the next: steps of a usual learning rate would all be rounded away. Gradients
    come, and are summed over micro-batches, in the precision of the weights.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        self.copies: list[tuple[torch.nn.Parameter, Tensor]] = []  # (the model's, its fp32 copy)
        super().__init__(
            [{**group, "params": list(map(self._stepped, group["params"]))} for group in groups], **settings
        )

    def _stepped(self, parameter: torch.nn.Parameter) -> Tensor:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        self.copies.append((parameter, parameter.detach().float()))
        return self.copies[-1][1]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for parameter, copy in self.copies:
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        loss = super().step(closure)  # type: ignore[arg-type]
        for parameter, copy in self.copies:
            if copy.grad is not None:
                parameter.copy_(copy)
                copy.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter, _ in self.copies:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"copies": [copy for _, copy in self.copies]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for (_, copy), saved in zip(self.copies, state_dict["copies"], strict=True):
            copy.copy_(saved)


class TorchEngine:
    """AdamW over some parameters, which every rank has whole; their gradient is clipped as one."""

    even = False

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        weight_decay: float,
        max_grad_norm: float,
        world: World = ALONE,
    ) -> None:
        self.parameters, self.max_grad_norm, self.world = list(parameters), max_grad_norm, world
        self.optimizer = AdamW([{"params": self.parameters}], weight_decay=weight_decay)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        sum_gradients(self.parameters, self.world)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(dict(state))

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def sum_gradients(parameters: Sequence[torch.nn.Parameter], world: World) -> None:
    """Over ranks. A parameter that no rank's loss reached has no gradient then, as with one rank."""
    if world.ranks == 1:
        return
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    world.add([used])
    reached = [parameter for parameter, count in zip(parameters, used.tolist(), strict=True) if count]
    for parameter in reached:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    world.add([parameter.grad for parameter in reached if parameter.grad is not None])


def lr_share(iteration: int, iterations: int, warmup: int, floor: float) -> float:
    """Share of the full learning rate in iteration 0, 1, ...: linear warm-up, then a cosine to `floor` in the last.

    0 in an iteration before those.
    """
    if iteration < 0:
        return 0.0
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    progress = min(1.0, (iteration - warmup) / max(1, iterations - 1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
