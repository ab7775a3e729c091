"""DeepSpeed's ZeRO as an engine: gradients and optimizer divided among ranks, with stage 3 the weights too.

DeepSpeed is called directly. Its checkpoints are not used: `save` writes whole tensors by the parameter's name, so that
any number of ranks, and either stage, can go on from them.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from vlm_agents.config import HardwareConfig
from vlm_agents.errors import DataError
from vlm_agents.learn.zero_settings import REFUSALS, refused, zero_config
from vlm_agents.tensors import Scores
from vlm_agents.world import World, backend, telling_of_peers

warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls

KEPT = ("exp_avg", "exp_avg_sq")  # of AdamW, beside the weights in fp32
MASTER = "master"


class Root(nn.Module):
    """What DeepSpeed sees of a module: all of it but what stands `apart`, under one call.

    A parent of what is apart isn't here itself: its other children and its own parameters are.
    """

    def __init__(self, module: nn.Module, apart: Sequence[nn.Module]) -> None:
        super().__init__()
        self.training = module.training
        self.call = module.forward
        self._take("", module, {id(one) for one in apart})

    def _take(self, name: str, module: nn.Module, apart: set[int]) -> None:
        if id(module) in apart:
            return
        if name and not any(id(one) in apart for one in module.modules()):
            self.add_module(name, module)
            return
        for key, parameter in module.named_parameters(recurse=False):
            self.register_parameter(f"{name}/{key}", parameter)
        for key, child in module.named_children():
            self._take(f"{name}/{key}", child, apart)

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        scores = self.call(*inputs)
        found = {field.name: getattr(scores, field.name) for field in fields(Scores)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class ZeroEngine:
    """AdamW over some parameters of a module, whose `forward` gives Scores and from here on goes through DeepSpeed.

    Not of the module's `apart`, which stays whole on every rank. AdamW steps in fp32 whatever the weights' precision,
    an adapter's being that of hardware.dtype too. A parameter that no loss reaches has a gradient of zeros, so that
    weight decay moves it, other than with TorchEngine.
    """

    even = True

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        hardware: HardwareConfig,
        weight_decay: float,
        max_grad_norm: float,
        world: World,
    ) -> None:
        self.module, self.world, self.steps, self.stage = module, world, 0, hardware.zero
        own = set(parameters)
        self.names = {name: parameter for name, parameter in module.named_parameters() if parameter in own}
        self.others = [one for one in module.parameters() if one.requires_grad and one not in own]
        config = zero_config(hardware, max_grad_norm, sum(one.numel() for one in self.names.values()))
        self.root = Root(module, getattr(module, "apart", ()))
        optimizer = torch.optim.AdamW(list(self.names.values()), weight_decay=weight_decay)
        join(hardware.device)
        try:
            with redirect_stdout(StringIO()), telling_of_peers():
                made: Any = deepspeed.initialize(model=self.root, optimizer=optimizer, config=config)
        except REFUSALS as error:
            if hardware.deepspeed:
                raise refused(hardware.deepspeed, error) from error
            raise
        self.engine, self.zero = made[:2]
        module.zero = self.stage  # type: ignore[assignment]
        self._divert()

    def _divert(self) -> None:
        self.module.forward = self._forward

    def _forward(self, *inputs: Any) -> Scores:
        with telling_of_peers():
            return Scores(**self.engine(*inputs))

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed takes the mean over ranks: hence times their number, which others' gradients are spared."""
        ranks = self.world.ranks
        spared = [one.register_hook(partial(torch.mul, other=1 / ranks)) for one in self.others if ranks > 1]
        try:
            with telling_of_peers():
                self.engine.backward(loss * ranks)
        finally:
            for hook in spared:
                hook.remove()

    def step(self, lr: float) -> float:
        for group in self.zero.param_groups:
            group["lr"] = lr
        with telling_of_peers():
            self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        self.steps += math.isfinite(norm)
        return norm

    @contextmanager
    def whole(self) -> Iterator[None]:
        """With stage 3 its hooks, which would divide the weights again after each module, are away meanwhile."""
        if self.stage != 3:
            yield
            return
        offload = self.zero.parameter_offload
        offload.partition_all_parameters()
        del self.module.forward
        with telling_of_peers(), deepspeed.zero.GatheredParameters(list(self.root.parameters())):
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(self.root)
                self._divert()

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """Weights in fp32, Adam's means and its count of steps: each parameter's gathered, and written by one rank."""
        rank, ranks = self.world.rank, self.world.ranks
        mine: dict[str, Tensor] = {}
        for place, (name, parameter) in enumerate(self.names.items()):
            for key in (MASTER, *KEPT) if self.steps else (MASTER,):
                with telling_of_peers():
                    whole = self._whole_of(parameter, key)
                if place % ranks == rank:
                    mine[f"{key}/{name}"] = whole.cpu().contiguous()
        save_file(mine, folder / f"optimizer_{rank:05d}_of_{ranks:05d}.safetensors", {"steps": str(self.steps)})

    @staticmethod
    def _whole_of(parameter: nn.Parameter, key: str) -> Tensor:
        """Of all ranks' parts; its weights in fp32, or what Adam keeps of it."""
        if key == MASTER:
            return safe_get_full_fp32_param(parameter)  # type: ignore[return-value] - it is trained
        return safe_get_full_optimizer_state(parameter, key)  # type: ignore[return-value] - it was stepped

    def load(self, folder: Path) -> None:
        """DataError where files are missing, or are of other parameters."""
        with opened(folder) as (steps, read):
            self.steps = steps
            self._make_state()
            for name, parameter in self.names.items():
                self._put(parameter, read(f"{MASTER}/{name}"), None)
                for key in KEPT if steps else ():
                    self._put(parameter, read(f"{key}/{name}"), key)
        self._show()

    def _make_state(self) -> None:
        """AdamW's state, which it makes in its first step."""
        flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        adam = self.zero.optimizer
        adam.state.clear()
        if self.steps:
            for one in flat:
                adam.state[one] = {"step": torch.tensor(float(self.steps))} | {
                    key: torch.zeros_like(one) for key in KEPT
                }
        if self.steps and self.stage != 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _put(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """This rank's part of what belongs to the parameter: of its state `key`, or of its fp32 weights."""
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        if value.shape != shape:
            raise DataError(f"a tensor of the optimizer is {list(value.shape)}, and the model's {list(shape)}")
        if self.stage != 3:
            value = value.to(parameter.device)
            safe_set_full_optimizer_state(parameter, value, key) if key else safe_set_full_fp32_param(parameter, value)
            return
        size = parameter.ds_tensor.numel()  # the last rank's is filled up
        part = value.new_zeros(size)
        there = value.flatten()[self.world.rank * size :][:size]
        part[: len(there)] = there
        safe_set_local_optimizer_state(parameter, part, key) if key else safe_set_local_fp32_param(parameter, part)

    def _show(self) -> None:
        """Have the module's weights be what those in fp32 are."""
        if self.stage != 3:
            self.zero.update_lp_params()
            return
        self.zero.parameter_offload.partition_all_parameters()
        for index in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)


@contextmanager
def opened(folder: Path) -> Iterator[tuple[int, Callable[[str], Tensor]]]:
    """The number of steps, and what reads a tensor by its name, of all that ranks have written to `folder`."""
    paths = sorted(folder.glob("optimizer_*_of_*.safetensors"))
    if not paths or len(paths) != int(paths[0].stem.split("_")[-1]):
        raise DataError(f"{folder} holds {len(paths)} files of the optimizer, and not all: put a whole copy there")
    files: list[Any] = [safe_open(path, "pt") for path in paths]
    at = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it isn't a dict

    def read(name: str) -> Tensor:
        if name not in at:
            raise DataError(f"{folder} lacks {name}: what is trained was another part of the model")
        return at[name].get_tensor(name)

    yield int(files[0].metadata()["steps"]), read


def join(device: str) -> None:
    """Have DeepSpeed use the process group that there is; of one process alone, which has none, a group of its own."""
    on_gpu = device.startswith("cuda")
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it would be compiled now, for a minute
    if not dist.is_initialized():
        dist.init_process_group(backend(device), store=HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed asks for
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
