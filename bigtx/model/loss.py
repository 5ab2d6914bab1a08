"""The head and the loss, fused so that the logits of a whole batch are never in memory.

Logits are computed for one chunk of tokens at a time, together with the chunk's gradients: the loss is a sum over
tokens, so the upstream gradient is one number to multiply by. Compared with recomputing each chunk in the
backward pass this saves one of four matrix products; compared with plain cross-entropy it saves memory for B T V
logits. If the score of each label is requested instead, the backward pass computes the logits of each chunk again.
(torch 2.13's linear_cross_entropy is as fast, but rounds the loss to bf16 and has no soft cap and no z-loss.)
Shape letters: N tokens, D hidden size, V vocabulary, P the vocabulary padded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.experts import Routing
from bigtx.model.layers import Dropout, Linear, Norm
from bigtx.model.logits import LogitsOnDemand, SoftTargets, divergence_and_gradient, soft_capped

IGNORED = -100
"""The label of a position that is not predicted."""

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""The number of logits of a chunk, for which large products run faster: in bf16 16 MiB on a CPU, 256 MiB on a GPU."""

PIECE_LOGITS = 2**18
"""The number of logits that a CPU converts to gradients at once: in fp32 they fit into a core's cache."""

MIN_CHUNK_TOKENS = 128
"""The least tokens of a chunk: with a large vocabulary, smaller ones mostly add to the weight's gradient."""
CHUNK_MULTIPLE = 128
"""On a GPU the tokens of a chunk are a multiple of this number, so that products fill whole tiles."""
TAUGHT_COPIES = 4
"""The number of tensors of a chunk's size in memory if a teacher's logits are compared, in place of one."""

ChunkLoss = Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]]
"""A function of logits [n, P] and their targets, usually labels [n], to the summed loss, the summed cross-entropy,
and the loss's gradient [n, P]."""


class Loss(NamedTuple):
    """The loss of a batch, summed over its labels: what the model returns for labels, and a task for a batch."""

    loss_sum: Tensor
    """fp32 scalar with a gradient; for labels, the cross-entropy in nats, smoothed and with z-loss if set."""
    reported_sum: Tensor
    """fp32 scalar without a gradient: the part of the loss that is reported; for labels, the plain cross-entropy."""
    routing: Routing | None = None
    """The routing of the tokens, if there are experts; the engine adds the losses that it causes."""


class Task(Protocol):
    """The meaning of a batch; see bigtx.finetuning.tasks."""

    def loss(self, model: Callable[..., Any], batch: Any) -> Loss:
        """Return the loss of a batch."""


class TokenScores(NamedTuple):
    """What the model returns for labels that are scored one by one."""

    log_probs: Tensor
    """fp32 [B, T] with a gradient: the log-probability of each label in nats; 0 without a label."""
    is_likeliest: Tensor
    """bool [B, T]: whether no id is more likely than the label; False without a label."""
    routing: Routing | None = None
    """The routing of the tokens, if there are experts."""


class ClassifierHead(nn.Module):
    """The head from a summary of a text to the logits of its classes, in one of the forms of families of models.

    transform   classes(norm(gelu(transform x)))   ModernBERT (arXiv:2412.13663)
    pooler      classes(tanh(pooler x))            BERT, RoBERTa
    score       classes(x), without a bias         decoders

    The transform is that of the head of tokens, so its pretrained weights are used here too; a model without one
    has none here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_classes is not None
        size, form, has_transform = config.hidden_size, shape.class_head(config), shape.has_transform(config)
        self.transform = Linear(size, size, bias=config.mlp_bias) if has_transform else None
        self.norm = Norm.of(config) if has_transform else None
        self.pooler = Linear(size, size) if form == "pooler" else None
        self.dropout = Dropout(config.dropout, "summary")
        self.classes = Linear(size, config.num_classes, bias=form != "score")

    def forward(self, summary: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Return logits, fp32 [B, classes], of summaries [B, D], with int64 seeds [B] of dropout."""
        if self.transform is not None and self.norm is not None:
            summary = self.norm(F.gelu(self.transform(summary)))
        elif self.pooler is not None:
            summary = torch.tanh(self.pooler(summary))
        return self.classes(self.dropout(summary, seeds)).float()


