from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from bigtx.tokenizer.report import kind_of
from bigtx.tokenizer.special import DESCRIPTION, around
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import cut
from bigtx.utils.errors import DataError

# Characters that tokenizers lose: spaces and their mark, line ends, NUL, byte order mark, joiners, other scripts.
HARD = st.text(st.sampled_from(list(" \u2581\u2585\u2047\t\r\n\x00\ufeff\ufffd\u00a0\u200d\u3000a1<>s/|é你👍\u0301")))
ANY = st.one_of(
    st.text(),
    HARD,
    st.lists(
        st.sampled_from(
            ["<mask>", "</s>", "<s>", "<unk>", "<pad>", "<|user|>", "▁", "  ", "<extra_id_7>", "<0x41>", "if", "\n"]
        )
    ).map("".join),
)


@settings(max_examples=500)
@given(ANY)
def test_any_text_comes_back_as_it_was(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not bpe.special.all() & set(ids)
    stream = bpe.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == text


@given(ANY)
def test_any_text_comes_back_from_a_unigram_model(unigram: Tokenizer, text: str) -> None:
    ids = unigram.encode(text)
    assert unigram.decode(ids) == text
    assert not unigram.special.all() & set(ids)


@given(st.lists(ANY, max_size=8))
def test_a_batch_is_its_texts_one_by_one(bpe: Tokenizer, texts: list[str]) -> None:
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


def test_special_ids_have_their_places(bpe: Tokenizer) -> None:
    assert (bpe.pad_id, bpe.unk_id, bpe.begin_id, bpe.end_id, bpe.mask_id) == (0, 1, 2, 3, 4)
    assert bpe.sentinel_ids == list(range(5, 105))
    assert bpe.role_ids == {"system": 105, "user": 106, "assistant": 107, "tool": 108}
    assert bpe.id_to_piece(105) == "<|system|>"
    assert len(bpe.special.all()) == 109


def test_special_ids_say_nothing_unless_asked(bpe: Tokenizer) -> None:
    ids = [bpe.begin_id, *bpe.encode("self"), bpe.mask_id or 0, bpe.end_id]
    assert bpe.decode(ids) == "self"
    assert bpe.decode(ids, keep_special=True) == "<s>self<mask></s>"
    assert "".join(map(bpe.stream().push, ids)) == "self"


def test_ids_outside_the_vocabulary_are_refused(bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match="-100 is not a token id"):
        bpe.decode([5, -100])
    with pytest.raises(IndexError):
        bpe.decode([bpe.vocab_size])


def test_a_stream_gives_only_whole_characters(bpe: Tokenizer) -> None:
    ids = bpe.encode("你")
    assert len(ids) == 3
    stream = bpe.stream()
    assert [stream.push(i) for i in ids] == ["", "", "你"]
    assert [stream.push(ids[0]), stream.flush()] == ["", "\ufffd"]
    assert bpe.decode(ids[:2]) == "\ufffd"


def test_half_a_surrogate_pair_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match="character 3"):
        bpe.encode("ab\ud800")


def test_a_unigram_model_sees_the_whole_of_a_long_text(unigram: Tokenizer) -> None:
    text = "return" * 50_000
    assert unigram.encode(text) == unigram.model.encode_batch([text])[0]


@given(st.text(st.sampled_from(list("ab \n"))), st.integers(1, 10))
def test_parts_are_the_text(text: str, limit: int) -> None:
    parts = list(cut(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts)


def test_parts_end_where_lines_and_words_do() -> None:
    assert list(cut("one two\nthree four", 10)) == ["one two\n", "three four"]
    assert list(cut("three four five", 11)) == ["three four", " five"]


def test_a_folder_brings_it_back(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.fingerprint == bpe.fingerprint
    assert loaded.special == bpe.special
    assert loaded.origin == bpe.origin
    assert loaded.encode("def f():\n    pass") == bpe.encode("def f():\n    pass")


def test_a_tokenizer_without_an_origin(bpe: Tokenizer, tmp_path: Path) -> None:
    made = Tokenizer(bpe.model, bpe.special)
    made.save(tmp_path / "tokenizer")
    assert made.origin == {} == Tokenizer.load(tmp_path / "tokenizer").origin and bpe.origin


@pytest.mark.parametrize(
    ("begin", "end", "single", "pair"),
    [
        (5, 6, ([5, 8, 8, 6], [0, 0, 0, 0]), ([5, 8, 8, 6, 5, 9, 6], [0, 0, 0, 0, 1, 1, 1])),
        (5, None, ([5, 8, 8], [0, 0, 0]), ([5, 8, 8, 5, 9], [0, 0, 0, 1, 1])),
        (None, None, ([8, 8], [0, 0]), ([8, 8, 9], [0, 0, 1])),
    ],
)
def test_only_the_second_text_of_a_pair_is_of_type_1(begin: int | None, end: int | None, single, pair) -> None:
    template = around(begin, end)
    assert template.fill([[8, 8]]) == single and template.fill([[8, 8], [9]]) == pair


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (" return", ["letters"]),
        ("self.", ["letters", "punctuation and signs"]),
        ("x0", ["letters", "digits"]),
        ("    \n", ["white space", "white space"]),
        ("é", ["single bytes", "single bytes"]),
    ],
)
def test_the_kind_of_a_piece_is_that_of_its_text(bpe: Tokenizer, text: str, kinds: list[str]) -> None:
    assert [kind_of(bpe, i) for i in bpe.encode(text)] == kinds and kind_of(bpe, bpe.end_id) == "special"


