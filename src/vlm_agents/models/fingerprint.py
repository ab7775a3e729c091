"""What tells one set of weights from another: a few values of every tensor. An adapter knows its base by it.

Every tensor, because training and merging may leave any of them as it was: embeddings, as a rule. No tolerance but that
of rounding: a merged adapter changes its base by less than a percent. So values are compared after rounding to the
narrower of their two dtypes, and what NF4 makes of a value can be told from the largest of its block.

Not told apart: changes so small that rounding, to bfloat16 or to 4 bits, takes them out of all the values looked at;
and, where 4 bits of float32 are held against bfloat16, such as move less than `SLIPS` of the codes, as that rounding
does itself. Of tensors quantised otherwise, only the names count.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_agents.errors import ModelError
from vlm_agents.models.adapters import BASE_FILE

VALUES = 8  # of each tensor
BLOCK = 64  # weights that share a scale in NF4
NF4 = (  # the 16 levels of arXiv 2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SLIPS = 0.02  # share of codes; rounding to bfloat16 first moves less than 1 % of them to the next level


def save_base(model: nn.Module, folder: Path) -> None:
    """Write what tells the weights under the adapters of `model`."""
    (folder / BASE_FILE).write_text(json.dumps({"tensors": fingerprint(model)}))


def differing(model: nn.Module, folder: Path) -> list[str]:
    """Names of tensors in which `model` isn't the base of the adapter in `folder`; [] where it is, or nothing tells.

    ModelError where the file is damaged. Files of earlier versions hold 64 values of the embeddings alone.
    """
    path = folder / BASE_FILE
    if not path.is_file():
        return []
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if "tensors" in saved:
            return compare(saved["tensors"], fingerprint(model))
        return [] if same_embeddings(model, saved["embeddings"]) else ["the embeddings"]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:  # ValueError: JSON's, encoding's
        raise ModelError(
            f"{path} is damaged ({type(error).__name__}: {error}): put a whole copy of the adapter there"
        ) from error


def fingerprint(model: nn.Module) -> dict[str, dict[str, Any] | None]:
    """A sample of each parameter of the base, by the name that it has without adapters."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): sample(parameter)
        for name, parameter in model.named_parameters()
        if not any(part.startswith("lora_") for part in name.split("."))
    }


def sample(parameter: Tensor) -> dict[str, Any] | None:
    """`VALUES` values of a tensor in 16 bits or more, or their codes in NF4; None for other ways of quantising."""
    state = getattr(parameter, "quant_state", None)
    if state is not None and (state.quant_type, state.blocksize) == ("nf4", BLOCK):
        where = places(math.prod(state.shape), parameter.device)
        packed = parameter.data.view(torch.uint8).flatten()[where // 2]  # two to a byte, the first in the upper half
        codes = torch.where(where % 2 == 0, packed >> 4, packed & 15)
        return {"dtype": name_of(state.dtype), "shape": list(state.shape), "codes": codes.tolist()}
    if state is not None or not parameter.is_floating_point() or parameter.itemsize < 2:
        return None
    flat = parameter.detach().flatten()
    where = places(len(flat), flat.device)
    block = where[:, None] // BLOCK * BLOCK + torch.arange(BLOCK, device=flat.device)
    largest = flat[block.clamp(max=len(flat) - 1)].abs().amax(-1)
    sampled = {"values": flat[where].tolist(), "largest": largest.tolist()}
    return {"dtype": name_of(parameter.dtype), "shape": list(parameter.shape), **sampled}


def places(length: int, device: torch.device) -> Tensor:
    """[<= VALUES] places spread over a flat tensor, in different columns: a step of whole rows would stay in one."""
    return torch.arange(0, length, max(1, length // VALUES - 1), device=device)[:VALUES]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that only one of two fingerprints has, or that differ in shape or values."""
    apart, slipped, total, allowed = sorted(saved.keys() ^ own.keys()), [], 0, 0.0
    for name in sorted(saved.keys() & own.keys()):
        pair = saved[name], own[name]
        if None in pair:
            continue
        narrow = max((getattr(torch, one["dtype"]) for one in pair), key=lambda dtype: torch.finfo(dtype).eps)
        coded = [one for one in pair if "codes" in one]
        if pair[0]["shape"] != pair[1]["shape"]:
            apart.append(name)
        elif coded:
            a, b = (codes_of(one, narrow) for one in pair)
            slipped += [name for code, other in zip(a, b, strict=True) if code != other]
            total += len(a)
            if any(getattr(torch, one["dtype"]) != narrow for one in coded):  # codes can't be rounded any more
                allowed = SLIPS
        elif not same_values(*pair, narrow):
            apart.append(name)
    return apart + sorted(set(slipped)) if len(slipped) > allowed * total else apart


def codes_of(sampled: Mapping[str, Any], dtype: torch.dtype) -> list[int]:
    """Codes in NF4: those that it has, or those of its values, rounded to `dtype`."""
    if "codes" in sampled:
        return sampled["codes"]
    levels = torch.tensor(NF4)
    values, largest = (torch.tensor(sampled[key]).to(dtype).float() for key in ("values", "largest"))
    return torch.bucketize(values / largest.clamp(min=1e-38), (levels[1:] + levels[:-1]) / 2).tolist()


def same_values(one: Mapping[str, Any], other: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Random weights of equal seeds may differ in the last bit between machines: hence 1e-6 and not 0."""
    a, b = (torch.tensor(sampled["values"], dtype=torch.float64).to(dtype).double() for sampled in (one, other))
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)


def same_embeddings(model: Any, saved: list[float]) -> bool:
    weights = model.get_input_embeddings().weight.detach().flatten()
    own = weights[:: max(1, len(weights) // 64)][:64].tolist()
    return len(own) == len(saved) and all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(own, saved, strict=True))
