"""What a choice of settings needs of this machine and may not be there. Looked for without torch."""

import ctypes
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from vlm_agents.errors import ConfigError, ModelError


def refuse_no_bitsandbytes(quantize: str | None) -> None:
    if quantize and find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantize={quantize} needs bitsandbytes: pip install it, or set model.quantize=null")


def refuse_no_gpu(device: str, gpus: int, reason: str = "", processes: int = 1) -> None:
    """ConfigError where there are too few GPUs for a `device` of type cuda, and so many processes with one each."""
    if not gpus:
        several = ", or hardware.device=cpu hardware.dtype=float32, which leaves ranks as they are"
        raise ConfigError(
            f"hardware.device={device}: torch sees no GPU here{reason}; set hardware=cpu{several * (processes > 1)}"
        )
    if int(device.partition(":")[2] or 0) >= gpus:
        raise ConfigError(f"hardware.device={device}: torch numbers {gpus} GPUs here, from 0 on")
    if processes > gpus:
        there = f"torch sees {gpus} GPU{'s' if gpus > 1 else ''} here"
        raise ConfigError(f"hardware.processes={processes}: {there}; set hardware.processes={gpus}")


def refuse_no_driver(device: str, processes: int = 1) -> None:
    """`refuse_no_gpu` by what torch's package and NVIDIA's driver say; where they don't, torch will."""
    try:
        build = version("torch")
    except PackageNotFoundError:
        return
    if not device.startswith("cuda") or "+rocm" in build or sys.platform != "linux":
        return
    if "+cpu" in build:
        refuse_no_gpu(device, 0, f" (its build, {build}, is for CPUs alone)", processes)
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        refuse_no_gpu(device, 0, " (NVIDIA's driver isn't installed)", processes)
    else:
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            count.value = 0
        refuse_no_gpu(device, count.value, processes=processes)
