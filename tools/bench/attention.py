"""Measure attention with a document mask on a GPU, forward and backward, in milliseconds by kernel; print JSON.

    python tools/bench/attention.py [--rows 8] [--length 2048] [--heads 16] [--kv-heads 4] [--head-width 128]

Rows are packed with documents of random lengths. `causal` attends over whole rows without a mask; the others are
compared with it. `dense` is a tensor over all pairs, `flex` is FlexAttention over sparse blocks, as in bigtx, with a
new mask for each pass, and `varlen` is torch's variable-length attention over the documents one after another, if
this torch has it. The kernels take turns, and each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bigtx.model.attention import Side, block_mask, dense_mask

varlen_attn: Any = None
with contextlib.suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor) -> Tensor:
    """Attend over whole rows."""
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)


def dense(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor) -> Tensor:
    """Attend with a mask of all pairs; no kernel supports grouped heads with it."""
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    mask = dense_mask(side(segments), side(segments), causal=True, window=None, prefix=None)[:, None]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


compiled_flex = torch.compile(flex_attention, dynamic=False)


def flex(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor) -> Tensor:
    """Attend with FlexAttention."""
    blocks = block_mask(side(segments), side(segments), causal=True, window=None, prefix=None)
    return compiled_flex(queries, keys, values, block_mask=blocks, enable_gqa=True)


def varlen(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor) -> Tensor:
    """Attend with all documents of all rows in one sequence."""
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = first.flatten().nonzero().flatten()
    ends = F.pad(starts, (0, 1), value=segments.numel()).int()
    longest = int(ends.diff().max())
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    lined = (part.transpose(1, 2).flatten(0, 1) for part in (queries, keys, values))
    # Before torch had windows, the argument for causality had another name.
    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    causality: dict[str, Any] = {"window_size": (-1, 0)} if windowed else {"is_causal": True}
    return varlen_attn(*lined, ends, ends, longest, longest, **causality)


def side(segments: Tensor) -> Side:
    """Concatenate the tokens of packed rows."""
    return Side(torch.arange(segments.shape[1], device=segments.device)[None], segments)


KERNELS: dict[str, Kernel] = {"causal": causal, "dense": dense, "flex": flex}
if varlen_attn is not None:
    KERNELS["varlen"] = varlen


def packed_segments(rows: int, length: int, mean: int) -> Tensor:
    """Draw segment ids of rows whose documents have geometric lengths."""
    begins = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 1 / mean
    return begins.long().cumsum(dim=1)


def measure(
    names: Iterable[str],
    *,
    rows: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_width: int,
    mean_document: int = 500,
    rounds: int = 20,
) -> dict[str, float]:
    """Return the median milliseconds of a forward and backward pass by kernel, measured in turn in bf16.

    Args:
        names: the kernels.
        rows, length, heads, kv_heads, head_width: the shape of attention.
        mean_document: the mean tokens of a document.
        rounds: how often each kernel is measured, after three passes that compile.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segments = packed_segments(rows, length, mean_document).to(device)
    torch.manual_seed(1)
    queries, keys, values = (
        torch.randn(rows, number, length, head_width).to(device, torch.bfloat16).requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    )
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 3):
        for name, times in found.items():
            wait_for_device()
            start = time.perf_counter()
            result = KERNELS[name](queries, keys, values, segments)
            result.backward(torch.ones_like(result))
            wait_for_device()
            if number >= 3:
                times.append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(times), 3) for name, times in found.items()}


def wait_for_device() -> None:
    """Wait until a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure the kernels in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8), ("length", 2048), ("heads", 16), ("kv-heads", 4), ("head-width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mean-document", type=int, default=500, help="mean tokens of a document (500)")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tools/bench/attention.py compares kernels of a GPU, and this machine has none")
    milliseconds = measure(KERNELS, **vars(options))
    over_causal = {name: round(took / milliseconds["causal"], 3) for name, took in milliseconds.items()}
    facts = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), **vars(options)}
    print(json.dumps({**facts, "milliseconds": milliseconds, "over_causal": over_causal}, indent=2))


if __name__ == "__main__":
    main()
