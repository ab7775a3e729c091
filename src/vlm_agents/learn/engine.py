"""Gradients to weights: optimizer, gradient clipping and learning-rate schedule, behind a Protocol.

`TorchEngine` is one process on one device. Knows nothing of losses or rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm_agents.config import AlgoConfig


class Engine(Protocol):
    """What the update needs of an optimizer."""

    @property
    def learning_rate(self) -> float:
        """Of the policy, in this iteration."""
        ...

    @property
    def critic_only(self) -> bool:
        """Does the critic alone learn in this iteration?"""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to what the next step takes."""
        ...

    def step(self) -> dict[str, float]:
        """One optimizer step; each role's gradient norm before clipping. If one isn't finite, all weights stay."""
        ...

    def end_iteration(self) -> None:
        """Move the schedule on: once per iteration, however many steps or ranks it had."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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
    """AdamW with a group for each role, whose gradients are clipped apart: they have no parameter in common.

    Clipped together, the critic's, which may be a hundred times larger until it has learned the size of a return, would
    shrink the policy's, and Adam would then step too far once it no longer does. (With `stop_gradient=false` a part of
    the critic's gradient is the policy's, and is clipped with it.)

    The first `value_warmup` iterations, but for the run's last, are `critic_only`: without a critic, normalised
    advantages would punish the first turns of every episode. The other roles' schedules begin after those.
    """

    def __init__(
        self, parameters_by_role: Mapping[str, list[torch.nn.Parameter]], algo: AlgoConfig, iterations: int
    ) -> None:
        self.algo = algo
        self.iterations = iterations
        self.iteration = 0
        self.warmup = min(algo.value_warmup, iterations - 1)
        self.parameters_by_role = parameters_by_role
        groups = [{"params": parameters} for parameters in parameters_by_role.values()]
        self.optimizer = AdamW(groups, weight_decay=algo.weight_decay)
        self._set_learning_rates()

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def critic_only(self) -> bool:
        return self.iteration < self.warmup

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> dict[str, float]:
        norms = {
            role: float(torch.nn.utils.clip_grad_norm_(parameters, self.algo.max_grad_norm))
            for role, parameters in self.parameters_by_role.items()
        }
        if all(map(math.isfinite, norms.values())):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norms

    def end_iteration(self) -> None:
        self.iteration += 1
        self._set_learning_rates()

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _set_learning_rates(self) -> None:
        for role, group in zip(self.parameters_by_role, self.optimizer.param_groups, strict=True):
            first = 0 if role == "value" else self.warmup
            full = self.algo.lr if role == "policy" else self.algo.value_lr
            group["lr"] = full * lr_share(
                self.iteration - first, self.iterations - first, self.algo.warmup_updates, self.algo.min_lr_ratio
            )


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
