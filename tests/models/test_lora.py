import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm_agents.config import LoraConfig, TrainableConfig
from vlm_agents.errors import ConfigError, ModelError
from vlm_agents.models import Agent
from vlm_agents.tensors import Row
from vlm_agents.types import Prompt

Load = Callable[..., Agent]
SMALL = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def rows(agent: Agent, chats: list[Prompt], make_row: Callable[..., Row]) -> list[Row]:
    return [make_row(agent, chat, [30 + index, 31, 2]) for index, chat in enumerate(chats)]


def stir(agent: Agent) -> None:
    """Give the adapters something to say: fresh ones leave the model as it is."""
    torch.manual_seed(1)
    for name, parameter in agent.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)


def reference_logprobs(agent: Agent, rows: list[Row]) -> Tensor:
    with agent.reference():
        return agent.score(rows).logprobs


def say_base(folder: Path, name: str | None) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_only_adapters_of_the_chosen_part_train(load: Load, rows: list[Row], part: str):
    chosen = TrainableConfig(**{name: name == part for name in ("vision", "projector", "language")})
    agent = load(lora=SMALL, train=chosen)
    stir(agent)
    agent.score(rows).logprobs.sum().backward()
    trained = {name for name, parameter in agent.model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in agent.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name and agent.family.part_of(name) == part for name in trained)
    # two matrices for each linear layer: 4 layers of 7; 2 of 5 (qkv, proj, gate, up, down); 2 in the merger
    assert len(trained) == {"language": 2 * 28, "vision": 2 * 10, "projector": 2 * 2}[part]
    assert len(agent.parameters_by_role()["policy"]) == len(trained)
    assert agent.images.frozen is (part == "language")


def test_the_head_and_the_embeddings_have_no_adapter(load: Load):
    agent = load(lora=SMALL)
    adapted = [name for name, parameter in agent.model.named_parameters() if parameter.requires_grad]
    assert len(adapted) == 2 * (28 + 10 + 2)
    assert not any("lm_head" in name or "embed_tokens" in name for name in adapted)


def test_nothing_to_adapt_is_an_error(load: Load):
    with pytest.raises(ConfigError, match=r"model\.lora has nothing to adapt"):
        load(lora=SMALL, train=TrainableConfig(vision=False, projector=False, language=False))


def test_the_reference_is_the_base_model(load: Load, agent: Agent, rows: list[Row]):
    adapted = load(lora=SMALL)
    with torch.no_grad():
        base = agent.score(rows)
        assert torch.equal(adapted.score(rows).logprobs, base.logprobs)  # a fresh adapter is silent
        stir(adapted)
        assert (adapted.score(rows).logprobs - base.logprobs).abs().max() > 1e-2
    reference = reference_logprobs(adapted, rows)
    torch.testing.assert_close(reference, base.logprobs, rtol=1e-6, atol=1e-6)
    assert not reference.requires_grad
    with torch.no_grad():
        assert (adapted.score(rows).logprobs - base.logprobs).abs().max() > 1e-2  # on again


