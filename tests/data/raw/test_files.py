"""Which files an input names, and that nothing but a file or URL can be named."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from data.inputs import texts_of

from bigtx.cli import main
from bigtx.config.schema import InputConfig
from bigtx.data.raw.files import list_files
from bigtx.data.storage.access import InputFile
from bigtx.data.storage.remote import shown
from bigtx.utils.errors import DataError


def test_braces_stand_for_several_paths(tmp_path: Path) -> None:
    for name in ("a-000.txt", "a-001.txt", "a-002.md", "b{1,2}.txt"):
        (tmp_path / name).write_text(name)
    assert texts_of(f"{tmp_path}/a-{{000..001}}.txt") == ["a-000.txt", "a-001.txt"]
    assert texts_of(f"{tmp_path}/a-*.{{md,txt}}") == ["a-002.md", "a-000.txt", "a-001.txt"]
    assert texts_of(f"{tmp_path}/a-{{0..0}}{{01..00}}.{{txt,txt}}") == ["a-001.txt", "a-000.txt"]
    # A file that has this very name comes first.
    assert texts_of(f"{tmp_path}/b{{1,2}}.txt") == ["b{1,2}.txt"]
    with pytest.raises(DataError, match=r"no file or folder .*a-002\.txt"):
        texts_of(f"{tmp_path}/a-{{001..003}}.txt")
    with pytest.raises(DataError, match="expands to more than 1,000,000 paths"):
        texts_of(f"{tmp_path}/{{0..99999999}}.txt")
    with pytest.raises(DataError, match="no file or folder"):
        texts_of(f"{tmp_path}/a-{{000.txt")


def test_the_version_of_a_file_is_its_time_of_change(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    os.utime(path, ns=(1, 7))
    [file] = list_files(InputConfig(paths=[str(path)]))
    assert (file.size, file.version, file.name) == (1, "7", "a.txt")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a?b#c.txt", "a?b#c.txt"),
        ("https://host/a.txt", "https://host/a.txt"),
        ("https://user:word@host/a@b.txt?key=1#x", "https://host/a@b.txt?<hidden>"),
        ("s3://bucket/a?.txt", "s3://bucket/a?.txt"),
    ],
)
def test_what_is_written_down_of_a_path(path: str, expected: str) -> None:
    assert shown(path) == expected


def test_the_identity_of_a_file_holds_no_secret() -> None:
    one, other = (InputFile(f"https://host/a.txt?sig={name}", 5, version="v") for name in "ab")
    assert one.identity == other.identity
    assert one.identity != InputFile("https://host/a.txt", 6, version="v").identity
    assert InputFile("a.txt", 5).identity[0] == os.path.abspath("a.txt")


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when a command of an input is run; `touch-canary` makes it."""
    program = tmp_path / "bin" / "touch-canary"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/canary\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    os.system("touch-canary")
    assert (tmp_path / "canary").exists()
    (tmp_path / "canary").unlink()
    return tmp_path / "canary"


@pytest.mark.parametrize(
    "path",
    [
        "pipe:touch-canary",
        "PIPE:touch-canary .txt",
        "pipe:touch-canary {0..1}.txt",
        "{pipe:touch-canary,a}.txt",
        "pipe://touch-canary/a.txt",
        "file:///etc/hostname",
        "file:/etc/hostname",
        "ftp://host/a.txt",
        "local:///etc/hostname",
        "memory://a.txt",
        "github://owner:repository@main/a.txt",
        "ssh://host/a.txt",
        "zip://a.txt::https://host/a.zip",
        "simplecache::s3://bucket/a.txt",
        "filecache::file:///etc/hostname",
        "s3://bucket/a.txt::file:///etc/hostname",
        "s3://key:secret@bucket/a.txt",
        "http:///a.txt",
        "a/https://host/a.txt",
    ],
)
def test_nothing_but_files_and_urls_can_be_named(tmp_path: Path, canary: Path, path: str) -> None:
    with pytest.raises(DataError) as caught:
        list_files(InputConfig(paths=[path]))
    assert "secret" not in str(caught.value)
    settings = [f"output={tmp_path}/corpus", f"tokenizer={tmp_path}", "num_processes=1"]
    assert main(["data", "prepare", f'input.paths=["{path}"]', *settings]) == 2
    assert not canary.exists() and not (tmp_path / "corpus").exists()


def test_gopen_rewrite_changes_nothing(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.txt").write_text("a")
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}/input=pipe:touch-canary ")
    monkeypatch.setenv("USE_GOPEN", "1")
    assert texts_of(tmp_path / "input") == texts_of(tmp_path / "input" / "a.txt") == ["a"]
    assert not canary.exists()


def test_names_that_look_like_commands_are_names(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "input").mkdir()
    monkeypatch.chdir(tmp_path / "input")
    for name in ("pipe:touch-canary .txt", "$(touch-canary).txt", "|touch-canary.txt"):
        Path(name).write_text(name)
    assert len(texts_of(".")) == len(texts_of("*.txt")) == len(texts_of(tmp_path / "input")) == 3
    assert not canary.exists()
