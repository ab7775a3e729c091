"""Gradients to weights: the optimizer, gradient clipping, and the learning-rate schedule.

Knows nothing of losses, rows, or what its parameters are for.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm_agents.world import ALONE, World


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


class Engine(Protocol):
    """Steps along a gradient that is the sum over all ranks of what each of them adds."""

    @property
    def even(self) -> bool:
        """Must all ranks make as many passes with gradient between two steps?"""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of a loss."""
        ...

    def step(self, lr: float) -> float:
        """One optimizer step; the gradient's norm before clipping. If that isn't finite, the weights stay."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within it all weights are there, to be read: no pass without gradient needs another rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What one rank keeps of it for all."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write what is divided among the ranks, a file each; to be called by all of them."""
        ...

    def load(self, folder: Path) -> None:
        """Read it again, on any number of ranks."""
        ...


class TorchEngine:
    """AdamW over some parameters, all on the device of each rank; their gradient is clipped as one."""

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
        """One optimizer step; the gradient's norm before clipping. If that isn't finite, the weights stay."""
        if self.world.ranks > 1:
            self._sum()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _sum(self) -> None:
        """Gradients over ranks. One that is missing here is zeros, but where it is missing everywhere: then AdamW
        leaves the parameter alone."""
        there = torch.tensor([float(parameter.grad is not None) for parameter in self.parameters])
        self.world.add([there])
        learning = [parameter for parameter, ranks in zip(self.parameters, there.tolist(), strict=True) if ranks]
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self.world.add([parameter.grad for parameter in learning if parameter.grad is not None])

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, folder: Path) -> None:
        """Nothing: all is in the state_dict."""

    def load(self, folder: Path) -> None:
        """As for save."""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(dict(state))


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