def test_the_fingerprint_is_of_the_kind_the_model_and_the_special_ids(
    bpe: Tokenizer, unigram: Tokenizer, tmp_path: Path
) -> None:
    assert bpe.fingerprint != unigram.fingerprint
    bpe.save(tmp_path)
    other_roles = Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model", roles=["user"])
    assert other_roles.role_ids == {"user": 106}
    assert other_roles.fingerprint != bpe.fingerprint
    assert Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model").fingerprint == bpe.fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / DESCRIPTION).unlink(), "No tokenizer in"),
        (lambda folder: (folder / DESCRIPTION).write_text("{"), "is damaged"),
        (lambda folder: (folder / DESCRIPTION).write_text("[]"), "is damaged"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "cannot read"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b""), "not a sentencepiece model"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"x" * 1000), "not a sentencepiece model"),
        (lambda folder: edit(folder, "format", 99), "format 99"),
        (lambda folder: edit(folder, "kind", "magic"), "kind 'magic'"),
        (lambda folder: (folder / DESCRIPTION).write_text('{"format": 9, "special": {}}'), "is damaged"),
        (lambda folder: without(folder, "kind"), "format 9 and kind None"),
        (lambda folder: edit(folder, "special", {"pad": 1}), "is damaged"),
        (lambda folder: edit(folder, "fingerprint", "0" * 64), "do not belong together"),
        (lambda folder: edit(folder, "fingerprint", ["0"]), "is damaged"),
        (lambda folder: edit(folder, "kind", ["x"] * 1000), r"kind \['x'.{0,60}, which this"),
        (lambda folder: edit_id(folder, "pad", "0"), "is damaged"),
        (lambda folder: edit_id(folder, "end", -1), "is damaged"),
        (lambda folder: edit_id(folder, "roles", []), "is damaged"),
        (lambda folder: edit_id(folder, "mask", 10**9), "has the id 1000000000, but tokenizer.model has"),
    ],
)
def test_a_damaged_folder_is_refused(bpe: Tokenizer, tmp_path: Path, damage, message: str) -> None:
    bpe.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def edit(folder: Path, key: str, value: object) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(description | {key: value}))


def without(folder: Path, key: str) -> None:
    """A description of a later format that lacks a key."""
    description = json.loads((folder / DESCRIPTION).read_text()) | {"format": 9}
    del description[key]
    (folder / DESCRIPTION).write_text(json.dumps(description))


def edit_id(folder: Path, name: str, value: object) -> None:
    special = json.loads((folder / DESCRIPTION).read_text())["special"]
    edit(folder, "special", special | {name: value})


@pytest.mark.parametrize("ids", [[500], [500, 501]], ids=["a piece", "the library's message about a duplicate"])
def test_a_model_whose_piece_is_not_text_is_refused(bpe: Tokenizer, tmp_path: Path, ids: list[int]) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(bpe.model.data)
    for i in ids:
        proto.pieces[i].piece = "a duplicate"
    (tmp_path / "a.model").write_bytes(proto.SerializeToString().replace(b"a duplicate", b"\xff" * 11))
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer.from_sentencepiece(tmp_path / "a.model")


def test_one_flipped_byte_of_the_model_is_found(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.model"
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), len(data) // 40):
        damaged = data.copy()
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            Tokenizer.load(tmp_path)
