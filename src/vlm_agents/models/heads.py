"""The small networks of our own on top of a transformers model: the critic's, and one that chooses a temperature."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm_agents.config import TemperatureHeadConfig, ValueHeadConfig
from vlm_agents.errors import ModelError
from vlm_agents.weights import TEMPERATURE_FILE

# In a folder of their own: servers (vLLM, SGLang) read every *.safetensors that lies beside config.json.
VALUE_FILE = "heads/value_head.safetensors"


class ValueHead(nn.Module):
    """Hidden state of the last prompt token -> expected return, fp32 whatever the backbone's dtype."""

    def __init__(self, width: int, config: ValueHeadConfig) -> None:
        super().__init__()
        self.stop_gradient = config.stop_gradient
        last = nn.Linear(config.hidden, 1)
        nn.init.zeros_(last.weight)  # a fresh critic expects nothing, rather than noise
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), last)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.net((hidden.detach() if self.stop_gradient else hidden).float()).squeeze(-1)


class TemperatureHead(nn.Module):
    """Hidden state of the last prompt token -> the temperature at which this turn's reply is sampled, fp32.

    The policy is then softmax(logits / temperature(prompt)): the policy gradient reaches the head through the
    log-probs, and makes replies sharper where that pays, and more varied where it doesn't. No gradient passes through
    the head to the backbone.
    """

    def __init__(self, width: int, config: TemperatureHeadConfig, start: float) -> None:
        super().__init__()
        self.low, self.high = config.low, config.high
        last = nn.Linear(config.hidden, 1)
        share = math.log(start / self.low) / math.log(self.high / self.low)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(share / (1 - share)))  # a fresh head says `start` everywhere
        self.net = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), last)

    def forward(self, hidden: Tensor) -> Tensor:
        share = torch.sigmoid(self.net(hidden.detach().float()).squeeze(-1))
        return self.low * (self.high / self.low) ** share


def save_heads(heads: Mapping[str, nn.Module], folder: Path) -> None:
    """Each head under its file's name in the model's folder."""
    for name, head in heads.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(head.state_dict(), folder / name, metadata=meaning_of(head))


def load_heads(heads: Mapping[str, nn.Module], folder: Path) -> None:
    """Take the heads saved in `folder`; one that isn't there stays fresh, one that means another is refused."""
    if TEMPERATURE_FILE not in heads and (folder / TEMPERATURE_FILE).is_file():
        raise ModelError(f"{folder / TEMPERATURE_FILE} would go unused: add model/temperature_head=learned")
    for name, head in heads.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            state, own = load_file(path), head.state_dict()
            with safe_open(path, "pt") as file:
                bounds = (file.metadata() or {}).get("settings")
        except SafetensorError as error:
            raise ModelError(
                f"{path} is damaged ({error}): put a whole copy there, or delete it for a fresh head"
            ) from error
        if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in own.items()}:
            raise ModelError(
                f"{path}: its shapes differ from model.{path.stem}; delete it, or use the hidden size it has"
            )
        if bounds and bounds != meaning_of(head).get("settings"):
            raise ModelError(f"{path} was trained within other bounds: set {bounds}")
        head.load_state_dict(state)


def meaning_of(head: nn.Module) -> dict[str, str]:
    """What a head's weights don't say and yet mean: the bounds of a temperature.

    One entry at most: safetensors writes several in any order, and equal runs leave equal files.
    """
    if not isinstance(head, TemperatureHead):
        return {}
    return {"settings": f"model.temperature_head.low={head.low:g} model.temperature_head.high={head.high:g}"}
