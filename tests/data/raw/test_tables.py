"""csv, tsv and parquet."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from data.inputs import gz, parquet, read_all, table, texts_of, zst
from hypothesis import given
from hypothesis import strategies as st

from bigtx.config.schema import InputConfig
from bigtx.data.raw import tables
from bigtx.data.raw.read import InputFile, Rejects, list_files, read_file, split_file
from bigtx.utils.errors import DataError

# A field can hold anything but half a surrogate pair.
FIELDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".tsv.zst", ".parquet"])
def test_texts_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, suffix: str) -> None:
    path = tmp_path_factory.mktemp("table") / f"a{suffix}"

    @given(st.lists(FIELDS, min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        rows = [["id", "text", "x"], *[[str(number), text, "x"] for number, text in enumerate(texts)]]
        if suffix == ".parquet":
            content = parquet([dict(zip(rows[0], row, strict=True)) for row in rows[1:]], row_group_size=2)
        else:
            content = table(rows, "\t" if suffix.startswith(".tsv") else ",")
        path.write_bytes({".gz": gz, ".zst": zst}.get(path.suffix, bytes)(content))
        documents, rejects = read_all(path, id_field="id", source_field="x", language_field="y")
        assert rejects == []
        assert [(d.text, d.id, d.source, d.language) for d in documents] == [
            (text, str(number), "x", None) for number, text in enumerate(texts)
        ]

    check()


def test_rows_begin_at_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,id\r\n"two\nlines, ""quoted""",1\r\n\r\nlast,2')
    documents, rejects = read_all(tmp_path / "a.csv")
    assert rejects == []
    assert [(d.text, d.line) for d in documents] == [('two\nlines, "quoted"', 2), ("last", 5)]


def test_quotation_marks_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'text\tid\n"No," he said.\t1\n"\t2\n')
    assert texts_of(tmp_path / "a.tsv", quoted_fields=False) == ['"No," he said.', '"']
    _, rejects = read_all(tmp_path / "a.tsv")
    assert [reject.line for reject in rejects] == [2, 3]


def test_fields_too_long_are_rejected_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_FIELD_CHARACTERS", 1000)
    long_rows = ["x" * 1001, "x" * 5000, "a\n" * 700]
    (tmp_path / "a.csv").write_bytes(table([["text"], ["a"], *[[row] for row in long_rows[:2]], ["b"]]))
    documents, rejects = read_all(tmp_path / "a.csv")
    assert [d.text for d in documents] == ["a", "b"]
    assert [(reject.line, reject.reason.split(" (")[0]) for reject in rejects] == [
        (3, "field larger than field limit"),
        (4, "a line above the limit of 0 MiB"),
    ]
    (tmp_path / "a.csv").write_bytes(table([["text"], ["a"], [long_rows[2]], ["b"]]))
    documents, [reject] = read_all(tmp_path / "a.csv")
    assert [(d.text, d.line) for d in documents] == [("a", 2), ("b", 704)]
    assert reject.line == 3 and "field larger than field limit" in reject.reason


def test_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,text\na,b\n")
    _, [reject] = read_all(tmp_path / "a.csv")
    assert reject.reason == "the first line names columns twice: 'text'" and reject.lost is None
    (tmp_path / "a.csv").write_bytes(b"text,,\na,b,c\n")
    assert texts_of(tmp_path / "a.csv") == ["a"]


def test_row_groups_of_a_file_are_the_file(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "other": "x" * 50} for number in range(95)]
    (tmp_path / "a.parquet").write_bytes(parquet(rows, row_group_size=10))
    config = InputConfig(paths=[str(tmp_path)])
    [whole] = list_files(config)
    for part_bytes in (1, 700, 10**6):
        parts = split_file(whole, config, part_bytes)
        assert len(parts) == {1: 10, 10**6: 1}.get(part_bytes, len(parts))
        assert sum(part.size for part in parts) == whole.size
        documents = [document for part in parts for document in read_file(part, config, Rejects(0))]
        assert documents == list(read_file(whole, config, Rejects(0)))
        assert [(d.text, d.line) for d in documents] == [(f"text {line - 1}", line) for line in range(1, 96)]


def test_nested_columns_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([{"body": {"text": "a", "x": 1}, "meta": {"lang": "en", "y": 2}}]))
    [document], _ = read_all(tmp_path / "a.parquet", text_field="body.text", language_field="meta.lang")
    assert (document.text, document.language) == ("a", "en")


def test_damaged_parquet_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(1000))
    file = InputFile(str(tmp_path / "a.parquet"), 1004)
    assert split_file(file, InputConfig(), 10) == [file]


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'bigtx\[parquet\]'"):
        list_files(InputConfig(paths=[str(tmp_path)]))
    assert texts_of(tmp_path, exclude=["*.parquet"]) == ["a"]
