"""Episodes as earlier versions wrote them, in today's layout: JSON in, JSON out, before anything is made of it.

1  no version; pictures stand beside a message's text; success, legal, changed and a rating are metrics of a step
2  today's
"""

from typing import Any

from vlm_agents.errors import DataError

VERSION = 2  # of the layout that is written


def upgraded(episode: Any) -> Any:
    """The episode of a line in today's layout; DataError where a later version wrote it. What is no episode of version
    1 raises whatever it does: KeyError, TypeError or AttributeError."""
    version = episode.pop("version", 1)
    if type(version) is int and version > VERSION:
        raise DataError(
            f"an episode of layout {version}, and this vlm_agents reads those up to {VERSION}: install the version "
            "that wrote it, or a later one"
        )
    if version == VERSION:
        return episode
    if version != 1:
        raise ValueError(f"{version!r:.60} is no version of episodes")
    return {**episode, "turns": [_turn(turn, episode["policy"]) for turn in episode["turns"]]}


def _turn(turn: dict[str, Any], policy: str) -> dict[str, Any]:
    step = {**turn["step"], "observation": _observation(turn["step"]["observation"])}
    metrics = dict(step["metrics"])
    for name in ("success", "legal", "changed"):  # hand-made ones may lack them
        step[name] = bool(metrics.pop(name, name != "success"))
    rating = metrics.pop("quality", None)
    return {
        **turn,
        "observation": _observation(turn["observation"]),
        "prompt": [_message(message) for message in turn["prompt"]],
        "reply": {**turn["reply"], "source": _source(turn["reply"], policy)},
        "step": {**step, "metrics": metrics},
        "rating": rating,
    }


def _observation(observation: dict[str, Any]) -> dict[str, Any]:
    return {**observation, "images": [{"picture": name} for name in observation["images"]]}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key not in ("text", "images")}
    return {**kept, "parts": [*({"picture": name} for name in message["images"]), message["text"]]}


def _source(reply: dict[str, Any], policy: str) -> str:
    """Who answered, by what version 1 told it by: a draw had an entropy and no tokens."""
    if reply["token_ids"]:
        return "model"
    if reply["entropy"] is not None or policy == "random":
        return "random"
    return "server" if policy.startswith("remote") else "expert" if policy.startswith("expert") else "model"
