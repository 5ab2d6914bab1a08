from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from bigtx.utils import files
from bigtx.utils.errors import ConfigError
from bigtx.utils.files import json_value, read_object, sha256_file, write_atomic, write_json


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "größe")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("names", [("run.lock", "logs"), ("config.yaml", "logs"), ("config.yaml", "checkpoints")])
def test_a_folder_of_a_run_is_known_by_two_names(names: tuple[str, str]) -> None:
    for found in (names, (*names, "metrics.jsonl")):
        assert files.kind_of_own("/nowhere", found) == files.RUN
    assert [files.kind_of_own("/nowhere", [name]) for name in names] == [None, None]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 5000, "nested more than 100"),
        ("[" * 101 + "]" * 101, "nested more than 100"),
        ('{"a":' * 400 + "1" + "}" * 400, "nested more than 100"),
        (r'{"a": ["\ud800"]}', "half a surrogate pair"),
        (r'{"\uDFFF": 1}', "half a surrogate pair"),
        ("{", "Expecting"),
        (b"\xff", "decode"),
    ],
)
def test_json_that_others_wrote_is_refused(tmp_path: Path, text: str | bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        json_value(text)
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_object(path) == {}


def test_json_that_others_wrote_is_read() -> None:
    deep = "[" * 99 + "]" * 99
    assert json_value(deep) == json.loads(deep)
    assert json_value(rb'{"a": "\ud83d\ude00 \\ud800", "b": [1, null]}') == {"a": "\U0001f600 \\ud800", "b": [1, None]}


def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("number", "is_loss"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)])
def test_names_that_were_lost_are_an_error_and_names_that_need_no_sync_are_none(
    number: int, is_loss: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(OSError, match=os.strerror(number)) if is_loss else contextlib.nullcontext():
        files.fsync_dir(tmp_path)


def test_json_is_readable_and_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"a": [1, "ü"]})
    assert json.loads((tmp_path / "file").read_text()) == {"a": [1, "ü"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file", {"a": float("nan")})


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"x" * 100_000).hexdigest()


@pytest.mark.parametrize("content", [None, b"", b"\0" * 50, b"[1]", b'"text"', b'{"a": 1', b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_an_empty_one(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    assert read_object(tmp_path / "file") == {}
    write_json(tmp_path / "file", {"a": 1})
    assert read_object(tmp_path / "file") == {"a": 1}


def test_only_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    files.refuse_filled(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    files.refuse_filled(tmp_path / "empty")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for used in (tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(ConfigError, match="is not an empty folder; name another one"):
            files.refuse_filled(used)


def test_a_folder_whose_names_are_not_of_bigtx_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_begin", lambda path: pytest.fail(f"{path} was read"))
    assert files.kind_of_own("/nowhere", ["a.txt", "manifest.json"]) is None
    partial = ["part-1-of-3", "part-12-of-30", "work", "tokenizer"]
    assert files.kind_of_own("/nowhere/corpus.partial", partial) == "a corpus in preparation"
    assert files.kind_of_own("/nowhere/corpus.partial", [*partial, "a.txt"]) is None
