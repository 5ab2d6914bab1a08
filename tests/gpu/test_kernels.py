"""What the model computes on a GPU: which attention kernels it reaches, the compiled loss, and batches on their way."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigtx.config.schema import DataConfig, ModelConfig, SourceConfig
from bigtx.data.stream.loader import Division, TrainLoader
from bigtx.model.attention import Attention, Mask
from bigtx.model.compiled import compile_loss
from bigtx.model.embed import rotation
from bigtx.model.layers import dropout_mask, fold
from bigtx.model.loss import CHUNK_LOGITS, Head
from bigtx.model.transformer import Transformer

pytestmark = pytest.mark.gpu

LENGTH = 512


def attend(kernel: SDPBackend | None, mask: str, num_kv_heads: int, head_width: int) -> tuple[Tensor, Tensor]:
    """An attention's output and its input's gradient in bf16, computed by this kernel or not at all."""
    config = ModelConfig(
        vocab_size=256, hidden_size=8 * head_width, num_layers=1, num_heads=8, num_kv_heads=num_kv_heads
    )
    torch.manual_seed(1)
    attention = Attention(config)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=1 / math.sqrt(config.hidden_size))
    attention.to("cuda", torch.bfloat16)
    x = torch.randn(2, LENGTH, config.hidden_size).to("cuda", torch.bfloat16).requires_grad_()
    angles = rotation(config, torch.arange(LENGTH, device="cuda")[None])
    with sdpa_kernel([kernel]) if kernel else contextlib.nullcontext():
        result = attention(x, Mask(True, make_mask(mask)), angles)
        result.backward(torch.ones_like(result) / result.numel() ** 0.5)
    assert x.grad is not None
    return result.detach().float(), x.grad.float()


def make_mask(kind: str) -> Tensor | None:
    """Nothing (causal), documents of 100 tokens, or those with a bias for each head."""
    if kind == "causal":
        return None
    columns = torch.arange(LENGTH, device="cuda")
    visible = (columns <= columns[:, None]) & (columns // 100 == columns[:, None] // 100)
    if kind == "documents":
        return visible[None, None]
    bias = torch.linspace(-1, 1, 8, device="cuda")[None, :, None, None] * (columns[:, None] - columns) / LENGTH
    return bias.masked_fill(~visible, float("-inf"))


@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("num_kv_heads", [8, 2])
@pytest.mark.parametrize(
    ("mask", "kernel"),
    [
        ("causal", SDPBackend.FLASH_ATTENTION),
        ("causal", SDPBackend.CUDNN_ATTENTION),
        ("documents", SDPBackend.CUDNN_ATTENTION),
        ("documents", SDPBackend.EFFICIENT_ATTENTION),
        ("bias", SDPBackend.EFFICIENT_ATTENTION),
        *((mask, kernel) for mask in ("causal", "documents", "bias") for kernel in (SDPBackend.CUDNN_ATTENTION, None)),
    ],
)
def test_attention_never_holds_all_scores(
    mask: str, kernel: SDPBackend | None, num_kv_heads: int, head_width: int
) -> None:
    """The kernel, or the one that torch prefers, takes what the model hands it (torch refuses otherwise), and agrees
    with plain arithmetic.
    """
    computed = attend(kernel, mask, num_kv_heads, head_width)
    expected = attend(SDPBackend.MATH, mask, num_kv_heads, head_width)
    for ours, plain in zip(computed, expected, strict=True):
        assert ours.isfinite().all()
        assert (ours - plain).norm() <= 0.02 * plain.norm()  # bf16 rounds to 2^-9 of a value, a few times over.


def test_a_gpu_drops_what_a_cpu_drops() -> None:
    seeds = fold(torch.arange(3), 7)
    for shape in ((3, 100, 70), (3, 4, 50, 64)):
        expected = dropout_mask(shape, 0.1, seeds, torch.bfloat16)
        for make in (dropout_mask, torch.compile(dropout_mask)):
            assert torch.equal(make(shape, 0.1, seeds.cuda(), torch.bfloat16).cpu(), expected)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("shape", ["decoder", "encoder", "encoder_decoder"])
def test_packed_rows_are_their_documents_alone(shape: str, window: int | None) -> None:
    """Through FlexAttention, with gradients; alone, documents go through plain attention (and a window through it)."""
    config = ModelConfig(
        shape=shape,  # type: ignore[arg-type]
        vocab_size=256,
        hidden_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        attention_window=window,
    )
    with torch.device("cuda"):
        model = Transformer(config)
    model.init_weights(1)
    model.bfloat16()
    lengths = [100, 28, 300, 84]
    tokens = torch.randint(256, (1, sum(lengths)), generator=torch.Generator().manual_seed(1)).cuda()
    segments = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])[None].cuda()
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    inputs = {"positions": positions, "segment_ids": segments}
    if shape == "encoder_decoder":
        inputs |= {"target_tokens": tokens, "target_positions": positions, "target_segment_ids": segments}
    packed = model(tokens, labels=tokens, **inputs).loss_sum
    packed.backward()
    together = [parameter.grad.float().clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    alone = torch.zeros((), device="cuda")
    for text in tokens.split(lengths, dim=1):
        loss = model(text, labels=text, target_tokens=text if shape == "encoder_decoder" else None).loss_sum
        loss.backward()
        alone += loss.detach()
    assert abs(packed.item() - alone.item()) <= 2e-3 * alone.item()
    apart = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
    for ours, plain in zip(together, apart, strict=True):
        assert (ours - plain).norm() <= 0.05 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtx.model.loss.MIN_CHUNK_TOKENS", 1)
    monkeypatch.setitem(CHUNK_LOGITS, "cuda", 2**16)  # Several chunks, the last one shorter.
    results: list[list[Tensor]] = []
    for compiled in (False, True):
        torch.manual_seed(1)
        head = Head(ModelConfig(vocab_size=1000, hidden_size=64, num_heads=4))
        torch.nn.init.normal_(head.weight, std=0.1)
        head.to("cuda", dtype)
        hidden = torch.randn(3, 50, 64, device="cuda", dtype=dtype, requires_grad=True)
        labels = torch.randint(0, 1000, (3, 50), device="cuda")
        labels[0, :20] = -100
        if compiled:
            compile_loss(head)
        result: Any = head(hidden, labels, 1e-3)
        result.loss_sum.backward()
        assert hidden.grad is not None and head.weight.grad is not None
        results.append([result.loss_sum.detach(), hidden.grad.float(), head.weight.grad.float()])
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for plain, ours in zip(*results, strict=True):
        assert (plain - ours).norm() <= tolerance * plain.norm()


def test_batches_come_pinned_and_arrive_whole(corpus: Path) -> None:
    loader = TrainLoader(
        DataConfig(sources={"a": SourceConfig(path=str(corpus))}, document_mask=True),
        Division(global_batch_size=8, micro_batch_size=4),
        sequence_length=64,
        seed=1,
        start_sequence=0,
        pad_id=0,
    )
    try:
        for _ in range(20):
            for batch in next(loader):
                moved = batch.to(torch.device("cuda"))
                for name, tensor in batch.inputs().items():
                    assert tensor.is_pinned(), name
                    assert torch.equal(getattr(moved, name).cpu(), tensor), name
    finally:
        loader.close()
