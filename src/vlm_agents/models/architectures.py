"""Models from their dimensions alone: the config and tokenizer that random weights need.

No file and no download: `conf/model/` holds the dimensions, the tokenizer is the tiny model's with the special tokens
that the family wants. Not for pretrained weights: those bring all of this with them.
"""

import copy
from collections.abc import Mapping
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig

from vlm_agents.models.families import Kind


def tokenizer_for(kind: Kind, tokenizer: Any) -> Any:
    """The tokenizer, with the tokens, the first token and the chat template of the family."""
    tokenizer.add_special_tokens({**kind.special_tokens, "extra_special_tokens": list(kind.token_ids.values())})
    if kind.chat_template is not None:
        tokenizer.chat_template = kind.chat_template
    if tokenizer.bos_token is not None:
        first = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        single = f"{tokenizer.bos_token} $A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=first)
    return tokenizer


def whole_config(architecture: Mapping[str, Any], kind: Kind, tokenizer: Any) -> Any:
    """The config of transformers: the dimensions, and the ids of special tokens in this tokenizer.

    Without a `vocab_size` the embeddings have a row for each token, and no more.
    """
    settings = copy.deepcopy({name: value for name, value in architecture.items() if name != "image_processor"})
    text = settings["text_config"]
    text.setdefault("vocab_size", len(tokenizer))
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ids = {entry: tokenizer.convert_tokens_to_ids(token) for entry, token in kind.token_ids.items()}
    return AutoConfig.for_model(**settings, **ids)
