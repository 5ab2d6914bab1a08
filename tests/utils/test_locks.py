from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doors import CONTAINER

from bigtx.utils import locks
from bigtx.utils.errors import LaunchError
from bigtx.utils.locks import LOCK_NAME, FolderLock, _this_process, refuse_if_held

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from bigtx.utils.locks import FolderLock
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


def holder(folder: Path, *prefix: str) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


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
    for left_behind in ("", "{", record(pid=os.getpid())):
        lock.path.write_text(left_behind)
        refuse_if_held(tmp_path)


def test_a_killed_holder_is_replaced(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert first_line(process) == "held"
        process.kill()
        # Not waited for: even as a zombie it holds nothing.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        FolderLock(tmp_path).release()


def record(**changes: Any) -> str:
    """What this process would write into the file of a folder that it holds."""
    return json.dumps(_this_process() | changes)


ELSEWHERE = {"host": "elsewhere", "process_start": "another-boot/1", "pid_namespace": "pid:[1]"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\0" * 40,
        record(pid=None),
        record(process_start="another-boot/1"),
        record(host="the-container-before", pid_namespace="pid:[1]"),
        json.dumps(ELSEWHERE),
    ],
)
def test_a_file_whose_lock_is_free_is_recovered(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with FolderLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def container_or_skip() -> list[str]:
    """The prefix of a command that runs as in a container."""
    try:
        done = subprocess.run([*CONTAINER, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("has no unshare")
    if done.returncode:
        pytest.skip(f"may not make a namespace of process ids: {done.stderr.strip()}")
    return CONTAINER


@pytest.mark.dist
def test_of_two_containers_of_a_host_one_gets_the_folder(tmp_path: Path) -> None:
    container = container_or_skip()
    with holder(tmp_path, *container) as first:
        assert first_line(first) == "held"
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == 1
        with holder(tmp_path, *container) as second:
            assert first_line(second) == "refused"
        for look in (refuse_if_held, FolderLock):
            with pytest.raises(LaunchError, match="in use by process 1 on host"):
                look(tmp_path)
        first.kill()
        first.wait()
        with holder(tmp_path, *container) as third:
            assert first_line(third) == "held"
            third.communicate("end\n")


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    (told, tells), (waits, releases) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tells, b".")
        os.close(releases)
        os.read(waits, 1)
        os._exit(0)
    os.read(told, 1)
    os.close(lock._descriptor)  # As when the parent is killed.
    try:
        FolderLock(tmp_path).release()
    finally:
        os.close(releases)
        os.waitpid(child, 0)


@pytest.fixture(params=["no locks", "locks of one host"])
def limited(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A network file system that does not serve locks as local disks do."""
    if request.param == "no locks":

        def refuses(descriptor: int, kind: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(locks.fcntl, "flock", refuses)
    else:
        monkeypatch.setattr(locks, "_mount_of", lambda path: ("nfs", {"rw", "local_lock=all"}))
    return str(request.param)


def test_where_other_hosts_see_no_lock_their_file_must_be_deleted(tmp_path: Path, limited: str) -> None:
    (tmp_path / LOCK_NAME).write_text(record(**ELSEWHERE))
    with pytest.raises(LaunchError, match=r"host elsewhere.*cannot check.*delete .*run\.lock"):
        FolderLock(tmp_path)
    (tmp_path / LOCK_NAME).unlink()
    FolderLock(tmp_path).release()
    (tmp_path / LOCK_NAME).write_text(record(process_start="another-boot/1"))
    FolderLock(tmp_path).release()
    if limited == "locks of one host":
        (tmp_path / LOCK_NAME).write_text(record(host="the-container-before", pid_namespace="pid:[1]"))
        FolderLock(tmp_path).release()


def test_without_locks_the_file_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuses)
    monkeypatch.setattr(locks, "LOCK_PATIENCE_SECONDS", 0.1)
    with FolderLock(tmp_path) as lock:
        for look in (refuse_if_held, FolderLock):
            with pytest.raises(LaunchError, match=f"in use by process {os.getpid()}"):
                look(tmp_path)
        (tmp_path / "another").mkdir()
        FolderLock(tmp_path / "another").release()
    FolderLock(tmp_path).release()
    others = {
        record(pid_namespace="pid:[1]"): rf"another container.*no locks.*if it does not, delete {lock.path}",
        **dict.fromkeys(("", "{", "[]", record(pid=None)), "if no run uses the folder, delete that file"),
    }
    for content, message in others.items():
        lock.path.write_text(content)
        with pytest.raises(LaunchError, match=message):
            FolderLock(tmp_path)
        lock.path.unlink()
        FolderLock(tmp_path).release()


@pytest.mark.parametrize(
    ("kind", "options", "is_seen"),
    [
        ("ext4", "rw", True),
        ("nfs4", "rw,vers=4.2,local_lock=none", True),
        ("nfs", "rw,nolock,local_lock=all", False),
        ("nfs", "rw,local_lock=flock", False),
        ("lustre", "rw,flock", True),
        ("lustre", "rw,localflock", False),
        ("fuse.unknown", "rw", False),
    ],
)
def test_whose_locks_other_hosts_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, is_seen: bool
) -> None:
    line = f"36 35 98:0 / {str(tmp_path).replace(' ', chr(92) + '040')} rw,noatime master:1 - {kind} source {options}\n"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 21 0:1 / / rw - ext4 /dev/sda rw\n{line}")
    monkeypatch.setattr(locks, "MOUNTS", mounts)
    assert locks._is_seen_by_all_hosts(tmp_path / LOCK_NAME) is is_seen


def test_a_restarted_slurm_job_takes_over_from_its_old_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK_NAME).write_text(record(**ELSEWHERE, slurm_job="17", slurm_restart="0"))
    monkeypatch.setattr(locks, "_mount_of", lambda path: ("fuse.unknown", set()))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(LaunchError):
        FolderLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    FolderLock(tmp_path)


def test_release_leaves_a_lock_that_is_not_ours(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.path.write_text(record(pid=1))
    lock.release()
    assert lock.path.exists()


@pytest.mark.dist
def test_of_many_who_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text(record(process_start="another-boot/1"))
    processes = [holder(tmp_path) for _ in range(6)]
    try:
        assert sorted(first_line(process) for process in processes) == ["held"] + ["refused"] * 5
    finally:
        for process in processes:
            process.communicate("end\n")
