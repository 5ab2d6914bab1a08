"""The time and memory of head and loss, compiled and not, against the three products that they cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from loss import bigtx_loss, plain_loss
from throughput import VOCAB_SIZE
from torch import Tensor

from bigtx.model.loss import Head
from test_gpu import timing
from test_gpu.child import Job
from test_gpu.plan import SMALLEST
from test_gpu.trainer import ranks, trainer

SIZES = {"decoder-125m": 32_768, "decoder-350m": 16_384, "decoder-1.3b": 16_384}
"""Tokens at once, by the model whose head is measured."""

Way = Callable[[Head, Tensor, Tensor], Tensor]
WAYS: dict[str, tuple[bool, Way]] = {
    "compiled": (True, bigtx_loss),
    "not compiled": (False, bigtx_loss),
    "plain": (False, plain_loss),
}
"""Whether the engine compiles the loss (on a GPU only), and the function of the head, hidden states and labels."""


def loss(job: Job) -> None:
    """Measure the head of each model as its engine makes it."""
    ranks()
    for model, num_tokens in ({SMALLEST: 64} if job.is_dry else SIZES).items():
        with job.attempt(model):
            vocab_size = 512 if job.is_dry else VOCAB_SIZE
            found = {}
            for name, (is_compiled, way) in WAYS.items():
                compiled = str(is_compiled and not job.is_dry).lower()
                settings = (f"engine.compile={compiled}", "model.num_layers=1")
                with trainer(model, *settings, rows=1, length=64, vocab_size=vocab_size) as made:
                    size = made.config.model.hidden_size
                    found[name] = _measure(made.engine.module.head, way, num_tokens, size, vocab_size)
            flops = 3 * 2 * num_tokens * vocab_size * size
            reached = flops / found["compiled"]["ms"] / 1e9
            job.write(f"{model}, {num_tokens} tokens", **found, tflops_of_the_products=reached)


def _measure(head: Any, way: Way, num_tokens: int, size: int, vocab_size: int) -> dict[str, float]:
    """Return the milliseconds and the memory of one forward and backward pass."""
    device = timing.device()
    hidden = torch.randn(1, num_tokens, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab_size, (1, num_tokens), device=device)

    def differentiate() -> None:
        # Not `backward`: DeepSpeed's hooks would add the gradient to its buffers.
        torch.autograd.grad(way(head, hidden, labels), [hidden, head.weight])

    differentiate()
    before = peak = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        differentiate()
        peak = torch.cuda.max_memory_allocated()
    return {"ms": timing.milliseconds(differentiate, rounds=6), "peak_mib": (peak - before) / 2**20}
