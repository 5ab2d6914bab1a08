"""Attention within documents, by each kernel, and the programs that rows of many lengths need."""

from __future__ import annotations

import time

import attention
import torch
from torch._dynamo.utils import counters

from bigtx.config.schema import ModelConfig
from bigtx.model.transformer import Transformer
from test_gpu import timing
from test_gpu.child import Job

LENGTHS = range(256, 256 + 24 * 16, 16)
"""The lengths of batches, in tokens."""

SHAPES = (
    {"rows": 8, "length": 2048, "heads": 16, "kv_heads": 16},
    {"rows": 8, "length": 2048, "heads": 16, "kv_heads": 4},
)


def flex(job: Job) -> None:
    """Compare the kernels, then run a model with two documents a row on batches of many lengths."""
    # FlexAttention has no backward pass on a CPU.
    names = [name for name in attention.KERNELS if not job.is_dry or name in ("causal", "dense")]
    for shape in [{"rows": 2, "length": 64, "heads": 4, "kv_heads": 2}] if job.is_dry else SHAPES:
        with job.attempt(str(shape)):
            found = attention.measure(names, **shape, head_width=16 if job.is_dry else 128, rounds=8)
            job.write("x".join(map(str, shape.values())), ms=found)
    with job.attempt("many lengths"):
        _run_lengths(job)


def _run_lengths(job: Job) -> None:
    size, device = (64, "cpu") if job.is_dry else (512, "cuda")
    config = ModelConfig(vocab_size=512, hidden_size=size, num_layers=2, num_heads=4, max_sequence_length=1024)
    with torch.device(device):
        model = Transformer(config)
    model.init_weights(1)
    model.to(torch.bfloat16)
    for block in model.blocks:
        # As the engine does, for rows of records.
        compiled = torch.compile(block.forward, dynamic=None, backend="eager" if job.is_dry else "inductor")
        block.forward = compiled  # type: ignore[method-assign]
    seconds, programs = [], []
    for length in LENGTHS[:4] if job.is_dry else LENGTHS:
        if not job.has_time(15):
            break
        began = time.perf_counter()
        tokens = torch.randint(512, (2, length), device=device)
        segments = (torch.arange(length, device=device) >= length // 3).long().expand(2, -1)
        model(tokens, labels=tokens, segment_ids=segments).loss_sum.backward()
        timing.wait()
        seconds.append(time.perf_counter() - began)
        programs.append(counters["stats"]["unique_graphs"])
    job.write("many lengths", seconds=seconds, programs=programs, limit=torch._dynamo.config.recompile_limit)
    assert programs, "no time is left"
    late = programs[-1] - programs[min(3, len(programs) - 1)]
    assert late == 0, f"{late} programs were compiled after the fourth length"
