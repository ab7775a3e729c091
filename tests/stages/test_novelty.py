"""The novelty bonus over a real model: its surprise is what it says, it learns, and the policy doesn't notice."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig, NoveltyConfig, TrainableConfig
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import ModelError
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.novelty import QUESTION, Novelty
from vlm_agents.models import Agent, load_agent
from vlm_agents.models.action_predictor import AdapterPredictor
from vlm_agents.pictures import Picture
from vlm_agents.tensors import reply_row
from vlm_agents.types import Message, Observation, Parsed, Reply, Step, Trajectory, Turn

RunStage = Callable[..., Path]
WORDS = ("stage=ppo", "model/lora=adapter", "algo.novelty.coef=0.1", "stage.iterations=2", "stage.episodes=4")


def episode(seed: int, *actions: str | None) -> Trajectory:
    """One colour of picture a seed."""
    seen = Observation("go", (Picture(Image.new("RGB", (56, 56), (40 * seed, 90, 200))),))
    step = Step(seen, 0.5, False, False, False, True, True)
    turns = [Turn(seen, (), Reply(""), Parsed(action), step) for action in actions]
    return Trajectory("room", seed, "model", tuple(turns), "success")


LANGUAGE = TrainableConfig(vision=False, projector=False)
EPISODES = [episode(0, "left", "left", "go"), episode(1, "go"), episode(2, "right", None, "right", "go")]


@pytest.fixture
def agent(tiny_model: Path) -> Agent:
    torch.manual_seed(0)
    cfg = ModelConfig(
        name="tiny",
        path=str(tiny_model),
        train=LANGUAGE,
        lora=LoraConfig(rank=8, alpha=16),
    )
    return load_agent(cfg, HardwareConfig(name="cpu"))


def novelty_of(agent: Agent, folder: Path | None = None, lr: float = 1e-2) -> Novelty:
    return Novelty(AdapterPredictor(agent, folder), agent.renderer, NoveltyConfig(0.1, lr), Shares(10_000))


def test_surprise_is_the_negative_log_probability_of_each_action(agent: Agent):
    """A fresh adapter changes nothing: what the bare model says of the text is its surprise, split over the turns."""
    novelty = novelty_of(agent)
    (surprise,) = novelty.surprise(EPISODES[2:])
    head = agent.renderer.render((Message("user", (*EPISODES[2].turns[0].observation.images, QUESTION)),)).ids
    pieces = ["right; ", "invalid; ", "right; ", "go"]
    ids = agent.renderer.encode_reply("".join(pieces))
    row = replace(
        novelty.row(EPISODES[2]), input_ids=np.concatenate([head, ids]), spans=((len(head), len(head) + len(ids)),)
    )
    with torch.no_grad():
        logprobs = agent.score([row]).logprobs.numpy()
    expected, place, written = np.zeros(4), 0, ""
    for logprob, (start, _) in zip(logprobs, agent.renderer.offsets(ids), strict=True):
        while place < 3 and start >= len(written) + len(pieces[place]):
            written += pieces[place]
            place += 1
        expected[place] -= logprob
    np.testing.assert_allclose(surprise, expected, rtol=1e-4)
    assert (surprise > 0).all()


def test_actions_that_the_model_has_no_position_for_surprise_nobody(agent: Agent):
    agent.model.config.get_text_config().max_position_embeddings = 120  # of 4096
    (surprise,) = novelty_of(agent).surprise([episode(0, *["left", "go"] * 40)])
    assert len(surprise) == 80
    assert surprise[0] > 0
    assert surprise[-1] == 0


def test_episodes_of_one_seed_have_each_their_own_surprise(agent: Agent):
    novelty = novelty_of(agent)
    twins = [episode(0, "left", "go"), episode(0, "right")]
    together, alone = novelty.surprise(twins), [novelty.surprise([one])[0] for one in twins]
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_bonus_is_added_to_each_turn_and_nothing_else_changes(agent: Agent):
    novelty = novelty_of(agent)
    judged, metrics = novelty.reward(EPISODES)
    surprises = np.concatenate(novelty.surprise(EPISODES))
    rewards = [turn.reward for trajectory in judged for turn in trajectory.turns]
    np.testing.assert_allclose(rewards, 0.5 + 0.1 * surprises, rtol=1e-5)
    assert metrics["novelty/surprise"] == pytest.approx(surprises.mean())
    assert {turn.step.reward for trajectory in judged for turn in trajectory.turns} == {0.5}  # what the env paid
    assert {name for trajectory in judged for turn in trajectory.turns for name in turn.bonuses} == {"novelty"}
    assert EPISODES[0].turns[0].reward == 0.5
    assert [trajectory.stop for trajectory in judged] == ["success"] * 3


def test_what_it_saw_surprises_it_less_than_what_it_did_not(agent: Agent):
    novelty = novelty_of(agent)
    rng = np.random.default_rng(0)
    first = novelty.learn(EPISODES, rng)["novelty/loss"]
    losses = [novelty.learn(EPISODES, rng)["novelty/loss"] for _ in range(25)]
    assert losses[-1] < 0.3 * first
    usual, other = novelty.surprise([EPISODES[0], episode(0, "right", "right", "go")])
    assert usual.sum() < 1 < other.sum() - 2


def test_the_policy_does_not_notice(agent: Agent):
    novelty = novelty_of(agent)
    trained = {name for name, parameter in agent.named_parameters() if parameter.requires_grad}
    before = {name: parameter.clone() for name, parameter in agent.named_parameters()}
    novelty.learn(EPISODES, np.random.default_rng(0))
    moved = {name for name, parameter in agent.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all(".temporal." in name for name in moved)
    assert {name for name, parameter in agent.named_parameters() if parameter.requires_grad} == trained
    assert not any(".temporal." in name or ".visual." in name for name in trained)
    assert len(novelty.engine.parameters) == sum(".temporal." in name for name in before)


def test_it_is_saved_with_the_agent(agent: Agent, tiny_model: Path, tmp_path: Path):
    novelty = novelty_of(agent)
    novelty.learn(EPISODES, np.random.default_rng(0))
    agent.save(tmp_path)
    cfg = ModelConfig(
        name="tiny",
        path=str(tiny_model),
        train=LANGUAGE,
        lora=LoraConfig(rank=8, alpha=16),
    )
    again = load_agent(cfg, HardwareConfig(name="cpu"), str(tmp_path))
    for one, other in zip(novelty_of(again, tmp_path).surprise(EPISODES), novelty.surprise(EPISODES), strict=True):
        np.testing.assert_array_equal(one, other)


def test_it_adapts_the_language_part_alone(tiny_model: Path, tmp_path: Path):
    """Where the policy has adapters on what sees, too, which peft names by the ends of their names."""
    train = TrainableConfig(vision=True, projector=True)
    cfg = ModelConfig(
        name="tiny",
        path=str(tiny_model),
        lora=LoraConfig(rank=8, alpha=16),
        train=train,
    )
    agent = load_agent(cfg, HardwareConfig(name="cpu"))
    novelty_of(agent)
    names = [name for name, _ in agent.model.named_parameters() if ".temporal." in name]
    assert len(names) == 2 * 28  # two matrices for each linear layer: 4 layers of 7
    assert {agent.family.part_of(name) for name in names} == {"language"}
    agent.save(tmp_path)
    path = tmp_path / "temporal/adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["target_modules"] == sorted(saved["target_modules"])
    path.write_text(json.dumps(saved | {"bias": "all"}))
    with pytest.raises(ModelError, match=r"temporal/adapter_config\.json has bias=\"all\", which isn't read here"):
        novelty_of(load_agent(cfg, HardwareConfig(name="cpu"), str(tmp_path)), tmp_path)


def test_an_action_novelty_of_another_model_is_refused(agent: Agent, tmp_path: Path):
    novelty_of(agent)
    agent.save(tmp_path)
    weights = tmp_path / "temporal/adapter_model.safetensors"
    whole = load_file(weights)
    name = next(name for name in sorted(whole) if "layers.3." in name)
    save_file({key: value for key, value in whole.items() if key != name}, weights, metadata={"format": "pt"})
    cfg = ModelConfig(
        name="tiny",
        path=agent.model.name_or_path,
        train=LANGUAGE,
        lora=LoraConfig(rank=8, alpha=16),
    )
    again = load_agent(cfg, HardwareConfig(name="cpu"), str(tmp_path))
    with pytest.raises(
        ModelError, match=r"adapter in .*/temporal is one of another model: it lacks 1 tensors and has 0"
    ):
        novelty_of(again, tmp_path)


def test_an_action_predictor_without_weights_is_not_begun_anew(agent: Agent, tmp_path: Path):
    novelty_of(agent)
    agent.save(tmp_path)
    (tmp_path / "temporal/adapter_model.safetensors").unlink()
    cfg = ModelConfig(
        name="tiny",
        path=agent.model.name_or_path,
        train=LANGUAGE,
        lora=LoraConfig(rank=8, alpha=16),
    )
    again = load_agent(cfg, HardwareConfig(name="cpu"), str(tmp_path))
    with pytest.raises(ModelError, match=r"temporal/adapter_model\.safetensors is missing"):
        novelty_of(again, tmp_path)


def features_of(agent: Agent) -> torch.Tensor:
    features = agent.images.features(EPISODES[0].turns[0].observation.images)
    assert features is not None
    return features


def test_pictures_of_a_frozen_vision_part_are_the_same_to_both_and_encoded_once(agent: Agent):
    """The second adapter is on while they are encoded, and says nothing of them."""
    novelty, encoded = novelty_of(agent), []
    encode = agent.family.encode
    agent.family.encode = lambda mm: encoded.append(len(mm["image_grid_thw"])) or encode(mm)
    assert agent.images.frozen
    before = features_of(agent)
    agent.images.clear()
    encoded.clear()
    novelty.surprise(EPISODES)
    novelty.learn(EPISODES, np.random.default_rng(0))
    assert encoded == [3]  # one first picture an episode
    assert torch.equal(features_of(agent), before)
    assert encoded == [3]
    with agent.reference():
        assert torch.equal(features_of(agent), before)
    agent.images.clear()
    assert torch.equal(features_of(agent), before)


@pytest.mark.parametrize("others", ["predicting", "reference"])
def test_an_adapter_on_a_frozen_vision_part_shows_all_the_same_whoever_looks_first(
    tiny_model: Path, tmp_path: Path, others: str
):
    """As where it was trained with the rest before: what is kept of pictures is what the policy sees."""
    train = TrainableConfig(vision=True, projector=True)
    cfg = ModelConfig(name="tiny", path=str(tiny_model), lora=LoraConfig(rank=8, alpha=16), train=train)
    whole = load_agent(cfg, HardwareConfig(name="cpu"))
    torch.manual_seed(0)
    for name, parameter in whole.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    whole.save(tmp_path)
    agent = load_agent(replace(cfg, train=LANGUAGE), HardwareConfig(name="cpu"), str(tmp_path))
    assert agent.images.frozen
    context = novelty_of(agent).model.predicting if others == "predicting" else agent.reference
    trained = {name for name, parameter in agent.named_parameters() if parameter.requires_grad}
    images = EPISODES[0].turns[0].observation.images
    prompt = agent.renderer.render((Message("user", (*images, "go?")),))
    row = reply_row("row", prompt.ids, agent.renderer.encode_reply("go"), prompt.images)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the policy and of the other."""
        with torch.no_grad():
            policys = agent.score([row]).logprobs
            with context():
                return policys, agent.score([row]).logprobs

    expected = look()
    assert not torch.equal(*expected)
    agent.images.clear()
    with context():
        agent.images.features(images)  # and so keeps them
    assert all(torch.equal(one, other) for one, other in zip(look(), expected, strict=True))
    assert {name for name, parameter in agent.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("more", [(), ("model/temperature_head=learned",)])
def test_a_run_with_it_resumes_bit_for_bit(run_stage: RunStage, tmp_path: Path, more: tuple[str, ...]):
    words = (*WORDS, *more, "stage.num_envs=4", "stage.eval_episodes=0")
    whole = run_stage(tmp_path / "whole", *words)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    for name in ("DONE", "summary.json"):
        (half / name).unlink()
    _, newest = sorted((half / "checkpoints").iterdir())
    shutil.rmtree(newest)
    shutil.rmtree(half / "model")
    run_stage(half, *words)
    weights = sorted(path.relative_to(whole) for path in (whole / "model").rglob("*.safetensors"))
    assert len(weights) == 3 + len(more)  # two adapters, and the heads
    for path in weights:
        assert (half / path).read_bytes() == (whole / path).read_bytes()
    surprises = [
        [json.loads(line)["novelty/surprise"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, half)
    ]
    assert surprises[0] == surprises[1]
    assert len(surprises[0]) == 2
    recorded = [turn for episode in read_episodes(whole) for turn in episode.turns]
    assert len({turn.bonuses["novelty"] for turn in recorded}) > 1  # beside what the env paid
