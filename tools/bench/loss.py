"""Compare memory and time of bigtx's head and loss with plain ones, with a vocabulary of 128k; print JSON.

    python tools/bench/loss.py [--rows 2] [--length 2048] [--hidden-size 256] [--vocab-size 131072] [--rounds 3]

The program measures one forward and backward pass over hidden states, in bf16. Each way runs in its own process, in
turn. Its peak is the memory in addition to the hidden states and the weights, including the gradients of both: on a GPU
as torch's allocator counts it, on a CPU as the kernel counts resident memory. `plain` is a matrix product and torch's
cross_entropy in fp32, `torch_fused` is torch's linear_cross_entropy, if this torch has it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtx.config.schema import ModelConfig
from bigtx.model.loss import Head, Loss


def bigtx_loss(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss as the model does."""
    result = head(hidden, labels)
    assert isinstance(result, Loss)
    return result.loss_sum


def plain_loss(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """Compute all logits at once."""
    logits = F.linear(hidden, head.weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def torch_fused_loss(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss with torch's fused function."""
    return F.linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels.flatten(), reduction="sum")


WAYS: dict[str, Callable[[Head, Tensor, Tensor], Tensor]] = {"bigtx": bigtx_loss, "plain": plain_loss}
if hasattr(F, "linear_cross_entropy"):
    WAYS["torch_fused"] = torch_fused_loss


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure peak MiB and seconds of one pass in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)
    head = Head(ModelConfig(vocab_size=options.vocab_size, hidden_size=options.hidden_size)).to(device, torch.bfloat16)
    torch.nn.init.normal_(head.weight, std=0.02)
    shape = (options.rows, options.length)
    hidden = torch.randn(*shape, options.hidden_size).to(device, torch.bfloat16).requires_grad_()
    labels = torch.randint(options.vocab_size, shape).to(device)
    loss = WAYS[way]
    # The memory that kernels allocate at their first use is not measured.
    loss(head, hidden[:, :16], labels[:, :16]).backward()
    head.weight.grad = hidden.grad = None
    before = memory(device)
    start = time.perf_counter()
    loss(head, hidden, labels).backward()
    peak = memory(device, peak=True) - before
    return {"peak_mib": peak, "seconds": time.perf_counter() - start}


def memory(device: torch.device, peak: bool = False) -> float:
    """Return the MiB in use, or their maximum so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    """Measure each way in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8 if torch.cuda.is_available() else 2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=sorted(WAYS), help="measure only this one, in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, results in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    figures: dict[str, Any] = {
        way: {name: statistics.median(result[name] for result in results) for name in ("peak_mib", "seconds")}
        for way, results in found.items()
    }
    for name in ("peak_mib", "seconds"):
        figures[f"plain_over_bigtx_{name}"] = figures["plain"][name] / figures["bigtx"][name]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"torch": torch.__version__, "machine": machine, **vars(options), **figures}, indent=2))


if __name__ == "__main__":
    main()
