"""Check what a machine needs to train: packages, GPUs, a compiler, disk space, shared memory, open files and W&B."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from bigtx.utils import hardware
from bigtx.utils.units import format_size

PACKAGES = ("torch", "deepspeed", "sentencepiece", "webdataset", "omegaconf", "wandb")
LEAST_DISK_BYTES, ENOUGH_DISK_BYTES = 1 << 30, 20 << 30
ENOUGH_SHARED_MEMORY_BYTES = 1 << 30
"""NCCL and data loaders keep some hundred MB there; Docker gives 64 MB by default."""
ENOUGH_FILES = 1024
FREE_GPU_FRACTION = 0.9


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: the outcome; a warning does not prevent a run from starting.
        text: what was found, and what to do if it is not sufficient.
    """

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str


def check_machine(folder: Path, *, online: bool = True) -> list[Check]:
    """Run all checks of this machine.

    Args:
        folder: the folder for the runs.
        online: whether to check W&B.
    """
    checks: list[Callable[[], Iterator[Check]]] = [_packages, _devices, _compiler, lambda: _disk(folder)]
    checks += [_shared_memory, _open_files, *([_wandb] if online else [])]
    return [each for check in checks for each in check()]


def _packages() -> Iterator[Check]:
    needed, problems = _requirements(), []
    found = hardware.packages()
    for name in PACKAGES:
        wanted = needed[name]
        if name not in found:
            problems.append(f"{name} is missing; write pip install '{wanted}'")
        elif not wanted.specifier.contains(found[name], prereleases=True):
            problems.append(f"{name} {found[name]} does not fit; write pip install '{wanted}'")
    commit = hardware.git_commit()
    own = f"bigtx {found['bigtx']}" + (f" at commit {commit[:12]}" if commit else "")
    versions = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)
    yield Check("packages", "failed" if problems else "ok", "; ".join(problems) or f"{own}, {versions}")


def _requirements() -> dict[str, Requirement]:
    """Return the requirements of bigtx, by the names of the packages."""
    try:
        lines = importlib.metadata.requires("bigtx") or []
    except importlib.metadata.PackageNotFoundError:  # A clone need not be installed to run.
        project = Path(hardware.__file__).resolve().parents[2] / "pyproject.toml"
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = (Requirement(line) for line in lines)
    return {each.name: each for each in found if each.marker is None}


def _devices() -> Iterator[Check]:
    import torch

    machine = f"{hardware.num_cores()} cores, {format_size(hardware.memory_bytes())} of memory"
    by_driver = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if not torch.cuda.is_available():
        if by_driver:
            built = f"it is built for CUDA {torch.version.cuda}" if torch.version.cuda else "it is built without CUDA"
            text = (
                f"{by_driver} GPUs, and torch uses none of them: {built}; install the build for this machine's driver"
            )
            yield Check("devices", "failed", text)
        else:
            yield Check("devices", "ok", f"no GPU; {machine}")
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Check("devices", "ok", f"{len(names)} GPUs ({names[0]}), CUDA {torch.version.cuda}, NCCL {nccl}; {machine}")
    for index, name in enumerate(names):
        yield from _gpu(index, name)


def _gpu(index: int, name: str) -> Iterator[Check]:
    """Yield the problems of a GPU."""
    import torch

    try:
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        is_right = bool((ones @ ones == 256).all())
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        yield Check(f"gpu {index}", "failed", f"{name} cannot be used: {str(error).splitlines()[0]}")
        return
    if not is_right:
        yield Check(f"gpu {index}", "failed", f"{name} multiplies wrongly")
    elif free < FREE_GPU_FRACTION * total:
        text = f"{format_size(total - free)} of {format_size(total)} of {name} are in use by another program"
        yield Check(f"gpu {index}", "warning", text)


def _compiler() -> Iterator[Check]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        yield Check("compiler", "ok", found)
    else:
        yield Check("compiler", "warning", "no C++ compiler; only torch.compile and DeepSpeed's own kernels need one")


def _disk(folder: Path) -> Iterator[Check]:
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{format_size(free)} free in {folder}"
    if not os.access(folder, os.W_OK):
        yield Check("disk", "failed", f"{folder} cannot be written; name another folder")
    elif free < ENOUGH_DISK_BYTES:
        yield Check("disk", "failed" if free < LEAST_DISK_BYTES else "warning", f"{text}; checkpoints need more")
    else:
        yield Check("disk", "ok", text)


def _shared_memory() -> Iterator[Check]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Check("shared memory", "warning", f"there is no {path}, which NCCL and data loaders use")
        return
    free = shutil.disk_usage(path).free
    advice = "" if free >= ENOUGH_SHARED_MEMORY_BYTES else "; give a container more, e.g. docker run --shm-size=8g"
    yield Check("shared memory", "warning" if advice else "ok", f"{format_size(free)} free in {path}{advice}")


def _open_files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "" if soft >= ENOUGH_FILES else f"; write ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
    yield Check("open files", "warning" if advice else "ok", f"{soft:,} at most{advice}")


def _wandb() -> Iterator[Check]:
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        yield Check("W&B", "ok", "offline, as requested")
        return
    from bigtx.track.follower import choose_mode

    mode, reason, host = choose_mode("auto")
    if mode == "online":
        yield Check("W&B", "ok", f"{host} answers")
    else:
        yield Check("W&B", "warning", f"offline: {reason}; runs are written here, and can be sent later")
