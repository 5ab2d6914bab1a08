"""The look at the nodes before a job of several starts: slow, broken and different ones, on the real scheduler."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from doors import ROOT, TINY, last_step

pytestmark = pytest.mark.slurm
SCRIPT = str(ROOT / "slurm" / "pretrain.sbatch")
RATE = "20mbit"
"""Of a slow node: virtual cables give some hundred times as much, also on a busy machine."""


@pytest.fixture
def pretraining(corpus: Path, tmp_path: Path) -> list[str]:
    """A run that two or three nodes can share."""
    own = [f"data.sources.a.path={corpus}", f"run_dir={tmp_path / 'runs' / 'mine'}", "train.max_steps=3"]
    return [*TINY, *own, "train.global_batch_size=6", "train.micro_batch_size=2", "--ranks=1"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site whose node n2 uses another clone, with a commit of its own."""
    clone = tmp_path / "clone"
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    commands = [["clone", "--quiet", "--shared", str(ROOT), str(clone)]]
    commands.append(["-C", str(clone), *who, "commit", "--quiet", "--allow-empty", "-m", "another"])
    for words in commands:
        if (done := subprocess.run(["git", *words], capture_output=True, text=True)).returncode != 0:
            pytest.skip(f"these files are no clone: {done.stderr}")
    choose = tmp_path / "choose.sh"
    choose.write_text(f'[ "$(hostname)" != n2 ] || export PYTHONPATH={clone}\nexec "$@"\n')
    (tmp_path / "site.sh").write_text(f"container=(bash {choose})\n")
    return tmp_path / "site.sh"


@pytest.mark.parametrize("preflight", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_a_node_with_another_commit_is_refused(
    cluster: Cluster, pretraining: list[str], site: Path, preflight: str
) -> None:
    variables = {"BIGTX_SITE": str(site), "BIGTX_PREFLIGHT": preflight}
    job = cluster.submit("--nodes=2", SCRIPT, *pretraining, **variables)
    end = cluster.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0"), cluster.logs()
    said = cluster.logs()
    assert "the machines of this run differ: commit is " in said and " on n2 (node 1)" in said
    assert "not started again" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_node_that_does_not_see_the_folder_is_named(cluster: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    cluster.do("on", "2", "mount", "-t", "tmpfs", "none", str(tmp_path / "runs"))
    try:
        step = ["srun", "--nodes=2", "--ntasks-per-node=1", "bigtx"]
        said = cluster.run(*step, "doctor", "runs", "output=bad", status=1)
        assert f"in {tmp_path / 'runs'} is missing on n2 (node 1): " in said and "Traceback" not in said
        assert (tmp_path / "bad").read_text() == "n2\n"
        said = cluster.run(*step, "pretrain", *pretraining, status=2)
        assert f"in {tmp_path / 'runs'} is missing on n2 (node 1): " in said
        assert list((tmp_path / "runs").iterdir()) == []
    finally:
        cluster.do("on", "2", "umount", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def running_spares(two_nodes: Cluster) -> Iterator[Cluster]:
    """A cluster with nodes to spare, which calls a silent node down only after some time, as most do."""
    variables = {"SLURMD_TIMEOUT": "30", "BIGTX_PREFLIGHT": "on"}
    with tempfile.TemporaryDirectory(prefix="bigtx-spares-") as state, Cluster(Path(state), 4, **variables) as cluster:
        yield cluster


@pytest.fixture
def spares(running_spares: Cluster, tmp_path: Path) -> Cluster:
    running_spares.folder = tmp_path
    return running_spares


@pytest.fixture
def slow_node(spares: Cluster) -> Iterator[Cluster]:
    """The cluster, with a slow link of n2."""
    spares.do("slow", "2", RATE)
    yield spares
    spares.do("fast", "2")


@pytest.mark.slow
def test_a_slow_node_is_excluded(slow_node: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    job = slow_node.submit("--nodes=3", SCRIPT, *pretraining)
    end = slow_node.wait_for_end(job)
    said = slow_node.logs()
    assert (end["JobState"], end["Restarts"], end["ExcNodeList"]) == ("COMPLETED", "1", "n2"), said
    assert "slow or broken: n2; excluded" in said and "n2 is slow: " in said and "3 ranks on 3 machines" in said
    assert last_step(tmp_path / "runs" / "mine") == 3 and "Traceback" not in said
    assert sorted(path.suffix for path in tmp_path.glob("slurm-*")) == [".log"] * 4


@pytest.mark.slow
def test_a_job_that_needs_the_slow_node_ends(slow_node: Cluster, pretraining: list[str]) -> None:
    end = slow_node.wait_for_end(slow_node.submit("--nodes=4", SCRIPT, *pretraining))
    said = slow_node.logs()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0"), said
    assert "slow or broken: n2. Without it, 3 of the 4 nodes are left" in said


@pytest.mark.slow
def test_two_nodes_do_not_tell_which_is_slow(slow_node: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("doctor_options=(least_bandwidth=0.01)\n")
    job = slow_node.submit("--nodes=2", SCRIPT, *pretraining, BIGTX_SITE=str(tmp_path / "site.sh"))
    end = slow_node.wait_for_end(job)
    said = slow_node.logs()
    assert (end["JobState"], end["Restarts"], end["ExcNodeList"]) == ("COMPLETED", "1", "n1,n2"), said
    assert "n1 or n2 is slow or broken: " in said and "only a third machine can show which" in said


@pytest.mark.slow
def test_a_node_whose_slurmd_is_stopped_is_excluded(spares: Cluster, pretraining: list[str], tmp_path: Path) -> None:
    spares.do("stop", "2")
    try:
        end = spares.wait_for_end(spares.submit("--nodes=2", SCRIPT, *pretraining))
    finally:
        spares.do("continue", "2")
    said = spares.logs()
    assert end["JobState"] == "COMPLETED" and int(end["Restarts"]) >= 1 and "n2" not in end["NodeList"], said
    assert "failed on node n2: " in said and "slow or broken: n2; excluded" in said
    assert last_step(tmp_path / "runs" / "mine") == 3
    spares.wait_for(lambda: spares.nodes("idle") == spares.names)
