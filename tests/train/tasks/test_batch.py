"""The lengths of batches, and their padding."""

from __future__ import annotations

import pytest
import torch

from bigtx.finetuning.tasks.batch import padded, padded_length


@pytest.mark.parametrize(
    ("longest", "most", "on_cpu", "on_gpu"),
    [(1, 512, 16, 16), (33, 512, 48, 48), (64, 512, 64, 64), (65, 512, 80, 128), (98, 100, 100, 100), (0, 9, 0, 0)],
)
def test_lengths_of_batches_are_few(
    longest: int, most: int, on_cpu: int, on_gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has_gpu, length in ((False, on_cpu), (True, on_gpu)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert padded_length(longest, most) == length


def test_rows_are_padded_on_the_right() -> None:
    assert padded([[1, 2], [3]], 9).tolist() == [[1, 2], [3, 9]]
    assert padded([[1, 2], [3]], 9, length=3).tolist() == [[1, 2, 9], [3, 9, 9]]
