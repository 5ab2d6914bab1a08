"""Logits: their soft cap, their computation on demand, and the divergence of a student's logits from a
teacher's. Shape letters: N tokens, n of them in a chunk, D hidden size, V vocabulary, P the vocabulary padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(logits / cap) (arXiv:2408.00118), or the logits themselves."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class LogitsOnDemand:
    """The logits of N tokens, computed in chunks on demand: those of a whole batch are never in memory.

    Attributes:
        hidden: [N, D], the input of the head's matrix.
        weight: [V, D].
        bias: [V], or None.
        soft_cap: the soft cap of the logits, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    soft_cap: float | None

    def __getitem__(self, chunk: slice) -> Tensor:
        """Return the logits of some tokens, fp32 [n, V]."""
        return soft_capped(F.linear(self.hidden[chunk], self.weight, self.bias).float(), self.soft_cap)


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's predictions for each of N tokens (Hinton et al., arXiv:1503.02531).

    Attributes:
        logits: the teacher's logits.
        weight: the share of the teacher in the loss, from 0 to 1; the rest is the loss on the labels.
        temperature: the divisor of both logits before they are compared.
    """

    logits: LogitsOnDemand
    weight: float
    temperature: float


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) in nats, of each row, with both softmaxes at the temperature T.

    The factor keeps the size of the gradient at any temperature (arXiv:1503.02531, section 2).

    Args:
        logits, teacher: [..., V].

    Returns:
        fp32 [...].
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    expected = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(student, expected, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def divergence_and_gradient(
    logits: Tensor, teacher: Tensor, predicted: Tensor, soft_cap: float | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of `divergence` over a chunk of tokens, and its gradient in closed form, both in fp32.

    Args:
        logits: [n, P] before the soft cap; they are not changed.
        teacher: fp32 [n, V], after its soft cap; may be overwritten.
        predicted: fp32 [n], 1 for a token that counts, else 0.

    Returns:
        The sum, a scalar, and the gradient with regard to the logits, [n, V].
    """
    scores = soft_capped(logits[:, : teacher.shape[1]].float(), soft_cap)
    slope = None if soft_cap is None else 1.0 - (scores / soft_cap).square()
    student = F.log_softmax(scores / temperature, dim=-1)
    difference = F.log_softmax(teacher / temperature, dim=-1)
    expected = difference.exp()
    of_token = torch.linalg.vecdot(expected, difference.sub_(student))
    # d KL / d (scores / T) = softmax - expected; T^2 and the inner 1 / T leave one T.
    gradient = student.exp_().sub_(expected).mul_((temperature * predicted)[:, None])
    if slope is not None:
        gradient.mul_(slope)
    return (of_token * predicted).sum() * temperature**2, gradient
