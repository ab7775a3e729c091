"""What every test runs under: no network, no display, one thread, no telemetry. Set before heavy imports."""

import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from hydra import compose, initialize_config_dir

from vlm_agents import stopping
from vlm_agents.__main__ import main
from vlm_agents.config import RunConfig, conf_dir, parse, register
from vlm_agents.snapshot import settled

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

# The same examples every time, and none kept: a test fails where it is run, or nowhere.
hypothesis.settings.register_profile("steady", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("steady")

ComposeRun = Callable[..., RunConfig]
RunStage = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: with several workers the last file to begin decides when all end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def compose_run(tmp_path: Path) -> ComposeRun:
    """`compose_run("stage=ppo", ...)`: the checked configuration of a run in this test's folder, tracking=jsonl."""

    return lambda *overrides: composed("name=test", f"run_dir={tmp_path / 'run'}", "tracking=jsonl", *overrides)


def composed(*overrides: str) -> RunConfig:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return settled(parse(compose("config", list(overrides))))


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command heeds signals from then on, and notes that it was asked to stop: the next test knows nothing of it."""
    monkeypatch.setattr(stopping, "_asked", False)
    heeded = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in heeded}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`cli("stage=ppo", ...)` runs a command line in this process, in an empty folder; the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vlm-agents", *words])
        return main()

    yield run
    root.handlers[:] = handlers  # Hydra configures logging
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with random weights, whose tokenizer knows what is said in Echo and MiniGrid."""
    from vlm_agents.config import EchoConfig, MiniGridConfig, PromptConfig
    from vlm_agents.models.tiny import build
    from vlm_agents.policies import ExpertPolicy
    from vlm_agents.prompting import make_format
    from vlm_agents.rollout import collect
    from vlm_agents.seeds import Deal
    from vlm_agents.stages.playing import open_envs

    said = []
    for cfg in (EchoConfig(), MiniGridConfig(id="MiniGrid-Empty-Random-5x5-v0")):
        for name in ("action_only", "cot_json"):
            prompt_format = make_format(PromptConfig(name))
            with open_envs(cfg, 4, "always") as envs:
                policy = ExpertPolicy(prompt_format)
                for episode in collect(envs, policy, list(map(Deal, range(12))), run_seed=0):
                    for turn in episode.turns:
                        said += [*(message.text for message in turn.prompt), turn.reply.text]
    folder = tmp_path_factory.mktemp("tiny")
    build(folder, said)
    return folder


LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny LLaVA-1.5 with random weights, which has no family of its own, as transformers itself saves it:
    CLIP sees 84 by 84 pixels in 3 by 3 patches, so that a picture takes 9 tokens."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        AutoTokenizer,
        CLIPImageProcessorPil,
        LlavaProcessor,
    )

    from vlm_agents.models.architectures import tokenizer_for
    from vlm_agents.models.families import KINDS
    from vlm_agents.models.loading import TINY

    tokenizer = tokenizer_for(KINDS["llava_next"], AutoTokenizer.from_pretrained(TINY))  # for <s>, </s> and <image>
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer) + 16,
        "initializer_range": 0.08,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(
        "llava",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        text_config=text,
        vision_config={"model_type": "clip_vision_model", "image_size": 84, "patch_size": 28, **vision},
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=28,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
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
        from vlm_agents import preflight, stages
        from vlm_agents.run import Run

        cfg = echo_run(folder, *overrides)
        preflight.check(cfg)
        with Run.open(cfg, overrides) as opened:
            stages.main(cfg, opened)
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
