"""The stages, a module each: `main(cfg, stage, run)` does it and returns its metrics."""

from importlib import import_module

from vlm_agents.config import RunConfig
from vlm_agents.run import Run


def main(cfg: RunConfig, run: Run) -> dict[str, float]:
    """Do the stage of `cfg`; no other one is imported."""
    return import_module(f"{__name__}.{cfg.stage.name}").main(cfg, cfg.stage, run)
