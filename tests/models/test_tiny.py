from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vlm_agents.config import HardwareConfig, ModelConfig
from vlm_agents.models import load_agent
from vlm_agents.models.loading import TINY
from vlm_agents.models.tiny import SPECIAL, build, main, train_tokenizer


def test_what_is_built_loads_with_the_auto_classes(tmp_path: Path, texts: list[str]):
    build(tmp_path, texts, seed=3)
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    # with all of the vocabulary, of which these few texts need a part, and one matrix for embeddings and head
    missing = (1024 - len(tokenizer)) * 128
    assert 1_500_000 <= sum(parameter.numel() for parameter in model.parameters()) + missing <= 1_800_000
    for text in (*texts, "<never seen> Ωμέγα\t\r\n  ", "🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(len(SPECIAL)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = {name: getattr(model.config, f"{name}_id") for name in ("image_token", "video_token", "vision_start_token")}
    assert tokenizer.convert_ids_to_tokens(list(ids.values())) == ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]
    again = tmp_path / "again"
    build(again, texts, seed=3)
    same = AutoModelForImageTextToText.from_pretrained(again).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())


def test_a_cell_and_a_key_are_one_token_each(texts: list[str]):
    tokenizer = train_tokenizer(texts)
    assert tokenizer.tokenize('{"thoughts": "key (3,2)') == ['{"thoughts":Ġ"', "key", "Ġ(3,2)"]


def test_main_builds_from_chats(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch):
    chats = [[{"role": "user", "content": text}] for text in texts]
    pyarrow.parquet.write_table(pa.table({"messages": chats}), tmp_path / "chats.parquet")
    monkeypatch.setattr("sys.argv", ["tiny", str(tmp_path / "tiny"), str(tmp_path / "chats.parquet")])
    assert main() == 0
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "tiny").get_vocab()
    assert vocabulary == train_tokenizer(texts).get_vocab()


def test_main_says_how_it_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["tiny"])
    assert main() == 2
    assert "FOLDER CHATS.parquet" in capsys.readouterr().err


@pytest.mark.skipif(not TINY.is_dir(), reason="no packaged weights")
def test_the_packaged_model_is_small_and_loads():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000
    agent = load_agent(ModelConfig(name="tiny"), HardwareConfig(name="cpu"))
    parameters = sum(parameter.numel() for parameter in agent.model.parameters())
    assert 1_500_000 <= parameters <= 1_800_000
