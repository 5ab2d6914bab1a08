"""Prepared corpora made of token ids, without text or a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bigtx.data.corpus.manifest import Manifest, Shard
from bigtx.data.corpus.shards import ShardWriter, blocks_of_a_shard, token_dtype

END_ID = 3


def write_split(
    folder: Path,
    parts: Iterable[list[np.ndarray]],
    *,
    split: str = "train",
    block_tokens: int,
    shard_size: int,
    vocab_size: int = 512,
    fingerprint: str = "f" * 64,
) -> Manifest:
    """Write a split as `bigtx data prepare` does, from documents that arrive in several parts."""
    folder.mkdir(parents=True)
    dtype = token_dtype(vocab_size)
    shards: list[Shard] = []
    rows: list[np.ndarray] = []
    num_tokens = num_documents = 0
    writer = ShardWriter(
        folder,
        dtype=dtype,
        block_tokens=block_tokens,
        shard_blocks=blocks_of_a_shard(shard_size, block_tokens, dtype),
        done=lambda _, shard, blocks: (shards.append(shard), rows.append(blocks)),
    )
    with writer:
        for documents in parts:
            lengths = np.array([len(document) for document in documents])
            writer.add(np.concatenate(documents), np.cumsum(lengths) - lengths)
            num_tokens += int(lengths.sum())
            num_documents += len(documents)
        writer.finish()
    manifest = Manifest(
        folder=folder,
        split=split,
        dtype=dtype,
        vocab_size=vocab_size,
        end_id=END_ID,
        tokenizer_fingerprint=fingerprint,
        block_tokens=block_tokens,
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_bytes=4 * num_tokens,
        shards=tuple(shards),
        blocks=np.concatenate(rows),
        recipe={"seed": 1},
    )
    manifest.save()
    return manifest
