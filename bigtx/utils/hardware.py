"""The hardware of this machine: the arithmetic peak of its device, and a description for the run's record."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtx.utils import __version__
from bigtx.utils.processes import number_in

PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    # Dense FLOP/s without sparsity, fp32 without TF32, as others quote the maker's page or data sheet that is named
    # above each; a figure without a quotation is left out. The first name that occurs as words in the device's name
    # counts, so the narrower names come first.
    # NVIDIA's Blackwell data sheet, by https://glennklockwood.com/garden/processors/B200: 1,200 W and 1,000 W.
    ("GB200", {"bf16": 2500e12, "fp16": 2500e12, "fp32": 90e12}),
    ("B200", {"bf16": 2250e12, "fp16": 2250e12, "fp32": 80e12}),
    # https://www.nvidia.com/en-us/data-center/h200/ gives the SXM part the rates of the H100's.
    ("H200 NVL", {}),
    ("H200", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    # https://www.nvidia.com/en-us/data-center/h100/
    ("H100 NVL", {"bf16": 835e12, "fp16": 835e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12}),
    ("H100", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/
    #     nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    ("A100", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}),
    # https://images.nvidia.cn/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf
    ("A40", {"bf16": 149.7e12, "fp16": 149.7e12, "fp32": 37.4e12}),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/data-center/products/a30-gpu/pdf/a30-datasheet.pdf
    ("A30", {"bf16": 165e12, "fp16": 165e12}),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/datasheet-new/nvidia-a10-datasheet.pdf
    ("A10G", {"bf16": 70e12, "fp16": 70e12}),
    ("A10", {"bf16": 125e12, "fp16": 125e12}),
    # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    ("L40S", {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12}),
    # https://images.nvidia.cn/content/Solutions/data-center/vgpu-L40-datasheet.pdf
    ("L40", {"bf16": 181e12, "fp16": 181e12}),
    # https://nvdam.widen.net/s/rvq98gbwsw/l4-datasheet-2595652
    ("L4", {"bf16": 121e12, "fp16": 121e12}),
    # https://images.nvidia.cn/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
    ("V100S", {"fp16": 130e12}),
    ("V100-PCIE", {"fp16": 112e12, "fp32": 14e12}),
    ("V100", {"fp16": 125e12, "fp32": 15.7e12}),
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html (and mi325x.html)
    ("MI325X", {"bf16": 1307e12, "fp16": 1307e12}),
    ("MI300X", {"bf16": 1307e12, "fp16": 1307e12}),
    # https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html: one of its two dies, which is what
    # software sees as a device.
    ("MI250X", {"bf16": 191.5e12, "fp16": 191.5e12}),
)

PACKAGES = (
    "deepspeed",
    "numpy",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "omegaconf",
    "pyyaml",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "triton",
    "wandb",
    "webdataset",
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak dense FLOP/s of an accelerator, the denominator of MFU.

    Args:
        device_name: as the driver names it, e.g. "NVIDIA H100 80GB HBM3".
        precision: bf16, fp16 or fp32.

    Returns:
        None for a device or a precision that the table does not hold.
    """
    found = (peaks for name, peaks in PEAK_FLOPS if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE))
    return next(found, {}).get(precision)


def num_cores() -> int:
    """Return the number of cores that this process may use: its affinity, which a container or a scheduler narrows."""
    return len(os.sched_getaffinity(0))


def num_gpus() -> int:
    """Return the number of GPUs that CUDA shows to this process, if torch can use them. Imports no torch.

    A separate process asks the driver: forked ranks cannot use CUDA after their parent has used it.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or not (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists():
        return 0
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.write(writing, str(_count_by_driver()).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as stream:
        answer = stream.read()
    os.waitpid(pid, 0)
    return int(answer or 0)


def _count_by_driver() -> int:
    """Count devices by the CUDA driver's own interface, which respects CUDA_VISIBLE_DEVICES; 0 without a driver."""
    cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def gpu_memory_bytes() -> int | None:
    """Return the bytes of memory of the current GPU; None without one."""
    import torch

    return int(torch.cuda.get_device_properties().total_memory) if torch.cuda.is_available() else None


