"""The versions that decide which kernels run, and what the GPU reaches without bigtx."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import torch

import bigtx
from test_gpu import timing
from test_gpu.child import Job


def environment(job: Job) -> None:
    """Write the versions, the speed of a product of matrices in bf16, and the bandwidth of a copy."""
    job.write("versions", **_versions())
    device, size, num_bytes = timing.device(), 64 if job.is_dry else 8192, 2**16 if job.is_dry else 2**31
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    took = timing.milliseconds(lambda: matrix @ matrix)
    data = torch.empty(num_bytes, device=device, dtype=torch.uint8)
    copied = torch.empty_like(data)
    copy_took = timing.milliseconds(lambda: copied.copy_(data))
    # A copy reads and writes each byte.
    job.write("reached", matmul_tflops=2 * size**3 / took / 1e9, copy_tb_per_second=2 * num_bytes / copy_took / 1e9)


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"bigtx": bigtx.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return found
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": properties.name,
        "gib": properties.total_memory / 2**30,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": _driver(),
        # A cuDNN of the system that is found first changes the kernel of attention.
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
    }


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
