from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from data.inputs import table, tar
from hypothesis import given
from hypothesis import strategies as st

from bigtx.config.schema import InputConfig
from bigtx.data.raw import documents
from bigtx.data.raw.documents import EMPTY, Reject, Rejects, in_batches
from bigtx.data.raw.files import list_files, split_file
from bigtx.data.raw.read import read_documents, read_file
from bigtx.data.storage.access import InputFile
from bigtx.utils.errors import ConfigError, DataError


def read_all(config: InputConfig) -> tuple[list[str], list[Reject]]:
    found: list[Reject] = []
    return [d.text for d in read_documents(config, Rejects(config.max_rejects, found.append))], found


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "id": i}).encode() + b"\n" for i, text in enumerate(texts))


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a/z.txt",
        "a.md",
        "a/deep/y.jsonl",
        "a/x.ndjson.gz",
        "c.TXT",
        "skip.bin",
        ".hidden/h.txt",
        ".h.txt",
    ):
        content = json_lines([name]) if "json" in name else name.encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    texts, rejects = read_all(InputConfig(paths=[str(tmp_path)]))
    assert texts == ["a.md", "a/deep/y.jsonl", "a/x.ndjson.gz", "a/z.txt", "b.txt", "c.TXT"]
    assert rejects == []


@pytest.mark.parametrize("wildcards", ["", "/**/*.txt"])
@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["test"], ["testing.txt", "x/c_old.txt", "x/keep.txt"]),
        (["*/test/*"], ["testing.txt", "x/c_old.txt", "x/keep.txt"]),
        (["test/*"], ["testing.txt", "x/c_old.txt", "x/keep.txt", "x/test/b.txt"]),
        (["*_old.txt", "x/k*"], ["test/a.txt", "testing.txt", "x/test/b.txt"]),
        (["x"], ["test/a.txt", "testing.txt"]),
    ],
)
def test_exclude_takes_names_and_paths(tmp_path: Path, exclude: list[str], left: list[str], wildcards: str) -> None:
    for name in ("test/a.txt", "x/test/b.txt", "x/keep.txt", "x/c_old.txt", "testing.txt"):
        write(tmp_path / name, name.encode())
    assert read_all(InputConfig(paths=[f"{tmp_path}{wildcards}"], exclude=exclude)) == (left, [])


def test_paths_keep_their_order_and_each_file_counts_once(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1.txt", b"one"), write(tmp_path / "2.txt", b"two")
    config = InputConfig(paths=[str(second), str(tmp_path), str(tmp_path / "*.txt")])
    assert [file.path for file in list_files(config)] == [str(second), str(first)]


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.txt", b"a")
    os.symlink(tmp_path / "real", tmp_path / "real" / "circle")
    (tmp_path / "input").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "input" / "linked")
    os.symlink(tmp_path / "gone.txt", tmp_path / "input" / "dangling.txt")
    texts, rejects = read_all(InputConfig(paths=[str(tmp_path / "input")]))
    assert texts == ["a"]
    assert [Path(reject.file).name for reject in rejects] == ["dangling.txt"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "input.paths is empty"),
        (["gone"], "no file or folder"),
        (["a.bin"], "input.text_suffixes"),
        (["c.de.gz"], r"'input\.text_suffixes=\[\.txt,\.md,\.de\]'"),
        (["*.parquet"], "No text in"),
        (["folder"], "1 .rst"),
    ],
)
def test_paths_that_hold_no_text_are_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    write(tmp_path / "a.bin", b"x")
    write(tmp_path / "c.de.gz", gzip.compress(b"x"))
    write(tmp_path / "folder" / "b.rst", b"x")
    with pytest.raises(DataError, match=message):
        list_files(InputConfig(paths=[str(tmp_path / path) for path in paths]))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_comes_back_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]

    @given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        write(tmp_path / f"a.jsonl{suffix}", compress(json_lines(texts)))
        assert read_all(InputConfig(paths=[str(tmp_path / f"a.jsonl{suffix}")])) == (texts, [])
        write(tmp_path / f"a.txt{suffix}", compress(texts[0].encode()))
        expected = texts[0].removeprefix("\ufeff")
        assert read_all(InputConfig(paths=[str(tmp_path / f"a.txt{suffix}")]))[0] == ([expected] if expected else [])

    check()


def test_several_compressed_frames_in_one_file(tmp_path: Path) -> None:
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)):
        path = write(tmp_path / f"a.jsonl{suffix}", compress(json_lines(["a"] * 9000)) + compress(json_lines(["b"])))
        texts, rejects = read_all(InputConfig(paths=[str(path)]))
        assert (len(texts), texts[-1], rejects) == (9001, "b", [])


