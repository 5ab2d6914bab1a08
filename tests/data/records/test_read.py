"""Files -> records: every kind gives the same ones, and what cannot be read is told with its place."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from typing import Any

import pytest
import zstandard
from data.inputs import tar
from finetunes import labelled, write_folders, write_jsonl, write_samples, write_table

from bigtx.data.records.read import natural, read_records
from bigtx.data.records.record import Broken, Record
from bigtx.utils.errors import DataError

RECORDS = labelled(12)


class Told(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, int, str]] = []

    def add(self, file: str, line: int, reason: str) -> None:
        self.all.append((Path(file).name, line, reason))
        super().add(file, line, reason)


def read(*paths: Path | str) -> tuple[list[Record], Told]:
    broken = Told()
    return list(read_records([str(path) for path in paths], broken)), broken


def fields(*paths: Path | str) -> list[dict[str, Any]]:
    records, broken = read(*paths)
    assert broken.all == []
    return [dict(record.fields) for record in records]


def sorted_by_text(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: record["text"])


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    samples = [{"txt": record["text"], "cls": record["label"] + "\n"} for record in RECORDS]
    jsonl = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(jsonl.read_bytes()))
    packed = tmp_path / "a.csv.zst"
    packed.write_bytes(zstandard.compress(write_table(tmp_path / "a.csv", RECORDS).read_bytes()))
    for path in (
        jsonl,
        zipped,
        packed,
        write_table(tmp_path / "a.tsv", RECORDS),
        write_samples(tmp_path / "a.tar", samples),
        tmp_path / "*.jsonl",
    ):
        assert fields(path) == RECORDS, path
    folder = write_folders(tmp_path / "folder", RECORDS)
    assert sorted_by_text(fields(folder)) == sorted_by_text(RECORDS)
    assert [record["label"] for record in fields(folder)] == ["joy"] * 6 + ["woe"] * 6
    assert [record["text"] for record in fields(folder / "joy")] == [record["text"] for record in RECORDS[::2]]


def test_numbers_in_names_count_as_numbers(tmp_path: Path) -> None:
    assert sorted(["10_1", "9_7", "9_10"], key=natural) == ["9_7", "9_10", "10_1"]
    folder = write_folders(tmp_path / "folder", labelled(24))
    names = [Path(record.file).name for record in read(folder)[0] if record.fields["label"] == "joy"]
    assert names == [f"{number}.txt" for number in range(0, 24, 2)]


def test_two_files_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "x.de").write_text("eins\nzwei\n")
    (tmp_path / "x.en").write_text("one\r\ntwo")
    assert fields(tmp_path / "x.{de,en}") == [{"source": "eins", "target": "one"}, {"source": "zwei", "target": "two"}]
    (tmp_path / "x.en").write_text("one\n")
    records, broken = read(tmp_path / "x.{de,en}")
    assert records == [] and "the same number of lines" in broken.all[0][2]


def test_what_cannot_be_read_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\nnope\n[1]\n{"text": "\xff"}\n{"text": "b"}')
    records, broken = read(path)
    assert [record.fields for record in records] == [{"text": "a"}, {"text": "b"}]
    assert [record.line for record in records] == [1, 6]
    assert [(file, line) for file, line, _ in broken.all] == [("a.jsonl", 3), ("a.jsonl", 4), ("a.jsonl", 5)]
    table = tmp_path / "a.csv"
    table.write_bytes(b'text,label\n"two\nlines",joy\nshort\nc,joy,woe\n\xff,joy\n"d",woe\n')
    records, broken = read(table)
    assert [(record.fields["text"], record.line) for record in records] == [("two\nlines", 2), ("d", 7)]
    assert [line for _, line, _ in broken.all] == [4, 5, 6]
    table.write_text("text,text\na,b\n")
    assert "duplicate columns" in read(table)[1].all[0][2]


def test_damaged_files_and_samples_are_told(tmp_path: Path) -> None:
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    assert ["cannot be read" in reason for _, _, reason in read(cut)[1].all] == [True]
    samples = [
        {"txt": "good", "cls": "joy"},
        {"txt": b"\xff", "cls": "joy"},
        {"json": "[1]"},
        {"json": '{"text": "x"}'},
    ]
    shard = write_samples(tmp_path / "a.tar", samples)
    records, broken = read(shard)
    assert [dict(record.fields) for record in records] == [{"text": "good", "label": "joy"}, {"text": "x"}]
    assert [file for file, _, _ in broken.all] == ["00001.txt", "00002.json"]
    shard.write_bytes(shard.read_bytes()[:1200])
    records, broken = read(shard)
    assert len(records) <= 1 and broken.all
    folder = write_folders(tmp_path / "folder", RECORDS)
    (folder / "joy" / "0.txt").write_bytes(b"\xff")
    records, broken = read(folder)
    assert len(records) == 11 and broken.all[0][0] == "0.txt"


def test_samples_with_dots_in_their_names(tmp_path: Path) -> None:
    samples = {
        f"2101.{number:05d}.{suffix}": f"{suffix} {number}".encode() for number in range(4) for suffix in ("txt", "cls")
    }
    (tmp_path / "a.tar").write_bytes(tar(samples))
    assert fields(tmp_path / "a.tar") == [{"text": f"txt {number}", "label": f"cls {number}"} for number in range(4)]
    records = {f"x.{name}.json": b'{"text": "%s", "label": "joy"}' % name.encode() for name in ("en", "de")}
    (tmp_path / "a.tar").write_bytes(tar(records))
    assert [record["text"] for record in fields(tmp_path / "a.tar")] == ["en", "de"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.txt", b"1"), ("a.txt", b"2")], "a second member of this name"),
        ([("a.txt", b"1"), ("a.md", b"2")], "gives 'text' too"),
        ([("a.txt", b"1"), ("a.json", b'{"text": "2"}')], "gives 'text' too"),
        ([("a.txt", b"1"), ("b.txt", b"2"), ("a.cls", b"joy")], "the key 'a' appears again after others"),
        ([("a.jpg", b"1")], "the sample 'a' has no member .json"),
        ([("a.json", b'{"text": "1", "text": "2"}')], "the key 'text' is a duplicate"),
        ([("a.json", b'{"text": "\\ud83d"}')], "an unpaired surrogate"),
        ([("a.txt", "a text in another encoding".encode("utf-16le"))], "UTF-16 text"),
        ([("../a.txt", b"1")], "leads out of the archive"),
    ],
)
def test_samples_that_are_not_clear_are_told(tmp_path: Path, members: list[tuple[str, bytes]], said: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("good.txt", b"good"), *members]))
    records, broken = read(tmp_path / "a.tar")
    assert {"text": "good"} in [record.fields for record in records]
    assert any(said in reason for _, _, reason in broken.all), broken.all


def test_files_of_records_in_an_archive_are_read_as_they_are(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", RECORDS).read_bytes()
    packed = zstandard.compress(write_table(tmp_path / "a.csv", RECORDS).read_bytes())
    (tmp_path / "a.tar").write_bytes(tar({"a.jsonl": lines, "b.csv.zst": packed, "/c.json.gz": gzip.compress(lines)}))
    assert fields(tmp_path / "a.tar") == RECORDS * 3


def test_json_of_any_suffix(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", RECORDS).read_bytes()
    (tmp_path / "a.json.bz2").write_bytes(bz2.compress(lines))
    assert fields(tmp_path / "a.json.bz2") == RECORDS
    for line in (b'{"text": "a", "text": "b"}', b'{"text": "\\ud83d"}'):
        (tmp_path / "a.jsonl").write_bytes(line)
        assert len(read(tmp_path / "a.jsonl")[1].all) == 1
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(DataError, match="unpack it first"):
        read(tmp_path / "a.zip")


def test_members_with_other_suffixes_are_never_decoded(tmp_path: Path) -> None:
    shard = write_samples(tmp_path / "a.tar", [{"txt": "a", "pkl": b"cos\nsystem\n", "pth": b"PK"}])
    assert fields(shard) == [{"text": "a"}]


def test_what_names_no_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for path, expected in (
        ("nowhere", "no file or folder"),
        ("a.bin", "not end in one of"),
        ("empty", "no records"),
    ):
        with pytest.raises(DataError, match=expected):
            read(tmp_path / path)
    with pytest.raises(DataError, match=r"no file .*x\.de"):
        read(tmp_path / "x.{de,en}")


def test_an_error_names_the_first_few_and_steers_no_terminal() -> None:
    broken = Broken()
    broken.check()
    for line in range(1, 8):
        broken.add("a\x1b[2J.jsonl", line, "bad\x07")
    with pytest.raises(DataError) as raised:
        broken.check()
    assert "7 records cannot be used, the first 5 of them" in str(raised.value)
    assert "line 5" in str(raised.value) and "line 6" not in str(raised.value)
    assert "\x1b" not in str(raised.value) and "\x07" not in str(raised.value)


def test_a_name_with_dots_leads_inside() -> None:
    record = Record({"a": {"b": "deep"}, "c.d": "flat"}, "f")
    assert (record.value("a.b"), record.value("c.d"), record.value("a.x"), record.value("a.b.c")) == (
        "deep",
        "flat",
        None,
        None,
    )


def test_what_is_excluded_by_name_is_left_out_of_folders(tmp_path: Path) -> None:
    for name in ("neg/1.txt", "pos/1.txt", "unsup/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("so so")
    broken = Broken()
    found = [record.fields["label"] for record in read_records([str(tmp_path)], broken, ["un*"])]
    assert found == ["neg", "pos"] and broken.count == 0


def test_what_bigtx_made_in_a_folder_is_no_record(tmp_path: Path) -> None:
    """A run, an export and predictions beside the records of a folder change nothing."""
    for number, label in enumerate(("joy", "woe")):
        (tmp_path / label).mkdir()
        (tmp_path / label / f"{number}.txt").write_text("a text")
    before = fields(tmp_path)
    for name in ("run/logs/rank-00000.log", "run/run.lock", "run/notes.md", "p.jsonl", "p.jsonl.about.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "c.rejects.jsonl").write_text('{"file": "a", "line": 1, "reason": "text"}\n')
    assert fields(tmp_path) == before
    with pytest.raises(DataError, match="was made by bigtx"):
        fields(tmp_path / "run")
