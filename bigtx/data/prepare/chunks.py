"""Tokenized documents on disk between tokenizing and writing: an external sort by a shuffling key.

    tokenizing process ──▶ chunk: documents sorted by key ──┐
    tokenizing process ──▶ chunk                            ├──▶ ranges of keys, any of them at any time ──▶ shards
    ...                                                     ┘

A document's key is a hash, so the sorted order is a shuffle of the whole corpus. It depends only on the
documents: not on the division of the input into chunks or the number of processes. If copies are to be removed, the
key is a bijection of the text's hash, so that copies are next to each other in one range.
"""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

RECORD_DTYPE = np.dtype(
    [
        ("key", "<u8"),  # position in the shuffled order
        ("text_hash", "<u8"),  # low half of the text's xxh3_128: decides the split
        ("text_hash_high", "<u8"),  # the other half: with it, two texts of one hash are one text
        ("start", "<u8"),  # first of its tokens in the chunk
        ("tokens", "<u4"),  # length in tokens
        ("bytes", "<u4"),  # length of the text in UTF-8
        ("number", "<u4"),  # number of the document in its unit, in reading order
        ("group", "<u4"),  # index into the unit's list of (source, language)
    ]
)


_SPARSE = 4
"""Documents that are less than this share of the range from the first to the last are read one by one."""


_BUFFER_BYTES = 1 << 18


class Documents(NamedTuple):
    """Documents in some order: RECORD_DTYPE records, and all their tokens one after the other."""

    records: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Chunk:
    """A sorted run of one unit's documents: records in `<path>.index`, their tokens in that order in `<path>.tokens`.

    Attributes:
        path: the path without the suffix.
        num_documents, num_tokens: its counts.
        checksum: xxh3_64 of the tokens' bytes, then the records'.
    """

    path: Path
    num_documents: int
    num_tokens: int
    checksum: int

    @staticmethod
    def write(path: Path, parts: list[Documents]) -> Chunk:
        """Sort documents by key (equal keys keep their order) and write them.

        Args:
            parts: documents whose tokens are in the order of their records; `start` is set here.
        """
        texts = [text for records, tokens in parts for text in _split(tokens, records["tokens"])]
        records = np.concatenate([part.records for part in parts])
        order = np.argsort(records["key"], kind="stable")
        records = records[order]
        ends = np.cumsum(records["tokens"], dtype=np.uint64)
        records["start"] = ends - records["tokens"]
        digest = xxhash.xxh3_64()
        chunk = Chunk(path, len(records), int(ends[-1]), 0)
        with open(chunk._file("tokens"), "wb", buffering=_BUFFER_BYTES) as file:
            for place in order.tolist():
                digest.update(texts[place].data)
                file.write(texts[place].data)
        digest.update(records.view(np.uint8).data)
        records.tofile(chunk._file("index"))
        return dataclasses.replace(chunk, checksum=digest.intdigest())

    def is_whole(self, dtype: np.dtype[Any]) -> bool:
        """Return whether both files have the written content: they were not forced to the disk, so a crash may have
        lost it.
        """
        try:
            tokens, records = np.fromfile(self._file("tokens"), dtype), np.fromfile(self._file("index"), RECORD_DTYPE)
        except OSError:
            return False
        return _checksum(tokens, records) == self.checksum

    def records(self, first_key: int, last_key: int) -> np.ndarray:
        """Return the records with keys from the first to the last, both included."""
        whole = np.memmap(self._file("index"), RECORD_DTYPE, "r")
        places = range(len(whole))
        begin = bisect.bisect_left(places, first_key, key=lambda place: int(whole[place]["key"]))
        end = bisect.bisect_right(places, last_key, begin, key=lambda place: int(whole[place]["key"]))
        return np.array(whole[begin:end])

    def tokens(self, records: np.ndarray, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of some of the records, in any order.

        Returns:
            tokens: all tokens of the records, and perhaps some between them.
            starts: uint64 [records], where the tokens of each record start.
        """
        first = int(records["start"].min())
        end = int((records["start"] + records["tokens"]).max())
        if int(records["tokens"].sum()) * _SPARSE >= end - first:
            whole = np.fromfile(self._file("tokens"), dtype, end - first, offset=first * dtype.itemsize)
            return whole, records["start"] - np.uint64(first)
        mapped = np.memmap(self._file("tokens"), dtype, "r")
        few = take(records, mapped, np.arange(len(records)))
        return few.tokens, np.cumsum(records["tokens"], dtype=np.uint64) - records["tokens"]

    def _file(self, kind: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{kind}")


def take(records: np.ndarray, tokens: np.ndarray, order: np.ndarray) -> Documents:
    """Return the documents that `order` names, in that order.

    Args:
        records: [documents] whose `start` counts from the first of `tokens`.
        order: int64 [n] indices into the records.
    """
    chosen = records[order]
    begins = chosen["start"].astype(np.int64)
    spans = zip(begins.tolist(), (begins + chosen["tokens"]).tolist(), strict=True)
    parts = [tokens[begin:end] for begin, end in spans]
    return Documents(chosen, np.concatenate(parts) if parts else tokens[:0])


def key_range(number: int, num_ranges: int) -> tuple[int, int]:
    """Return the first and the last key of one of `num_ranges` equal ranges of all keys."""
    return (number << 64) // num_ranges, ((number + 1) << 64) // num_ranges - 1


def _split(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Return the tokens of each of several documents, one after the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return [tokens[begin:end] for begin, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]


def _checksum(tokens: np.ndarray, records: np.ndarray) -> int:
    digest = xxhash.xxh3_64(tokens.data)
    digest.update(records.view(np.uint8).data)
    return digest.intdigest()
