"""csv, tsv and parquet."""

from __future__ import annotations

import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data.inputs import gz, parquet, read_all, table, texts_of, zst
from hypothesis import given
from hypothesis import strategies as st

from bigtx.config.schema import InputConfig
from bigtx.data.raw import readers
from bigtx.data.raw.documents import Rejects
from bigtx.data.raw.files import list_files, split_file
from bigtx.data.raw.read import read_file
from bigtx.data.storage.access import InputFile
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
    monkeypatch.setattr(readers, "MAX_FIELD_CHARACTERS", 1000)
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
    assert reject.reason == "the first line has duplicate columns: 'text'" and reject.lost is None
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


def write_columns(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


TEXT_TYPES = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "large dictionary": pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
    "binary_view": pyarrow.binary_view(),
    "dictionary of binary": pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
}


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_every_text_like_type_of_parquet_is_text(tmp_path: Path, name: str) -> None:
    texts = ["naïve", None, "a", "naïve"]
    stored = [text.encode() if text and "binary" in name else text for text in texts]
    column = pyarrow.array(stored).cast(TEXT_TYPES[name])
    nested = pyarrow.StructArray.from_arrays([column], ["body"])
    path = write_columns(tmp_path / "a.parquet", text=column, id=column, nested=nested)
    for field in ("text", "nested.body"):
        documents, [reject] = read_all(path, text_field=field, id_field="id")
        assert [(d.text, d.id, d.line) for d in documents] == [
            ("naïve", "naïve", 1),
            ("a", "a", 3),
            ("naïve", "naïve", 4),
        ]
        assert reject.line == 2 and ("is null" in reject.reason or "no field" in reject.reason)


def test_bytes_of_parquet_that_are_not_utf8_are_rejected_alone(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", text=[b"a", b"\xff\xfe", b"b"])
    documents, [reject] = read_all(path)
    assert [d.text for d in documents] == ["a", "b"]
    assert reject.line == 2 and "UTF-16" in reject.reason


NO_TEXT_TYPES = {
    "int64": [1, 2],
    "double": [1.5, 2.5],
    "bool": [True, False],
    "list<element: string>": [["a"], ["b"]],
    "struct<a: string>": [{"a": "b"}, {"a": "c"}],
    "timestamp[us]": [datetime(2026, 1, 1), datetime(2026, 1, 2)],
    "decimal128(3, 2)": [Decimal("1.25"), Decimal("2.50")],
}


@pytest.mark.parametrize("name", NO_TEXT_TYPES)
def test_columns_that_are_no_text_are_named_with_their_type(tmp_path: Path, name: str) -> None:
    values = NO_TEXT_TYPES[name]
    path = write_columns(tmp_path / "a.parquet", text=values, id=values, body=["a", "b"])
    documents, [reject] = read_all(path)
    assert documents == [] and reject.lost == 2
    assert reject.reason.startswith(f"the column 'text' is of the type {name}, not a text; see input.text_field")
    documents, rejects = read_all(path, text_field="body", id_field="id")
    if isinstance(values[0], (int, float, Decimal)) and name != "bool":
        assert [d.id for d in documents] == [str(value) for value in values]
    else:
        assert documents == [] and all("not a text or a number" in reject.reason for reject in rejects)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("5", "a number"), ("1.5", "a number"), ("true", "true or false"), ('["a"]', "a list"), ('{"a": 1}', "an object")],
)
def test_json_values_that_are_no_text_are_named_with_their_type(tmp_path: Path, value: str, kind: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n')
    _, [reject] = read_all(tmp_path / "a.jsonl")
    assert reject.reason == f"the field 'text' is {kind}, not a text"
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "id": {value}}}\n')
    documents, rejects = read_all(tmp_path / "a.jsonl", id_field="id")
    if kind == "a number":
        assert [d.id for d in documents] == [value]
    else:
        assert [reject.reason for reject in rejects] == [f"the field 'id' is {kind}, not a text or a number"]


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
