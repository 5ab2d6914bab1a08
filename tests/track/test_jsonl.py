from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtx.track.jsonl import JsonLines
from bigtx.utils.errors import LaunchError


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


class Warnings(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write_steps(path: Path, first: int, last: int, **options: Any) -> None:
    file = JsonLines(path, warn=Warnings(), **options)
    for step in range(first, last + 1):
        file.merge({"step": step, "time": float(step), "x": step / 3})
    file.close()


@given(
    st.dictionaries(st.text(), st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.integers()))
)
def test_what_is_written_reads_back(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        file = JsonLines(path, warn=Warnings())
        file.append({**values, "step": 1})
        file.close()
        assert read(path) == [{**values, "step": 1}]


def test_what_json_cannot_say(path: Path) -> None:
    file = JsonLines(path, warn=Warnings())
    file.append(
        {"a": float("nan"), "b": float("-inf"), "c": np.float32(0.5), "d": Path("/x"), "e": [np.int64(3), "\ud800"]}
    )
    (record,) = read(path)
    assert record == {"a": "NaN", "b": "-Infinity", "c": 0.5, "d": "/x", "e": [3, "\ud800"]}
    assert float(record["b"]) == float("-inf")


def test_resume_removes_what_is_done_again(path: Path) -> None:
    write_steps(path, 1, 12)
    write_steps(path, 11, 20, up_to_step=10)
    assert [record["step"] for record in read(path)] == list(range(1, 21))


@pytest.mark.parametrize("tail", [b'{"step": 6, "x"', b'{"step": 6}', b"\0\0\0\0", b"\xff\n", b"[1]\n"])
def test_a_torn_end_is_mended(path: Path, tail: bytes) -> None:
    write_steps(path, 1, 5)
    path.write_bytes(path.read_bytes() + tail)
    write_steps(path, 6, 7)
    assert [record["step"] for record in read(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_damage_in_the_middle_costs_its_line_only(path: Path) -> None:
    write_steps(path, 1, 5)
    path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"st\0p": ', 1))
    write_steps(path, 6, 6)
    assert [record["step"] for record in read(path)] == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("step", ['"many"', "null", "[1]", "1.5"])
def test_a_line_whose_step_is_no_number_is_of_no_step(path: Path, step: str) -> None:
    write_steps(path, 1, 3)
    with path.open("a") as file:
        file.write(f'{{"step": {step}}}\n')
    write_steps(path, 3, 4, up_to_step=2)
    assert [record["step"] for record in read(path)] == [1, 2, 3, 4]


def test_one_line_a_step(path: Path) -> None:
    write_steps(path, 1, 3)
    file = JsonLines(path, warn=Warnings(), up_to_step=3)
    file.merge({"step": 3, "time": 9.0, "validation/loss": 2.0})
    file.merge({"step": 3, "time": 9.0, "x": 0.0})
    file.merge({"step": 4, "time": 4.0})
    assert read(path)[2:] == [{"step": 3, "time": 3.0, "x": 0.0, "validation/loss": 2.0}, {"step": 4, "time": 4.0}]


def test_a_full_disk(small_disk: Path) -> None:
    warnings = Warnings()
    file = JsonLines(small_disk / "metrics.jsonl", warn=warnings)
    for step in range(1, 201):
        file.merge({"step": step, "time": 0.0, "text": "x" * 10_000})
    assert len(warnings) == 1
    assert os.strerror(errno.ENOSPC) in warnings[0]
    written = read(small_disk / "metrics.jsonl")
    assert [record["step"] for record in written] == list(range(1, len(written) + 1))
    assert len(written) < 200
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    file.merge({"step": 200, "time": 0.0, "late": 1})
    file.merge({"step": 201, "time": 0.0})
    assert [record["step"] for record in read(small_disk / "metrics.jsonl")] == list(range(1, 202))
    assert read(small_disk / "metrics.jsonl")[199]["late"] == 1
    file.close()


def test_writes_that_fail(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = Warnings()
    file = JsonLines(path, warn=warnings)
    file.merge({"step": 1, "time": 0.0})

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        file.merge({"step": 1, "time": 0.0, "more": 1})
        file.merge({"step": 2, "time": 0.0})
        assert read(path) == []
    file.merge({"step": 2, "time": 0.0, "more": 2})
    assert read(path) == [{"step": 1, "time": 0.0, "more": 1}, {"step": 2, "time": 0.0, "more": 2}]
    assert len(warnings) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="cannot be written"):
        JsonLines(tmp_path / "file" / "metrics.jsonl", warn=Warnings())


def test_a_rewound_file_is_another_one_without_the_later_steps(path: Path) -> None:
    file = JsonLines(path, warn=Warnings())
    for step in (1, 2, 3, 4):
        file.merge({"step": step, "time": 0.0, "x": step})
    inode = path.stat().st_ino
    file.rewind(2)
    assert path.stat().st_ino != inode and [record["step"] for record in read(path)] == [1, 2]
    file.merge({"step": 2, "time": 9.0, "y": 5})
    file.merge({"step": 3, "time": 9.0, "x": 33})
    file.close()
    assert read(path) == [
        {"step": 1, "time": 0.0, "x": 1},
        {"step": 2, "time": 0.0, "x": 2, "y": 5},
        {"step": 3, "time": 9.0, "x": 33},
    ]


def test_lines_that_were_not_written_yet_are_rewound_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = JsonLines(path, warn=Warnings())
    file.append({"step": 1})
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fail_with(errno.ENOSPC))
        for step in (2, 3, 4):
            file.append({"step": step})
    file.rewind(3)
    file.append({"step": 5})
    file.close()
    assert [record["step"] for record in read(path)] == [1, 2, 3, 5]


def fail_with(number: int) -> Any:
    def fail(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    return fail
