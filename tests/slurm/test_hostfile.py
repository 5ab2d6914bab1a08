"""`deepspeed --hostfile` over ssh: DeepSpeed's launcher, pdsh, and an sshd on each of two nodes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from clusters import Cluster
from doors import ROOT, all_pids, last_step, losses, rank_pids
from slurm_runs import environment_of, events, name_of, run_straight, settings

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
PROGRAMS = {"module": "--module bigtx.pretrain", "script": str(ROOT / "bigtx" / "pretrain.py")}


@pytest.fixture
def hosts(cluster: Cluster, tmp_path: Path) -> None:
    """The hostfile, and what DeepSpeed is to set on each node, in the folder that all start from."""
    if not shutil.which("pdsh") or not shutil.which("sshd"):
        pytest.skip("needs pdsh and sshd (as root: tests/slurm/cluster install)")
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nCUDA_VISIBLE_DEVICES=\nBIGTX_TEST=a b\n")


def deepspeed(corpus: Path, run_dir: Path, program: str, *more: str) -> list[str]:
    return ["deepspeed", "--hostfile", "hosts", *PROGRAMS[program].split(), *settings(corpus, run_dir, *more)[:-1]]


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("program", PROGRAMS)
def test_training_on_two_nodes(cluster: Cluster, corpus: Path, tmp_path: Path, program: str) -> None:
    run_dir = tmp_path / "run"
    said = cluster.run(*deepspeed(corpus, run_dir, program, "train.max_steps=3"))
    assert "4 ranks on 2 machines, started by deepspeed" in said and last_step(run_dir) == 3


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_deepspeed_saves_and_leaves_nothing(
    cluster: Cluster, corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    command = deepspeed(corpus, run_dir, "module")
    process = cluster.popen(*command)
    cluster.wait_for(lambda: last_step(run_dir) >= 7)
    ranks = [environment_of(pid) for pid in rank_pids(run_dir)]
    assert {each["BIGTX_TEST"] for each in ranks if "RANK" in each} == {"a b"}
    os.kill(deepspeed_pid(run_dir), number)
    assert process.wait(60) == 1
    cluster.wait_for(lambda: all_pids(run_dir) == [], timeout=60)
    assert events(run_dir, "end", "status") == ["stopped"]
    cluster.run(*command)
    assert losses(run_dir) == losses(run_straight(corpus, tmp_path / "straight"))


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("loses_connections", [False, True], ids=["SIGKILL", "SIGHUP of its terminal"])
def test_a_stop_file_ends_a_run_that_has_lost_deepspeed(
    cluster: Cluster, corpus: Path, tmp_path: Path, loses_connections: bool
) -> None:
    run_dir = tmp_path / "run"
    process = cluster.popen(*deepspeed(corpus, run_dir, "module", "train.max_steps=3000"))
    cluster.wait_for(lambda: last_step(run_dir) >= 7)
    pid = deepspeed_pid(run_dir)
    if loses_connections:
        for each in [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]:
            os.kill(each, signal.SIGHUP)
    else:
        os.kill(pid, signal.SIGKILL)
    process.wait(60)
    step = last_step(run_dir)
    cluster.wait_for(lambda: last_step(run_dir) > step + 5)
    (run_dir / "STOP").touch()
    cluster.wait_for(lambda: all_pids(run_dir) == [], timeout=60)
    assert events(run_dir, "end", "status") == ["stopped"]


def deepspeed_pid(run_dir: Path) -> int:
    """The command that the user typed."""
    return min(pid for pid in all_pids(run_dir) if name_of(pid) == "deepspeed")
