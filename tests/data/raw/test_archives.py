"""Tar archives and webdataset text shards: everything in them is bytes with a name, whoever made them."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from data.inputs import gz, json_lines, parquet, read_all, table, tar, texts_of, zst
from hypothesis import given
from hypothesis import strategies as st

from bigtx.config.schema import InputConfig
from bigtx.data.raw import documents
from bigtx.data.raw.documents import Rejects
from bigtx.data.raw.files import list_files, split_file
from bigtx.data.raw.read import read_file


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_read_as_files_are(tmp_path: Path, suffix: str, layout: int) -> None:
    long_name = "/".join(["folder" * 9] * 2 + [f"{'n' * 60}.txt"])
    content = tar(
        [
            ("./a.txt", b"\xef\xbb\xbfa"),
            (long_name, b"long"),
            ("lines.jsonl", json_lines(["b", "c"])),
            ("lines.jsonl.gz", gz(json_lines(["d"]))),
            ("e.md.zst", zst(b"e")),
            ("table.csv", table([["text"], ["f"]])),
            ("record.json", b'{"text": "g", "key": 5}'),
            ("._a.txt", b"a resource fork"),
            ("skip/h.txt", b"h"),
            ("last.txt", b"z" * 512),
        ],
        format=layout,
    )
    path = write(tmp_path / f"a.tar{suffix}", {".gz": gz, ".zst": zst}.get(suffix, bytes)(content))
    found, rejects = read_all(path, exclude=["skip"], id_field="key")
    assert rejects == []
    assert [d.text for d in found] == ["a", "long", "b", "c", "d", "e", "f", "g", "z" * 512]
    assert [d.line for d in found] == [1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert found[1].file == f"{path}/{long_name}" and found[1].id == long_name
    assert found[7].id == "5"
    numbers = [d.number for d in found]
    assert numbers == sorted(set(numbers))


@given(st.dictionaries(st.text(st.sampled_from("abä"), min_size=1), st.binary(max_size=2000), min_size=1, max_size=5))
def test_any_sizes(tmp_path_factory: pytest.TempPathFactory, members: dict[str, bytes]) -> None:
    texts = {f"{name}.txt": (content.hex() or "x").encode() for name, content in members.items()}
    path = write(tmp_path_factory.mktemp("tar") / "a.tar", tar(texts))
    assert texts_of(path) == [text.decode() for text in texts.values()]


def test_a_record_beside_a_text_is_its_metadata(tmp_path: Path) -> None:
    members = [
        ("x/000.json", b'{"lang": "en", "url": "u0", "text": "not this"}'),
        ("x/000.txt", b"a"),
        ("x/001.txt", b"b"),
        ("x/001.json", b'{"lang": "de", "key": 1}'),
        ("x/002.de.txt", b"c"),
        ("x/002.en.txt", b"d"),
        ("x/002.json", b'{"lang": "?"}'),
        ("x/003.json", b'{"lang": "fr", "text": "e"}'),
        ("x/004.txt", b"f"),
        ("x/005.json", b"broken"),
        ("x/005.txt", b"g"),
        ("y/005.txt", b"h"),
    ]
    path = write(tmp_path / "a.tar", tar(members))
    found, rejects = read_all(path, id_field="key", source_field="url", language_field="lang")
    assert [(d.text, d.id, d.source, d.language) for d in found] == [
        ("a", "x/000.txt", "u0", "en"),
        ("b", "1", None, "de"),
        ("c", "x/002.de.txt", None, "?"),
        ("d", "x/002.en.txt", None, "?"),
        ("e", None, None, "fr"),
        ("f", "x/004.txt", None, None),
        ("h", "y/005.txt", None, None),
    ]
    assert [(reject.file, reject.line) for reject in rejects] == [(f"{path}/x/005.json", 1)]
    # Nobody asks for the metadata.
    assert texts_of(path) == ["a", "b", "c", "d", "e", "f", "g", "h"]


def test_dots_in_names_overwrite_nothing(tmp_path: Path) -> None:
    records = [(f"2101.{number:05d}.json", json.dumps({"text": f"t{number}"}).encode()) for number in range(10)]
    assert texts_of(write(tmp_path / "a.tar", tar(records))) == [f"t{number}" for number in range(10)]
    pairs = []
    for number in range(10):
        pairs.append((f"2101.{number:05d}.txt", f"t{number}".encode()))
        pairs.append((f"2101.{number:05d}.json", b'{"id": %d, "text": "not this"}' % number))
    path = write(tmp_path / "a.tar", tar(pairs))
    found, rejects = read_all(path, id_field="id")
    assert rejects == [] and [(d.text, d.id) for d in found] == [(f"t{n}", str(n)) for n in range(10)]
    assert texts_of(path) == [f"t{number}" for number in range(10)]
    names = ["notes v1.0 (final).txt", "notes v1.1 (final).txt", "notes v1.0.json", "notes v1.1.json"]
    contents = [b"one", b"two", b'{"text": "three"}', b'{"text": "four"}']
    path = write(tmp_path / "a.tar", tar(list(zip(names, contents, strict=True))))
    for settings in ({}, {"id_field": "id"}):
        assert sorted(texts_of(path, **settings)) == ["four", "one", "three", "two"]
    path = write(tmp_path / "a.tar", tar({"x.en.json": b'{"text": "english"}', "x.de.json": b'{"text": "deutsch"}'}))
    assert texts_of(path) == ["english", "deutsch"]


@pytest.mark.parametrize(
    ("members", "texts", "rejected"),
    [
        ([("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3")], ["1", "2"], {"a.txt": "a second member"}),
        ([("a.txt", b"1"), ("./a.txt", b"3")], ["1"], {"./a.txt": "a second member"}),
        ([("a.json", b'{"text": "1"}'), ("a.json", b'{"text": "2"}')], ["1"], {"a.json": "a second member"}),
        ([("a.txt", b"1"), ("a.json", b"{}"), ("a.json.gz", gz(b"{}"))], ["1"], {"a.json.gz": "a second record"}),
        ([("a.txt", b"1"), ("b.txt", b"2"), ("a.json", b'{"id": 1}')], ["1", "2"], {"a.json": "separate from"}),
        ([("a.json", b'{"text": "1"}'), ("b.txt", b"2"), ("a.txt", b"3")], ["1", "2"], {"a.txt": "separate from"}),
        ([("a.txt", b"1"), ("a.b.json", b'{"id": 1}')], ["1"], {"a.b.json": "no field 'text'"}),
    ],
)
def test_what_is_not_clear_is_rejected_by_name(
    tmp_path: Path, members: list[tuple[str, bytes]], texts: list[str], rejected: dict[str, str]
) -> None:
    path = write(tmp_path / "a.tar", tar(members))
    found, rejects = read_all(path, id_field="id")
    assert sorted(d.text for d in found) == texts
    assert [reject.file.removeprefix(f"{path}/") for reject in rejects] == list(rejected)
    assert all(reason in reject.reason for reject, reason in zip(rejects, rejected.values(), strict=True))


def test_json_lines_in_a_member_that_says_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tar({"c4.00000-of-01024.json.gz": gz(json_lines(["a", "b"]))}))
    assert texts_of(path) == ["a", "b"]


def test_what_is_not_read_anyway_is_no_failure(tmp_path: Path) -> None:
    good = tar({f"d/{number}.txt": b"text %d" % number for number in range(3)})
    link = {"type": tarfile.SYMTYPE, "linkname": "lib.so.1", "size": 0}
    others = [tar({name: b""}, **link).rstrip(b"\0") for name in ("d/lib.so", "d/skip/a.txt", "../lib.so")]
    padded = b"".join(content + bytes(-len(content) % 512) for content in others)
    path = write(tmp_path / "a.tar", padded + good)
    rejects = Rejects(0)
    config = InputConfig(paths=[str(path)], exclude=["skip"])
    [file] = list_files(config)
    assert [d.text for d in read_file(file, config, rejects)] == ["text 0", "text 1", "text 2"]
    assert not rejects and rejects.passed_over == {".so": 2}


def test_a_slash_at_the_front_is_taken_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tar({"/abs/a.txt": b"a", "//b.txt": b"b", "C:\\c.txt": b"c"}))
    found, rejects = read_all(path)
    assert rejects == [] and [(d.text, d.id) for d in found] == [
        ("a", "abs/a.txt"),
        ("b", "b.txt"),
        ("c", "C:\\c.txt"),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_broken_members_are_rejected_by_name_and_the_rest_is_read(tmp_path: Path) -> None:
    members = [
        ("a.txt", b"\xff"),
        ("a.json", b'{"text": "metadata of a broken text is no document"}'),
        ("b.txt.gz", gz(b"b" * 5000)[:-9]),
        ("c.json", b"[1]"),
        ("d.jsonl", b'{"text": "d"}\n{'),
        ("e.txt", b""),
        ("f.txt", b"f"),
    ]
    path = write(tmp_path / "a.tar", tar(members))
    found, rejects = read_all(path)
    assert [d.text for d in found] == ["d", "f"]
    assert [(reject.file.removeprefix(f"{path}/"), reject.line) for reject in rejects] == [
        ("a.txt", 1),
        ("b.txt.gz", 0),
        ("c.json", 1),
        ("d.jsonl", 2),
        ("e.txt", 1),
    ]


def test_a_record_at_the_cut_is_no_document(tmp_path: Path) -> None:
    content = tar({"000.txt": b"a", "001.json": b'{"text": "b"}', "001.txt": b"b"})
    path = write(tmp_path / "a.tar", content[: 4 * 512])
    found, [reject] = read_all(path)
    assert [d.text for d in found] == ["a"]
    assert "end-of-archive" in reject.reason


def test_an_archive_is_cut_anywhere(tmp_path: Path) -> None:
    members = {f"{number}.txt": bytes([97 + number]) * 300 for number in range(4)}
    content = tar(members)
    for end in range(1, 4 * 1024 + 1, 61):
        found, rejects = read_all(write(tmp_path / "a.tar", content[:end]))
        assert len(rejects) == 1, end
        assert [d.text for d in found] == [text.decode() for text in members.values()][: (end + 212) // 1024], end


@pytest.mark.parametrize(
    ("name", "attributes", "reason"),
    [
        ("../out.txt", {}, "leads out"),
        ("a/../../out.txt", {}, "leads out"),
        ("a\\..\\out.txt", {}, "leads out"),
        ("out.txt", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}, "a link"),
        ("out.txt", {"type": tarfile.LNKTYPE, "linkname": "../../secret.txt", "size": 0}, "a link"),
        ("out.txt", {"type": tarfile.CHRTYPE, "size": 0}, "a device"),
        ("out.txt", {"type": tarfile.FIFOTYPE, "size": 0}, "a device"),
        ("out.txt", {"type": b"Z"}, "unknown type 'Z'"),
        ("out.txt", {"pax_headers": {"GNU.sparse.major": "1"}}, "sparse"),
    ],
)
def test_members_that_are_no_plain_files_are_rejected_by_name(
    tmp_path: Path, name: str, attributes: dict[str, object], reason: str
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    bad = tar({name: b"bad"} if attributes.get("size") != 0 else {name: b""}, **attributes)
    path = write(
        folder / "a.tar", bad.rstrip(b"\0") + bytes(-len(bad.rstrip(b"\0")) % 512) + tar({"good.txt": b"good"})
    )
    found, [reject] = read_all(path)
    assert [d.text for d in found] == ["good"]
    assert reject.file == f"{path}/{name}" and reason in reject.reason
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])
    assert not os.path.exists("/tmp/out.txt")


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_passed_over_and_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    poison = pickle.dumps(Canary(canary))
    members = {f"000.{suffix}": poison for suffix in ("pyd", "pkl", "pickle", "pth", "pt", "npy")}
    path = write(tmp_path / "a.tar", tar(members | {"000.txt": b"a", "000.json": poison}))
    rejects = Rejects(0)
    [file] = list_files(InputConfig(paths=[str(path)]))
    assert [d.text for d in read_file(file, InputConfig(), rejects)] == ["a"]
    assert rejects.passed_over == {f".{suffix}": 1 for suffix in ("pyd", "pkl", "pickle", "pth", "pt", "npy")}
    _, [reject] = read_all(path, language_field="lang")
    assert "not UTF-8" in reject.reason
    pickle.loads(poison)
    assert canary.exists(), "the canary does not sing: this test tests nothing"


def test_parquet_and_archives_inside_an_archive_are_passed_over(tmp_path: Path) -> None:
    inside = tar({"b.txt": b"b"})
    path = write(tmp_path / "a.tar", tar({"a.txt": b"a", "b.tar": inside, "c.parquet": parquet([{"text": "c"}])}))
    rejects = Rejects(0)
    [file] = list_files(InputConfig(paths=[str(path)]))
    assert [d.text for d in read_file(file, InputConfig(), rejects)] == ["a"]
    assert rejects.passed_over == {".tar": 1, ".parquet": 1}


def test_headers_that_claim_too_much_are_damage(tmp_path: Path) -> None:
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    huge = info.tobuf(tarfile.GNU_FORMAT)
    _, [reject] = read_all(write(tmp_path / "a.tar", tar({"a.txt": b"a"})[:1024] + huge + bytes(5000)))
    assert "an extended header of 1,099,511,627,776 bytes" in reject.reason
    info.size = 20
    for content in (b"99999999999999999999", b"0 path=x\n", b"19 path=x.txt\n", b"no length at all"):
        header = info.tobuf(tarfile.GNU_FORMAT) + content.ljust(512, b"\0")
        found, [reject] = read_all(write(tmp_path / "a.tar", header + tar({"a.txt": b"a"})))
        assert found == [] and "a pax header that cannot be read" in reject.reason


def test_members_too_long_are_rejected_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    bomb = zst(bytes(50_000_000))
    members = {"a.txt": b"x" * 1001, "b.txt.zst": bomb, "c.json": b" " * 2000, "d.txt": b"d", "e.tsv.gz": gz(bomb)}
    found, rejects = read_all(write(tmp_path / "a.tar", tar(members)))
    assert [d.text for d in found] == ["d"]
    assert [reject.file.rpartition("/")[2] for reject in rejects] == ["a.txt", "b.txt.zst", "c.json", "e.tsv.gz"]
    many = [(f"doc.{number}.txt", b"x" * 300) for number in range(5)] + [("doc.json", b'{"lang": "en"}')]
    found, [reject] = read_all(write(tmp_path / "a.tar", tar(many)), language_field="lang")
    # The first four were given before the record came, so that it is for none.
    assert [d.language for d in found] == [None] * 5 and "separate from" in reject.reason


def test_archives_are_not_cut_into_parts(tmp_path: Path) -> None:
    [file] = list_files(InputConfig(paths=[str(write(tmp_path / "a.tar", tar({"a.txt": b"a" * 9999})))]))
    assert split_file(file, InputConfig(), 10) == [file]


def test_old_sparse_maps_are_stepped_over(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("sparse.txt").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482:483] = tarfile.GNUTYPE_SPARSE, b"\1"
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    content = bytes(header) + bytes(504) + b"\1" + bytes(7) + bytes(512) + tar({"a.txt": b"a"})
    found, [reject] = read_all(write(tmp_path / "a.tar", content))
    assert [d.text for d in found] == ["a"] and "sparse" in reject.reason
