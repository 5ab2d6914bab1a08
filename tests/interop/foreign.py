"""Tiny models as transformers makes and saves them, with random weights and a tokenizer beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB_SIZE = 100
BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": VOCAB_SIZE - 2,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": VOCAB_SIZE - 1,
}
"""Of all but GPT-2, whose fields have names of their own."""
GPT2_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
    "bos_token_id": VOCAB_SIZE - 2,
    "eos_token_id": VOCAB_SIZE - 1,
}


def make_config(model_type: str, **changes: Any) -> Any:
    """A small config of transformers."""
    base = GPT2_BASE if model_type == "gpt2" else BASE
    return transformers.AutoConfig.for_model(model_type, **(base | changes))


def make_model(config: Any, seed: int = 1) -> Any:
    """A decoder whose biases and scales are random too: at zero and one they would hide mistakes."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose words are w0, w1, ..."""
    names = [*(f"w{number}" for number in range(VOCAB_SIZE - 3)), "<unk>", "<s>", "</s>"]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(str(folder))


def save_folder(folder: Path, config: Any, *, shard_size: str = "5GB", seed: int = 1) -> Any:
    """Save a model and a tokenizer as transformers does; returns the model, which may have more rows than the
    tokenizer has ids."""
    model = make_model(config, seed)
    model.save_pretrained(str(folder), max_shard_size=shard_size)
    save_tokenizer(folder)
    return model
