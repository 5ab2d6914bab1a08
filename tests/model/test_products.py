"""Attention as plain products, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtx.model.attention import attend, products_are_faster
from bigtx.model.layers import dropout_mask


def sides(*, dtype: torch.dtype = torch.float64, length: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, length, 8, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["nothing", "a mask", "a bias"])
def test_values_and_gradients_are_those_of_torch(causal: bool, kind: str) -> None:
    queries, keys, values = sides()
    scores: Tensor | None = None
    if kind == "a mask":
        scores = (torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(2)) > 0.3) | torch.eye(7).bool()
    elif kind == "a bias":
        scores = torch.linspace(-2, 2, 147, dtype=torch.float64).view(1, 3, 7, 7).requires_grad_()
    ours = attend(queries, keys, values, scores, causal=causal, scale=0.3)
    torchs = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=scores, is_causal=causal and scores is None, scale=0.3
    )
    torch.testing.assert_close(ours, torchs)
    inputs = [queries, keys, values, *([scores] if scores is not None and scores.requires_grad else [])]
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    found, expected = (torch.autograd.grad(result, inputs, upstream) for result in (ours, torchs))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_token_that_sees_nothing_gives_numbers(dtype: torch.dtype) -> None:
    queries, keys, values = (side.detach().sub(20).requires_grad_() for side in sides(dtype=dtype))
    keys = -keys  # Scores so low that a mask of the least number would take them out of the range of 16 bits.
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[0, 0, 3] = False
    result = attend(queries, keys, values, mask, causal=False, scale=0.3)
    result.sum().backward()
    assert result.isfinite().all() and queries.grad is not None and queries.grad.isfinite().all()


def test_compiled_it_is_the_same() -> None:
    queries, keys, values = sides(dtype=torch.bfloat16, length=16)
    compiled = torch.compile(attend, dynamic=False, backend="aot_eager")
    for causal in (False, True):
        plain = attend(queries, keys, values, None, causal=causal, scale=0.3)
        torch.testing.assert_close(compiled(queries, keys, values, None, causal=causal, scale=0.3), plain)


def test_only_a_cpu_in_bf16_that_records_has_use_for_it() -> None:
    queries, keys, _ = sides(dtype=torch.bfloat16)
    assert products_are_faster(queries, keys)
    assert not products_are_faster(queries.float(), keys.float())
    long = queries.new_zeros(1, 1, 1024, 8)
    assert not products_are_faster(long, long)
    with torch.no_grad():
        assert not products_are_faster(queries, keys)


def test_dropped_weights_take_no_part_and_the_others_make_up_for_them() -> None:
    queries, keys, values = sides()
    kept = dropout_mask((2, 3, 7, 7), 0.4, torch.tensor([2**40, -(2**50)]), queries.dtype)
    ours = attend(queries, keys, values, None, causal=False, scale=0.3, kept=kept)
    expected = ((queries * 0.3 @ keys.transpose(-2, -1)).softmax(-1) * kept) @ values
    torch.testing.assert_close(ours, expected)
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    gradients = [torch.autograd.grad(result, (queries, keys, values), upstream) for result in (ours, expected)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
