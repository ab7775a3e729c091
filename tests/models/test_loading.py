import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig, ValueHeadConfig
from vlm_agents.errors import ConfigError, DataError, ModelError
from vlm_agents.models import Agent, load_agent
from vlm_agents.tensors import Row
from vlm_agents.types import Prompt

Load = Callable[..., Agent]


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def refusal(load: Load, error: type[Exception] = ModelError, **arguments: object) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises(error) as caught:
        load(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- round trips -----------------------------------------------------------------------------------------------------
def test_a_saved_agent_is_the_same_bit_for_bit(
    load: Load,
    agent: Agent,
    chats: list[Prompt],
    make_row: Callable[..., Row],
    values_of: Callable[..., torch.Tensor],
    tmp_path: Path,
):
    agent.save(tmp_path / "model")
    again = load(init=tmp_path)  # a finished run keeps its model in the folder `model`
    state, loaded = agent.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert [name for name in state if not torch.equal(state[name], loaded[name])] == []
    row = make_row(agent, chats[2], [30, 31, 2])
    assert torch.equal(again.collate([row]).input_ids, agent.collate([row]).input_ids)
    with torch.no_grad():
        before, after = agent.score([row]), again.score([row])
        assert torch.equal(before.logprobs, after.logprobs)
        assert torch.equal(values_of(agent, [row], before), values_of(again, [row], after))


def test_random_weights_need_no_weights(load: Load, agent: Agent, broken: Path):
    (broken / "model.safetensors").unlink()
    fresh = load(path=str(broken), weights="random")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    drawn, stored = (dict(one.model.named_parameters())[name] for one in (fresh, agent))
    assert drawn.shape == stored.shape
    assert not torch.equal(drawn, stored)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_a_missing_folder(load: Load, tmp_path: Path):
    path = str(tmp_path / "nowhere")
    assert f"model {path} can't be loaded: there is no such folder" in refusal(load, path=path)


def test_a_hub_id_that_isnt_here(load: Load):
    message = refusal(load, path="nobody/no-such-model")
    assert "no-such-model can't be loaded: no such folder, not in the hub's cache, and HF_HUB_OFFLINE is set" in message
    assert "set model.path=FOLDER, or unset that" in message


def test_an_adapter_or_a_run_as_a_path(load: Load, tmp_path: Path):
    load(lora=LoraConfig(rank=4)).save(tmp_path / "model")
    for folder in (tmp_path, tmp_path / "model"):
        assert f"model.path takes a model: set stage.init={folder}" in refusal(load, path=str(folder))


def test_code_in_a_folder_is_never_run(broken: Path, tmp_path: Path):
    """Not even where someone answers yes: transformers would ask."""
    names = {"AutoConfig": "foreign.Config", "AutoModelForImageTextToText": "foreign.Model"}
    (broken / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": names}))
    (broken / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code = f"""
from vlm_agents.config import HardwareConfig, ModelConfig
from vlm_agents.models import load_agent
load_agent(ModelConfig("foreign", path={str(broken)!r}), HardwareConfig("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], input="y\n" * 9, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"ModelError: model {broken} can't be loaded" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"r": 4,', "is no JSON"), ('{"peft_type": "LOHA", "r": 4}', "has peft_type=LOHA"), ("[]", "=None")],
)
def test_an_adapter_that_does_not_say_what_it_is(load: Load, tmp_path: Path, content: str, message: str):
    (tmp_path / "adapter_config.json").write_text(content)
    for lora in (LoraConfig(rank=4), None):
        said = refusal(load, init=tmp_path, lora=lora)
        assert said.startswith(str(tmp_path / "adapter_config.json"))
        assert message in said


def test_a_folder_without_weights(load: Load, broken: Path):
    (broken / "model.safetensors").unlink()
    message = refusal(load, path=str(broken))
    assert f"model {broken} can't be loaded" in message
    assert "model.safetensors" in message


def test_truncated_weights(load: Load, broken: Path):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"model {broken} can't be loaded" in refusal(load, path=str(broken))


def test_weights_that_lack_a_tensor(load: Load, broken: Path):
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    message = refusal(load, path=str(broken))
    assert f"model {broken} can't be loaded" in message
    assert "layers.0.self_attn.q_proj.weight" in message


def test_weights_of_another_shape(load: Load, broken: Path):
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 256
    (broken / "config.json").write_text(json.dumps(config))
    message = refusal(load, path=str(broken))
    assert f"model {broken} can't be loaded" in message
    assert "mlp.down_proj.weight" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_a_folder_without_a_part(load: Load, broken: Path, name: str):
    (broken / name).unlink()
    assert f"model {broken} can't be loaded" in refusal(load, path=str(broken))


def test_a_config_that_is_no_json(load: Load, broken: Path):
    (broken / "config.json").write_text('{"model_type": "qwen2_5_vl",')
    assert f"model {broken} can't be loaded" in refusal(load, path=str(broken))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_a_damaged_file_is_named(load: Load, tmp_path: Path, lora: LoraConfig | None):
    """Any of a saved folder that is read: cut in half, or no text, or of another kind."""
    load(lora=lora).save(tmp_path)
    unread = {"generation_config.json", "README.md"}  # for servers and people
    if lora:
        unread |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # those of the base are taken
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in unread]
    assert len(files) == (5 if lora else 7)
    for path in files:
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"\xff[]", b"[]"):
            path.write_bytes(content)
            message = refusal(load, init=tmp_path, lora=lora)
            assert str(tmp_path) in message
            assert path.name in message or (path.suffix == ".jinja" and "chat template" in message)
        path.write_bytes(whole)


def test_a_tokenizer_that_ends_no_turn(load: Load, broken: Path):
    """Without such a token every other one might be sampled, and no reply would ever end."""
    path = broken / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    assert f"the tokenizer of {broken} has no eos_token" in refusal(load, path=str(broken))


def test_a_chat_template_that_says_nothing(load: Load, broken: Path):
    for template, message in (("", "has no chat template"), ("{{ bos_token }}hello", "leaves out what users say")):
        (broken / "chat_template.jinja").write_text(template)
        said = refusal(load, path=str(broken))
        assert message in said
        assert str(broken) in said


def test_a_head_saved_anew_by_another_program(load: Load, agent: Agent, tmp_path: Path):
    """Whose metadata say nothing of bounds."""
    agent.save(tmp_path)
    head = tmp_path / "heads/value_head.safetensors"
    save_file(load_file(head), head, metadata={"format": "pt"})
    assert load(init=tmp_path).value_head.state_dict().keys() == agent.value_head.state_dict().keys()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"_attn_implementation": "stranger/kernel"}, "asks for code from the hub, stranger/kernel"),
        ({"transformers_weights": "adapter_model.bin"}, "names weights in adapter_model.bin: save them as safetensors"),
    ],
)
def test_code_that_a_config_names_is_not_asked_for(load: Load, broken: Path, entry: dict[str, str], message: str):
    """transformers would load a kernel, and a pickle, whatever else it was told."""
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    for weights in ("pretrained", "random"):
        assert message in refusal(load, path=str(broken), weights=weights)


def test_init_that_holds_no_model(load: Load, tmp_path: Path):
    message = refusal(load, DataError, init=tmp_path)
    assert f"stage.init={tmp_path} holds no model" in message
    assert "stage=sft" in message


def test_a_value_head_of_another_size(load: Load, agent: Agent, tmp_path: Path):
    agent.save(tmp_path)
    message = refusal(load, init=tmp_path, value_head=ValueHeadConfig(hidden=32))
    assert f"{tmp_path / 'heads/value_head.safetensors'}: its shapes differ from model.value_head" in message


def test_an_adapter_without_lora(load: Load, tmp_path: Path):
    load(lora=LoraConfig(rank=4)).save(tmp_path)
    message = refusal(load, init=tmp_path)
    assert f"{tmp_path} holds a LoRA adapter: add model/lora=adapter model.lora.rank=4 model.lora.alpha=32" in message


def test_a_truncated_adapter(load: Load, tmp_path: Path):
    load(lora=LoraConfig(rank=4)).save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"adapter {tmp_path} can't be loaded" in refusal(load, init=tmp_path, lora=LoraConfig(rank=4))


def test_an_adapter_of_another_model(load: Load, broken: Path, tmp_path: Path):
    load(lora=LoraConfig(rank=4)).save(tmp_path / "adapter")
    named = tmp_path / "adapter/adapter_config.json"  # its base is then the model of the settings
    named.write_text(json.dumps(json.loads(named.read_text()) | {"base_model_name_or_path": None}))
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 256
    (broken / "config.json").write_text(json.dumps(config))
    arguments = {"path": str(broken), "weights": "random", "lora": LoraConfig(rank=4)}
    (tmp_path / "adapter/base.json").unlink()  # else that would tell
    message = refusal(load, init=tmp_path / "adapter", **arguments)
    assert f"adapter {tmp_path / 'adapter'} can't be loaded" in message


def test_a_device_that_is_not_there(tiny_folder: Path):
    for device, message in (("foo", "is no device of torch: set cpu"), ("cuda", "no GPU here; set hardware=cpu")):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(ConfigError, match=f"hardware.device={device}.*{message}"):
            load_agent(ModelConfig(name="tiny", path=str(tiny_folder)), HardwareConfig(name="x", device=device))


def test_threads_are_those_that_were_asked_for(tiny_folder: Path):
    before = torch.get_num_threads()
    try:
        load_agent(ModelConfig(name="tiny", path=str(tiny_folder)), HardwareConfig(name="cpu", threads=before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
