"""What the supervisor makes of its ranks' ends and of requests to stop; ranks that need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doors import ROOT, all_pids, environment, rank_pids, supervisor_pid, wait_for

from bigtx.utils.processes import start_of

PROGRAM = Path(__file__).with_name("program.py")


class Command:
    """A supervisor and its ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, *works: str, wait: bool = True) -> subprocess.Popen[str]:
        """Start it, and wait until every rank that obeys or hangs is ready."""
        command = [sys.executable, str(PROGRAM), str(self.folder), *works]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment(PYTHONPATH=str(ROOT)),
        )
        waiting = [rank for rank, work in enumerate(works) if wait and work in ("obey", "hang")]
        wait_for(lambda: all((self.folder / f"ready-{rank}").exists() for rank in waiting), self.process)
        return self.process

    def run(self, *works: str) -> tuple[int, str, str]:
        """Start it, and wait for its end. Returns the status, and what it printed."""
        out, err = self.start(*works, wait=False).communicate(timeout=60)
        assert self.process is not None
        return self.process.returncode, out, err

    def pids(self) -> list[int]:
        """All processes of its session that live, those that ranks left behind too."""
        assert self.process is not None
        return [pid for pid in all_pids(self.folder) if pid != os.getpid()]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    yield command
    for pid in command.pids():
        os.kill(pid, signal.SIGKILL)


def test_the_command_ends_when_every_rank_has(command: Command) -> None:
    assert command.run("end:0", "end:0") == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("victim", ["supervisor", "rank 0", "rank 1"])
def test_a_request_to_any_process_stops_all(command: Command, number: signal.Signals, victim: str) -> None:
    process = command.start("obey", "obey")
    ranks = rank_pids(command.folder)
    pid = {"supervisor": process.pid, "rank 0": ranks[0], "rank 1": ranks[1]}[victim]
    os.kill(pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130 if number == signal.SIGINT else 75, "")
    assert out.startswith("saved on SIG") and command.pids() == []


def test_ctrl_c_in_a_terminal_reaches_all_at_once(command: Command) -> None:
    process = command.start("obey", "obey")
    os.killpg(process.pid, signal.SIGINT)
    assert (process.communicate(timeout=60), process.returncode) == (("saved on SIGINT\n", ""), 130)


def test_when_the_supervisor_is_killed_the_ranks_are_asked_to_stop(command: Command) -> None:
    process = command.start("obey", "obey")
    process.kill()
    out, _ = process.communicate(timeout=60)  # Ends when the ranks have closed their ends of the pipes.
    assert out == "saved on SIGTERM\n"


def test_a_request_before_ranks_listen_is_no_failure(command: Command) -> None:
    status, out, err = command.run("die:15", "obey")
    assert (status, err) == (75, "") and "stopped before the first step; nothing to save" in out


def test_the_rank_that_failed_first_is_explained(command: Command) -> None:
    status, out, err = command.run("lose", "raise:no such thing")
    assert (status, out) == (1, "")
    assert err.startswith("rank 1 on ") and "failed after step 7: RuntimeError: no such thing\n" in err
    assert "rank-00001.log" in err and "  words for the log" in err and "Traceback (most recent call last)" in err
    assert "lost the connection" not in err and "the same command starts at the first step" in err


def test_a_killed_rank_is_explained_and_nothing_outlives_it(command: Command) -> None:
    process = command.start("hang", "hang", "obey")
    os.kill(rank_pids(command.folder)[2], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 137 and command.pids() == []
    assert err.startswith("LaunchError: rank 2 on ") and "was ended before the first step by SIGKILL" in err


def test_an_error_of_the_user_is_printed_once(command: Command) -> None:
    status, out, err = command.run("refuse:write x=1", "refuse:write x=1")
    assert (status, out, err) == (2, "", "ConfigError: write x=1\n")


def test_an_error_that_one_rank_alone_meets_is_shown(command: Command) -> None:
    status, _, err = command.run("hang", "refuse:no such file here")
    assert status == 2 and "rank 1 on " in err and "ConfigError: no such file here" in err and command.pids() == []


@pytest.mark.parametrize("status", [0, 1])
def test_what_a_rank_leaves_behind_is_ended(command: Command, status: int) -> None:
    assert command.run(f"leave:{status}")[0] == status
    assert start_of(int((command.folder / "left").read_text())) is None


def test_a_daemon_may_outlive_the_command(command: Command) -> None:
    assert command.run("daemon:0")[0] == 0
    daemon = int((command.folder / "left").read_text())
    assert start_of(daemon) is not None
    os.kill(daemon, signal.SIGKILL)


def test_a_second_rank_that_ends_well_does_not_hide_a_failure(command: Command) -> None:
    status, _, err = command.run("end:0", "end:3")
    assert status == 3 and "rank 1 on " in err and "it ended with status 3" in err


def test_a_stopped_rank_is_ended_once_another_has_failed(command: Command) -> None:
    process = command.start("obey", "hang")
    first, second = rank_pids(command.folder)
    os.kill(second, signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 137 and command.pids() == []


def test_the_supervisor_is_above_the_ranks(command: Command) -> None:
    process = command.start("obey", "obey")
    assert supervisor_pid(command.folder) == process.pid
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in rank_pids(command.folder)]
    assert names == ["bigtx rank 0", "bigtx rank 1"]
    process.terminate()
    process.communicate(timeout=60)
