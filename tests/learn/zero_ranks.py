"""What test_zero.py runs, as one rank of several: `zero_ranks.py <rank> <ranks> <port> <folder> <part> ...`.

Rank 0 leaves what was found as `<folder>/found_by_<ranks>.json`.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ |= dict(zip(("RANK", "WORLD_SIZE", "MASTER_PORT"), sys.argv[1:4], strict=True))
os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": sys.argv[1], "DS_ACCELERATOR": "cpu"}

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig, TrainableConfig, conf_dir
from vlm_agents.learn.engine import Engine, TorchEngine
from vlm_agents.learn.zero import ZeroEngine
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row
from vlm_agents.types import Message, Prompt, Sampling
from vlm_agents.world import World, joined

LORA = LoraConfig(rank=4, alpha=8)
MODES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": LORA}, "qlora": {"lora": LORA, "quantize": "nf4"}}
CASES = {  # model, way of training, is the vision part frozen
    "full": ("tiny", "full", False),
    "lora": ("tiny", "lora", True),
    "qlora": ("tiny", "qlora", True),
    "llava": ("tiny_llava", "full", False),
}
LR = 1e-4  # that of algo.lr. Adam's first steps are of this size even where a gradient is mostly rounding
PICTURES = [1, 0, 2, 1, 0, 1, 1]  # of each row: in some passes of a rank there is none
Told = list[tuple[float, float, float]]


class Trainee:
    """An agent, the engine of its policy and that of its value head."""

    def __init__(self, world: World, case: str, zero: int, dtype: str = "float32", **hardware: Any) -> None:
        name, mode, frozen = CASES[case]
        said = yaml.safe_load((conf_dir() / f"model/{name}.yaml").read_text())
        del said["defaults"]
        settings = HardwareConfig("cpu", dtype=dtype, zero=zero, **hardware)
        torch.manual_seed(1)
        self.agent: Agent = load_agent(
            ModelConfig(**said, **MODES[mode], train=TrainableConfig(not frozen, not frozen)), settings
        )
        for parameter_name, parameter in self.agent.named_parameters():
            if "lora_B" in parameter_name or "value_head" in parameter_name:
                nn.init.normal_(parameter, std=0.05)
        self.world, self.rows = world, list(rows(self.agent))
        policy = self.agent.parameters_by_role()["policy"]
        self.value = TorchEngine(list(self.agent.value_head.parameters()), 0.01, 1.0, world)
        self.engine: Engine = (
            ZeroEngine(self.agent, policy, settings, 0.01, 0.5, world)
            if zero
            else TorchEngine(policy, 0.01, 0.5, world)
        )

    def train(self, steps: int) -> Told:
        """Of each step the loss, and the norms of the policy's and the value head's gradients."""
        return [self.step() for _ in range(steps)]

    def step(self, factor: float = 1.0) -> tuple[float, float, float]:
        """Rows are dealt, 4 and 3 to two ranks, of which the first two go together: 3 and 2 passes, and one to pad."""
        first, second, *rest = self.world.share(self.rows)
        parts = [[first, second], *([row] for row in rest)]
        weights = [1.0] * len(parts)
        if self.engine.even:
            missing = max(self.world.gather(len(parts))) - len(parts)
            parts, weights = parts + [parts[-1]] * missing, weights + [0.0] * missing
        total = 0.0
        for part, weight in zip(parts, weights, strict=True):
            scores = self.agent.score(part)
            worth = self.agent.value(scores.states).square().sum()
            loss = weight / 10 * (scores.logprobs.sum() + 0.1 * scores.entropy.sum() + worth)
            self.engine.backward(loss * factor)
            total += loss.item()
        value_norm = self.value.step(LR)
        return sum(self.world.gather(total)), self.engine.step(LR), value_norm

    def weights(self) -> dict[str, Tensor]:
        with self.engine.whole():
            return {name: one.detach().clone() for name, one in self.agent.named_parameters() if one.requires_grad}


def prompt_of(index: int) -> Prompt:
    noise = [
        Image.fromarray(np.random.default_rng([index, place]).integers(0, 256, (56, 84, 3), dtype=np.uint8))
        for place in range(PICTURES[index])
    ]
    system = Message("system", ("You play a game on a grid. Answer as JSON.",))
    return system, Message("user", (*map(Picture, noise), "what now? " * index + "go"))


def rows(agent: Agent) -> Iterable[Row]:
    for index in range(len(PICTURES)):
        rendered = agent.renderer.render(prompt_of(index))
        reply = [30 + index, 31, 32][: 1 + index % 3]
        span = (len(rendered.ids), len(rendered.ids) + len(reply))
        yield Row(str(index), np.concatenate([rendered.ids, reply]).astype(np.int64), rendered.images, (span,))


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The furthest that a tensor is, as a share of its norm. Without the biases of keys in LLaVA's vision part, which
    knows no rotary positions: each adds the same to all scores of a query, which a softmax doesn't see. Their gradient
    is rounding (1e-17 of all in fp64, 1e-10 in fp32), of which Adam makes a step."""
    names = [name for name in wanted if not ("vision_tower" in name and name.endswith("k_proj.bias"))]
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in names)


