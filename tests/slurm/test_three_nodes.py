"""Runs that lose a node of a cluster of three."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import Cluster
from doors import all_pids
from slurm_runs import SCRIPTS, check_finished, events, run_straight, settings, submit_started

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SIZES = ["train.global_batch_size=6", "train.micro_batch_size=2"]
"""Of batches that three ranks can share."""


def test_a_run_of_all_nodes_waits_for_the_one_that_crashed(
    cluster_of_three: Cluster, corpus: Path, tmp_path: Path
) -> None:
    cluster, run_dir = cluster_of_three, tmp_path / "run"
    words = ["--nodes=3", str(SCRIPTS / "pretrain.sbatch"), *settings(corpus, run_dir, *SIZES, ranks=1)]
    job = submit_started(cluster, words, run_dir)
    cluster.crash(3)
    cluster.wait_for(lambda: all_pids(run_dir) == [], timeout=60)
    cluster.start(3)
    check_finished(cluster, job, run_dir, run_straight(corpus, tmp_path / "straight", *SIZES, ranks=3))
    assert events(run_dir, "start", "slurm_job") == [str(job)] * 2


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_spare_node_takes_the_place_of_one_that_crashed(
    cluster_of_three: Cluster, corpus: Path, tmp_path: Path, place: str
) -> None:
    """The batch script is on the first node."""
    cluster, run_dir = cluster_of_three, tmp_path / "run"
    words = ["--nodes=2", str(SCRIPTS / "pretrain.sbatch"), *settings(corpus, run_dir, ranks=1)]
    job = submit_started(cluster, words, run_dir)
    nodes = cluster.nodes_of(job)
    crashed = nodes[0] if place == "first" else nodes[-1]
    cluster.crash(int(crashed.removeprefix("n")))
    check_finished(cluster, job, run_dir, run_straight(corpus, tmp_path / "straight", ranks=2))
    assert crashed not in cluster.nodes_of(job) and cluster.job(job)["Restarts"] == "1"
