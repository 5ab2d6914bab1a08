"""Broken raw text through `bigtx data prepare`: counted, listed by file, line and reason; too much is refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from data.inputs import gz, json_lines, parquet, table, tar, without_end, zst

from bigtx.cli import main
from bigtx.config.schema import TokenizerTrainConfig
from bigtx.data.corpus.manifest import Manifest
from bigtx.tokenizer.train import train

# Compressed, they are longer than what is decompressed at once.
MANY = [f"text {number} of many, {random.Random(number).random()}" for number in range(9000)]
FEW = [f"text {number}" for number in range(30)]
ROWS = [["id", "text"], *[[str(number), text] for number, text in enumerate(FEW)]]
RECORDS = [{"text": text, "id": number} for number, text in enumerate(FEW)]
MEMBERS = {f"{number:02d}.txt": text.encode() for number, text in enumerate(FEW)}

NUM_GOOD = 7


def damaged(content: bytes, where: float) -> bytes:
    """The content with 40 bytes overwritten, at a place from 0 to 1."""
    begin = int(len(content) * where)
    return content[:begin] + b"\xff\x00" * 20 + content[begin + 40 :]


Kept = int | range
CASES: dict[str, tuple[str, bytes, list[tuple[int, str]], Kept]] = {
    # A name, what the file holds, the rejects' lines (-1: any) and reasons, and how many of its documents are kept.
    "text: invalid UTF-8": ("a.txt", "süß".encode("latin-1"), [(1, "not UTF-8")], 0),
    "text: UTF-16": ("a.txt", "süß".encode("utf-16"), [(1, "UTF-16 text; convert it to UTF-8")], 0),
    "text: gz cut short": ("a.txt.gz", gz(MANY[0].encode())[:-5], [(0, "ended before the end-of-stream marker")], 0),
    "text: gz is none": ("a.txt.gz", b"plain", [(0, "cannot be read: Not a gzipped file")], 0),
    "text: zst is none": ("a.txt.zst", b"plain", [(0, "cannot be read: zstd")], 0),
    "text: no bytes of gz": ("a.txt.gz", b"", [(0, "truncated: no bytes")], 0),
    "jsonl: invalid UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', [(2, "not UTF-8")], 1),
    "jsonl: broken JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}', [(2, "not JSON")], 2),
    "jsonl: cut short": ("a.jsonl", json_lines(FEW)[:-5], [(30, "not JSON: Unterminated string")], 29),
    "jsonl: no field": ("a.jsonl", b'{"body": "a"}', [(1, "no field 'text' (its fields: body)")], 0),
    "jsonl: wrong type": ("a.jsonl", b'{"text": ["a"]}\n7', [(1, "is a list, not a text"), (2, "a JSON int")], 0),
    "jsonl: gz cut short": ("a.jsonl.gz", gz(json_lines(MANY))[:-9], [(9001, "end-of-stream marker")], 9000),
    "jsonl: gz cut in half": ("a.jsonl.gz", gz(json_lines(MANY))[:99_999], [(-1, "end-of-stream")], range(3000, 8999)),
    "jsonl: gz damaged": ("a.jsonl.gz", damaged(gz(json_lines(MANY)), 0.5), [], range(3000, 8999)),
    "jsonl: zst cut short": ("a.jsonl.zst", zst(json_lines(MANY))[:99_999], [(-1, "end-of-stream")], range(3000, 8999)),
    "jsonl: zst damaged": ("a.jsonl.zst", damaged(zst(json_lines(MANY)), 0.5), [(-1, "cannot be")], range(1000, 8999)),
    "csv: long and short rows": (
        "a.csv",
        table([["id", "text"], ["1"], ["2", "b"], ["3", "c", "x"]]),
        [(2, "1 fields where the first line names 2"), (4, "3 fields")],
        1,
    ),
    "csv: no column": ("a.csv", table([["id", "body"], ["1", "a"]]), [(1, "no column 'text' (its columns: id, b")], 0),
    "csv: invalid UTF-8": ("a.csv", b"text,id\na,1\n\xff,2\nb,3\n", [(3, "not UTF-8")], 2),
    "csv: open quotation": ("a.csv", b'text,id\na,1\n"b,2\nc,3\n', [(3, "unexpected end of data")], 1),
    "tsv: rows of the wrong length": ("a.tsv", table(ROWS, "\t") + b"9\tx\ty\r\n", [(32, "3 fields")], 30),
    "tsv: gz cut short": ("a.tsv.gz", gz(table(ROWS, "\t"))[:-9], [(-1, "end-of-stream marker")], range(1, 31)),
    "parquet: cut short": ("a.parquet", parquet(RECORDS)[:-20], [(0, "cannot be read")], 0),
    "parquet: no bytes": ("a.parquet", b"", [(0, "truncated: no bytes")], 0),
    "parquet: damaged": ("a.parquet", damaged(parquet(RECORDS), 0.02), [(-1, "(row group 0)")], 20),
    "parquet: no column": ("a.parquet", parquet([{"body": "a"}]), [(0, "no column 'text' (its columns: body)")], 0),
    "parquet: wrong type": ("a.parquet", parquet([{"text": 7}]), [(0, "of the type int64, not a text")], 0),
    "parquet: null": ("a.parquet", parquet([{"text": "a"}, {"text": None}]), [(2, "is null, not a text")], 1),
    "tar: cut inside a member": ("a.tar", tar({"a.txt": b"a", "b.txt": b"b" * 900})[:2000], [(0, "truncated")], 1),
    "tar: cut at a member's border": ("a.tar", without_end(tar(MEMBERS)), [(0, "without an end-of-archive")], 30),
    "tar: cut inside a header": ("a.tar", without_end(tar(MEMBERS))[:-600], [(0, "inside a header")], 29),
    "tar: damaged header": ("a.tar", damaged(tar(MEMBERS), 0.0)[:-1], [(0, "not a tar archive")], 0),
    "tar: damaged header inside": ("a.tar", damaged(tar(MEMBERS), 10 / 40), [(0, "damaged at byte 10,240")], 10),
    "tar: gz cut short": ("a.tar.gz", gz(tar(MEMBERS))[:-9], [(0, "end-of-stream marker")], 30),
    "tar: zst cut short": ("a.tar.zst", zst(tar(MEMBERS))[:-9], [(0, "end-of-stream marker")], range(0, 31)),
    "tar: two in one file": ("a.tar", tar({"a.txt": b"a"}) + tar({"b.txt": b"b"}), [(0, "several archives")], 1),
    "tar: no text in it": ("a.tar", tar({"a.pkl": b"a", "b.jpg": b"b"}), [(0, "none of its members is read")], 0),
    "tar: no bytes": ("a.tar", b"", [(0, "truncated: no bytes")], 0),
    "empty file": ("a.txt", b"", [(0, "empty")], 0),
    "empty line": ("a.jsonl", b'{"text": ""}', [(1, "empty")], 0),
    "empty archive": ("a.tar", tar({}), [(0, "empty")], 0),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(TokenizerTrainConfig(vocab_size=400), MANY[:200]).save(folder)
    return folder


Prepare = Callable[..., int]


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Path) -> Prepare:
    """`bigtx data prepare` of the folder `input`, in which there are some good texts too."""
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "good.jsonl").write_bytes(json_lines([f"good {number}" for number in range(NUM_GOOD)]))

    def run(*changes: str) -> int:
        settings = [f"tokenizer={tokenizer}", f"output={tmp_path}/corpus", "num_processes=1", "validation_fraction=0"]
        return main(["data", "prepare", f"input.paths=[{tmp_path}/input]", *settings, *changes])

    return run


def listed(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_broken_input_is_listed_and_the_rest_is_kept(tmp_path: Path, prepare: Prepare, case: str) -> None:
    name, content, expected, kept = CASES[case]
    (tmp_path / "input" / name).write_bytes(content)
    assert prepare("input.max_rejects=1") == 0
    rejects = listed(tmp_path / "corpus" / "rejects.jsonl")
    assert len(rejects) == len(expected) if expected else rejects
    for reject, (line, reason) in zip(rejects, expected, strict=bool(expected)):
        assert reject["file"] in (str(tmp_path / "input" / name), f"{tmp_path}/input/{name}/b.txt")
        assert reject["line"] == line or line == -1
        assert reason in str(reject["reason"])
    found = Manifest.load(tmp_path / "corpus" / "train").num_documents - NUM_GOOD
    assert found in kept if isinstance(kept, range) else found == kept


@pytest.mark.parametrize(
    ("case", "share"),
    [
        ("jsonl: broken JSON", "1 of 10 documents (10.00%)"),
        # As many as the mean of two files.
        ("tar: cut at a member's border", "19 of 56 documents (33.93%)"),
        ("parquet: damaged", "10 of 37 documents (27.03%)"),
    ],
)
def test_too_much_of_it_is_refused(
    tmp_path: Path, prepare: Prepare, case: str, share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, [(_, reason)], _ = CASES[case]
    (tmp_path / "input" / name).write_bytes(content)
    assert prepare() == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"DataError: {share} could not be read") and "input.max_rejects allows 0.10%" in shown
    assert str(tmp_path / "input" / name) in shown and reason in shown
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
def test_a_stray_quotation_mark_costs_what_it_swallows(
    tmp_path: Path, prepare: Prepare, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    delimiter = "\t" if suffix == "tsv" else ","
    rows = [["id", "text"], *[[str(number), f"text {number}"] for number in range(2000)]]
    lines = table(rows, delimiter).splitlines(keepends=True)
    lines[200] = f'199{delimiter}"5 inch disk\r\n'.encode()
    content = b"".join(lines)
    (tmp_path / "input" / f"a.{suffix}").write_bytes(gz(content) if suffix.endswith(".gz") else content)
    assert prepare() == 2
    shown = capsys.readouterr().err
    assert "1,801 of 2,007 documents (89.74%)" in shown
    assert "line 201: unexpected end of data" in shown and "input.quoted_fields=false" in shown
    assert "(with it 1,801 lines are lost)" in shown


def test_files_that_are_cut_count_as_much_as_a_file_has(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(9):
        content = gz(json_lines(MANY[number * 500 : number * 500 + 500]))
        (tmp_path / "input" / f"{number}.jsonl.gz").write_bytes(content[:300] if number == 3 else content)
    assert prepare("input.max_rejects=0.05") == 2
    shown = capsys.readouterr().err
    assert "an estimate for 1 file that cannot be read to the end: as many as a file has on average" in shown
    assert prepare("input.max_rejects=0.15") == 0
    assert "an unknown number in 1 file that cannot be read to the end" in capsys.readouterr().out


def test_little_of_it_is_allowed(tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "input" / "many.jsonl").write_bytes(json_lines(MANY[:1000]) + b"broken\n")
    assert prepare() == 0
    assert [reject["line"] for reject in listed(tmp_path / "corpus" / "rejects.jsonl")] == [1001]


def test_a_file_that_cannot_be_opened(tmp_path: Path, prepare: Prepare) -> None:
    os.symlink(tmp_path / "gone", tmp_path / "input" / "link.txt")
    assert prepare("input.max_rejects=1") == 0
    [reject] = listed(tmp_path / "corpus" / "rejects.jsonl")
    assert reject["reason"] == "cannot be read: No such file or directory"


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bigtx.data.prepare.job as module

    before = module.list_files

    def list_and_change(*arguments: object) -> object:
        files = before(*arguments)  # type: ignore[arg-type]
        os.utime(tmp_path / "input" / "a.txt", ns=(1, 1))
        return files

    (tmp_path / "input" / "a.txt").write_text("a")
    monkeypatch.setattr(module, "list_files", list_and_change)
    assert prepare("input.max_rejects=1") == 0
    [reject] = listed(tmp_path / "corpus" / "rejects.jsonl")
    assert reject["reason"] == "cannot be read: it was changed since it was listed"
