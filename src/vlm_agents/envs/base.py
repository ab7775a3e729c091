"""What an env is to the rest of the package, and the check that holds every env to it.

Text in, pictures and text out. No behaviour is inherited from here: an env is whatever satisfies the Protocol.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from vlm_agents.errors import EnvError
from vlm_agents.types import Observation, Step


class Env(Protocol):
    """One game at a time, played by words. Never resets itself; out of turn calls raise EnvError."""

    @property
    def name(self) -> str: ...

    @property
    def instructions(self) -> str:
        """What the game is and which actions it knows, for the system prompt; constant during the env's life."""
        ...

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed`, and nothing else, decides."""
        ...

    def step(self, action: str | None) -> Step:
        """Play one turn. None, or a word that is not legal, lets the turn pass in which nothing is done.

        `metrics` holds at least success, legal and changed, each 0 or 1; changed says whether `state_key` did.
        """
        ...

    def close(self) -> None: ...


def state_key(*parts: object) -> str:
    """A short name for the state that `parts` describe; equal for equal parts, on every machine."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def out_of_turn(name: str) -> EnvError:
    """The error of a step before a reset or after the end of the episode."""
    return EnvError(f"{name}: no episode is running; call reset(seed) before the first step and after the last one")


def check_action(game: Any, action: Any) -> None:
    """EnvError where a Gymnasium env is asked for what its action space doesn't hold."""
    if not game.action_space.contains(action):
        raise EnvError(f"{type(game).__name__}.step({action!r}): its actions are 0 to {game.action_space.n - 1}")


def check_contract(make: Callable[[], Env], seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Play a few episodes and raise EnvError at the first thing that an env must not do."""
    first, second = make(), make()
    _require(bool(first.name) and bool(first.instructions), first, "has no name or no instructions")
    _require_refusal(first, "steps before the first reset")
    for seed in seeds:
        _check_episode(first, second, seed)
        second.reset(seed + 1)  # the next comparison must not hang on what was played before
    first.close()
    second.close()


def _check_episode(first: Env, second: Env, seed: int) -> None:
    """Play `seed` on both envs with the same random words, some of them illegal, and compare."""
    instructions = first.instructions
    now, twin = first.reset(seed), second.reset(seed)
    rng = np.random.default_rng(seed)
    over = False
    while not over:
        _require(_same(now, twin), first, f"shows different things for seed {seed}")
        words = [*(now.legal_actions or ("",)), None, "no such action"]
        action = words[rng.integers(len(words))]
        step = first.step(action)
        other = second.step(action)
        _require(step.reward == other.reward, first, f"rewards seed {seed} differently")
        _check_step(first, now, action, step)
        over, now, twin = step.terminated or step.truncated, step.observation, other.observation
    _require(first.instructions == instructions, first, "changes its instructions")
    _require_refusal(first, "steps after the end")


def _check_step(env: Env, before: Observation, action: str | None, step: Step) -> None:
    metrics = step.metrics
    for name in ("success", "legal", "changed"):
        _require(metrics.get(name) in (0.0, 1.0), env, f"metrics['{name}'] is {metrics.get(name)}, not 0 or 1")
    _require(not (step.terminated and step.truncated), env, "both terminates and truncates")
    _require(not metrics["success"] or step.terminated, env, "succeeds without terminating")
    if before.legal_actions is not None:
        _require(metrics["legal"] == (action in before.legal_actions), env, f"is wrong about '{action}' being legal")
    _require(bool(step.observation.state_key), env, "gives no state_key")
    changed = step.observation.state_key != before.state_key
    _require(metrics["changed"] == changed, env, f"says changed={metrics['changed']} where state_key says {changed}")


def _same(one: Observation, other: Observation) -> bool:
    pixels = [tuple(image.tobytes() for image in seen.images) for seen in (one, other)]
    facts = [(seen.text, seen.legal_actions, seen.state_key) for seen in (one, other)]
    return pixels[0] == pixels[1] and facts[0] == facts[1]


def _require(condition: bool, env: Env, failing: str) -> None:
    if not condition:
        raise EnvError(f"{env.name}: {failing}")


def _require_refusal(env: Env, failing: str) -> None:
    try:
        env.step(None)
    except EnvError:
        return
    raise EnvError(f"{env.name}: {failing} without raising EnvError")
