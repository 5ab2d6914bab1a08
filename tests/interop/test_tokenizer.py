"""Tokenizers on their way to transformers and back: the same ids on both sides."""

from __future__ import annotations

import io
import itertools
import json
import shlex
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtx.cli import main
from bigtx.config.schema import TokenizerTrainConfig
from bigtx.interop.tokenizer import (
    HARD_TEXTS,
    _first_difference,
    compare_tokenizers,
    export_tokenizer,
    import_tokenizer,
)
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import DataError

pytest.importorskip("transformers")

DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "nanochat", "mixtral", "qwen2_moe", "qwen3_moe")
OTHERS = ("bert", "roberta", "modernbert", "t5")

Export = Callable[..., Path]

LIBRARY = Path(sysconfig.get_path("stdlib"))
TEXTS = [(LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "inspect", "tarfile")]
LINE = "def ba(self) -> None:  # 12 of them"


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=1500), TEXTS)


@pytest.fixture(scope="session")
def unigram() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=1000, method="unigram", chat_roles=["pilot"]), TEXTS)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a tokenizer beside a config.json, as an exported model has it."""
    numbers = itertools.count()

    def export(tokenizer: Tokenizer, model_type: str = "llama") -> Path:
        folder = tmp_path_factory.mktemp(f"export-{next(numbers)}")
        _write_config(folder, model_type)
        export_tokenizer(tokenizer, folder, model_type=model_type, max_length=128)
        return folder

    return export


def _write_config(folder: Path, model_type: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.0.0"}))


def load(folder: Path, **settings: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **settings)


def sentencepiece_model(**settings: Any) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS for line in text.splitlines()),
        model_writer=model,
        **{"vocab_size": 800, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | settings,
    )
    return model.getvalue()


SETTINGS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "other-bpe": {"whitespace_pieces": False, "split_digits": False, "chat_roles": ["pilot"]},
    "unigram": {"method": "unigram"},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_reviews_have_the_same_ids(imdb_reviews: list[str], export: Export, kind: str) -> None:
    check_reviews(imdb_reviews, export, SETTINGS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_10_000_reviews_have_the_same_ids(imdb_jsonl: Path, export: Export, kind: str) -> None:
    with open(imdb_jsonl, encoding="utf-8") as file:
        check_reviews([json.loads(line)["text"] for line in itertools.islice(file, 10_000)], export, SETTINGS[kind])


def check_reviews(reviews: list[str], export: Export, settings: dict[str, Any]) -> None:
    tokenizer = train(TokenizerTrainConfig(vocab_size=4000, **settings), reviews[:500])
    theirs = load(export(tokenizer))
    mine = tokenizer.encode_batch(reviews)
    assert theirs(reviews)["input_ids"] == mine
    assert theirs.batch_decode(mine) == reviews


@pytest.mark.parametrize("model_type", DECODERS + OTHERS)
def test_every_model_type_reads_it_as_it_is(
    bpe: Tokenizer, unigram: Tokenizer, export: Export, model_type: str
) -> None:
    for tokenizer in (bpe, unigram):
        folder = export(tokenizer, model_type)
        assert compare_tokenizers(tokenizer, folder) == []
        theirs = load(folder)
        ends = [tokenizer.end_id] if model_type in OTHERS else []
        assert theirs("ba no")["input_ids"] == [*tokenizer.encode("ba no"), *ends]
        assert theirs.model_max_length == 128


def test_the_comparison_sees_what_transformers_builds_otherwise(bpe: Tokenizer, export: Export) -> None:
    folder = export(bpe, "qwen2")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert any("bigtx has" in line for line in compare_tokenizers(bpe, folder))


HARD = st.one_of(
    st.text(),
    st.text(st.sampled_from(list(" \u2581\t\r\n\x00\ufeff\ufffd\u00a0\u200d\u3000-.ab1<>s/|é你👍\u0301"))),
    st.lists(
        st.sampled_from(["<mask>", "</s>", "<unk>", "<|user|>", "▁", "   ", "<extra_id_7>", "<0x41>", "---", "lling"])
    ).map("".join),
)


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_any_text_has_the_same_ids(name: str, export: Export, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    theirs = load(export(tokenizer), split_special_tokens=True)

    @given(HARD)
    def same(text: str) -> None:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text

    same()


SYMBOLS = ["<code>", "New York", "4 2", "é", "e ", " the", "\n\t", "  ", "self."]
WITH_SYMBOLS = st.one_of(
    st.text(st.sampled_from(list(" <code>NewYork42é\n\tathself.\u2581"))),
    st.lists(st.sampled_from([*SYMBOLS, "▁", " ", "4", "f.s", "<", "你"])).map("".join),
).filter(lambda text: "<s>" not in text)  # The name of a special token means that token in transformers.


@pytest.mark.parametrize("method", ["bpe", "unigram"])
def test_any_text_with_user_defined_symbols_has_the_same_ids(export: Export, method) -> None:
    tokenizer = train(TokenizerTrainConfig(vocab_size=800, method=method, user_defined_symbols=SYMBOLS), TEXTS[:2])
    folder = export(tokenizer)
    theirs, back = load(folder), import_tokenizer(folder)

    @given(WITH_SYMBOLS)
    def same(text: str) -> None:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids == back.encode(text)
        assert theirs.decode(ids) == text == back.decode(ids)

    same()


def test_a_unigram_without_the_characters_of_special_names_takes_none_from_text(export: Export) -> None:
    without = str.maketrans("", "", "<>|/_0x4")
    tokenizer = train(
        TokenizerTrainConfig(vocab_size=1000, method="unigram"), [text.translate(without) for text in TEXTS]
    )
    theirs = load(export(tokenizer), split_special_tokens=True)
    for text in ("<0x41>", "a<0x41><0x0A>", "<s>x</s>", "<mask>", "<extra_id_5>", "<|user|>", "<<00xx44>>"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_special_tokens_have_their_names_and_are_read_from_text(bpe: Tokenizer, export: Export) -> None:
    theirs = load(export(bpe))
    own = bpe.special
    assert (theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id) == (own.pad, own.unknown, own.begin)
    assert (theirs.eos_token_id, theirs.mask_token_id) == (own.end, own.mask)
    assert set(theirs.all_special_ids) == own.all()
    assert len(theirs) == bpe.vocab_size
    ids = theirs("ba<mask>ba <extra_id_5></s>")["input_ids"]
    assert ids == [*bpe.encode("ba"), bpe.mask_id, *bpe.encode("ba "), bpe.sentinel_ids[5], bpe.end_id]
    assert theirs.decode(ids, skip_special_tokens=True) == "baba "


def test_decoders_are_padded_on_the_left(bpe: Tokenizer, export: Export) -> None:
    for model_type, padded in (("llama", [bpe.pad_id, *bpe.encode("ba")]), ("bert", [*bpe.encode("ba"), bpe.end_id])):
        theirs = load(export(bpe, model_type))
        rows = theirs(["ba", "ba" * 3], padding=True)["input_ids"]
        assert rows[0][: len(padded)] == padded or rows[0][-len(padded) :] == padded
        assert (rows[0][0] == bpe.pad_id) == (model_type == "llama")


CHAT = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  ba no? "},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "'\"{{ no }}\\"},
]


def test_the_chat_template_gives_the_ids_of_chats(bpe: Tokenizer, export: Export) -> None:
    theirs = load(export(bpe))
    for prompt in (False, True):
        ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert ids == bpe.encode_chat(CHAT, add_generation_prompt=prompt)
    with pytest.raises(Exception, match="unknown role judge; this tokenizer knows system, user, assistant, tool"):
        theirs.apply_chat_template([{"role": "judge", "content": ""}])


def test_other_roles_have_their_template(unigram: Tokenizer, export: Export) -> None:
    theirs = load(export(unigram))
    chat = [{"role": "pilot", "content": "ba"}]
    assert theirs.apply_chat_template(chat, return_dict=False) == unigram.encode_chat(chat)
    with pytest.raises(Exception, match="no role assistant"):
        theirs.apply_chat_template(chat, add_generation_prompt=True)
    without_roles = train(TokenizerTrainConfig(vocab_size=1500, chat_roles=[]), TEXTS)
    assert load(export(without_roles)).chat_template is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"model_type": "unigram", "add_dummy_prefix": False},
        {"byte_fallback": False, "user_defined_symbols": ["<b>"], "add_dummy_prefix": False},
    ],
    ids=["defaults", "llama", "unigram", "no-bytes"],
)
def test_brought_sentencepiece_models_keep_their_ids(export: Export, settings: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_sentencepiece_bytes(sentencepiece_model(**settings))
    folder = export(tokenizer)
    # What may differ: ties between ways to spell a text, in unigram models whose scores bigtx did not round, and
    # rewritten combining marks, which tokenizers does character by character and sentencepiece longest match first.
    known = ("'--- -----", "'\\xe9 e\\u0301")
    assert [line for line in compare_tokenizers(tokenizer, folder) if not line.startswith(known)] == []
    theirs = load(folder)
    for text in TEXTS[0].splitlines():
        ids, mine = theirs(text)["input_ids"], tokenizer.encode(text)
        assert ids == mine or (settings.get("model_type") == "unigram" and sorted(ids) == sorted(mine))
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_other_kinds_of_sentencepiece_models_are_refused(export: Export) -> None:
    characters = Tokenizer.from_sentencepiece_bytes(sentencepiece_model(model_type="char"))
    with pytest.raises(DataError, match="only BPE and unigram"):
        export(characters)


@pytest.fixture(scope="session")
def gpt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as Hugging Face folders have it: settings of its own, a chat template, a class that rebuilds."""
    import tokenizers

    folder = tmp_path_factory.mktemp("gpt")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|user|>", "<|pad|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "tokenizer_class": "Qwen2Tokenizer"}
    elsewhere = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | elsewhere))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|endoftext|>")
    _write_config(folder, "gpt2")
    return folder


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "llama", "t5"])
def test_a_hugging_face_tokenizer_leaves_as_it_came(
    gpt_folder: Path, export: Export, model_type: str, tmp_path: Path
) -> None:
    tokenizer = import_tokenizer(gpt_folder)
    tokenizer.save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    folder = export(tokenizer, model_type)
    assert (folder / "tokenizer.json").read_bytes() == (gpt_folder / "tokenizer.json").read_bytes()
    assert (folder / "chat_template.jinja").read_bytes() == (gpt_folder / "chat_template.jinja").read_bytes()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["errors"] == "replace" and "auto_map" not in settings
    assert compare_tokenizers(tokenizer, folder) == []
    theirs = load(folder)
    assert theirs("ba no " * 9)["input_ids"] == tokenizer.encode("ba no " * 9)
    assert (theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|pad|>")
    with pytest.raises(DataError, match="its own chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "ba"}])


def test_what_was_exported_comes_back(bpe: Tokenizer, export: Export, tmp_path: Path) -> None:
    import_tokenizer(export(bpe)).save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.special == bpe.special
    assert again.vocab_size == bpe.vocab_size
    assert again.encode_batch(HARD_TEXTS) == bpe.encode_batch(HARD_TEXTS)
    assert [again.decode(ids) for ids in again.encode_batch(HARD_TEXTS)] == list(HARD_TEXTS)
    assert again.encode_chat(CHAT) == bpe.encode_chat(CHAT)
    assert compare_tokenizers(bpe, export(again)) == []


def test_roles_of_other_names_come_back_as_somebody_elses(unigram: Tokenizer, export: Export) -> None:
    folder, chat = export(unigram), [{"role": "pilot", "content": "ba"}]
    again = import_tokenizer(folder)
    assert again.encode_batch(HARD_TEXTS) == unigram.encode_batch(HARD_TEXTS)
    with pytest.raises(DataError, match="let transformers' apply_chat_template encode its chats"):
        again.encode_chat(chat)
    assert load(folder).apply_chat_template(chat, return_dict=False) == unigram.encode_chat(chat)


def test_a_hugging_face_tokenizer_without_its_settings_leaves_with_its_special_ids(
    gpt_folder: Path, export: Export, tmp_path: Path
) -> None:
    import_tokenizer(gpt_folder).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.fingerprint == import_tokenizer(gpt_folder).fingerprint
    folder = export(tokenizer)
    assert compare_tokenizers(tokenizer, folder) == []
    assert load(folder).pad_token == "<|pad|>"


def test_a_sentencepiece_model_is_taken_if_transformers_reads_it_alike(tmp_path: Path) -> None:
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**plain))
    _write_config(tmp_path, "llama")
    tokenizer = import_tokenizer(tmp_path)
    theirs = load(tmp_path)
    assert tokenizer.kind == "sentencepiece"
    assert theirs(LINE, add_special_tokens=False)["input_ids"] == tokenizer.encode(LINE)
    assert theirs(LINE, "ba")["input_ids"] == tokenizer.join(tokenizer.encode(LINE), tokenizer.encode("ba"))[0]
    # A corpus is prepared with the same tokenizer, whether its folder is named or its file.
    assert tokenizer.template is not None
    for number, path in enumerate((tmp_path, tmp_path / "tokenizer.model")):
        assert main(["tokenizer", "import", str(path), "-o", str(tmp_path / f"own-{number}")]) == 0
        assert Tokenizer.load(tmp_path / f"own-{number}").fingerprint == tokenizer.fingerprint
    # Where nothing lies beside it, nothing says what stands around texts.
    alone = tmp_path / "alone.model"
    (tmp_path / "tokenizer.model").rename(alone)
    assert main(["tokenizer", "import", str(alone), "-o", str(tmp_path / "own-alone")]) == 0
    assert Tokenizer.load(tmp_path / "own-alone").template is None


