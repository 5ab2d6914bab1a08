from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import bigtx
from bigtx.utils import hardware

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200 NVL", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA B200", "bf16", 2.25e15),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Tesla V100-PCIE-32GB", "fp16", 112e12),
        ("NVIDIA A1000", "bf16", None),
        ("Some Other Device", "bf16", None),
    ],
)
def test_peak(device: str, precision: str, peak: float | None) -> None:
    assert hardware.peak_flops(device, precision) == peak


def test_the_description_is_json_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-that-must-not-leak")
    described = hardware.describe()
    text = json.dumps(described)
    assert "a-secret-that-must-not-leak" not in text
    assert described["packages"]["bigtx"] == bigtx.__version__
    assert described["num_cores"] >= 1 and described["memory_bytes"] > 2**28
    assert described["gpus"] == [] or described["gpus"][0]["name"]


def test_the_kernel_of_attention_has_a_name() -> None:
    """The name that the record of a run with a GPU contains."""
    assert hardware.attention_kernel("cpu") in ("flash_attention", "math")


def test_the_commit_is_that_of_the_clone() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    state = hardware.git_state()
    assert state is not None and state["commit"] == head and isinstance(state["dirty"], bool)
