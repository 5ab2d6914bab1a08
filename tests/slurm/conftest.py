"""The cluster that the tests of this folder use; without root or SLURM's packages they are skipped."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import SCRIPT, Cluster


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    lack = subprocess.run([SCRIPT, "ready"], capture_output=True, text=True)
    if lack.returncode != 0:
        pytest.skip(lack.stdout.strip() + " (as root: tests/slurm/cluster install)")
    # Not in pytest's folder, which only its owner may enter: munged refuses to work there.
    with tempfile.TemporaryDirectory(prefix="bigtx-slurm-") as state, Cluster(Path(state)) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster, with a new folder to submit from; no job is left behind."""
    running_cluster.folder = tmp_path
    yield running_cluster
    running_cluster.run("scancel", "--user", "root", "--signal=KILL", status=None)
    running_cluster.run("scancel", "--user", "root", status=None)
    running_cluster.wait_for(lambda: not running_cluster.run("squeue", "-h"))
