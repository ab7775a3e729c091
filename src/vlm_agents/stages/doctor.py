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

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_agents.config import DoctorConfig, HardwareConfig, RunConfig
from vlm_agents.cores import affinity
from vlm_agents.models import Agent
from vlm_agents.models.memory import ROOM, Memory, Work, patches_of
from vlm_agents.policies import ExpertPolicy, RandomPolicy
from vlm_agents.prompting import make_format
from vlm_agents.run import Run
from vlm_agents.stages.advice import Estimates, advice, asked, choice, share, words
from vlm_agents.stages.playing import continued, first_prompts, fitted, open_envs, play_panel, refuse_too_long
from vlm_agents.types import Prompt, Trajectory

PACKAGE = "vlm-agents"
EPISODES = 4  # of random moves, whose longest prompt is taken for the longest there is
GIB = 1 << 30
USUAL = (24, 48, 80)  # GiB of GPUs
MACHINES = ((1, 24), (1, 80), (8, 80))  # GPUs, and GiB of each
HOST_TOO_SMALL = (
    "It fits the GPUs, and not the memory of the CPU, where ranks collect what they save, and where hardware.offload "
    "puts the rest: have more nodes with fewer hardware.processes each, or set hardware.offload=none, where it is on"
)
Rows = list[tuple[str, ...]]


def main(cfg: RunConfig, stage: DoctorConfig, run: Run) -> dict[str, float]:
    run.restore()
    estimates = Estimates()
    agent = estimates.agent(cfg)
    work = work_of(cfg, stage, agent)
    run.begin()
    show("this machine", machine())
    show("packages", list(packages()))
    need, there = estimates.need(cfg, work), memory_of(cfg.hardware)
    fits = asked(need, cfg.hardware) <= there and host_suffices(need, cfg.hardware)
    show(f"{cfg.model.name} on {cfg.hardware.name}, {cfg.hardware.dtype}", table(cfg, agent, work, need, there))
    tell(cfg, work, need, there, estimates)
    if cfg.hardware.device != "cpu":
        tell_machines(cfg, work, estimates)
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
    stage, estimates = DoctorConfig(num_envs=getattr(cfg.stage, "num_envs", 1)), Estimates()
    need = estimates.need(replace(cfg, stage=stage), work_of(cfg, stage, estimates.agent(cfg)))
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
    """Bytes of the device that a rank would be on, the smallest of several; 0 where one isn't here."""
    device = torch.device(hardware.device)
    if device.type != "cuda":
        return host_memory() // hardware.processes
    first = device.index or 0
    wanted = range(first, first + hardware.processes)
    if wanted.stop > torch.cuda.device_count():
        return 0
    return min(torch.cuda.get_device_properties(index).total_memory for index in wanted)


