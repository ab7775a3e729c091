"""Tells that a training which was getting somewhere falls apart, by which signal, and what helps."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vlm_agents.checkpoints import Checkpoint
from vlm_agents.errors import TrainingError
from vlm_agents.progress import say

BAD, RISEN = 0.5, 0.3  # of a rate: above the one, and by the other above what it was at first
PATIENCE = 2  # iterations in a row
BEST_OF, WORTH = 4, 0.3  # the best mean success over so many iterations counts, from this on
CALMER = "a lower algo.lr, algo.target_kl=0.05"
RATES = {
    "rollout/invalid_rate": f"{CALMER}, a higher env.invalid_penalty",
    "rollout/truncated_rate": f"algo.overlong_coef=0.5, {CALMER}",
    "rollout/repeated_token_rate": f"{CALMER}, algo.entropy_coef=0.001",
}


class Sign(NamedTuple):
    metric: str
    was: float
    now: float
    remedy: str


class Collapse:
    """Looks at every iteration. `state` goes on with the run."""

    def __init__(self, stop: bool, state: Mapping[str, Any] | None = None) -> None:
        self.stop = stop
        self.state: dict[str, Any] = {"first": {}, "success": [], "bad": 0, "told": False} | dict(state or {})

    @property
    def suspected(self) -> bool:
        """Was the last iteration bad? Then no checkpoint that training could fall back to."""
        return self.stop and self.state["bad"] > 0

    def look(self, iteration: int, metrics: Mapping[str, float], last: Callable[[int], Checkpoint | None]) -> None:
        """To be called after each iteration, counted from 0; `last` gives the newest checkpoint from before a step.
        TrainingError where a collapsed run is to stop.

        What plays an iteration is what the one before left: of the first bad one, in the checkpoint of that number,
        which isn't good any more.
        """
        state = self.state
        state["first"] = state["first"] or {name: metrics.get(name, 0.0) for name in RATES}
        state["success"].append(metrics["rollout/success"])
        sign = self._sign(metrics)
        state["bad"] = state["bad"] + 1 if sign else 0
        if not sign or state["bad"] < PATIENCE or (state["told"] and not self.stop):
            return
        state["told"] = True
        told = f"training collapses: {sign.metric} {sign.was:.3f} -> {sign.now:.3f} in iteration {iteration + 1}"
        if not self.stop:
            return say(f"{told}. What helps: {sign.remedy}. Training goes on; stage.stop_on_collapse=true would end it")
        good = last(iteration + 1 - state["bad"])
        kept = (
            f"; stage.init={os.path.relpath(good.path)} has the last good weights"
            if good
            else "; no checkpoint is left from before: have a smaller stage.checkpoint_every"
        )
        raise TrainingError(f"{told}. Begin anew under another name= with {sign.remedy}{kept}")

    def _sign(self, metrics: Mapping[str, float]) -> Sign | None:
        for name, remedy in RATES.items():
            was, now = self.state["first"][name], metrics.get(name, 0.0)
            if now > BAD and now > was + RISEN:
                return Sign(name, was, now, remedy)
        success = self.state["success"]
        if len(success) < BEST_OF + PATIENCE:
            return None
        best = float(np.convolve(success, np.ones(BEST_OF) / BEST_OF, "valid").max())
        now = float(np.mean(success[-PATIENCE:]))
        if best >= WORTH and now < best / 2:
            return Sign("rollout/success", best, now, f"{CALMER}, algo.kl_coef=0.01 with model/lora=adapter")
        return None
