"""What an env is to the rest of the package, the check that holds every env to it, and the one on every answer.

Text in, pictures and text out. No behaviour is inherited from here: an env is whatever satisfies the Protocol.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np

from vlm_agents.errors import EnvError
from vlm_agents.pictures import Picture
from vlm_agents.types import Advice, Claim, Observation, Step

SECONDS = "seconds_"  # begins the name of a metric that is measured, and is another number each time
FLAGS = ("terminated", "truncated", "success", "legal", "changed")  # of a step


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

        `changed` says whether `state_key` did.
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


# ---- each answer -----------------------------------------------------------------------------------------------------
def checked_observation(seen: Observation) -> Observation:
    """The same in plain types, its pictures loaded and RGB. EnvError where a part isn't what `Observation` says."""
    _expect(isinstance(seen, Observation), "the observation", seen, "no Observation")
    legal = seen.legal_actions
    if legal is not None:
        _expect(isinstance(legal, tuple | list), "legal_actions", legal, "neither a tuple of texts nor None")
        legal = tuple(_text("a legal action", action) for action in legal)
    advice = checked_advice(seen.advice, legal)
    _expect(isinstance(seen.images, tuple | list), "images", seen.images, "no tuple of pictures")
    images = tuple(map(_picture, seen.images))
    _expect(isinstance(seen.tags, Mapping), "tags", seen.tags, "no mapping of names to texts")
    tags = {_text("a tag's name", name): _text(f"tags['{name}']", value) for name, value in seen.tags.items()}
    words, key, places = _text("the text", seen.text), _text("state_key", seen.state_key), tuple(seen.places)
    task = _text("the task", seen.task)
    inside = all(isinstance(one, Integral) and 0 <= one <= len(words) for one in places)
    fit = inside and sorted(places) == list(places) and len(places) in (0, len(images))
    _expect(fit, "places", places, f"not where each of {len(images)} pictures stands in the text, in order")
    return Observation(words, images, legal, key, advice, tags, tuple(map(int, places)), task)


def checked_advice(advice: Advice | None, legal: tuple[str, ...] | None) -> Advice | None:
    """The same in plain types. EnvError where it is none, or advises what isn't among the actions that are `legal`."""
    if advice is None:
        return None
    _expect(isinstance(advice, Advice), "the advice", advice, "neither an Advice nor None")
    distance = advice.distance
    counts = distance is None or (isinstance(distance, Real) and 0 <= distance < math.inf)
    _expect(counts, "the advised distance", distance, "neither None nor a number of turns")
    thought, action = _text("the advised thought", advice.thought), _text("the advised action", advice.action)
    if legal:  # there may be none where the episode is over
        _expect(action in legal, "the advised action", action, f"none of the legal ones: {', '.join(legal)}")
    return Advice(thought, action, None if distance is None else int(distance))


def checked_step(step: Step) -> Step:
    """The same in plain types; where both ends are said, termination is the one that counts. EnvError as above."""
    _expect(isinstance(step, Step), "what came of the step", step, "no Step")
    for name in FLAGS:
        _expect(isinstance(getattr(step, name), bool | np.bool_), name, getattr(step, name), "neither True nor False")
    _expect(isinstance(step.metrics, Mapping), "metrics", step.metrics, "no mapping of names to numbers")
    metrics = {_text("a metric's name", name): _number(f"metrics['{name}']", x) for name, x in step.metrics.items()}
    terminated, truncated, success, legal, changed = (bool(getattr(step, name)) for name in FLAGS)
    reward, truncated = _number("the reward", step.reward), truncated and not terminated
    seen, claim = checked_observation(step.observation), step.claim
    _expect(isinstance(claim, Claim | None), "the claim", claim, "neither a Claim nor None")
    _expect(claim is None or (terminated and not success), "the claim", claim, "made before the end, or after success")
    return Step(seen, reward, terminated, truncated, success, legal, changed, metrics, claim and checked_claim(claim))


def checked_claim(claim: Claim) -> Claim:
    """The same in plain types. EnvError where a part isn't what `Claim` says."""
    texts = ("question", "answer", "right", "source")
    words = {name: _text(f"the claim's {name}", getattr(claim, name)) for name in texts}
    options = tuple(_text("a claim's option", option) for option in claim.options)
    return Claim(**words, options=options, reward=_number("the claim's reward", claim.reward))


