"""Everything that torch.compile is applied to: blocks, the loss, and FlexAttention.

torch's compiler takes more than a second to import, so only code that compiles imports this module. Shape letters: n
tokens of a chunk, P the vocabulary padded.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor

from bigtx.model.logits import divergence_and_gradient, soft_capped
from bigtx.model.loss import IGNORED, Head
from bigtx.utils import log

MAX_PROGRAMS = 32
"""The most programs of a function. A block has programs for training and for validation, with and without a mask, and
for one length and for any; torch's own limit is eight."""


def program(function: Any, *, dynamic: bool | None = None) -> Any:
    """Return a function compiled. The user is notified when torch stops compiling it for further shapes.

    Args:
        function: any function of tensors.
        dynamic: False compiles for each shape; None compiles for any length after the second one.
    """
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_notice_limit)
    torch._dynamo.config.recompile_limit = MAX_PROGRAMS
    return torch.compile(function, dynamic=dynamic)


def compile_model(model: Any, device: torch.device, *, dynamic: bool | None) -> None:
    """Compile the blocks of a Transformer, and on a GPU its loss; `dynamic` is that of `program`."""
    for block in model.blocks:
        # Only the forward: DeepSpeed's hooks would be traced too, and compiled again for each block.
        block.forward = program(block.forward, dynamic=dynamic)
    if device.type == "cuda" and isinstance(model.head, Head):
        compile_loss(model.head, dynamic=dynamic)


def compile_loss(head: Head, *, dynamic: bool | None = None) -> None:
    """Compile the passes over a chunk of logits, which are limited by memory bandwidth on a GPU."""
    head.chunk_loss = program(fused_loss_and_gradient, dynamic=dynamic)
    head.divergence = program(divergence_and_gradient, dynamic=dynamic)


LIMIT_REACHED = re.compile(r"hit config\.\w+ \((\d+)\)\s+function: '([^']+)'")
"""torch's warning that a function has as many programs as one may have. It runs uncompiled for all other shapes."""


def _notice_limit(record: logging.LogRecord) -> bool:
    if found := LIMIT_REACHED.search(record.getMessage()):
        _report_limit(found[2], int(found[1]))
    return True


@functools.cache
def _report_limit(name: str, limit: int) -> None:
    text = (
        f"torch.compile has made {limit} programs of `{name}`, which is its limit: batches of other shapes run it "
        "uncompiled, slower and with more memory; the log of each rank has the reason"
    )
    log.say(f"warning: {text}")
    warnings.warn(text, stacklevel=2)  # An error in tests.


def fused_loss_and_gradient(
    logits: Tensor, labels: Tensor, vocab_size: int, soft_cap: float | None, z_loss: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as `chunk_loss_and_gradient`, in a form that torch.compile turns into passes over logits [n, P].

    Each element of the gradient depends on its own logit and on numbers of its row. So the passes read the logits and
    write the gradient, 8 bytes per logit in bf16, and no fp32 copy is in memory. `scatter_add_` would need such a copy.
    """
    predicted = (labels != IGNORED).float()[:, None]  # n 1
    columns = torch.arange(logits.shape[1], device=logits.device)
    is_id, is_target = columns < vocab_size, columns == labels[:, None]
    scores = soft_capped(logits.float(), soft_cap)
    of_target = scores.gather(1, labels.clamp(min=0)[:, None])  # n 1
    masked = torch.where(is_id, scores, float("-inf"))
    log_partition = masked.logsumexp(dim=-1, keepdim=True)  # n 1
    cross_entropy = (log_partition - of_target) * predicted
    loss = cross_entropy + z_loss * log_partition.square() * predicted
    # The softmax, with the slope of the z-loss, minus what is expected: see `chunk_loss_and_gradient`.
    grad = (1.0 + 2.0 * z_loss * log_partition) * (masked - log_partition).exp()
    grad = grad - torch.where(is_target, 1.0 - label_smoothing, 0.0)
    if label_smoothing:
        mean_score = torch.where(is_id, scores, 0.0).sum(dim=-1, keepdim=True) / vocab_size
        loss = loss + label_smoothing * (of_target - mean_score) * predicted
        grad = grad - torch.where(is_id, label_smoothing / vocab_size, 0.0)
    grad = predicted * grad
    if soft_cap is not None:
        grad = grad * (1.0 - (scores / soft_cap).square())
    return loss.sum(), cross_entropy.sum(), grad.to(logits.dtype)
