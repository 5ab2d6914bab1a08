"""Signals to every process of a training, on one machine: nothing is left behind, and nothing is lost.

SIGTERM to a rank, and SIGKILL to a rank and to the command, are quick enough for every change; the whole table, with
`bigtx finetune` and the launcher of DeepSpeed, is slow.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import forks
import pytest
from doors import (
    BF16,
    TINY,
    all_pids,
    environment,
    free_port,
    has_saved,
    last_step,
    losses,
    pretrain_command,
    rank_pids,
    read_lines,
    same_weights,
    supervisor_pid,
    wait_for,
)
from finetunes import RHYTHM, labelled, write_jsonl

STEPS, STOP_AT = 48, 8
STATUSES = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75, signal.SIGUSR1: 75}
"""Of a command whose ranks saved and ended."""
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"]
SLOW = pytest.mark.slow


def pretrain_arguments(corpus: Path, run_dir: Path) -> list[str]:
    # Slow steps: the signal has to arrive before the last one.
    settings = [*TINY, *BF16, f"data.sources.a.path={corpus}", "model.dropout=0.1"]
    return [*settings, f"train.max_steps={STEPS}", "train.checkpoint_every=5 steps", f"run_dir={run_dir}"]


def finetune_arguments(base: Path, records: Path, run_dir: Path) -> list[str]:
    settings = [*RHYTHM, f"base={base}", f"data.train=[{records}]", "validation.every=1000 steps", "data.test=[]"]
    return [*settings, f"train.max_steps={STEPS}", "train.checkpoint_every=5 steps", f"run_dir={run_dir}"]


def pretraining(arguments: Sequence[str]) -> list[str]:
    return pretrain_command(arguments, ranks=2)


def finetuning(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "bigtx", "finetune", *arguments, "--ranks", "2"]


def by_deepspeed(arguments: Sequence[str]) -> list[str]:
    return [*DEEPSPEED, str(free_port()), "--module", "bigtx.pretrain", *arguments]


class Case:
    """A training that is to be hit, and the same one undisturbed."""

    def __init__(self, command: Callable[[Sequence[str]], list[str]], arguments: Callable[[Path], list[str]]) -> None:
        self.command, self.arguments = command, arguments

    def start(self, run_dir: Path) -> subprocess.Popen[str]:
        return forks.start(
            self.command(self.arguments(run_dir)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment(),
        )

    def finish(self, run_dir: Path) -> str:
        process = self.start(run_dir)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
        return out


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = Case(pretraining, lambda run_dir: pretrain_arguments(corpus, run_dir))
    case.finish(run_dir := tmp_path_factory.mktemp("straight") / "run")
    return case, run_dir


@pytest.fixture(scope="module")
def finetuned(decoder_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    folder = tmp_path_factory.mktemp("finetuned")
    records = write_jsonl(folder / "records.jsonl", labelled(64))
    case = Case(finetuning, lambda run_dir: finetune_arguments(decoder_base, records, run_dir))
    case.finish(folder / "run")
    return case, folder / "run"


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Of the run that is hit; nothing of it is left behind."""
    yield tmp_path / "run"
    for pid in all_pids(tmp_path / "run"):
        os.kill(pid, signal.SIGKILL)


def hit(case: Case, run_dir: Path, victim: Callable[[subprocess.Popen[str]], int], number: int) -> tuple[int, str, str]:
    """Start the training, send one of its processes a signal in the middle, and wait until no process is left."""
    process = case.start(run_dir)
    wait_for(lambda: has_saved(run_dir, STOP_AT), process)
    os.kill(victim(process), number)
    out, err = process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while all_pids(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all_pids(run_dir) == []
    return process.returncode, out, err


def check_nothing_lost(case: Case, run_dir: Path, straight: Path, *, saved: bool) -> None:
    """Resume the run: all losses and the last weights are those of the undisturbed one."""
    if saved:
        ends = [event["status"] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "end"]
        assert ends == ["stopped"]
        assert f"step-{last_step(run_dir):08d}" in [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert "resumed from" in case.finish(run_dir)
    assert losses(run_dir) == losses(straight)
    same_weights(run_dir, straight)


def victim_of(name: str, run_dir: Path) -> Callable[[subprocess.Popen[str]], int]:
    def find(process: subprocess.Popen[str]) -> int:
        places = {"command": lambda: process.pid, "supervisor": lambda: supervisor_pid(run_dir)}
        rank = name.removeprefix("rank ")
        return rank_pids(run_dir)[int(rank)] if rank.isdigit() else places[name]()

    return find


SOON = [(signal.SIGTERM, "rank 1"), (signal.SIGKILL, "rank 1"), (signal.SIGKILL, "command")]
LATER = [
    (signal.SIGTERM, "command"),
    (signal.SIGTERM, "rank 0"),
    (signal.SIGKILL, "rank 0"),
    *itertools.product((signal.SIGINT, signal.SIGHUP, signal.SIGUSR1), ("command", "rank 1")),
]


@pytest.mark.parametrize(("number", "victim"), [*SOON, *(pytest.param(*case, marks=SLOW) for case in LATER)])
def test_a_signal_to_each_process_of_a_pretraining(
    pretrained: tuple[Case, Path], run_dir: Path, number: signal.Signals, victim: str
) -> None:
    check_signal(*pretrained, run_dir, number, victim)


@SLOW
@pytest.mark.parametrize(("number", "victim"), [*SOON, *LATER])
def test_a_signal_to_each_process_of_a_fine_tuning(
    finetuned: tuple[Case, Path], run_dir: Path, number: signal.Signals, victim: str
) -> None:
    check_signal(*finetuned, run_dir, number, victim)


def check_signal(case: Case, straight: Path, run_dir: Path, number: signal.Signals, victim: str) -> None:
    status, out, err = hit(case, run_dir, victim_of(victim, run_dir), number)
    assert "Traceback" not in out + err
    if number != signal.SIGKILL:
        assert (status, err) == (STATUSES[number], "") and out.count("stopping: a checkpoint") <= 1
        assert out.splitlines()[-1].startswith("stopped at step ")
    elif victim == "command":
        assert status == -signal.SIGKILL
    else:
        assert status == 128 + signal.SIGKILL
        assert f"{victim} on " in err and "by SIGKILL" in err and "lost the connection" not in err
    check_nothing_lost(case, run_dir, straight, saved=number != signal.SIGKILL or victim == "command")


@SLOW
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL])
@pytest.mark.parametrize("victim", ["command", "supervisor", "rank 1"])
def test_a_signal_to_each_process_of_the_deepspeed_launcher(
    pretrained: tuple[Case, Path], run_dir: Path, number: signal.Signals, victim: str
) -> None:
    """That the ranks save and end is our part; the command ends with status 0 when a signal ends its second process."""
    straight = pretrained[1]
    case = Case(by_deepspeed, pretrained[0].arguments)
    status, out, _ = hit(case, run_dir, victim_of(victim, run_dir), number)
    assert status != 0 or (victim == "supervisor" and number in (signal.SIGKILL, signal.SIGHUP, signal.SIGUSR1)), out
    is_rank_killed = number == signal.SIGKILL and victim == "rank 1"
    check_nothing_lost(case, run_dir, straight, saved=not is_rank_killed)