def test_lines_as_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\n  two \r three\n\r\nfour")
    found: list[Reject] = []
    read = list(read_documents(InputConfig(paths=[str(path)], document_per_line=True), Rejects(0, found.append)))
    assert [(d.text, d.line) for d in read] == [("one", 1), ("  two \r three", 3), ("four", 5)]
    assert found == []


def test_json_lines_may_have_a_signature_blank_lines_and_windows_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n  \r\n{"text": "b"}')
    assert read_all(InputConfig(paths=[str(path)])) == (["a", "b"], [])


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst", "a.json.zstd", "a.json.bz2", "a.json.xz"])
def test_json_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    compress = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
        ".zstd": zstandard.ZstdCompressor().compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }.get(Path(name).suffix, bytes)
    for content, texts in (
        (json_lines(["a", "b"]), ["a", "b"]),
        (b"\xef\xbb\xbf\n\n" + json_lines(["a", "b"]) + b"\n", ["a", "b"]),
        (json.dumps({"id": 1, "text": "one\nobject"}, indent=2).encode(), ["one\nobject"]),
        (b'{"text":\n"a"}\n', ["a"]),
    ):
        write(tmp_path / name, compress(content))
        assert read_all(InputConfig(paths=[str(tmp_path)])) == (texts, [])
    for content, line, reason in (
        (b'[{"text": "a"},\n{"text": "b"}]', 1, "a JSON array; write one object in each line"),
        (b'{"text": }\n' + json_lines(["b"]), 1, "not JSON"),
        (b'\n{"text": "a",\n"id": }', 2, "not JSON"),
        (b"\n", 0, "empty"),
    ):
        write(tmp_path / name, compress(content))
        _, [reject] = read_all(InputConfig(paths=[str(tmp_path / name)]))
        assert reject.line == line and reason in reject.reason


def test_large_json_lines_are_cut_whatever_their_suffix(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(500)]
    config = InputConfig(paths=[str(write(tmp_path / "a.json", json_lines(texts)))])
    [whole] = list_files(config)
    parts = split_file(whole, config, 1000)
    assert len(parts) > 5
    assert [d.text for part in parts for d in read_file(part, config, Rejects(0))] == texts
    write(tmp_path / "a.json", json.dumps({"text": "a", "lines": texts}, indent=1).encode())
    [whole] = list_files(config)
    assert split_file(whole, config, 1000) == [whole]


def test_short_suffixes_of_archives(tmp_path: Path) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"a"))
    for suffix, compress in ((".tgz", gzip.compress), (".tbz2", bz2.compress), (".txz", lzma.compress)):
        path = write(tmp_path / f"a{suffix}", compress(written.getvalue()))
        assert read_all(InputConfig(paths=[str(path)])) == (["a"], [])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.zip", "unpack it first"),
        ("a.jsonl.lz4", "unpack it first"),
        ("a.parquet.gz", "decompress it"),
        ("a.pdf", "convert it to text or JSON lines first"),
        ("a.rst.gz", r"'input\.text_suffixes=\[\.txt,\.md,\.rst\]'"),
        ("a", r"ends in \.txt"),
    ],
)
def test_no_advice_makes_a_wrong_corpus(tmp_path: Path, name: str, advice: str) -> None:
    path = write(tmp_path / name, b"x")
    with pytest.raises(
        DataError, match=rf"The format of .* is not known: .*{'if it is plain text' if 'rst' in name else ''}.*{advice}"
    ):
        list_files(InputConfig(paths=[str(path)]))


@pytest.mark.parametrize("suffix", [".json", ".JSONL", ".gz", ".txt.gz"])
def test_suffixes_of_text_that_cannot_take_effect_are_refused(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a.txt", b"a")
    with pytest.raises(ConfigError, match=rf"input\.text_suffixes: files that end in {suffix} are read as"):
        list_files(InputConfig(paths=[str(tmp_path)], text_suffixes=[".txt", suffix]))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".json"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, suffix: str, encoding: str) -> None:
    text = '{"text": "a text of some length, with commas"}\n' if "json" in suffix else "text,id\na text of length,1\n"
    write(tmp_path / f"a{suffix}", text.encode(encoding))
    texts, rejects = read_all(InputConfig(paths=[str(tmp_path)]))
    assert texts == [] and f"{encoding[:6].upper()} text" in rejects[0].reason


