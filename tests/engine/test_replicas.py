"""The checksum of weights, and who is named where ranks hold different ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bigtx.engine.replicas import CHUNK, ROW, checksum, checksums, describe

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def random_tensor(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain(tensor: Tensor) -> int:
    """The sum of the bits, each times an odd number of its place in a row, and the rows again, by Python's integers."""
    drawn = np.random.Generator(np.random.Philox(key=1)).integers(-(2**62), 2**62, ROW, dtype=np.int64)
    factors = [2 * int(number) + 1 for number in drawn]
    bits = tensor.view(INTEGERS[tensor.dtype]).tolist()
    rows = [sum(map(int.__mul__, bits[first : first + ROW], factors)) for first in range(0, len(bits), ROW)]
    total = sum(row * factor for row, factor in zip(rows, reversed(factors), strict=False)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("count", [1, 1000, ROW + 3])
@pytest.mark.parametrize("dtype", list(INTEGERS))
def test_it_is_a_sum_over_bits_and_places(count: int, dtype: torch.dtype) -> None:
    tensor = random_tensor(count, dtype)
    assert int(checksum(tensor)) == plain(tensor)


@pytest.mark.parametrize("dtype", list(INTEGERS))
def test_every_flipped_bit_changes_it(dtype: torch.dtype) -> None:
    tensor = random_tensor(ROW + 100, dtype)
    before, bits = int(checksum(tensor)), tensor.view(INTEGERS[dtype])
    for place in (0, 1, ROW - 1, ROW, ROW + 99):
        for bit in range(8 * tensor.element_size()):
            flipped = -(1 << bit) if bit == 8 * tensor.element_size() - 1 else 1 << bit
            bits[place] ^= flipped
            assert int(checksum(tensor)) != before, (place, bit)
            bits[place] ^= flipped
    assert int(checksum(tensor)) == before


def test_the_order_of_elements_rows_and_chunks_counts() -> None:
    tensor = random_tensor(CHUNK + 2 * ROW)
    for first, second, length in ((0, 1, 1), (0, 64, 64), (0, ROW, ROW), (ROW, CHUNK, ROW), (5, CHUNK + ROW + 5, 9)):
        swapped = tensor.clone()
        swapped[first : first + length] = tensor[second : second + length]
        swapped[second : second + length] = tensor[first : first + length]
        assert int(checksum(swapped)) != int(checksum(tensor)), (first, second)


def test_the_sign_of_zero_and_any_nan_are_bits_too() -> None:
    zeros = torch.zeros(10)
    assert int(checksum(zeros)) != int(checksum(-zeros))
    assert int(checksum(zeros / 0)) == int(checksum(zeros / 0))


def test_a_matrix_is_read_row_by_row_and_several_are_kept_apart() -> None:
    matrix = random_tensor(600).view(20, 30)
    assert int(checksum(matrix)) == int(checksum(matrix.flatten())) != int(checksum(matrix.t()))
    assert checksums({"a": matrix, "b": matrix + 1}) == {
        "a": plain(matrix.flatten()),
        "b": plain((matrix + 1).flatten()),
    }
    assert checksums({}) == {}


def test_the_wrong_ranks_are_named_with_their_hosts() -> None:
    hosts = ["east", "east", "west"]
    good, bad = {"a": 1, "b": 2}, {"a": 1, "b": 3}
    assert (
        describe(hosts, [good, good, bad], {"a": 1, "b": 2})
        == "rank 2 (west): the copy of b differs from the right one"
    )
    both = describe(hosts[1:], [good, bad], {"a": 1})
    assert both == (
        "the ranks have different copies of b, and it is not known which one is right: rank 0 (east), rank 1 (west)"
    )
    many = [{name: rank for name in "abcde"} for rank in (0, 0, 1)]
    assert describe(hosts, many, many[0]) == (
        "rank 2 (west): the copy of a, b, c and 2 others differs from the right one"
    )
