"""The chunked loss against cross-entropy in float64, its gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bigtx.config.schema import ModelConfig
from bigtx.model import loss as loss_module
from bigtx.model.compiled import compile_loss
from bigtx.model.logits import soft_capped
from bigtx.model.loss import ClassifierHead, Head

VOCAB_SIZE, HIDDEN, ROWS, LENGTH = 150, 24, 3, 13


def inputs(dtype: torch.dtype = torch.float32, **changes: object) -> tuple[Head, Tensor, Tensor]:
    """A head, hidden states and labels of which some are ignored."""
    head = Head(ModelConfig(vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB_SIZE, (ROWS, LENGTH), generator=generator)
    labels[0, :5] = labels[2, -1] = -100
    return head.to(dtype), hidden, labels


def plain(
    head: Head, hidden: Tensor, labels: Tensor, z_loss: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss and cross-entropy from all logits at once."""
    logits = soft_capped(hidden @ head.weight[:VOCAB_SIZE].t(), head.soft_cap).flatten(0, 1)
    entropy, smoothed = (
        F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing)
        for smoothing in (0.0, label_smoothing)
    )
    squares = torch.logsumexp(logits, dim=-1).square()[labels.flatten() != -100].sum()
    return smoothed + z_loss * squares, entropy


def test_a_frozen_bias() -> None:
    head, hidden, labels = inputs(head_bias=True)
    with torch.no_grad():
        head.bias.normal_(generator=torch.Generator().manual_seed(2))
    head.bias.requires_grad_(False)
    head(hidden, labels).loss_sum.backward()
    assert head.bias.grad is None and head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("form", "has_transform"), [("transform", True), ("pooler", True), ("score", True), (None, False)]
)
def test_a_head_of_classes_in_each_form(form: str | None, has_transform: bool) -> None:
    head = ClassifierHead(
        ModelConfig(hidden_size=4, num_classes=3, class_head=form, head_transform=has_transform, norm="layer")  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(2, 4, generator=generator)
    weights = dict(head.named_parameters())
    if form == "transform":
        expected = F.layer_norm(F.gelu(x @ weights["transform.weight"].t()), (4,), weights["norm.weight"])
    elif form == "pooler":
        expected = torch.tanh(x @ weights["pooler.weight"].t() + weights["pooler.bias"])
    else:
        expected = x
    expected = expected @ weights["classes.weight"].t() + weights.get("classes.bias", torch.zeros(3))
    assert ("classes.bias" in weights) == (form != "score")
    torch.testing.assert_close(head.eval()(x), expected)


@pytest.mark.parametrize("chunk", [1, 7 * 256, 2**20])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_equals_float64(
    soft_cap: float | None, label_smoothing: float, z_loss: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", chunk)
    monkeypatch.setattr(loss_module, "PIECE_LOGITS", 3 * 256)  # A chunk of 7 rows is 3, 3 and 1.
    monkeypatch.setattr(loss_module, "MIN_CHUNK_TOKENS", 1)
    head, hidden, labels = inputs(logit_soft_cap=soft_cap)
    result = head(hidden, labels, z_loss, label_smoothing)
    (result.loss_sum * 0.3).backward()
    found = (hidden.grad.double(), head.weight.grad.double())

    exact_head, exact_hidden = inputs(torch.float64, logit_soft_cap=soft_cap)[:2]
    with torch.no_grad():
        exact_head.weight.copy_(head.weight)
        exact_hidden.copy_(hidden)
    expected, entropy = plain(exact_head, exact_hidden, labels, z_loss, label_smoothing)
    (expected * 0.3).backward()

    assert result.loss_sum.dtype == result.reported_sum.dtype == torch.float32
    assert result.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert result.reported_sum.item() == pytest.approx(entropy.item(), rel=1e-5)
    torch.testing.assert_close(found, (exact_hidden.grad, exact_head.weight.grad), rtol=1e-4, atol=1e-5)
    assert not head.weight.grad[VOCAB_SIZE:].any(), "padding of the vocabulary is no part of the partition"


def test_bias_scale_and_transform() -> None:
    """Of BERT's and T5's heads: logits and loss agree, and so do gradients with autograd's own."""
    settings = {"head_bias": True, "head_transform": True, "mlp_bias": True, "logit_scale": 0.5, "norm": "layer"}
    grads = []
    for chunked in (True, False):
        head, hidden, labels = inputs(**settings)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_(generator=generator)
        if chunked:
            loss = head(hidden, labels).loss_sum
        else:
            loss = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        grads.append([loss.detach(), hidden.grad, *(parameter.grad for parameter in head.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_bf16_loses_no_more_than_its_logits_do() -> None:
    head, hidden, labels = inputs(torch.bfloat16)
    result = head(hidden, labels)
    result.loss_sum.backward()
    exact_head, exact_hidden = inputs()[:2]
    expected, _ = plain(exact_head, exact_hidden, labels, 0.0)
    expected.backward()
    assert result.loss_sum.item() == pytest.approx(expected.item(), rel=5e-3)
    for found, exact in ((hidden.grad, exact_hidden.grad), (head.weight.grad, exact_head.weight.grad)):
        assert (found.float() - exact).norm() < 0.02 * exact.norm()


def test_a_frozen_head_and_no_gradients() -> None:
    head, hidden, labels = inputs()
    with torch.no_grad():
        expected = head(hidden, labels).loss_sum
    head.weight.requires_grad_(False)
    result = head(hidden, labels)
    result.loss_sum.backward()
    assert result.loss_sum.item() == expected.item()
    assert head.weight.grad is None and hidden.grad is not None


def test_without_gradients_only_the_logits_are_made() -> None:
    head, hidden, labels = inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(hidden, labels)
    assert counter.get_total_flops() == 2 * ROWS * LENGTH * HIDDEN * head.weight.shape[0]


def test_nothing_to_predict() -> None:
    head, hidden, labels = inputs()
    result = head(hidden, torch.full_like(labels, -100), 1e-2)
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0.0
    assert not hidden.grad.any() and not head.weight.grad.any()


def test_a_non_finite_input_is_seen() -> None:
    head, hidden, labels = inputs()
    with torch.no_grad():
        hidden[1, 2, 3] = float("inf")
    assert not head(hidden, labels).loss_sum.isfinite()


def test_large_logits_are_no_trouble() -> None:
    head, hidden, labels = inputs()
    result = head(hidden * 1e4, labels)
    result.loss_sum.backward()
    assert result.loss_sum.isfinite() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [7 * 256, 2**20])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_scores_of_tokens_equal_float64(soft_cap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", chunk)
    monkeypatch.setattr(loss_module, "MIN_CHUNK_TOKENS", 1)
    head, hidden, labels = inputs(logit_soft_cap=soft_cap, head_bias=True)
    with torch.no_grad():
        head.bias.normal_(generator=torch.Generator().manual_seed(2))
    weights = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(3))
    result = head(hidden, labels, score_tokens=True)
    # No sum over tokens: each answer's own sum is bent before they are added.
    (result.log_probs * weights).sum(dim=1).sigmoid().sum().backward()

    exact_head, exact_hidden = inputs(torch.float64, logit_soft_cap=soft_cap, head_bias=True)[:2]
    with torch.no_grad():
        exact_head.load_state_dict(head.state_dict())
        exact_hidden.copy_(hidden)
    scores = exact_hidden @ exact_head.weight[:VOCAB_SIZE].t() + exact_head.bias[:VOCAB_SIZE]
    logits = soft_capped(scores, exact_head.soft_cap)
    expected = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    (expected.view(ROWS, LENGTH) * weights).sum(dim=1).sigmoid().sum().backward()

    torch.testing.assert_close(result.log_probs.double(), expected.view(ROWS, LENGTH), rtol=1e-5, atol=1e-5)
    assert (result.is_likeliest == (logits.argmax(dim=-1) == labels)).all()
    for found, exact in zip((hidden, *head.parameters()), (exact_hidden, *exact_head.parameters()), strict=True):
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_scores_of_tokens_of_a_frozen_head() -> None:
    head, hidden, labels = inputs()
    head.weight.requires_grad_(False)
    head(hidden, labels, score_tokens=True).log_probs.sum().backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0
    with torch.no_grad():
        total = head(hidden, labels, score_tokens=True).log_probs.sum()
        torch.testing.assert_close(-total, head(hidden, labels).loss_sum)


@pytest.mark.slow
def test_compiled_loss() -> None:
    results = []
    for compiled in (False, True):
        head, hidden, labels = inputs(logit_soft_cap=20.0)
        if compiled:
            compile_loss(head)
        result = head(hidden, labels, 1e-3, 0.1)
        result.loss_sum.backward()
        results.append((result.loss_sum, result.reported_sum, hidden.grad, head.weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "rows"), [(32_768, 50_304), (8_192, 128_256), (640, 50_304), (39, 128), (32_896, 50_304)]
)
def test_chunks_on_a_gpu_fill_tiles_and_have_one_size(num_tokens: int, rows: int) -> None:
    hidden, weight = torch.empty(num_tokens, 0, device="meta"), torch.empty(rows, 0, device="meta")
    found = list(loss_module._chunks(hidden, weight))
    assert [part.start for part in found[1:]] == [part.stop for part in found[:-1]]
    assert found[0].start == 0 and found[-1].start < num_tokens <= found[-1].stop
    sizes = {part.stop - part.start for part in found}
    assert len(sizes) == 1 and not sizes.pop() % 128
    assert found[0].stop * rows <= loss_module.CHUNK_LOGITS["cuda"]
    if num_tokens in (32_768, 8_192):
        assert found[-1].stop == num_tokens, "the last chunk has the same size"


def test_chunks_on_a_cpu_are_as_large_as_they_may_be() -> None:
    hidden, weight = torch.empty(4096, 1), torch.empty(50_304, 1)
    assert len(list(loss_module._chunks(hidden, weight))) == -(-4096 // (2**23 // 50_304))


def test_this_torch_adds_products_in_fp32() -> None:
    """The overload that the weight's gradient needs on a GPU."""
    assert "dtype_out" in torch.ops.aten.addmm.overloads()
