"""Tokenizers made elsewhere: other sentencepiece settings, and Hugging Face files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError


def sentencepiece_model(path: Path, texts: list[str], **settings: Any) -> Path:
    import sentencepiece

    model = io.BytesIO()
    defaults = {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model,
        **defaults | settings,
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_model_that_adds_a_space_decodes_as_its_library_does(tmp_path: Path, texts: list[str]) -> None:
    import sentencepiece

    path = sentencepiece_model(
        tmp_path / "llama.model", texts, remove_extra_whitespaces=False, normalization_rule_name="identity"
    )
    tokenizer = Tokenizer.from_sentencepiece(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("hello world", " two  spaces ", "你好 \n x", "", "a▁b"):
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(theirs.encode(text))
    assert tokenizer.decode(tokenizer.encode(" two  spaces ")) == " two  spaces "
    # Sentencepiece's own defaults: no padding or mask.
    assert (tokenizer.unk_id, tokenizer.begin_id, tokenizer.end_id) == (0, 1, 2)
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.sentinel_ids, tokenizer.role_ids) == (2, None, [], {})


def test_sentencepiece_models_that_cannot_serve_are_refused(tmp_path: Path, texts: list[str]) -> None:
    no_end = sentencepiece_model(tmp_path / "a.model", texts, eos_id=-1)
    with pytest.raises(DataError, match="no end-of-text piece"):
        Tokenizer.from_sentencepiece(no_end)
    (tmp_path / "rules.tsv").write_text("61\t62\n")
    rewrites = sentencepiece_model(tmp_path / "b.model", texts, denormalization_rule_tsv=str(tmp_path / "rules.tsv"))
    with pytest.raises(DataError, match="differs from its decoding"):
        Tokenizer.from_sentencepiece(rewrites)
    (tmp_path / "c.model").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"c\.model: not a sentencepiece model"):
        Tokenizer.from_sentencepiece(tmp_path / "c.model")
    with pytest.raises(DataError, match="cannot read"):
        Tokenizer.from_sentencepiece(tmp_path / "gone.model")


def test_user_defined_pieces_are_no_special_ids(tmp_path: Path, texts: list[str]) -> None:
    path = sentencepiece_model(
        tmp_path / "a.model", texts, user_defined_symbols=["<mask>"], control_symbols=["<|user|>"]
    )
    tokenizer = Tokenizer.from_sentencepiece(path)
    assert tokenizer.mask_id is None
    assert list(tokenizer.role_ids) == ["user"]


@pytest.fixture(scope="session")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A byte-level BPE as GPT-2 has it."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<mask>", "<extra_id_0>", "<|user|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Settings of a model's input that must not reach bigtx.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "bos_token": None, "mask_token": {"content": "<mask>"}})
    )
    return folder


@pytest.fixture(scope="session")
def byte_level(huggingface_folder: Path) -> Tokenizer:
    return Tokenizer.from_huggingface(huggingface_folder)


@given(st.one_of(st.text(), st.lists(st.sampled_from(["<mask>", "<|endoftext|>", "▁", " ", "👍🏽", "x"])).map("".join)))
def test_a_byte_level_tokenizer_loses_nothing(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert not byte_level.special.all() & set(ids)
    stream = byte_level.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == text


def test_special_ids_come_from_the_files_beside(byte_level: Tokenizer) -> None:
    assert (byte_level.end_id, byte_level.begin_id, byte_level.pad_id) == (0, 0, 0)
    assert (byte_level.mask_id, byte_level.unk_id) == (1, None)
    assert (byte_level.sentinel_ids, byte_level.role_ids) == ([2], {"user": 3})
    assert byte_level.decode([*byte_level.encode("a"), 0]) == "a"
    assert byte_level.decode([*byte_level.encode("a"), 0], keep_special=True) == "a<|endoftext|>"


def test_a_hugging_face_tokenizer_is_kept_in_a_folder(
    byte_level: Tokenizer, huggingface_folder: Path, tmp_path: Path
) -> None:
    byte_level.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == byte_level.fingerprint
    assert loaded.encode("def f():") == byte_level.encode("def f():")
    assert (tmp_path / "tokenizer.json").read_bytes() == (huggingface_folder / "tokenizer.json").read_bytes()


def test_hugging_face_files_that_cannot_serve_are_refused(huggingface_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        Tokenizer.from_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((huggingface_folder / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="eos_token"):
        Tokenizer.from_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer.json"):
        Tokenizer.from_huggingface(tmp_path / "tokenizer.json")


def test_settings_that_are_damaged_are_named(byte_level: Tokenizer, tmp_path: Path) -> None:
    byte_level.save(tmp_path)
    for content, message in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        for load in (Tokenizer.load, Tokenizer.from_huggingface):
            with pytest.raises(DataError, match=rf"tokenizer_config\.json {message}"):
                load(tmp_path)


def test_the_missing_extra_is_named(huggingface_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'bigtx\[huggingface\]'"):
        Tokenizer.from_huggingface(huggingface_folder)
