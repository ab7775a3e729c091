"""Any Gymnasium env played by words: what it draws is the picture, and each of its Discrete actions has a word.

What is legal, success, and the name of a state are taken from the env as `GymnasiumConfig` says. It holds no expert.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from PIL import Image

from vlm_agents.config import GymnasiumConfig
from vlm_agents.envs.base import out_of_turn, state_key
from vlm_agents.errors import EnvError, did_you_mean
from vlm_agents.imports import module, told
from vlm_agents.pictures import Picture
from vlm_agents.types import Observation, Step


class GymnasiumEnv:
    """One game. `game` is the Gymnasium env without its wrappers, which experts read and nobody else does.

    A turn without a legal action passes and the game isn't stepped; it counts for the limit of turns, which is
    `env.max_steps`, or else the id's own.
    """

    def __init__(self, cfg: GymnasiumConfig) -> None:
        self.cfg = cfg
        self.name = cfg.id
        self._env = _make(cfg)
        self.game = self._env.unwrapped
        self._first, self._limit = _first_and_limit(self._env, cfg)
        self.words = tuple(cfg.actions)
        self.instructions = f"{cfg.instructions.strip()} Actions: {', '.join(self.words)}."
        self._running = False
        self._now = Observation("")

    @staticmethod
    def check(cfg: GymnasiumConfig) -> None:
        """EnvError where no such id is registered."""
        _spec(cfg)

    def reset(self, seed: int) -> Observation:
        seen, info = self._env.reset(seed=seed)
        self._turn, self._return, self._running = 0, 0.0, True
        self._now = self._observe(seen, info)
        return self._now

    def step(self, action: str | None) -> Step:
        if not self._running:
            raise out_of_turn(self.name)
        before = self._now
        assert before.legal_actions is not None
        legal, reward, terminated, truncated, success = action in before.legal_actions, 0.0, False, False, False
        if legal:
            number = self._first + self.words.index(str(action))
            seen, paid, terminated, truncated, info = self._env.step(number)
            reward = float(paid)
            self._return += reward
            self._now = self._observe(seen, info)
            success = bool(terminated) and self._succeeded(reward, info)
        self._turn += 1
        truncated = not terminated and (bool(truncated) or self._turn >= self._limit)
        self._running = not (terminated or truncated)
        changed = self._now.state_key != before.state_key
        return Step(self._now, reward, bool(terminated), truncated, success, legal, changed)

    def close(self) -> None:
        self._env.close()
        self._running = False

    def _succeeded(self, reward: float, info: Mapping[str, Any]) -> bool:
        """Of an episode that terminated."""
        if self.cfg.success is not None:
            return bool(self._told(info, "success", self.cfg.success))
        return reward > 0 if self.cfg.success_return is None else self._return >= self.cfg.success_return

    def _observe(self, seen: Any, info: Mapping[str, Any]) -> Observation:
        picture = self._picture()
        match self.cfg.state:
            case "observation":
                key = state_key(_plain(seen))
            case "picture":
                key = state_key(picture.tobytes())
            case name:
                key = state_key(_plain(self._told(info, "state", name)))
        return Observation("", (Picture(picture),), self._legal(info), key)

    def _legal(self, info: Mapping[str, Any]) -> tuple[str, ...]:
        if self.cfg.legal is None:
            return self.words
        mask = np.asarray(self._told(info, "legal", self.cfg.legal)).ravel()
        if len(mask) != len(self.words):
            raise EnvError(
                f"env.legal={self.cfg.legal}: its mask has {len(mask)} entries for {len(self.words)} actions"
            )
        return tuple(word for word, allowed in zip(self.words, mask, strict=True) if allowed)

    def _picture(self) -> Image.Image:
        pixels = self._env.render()
        if not (isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.dtype == np.uint8):
            raise EnvError(f"env.id={self.name} draws {type(pixels).__name__}, and no [H W 3] array of bytes")
        picture, side = Image.fromarray(pixels), self.cfg.picture
        if side is None or max(picture.size) == side:
            return picture
        scale = side / max(picture.size)
        width, height = (max(1, round(length * scale)) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)

    def _told(self, info: Mapping[str, Any], setting: str, key: str) -> Any:
        if key not in info:
            known = ", ".join(map(str, info)) or "nothing"
            raise EnvError(f"env.{setting}={key}: info of {self.name} has no such key, it has {known}")
        return info[key]


def _plain(value: Any) -> Any:
    """An observation as something whose `repr` holds all of it, in an order that doesn't change."""
    match value:
        case np.ndarray():
            return value.shape, value.dtype.str, value.tobytes()
        case np.generic():
            return value.item()
        case Mapping():
            return sorted((str(name), _plain(part)) for name, part in value.items())
        case list() | tuple():
            return [_plain(part) for part in value]
    return value


