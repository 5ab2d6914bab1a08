"""Synthetic corpora for the tests of reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import END_ID, write_split

MakeCorpus = Callable[..., list[np.ndarray]]


@pytest.fixture
def make_corpus() -> MakeCorpus:
    """Write a corpus of random documents; gives the documents of its training split."""

    def make(
        folder: Path,
        *,
        num_documents: int = 60,
        longest: int = 90,
        block_tokens: int = 256,
        shard_size: int = 4096,
        vocab_size: int = 1000,
        seed: int = 0,
        fingerprint: str = "f" * 64,
    ) -> list[np.ndarray]:
        random = np.random.default_rng(seed)

        def document() -> np.ndarray:
            return np.append(random.integers(4, vocab_size, random.integers(1, longest)), END_ID)

        documents = [document() for _ in range(num_documents)]
        settings = {
            "block_tokens": block_tokens,
            "shard_size": shard_size,
            "vocab_size": vocab_size,
            "fingerprint": fingerprint,
        }
        # In several parts, so that documents and blocks cross them.
        parts = [documents[begin : begin + 7] for begin in range(0, len(documents), 7)]
        write_split(folder / "train", parts, split="train", **settings)
        held_out = [document() for _ in range(max(1, num_documents // 10))]
        write_split(folder / "validation", [held_out], split="validation", **settings)
        return documents

    return make