def test_nuls_throughout_are_no_text_and_a_few_are(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", bytes(5000))
    write(tmp_path / "b.txt", b"a\0b" + bytes(15))
    write(tmp_path / "c.jsonl", json_lines(["\0" * 30 + "a", "a few \0 in a text are text"]))
    write(tmp_path / "d.txt", b"\x01\0\0\x02\0" * 50)
    write(tmp_path / "e.csv", b"text\n" + bytes(50) + b"\nlast\n")
    texts, rejects = read_all(InputConfig(paths=[str(tmp_path)]))
    assert texts == ["a few \0 in a text are text", "last"]
    assert [Path(reject.file).name for reject in rejects] == ["a.txt", "b.txt", "c.jsonl", "d.txt", "e.csv"]
    assert "only NULs" in rejects[0].reason and "NUL" in rejects[3].reason


def test_a_key_that_stands_twice_is_a_reject(tmp_path: Path) -> None:
    lines = [b'{"text": "a", "text": "b"}', b'{"text": "c", "meta": {"x": 1, "x": 2}}', b'{"text": "d"}']
    write(tmp_path / "a.jsonl", b"\n".join(lines))
    texts, rejects = read_all(InputConfig(paths=[str(tmp_path)]))
    assert texts == ["d"]
    assert [(r.line, r.reason) for r in rejects] == [
        (1, "the key 'text' is a duplicate in an object"),
        (2, "the key 'x' is a duplicate in an object"),
    ]


def test_broken_records_are_listed_with_file_line_and_reason(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": ',
        b'["text"]',
        b'{"body": "x", "id": 3}',
        b'{"text": 7}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": ""}',
        b"[" * 100_000,
        b'{"text": "\\ud83d\\ude00"}',
    ]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    texts, rejects = read_all(InputConfig(paths=[str(path)]))
    assert texts == ["good", "😀"]
    assert [reject.line for reject in rejects] == [2, 3, 4, 5, 6, 7, 8, 9]
    reasons = [reject.reason for reject in rejects]
    words = [
        "not JSON",
        "a JSON list",
        "fields: body, id",
        "is a number",
        "unpaired surrogate",
        "not UTF-8",
        "empty",
        "not JSON",
    ]
    assert all(word in reason for word, reason in zip(words, reasons, strict=True)), reasons


def test_broken_files_are_listed_and_the_rest_is_read(tmp_path: Path) -> None:
    whole = json_lines([f"document {i}" for i in range(20_000)])
    write(tmp_path / "a.jsonl.gz", gzip.compress(whole)[:-20])
    write(tmp_path / "b.jsonl.zst", zstandard.ZstdCompressor().compress(whole)[:-20])
    write(tmp_path / "c.txt.gz", b"no gzip at all")
    write(tmp_path / "d.txt.zst", b"no zstd at all")
    write(tmp_path / "e.txt.gz", b"")
    write(tmp_path / "f.txt", "süß".encode("latin-1"))
    write(tmp_path / "g.txt", "UTF-16".encode("utf-16"))
    write(tmp_path / "h.txt", b"")
    write(tmp_path / "i.txt", b"good")
    texts, rejects = read_all(InputConfig(paths=[str(tmp_path)]))
    assert texts[-1] == "good"
    assert all(text.startswith("document ") for text in texts[:-1])
    reasons = {Path(reject.file).name: reject.reason for reject in rejects}
    assert sorted(reasons) == [
        "a.jsonl.gz",
        "b.jsonl.zst",
        "c.txt.gz",
        "d.txt.zst",
        "e.txt.gz",
        "f.txt",
        "g.txt",
        "h.txt",
    ]
    assert "end-of-stream marker" in reasons["a.jsonl.gz"]
    assert "end-of-stream marker" in reasons["b.jsonl.zst"]
    assert "not UTF-8" in reasons["f.txt"]
    assert "UTF-16" in reasons["g.txt"]
    assert reasons["h.txt"] == "empty"


def test_documents_too_long_are_rejected_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    write(tmp_path / "a.jsonl", json_lines(["one", "x" * 3_000_000, "two"]))
    write(tmp_path / "b.txt", b"x" * 101)
    write(tmp_path / "c.txt", b"x" * 100)
    texts, rejects = read_all(InputConfig(paths=[str(tmp_path)]))
    assert texts == ["one", "two", "x" * 100]
    assert [(Path(reject.file).name, reject.line) for reject in rejects] == [("a.jsonl", 2), ("b.txt", 1)]


@given(
    st.lists(st.text(min_size=1).filter(lambda text: "\n" not in text and text.strip("\r")), max_size=30),
    st.integers(1, 200),
)
def test_parts_of_a_file_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], part_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    for path, content in ((folder / "a.jsonl", json_lines(texts)), (folder / "a.txt", "\n".join(texts).encode())):
        config = InputConfig(paths=[str(write(path, content))], document_per_line=True)
        rejects = Rejects(0)
        whole = InputFile(str(path), len(content))
        parts = split_file(whole, config, part_bytes)
        read_in_parts = [document for part in parts for document in read_file(part, config, rejects)]
        assert read_in_parts == list(read_file(whole, config, rejects))
        assert sum(part.size for part in parts) == len(content)
        assert all(part.size >= part_bytes for part in parts[:-1])