def _spec(cfg: GymnasiumConfig) -> Any:
    if cfg.module:
        module(f"env.module={cfg.module}", cfg.module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is a newer version
            return gymnasium.spec(cfg.id)
    except (gymnasium.error.Error, ImportError) as error:
        hint = did_you_mean(cfg.id, gymnasium.registry)
        raise EnvError(
            f"env.id={cfg.id}: no such id is registered.{hint} env.module=<package> imports the package that "
            "registers it"
        ) from error


def _make(cfg: GymnasiumConfig) -> gymnasium.Env:
    """The env, without a limit of Gymnasium's."""
    spec = _spec(cfg)
    kwargs = cfg.kwargs or {}
    if clash := {"id", "render_mode", "max_episode_steps", "disable_env_checker"} & kwargs.keys():
        raise EnvError(f"env.kwargs: {', '.join(sorted(clash))} can't be set there; the limit is env.max_steps")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it thinks of ids, and of how it is made
            env = gymnasium.make(
                cfg.id, render_mode="rgb_array", max_episode_steps=-1, disable_env_checker=True, **kwargs
            )
    except Exception as error:
        modes = _modes(spec)
        if modes is not None and "rgb_array" not in modes:
            raise _cannot_draw(cfg, modes) from error
        raise EnvError(f"env.id={cfg.id} can't be made with env.kwargs={kwargs}: {told(error)}") from error
    if "rgb_array" not in (modes := env.metadata.get("render_modes") or ()):
        raise _cannot_draw(cfg, modes)
    return env


def _modes(spec: Any) -> Any:
    """The ways in which the env of this spec can be drawn; None where only making it would tell."""
    try:
        made_by = load_env_creator(spec.entry_point)
    except Exception:  # noqa: BLE001 (foreign code, whose error is told where the env is made)
        return None
    return getattr(made_by, "metadata", {}).get("render_modes")


def _cannot_draw(cfg: GymnasiumConfig, modes: Any) -> EnvError:
    return EnvError(f"env.id={cfg.id} can't be drawn: its render modes are {', '.join(modes) or 'none'}, no rgb_array")


def _first_and_limit(env: gymnasium.Env, cfg: GymnasiumConfig) -> tuple[int, int]:
    """The number of the first action, and the limit of turns; one EnvError for all that the settings lack."""
    space = env.action_space
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise EnvError(f"env.id={cfg.id} has the actions {space}; only Discrete ones can each have a word")
    first, last = int(space.start), int(space.start + space.n) - 1
    limit = cfg.max_steps or _spec(cfg).max_episode_steps or 0  # 0: none
    lacking = []
    if len(cfg.actions) != space.n:
        lacking.append(
            f"env.actions has {len(cfg.actions)} words, and {cfg.id} has {space.n} actions, {first} to {last}: give a "
            "word for each, in this order"
        )
    if not limit:
        lacking.append(f"env.id={cfg.id} has no limit of its own, and an episode must end: set env.max_steps")
    if lacking:
        raise EnvError("; ".join(lacking))
    return first, limit
