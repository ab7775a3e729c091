"""What a run computes on."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
    processes: int = setting(
        1, "ranks on each node, that play and learn side by side, each on a device of its own", low=1, may_change=True
    )
    nodes: int = setting(1, "machines with as many ranks each", low=1, may_change=True)
    zero: int = setting(
        0,
        "what DeepSpeed divides among the ranks. 0: nothing, and gradients are summed without it; 2: gradients and "
        "optimizer; 3: weights too, which are gathered once an iteration to play",
        choices=Literal[0, 2, 3],
    )
    offload: str = setting(
        "none",
        "what DeepSpeed keeps in the memory of the CPU. optimizer: its state and step; all: weights too, with zero=3",
        choices=Literal["none", "optimizer", "all"],
    )
    deepspeed: Any = setting(
        None,
        "further settings of DeepSpeed, by its own names: hardware.deepspeed.zero_optimization.overlap_comm=true",
    )
    restarts: int = setting(
        2, "times that all ranks begin again from the newest checkpoint after one was killed", low=0, may_change=True
    )

    @property
    def ranks(self) -> int:
        return self.processes * self.nodes

    def check(self, run: "RunConfig") -> None:
        if not (self.deepspeed is None or isinstance(self.deepspeed, dict)):
            raise ConfigError(f"hardware.deepspeed={self.deepspeed} must be settings: hardware.deepspeed.<key>=<value>")
        if not self.zero and (self.offload != "none" or self.deepspeed):
            raise ConfigError(
                "hardware.offload and hardware.deepspeed are read by DeepSpeed alone: set hardware=zero2 or zero3"
            )
        if self.zero and run.stage.name == "sft":
            raise ConfigError(
                f"hardware.zero={self.zero}: stage=sft sums gradients without DeepSpeed; set hardware=ddp for it, in a "
                "chain sft.hardware=ddp"
            )
        if self.offload == "all" and self.zero != 3:
            raise ConfigError("hardware.offload=all: weights aren't divided below hardware.zero=3; set optimizer")
        if self.ranks > 1 and ":" in self.device:
            raise ConfigError(
                f"hardware.device={self.device} is one GPU, and {self.ranks} ranks were asked for: set "
                "hardware.device=cuda, and CUDA_VISIBLE_DEVICES to those that may be taken"
            )
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"hardware.device={self.device} isn't known here: set cpu, cuda or cuda:<number>")
