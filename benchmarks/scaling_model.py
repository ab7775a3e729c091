"""A model of one iteration of stage=ppo on many GPUs: plain arithmetic over the constants below, printed as the table
in docs/scaling.md. Nothing of it was run: no GPU was there. `python benchmarks/scaling_model.py [--all]`

No phase overlaps another, every episode is as long as the mean, and every link is as fast as a lone transfer on it.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

# ---- an iteration (assumed; more GPUs play more) ---------------------------------------------------------------------
EPISODES = 32  # of each GPU, all at once
TURNS = 16
PROMPT, REPLY = 400, 100  # tokens of a turn
EPOCHS, MINIBATCHES = 1, 8  # algo.epochs as by default; algo.minibatch_turns grows with the GPUs
MICROBATCH = 4096  # hardware.tokens_per_microbatch of hardware=gpu
LORA_RANK = 16  # as by default
GPUS = (8, 64, 256)
HARDWARE = (("ddp", 0), ("zero2", 2), ("zero3", 3))

# ---- an H100 SXM and a node of eight ---------------------------------------------------------------------------------
FLOPS = 989e12  # bf16, dense: glennklockwood.com/garden/processors/h100, after NVIDIA's data sheet
HBM = 3.35e12  # bytes/s: the same page
MEMORY = 80 * 2**30 / 1.1  # bytes, with the room that doctor leaves
NVLINK = 450e9  # bytes/s one way, of 900 both ways: the same page
NODE = 400e9  # bytes/s out of a node: eight of 400 Gb/s (mlcommons/inference_results_v4.1, H200-SXM-141GBx8)
LINKS = 0.8  # of that is reached: 376 of 450 GB/s (github.com/NVIDIA/nccl/issues/1264), rounded down
MFU = 0.2  # of FLOPS, assumed
HOST_LINK = 2e9  # bytes/s of gloo between processes, assumed

# ---- measured on one core of an AMD EPYC, `python benchmarks/scaling_inputs.py` --------------------------------------
TURN_BYTES = 87_264  # pickled, with a picture of 168 x 168
LARGE_TURN_BYTES = 3_000_137  # with one of 1000 x 1000
CONTROL = 607e-6  # seconds a turn, on every rank for the turns of all
LAUNCH_LAYER, LAUNCH_REST = 923e-6, 3544e-6  # seconds of the host for a decoded token


class Model(NamedTuple):
    name: str
    parameters: float  # with the vision part
    text: float  # without it; what full training trains
    layers: int
    hidden: int
    inner: int
    kv: int  # key-value heads x head size

    @property
    def lora(self) -> float:
        """Parameters of an adapter on every linear layer of the text part."""
        attention = 4 * self.hidden + 2 * (self.hidden + self.kv)
        return LORA_RANK * self.layers * (attention + 3 * (self.hidden + self.inner))


MODELS = (  # 3B and 7B: conf/model. 32B: Qwen/Qwen2.5-32B's model card, and 0.7 B of vision as 7B has
    Model("3B", 3.755e9, 3.086e9, 36, 2048, 11008, 256),
    Model("7B", 8.292e9, 7.616e9, 28, 3584, 18944, 512),
    Model("32B", 33.2e9, 32.5e9, 64, 5120, 27648, 1024),
)


class Iteration(NamedTuple):
    """Of one GPU. Bytes sent, and seconds."""

    memory: float
    flops: float
    moved: float
    prefill: float
    decode: float
    decode_by_graphs: float  # were launches free
    compute: float
    links: float
    episodes: float
    large_episodes: float
    control: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode + self.compute + self.links + self.episodes + self.control

    @property
    def bottleneck(self) -> str:
        names = ("prefill", "decode", "compute", "links", "episodes", "control")
        return max(names, key=lambda name: getattr(self, name))


def iteration(model: Model, lora: bool, zero: int, gpus: int) -> Iteration:
    # memory as in models/sharding.py, without what is asked for activations
    weights, trained = 2 * model.parameters, model.lora if lora else model.text
    turns = EPISODES * TURNS
    tokens = turns * (PROMPT + REPLY)
    forward = 2 * model.text  # FLOPs of a token; what attention adds is small at these lengths
    backward = forward if lora else 2 * forward
    update = tokens * (forward + EPOCHS * (forward + backward))  # bfloat16 is read once more before
    prefill = turns * PROMPT * forward
    host = LAUNCH_LAYER * model.layers + LAUNCH_REST
    cache = EPISODES * (PROMPT + REPLY / 2) * 4 * model.layers * model.kv
    read = (weights + cache) / HBM
    passes = EPOCHS * tokens / MICROBATCH  # backward
    steps, part = EPOCHS * MINIBATCHES, (gpus - 1) / gpus
    moved = (
        part
        * {
            0: steps * 2 * 2 * trained,
            2: passes * 2 * 2 * trained
            + steps * 2 * trained,  # summed after every backward pass; then weights gathered
            3: weights * (1 + 2 * passes + tokens / MICROBATCH) + passes * 2 * trained,
        }[zero]
    )
    everything = gpus * turns
    return Iteration(
        memory={
            0: weights + (2 + 12 + 8) * trained,
            2: weights + 24 * trained / gpus + 6 * min(5e8, trained),
            3: weights + weights / gpus + 16 * trained / gpus + 6 * min(5e8, trained),
        }[zero]
        + cache,
        flops=prefill + turns * REPLY * forward + update,
        moved=moved,
        prefill=prefill / (FLOPS * MFU),
        decode=TURNS * REPLY * max(host, read),
        decode_by_graphs=TURNS * REPLY * read,
        compute=update / (FLOPS * MFU),
        links=moved / (LINKS * (NVLINK if gpus <= 8 else NODE)),
        episodes=everything * TURN_BYTES / HOST_LINK,
        large_episodes=everything * LARGE_TURN_BYTES / HOST_LINK,
        control=everything * CONTROL,
    )


def table(everything: bool = False) -> Iterator[str]:
    """Markdown: of each model the hardware that is fastest of those that fit or, of `everything`, each."""
    yield (
        "| model, GPUs | trained | hardware | GB a GPU | PFLOPs | GB sent | prefill | decode | as graphs | update | "
        "links | episodes | control | iteration | most |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        for gpus in GPUS:
            for lora in (False, True):
                found = [(name, iteration(model, lora, zero, gpus)) for name, zero in HARDWARE]
                least = min(found, key=lambda pair: (pair[1].memory > MEMORY, pair[1].seconds))
                for name, one in found if everything else [least]:
                    seconds = (one.prefill, one.decode, one.decode_by_graphs, one.compute, one.links, one.episodes)
                    cells = [f"{one.memory / 1e9:.0f}", f"{one.flops / 1e15:.0f}", f"{one.moved / 1e9:.0f}"]
                    cells += [f"{value:.0f}" for value in (*seconds, one.control, one.seconds)] + [one.bottleneck]
                    if one.memory > MEMORY:
                        name, cells = name if everything else "none fits", [cells[0], *["-"] * 11]
                    said = [f"{model.name}, {gpus}", "LoRA" if lora else "full", name, *cells]
                    yield f"| {' | '.join(said)} |"


if __name__ == "__main__":
    print("\n".join(table("--all" in sys.argv)))
