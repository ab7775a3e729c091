"""What this machine can run: what is installed, what the chosen model would need in memory, and what to change.

Loads no weights and downloads none. The memory is an estimate, whose formulas stand in models/memory.py.
"""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_agents.config import DoctorConfig, HardwareConfig, LoraConfig, RunConfig
from vlm_agents.cores import affinity
from vlm_agents.errors import ConfigError
from vlm_agents.models import Agent
from vlm_agents.models.memory import ROOM, Memory, Work, blueprint, estimate, patches_of
from vlm_agents.policies import RandomPolicy
from vlm_agents.prompting import make_format
from vlm_agents.run import Run
from vlm_agents.stages.playing import first_prompts, fitted, open_envs, play_panel, refuse_too_long
from vlm_agents.types import Prompt, Trajectory

PACKAGE = "vlm-agents"
EPISODES = 4  # of random moves, whose longest prompt is taken for the longest there is
GIB = 1 << 30
USUAL = (24, 48, 80)  # GiB of GPUs
SMALLEST = {"tokens_per_microbatch": 1024, "num_envs": 4}
Rows = list[tuple[str, ...]]


def main(cfg: RunConfig, stage: DoctorConfig, run: Run) -> dict[str, float]:
    run.restore()
    agent = blueprint(cfg.model, cfg.hardware)
    work = work_of(cfg, stage, agent)
    run.begin()
    show("this machine", machine())
    show("packages", list(packages()))
    need, there = estimate(agent, work, cfg.hardware.device, cfg.model.quantize), memory_of(cfg.hardware)
    fits = need.peak * ROOM <= there
    show(f"{cfg.model.name} on {cfg.hardware.name}, {cfg.hardware.dtype}", table(cfg, agent, work, need, there))
    tell(cfg, work, need, there)
    metrics = {f"doctor/{name}_bytes": float(value) for name, value in asdict(need).items()}
    metrics |= {f"doctor/{name}_bytes": float(getattr(need, name)) for name in ("sampling", "update", "peak")}
    metrics |= {
        "doctor/machine_bytes": float(there),
        "doctor/fits": float(fits),
        "doctor/parameters": float(sum(parameter.numel() for parameter in agent.model.parameters())),
        "doctor/prompt_tokens": float(work.prompt),
        "doctor/gpus": float(torch.cuda.device_count()),
        "doctor/cpu_cores": float(len(affinity())),
    }
    run.log(0, metrics)
    return run.finish(metrics)


def expected(cfg: RunConfig) -> str | None:
    """What a run of another stage needs on each device; None where no model plays in it or is trained."""
    if cfg.stage.name not in ("ppo", "eval", "collect") or getattr(cfg.stage, "policy", "model") != "model":
        return None
    stage = DoctorConfig(num_envs=getattr(cfg.stage, "num_envs", 1))
    agent = blueprint(cfg.model, cfg.hardware)
    need = estimate(agent, work_of(cfg, stage, agent), cfg.hardware.device, cfg.model.quantize)
    return gib(need.peak if cfg.stage.name == "ppo" else need.weights + need.sampling)


def show(title: str, rows: Rows) -> None:
    """A table on stdout."""
    shown = Table(title=Text(title), title_justify="left", show_header=False)
    for row in rows:
        shown.add_row(*map(Text, row))  # no markup: a path may hold brackets
    Console().print(shown)


# ---- the machine -----------------------------------------------------------------------------------------------------
def machine() -> Rows:
    rows = [("python", platform.python_version()), ("CPU cores", str(len(affinity()))), ("memory", gib(host_memory()))]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{gpu.name}, {gib(gpu.total_memory)}"))
    return rows if torch.cuda.device_count() else [*rows, ("GPU", "none that torch sees")]


def packages() -> Iterator[tuple[str, ...]]:
    """What this package asks for, and which of it is here; for what isn't, the line that adds it."""
    for requirement in importlib.metadata.requires(PACKAGE) or []:
        wanted, _, marker = requirement.partition(";")
        name = re.split(r"[^\w.-]", wanted)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)", marker)
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            target = f"{PACKAGE}[{extra[1]}]" if extra else wanted.strip()
            found = f"absent: pip install '{target}'"
        yield name, found, f"extra {extra[1]}" if extra else ""


def host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_of(hardware: HardwareConfig) -> int:
    """Bytes of the device that the run would be on; 0 where it isn't here."""
    device = torch.device(hardware.device)
    if device.type != "cuda":
        return host_memory()
    index = device.index or 0
    return torch.cuda.get_device_properties(index).total_memory if index < torch.cuda.device_count() else 0


# ---- the model -------------------------------------------------------------------------------------------------------
def work_of(cfg: RunConfig, stage: DoctorConfig, agent: Agent) -> Work:
    """How much a run of `cfg` does at once; lengths are those of real prompts, cut as a run would cut them.

    ConfigError where the model has no positions for as much.
    """
    refuse_too_long(agent.renderer.context, "stage.prompt_tokens", stage.prompt_tokens, cfg.prompt.max_reply_tokens)
    prompts = prompts_of(cfg, stage, agent)
    ids, prompt = max(((len(agent.renderer.render(p).ids), p) for p in prompts), key=lambda pair: pair[0])
    pictures = [picture for message in prompt for picture in message.images]
    return Work(
        num_envs=stage.num_envs,
        prompt=stage.prompt_tokens or ids,
        reply=cfg.prompt.max_reply_tokens,
        patches=patches_of(agent, agent.family.pixels([p.image for p in pictures])["pixel_values"]) if pictures else 0,
        picture_tokens=sum(agent.family.image_tokens(picture.size) for picture in pictures),
        microbatch=cfg.hardware.tokens_per_microbatch,
    )


