"""The writer of shards (for the format see manifest.py)."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from bigtx.data.corpus.manifest import BLOCK_DTYPE, DOCS_DTYPE, MEMBER_HEADER_BYTES, TAR_UNIT, Shard, padded_size


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the narrowest dtype on disk that holds every id: `<u2` up to 65,536 ids, else `<u4`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def member_bytes(name: str, array: np.ndarray) -> bytes:
    """Return a tar member holding one 1-D npy array: the same bytes for the same array, on every machine."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    payload = array.tobytes()
    info = tarfile.TarInfo(name)
    info.size = header.tell() + len(payload)
    content = info.tobuf(tarfile.USTAR_FORMAT) + header.getvalue()
    assert len(content) == MEMBER_HEADER_BYTES, "the block table assumes headers of one length"
    return content + payload + bytes(padded_size(info.size) - info.size)


def blocks_of_a_shard(shard_size: int, block_tokens: int, dtype: np.dtype[Any]) -> int:
    """Return how many blocks a shard of at least `shard_size` bytes has, without the documents' starts."""
    block = 2 * TAR_UNIT + padded_size(MEMBER_HEADER_BYTES - TAR_UNIT + block_tokens * dtype.itemsize) + TAR_UNIT
    return max(1, -(-shard_size // block))


class ShardWriter:
    """A writer that cuts a stream of tokenized documents into blocks, and blocks into shards.

    A shard gets its name when it is complete, so no partial file has the name of a shard.

    Args:
        folder: the folder of the split.
        dtype: the dtype of the tokens on disk.
        block_tokens: tokens of a block; a document may be cut over blocks.
        shard_blocks: blocks of a shard.
        first_shard: number of the first shard of the stream.
        done: called with each shard when it is complete: its number, its entry of the manifest, and [blocks]
            BLOCK_DTYPE records.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: np.dtype[Any],
        block_tokens: int,
        shard_blocks: int,
        first_shard: int = 0,
        done: Callable[[int, Shard, np.ndarray], None],
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._block_tokens = block_tokens
        self._shard_blocks = shard_blocks
        self._shard = first_shard
        self._done = done
        self._tokens = np.empty(0, dtype)
        self._starts = np.empty(0, np.int64)
        self._rows: list[tuple[int, ...]] = []
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Append tokens.

        Args:
            tokens: [n] ids; those before the first start continue the last document.
            starts: [documents] where documents begin in them, ascending.
        """
        self._starts = np.concatenate([self._starts, starts + len(self._tokens)])
        self._tokens = np.concatenate([self._tokens, tokens.astype(self._dtype, copy=False)])
        whole = len(self._tokens) // self._block_tokens * self._block_tokens
        for begin in range(0, whole, self._block_tokens):
            self._write_block(begin, begin + self._block_tokens)
        self._tokens = self._tokens[whole:].copy()
        self._starts = self._starts[np.searchsorted(self._starts, whole) :] - whole

    def finish(self) -> None:
        """Write the remaining tokens as a last, shorter block, and end its shard."""
        if len(self._tokens):
            self._write_block(0, len(self._tokens))
        self._end_shard()

    def _write_block(self, begin: int, end: int) -> None:
        first, last = np.searchsorted(self._starts, (begin, end))
        starts = (self._starts[first:last] - begin).astype(DOCS_DTYPE)
        key = f"{self._shard * self._shard_blocks + len(self._rows):06d}"
        tokens_member = member_bytes(f"{key}.tokens.npy", self._tokens[begin:end])
        content = tokens_member + member_bytes(f"{key}.docs.npy", starts)
        file = self._open_shard()
        offset = file.tell() + MEMBER_HEADER_BYTES
        file.write(content)
        self._hash.update(content)
        checksum = xxhash.xxh3_64_intdigest(content)
        self._rows.append((self._shard, end - begin, len(starts), len(tokens_member), offset, checksum))
        if len(self._rows) == self._shard_blocks:
            self._end_shard()

    def _open_shard(self) -> IO[bytes]:
        if self._file is None:
            self._file = open(self._partial_path(), "wb")  # noqa: SIM115 - closed at its end
            self._hash = hashlib.sha256()
        return self._file

    def _end_shard(self) -> None:
        if self._file is None:
            return
        end_of_archive = bytes(2 * TAR_UNIT)
        self._file.write(end_of_archive)
        self._hash.update(end_of_archive)
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        name = f"{self._shard:06d}.tar"
        self._partial_path().rename(self._folder / name)
        self._done(self._shard, Shard(name, size, self._hash.hexdigest()), np.array(self._rows, BLOCK_DTYPE))
        self._shard += 1
        self._rows = []

    def _partial_path(self) -> Path:
        return self._folder / f".{self._shard:06d}.tar"
