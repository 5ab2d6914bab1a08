"""Tiny tokenizers of every family, as their models' folders have them: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["The river ran to the sea, and 2 of the boats did not.", "What is a boat?", "The sea is not a river."] * 4

FAMILIES = (
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "nanochat", "mixtral", "qwen2_moe", "qwen3_moe"),
    *("bert", "roberta", "modernbert", "t5"),
)


def save_tokenizer(folder: Path, family: str, **settings: Any) -> Path:
    """Write a family's tokenizer, and a config.json that names the family and nothing else.

    Args:
        settings: in place of those of tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own, config = _MAKERS[family]()
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


def _trained(own: tokenizers.Tokenizer, trainer: Any) -> tokenizers.Tokenizer:
    own.train_from_iterator(TEXTS, trainer)
    return own


def _byte_level(special: list[str]) -> tokenizers.Tokenizer:
    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        own,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )


def _template(own: tokenizers.Tokenizer, single: str, pair: str) -> None:
    names = {name.partition(":")[0] for name in (*single.split(), *pair.split()) if not name.startswith("$")}
    own.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, own.token_to_id(name)) for name in sorted(names)]
    )


def _gpt2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    name = "<|endoftext|>"
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": name, "eos_token": name, "unk_token": name}
    return _byte_level([name]), config | {"add_bos_token": False, "add_prefix_space": False}


def _llama() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    own = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Words as pieces: a text is not split before, but the pieces are made of words.
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    _trained(own, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    content = json.loads(own.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    own = tokenizers.Tokenizer.from_str(json.dumps(content))
    _template(own, "<s> $A", "<s> $A <s>:1 $B:1")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return own, config | {"add_bos_token": True, "add_eos_token": False, "legacy": False}


def _qwen() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    own = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    own.normalizer = normalizers.NFC()
    return own, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False} | names


def _nanochat() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    own = _byte_level(["<|bos|>", "<|assistant_end|>"])
    _template(own, "<|bos|> $A", "<|bos|> $A $B:1")
    names = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "pad_token": "<|assistant_end|>"}
    return own, {"tokenizer_class": "PreTrainedTokenizerFast"} | names


def _bert() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    own = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    own.normalizer = normalizers.BertNormalizer()
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(names.values()), show_progress=False)
    _trained(own, trainer)
    _template(own, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return own, {"tokenizer_class": "BertTokenizer"} | {f"{role}_token": name for role, name in names.items()}


def _roberta() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    own = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    own.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    return own, {"tokenizer_class": "RobertaTokenizer"} | {f"{role}_token": name for role, name in names.items()}


def _modernbert() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    own = _byte_level(list(names.values()))
    _template(own, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
    return own, {"tokenizer_class": "PreTrainedTokenizerFast"} | {f"{role}_token": name for role, name in names.items()}


def _t5() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    own = tokenizers.Tokenizer(models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    own.decoder = decoders.Metaspace()
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    _trained(own, trainer).add_special_tokens(sentinels)
    _template(own, "$A </s>", "$A </s> $B </s>")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return own, {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "additional_special_tokens": sentinels} | names


_MAKERS = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
    "nanochat": _nanochat,
    "bert": _bert,
    "roberta": _roberta,
    "modernbert": _modernbert,
    "t5": _t5,
}