def test_otherwise_the_way_out_is_told_and_works(tmp_path: Path) -> None:
    model = sentencepiece_model(model_type="unigram", byte_fallback=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tmp_path / "spiece.model").write_bytes(model)
    _write_config(tmp_path, "t5")
    with pytest.raises(DataError, match=r"vocabulary is 800 in bigtx and 900 in transformers.*save_pretrained") as told:
        import_tokenizer(tmp_path)
    advice = str(told.value)
    subprocess.run([sys.executable, *shlex.split(advice[advice.index("python -c") :])[1:]], check=True)
    tokenizer = import_tokenizer(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size, len(tokenizer.sentinel_ids)) == ("huggingface", 900, 100)
    assert tokenizer.encode(LINE) == load(tmp_path)(LINE, add_special_tokens=False)["input_ids"]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no tokenizer: no tokenizer.json and no"):
        import_tokenizer(tmp_path)


def test_nothing_needs_the_network(bpe: Tokenizer, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was tried")

    folder = export(bpe)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert compare_tokenizers(bpe, folder) == []


def test_a_missing_transformers_names_the_extra(
    bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"pip install 'bigtx\[huggingface\]'"):
        compare_tokenizers(bpe, tmp_path)


def test_a_folder_that_cannot_be_loaded_is_an_error(bpe: Tokenizer, export: Export) -> None:
    folder = export(bpe)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="Transformers cannot load"):
        compare_tokenizers(bpe, folder)


def test_differences_are_lines(bpe: Tokenizer, unigram: Tokenizer, export: Export) -> None:
    lines = compare_tokenizers(unigram, export(bpe))
    assert any(line.startswith("the size of the vocabulary is 1000 in bigtx and 1500") for line in lines)
    assert 10 < len(lines) <= len(HARD_TEXTS) + 4
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9], "from token 2 on, bigtx has [3, 4, 5, 6, 7] and transformers [9]"),
        ([1, 2], [1, 2, 3], "from token 2 on, bigtx has [] and transformers [3]"),
    ],
)
def test_the_first_difference_of_ids(mine: list[int], theirs: list[int], expected: str) -> None:
    assert _first_difference(mine, theirs) == expected
