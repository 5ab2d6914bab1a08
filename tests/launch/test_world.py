"""Which ranks a command starts, by what its environment says."""

from __future__ import annotations

import os
import socket

import pytest

from bigtx.launch import world
from bigtx.launch.world import World, find_world, host_names
from bigtx.utils import hardware
from bigtx.utils.errors import LaunchError
from bigtx.utils.processes import hold_free_port

RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
STEP = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four GPUs, and no launcher."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PET_", "OMPI_", "PMI_", "MPI_")) or name in RANK or name == "LOCAL_WORLD_SIZE":
            monkeypatch.delenv(name)
    monkeypatch.setattr(hardware, "num_gpus", lambda: 4)
    monkeypatch.setattr(hardware, "num_core_groups", lambda: 2)


def given(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_every_gpu_has_a_rank_unless_another_number_is_asked_for() -> None:
    assert find_world(None, divides=8) == World(4)
    assert find_world(3, divides=8) == World(3)


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(LaunchError, match="--ranks 5: this machine shows 4 GPUs"):
        find_world(5, divides=8)


@pytest.mark.parametrize(("divides", "ranks"), [(8, 2), (3, 1)])
def test_without_gpus_every_group_of_cores_has_a_rank(
    monkeypatch: pytest.MonkeyPatch, divides: int, ranks: int
) -> None:
    monkeypatch.setattr(hardware, "num_gpus", lambda: 0)
    assert find_world(None, divides=divides) == World(ranks)
    assert find_world(7, divides=divides) == World(7)


def test_a_rank_of_another_launcher_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, RANK)
    assert find_world(None, divides=8) is None
    with pytest.raises(LaunchError, match="--ranks 2: another launcher has started the ranks"):
        find_world(2, divides=8)


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_variables_of_a_batch_script_or_an_interactive_shell_change_nothing(
    monkeypatch: pytest.MonkeyPatch, step: str | None
) -> None:
    given(monkeypatch, BATCH_SCRIPT | ({"SLURM_STEP_ID": step, "SLURM_STEP_NUM_TASKS": "8"} if step else {}))
    assert find_world(None, divides=8) == World(4)


def test_a_job_of_several_nodes_is_refused_where_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, BATCH_SCRIPT | {"SLURM_JOB_NUM_NODES": "2"})
    with pytest.raises(
        LaunchError, match="this SLURM job has 2 nodes, and bigtx was started on one of them; write `srun"
    ):
        find_world(None, divides=8)
    assert find_world(2, divides=8) == World(2)
    given(monkeypatch, STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"})
    assert find_world(None, divides=8) == World(4)


def test_copies_of_a_run_of_one_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, STEP | {"SLURM_STEP_NUM_TASKS": "2"} | RANK | {"LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(LaunchError, match="srun has started 2 copies of a run of one machine"):
        find_world(None, divides=8)
    given(monkeypatch, {"WORLD_SIZE": "4"})
    assert find_world(None, divides=8) is None


POD = {"PET_NNODES": "3", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-0", "PET_MASTER_PORT": "23456"}


def test_pods_of_kubernetes_are_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, POD | {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"})
    assert find_world(None, divides=8) == World(4, 3, 1, "job-0", 23456, "Kubernetes")
    given(monkeypatch, POD | {"PET_NPROC_PER_NODE": "2"})
    assert find_world(None, divides=8) == World(2, 3, 1, "job-0", 23456, "Kubernetes")
    given(monkeypatch, {"PET_NNODES": "1:3"})
    with pytest.raises(LaunchError, match=r"PET_NNODES=1:3, .* a fixed number of pods"):
        find_world(None, divides=8)


@pytest.mark.parametrize("names", world.MPI)
def test_processes_of_mpirun_are_ranks(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    environment = dict(os.environ) | dict(zip(names, ("5", "8", "1", "4"), strict=True))
    monkeypatch.setattr(world.os, "environ", environment)
    with pytest.raises(LaunchError, match="MASTER_ADDR does not say where rank 0 is"):
        find_world(None, divides=8)
    environment["MASTER_ADDR"] = "gpu03"
    assert find_world(None, divides=8) is None
    named = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in named] == ["5", "1", "8", "4", "gpu03", "20000"]


def test_one_task_of_srun_is_as_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"})
    assert find_world(None, divides=8) == World(4)


def test_a_task_of_srun_on_each_node_starts_the_ranks_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, STEP | {"SLURM_STEP_NUM_TASKS": "2"})
    found = find_world(None, divides=8)
    assert found == World(4, 2, 1, "gpu03", 20_104, "srun", ("gpu03", "gpu04")) and found.size == 8


def test_several_tasks_of_srun_on_a_node_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    given(monkeypatch, STEP | tasks | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"})
    environment = dict(os.environ)
    monkeypatch.setattr(world.os, "environ", environment)
    assert find_world(None, divides=8) is None
    named = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in named] == ["5", "1", "8", "4", "gpu03", "20104"]


@pytest.mark.parametrize(
    ("text", "counts"), [("4(x2),3", [4, 4, 3]), ("2,1(x3)", [2, 1, 1, 1]), ("8", [8]), ("5,6,7", [5, 6, 7])]
)
def test_tasks_of_each_node(monkeypatch: pytest.MonkeyPatch, text: str, counts: list[int]) -> None:
    found = []
    for node in range(len(counts)):
        monkeypatch.setenv("SLURM_NODEID", str(node))
        found.append(world._tasks_of_node(text))
    assert found == counts


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        ("n1", ["n1"]),
        ("a,b", ["a", "b"]),
        ("n[1-2]", ["n1", "n2"]),
        ("n[003,007]-ib", ["n003-ib", "n007-ib"]),
        ("node[08-10,12],login", ["node08", "node09", "node10", "node12", "login"]),
        ("a3,gpu-[001-002]", ["a3", "gpu-001", "gpu-002"]),
        ("r[1-2]n[0-1]-ib", ["r1n0-ib", "r1n1-ib", "r2n0-ib", "r2n1-ib"]),
    ],
)
def test_the_hosts_of_a_job(names: str, hosts: list[str]) -> None:
    assert list(host_names(names)) == hosts


def test_a_port_that_is_held_is_given_to_nobody_else_but_can_be_listened_on() -> None:
    with hold_free_port() as held:
        port = held.getsockname()[1]
        assert all(_free_port() != port for _ in range(100))
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()


def _free_port() -> int:
    with hold_free_port() as other:
        port: int = other.getsockname()[1]
        return port