def test_an_adapter_and_its_value_head_survive_the_disk(
    load: Load, rows: list[Row], values_of: Callable[..., Tensor], tmp_path: Path
):
    trained = load(lora=SMALL)
    stir(trained)
    trained.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()  # the adapter alone
    again = load(init=tmp_path, lora=SMALL)
    with torch.no_grad():
        before, after = trained.score(rows), again.score(rows)
        assert torch.equal(values_of(trained, rows, before), values_of(again, rows, after))
    for name in ("logprobs", "entropy", "states"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert torch.equal(reference_logprobs(again, rows), reference_logprobs(trained, rows))
    before, after = ({name for name, p in one.named_parameters() if p.requires_grad} for one in (trained, again))
    assert before == after


def test_an_adapter_of_another_tool_may_be_on_the_head(load: Load, agent: Agent, rows: list[Row], tmp_path: Path):
    config = PeftLoraConfig(
        r=4, lora_alpha=8, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(load().model, config).save_pretrained(str(tmp_path))
    adapted = load(init=tmp_path, lora=SMALL)
    scores = adapted.score(rows)
    with torch.no_grad():
        assert (scores.logprobs - agent.score(rows).logprobs).abs().max() > 1e-2
    scores.logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters_by_role()["policy"])


def test_a_loaded_adapter_trains_in_the_chosen_parts(load: Load, tmp_path: Path):
    load(lora=SMALL).save(tmp_path)
    again = load(init=tmp_path, freeze_vision=True, lora=SMALL)
    trained = [name for name, parameter in again.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 28
    assert {again.family.part_of(name) for name in trained} == {"language"}


def test_an_adapter_finds_the_weights_that_it_was_trained_on(
    load: Load, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Those of a cloning run, say: whatever the settings name, and never another's."""
    cloned = load()
    with torch.no_grad():
        for parameter in cloned.model.parameters():
            parameter.mul_(1.05)
    cloned.save(tmp_path / "cloned")
    adapted = load(init=tmp_path / "cloned", lora=SMALL)
    adapted.save(tmp_path / "adapted")
    with torch.no_grad():
        expected = adapted.score(rows).logprobs
        for settings, told in (({"path": None}, False), ({"path": str(tmp_path / "cloned")}, False), ({}, True)):
            again = load(init=tmp_path / "adapted", lora=SMALL, **settings)
            torch.testing.assert_close(again.score(rows).logprobs, expected, rtol=0, atol=0)
            assert ("so that is taken, not model.path=" in capsys.readouterr().err) == told
    (tmp_path / "cloned").rename(tmp_path / "moved")
    load(init=tmp_path / "adapted", path=str(tmp_path / "moved"), lora=SMALL)  # known by its values
    with pytest.raises(ModelError, match="was trained on other weights than these"):
        load(init=tmp_path / "adapted", lora=SMALL)
    (tmp_path / "adapted/base.json").unlink()
    with pytest.raises(ModelError, match=r"was trained on .*cloned, and model.path is .*tiny: set model.path=.*cloned"):
        load(init=tmp_path / "adapted", lora=SMALL)
    with pytest.raises(ModelError, match=r"was trained on .*cloned, which isn't there: put it back"):
        load(init=tmp_path / "adapted", path=None, lora=SMALL)
    say_base(tmp_path / "adapted", "some/hub-id")
    with pytest.raises(
        ModelError, match=r"was trained on some/hub-id: set model.path=some/hub-id if that is a hub id, or to"
    ):
        load(init=tmp_path / "adapted", path=None, lora=SMALL)


def test_another_folder_of_the_name_of_ours_is_itself(load: Load, tiny_folder: Path, tmp_path: Path):
    """`models/tiny_weights` is what this package calls its own, wherever it is installed."""
    named = tmp_path / "models/tiny_weights"
    shutil.copytree(tiny_folder, named)
    load(path=str(named), lora=SMALL).save(tmp_path / "adapted")
    (tmp_path / "adapted/base.json").unlink()  # as another program leaves it
    assert load(path=None, init=tmp_path / "adapted", lora=SMALL).model.get_base_model().name_or_path == str(named)


def test_another_shape_than_the_saved_one_is_refused(load: Load, tmp_path: Path):
    load(lora=SMALL).save(tmp_path)
    with pytest.raises(ConfigError, match=f"has rank {SMALL.rank} .*set model.lora.rank={SMALL.rank}"):
        load(init=tmp_path, lora=LoraConfig(rank=SMALL.rank + 1, alpha=SMALL.alpha))


def test_the_dropout_of_an_adapter_is_its_own_and_told(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    load(lora=replace(SMALL, dropout=0.25)).save(tmp_path)
    capsys.readouterr()
    agent = load(init=tmp_path, lora=replace(SMALL, dropout=0.5))
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"the adapter in {tmp_path} was made with dropout 0.25: so that is taken, not model.lora.dropout=0.5"
    ]
    assert {module.p for module in agent.model.modules() if isinstance(module, nn.Dropout) and module.p} == {0.25}
    load(init=tmp_path, lora=replace(SMALL, dropout=0.25))
    assert not capsys.readouterr().err


def test_an_adapter_whose_tensors_are_not_those_of_the_model_is_refused(load: Load, tmp_path: Path):
    """Nothing else tells a foreign one: it names no base, and no values of it."""
    load(lora=SMALL).save(tmp_path)
    say_base(tmp_path, None)
    (tmp_path / "base.json").unlink()
    weights = tmp_path / "adapter_model.safetensors"
    whole = load_file(weights)
    load(init=tmp_path, lora=SMALL)
    name = next(name for name in sorted(whole) if "layers.3." in name)
    for tensors, message in (
        ({key: value for key, value in whole.items() if key != name}, "it lacks 1 tensors and has 0 too many"),
        (
            whole | {name.replace("layers.3.", "layers.4."): whole[name].clone()},
            "it lacks 0 tensors and has 1 too many",
        ),
    ):
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"is one of another model: {message}, .*layers.*Set model.path"):
            load(init=tmp_path, lora=SMALL)


def test_an_adapter_on_other_random_weights_is_refused(load: Load, tmp_path: Path):
    load(weights="random", lora=SMALL).save(tmp_path)
    load(init=tmp_path, weights="random", lora=SMALL)
    for other in ({"weights": "random", "seed": 1}, {"weights": "pretrained"}):
        with pytest.raises(ModelError, match=r"was trained on other weights than these: .*model\.seed"):
            load(init=tmp_path, lora=SMALL, **other)


def test_a_part_without_an_adapter_cannot_learn(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    load(freeze_vision=True, lora=SMALL).save(tmp_path)
    load(init=tmp_path, freeze_vision=True, lora=SMALL)
    assert "alone" not in capsys.readouterr().err
    again = load(init=tmp_path, lora=SMALL)
    assert "is on language alone: projector and vision stay as they are" in capsys.readouterr().err
    assert again.images.frozen
    load(lora=SMALL, train=TrainableConfig(language=False)).save(tmp_path / "seeing")
    with pytest.raises(ConfigError, match=r"nothing would learn: .* is on projector, vision alone"):
        load(init=tmp_path / "seeing", lora=SMALL, freeze_vision=True)


def test_an_adapter_without_safetensors_is_refused(load: Load, tmp_path: Path):
    load(lora=SMALL).save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")  # peft would take the pickle
    weights.unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is missing: .* a \.bin isn't read"):
        load(init=tmp_path, lora=SMALL)


def test_adapters_make_no_noise(load: Load, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load(lora=SMALL).save(tmp_path)
        load(init=tmp_path, lora=SMALL)
