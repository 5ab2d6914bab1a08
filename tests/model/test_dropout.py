"""Dropout: how much goes, what the rest is multiplied with, and what says which."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bigtx.model.layers import Dropout, dropout_mask, fold


def seeds(count: int, first: int = 0) -> Tensor:
    """Those of neighbouring rows."""
    return fold(torch.arange(first, first + count), 12345)


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_share_is_dropped_and_the_mean_stays(rate: float, dtype: torch.dtype) -> None:
    mask = dropout_mask((3, 1001, 333), rate, seeds(3), dtype)
    assert mask.shape == (3, 1001, 333) and mask.dtype == dtype
    spread = math.sqrt(rate * (1 - rate) / mask.numel())
    assert abs((mask == 0).double().mean() - rate) < 5 * spread + 1 / 2**16
    assert set(mask.unique().tolist()) == {0.0, mask.max().item()}
    torch.testing.assert_close(mask.double().max().item(), 1 / (1 - rate), rtol=4e-3, atol=0)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rows_lines_columns_and_places_are_independent(rate: float) -> None:
    def differences(place: str) -> Tensor:
        mask = Dropout(rate, place).mask((32, 128, 256), seeds(32), torch.float32)
        assert mask is not None
        return (mask == 0).double() - rate

    gone, variance = differences("here"), rate * (1 - rate)
    pairs = [(gone, differences("there")), (gone[1:], gone[:-1]), (gone[:, 1:], gone[:, :-1])]
    pairs += [(gone[..., distance:], gone[..., :-distance]) for distance in (1, 2, 3, 4, 7, 8, 64)]
    for first, second in pairs:
        assert abs((first * second).mean().item()) < 5 * variance / math.sqrt(first.numel())
    for sums in (gone.sum(2), gone.sum((0, 1)), gone.sum(1)):
        count = gone.numel() / sums.numel()
        assert abs(sums.square().mean().item() / (count * variance) - 1) < 6 * math.sqrt(2 / sums.numel())


@pytest.mark.parametrize("lengths", [(5, 30), (3, 9, 11)])
def test_an_element_depends_on_its_own_row_and_place_alone(lengths: tuple[int, ...]) -> None:
    """Not on the other rows, nor on how far they are padded: as lines of an activation, or as weights of attention."""
    whole = dropout_mask((6, *(length + 7 for length in lengths)), 0.5, seeds(6), torch.float32)
    part = dropout_mask((2, *lengths), 0.5, seeds(2, first=3), torch.float32)
    assert torch.equal(part, whole[(slice(3, 5), *map(slice, lengths))])


def test_compiled_it_is_the_same() -> None:
    compiled = torch.compile(dropout_mask, backend="aot_eager", dynamic=True)
    for shape in ((3, 5, 30), (2, 7, 8)):
        expected = dropout_mask(shape, 0.3, seeds(shape[0]), torch.bfloat16)
        assert torch.equal(compiled(shape, 0.3, seeds(shape[0]), torch.bfloat16), expected)


def test_the_gradient_goes_where_the_value_went() -> None:
    x = torch.ones(5, 7, 11, dtype=torch.float64, requires_grad=True)
    dropped = Dropout(0.4, "here")(x, seeds(5))
    dropped.sum().backward()
    assert torch.equal(dropped, x.grad) and 0 < (dropped == 0).sum() < dropped.numel()


def test_nothing_is_dropped_without_seeds_or_without_a_rate() -> None:
    x = torch.ones(2, 9)
    assert Dropout(0.5, "here")(x, None) is x
    assert Dropout(0.0, "here")(x, seeds(2)) is x
