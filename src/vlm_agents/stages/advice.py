"""What to set so that it fits: the cheapest settings for the hardware that was asked for, or the hardware of a machine.

By estimates alone: see models/memory.py, and models/sharding.py for several ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vlm_agents.config import DoctorConfig, HardwareConfig, LoraConfig, RunConfig
from vlm_agents.errors import ConfigError
from vlm_agents.models import Agent
from vlm_agents.models.memory import ROOM, Memory, Work, blueprint, estimate
from vlm_agents.models.sharding import on_rank

SMALLEST = {"tokens_per_microbatch": 1024, "num_envs": 4}
GROUPS = (  # hardware=, its zero, and offload; from the fastest
    ("gpu", 0, "none"),
    ("ddp", 0, "none"),
    ("zero2", 2, "none"),
    ("zero3", 3, "none"),
    ("zero2", 2, "optimizer"),
    ("zero3", 3, "optimizer"),
    ("zero3", 3, "all"),
)
PROCESSES = 8  # of all but the first, as conf/hardware has them
Settings = dict[tuple[str, str], Any]  # (group, name): value


@dataclass(frozen=True, slots=True)
class Choice:
    words: str  # of the command line
    need: Memory  # of one of its ranks


class Estimates:
    """What a run with these prompts would need, by its config; nothing is drawn or counted twice."""

    def __init__(self) -> None:
        self._agents: dict[str, Agent] = {}
        self._needs: dict[str, Memory] = {}

    def agent(self, cfg: RunConfig) -> Agent:
        key = f"{replace(cfg.model, quantize=None)} {cfg.hardware.dtype}"  # as a blueprint has it
        if key not in self._agents:
            self._agents[key] = blueprint(cfg.model, cfg.hardware)
        return self._agents[key]

    def need(self, cfg: RunConfig, work: Work) -> Memory:
        """Of one rank."""
        mine = share(work, cfg)
        key = f"{cfg.model} {cfg.hardware} {mine}"
        if key not in self._needs:
            agent = self.agent(cfg)
            alone = estimate(agent, mine, cfg.hardware.device, cfg.model.quantize)
            self._needs[key] = on_rank(alone, agent, cfg.hardware)
        return self._needs[key]


def share(work: Work, cfg: RunConfig) -> Work:
    """One rank's, with the amounts that `cfg` asks for; `work` has the lengths."""
    assert isinstance(cfg.stage, DoctorConfig)
    envs = -(-cfg.stage.num_envs // cfg.hardware.ranks)
    return replace(work, num_envs=envs, microbatch=cfg.hardware.tokens_per_microbatch)


def asked(need: Memory, hardware: HardwareConfig) -> float:
    """Bytes of its device, with room; a CPU's are also where offload puts things."""
    return ROOM * (need.peak + (need.host if hardware.device == "cpu" else 0))


# ---- for the hardware that was asked for -----------------------------------------------------------------------------
def advice(cfg: RunConfig, work: Work, there: int, estimates: Estimates, dearest: int | None = None) -> Settings:
    """Settings that make it fit, cheapest first, none without need. Empty if nothing does, or it fits as it is.

    Only the first `dearest` of `changes` are tried.
    """

    def peak(tried: RunConfig) -> float:
        return asked(estimates.need(tried, work), tried.hardware)

    now, taken = cfg, Settings()
    for (group, name), values in [*changes(cfg)][
        :dearest
    ] * 2:  # again, for those that helped nothing before a later one
        for value in values:
            tried = changed(now, {(group, name): value})
            if tried and peak(now) > there and peak(tried) < peak(now):
                now, taken[group, name] = tried, value
    if peak(now) > there:
        return {}
    for group, name in list(taken):
        back = changed(now, {(group, name): getattr(getattr(cfg, group), name)})
        if back and peak(back) <= there:
            now = back
            del taken[group, name]
    return taken


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


def changed(cfg: RunConfig, settings: Settings) -> RunConfig | None:
    """With these settings; None where they don't go with the others."""
    try:
        for (group, name), value in settings.items():
            cfg = replace(cfg, **{group: replace(getattr(cfg, group), **{name: value})})
    except ConfigError:
        return None
    return cfg


def words(settings: Settings) -> list[str]:
    """As on the command line."""
    return [
        "model/lora=adapter" if name == "lora" else f"{group}.{name}={str(value).lower()}"
        for (group, name), value in settings.items()
    ]


# ---- for a machine ---------------------------------------------------------------------------------------------------
def choice(cfg: RunConfig, work: Work, gpus: int, there: int, estimates: Estimates) -> Choice | None:
    """The hardware= for one node of so many GPUs with so many bytes each, at the least cost: of those whose dearest
    setting is the cheapest, the fastest. None if nothing fits.

    Offload costs more time than the other settings that cost only time.
    """
    candidates = list(hardware_of(cfg, gpus))
    names = [name for (_, name), _ in changes(cfg)]
    for dearest in range(len(names) + 1):
        for said, tried in candidates:
            if tried.hardware.offload != "none" and dearest < names.index("dtype"):
                continue
            settings = advice(tried, work, there, estimates, dearest)
            need = estimates.need(changed(tried, settings) or tried, work)
            if asked(need, tried.hardware) <= there:
                return Choice(" ".join([*said, *words(settings)]), need)
    return None


def hardware_of(cfg: RunConfig, gpus: int) -> Iterator[tuple[list[str], RunConfig]]:
    """The words and the config of every hardware= for so many GPUs of one node."""
    for name, zero, offload in GROUPS:
        if name != "gpu" if gpus > 1 else name == "gpu" or offload != "none":
            own = {"name": name, "device": "cuda", "processes": gpus, "nodes": 1, "zero": zero, "offload": offload}
            own |= {} if zero else {"deepspeed": None}
            said = [f"hardware={name}"]
            said += [f"hardware.processes={gpus}"] if name != "gpu" and gpus != PROCESSES else []
            said += [f"hardware.offload={offload}"] if offload != "none" else []
            yield said, replace(cfg, hardware=replace(cfg.hardware, **own))
