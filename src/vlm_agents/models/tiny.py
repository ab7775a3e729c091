"""The tiny model: the real Qwen2.5-VL classes at about 1.6 M parameters, for laptops and tests.

`build` makes a folder that loads like any hub model. Its tokenizer is trained on given texts, with Qwen's special
tokens. Its pre-tokenizer keeps coordinates like ` (3,2)` and JSON keys like `{"thoughts": "` whole, so that one grid
cell is one token to write, and a reply costs some 30 tokens.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

VOCABULARY = 1024
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SPLIT = (
    r""""?(?:\{|, )"[A-Za-z ]+": "?"""  # JSON keys with what surrounds them
    r"| ?\(\d+,\d+\)"  # coordinates
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen's own
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: any text round-trips, what is frequent in `texts` is short."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:],
        padding_side="left",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


# One over the root of the width. The usual 0.02 suits widths of thousands; here it costs most of the training.
INITIALIZER_RANGE = 0.08


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """4 text layers of width 128 and 2 vision layers; both vision layers see the whole picture."""
    ids = {token: tokenizer.get_vocab()[token] for token in SPECIAL}
    text = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        # Qwen2.5-VL gives the width axis the slowest rotations. With its usual theta of a million two columns of a
        # small grid would look alike to the text layers; with 30 they turn by 0.04 to 0.12 radians a column.
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
        "initializer_range": INITIALIZER_RANGE,
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0, 1],
        "out_hidden_size": 128,
        "initializer_range": INITIALIZER_RANGE,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build(folder: Path, texts: Iterable[str], seed: int = 0, start: Path | None = None) -> None:
    """Write a tiny model with random weights and a tokenizer trained on `texts` to `folder`.

    With `start`, another tiny model, its weights in place of random ones: but for tokens that it doesn't know.
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer))
    if start is not None:
        _begin_with(model, tokenizer, start)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}).save_pretrained(folder)


def _begin_with(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, start: Path) -> None:
    old = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    known = PreTrainedTokenizerFast.from_pretrained(start).get_vocab()
    words, learned = model.get_input_embeddings().weight, old.get_input_embeddings().weight
    assert isinstance(words, torch.Tensor)
    assert isinstance(learned, torch.Tensor)
    both = [(now, known[token]) for token, now in tokenizer.get_vocab().items() if token in known]
    kept = words.detach().clone()
    kept[[now for now, _ in both]] = learned.detach()[[then for _, then in both]]
    rows = ("embed_tokens.weight", "lm_head.weight")  # the same, once as input and once as output
    model.load_state_dict({n: v for n, v in old.state_dict().items() if not n.endswith(rows)}, strict=False)
    with torch.no_grad():
        words.copy_(kept)


def main() -> int:
    """`python -m vlm_agents.models.tiny FOLDER CHATS.parquet [START]`: a tiny model whose tokenizer knows these chats,
    with random weights, or those of the tiny model in the folder START."""
    if len(sys.argv) not in (3, 4):
        print("usage: python -m vlm_agents.models.tiny FOLDER CHATS.parquet [START]", file=sys.stderr)
        return 2
    chats = pyarrow.parquet.read_table(sys.argv[2], columns=["messages"])["messages"]
    texts = (message["content"] for chat in chats.to_pylist() for message in chat)
    build(Path(sys.argv[1]), texts, start=Path(sys.argv[3]) if len(sys.argv) == 4 else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
