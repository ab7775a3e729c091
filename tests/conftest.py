"""What every test runs under: no network, no display, one thread, no telemetry. Set before heavy imports."""

import importlib
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
RunStage = Callable[..., Path]


@pytest.fixture
def compose_run(tmp_path: Path) -> ComposeRun:
    """`compose_run("stage=ppo", ...)`: the checked configuration of a run in this test's folder, tracking=jsonl."""

    return lambda *overrides: composed("name=test", f"run_dir={tmp_path / 'run'}", "tracking=jsonl", *overrides)


def composed(*overrides: str) -> RunConfig:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return parse(compose("config", list(overrides)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with random weights, whose tokenizer knows what is said in Echo and MiniGrid."""
    from vlm_agents.config import EchoConfig, MiniGridConfig, PromptConfig
    from vlm_agents.models.tiny import build
    from vlm_agents.policies import ExpertPolicy
    from vlm_agents.prompting import make_format
    from vlm_agents.rollout import collect
    from vlm_agents.stages.playing import open_envs

    said = []
    for cfg in (EchoConfig(), MiniGridConfig(id="MiniGrid-Empty-Random-5x5-v0")):
        for name in ("action_only", "cot_json"):
            prompt_format = make_format(PromptConfig(name))
            with open_envs(cfg, 4, advised=True) as envs:
                policy = ExpertPolicy(prompt_format)
                for episode in collect(envs, policy, prompt_format, range(12), invalid_penalty=0.0, run_seed=0):
                    for turn in episode.turns:
                        said += [*(message.text for message in turn.prompt), turn.reply.text]
    folder = tmp_path_factory.mktemp("tiny")
    build(folder, said)
    return folder


@pytest.fixture(scope="session")
def echo_run(tiny_model: Path) -> ComposeRun:
    """`echo_run(folder, "stage=ppo", ...)`: the configuration of a run in `folder` on Echo, with a random tiny model
    and short replies. What is given replaces a setting here."""

    def compose_run(folder: Path, *overrides: str) -> RunConfig:
        settings = {
            "name": "test",
            "run_dir": folder,
            "tracking": "jsonl",
            "env": "echo",
            "prompt": "action_only",
            "prompt.max_reply_tokens": 4,
            "model.path": tiny_model,
            "hardware.threads": 1,
        }
        settings |= dict(word.split("=", 1) for word in overrides)
        return composed(*(f"{key}={value}" for key, value in settings.items()))

    return compose_run


@pytest.fixture(scope="session")
def run_stage(echo_run: ComposeRun) -> RunStage:
    """`run_stage(folder, "stage=ppo", ...)`: runs the stage of `echo_run`'s configuration in this process; `folder`."""

    def run(folder: Path, *overrides: str) -> Path:
        from vlm_agents.run import Run

        cfg = echo_run(folder, *overrides)
        with Run.open(cfg, overrides) as opened:
            importlib.import_module(f"vlm_agents.stages.{cfg.stage.name}").main(cfg, opened)
        return folder

    return run


@pytest.fixture(scope="session")
def echo_episodes(run_stage: RunStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage=collect: 40 episodes of the expert with 30 % random moves."""
    return run_stage(tmp_path_factory.mktemp("collect"), "stage=collect", "stage.episodes=40", "stage.num_envs=8")


@pytest.fixture(scope="session")
def echo_chats(run_stage: RunStage, echo_episodes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage=preprocess of `echo_episodes`."""
    words = ["stage=preprocess", f"stage.data=[{echo_episodes}]", "stage.success_only=false", "stage.val_fraction=0.2"]
    return run_stage(tmp_path_factory.mktemp("preprocess"), *words)