def _picture(picture: Picture) -> Picture:
    _expect(isinstance(picture, Picture), "a picture", picture, "no vlm_agents.pictures.Picture")
    _expect(min(picture.size) > 0, "a picture", picture.size, "without a pixel")
    return picture


def _text(name: str, value: str) -> str:
    _expect(isinstance(value, str), name, value, "no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EnvError(
            f"{name} has half a surrogate pair at character {error.start}, no text for a tokenizer"
        ) from error
    return str(value)


def _number(name: str, value: float) -> float:
    _expect(isinstance(value, Real | np.bool_) and math.isfinite(value), name, value, "no finite number")
    return float(value)


def _expect(right: bool, name: str, value: object, wrong: str) -> None:
    if not right:
        raise EnvError(f"{name} is {value!r:.60}, {wrong}")


# ---- all that an env must do -----------------------------------------------------------------------------------------
def check_contract(make: Callable[[], Env], seeds: tuple[int, ...] = (0, 1, 2), turns: int | None = None) -> None:
    """Play a few episodes on two envs and raise EnvError at the first thing that an env must not do.

    `make` gives a new env at each call. `turns`: leave off after so many of each episode; None: at its end.
    """
    first, second = make(), make()
    try:
        told = all(isinstance(text, str) and text for text in (first.name, first.instructions))
        _require(told, "has no name or no instructions")
        _require_refusal(first, "steps before the first reset")
        for seed in seeds:
            _check_episode(first, second, seed, turns)
            second.reset(seed + 1)  # the next comparison must not hang on what was played before
    except EnvError as error:
        raise EnvError(f"{first.name}: {error}") from error
    finally:
        first.close()
        second.close()


def _check_episode(first: Env, second: Env, seed: int, turns: int | None) -> None:
    """Play `seed` on both envs with the same random words, some of them illegal, and compare."""
    instructions = first.instructions
    now, twin = first.reset(seed), second.reset(seed)
    for answer in (now, twin):
        checked_observation(answer)
    rng = np.random.default_rng(seed)
    over, played = False, 0
    while not over and played != turns:
        _require(_same(now, twin), f"shows different things for seed {seed}")
        if (legal := now.legal_actions) is not None:
            plain = {" ".join(word.lower().split()) for word in legal} - {""}
            _require(0 < len(plain) == len(legal), f"can't be told by words which of {legal} is meant")
        words = [*(now.legal_actions or ("",)), None, "no such action"]
        action = words[rng.integers(len(words))]
        step, other = first.step(action), second.step(action)
        for answer in (step, other):
            checked_step(answer)
        _require(step.reward == other.reward, f"rewards seed {seed} differently")
        same = _steady(step, now) == _steady(other, now)
        _require(same, f"ends, succeeds or counts differently for seed {seed}")
        _check_step(now, action, step)
        over, now, twin = step.terminated or step.truncated, step.observation, other.observation
        played += 1
    _require(first.instructions == instructions, "changes its instructions")
    if over:
        _require_refusal(first, "steps after the end")


def _check_step(before: Observation, action: str | None, step: Step) -> None:
    _require(not (step.terminated and step.truncated), "both terminates and truncates")
    _require(not step.success or step.terminated, "succeeds without terminating")
    if before.legal_actions is not None:
        _require(step.legal == (action in before.legal_actions), f"is wrong about '{action}' being legal")
    _require(bool(step.observation.state_key), "gives no state_key")
    changed = step.observation.state_key != before.state_key
    _require(step.changed == changed, f"says changed={step.changed} where state_key says {changed}")


def _steady(step: Step, seen: Observation) -> Step:
    """What a seed decides of a step but for what is seen: not how long something took."""
    metrics = {name: value for name, value in step.metrics.items() if not name.startswith(SECONDS)}
    return replace(step, observation=seen, metrics=metrics)


def _same(one: Observation, other: Observation) -> bool:
    return replace(one, advice=None) == replace(other, advice=None)


def _require(condition: bool, failing: str) -> None:
    if not condition:
        raise EnvError(failing)


def _require_refusal(env: Env, failing: str) -> None:
    try:
        env.step(None)
    except EnvError:
        return
    raise EnvError(f"{failing} without raising EnvError")
