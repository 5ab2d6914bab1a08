"""A teacher's share in the fused loss, against plain torch in float64 with autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtx.config.schema import ModelConfig
from bigtx.model import loss as loss_module
from bigtx.model.logits import SoftTargets, divergence
from bigtx.model.loss import Head

VOCAB_SIZE, ROWS, LENGTH = 150, 3, 13


def head_of(size: int, seed: int, **changes: object) -> Head:
    head = Head(ModelConfig(vocab_size=VOCAB_SIZE, hidden_size=size, **changes))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return head


def states(size: int, seed: int) -> Tensor:
    return torch.randn(ROWS, LENGTH, size, generator=torch.Generator().manual_seed(seed))


def some_labels() -> Tensor:
    labels = torch.randint(VOCAB_SIZE, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    labels[0, :5] = labels[2, -1] = -100
    return labels


@pytest.mark.parametrize("chunk", [1, 4 * 7 * 256, 2**20])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("weight", "soft_cap"), [(0.3, None), (0.3, 3.0), (1.0, None)])
def test_equals_float64(
    weight: float, temperature: float, soft_cap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", chunk)
    monkeypatch.setattr(loss_module, "MIN_CHUNK_TOKENS", 1)
    student, teacher = head_of(24, 1, logit_soft_cap=soft_cap), head_of(40, 2, head_bias=True, logit_soft_cap=5.0)
    hidden, labels = states(24, 3).requires_grad_(), some_labels()
    with torch.no_grad():
        targets = SoftTargets(teacher.on_demand(states(40, 4)), weight, temperature)
    result = student(hidden, labels, 1e-2, 0.1, False, targets)
    (result.loss_sum * 0.3).backward()

    exact, exact_hidden = head_of(24, 1, logit_soft_cap=soft_cap).double(), hidden.detach().double().requires_grad_()
    logits = exact_hidden @ exact.weight[:VOCAB_SIZE].t()
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logits, flat = logits.flatten(0, 1), labels.flatten()
    with torch.no_grad():
        expected = F.softmax(teacher(states(40, 4)).double().flatten(0, 1) / temperature, dim=-1)
    log_student = F.log_softmax(logits / temperature, dim=-1)
    distance = (expected * (expected.log() - log_student)).sum(dim=-1)[flat != -100].sum() * temperature**2
    plain = F.cross_entropy(logits, flat, ignore_index=-100, reduction="sum", label_smoothing=0.1)
    plain = plain + 1e-2 * torch.logsumexp(logits, dim=-1).square()[flat != -100].sum()
    whole = (1 - weight) * plain + weight * distance
    (whole * 0.3).backward()

    assert result.loss_sum.item() == pytest.approx(whole.item(), rel=1e-5)
    entropy = F.cross_entropy(logits, flat, ignore_index=-100, reduction="sum")
    assert result.reported_sum.item() == pytest.approx(entropy.item(), rel=1e-5), "what is reported is the labels'"
    found = (hidden.grad.double(), student.weight.grad.double())
    torch.testing.assert_close(found, (exact_hidden.grad, exact.weight.grad), rtol=1e-4, atol=1e-5)
    assert not student.weight.grad[VOCAB_SIZE:].any(), "padding of the vocabulary has no part in it"
    assert teacher.weight.grad is None


def test_a_head_with_a_transform_and_its_own_scale_on_demand() -> None:
    head = head_of(24, 1, head_bias=True, head_transform=True, logit_scale=0.5, norm="layer")
    logits = head(states(24, 3)).flatten(0, 1)
    torch.testing.assert_close(head.on_demand(states(24, 3))[5:9], logits[5:9])


def test_a_student_that_agrees_learns_nothing_from_its_teacher() -> None:
    head, hidden = head_of(24, 1), states(24, 3).requires_grad_()
    with torch.no_grad():
        targets = SoftTargets(head.on_demand(states(24, 3)), 1.0, 2.0)
    result = head(hidden, some_labels(), 0.0, 0.0, False, targets)
    result.loss_sum.backward()
    assert result.loss_sum.item() == pytest.approx(0.0, abs=1e-4)
    assert hidden.grad.abs().max() < 1e-5


def test_the_divergence_of_classes() -> None:
    student, teacher = states(4, 1)[0], states(4, 2)[0]
    for temperature in (1.0, 3.0):
        expected = F.softmax(teacher.double() / temperature, dim=-1)
        known = (expected * (expected.log() - F.log_softmax(student.double() / temperature, dim=-1))).sum(dim=-1)
        found = divergence(student, teacher, temperature)
        torch.testing.assert_close(found.double(), known * temperature**2, rtol=1e-4, atol=1e-5)
    assert divergence(student, student, 2.0).abs().max() < 1e-5


def test_bf16_loses_no_more_than_its_logits_do() -> None:
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = head_of(24, 1).to(dtype), head_of(40, 2).to(dtype)
        hidden = states(24, 3).to(dtype).requires_grad_()
        with torch.no_grad():
            targets = SoftTargets(teacher.on_demand(states(40, 4).to(dtype)), 0.5, 2.0)
        student(hidden, some_labels(), 0.0, 0.0, False, targets).loss_sum.backward()
        grads.append((hidden.grad.float(), student.weight.grad.float()))
    for exact, found in zip(*grads, strict=True):
        assert (found - exact).norm() < 0.03 * exact.norm()
