"""Which weights are the same and which aren't, across dtypes and 4 bits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig
from vlm_agents.errors import ModelError
from vlm_agents.models import Agent, load_agent
from vlm_agents.models.fingerprint import NF4, compare, differing, fingerprint, save_base

Load = Callable[..., Agent]
FORMS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "nf4": ("float32", "nf4")}
FORMS["nf4 of bfloat16"] = ("bfloat16", "nf4")


@pytest.fixture(scope="module")
def prints(load: Load, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """`prints[weights][form]`: of a model, and of what an adapter that says little makes of its language part."""
    torch.manual_seed(0)
    agent = load(lora=LoraConfig(rank=4, alpha=4))
    for name, parameter in agent.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=2e-2 if ".language_model." in name else 0.0)
    agent.model = agent.model.merge_and_unload()
    agent.save(merged := tmp_path_factory.mktemp("merged"))
    found = {}
    for weights, folder in (("base", tiny_folder), ("merged", merged)):
        found[weights] = {}
        for form, (dtype, quantize) in FORMS.items():
            cfg = ModelConfig("tiny", path=str(folder), quantize=quantize, lora=LoraConfig(rank=4, alpha=4))
            found[weights][form] = fingerprint(load_agent(cfg, HardwareConfig("cpu", dtype=dtype)).model)
    return found


@pytest.mark.parametrize("one", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_a_merged_adapter_is_told_from_its_base_in_every_form(prints, one: str, other: str):
    base, merged = prints["base"], prints["merged"]
    assert compare(base[one], base[other]) == []
    assert compare(merged[one], merged[other]) == []
    found = compare(base[one], merged[other])
    assert found == compare(merged[other], base[one])
    assert found
    assert all(".language_model." in name for name in found)  # what the adapter left alone is the same


def test_the_change_is_small(prints):
    """Else any tolerance would do."""
    one, other = (prints[weights]["float32"] for weights in ("base", "merged"))
    values = [torch.tensor([v for name in one for v in each[name]["values"]]) for each in (one, other)]
    moved = values[0] != values[1]
    share = ((values[1] - values[0]).abs() / values[0].abs())[moved].median()
    assert float(share) < 0.1


def test_4_bits_round_small_changes_away_and_rounding_itself_is_no_change(prints):
    """Eight values of 28 linear layers: 2 % of the codes are 4. What rounds otherwise is 2 codes off."""
    base = prints["base"]["nf4"]
    name = next(name for name in base if "codes" in base[name])
    moved = base | {
        name: base[name] | {"codes": [code ^ 1 for code in base[name]["codes"][:4]] + base[name]["codes"][4:]}
    }
    assert compare(base, moved) == [name]  # in the same dtype 4 bits are equal or not
    assert compare(prints["base"]["bfloat16"], base) == []


def test_an_adapter_is_no_part_of_its_base(load: Load):
    plain, adapted = load().model, load(lora=LoraConfig(rank=4, alpha=4)).model
    assert fingerprint(plain) == fingerprint(adapted)


def test_the_levels_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    levels = functional.get_4bit_type("nf4", device="cpu").tolist()
    assert levels == pytest.approx(NF4, abs=1e-7)


def test_other_names_and_shapes_are_other_weights():
    one = {"a": None, "b": {"dtype": "float32", "shape": [2], "values": [1.0, 2.0], "largest": [2.0, 2.0]}}
    assert compare(one, one) == []
    assert compare(one, one | {"c": None}) == ["c"]
    assert compare(one, {"a": None}) == ["b"]
    assert compare(one, one | {"b": one["b"] | {"shape": [1, 2]}}) == ["b"]
    assert compare(one, one | {"b": one["b"] | {"values": [1.0, 2.00001]}}) == ["b"]
    rounded = {"dtype": "bfloat16", "shape": [2], "values": [1.0, 2.0], "largest": [2.0, 2.0]}
    assert compare(one | {"b": one["b"] | {"values": [1.0, 2.00001]}}, one | {"b": rounded}) == []
    assert compare(one | {"b": one["b"] | {"values": [1.0, 2.02]}}, one | {"b": rounded}) == ["b"]  # spacing: 0.016


def test_files_of_earlier_versions_still_tell(agent: Agent, tmp_path: Path):
    weights = agent.family.embed_tokens.weight.detach().flatten()
    values = weights[:: len(weights) // 64][:64].tolist()
    for saved, expected in ((values, []), ([1.1 * value for value in values], ["the embeddings"])):
        (tmp_path / "base.json").write_text(json.dumps({"embeddings": saved}))
        assert differing(agent.model, tmp_path) == expected


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": 3}', '{"embeddings": 3}', "\xff"])
def test_a_damaged_file_is_one_line(agent: Agent, tmp_path: Path, text: str):
    (tmp_path / "base.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"base\.json is damaged \(.*put a whole copy of the adapter there$"):
        differing(agent.model, tmp_path)


def test_damaged_entries_are_one_line(agent: Agent, tmp_path: Path):
    save_base(agent.model, tmp_path)
    saved = json.loads((tmp_path / "base.json").read_text())
    name = min(saved["tensors"])
    for entry in (3, {}, saved["tensors"][name] | {"dtype": "save"}, saved["tensors"][name] | {"values": "x"}):
        (tmp_path / "base.json").write_text(json.dumps({"tensors": saved["tensors"] | {name: entry}}))
        with pytest.raises(ModelError, match=r"base\.json is damaged"):
            differing(agent.model, tmp_path)
