"""What a run computes on."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, setting
from vlm_agents.errors import ConfigError

if TYPE_CHECKING:
    from vlm_agents.config.run import RunConfig


@dataclass
class HardwareConfig(Part, place="hardware"):
    name: str = setting(MISSING, "chosen by hardware=")
    device: str = setting("cpu", "torch device that the model lives on", wanted="cpu, cuda, cuda:<number>")
    dtype: str = setting(
        "float32", "number format of the weights and activations", choices=Literal["float32", "bfloat16"]
    )
    threads: int | None = setting(
        None,
        "torch CPU threads; null: as many as cores are free when the run begins, 8 at most, or OMP_NUM_THREADS; kept "
        "with the run, for rounding depends on it",
        low=1,
        high=1024,
    )
    tokens_per_microbatch: int = setting(
        8192, "padded tokens in one forward and backward pass; less needs less memory", low=1
    )

    def check(self, run: "RunConfig") -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"hardware.device={self.device} isn't known here: set cpu, cuda or cuda:<number>")
