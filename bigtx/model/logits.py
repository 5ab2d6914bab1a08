"""Logits: their soft cap, logits that are made only when they are asked for, and how far a student's are from a
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
    """The logits of N tokens, of which a chunk is made when it is asked for: those of a whole batch never exist.

    Attributes:
        hidden: [N, D], what the head's matrix is multiplied with.
        weight: [V, D].
        bias: [V], or None.
        soft_cap: of the logits, or None.
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
    """What a teacher finds likely for each of N tokens (Hinton et al., arXiv:1503.02531).

    Attributes:
        logits: the teacher's.
        weight: share of the teacher in the loss, from 0 to 1; the rest is the labels' own.
        temperature: by which the logits of both are divided before they are compared.
    """

    logits: LogitsOnDemand
    weight: float
    temperature: float


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) in nats, of each row, where the softmax of both has the temperature T.

    The factor keeps the gradient as large at any temperature (arXiv:1503.02531, section 2).

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
        logits: [n, P] before the soft cap; left as they are.
        teacher: fp32 [n, V], after its soft cap; may be overwritten.
        predicted: fp32 [n], 1 where a token counts and 0 where not.

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
