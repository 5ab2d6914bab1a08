"""Decontamination: documents that share words with evaluation sets are found, whatever stands between the words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from bigtx.config.schema import DecontaminateConfig
from bigtx.data.raw import documents
from bigtx.data.text import decontaminate
from bigtx.data.text import ngrams as words_module
from bigtx.data.text.decontaminate import Contamination, build_contamination_index, contamination_digest
from bigtx.utils.errors import DataError

QUESTION = "Which of the seven bridges over the river was built first, and by whom was it paid for?"


def make_words(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(count)]


def build(folder: Path, texts: list[str], **settings: object) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return build_contamination_index(DecontaminateConfig(paths=[str(path)], **settings), folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1 << 16, 50])
def test_planted_contamination_is_found_and_nothing_else(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of 13 words at any place of a document, in other case and punctuation; runs of 12 are no contamination."""
    monkeypatch.setattr(decontaminate, "_BLOCK", block)
    draw = random.Random(5)
    texts = [make_words(draw.randint(13, 80), seed) for seed in range(300)]
    contamination = Contamination(build(tmp_path, [" ".join(words) for words in texts]))
    for number in range(300):
        document = make_words(400, 1000 + number)
        assert contamination.find(" ".join(document)) == ""
        source = draw.choice(texts)
        begin, place = draw.randrange(len(source) - 12), draw.randrange(401)
        for length in (12, 13):
            run = source[begin : begin + length]
            planted = document[:place] + [f"{word.upper()}," for word in run] + document[place:]
            found = contamination.find("\n ".join(planted))
            assert found == ("" if length == 12 else " ".join(run))


def test_a_long_document_is_searched_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs across the parts' borders are found; of runs of several lengths the shortest is named, wherever it is."""
    longer, shorter = make_words(13, 1), make_words(8, 2)
    contamination = Contamination(build(tmp_path, [" ".join(longer), " ".join(shorter)]))
    monkeypatch.setattr(words_module, "PIECE_CHARACTERS", 100)
    words_module._powers.cache_clear()
    longest: list[int] = []
    find = decontaminate._Set.find
    monkeypatch.setattr(decontaminate._Set, "find", lambda self, words: longest.append(len(words)) or find(self, words))
    document = make_words(200, 3)
    assert contamination.find(" ".join(document)) == ""
    for place in range(100, 130):
        planted = document[:place] + longer + document[place:]
        assert contamination.find(" ".join(planted)) == " ".join(longer)
        assert contamination.find(" ".join([*planted, *shorter])) == " ".join(shorter)
    assert max(longest) < 30
    words_module._powers.cache_clear()


def test_short_evaluation_texts_count_as_a_whole(tmp_path: Path) -> None:
    texts = ["one two three four five six seven eight", "only seven words are in this text", QUESTION]
    index = build(tmp_path, texts)
    contamination = Contamination(index)
    assert json.loads((index / "index.json").read_text())["too_short"] == 1
    assert contamination.find("zero One: two three four five six SEVEN eight nine") == texts[0]
    assert contamination.find("one two three four five six seven nine eight") == ""
    assert contamination.find("only seven words are in this text, you see, and nothing comes of it") == ""
    assert contamination.find(QUESTION) == "which of the seven bridges over the river was built first and by"
    assert contamination.find("short") == contamination.find("") == contamination.find("...") == ""
    lower = Contamination(build(tmp_path, texts, min_words=4))
    assert lower.find("Only seven words are in this text, you see") == texts[1]


def test_the_words_of_an_ngram_are_set(tmp_path: Path) -> None:
    contamination = Contamination(build(tmp_path, [QUESTION], ngram=3, min_words=8))
    assert contamination.find("the seven bridges") == "the seven bridges"
    assert contamination.find("bridges over troubled river") == ""


def test_sets_are_read_in_every_format_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(make_words(20, seed)) for seed in range(50)]
    jsonl = build(tmp_path, texts, text_field="text")
    digest = contamination_digest(jsonl)
    other = tmp_path / "other"
    other.mkdir()
    (other / "set.txt").write_text("\n".join(reversed(texts)) + "\n" + texts[3].upper() + "\n")
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(decontaminate, "_MERGE_HASHES", 20)
    config = DecontaminateConfig(paths=[str(other / "set.txt")], document_per_line=True)
    assert contamination_digest(build_contamination_index(config, other)) == digest
    config.ngram = 12
    assert contamination_digest(build_contamination_index(config, other)) != digest
    hashes = np.fromfile(jsonl / "13.u8", "<u8")
    assert len(hashes) == 50 * 8 and (hashes[1:] > hashes[:-1]).all()


def test_a_large_set_is_searched_beyond_its_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a screen of 16 entries nearly every n-gram passes it, and the sorted hashes decide."""
    monkeypatch.setattr(decontaminate, "_SCREEN_BITS", (4, 4))
    texts = [" ".join(make_words(40, seed)) for seed in range(100)]
    contamination = Contamination(build(tmp_path, texts))
    assert all(contamination.find(text) == " ".join(text.split()[:13]) for text in texts)
    assert not any(contamination.find(" ".join(make_words(200, seed))) for seed in range(1000, 1100))


def test_a_set_that_cannot_be_read_in_full_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"text": QUESTION}) + "\n" + json.dumps({"question": QUESTION}) + "\n")
    config = DecontaminateConfig(paths=[str(path)])
    with pytest.raises(
        DataError,
        match=r"Not all texts of decontaminate\.paths(.|\n)*set\.jsonl, line 2.*see decontaminate\.text_field",
    ):
        build_contamination_index(config, tmp_path)
    path.write_text(json.dumps({"text": "too short"}) + "\n")
    with pytest.raises(DataError, match="None of the 1 texts"):
        build_contamination_index(config, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["set.jsonl"]
