"""Dropout: how much goes, what the rest is multiplied with, and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from bigtx.model.dropout import dropout, dropout_mask


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_share_is_dropped_and_the_mean_stays(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    mask = dropout_mask((3, 1001, 333), rate, torch.empty(1, dtype=dtype))
    assert mask.shape == (3, 1001, 333) and mask.dtype == dtype
    spread = math.sqrt(rate * (1 - rate) / mask.numel())
    assert abs((mask == 0).double().mean() - rate) < 5 * spread + 1 / 2**16
    assert set(mask.unique().tolist()) == {0.0, mask.max().item()}
    torch.testing.assert_close(mask.double().max().item(), 1 / (1 - rate), rtol=4e-3, atol=0)


def test_neighbours_are_independent() -> None:
    torch.manual_seed(1)
    gone = (dropout_mask((1000, 1000), 0.5, torch.empty(1)) == 0).flatten().double()
    for distance in (1, 2, 3, 4, 7, 8):
        both = (gone[distance:] * gone[:-distance]).mean().item()
        assert abs(both - 0.25) < 5 * math.sqrt(3 / 16 / len(gone)), distance


def test_the_gradient_goes_where_the_value_went_and_a_seed_repeats_it() -> None:
    x = torch.ones(5, 7, 11, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(x, 0.4)
    first.sum().backward()
    assert torch.equal(first, x.grad)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.4))
    assert not torch.equal(first, dropout(x, 0.4))


def test_nothing_is_dropped_outside_of_training() -> None:
    x = torch.ones(9)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
