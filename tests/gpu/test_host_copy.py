"""Copies of weights from a GPU into host memory, next to the computation that changes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bigtx.engine.host_copy import HostCopy
from bigtx.engine.optimizers import Optimizer

pytestmark = pytest.mark.gpu


def test_weights_change_only_after_they_were_copied() -> None:
    pieces = [torch.full((number,), float(number), device="cuda") for number in (5_000_000, 3, 20_000_000)]
    pieces.append(torch.arange(7.0))  # An offloaded state.
    optimizer: Any = SimpleNamespace(copied=None)
    copy = HostCopy()
    places = set()
    for addition in (0.0, 1.0, 2.0):
        content = copy.take(pieces, optimizer)
        Optimizer.wait_for_copy(optimizer)
        for piece in pieces:
            piece.add_(1.0)
        (buffer,) = content
        assert optimizer.copied is None
        expected = [torch.full((number,), number + addition) for number in (5_000_000, 3, 20_000_000)]
        assert torch.equal(buffer, torch.cat([*expected, torch.arange(7.0) + addition]))
        places.add(cast(torch.Tensor, buffer).data_ptr())
    assert len(places) == 1