class Head(nn.Module):
    """The head from the last hidden states to logits or to the loss. A tied head has the embedding's own parameter."""

    def __init__(self, config: ModelConfig, tied_to: Tensor | None = None) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.vocab_size = config.vocab_size
        self.scale = config.logit_scale
        self.soft_cap = config.logit_soft_cap
        self.chunk_loss = chunk_loss_and_gradient
        self.divergence = divergence_and_gradient
        rows, size = shape.padded_vocab_size(config), config.hidden_size
        self.transform = Linear(size, size, bias=config.mlp_bias) if config.head_transform else None
        self.norm = Norm.of(config) if config.head_transform else None
        self.weight = nn.Parameter(torch.empty(rows, size)) if tied_to is None else tied_to
        self.bias = nn.Parameter(torch.empty(rows)) if config.head_bias else None

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        score_tokens: bool = False,
        soft_targets: SoftTargets | None = None,
    ) -> Tensor | Loss | TokenScores:
        """Return logits [B, T, V], fp32, of hidden [B, T, D]; or, given labels [B, T] (-100 is ignored), the loss, in
        which may include soft targets, or the score of each label.
        """
        hidden = self._transformed(hidden)
        if labels is None:
            return soft_capped(F.linear(hidden, *self._of_vocabulary()).float(), self.soft_cap)
        if score_tokens:
            found = ChunkedLogProbs.apply(
                hidden.flatten(0, 1), self.weight, self.bias, labels.flatten(), self.vocab_size, self.soft_cap
            )
            return TokenScores(*(part.view(labels.shape) for part in found))
        per_chunk: ChunkLoss = functools.partial(
            self.chunk_loss,
            vocab_size=self.vocab_size,
            soft_cap=self.soft_cap,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )
        if hidden.device.type == "cpu":
            per_chunk = functools.partial(loss_in_pieces, per_piece=per_chunk)
        targets: Any = labels.flatten()
        if soft_targets is not None:
            targets = _LabelsAndLogits(targets, soft_targets.logits)
            per_chunk = functools.partial(self._taught_chunk_loss, of_labels=per_chunk, taught_by=soft_targets)
        inputs: tuple[Tensor, Tensor, Tensor | None] = hidden.flatten(0, 1), self.weight, self.bias
        if not torch.is_grad_enabled():
            # Inside the function torch reports that all tensors need a gradient, even if none is recorded.
            inputs = inputs[0].detach(), inputs[1].detach(), None if self.bias is None else self.bias.detach()
        loss, cross_entropy = ChunkedLoss.apply(*inputs, targets, per_chunk)
        return Loss(loss, cross_entropy)

    def on_demand(self, hidden: Tensor) -> LogitsOnDemand:
        """Return the logits of hidden [B, T, D], of B T tokens in a row, which are computed on demand."""
        return LogitsOnDemand(self._transformed(hidden).flatten(0, 1), *self._of_vocabulary(), self.soft_cap)

    def _transformed(self, hidden: Tensor) -> Tensor:
        """Return the input of the matrix."""
        if self.transform is not None and self.norm is not None:
            hidden = self.norm(F.gelu(self.transform(hidden)))
        return hidden if self.scale == 1.0 else hidden * self.scale

    def _of_vocabulary(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias without the rows of padding."""
        return self.weight[: self.vocab_size], None if self.bias is None else self.bias[: self.vocab_size]

    def _taught_chunk_loss(
        self, logits: Tensor, targets: tuple[Tensor, Tensor], of_labels: ChunkLoss, taught_by: SoftTargets
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (1 - w) times the loss of the labels and w times the divergence from the teacher: a `ChunkLoss`."""
        labels, teacher = targets
        weight, predicted = taught_by.weight, (labels != IGNORED).float()
        # The teacher's part is first: the other may overwrite the logits.
        distance, pull = self.divergence(logits, teacher, predicted, self.soft_cap, taught_by.temperature)
        loss, cross_entropy, grad = of_labels(logits, labels)
        grad = grad * (1.0 - weight)
        grad[:, : self.vocab_size].add_(pull, alpha=weight)
        return (1.0 - weight) * loss + weight * distance, cross_entropy, grad


class _LabelsAndLogits:
    """Labels [N] and a teacher's logits of the same tokens, which are cut into chunks together."""

    def __init__(self, labels: Tensor, logits: LogitsOnDemand) -> None:
        self.labels, self.logits = labels, logits

    def __getitem__(self, chunk: slice) -> tuple[Tensor, Tensor]:
        return self.labels[chunk], self.logits[chunk]


class ChunkedLoss(torch.autograd.Function):
    """The sum of a loss on logits, a chunk of tokens at a time, with the gradients computed at the same time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Any, per_chunk: ChunkLoss
    ) -> tuple[Tensor, Tensor]:
        """Sum the loss of hidden [N, D] under weight [P, D], bias [P] and N targets, and keep the gradients.

        Returns:
            The loss and the cross-entropy, fp32 scalars.
        """
        grads = _Gradients(ctx.needs_input_grad[:3], hidden, weight)
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        arithmetic = _arithmetic(hidden)
        matrix, offsets = weight.to(arithmetic), None if bias is None else bias.to(arithmetic)
        num_copies = TAUGHT_COPIES if isinstance(targets, _LabelsAndLogits) else 1
        for chunk in _chunks(hidden, weight, num_copies):
            inputs = hidden[chunk].to(arithmetic)
            loss, cross_entropy, grad = per_chunk(F.linear(inputs, matrix, offsets), targets[chunk])
            sums += torch.stack((loss, cross_entropy))
            grads.add(chunk, grad, inputs, matrix)
        ctx.grads = grads.found
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        loss, cross_entropy = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradients by the gradient of the sum."""
        scaled = (
            None if grad is None else (grad * upstream[0]).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


class ChunkedLogProbs(torch.autograd.Function):
    """The log-probability of each label, a chunk of tokens at a time.

    The weight of a label in the loss may depend on all labels, e.g. if answers are compared as wholes, and is known
    only in the backward pass. The logits are computed again there: four matrix products instead of the loss's three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        vocab_size: int,
        soft_cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Score labels [N] by hidden [N, D] under weight [P, D] and bias [P].

        Returns:
            Log-probabilities, fp32 [N], and whether each label is the most likely, bool [N].
        """
        arithmetic = _arithmetic(hidden)
        matrix, offsets = weight.to(arithmetic), None if bias is None else bias.to(arithmetic)
        log_probs, log_partition = (torch.zeros_like(labels, dtype=torch.float32) for _ in range(2))
        is_likeliest = torch.zeros_like(labels, dtype=torch.bool)
        for chunk in _chunks(hidden, weight):
            predicted = labels[chunk] != IGNORED
            scores, _ = _scores(F.linear(hidden[chunk].to(arithmetic), matrix, offsets), vocab_size, soft_cap)
            of_target = scores.gather(1, labels[chunk].clamp(min=0)[:, None]).squeeze(1)
            log_partition[chunk] = scores.logsumexp(dim=-1)
            log_probs[chunk] = torch.where(predicted, of_target - log_partition[chunk], 0.0)
            is_likeliest[chunk] = predicted & (of_target >= scores.amax(dim=-1))
        ctx.save_for_backward(hidden, weight, bias, labels, log_partition)
        ctx.settings = (arithmetic, vocab_size, soft_cap)
        ctx.mark_non_differentiable(is_likeliest)
        return log_probs, is_likeliest

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute each chunk's logits again, and from them its gradients."""
        hidden, weight, bias, labels, log_partition = ctx.saved_tensors
        arithmetic, vocab_size, soft_cap = ctx.settings
        grads = _Gradients(ctx.needs_input_grad[:3], hidden, weight)
        matrix, offsets = weight.to(arithmetic), None if bias is None else bias.to(arithmetic)
        factors = torch.where(labels != IGNORED, upstream[0], 0.0)[:, None]  # N 1
        for chunk in _chunks(hidden, weight):
            inputs, factor = hidden[chunk].to(arithmetic), factors[chunk]
            scores, slope = _scores(F.linear(inputs, matrix, offsets), vocab_size, soft_cap)
            # d log p(label) = one at the label minus the softmax.
            grad = scores.sub_(log_partition[chunk][:, None]).exp_().mul_(-factor)
            grad = grad.scatter_add_(1, labels[chunk].clamp(min=0)[:, None], factor)
            grad = (grad if slope is None else grad.mul_(slope)).to(arithmetic)
            grads.add(chunk, grad, inputs, matrix)
        found = zip(grads.found, (hidden, weight, bias), strict=True)
        return *(None if grad is None else grad.to(part.dtype) for grad, part in found), None, None, None


class _Gradients:
    """The gradients of hidden [N, D], and of weight [P, D] and bias [P] in fp32; None for each that is not wanted."""

    def __init__(self, wanted: tuple[bool, ...], hidden: Tensor, weight: Tensor) -> None:
        self.found = (
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None,
            torch.zeros_like(weight[:, 0], dtype=torch.float32) if wanted[2] else None,
        )

    def add(self, chunk: slice, grad: Tensor, inputs: Tensor, matrix: Tensor) -> None:
        """Add a chunk with the gradient [n, P] of its logits, which are inputs [n, D] times matrix [P, D]."""
        hidden, weight, bias = self.found
        if hidden is not None:
            hidden[chunk] = grad @ matrix
        if weight is not None and grad.is_cuda and grad.dtype != torch.float32 and torch.version.hip is None:
            # The product of 16-bit matrices is added to the fp32 sum in the kernel, without rounding and a copy.
            torch.addmm(weight, grad.t(), inputs, out_dtype=torch.float32, out=weight)
        elif weight is not None:
            weight += grad.t() @ inputs
        if bias is not None:
            bias += grad.sum(dim=0, dtype=torch.float32)


def _arithmetic(hidden: Tensor) -> torch.dtype:
    """Return the type of the products. Autocast would cast the weight again for each chunk."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(hidden: Tensor, weight: Tensor, num_copies: int = 1) -> Iterator[slice]:
    """Yield the slices of hidden [N, D] whose logits under weight [P, D] are computed at once, in so many copies.

    They have one size if a few more of them make that possible: a compiled loss has a program for each size.
    """
    device, num_tokens = hidden.device.type, hidden.shape[0]
    limit = CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // num_copies // weight.shape[0]
    unit = 1 if device == "cpu" else CHUNK_MULTIPLE
    units = -(-num_tokens // unit)
    fewest = max(1, -(-units // max(1, max(MIN_CHUNK_TOKENS, limit) // unit)))
    counts = range(fewest, fewest + fewest // 4 + 1)
    size = unit * -(-units // next((count for count in counts if units % count == 0), fewest))
    return (slice(start, start + size) for start in range(0, num_tokens, max(1, size)))


def _scores(logits: Tensor, vocab_size: int, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return logits [n, P] for the loss, in fp32 and soft-capped, and the slope of the soft cap if there is one."""
    scores = soft_capped(logits.float(), soft_cap)
    slope = None if soft_cap is None else 1.0 - (scores / soft_cap).square()
    scores[:, vocab_size:] = float("-inf")
    return scores, slope


def chunk_loss_and_gradient(
    logits: Tensor, labels: Tensor, vocab_size: int, soft_cap: float | None, z_loss: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cross-entropy plus z_loss * logsumexp^2 (PaLM, arXiv:2204.02311), in fp32.

    With smoothing e the label is expected with probability 1 - e, and every id of the vocabulary, the label included,
    with an additional e / V (arXiv:1512.00567, section 7).

    It works in place on one fp32 copy of the logits: the time is all memory traffic.

    Args:
        logits: [n, P] before the soft cap, the product of a matrix multiplication; may be overwritten.
        labels: int64 [n].

    Returns:
        The loss and the cross-entropy, fp32 scalars summed over the chunk, and the loss's gradient [n, P] in the
        logits' type.
    """
    predicted = (labels != IGNORED).float()  # n
    target = labels.clamp(min=0)[:, None]  # n 1
    scores, slope = _scores(logits, vocab_size, soft_cap)
    of_target = scores.gather(1, target).squeeze(1)
    mean_score = scores[:, :vocab_size].mean(dim=-1) if label_smoothing else of_target
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    log_partition = (total.log() + top).squeeze(1)
    cross_entropy = (log_partition - of_target) * predicted
    # Smoothing moves a share of the target score from the label to the mean of all.
    loss = cross_entropy + label_smoothing * (of_target - mean_score) * predicted
    loss = loss + z_loss * log_partition.square() * predicted
    # d logsumexp = softmax, and the z-loss adds 2 z logsumexp of it; the label's own logit is subtracted.
    factor = predicted * (1.0 + 2.0 * z_loss * log_partition)
    grad = weights.mul_(factor[:, None] / total).scatter_add_(1, target, (label_smoothing - 1.0) * predicted[:, None])
    if label_smoothing:
        grad[:, :vocab_size] -= (label_smoothing / vocab_size) * predicted[:, None]
    if slope is not None:
        grad = grad.mul_(slope)
    return loss.sum(), cross_entropy.sum(), grad.to(logits.dtype)


def loss_in_pieces(logits: Tensor, labels: Tensor, per_piece: ChunkLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a `ChunkLoss` by one that gets few rows at a time; the gradients overwrite the logits."""
    size = max(1, PIECE_LOGITS // logits.shape[1])
    sums = torch.zeros(2, dtype=torch.float32, device=logits.device)
    for own_logits, own_labels in zip(logits.split(size), labels.split(size), strict=True):
        loss, cross_entropy, grad = per_piece(own_logits, own_labels)
        own_logits.copy_(grad)
        sums += torch.stack((loss, cross_entropy))
    return sums[0], sums[1], logits
