"""The clusters that the tests of this folder use; without root or SLURM's packages they are skipped."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import SCRIPT, Cluster


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Cluster]:
    with _running(2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def three_nodes() -> Iterator[Cluster]:
    with _running(3) as cluster:
        yield cluster


@pytest.fixture
def cluster(two_nodes: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster of two nodes, with a new folder to submit from; no job is left behind, and no node is down."""
    with _lent(two_nodes, tmp_path) as cluster:
        yield cluster


@pytest.fixture
def cluster_of_three(three_nodes: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """The same with three nodes."""
    with _lent(three_nodes, tmp_path) as cluster:
        yield cluster


@contextlib.contextmanager
def _running(num_nodes: int) -> Iterator[Cluster]:
    lack = subprocess.run([SCRIPT, "ready"], capture_output=True, text=True)
    if lack.returncode != 0:
        pytest.skip(lack.stdout.strip() + " (as root: tests/slurm/cluster install)")
    # Not in pytest's folder, which only its owner may enter: munged refuses to work there.
    with tempfile.TemporaryDirectory(prefix="bigtx-slurm-") as state, Cluster(Path(state), num_nodes) as cluster:
        yield cluster


@contextlib.contextmanager
def _lent(cluster: Cluster, folder: Path) -> Iterator[Cluster]:
    cluster.folder = folder
    yield cluster
    cluster.run("scancel", "--user", "root", "--signal=KILL", status=None)
    cluster.run("scancel", "--user", "root", status=None)
    cluster.wait_for(lambda: not cluster.run("squeue", "-h"))
    for node in sorted(cluster.crashed):
        cluster.start(node)