# ---- the model -------------------------------------------------------------------------------------------------------
def work_of(cfg: RunConfig, stage: DoctorConfig, agent: Agent) -> Work:
    """How much all ranks of `cfg` do at once; lengths are those of real prompts, cut as a run would cut them.

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
        continued=continued(cfg),
    )


def prompts_of(cfg: RunConfig, stage: DoctorConfig, agent: Agent) -> list[Prompt]:
    if stage.prompt_tokens is not None:
        with open_envs(cfg.env, 1, "never") as envs:
            return first_prompts(cfg, envs, 1)
    free, played = cfg.env.free_text, list[Trajectory]()
    policy = (ExpertPolicy if free else RandomPolicy)(fitted(cfg, make_format(cfg.prompt), agent.renderer))
    with open_envs(cfg.env, EPISODES, "always" if free else "never") as envs:
        if free and not envs.has_expert:  # nobody's turns are known; stage.prompt_tokens says how long chats grow
            return first_prompts(cfg, envs, EPISODES)
        play_panel(cfg, envs, policy, EPISODES, on_episode=played.append)
    return [turn.prompt for trajectory in played for turn in trajectory.turns]


def table(cfg: RunConfig, agent: Agent, work: Work, need: Memory, there: int) -> Rows:
    parameters = list(agent.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    local = cfg.model.path is None or Path(cfg.model.path).is_dir()
    mine = share(work, cfg)
    rows = [
        ("weights", need.weights, f"{sum(p.numel() for p in parameters):,} parameters"),
        ("optimizer", need.optimizer, f"{trained:,} of them trained"),
        ("sampling: weights gathered", need.gathered, "whole, beside this rank's part"),
        ("sampling: KV cache", need.kv_cache, f"{mine.num_envs} envs, {work.prompt} + {work.reply} tokens"),
        ("sampling: prefill", need.prefill, f"{work.picture_tokens} tokens of a prompt are picture"),
        ("sampling in all", need.sampling, ""),
        ("update: gradients", need.gradients, ""),
        ("update: buckets", need.buckets, "of gradients under way between ranks"),
        ("update: weights gathered", need.live, "of the layers at work"),
        ("update: activations", need.activations, f"{work.rows} rows a micro-batch"),
        ("update: logits", need.logits, f"of {work.rows * work.reply} reply tokens"),
        ("update: optimizer step", need.optimizer_step, "after activations and logits are gone"),
        ("update in all", need.update, ""),
        ("peak", need.peak, f"and {ROOM - 1:.0%} of room for libraries and fragmentation"),
        ("CPU memory", need.host, f"to save and by offload, for each of {cfg.hardware.processes} ranks on a node"),
    ]
    return [
        *((name, gib(count), says) for name, count, says in rows if count),  # without ZeRO some are nothing
        ("there is", gib(there), "" if there else f"no {cfg.hardware.device} device for each rank here"),
        ("tokens counted with", "the model's tokenizer" if local else "the tiny model's tokenizer", ""),
    ]


def tell(cfg: RunConfig, work: Work, need: Memory, there: int, estimates: Estimates) -> None:
    """The last lines: does it fit, and if not, what would; for some usual sizes where the device isn't here."""
    console = Console()
    if not there:
        console.print(lacking(cfg.hardware), highlight=False)
    for size in [there] if there else [gibs * GIB for gibs in USUAL]:
        where = "" if there else f" {size // GIB} GiB"
        if asked(need, cfg.hardware) <= size:
            line = f"It fits{where}." if not there or host_suffices(need, cfg.hardware) else HOST_TOO_SMALL
        elif settings := advice(cfg, work, size, estimates):
            phase = "update" if need.update >= need.sampling else "sampling"
            line = f"It doesn't fit{where}, for its {phase}. This does: {' '.join(words(settings))}"
        else:
            line = f"It doesn't fit{where}, nor with any setting: choose a smaller model=, or a larger machine."
        console.print(line, soft_wrap=True, highlight=False)


def tell_machines(cfg: RunConfig, work: Work, estimates: Estimates) -> None:
    """For some usual machines the hardware= that fits, with what has to be set beside it."""
    for gpus, gibs in MACHINES:
        line = f"On {gpus} x {gibs} GiB nothing fits: choose a smaller model=."
        if found := choice(cfg, work, gpus, gibs * GIB, estimates):
            host = f", {gib(gpus * found.need.host)} of CPU memory" if found.need.host else ""
            line = f"On {gpus} x {gibs} GiB: {found.words} ({gib(found.need.peak)} a GPU{host})"
        Console().print(line, soft_wrap=True, highlight=False)


def lacking(hardware: HardwareConfig) -> str:
    if hardware.processes > 1:
        return f"{hardware.processes} GPUs aren't here, one for each of hardware.processes on a node."
    return f"hardware.device={hardware.device} isn't here."


def host_suffices(need: Memory, hardware: HardwareConfig) -> bool:
    """Is there CPU memory for what the ranks of a node keep there? On a CPU that is in what is asked of the device."""
    return hardware.device == "cpu" or ROOM * need.host * hardware.processes <= host_memory()


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