def node_of_core(core: int) -> int:
    """Return the group of cores with memory of its own (NUMA node) that a core belongs to; 0 where there is one
    group.
    """
    paths = Path(f"/sys/devices/system/cpu/cpu{core}").glob("node[0-9]*")
    return next((int(path.name.removeprefix("node")) for path in paths), 0)


def num_core_groups() -> int:
    """Return the number of groups of cores with memory of their own of which this process may use some."""
    return len({node_of_core(core) for core in os.sched_getaffinity(0)})


def memory_bytes() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's limit if that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))


def free_memory_bytes() -> int:
    """Return the bytes of memory that are free: the machine's, or its container's if those are fewer."""
    free = 1024 * (number_in("/proc/meminfo", "MemAvailable:") or 0)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        files = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used + int(files.get("inactive_file", 0)))


def anonymous_bytes() -> int:
    """Return the bytes of this process's own memory, without files that are mapped."""
    return 1024 * (number_in("/proc/self/status", "RssAnon:") or 0)


def packages() -> dict[str, str]:
    """Return the versions of bigtx and of the packages that it depends on, where they are installed. Imports none of
    them.
    """
    # A clone need not be installed to run.
    return {"bigtx": __version__} | {name: found for name in PACKAGES if (found := _version(name))}


def describe() -> dict[str, Any]:
    """Return the environment of a run as JSON-ready data, by a fixed list of harmless facts: no environment variables,
    no command line, no remote addresses, so that no secret can be among them.
    """
    return {
        "packages": packages(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "num_cores": num_cores(),
        "memory_bytes": memory_bytes(),
        "git": git_state(),
        **_accelerators(),
    }


@functools.cache
def git_state() -> dict[str, Any] | None:
    """Return the commit of the clone that bigtx runs from and whether files differ from it; None for an installed
    copy.
    """
    commit = git_commit()
    return None if commit is None else {"commit": commit, "dirty": bool(_git("status", "--porcelain", "-uno"))}


@functools.cache
def git_commit() -> str | None:
    """The commit of the clone that bigtx runs from; None for an installed copy."""
    return _git("rev-parse", "HEAD") if (_root() / ".git").exists() else None


def host_name() -> str:
    """This machine's name: SLURM's for it, which its commands take, or else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_root()), *command], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux.
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _accelerators() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"gpus": []}
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "attention": attention_kernel("cuda"),
        "gpus": [{"name": device.name, "memory_bytes": device.total_memory} for device in devices],
    }


def _driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None."""
    with contextlib.suppress(OSError):
        found = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else None
    return None


def attention_kernel(device: str) -> str:
    """Return the name of the kernel that torch chooses for causal attention in bf16 with heads 128 wide. It depends on
    the GPU and on versions: a library of the system in place of torch's own may silently choose a slower one.
    """
    import torch
    from torch.nn.attention import SDPBackend

    heads = torch.empty(1, 1, 1024, 128, dtype=torch.bfloat16, device=device)
    chosen = torch._fused_sdp_choice(heads, heads, heads, is_causal=True)
    return str(SDPBackend(chosen).name).lower()


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensors; without glibc, do nothing.

    By default it returns large pieces to the system at once and requests them again, zeroed page by page: a step of a
    small model on a CPU had 50,000 page faults, a tenth of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Turn off automatic garbage collection, which would pause each rank at another step."""
    gc.collect()
    gc.freeze()  # What exists now stays until the end of the run, and need not be scanned again.
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def use_deterministic_kernels() -> None:
    """Have torch choose, for the rest of this process, kernels that give the same bits each time."""
    import torch

    # cuBLAS reads it when it is first used, and torch requires it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would fill all new memory with NaN, which finds code that reads uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def gpu_mark() -> Any:
    """Return an event of CUDA at this point in the work of the current GPU."""
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
