"""`bigtx doctor` on one machine, and on two that are processes of this one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doors import as_json, environment, free_port

from bigtx.commands import doctor
from bigtx.commands.doctor import Check, command
from bigtx.utils import hardware
from bigtx.utils.errors import LaunchError


def found(checks: Iterator[Check]) -> tuple[str, str]:
    """The status and the text of a single check."""
    (check,) = checks
    return check.status, check.text


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = as_json(capsys, command, [str(tmp_path)])
    assert (shown["fit"], shown["bad"], shown["links"]) == (True, [], [])
    (own,) = shown["machines"]
    checks = {check["name"]: check for check in own["checks"]}
    assert "torch 2." in checks["packages"]["text"] and str(tmp_path) in checks["disk"]["text"]
    assert checks["W&B"] == {"name": "W&B", "status": "ok", "text": "offline, as requested"}


def test_what_fails_is_said_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    assert command([str(tmp_path), f"output={tmp_path / 'bad'}"]) == 1
    said = capsys.readouterr().out
    assert f"failed   disk: 1 MiB free in {tmp_path}; checkpoints need more\n" in said
    assert (tmp_path / "bad").read_text() == hardware.host_name() + "\n"


def test_packages_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = hardware.packages()
    monkeypatch.setattr(hardware, "packages", lambda: versions | {"torch": "1.13.1"})
    status, text = found(doctor._packages())
    assert status == "failed" and text.startswith("torch 1.13.1 does not fit; write pip install 'torch")
    monkeypatch.setattr(hardware, "packages", lambda: {k: v for k, v in versions.items() if k != "deepspeed"})
    status, text = found(doctor._packages())
    assert status == "failed" and text.startswith("deepspeed is missing; write pip install 'deepspeed")


def test_a_clone_that_is_not_installed_knows_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._requirements()

    def missing(name: str) -> Any:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", missing)
    of_clone = doctor._requirements()
    assert {name: str(each.specifier) for name, each in of_clone.items()} == {
        name: str(each.specifier) for name, each in installed.items()
    }
    assert {*doctor.PACKAGES} <= of_clone.keys()


def test_warnings_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    assert found(doctor._compiler())[0] == "warning"
    assert found(doctor._open_files()) == ("warning", "256 at most; write ulimit -n 4096")
    assert found(doctor._shared_memory()) == (
        "warning",
        "64 MiB free in /dev/shm; give a container more, e.g. docker run --shm-size=8g",
    )


def test_a_rank_of_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="srun --ntasks-per-node=1 bigtx doctor"):
        command([])


def two_machines(folder: Path, *words: str) -> list[tuple[int, str, str]]:
    """The command's end on each of two machines, which are pods of one job."""
    started, port = [], free_port()
    for node in range(2):
        pod = {
            "PET_NNODES": "2",
            "PET_NODE_RANK": str(node),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
        }
        line = [sys.executable, "-m", "bigtx", "doctor", ".", "--ranks=1", *words]
        variables = environment(**pod, SLURMD_NODENAME=f"pod{node}", WANDB_MODE="offline")
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(line, cwd=folder, env=variables, stdout=pipe, stderr=pipe, text=True))
    ends = []
    for each in started:
        out, err = each.communicate(timeout=120)
        ends.append((each.returncode, out, err))
    return ends


@pytest.mark.dist
def test_two_machines_measure_their_link(tmp_path: Path) -> None:
    first, second = two_machines(tmp_path, "--json", "least_bandwidth=1000000", "output=bad")
    assert (first[0], first[2], second[1:]) == (1, "", ("", ""))
    shown = json.loads(first[1])
    assert [each["host"] for each in shown["machines"]] == ["pod0", "pod1"]
    (link,) = shown["links"]
    assert link["hosts"] == ["pod0", "pod1"] and link["gb_per_second"] > 0
    assert (shown["fit"], shown["bad"]) == (False, ["pod0", "pod1"])
    assert (tmp_path / "bad").read_text() == "pod0,pod1\n" and [path.name for path in tmp_path.iterdir()] == ["bad"]


OK = {"name": "disk", "status": "ok", "text": "much"}
FAILED = {"name": "gpu 3", "status": "failed", "text": "cannot be used"}


@pytest.mark.parametrize(
    ("words", "links", "bad", "said"),
    [
        ({}, {}, [], "ok       all-reduce: median 1 GB/s (n0 1 GB/s, n1 1 GB/s, n2 1 GB/s)\n"),
        ({1: [OK, FAILED]}, {}, ["n1"], "failed   n1: gpu 3: cannot be used\n"),
        (
            {},
            {(0, 2): 1e8, (1, 2): 2e8},
            ["n2"],
            "n2 is slow: 0.2 GB/s at best, tried with 2 others; the median is 1 GB/s",
        ),
        ({}, {(0, 2): 0.0, (1, 2): 0.0}, ["n2"], "failed   n2 does not answer in all-reduces, tried with 2 others\n"),
        ({2: None}, {}, ["n2"], "failed   n2 does not answer in all-reduces"),
    ],
)
def test_who_is_named(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: dict[int, Any],
    links: dict[tuple[int, int], float],
    bad: list[str],
    said: str,
) -> None:
    hosts = ["n0", "n1", "n2"]
    checks = {0: [OK], 1: [OK], 2: [OK]} | words
    said_by = {node: {"host": hosts[node], "checks": own} for node, own in checks.items() if own is not None}
    arguments = SimpleNamespace(least_bandwidth=0.0, output=str(tmp_path / "bad"), json=False)
    measured = {(0, 1): 1e9, (0, 2): 1e9, (1, 2): 1e9} | links
    assert doctor._conclude(arguments, said_by, hosts, measured) == int(bool(bad))
    assert said in capsys.readouterr().out
    assert [path.read_text() for path in tmp_path.iterdir()] == [f"{','.join(bad)}\n"] * bool(bad)
