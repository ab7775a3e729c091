"""What every test runs under: no network, no display, one thread, no telemetry. Set before heavy imports."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from vlm_agents.config import RunConfig, conf_dir, parse, register

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    SDL_VIDEODRIVER="dummy",
    SDL_AUDIODRIVER="dummy",
    PYGAME_HIDE_SUPPORT_PROMPT="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
)

ComposeRun = Callable[..., RunConfig]


@pytest.fixture
def compose_run(tmp_path: Path) -> ComposeRun:
    """`compose_run("stage=ppo", ...)`: the checked configuration of a run in this test's folder, tracking=jsonl."""

    def composed(*overrides: str) -> RunConfig:
        register()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return parse(compose("config", ["name=test", f"run_dir={tmp_path / 'run'}", "tracking=jsonl", *overrides]))

    return composed
