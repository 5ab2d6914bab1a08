"""Which kernel computes attention, how long each one takes forward and backward, and whether all agree."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from test_gpu import timing
from test_gpu.child import Job

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SHAPES = ((16, 12, 12, 2048, 64), (16, 6, 6, 2048, 128), (8, 16, 16, 2048, 128), (4, 32, 8, 4096, 128))
"""Rows, heads, heads of keys, tokens and the width of a head: 125M with two widths, 1.3B, and grouped heads."""

MOST_ERROR = 0.02
"""Of the norm: bf16 rounds to 2^-9 of a value, a few times."""


def kernels(job: Job) -> None:
    """Measure causal attention and attention under a mask, then what a new key length costs when text is generated."""
    for shape in ((2, 4, 2, 64, 16),) if job.is_dry else SHAPES:
        for mask in ("causal", "padding"):
            with job.attempt(f"{mask} {shape}"):
                _measure(job, shape, mask)
    with job.attempt("new key lengths"), torch.no_grad():
        _measure_lengths(job)


def _measure(job: Job, shape: tuple[int, ...], mask: str) -> None:
    call, inputs = _attention(shape, mask)
    expected = _gradients(call, inputs, SDPBackend.MATH)
    found: dict[str, Any] = {}
    for name, backend in BACKENDS.items():
        try:
            found[name] = timing.milliseconds(functools.partial(_gradients, call, inputs, backend))
            error = max(
                float((a - b).norm() / b.norm())
                for a, b in zip(_gradients(call, inputs, backend), expected, strict=True)
            )
        except RuntimeError as refusal:  # A kernel need not take every shape and mask.
            found[name] = f"refused: {str(refusal).splitlines()[0][:60]}"
            continue
        assert error <= MOST_ERROR, f"{name} differs from plain attention by {error:.3f} of the norm"
    rows, heads, _, length, width = shape
    # Three and a half products of the forward pass, each over half of the pairs if causal.
    flops = 3.5 * 4 * rows * heads * length**2 * width * (0.5 if mask == "causal" else 1.0)
    job.write(f"{mask} {'x'.join(map(str, shape))}", ms=found, default_tflops=flops / found["default"] / 1e9)


def _attention(shape: tuple[int, ...], mask: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    rows, heads, kv_heads, length, width = shape
    torch.manual_seed(1)
    queries, keys, values = (
        torch.randn(rows, length, number, width, device=timing.device(), dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    )
    if mask == "causal":
        return (
            lambda: F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True),
            [queries, keys, values],
        )
    lengths = torch.linspace(length // 2, length, rows, device=timing.device()).long()
    visible = (torch.arange(length, device=timing.device()) < lengths[:, None])[:, None, None]
    repeats = heads // kv_heads

    def padded() -> Tensor:
        repeated_keys, repeated_values = (part.repeat_interleave(repeats, dim=1) for part in (keys, values))
        return F.scaled_dot_product_attention(queries, repeated_keys, repeated_values, attn_mask=visible)

    return padded, [queries, keys, values]


def _gradients(call: Callable[[], Tensor], inputs: list[Tensor], backend: SDPBackend | None) -> list[Tensor]:
    """Return the attention and the gradients of its inputs, by this kernel or by torch's choice."""
    with contextlib.nullcontext() if backend is None else sdpa_kernel([backend]):
        result = call()
        grads = torch.autograd.grad(result, inputs, torch.ones_like(result))
    return [result.detach().float(), *(grad.float() for grad in grads)]


def _measure_lengths(job: Job) -> None:
    """Attend from one token to keys whose number grows by one: a kernel may need a plan for each number."""
    keys = torch.randn(1, 12, 512, 64, device=timing.device(), dtype=torch.bfloat16)
    query = keys[:, :, :1]

    def attend(length: int) -> None:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=keys.device)
        F.scaled_dot_product_attention(query, keys[:, :, :length], keys[:, :, :length], attn_mask=mask)

    for length in (100, 101):
        attend(length)
    lengths = iter(range(200, 220))
    new = timing.milliseconds(lambda: attend(next(lengths)), rounds=20, warm=0)
    job.write("new key lengths", ms_of_a_new_length=new, ms_of_a_known_length=timing.milliseconds(lambda: attend(219)))
