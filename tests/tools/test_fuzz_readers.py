"""tools/fuzz_bytes.py: each fault of a reader is reported, and the same number gives the same files."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from doors import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import fuzz_bytes
from fuzz_bytes import Reader, check_examples, files_of, trials


def reader(read: Callable[[Path], object]) -> Reader:
    return Reader("mine", [{"a.json": b'{"a": [1, 2]}', "b/c.txt": b"one\ntwo\n"}], read, (ValueError,))


def spin(folder: Path) -> None:
    while True:
        pass


def fill(folder: Path) -> None:
    assert len(bytearray(os.urandom(1)) * (200 << 20))


def write_outside(folder: Path) -> None:
    (folder.parent.parent / "outside").write_text("x")


def connect(folder: Path) -> None:
    socket.socket().connect_ex(("127.0.0.1", 9))


def refuse_at_length(folder: Path) -> None:
    raise ValueError("x" * 5000)


def sleep_long(folder: Path) -> None:
    ctypes.CDLL(None).sleep(30)


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda folder: [][1], "IndexError at"),
        (spin, "computes for more than 0.2 s"),
        (sleep_long, "waits for more than 1 s"),
        (fill, "more than 10 times the memory"),
        (write_outside, "opens or starts open"),
        (lambda folder: subprocess.run(["true"]), "opens or starts subprocess.Popen"),
        (lambda folder: os.system("true"), "opens or starts os.system"),
        (connect, "opens or starts socket.connect"),
        (lambda folder: os.abort(), "the process ended: SIGABRT"),
        (lambda folder: os._exit(0), "the process ended: 0"),
        (refuse_at_length, "a message of more than"),
    ],
)
def test_a_fault_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object], what: str
) -> None:
    monkeypatch.setattr(fuzz_bytes, "CPU_SECONDS", 0.2 if read is spin else 60.0)
    monkeypatch.setattr(fuzz_bytes, "WAITING_SECONDS", 1.0 if read is sleep_long else 60.0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = list(trials(reader(read), range(7, 9), scratch, [b"other"]))
    assert [failure.number for failure in found if failure] == [7, 8]
    assert all(failure.what.startswith(what) for failure in found if failure), found


def test_a_good_reader_has_no_fault(tmp_path: Path) -> None:
    """It may refuse, write into its folder, and read elsewhere."""

    def read(folder: Path) -> None:
        (folder / "own").write_bytes(b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()))
        (ROOT / "README.md").read_text()
        raise ValueError("refused")

    assert list(trials(reader(read), range(12), tmp_path, [b"other"])) == [None] * 12


def test_the_same_number_gives_the_same_files(tmp_path: Path) -> None:
    made = []
    for number in (*range(40), *range(40)):
        files_of(reader(spin), number, tmp_path / "made", [b"other"])
        made.append({path.name: path.read_bytes() for path in (tmp_path / "made").rglob("*") if path.is_file()})
    assert made[:40] == made[40:] and len({str(files) for files in made}) > 30


def test_an_example_that_is_refused_is_reported(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise ValueError("refused")

    with pytest.raises(AssertionError, match="mine reads none of its examples"):
        check_examples(reader(refuse), tmp_path)