def test_rejects_above_the_limit_are_an_error_that_shows_the_first() -> None:
    rejects = Rejects(0.01)
    rejects.add(Reject("a.jsonl", 7, "not JSON"))
    rejects.add(Reject("b.txt", 0, EMPTY))
    rejects.check(99, 1)
    with pytest.raises(
        DataError, match=r"1 of 50 documents \(2.00%\)(.|\n)*max_rejects=0.022(.|\n)*a.jsonl, line 7: not JSON"
    ):
        rejects.check(49, 1)
    assert (rejects.count, rejects.num_empty) == (1, 1)


def test_an_empty_corpus_is_an_error() -> None:
    rejects = Rejects(1.0)
    with pytest.raises(DataError, match="no documents"):
        rejects.check(0, 1)
    rejects.add(Reject("a.jsonl", 7, "not JSON"))
    with pytest.raises(DataError, match=r"no documents(.|\n)*line 7"):
        rejects.check(0, 1)


def test_names_inside_an_archive_do_not_steer_the_terminal() -> None:
    rejects = Rejects(0)
    rejects.add(Reject("a.tar/\x1b[2Jb.txt", 0, "a\nb"))
    with pytest.raises(DataError, match=r"a\.tar/\\x1b\[2Jb\.txt: a\\nb"):
        rejects.check(1, 1)


def test_metadata_is_found_by_the_fields_of_the_configuration(tmp_path: Path) -> None:
    records = [
        {"text": "a", "meta": {"url": "u1"}, "key": 7, "lang": "en"},
        {"text": "b", "meta": {}, "key": None},
        {"text": "c", "meta.url": "u3", "lang": ["en"]},
        {"text": "d", "meta.url": "u4", "meta": {"url": "other"}, "key": "d4"},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)).encode())
    config = InputConfig(paths=[str(path)], id_field="key", source_field="meta.url", language_field="lang")
    found: list[Reject] = []
    read = list(read_documents(config, Rejects(0, found.append)))
    assert [(d.text, d.id, d.source, d.language) for d in read] == [
        ("a", "7", "u1", "en"),
        ("b", None, None, None),
        ("d", "d4", "u4", None),
    ]
    assert [(reject.line, reject.reason) for reject in found] == [
        (3, "the field 'lang' is a list, not a text or a number")
    ]


def test_a_text_inside_of_nested_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"article": {"body": "a"}}\n{"article": "b"}')
    found: list[Reject] = []
    config = InputConfig(paths=[str(path)], text_field="article.body")
    assert [d.text for d in read_documents(config, Rejects(0, found.append))] == ["a"]
    assert "no field 'article.body'" in found[0].reason


def test_text_files_are_known_by_their_path_in_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "x" / "a.txt", b"a\nb")
    config = InputConfig(paths=[str(tmp_path)])
    assert [d.id for d in read_documents(config, Rejects(0))] == ["x/a.txt"]
    config.paths = [str(tmp_path / "*" / "a.txt")]
    assert [d.id for d in read_documents(config, Rejects(0))] == ["x/a.txt"]
    config.paths, config.document_per_line = [str(tmp_path / "x" / "a.txt")], True
    assert [(d.id, d.line) for d in read_documents(config, Rejects(0))] == [("a.txt:1", 1), ("a.txt:2", 2)]


LONG_KINDS = {
    "a.jsonl": json_lines,
    "a.json": json_lines,
    "a.txt": lambda texts: "".join(f"{text}\n" for text in texts).encode(),
    "a.csv": lambda texts: table([["text"], *([text] for text in texts)]),
    "text.tar": lambda texts: tar({f"{number}.txt": text.encode() for number, text in enumerate(texts)}),
    "json.tar": lambda texts: tar({f"{number}.json": json_lines([text]) for number, text in enumerate(texts)}),
}


@pytest.mark.parametrize("name", LONG_KINDS)
def test_no_long_document_is_held_while_the_next_one_is_read(tmp_path: Path, name: str) -> None:
    def peak(count: int) -> int:
        path = write(tmp_path / name, LONG_KINDS[name]([f"{number}" + "x" * (1 << 21) for number in range(count)]))
        documents = read_documents(InputConfig(paths=[str(path)], document_per_line=True), Rejects(0))
        tracemalloc.start()
        try:
            found = 0
            for batch in in_batches(documents, lambda document: len(document.text), 1):
                found += len(batch)
                del batch
            assert found == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # What is made once.
    assert peak(3) - peak(1) < 1 << 20
