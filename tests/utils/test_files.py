from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtx.utils import files
from bigtx.utils.errors import LaunchError
from bigtx.utils.files import LOCK_NAME, FolderLock, refuse_if_held, sha256_file, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from bigtx.utils.files import FolderLock
from bigtx.utils.errors import LaunchError
try:
    lock = FolderLock(sys.argv[1])
except LaunchError:
    print("refused", flush=True)
else:
    print("held", flush=True)
    sys.stdin.readline()
    lock.release()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "größe")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file"]


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


def test_a_live_holder_is_named(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert first_line(process) == "held"
        with pytest.raises(LaunchError, match=rf"process {process.pid} on host {socket.gethostname()}"):
            FolderLock(tmp_path)
        process.communicate("end\n")
    with FolderLock(tmp_path) as lock:
        assert lock.path.is_file()
    assert not lock.path.exists()


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(LaunchError, match="in use"):
        FolderLock(tmp_path)


def test_a_look_at_the_lock_takes_nothing(tmp_path: Path) -> None:
    refuse_if_held(tmp_path)
    assert not list(tmp_path.iterdir())
    with (
        FolderLock(tmp_path) as lock,
        pytest.raises(LaunchError, match=f"in use by process {os.getpid()}"),
    ):
        refuse_if_held(tmp_path)
    for other in ({"process_start": "another-boot/1"}, {"host": "elsewhere"}):
        lock.path.unlink(missing_ok=True)
        write_lock(tmp_path, **other)
        refuse_if_held(tmp_path)
    lock.path.write_text("{")
    refuse_if_held(tmp_path)


def test_a_killed_holder_is_replaced(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert first_line(process) == "held"
        process.kill()
        # Not waited for: even as a zombie it holds nothing.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        FolderLock(tmp_path).release()


def write_lock(folder: Path, **changes: Any) -> None:
    FolderLock(folder)
    path = folder / LOCK_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_process_id_used_again_is_no_holder(tmp_path: Path) -> None:
    write_lock(tmp_path, process_start="another-boot/1")
    FolderLock(tmp_path)


def test_another_host_is_refused_with_the_file_to_delete(tmp_path: Path) -> None:
    write_lock(tmp_path, host="elsewhere")
    with pytest.raises(LaunchError, match=r"host elsewhere.*delete .*run\.lock"):
        FolderLock(tmp_path)


def test_a_restarted_slurm_job_takes_over_from_its_old_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lock(tmp_path, host="elsewhere", slurm_job="17", slurm_restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(LaunchError):
        FolderLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    FolderLock(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_an_unreadable_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(files, "LOCK_PATIENCE_SECONDS", 0.1)
    (tmp_path / LOCK_NAME).write_text(content)
    with pytest.raises(LaunchError, match="delete that file"):
        FolderLock(tmp_path)


def test_release_leaves_a_lock_that_is_not_ours(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.path.write_text(json.dumps({"host": "elsewhere"}))
    lock.release()
    assert lock.path.exists()


@pytest.mark.dist
def test_of_many_who_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    write_lock(tmp_path, process_start="another-boot/1")
    processes = [holder(tmp_path) for _ in range(6)]
    try:
        assert sorted(first_line(process) for process in processes) == ["held"] + ["refused"] * 5
    finally:
        for process in processes:
            process.communicate("end\n")