def off(found: Told, wanted: Told) -> float:
    """The furthest that a figure is, as a share of it."""
    pairs = [pair for steps in zip(found, wanted, strict=True) for pair in zip(*steps, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def kept(folder: Path) -> dict[str, Tensor]:
    """All tensors that ranks wrote there."""
    return {name: tensor for path in folder.iterdir() for name, tensor in load_file(path).items()}


def sample(trainee: Trainee) -> list[tuple[int, ...]]:
    """This rank's share of 7 prompts, 4 or 3 of them, at once: so many steps of decoding as it takes."""
    agent = trainee.agent
    mine = trainee.world.share(range(len(PICTURES)))
    rngs = [np.random.default_rng([0, index]) for index in mine]
    length = 5 + 3 * trainee.world.rank
    with trainee.engine.whole():
        sampler = HFSampler(agent)
        sampler.sync()
        return [reply.token_ids for reply in sampler.generate(list(map(prompt_of, mine)), rngs, Sampling(length))]


def equality(world: World, folder: Path, found: dict[str, Any]) -> None:
    for case in CASES:
        alone = Trainee(World(), case, 0)
        told, weights = alone.train(3), alone.weights()
        for zero in (0, 2, 3):
            trainee = Trainee(world, case, zero)
            found[f"{case} {zero}"] = off(trainee.train(3), told), apart(trainee.weights(), weights)


def resuming(world: World, folder: Path, found: dict[str, Any]) -> None:
    for zero in (2, 3):
        whole, part = Trainee(world, "full", zero), Trainee(world, "full", zero)
        (place := folder / str(zero)).mkdir(exist_ok=True)
        (end := folder / f"{zero}_end").mkdir(exist_ok=True)
        world.wait()
        whole.train(3)
        part.train(3)
        part.engine.save(place)
        again = Trainee(world, "full", zero)
        with torch.no_grad():
            for mine, its in zip(again.agent.value_head.parameters(), part.agent.value_head.parameters(), strict=True):
                mine.copy_(its)
        again.value.load_state_dict(part.value.state_dict())
        world.wait()
        again.engine.load(place)
        shown = same(again.weights(), part.weights())
        told = again.train(3) == whole.train(3)
        again.engine.save(end)
        found[f"resumed {zero}"] = shown, told, same(again.weights(), whole.weights())
    for zero, other in ((2, 3), (3, 2)):
        trainee = Trainee(world, "full", other)
        trainee.engine.load(folder / str(zero))
        (place := folder / f"{zero}_{other}").mkdir(exist_ok=True)
        world.wait()
        trainee.engine.save(place)
        world.wait()
        found[f"from {zero} to {other}"] = same(kept(place), kept(folder / str(zero)))


def alone(world: World, folder: Path, found: dict[str, Any]) -> None:
    """One rank goes on from what two wrote."""
    for zero in (2, 3):
        trainee = Trainee(world, "full", zero)
        trainee.engine.load(folder / str(zero))
        (place := folder / f"{zero}_alone").mkdir()
        trainee.engine.save(place)
        found[f"alone {zero}"] = same(kept(place), kept(folder / str(zero)))
        trainee.train(3)
        (end := folder / f"{zero}_alone_end").mkdir()
        trainee.engine.save(end)
        found[f"alone {zero}, later"] = apart(kept(end), kept(folder / f"{zero}_end"))


def the_rest(world: World, folder: Path, found: dict[str, Any]) -> None:
    for zero in (2, 3):
        trainee, plain = Trainee(world, "full", zero), Trainee(world, "full", 0)
        trainee.train(1)
        plain.train(1)
        found[f"sampled {zero}"] = all(world.gather(sample(trainee) == sample(plain)))
        before = trainee.weights()
        _, norm, _ = trainee.step(factor=math.inf if world.rank == 1 else 1.0)
        after = trainee.weights()
        stays = all(torch.equal(after[name], before[name]) for name in before if "value_head" not in name)
        found[f"not finite {zero}"] = math.isfinite(norm), all(world.gather(stays))
        saved, wanted = folder / f"model_{zero}", folder / f"model_{zero}_plain"
        with trainee.engine.whole():
            if world.main:  # as a run does
                trainee.agent.save(saved)
                plain.agent.save(wanted)
                written, meant = load_file(saved / "model.safetensors"), load_file(wanted / "model.safetensors")
                found[f"saved {zero}"] = apart(written, meant)
        found[f"goes on {zero}"] = math.isfinite(trainee.step()[1])
    for name, zero, settings in (
        ("bf16", 2, {"dtype": "bfloat16"}),
        ("bf16", 3, {"dtype": "bfloat16"}),
        ("offload", 2, {"offload": "optimizer"}),
        ("offload", 3, {"offload": "all"}),
    ):
        dtype = settings.pop("dtype", "float32")
        plain = Trainee(world, "full", 0, dtype)
        trainee = Trainee(world, "full", zero, dtype, **settings)
        told = plain.train(3)
        found[f"{name} {zero}"] = off(trainee.train(3), told), apart(trainee.weights(), plain.weights())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined("cpu") as joined_world:
        results: dict[str, Any] = {}
        parts = {part.__name__: part for part in (equality, resuming, alone, the_rest)}
        for name in sys.argv[5:]:
            parts[name](joined_world, Path(sys.argv[4]), results)
        if joined_world.main:
            (Path(sys.argv[4]) / f"found_by_{joined_world.ranks}.json").write_text(json.dumps(results))