def prompts_of(cfg: RunConfig, stage: DoctorConfig, agent: Agent) -> list[Prompt]:
    if stage.prompt_tokens is not None:
        with open_envs(cfg.env, 1, "never") as envs:
            return first_prompts(cfg, envs, 1)
    policy = RandomPolicy(fitted(cfg, make_format(cfg.prompt), agent.renderer))
    played = list[Trajectory]()
    with open_envs(cfg.env, EPISODES, "never") as envs:
        play_panel(cfg, envs, policy, EPISODES, on_episode=played.append)
    return [turn.prompt for trajectory in played for turn in trajectory.turns]


def table(cfg: RunConfig, agent: Agent, work: Work, need: Memory, there: int) -> Rows:
    parameters = list(agent.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    local = cfg.model.path is None or Path(cfg.model.path).is_dir()
    return [
        ("weights", gib(need.weights), f"{sum(p.numel() for p in parameters):,} parameters"),
        ("optimizer", gib(need.optimizer), f"{trained:,} of them trained"),
        ("sampling: KV cache", gib(need.kv_cache), f"{work.num_envs} envs, {work.prompt} + {work.reply} tokens"),
        ("sampling: prefill", gib(need.prefill), f"{work.picture_tokens} tokens of a prompt are picture"),
        ("sampling in all", gib(need.sampling), ""),
        ("update: gradients", gib(need.gradients), ""),
        ("update: activations", gib(need.activations), f"{work.rows} rows a micro-batch"),
        ("update: logits", gib(need.logits), f"of {work.rows * work.reply} reply tokens"),
        ("update: optimizer step", gib(need.optimizer_step), "after activations and logits are gone"),
        ("update in all", gib(need.update), ""),
        ("peak", gib(need.peak), f"and {ROOM - 1:.0%} of room for libraries and fragmentation"),
        ("there is", gib(there), "" if there else f"no {cfg.hardware.device} device here"),
        ("tokens counted with", "the model's tokenizer" if local else "the tiny model's tokenizer", ""),
    ]


def advice(cfg: RunConfig, work: Work, there: int) -> list[str]:
    """Settings that make it fit, cheapest first, none without need. Empty if nothing does."""
    agents: dict[str, Agent] = {}

    def peak(tried: RunConfig) -> float:
        assert isinstance(tried.stage, DoctorConfig)
        key = f"{replace(tried.model, quantize=None)} {tried.hardware.dtype}"  # as a blueprint has it
        if key not in agents:
            agents[key] = blueprint(tried.model, tried.hardware)
        smaller = replace(work, num_envs=tried.stage.num_envs, microbatch=tried.hardware.tokens_per_microbatch)
        return ROOM * estimate(agents[key], smaller, tried.hardware.device, tried.model.quantize).peak

    now, taken = cfg, dict[tuple[str, str], Any]()
    for (group, name), values in [*changes(cfg)] * 2:  # again, for those that helped nothing before a later one
        for value in values:
            tried = changed(now, group, name, value)
            if tried and peak(now) > there and peak(tried) < peak(now):
                now, taken[group, name] = tried, value
    if peak(now) > there:
        return []
    for group, name in list(taken):
        back = changed(now, group, name, getattr(getattr(cfg, group), name))
        if back and peak(back) <= there:
            now = back
            del taken[group, name]
    return [
        "model/lora=adapter" if name == "lora" else f"{group}.{name}={str(value).lower()}"
        for (group, name), value in taken.items()
    ]


def changes(cfg: RunConfig) -> Iterator[tuple[tuple[str, str], list[Any]]]:
    """What may be set otherwise, from what costs least, and its values, from what changes least."""
    for group, name in (("hardware", "tokens_per_microbatch"), ("stage", "num_envs")):
        start = getattr(getattr(cfg, group), name)
        yield (group, name), [start >> halved for halved in range(1, 16) if start >> halved >= SMALLEST[name]]
    yield ("model", "gradient_checkpointing"), [True]
    yield ("hardware", "dtype"), ["bfloat16"]
    if cfg.model.lora is None:
        yield ("model", "lora"), [LoraConfig()]
    yield ("model", "quantize"), ["nf4"]


def changed(cfg: RunConfig, group: str, name: str, value: Any) -> RunConfig | None:
    """With this setting; None where it doesn't go with the others."""
    try:
        return replace(cfg, **{group: replace(getattr(cfg, group), **{name: value})})
    except ConfigError:
        return None


def tell(cfg: RunConfig, work: Work, need: Memory, there: int) -> None:
    """The last lines: does it fit, and if not, what would; for some usual sizes where the device isn't here."""
    console = Console()
    if not there:
        console.print(f"hardware.device={cfg.hardware.device} isn't here.", highlight=False)
    for size in [there] if there else [gibs * GIB for gibs in USUAL]:
        where = "" if there else f" {size // GIB} GiB"
        if ROOM * need.peak <= size:
            line = f"It fits{where}."
        elif settings := advice(cfg, work, size):
            phase = "update" if need.update >= need.sampling else "sampling"
            line = f"It doesn't fit{where}, for its {phase}. This does: {' '.join(settings)}"
        else:
            line = f"It doesn't fit{where}, nor with any setting: choose a smaller model=, or a larger machine."
        console.print(line, soft_wrap=True, highlight=False)


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
