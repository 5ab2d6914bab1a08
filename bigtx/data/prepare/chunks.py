"""Tokenized documents on disk between tokenizing and writing: an external sort by a shuffling key.

    tokenizing process ──▶ chunk: documents sorted by key ──┐
    tokenizing process ──▶ chunk                            ├──▶ ranges of keys, any of them at any time ──▶ shards
    ...                                                     ┘

A document's key is a hash, so the sorted order is a shuffle of the whole corpus. It depends only on the
documents: not on the division of the input into chunks or the number of processes. If copies are to be removed, the
key is a bijection of the text's hash, so that copies are next to each other in one range. `Chunks` are all chunks of a
corpus as ranges of keys, each of which any process can read at any time.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from bigtx.config.schema import PrepareConfig
from bigtx.utils.files import write_atomic

if TYPE_CHECKING:
    from bigtx.data.prepare.encode import UnitResult


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


CHUNKS_NAME = "chunk-rows.json"
MAX_RANGES = 1 << 16
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


def chunk_path(work: Path, number: int, index: int) -> Path:
    """Return the path of a unit's chunk, without its suffixes."""
    return work / f"{number:06d}-{index:04d}"


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


Group = tuple[str | None, str | None]
"""A source and a language; None where the documents do not have one."""


@dataclass(frozen=True)
class Chunks:
    """All chunks of a corpus, in reading order, for use in any process.

    Attributes:
        chunks: the chunks, in the order of units.
        first_numbers: the number in the whole input of the first document of each chunk's unit.
        groups: all (source, language) pairs.
        unit_groups: for each chunk, its unit's groups as indices into `groups`.
        dtype: the dtype of the tokens.
        num_ranges: the number of ranges of keys.
        exact: whether copies of a text are removed.
        near: file with one byte for each document of the input, 1 for near duplicates to remove; or None.
    """

    chunks: list[Chunk]
    first_numbers: list[int]
    groups: list[Group]
    unit_groups: list[np.ndarray]
    dtype: np.dtype[Any]
    num_ranges: int
    exact: bool
    near: Path | None

    @staticmethod
    def load(work: Path) -> Chunks:
        """Return the chunks that `save_chunks` wrote."""
        content = json.loads((work / CHUNKS_NAME).read_bytes())
        rows = content["chunks"]
        return Chunks(
            [Chunk(chunk_path(work, unit, index), *about) for unit, index, _, *about in rows],
            [first_number for _, _, first_number, *_ in rows],
            [(source, language) for source, language in content["groups"]],
            [np.array(content["unit_groups"][str(unit)], np.uint32) for unit, *_ in rows],
            np.dtype(content["dtype"]),
            content["num_ranges"],
            content["exact"],
            Path(content["near"]) if content["near"] else None,
        )

    def records(self, number: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Return the kept documents of a range of keys.

        Returns:
            records: [documents] in their final order; `group` is an index into `groups`.
            places: int64 [documents], the chunk of each.
            removed: documents left out, by the name of the rule.
        """
        first, last = key_range(number, self.num_ranges)
        parts, places, numbers = [np.empty(0, RECORD_DTYPE)], [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        for place, chunk in enumerate(self.chunks):
            records = chunk.records(first, last)
            if len(records):
                records["group"] = self.unit_groups[place][records["group"]]
                parts.append(records)
                places.append(np.full(len(records), place))
                numbers.append(records["number"].astype(np.uint64) + np.uint64(self.first_numbers[place]))
        records = np.concatenate(parts)
        order = np.lexsort((records["text_hash_high"], records["key"]))
        kept, removed = self._kept(records[order], np.concatenate(numbers)[order])
        chosen = order[kept]
        return records[chosen], np.concatenate(places)[chosen], removed

    def documents(self, records: np.ndarray, places: np.ndarray) -> Documents:
        """Return the documents with their tokens, in the order of `records`, which are in the chunks `places`."""
        by_chunk = np.argsort(places, kind="stable")
        bounds = np.flatnonzero(np.diff(places[by_chunk], prepend=-1, append=-1))
        ends = np.cumsum(records["tokens"], dtype=np.int64)
        begins = ends - records["tokens"]
        texts = np.empty(int(records["tokens"].sum(dtype=np.int64)), self.dtype)
        for begin, end in itertools.pairwise(bounds.tolist()):
            own = by_chunk[begin:end]
            tokens, starts = self.chunks[places[own[0]]].tokens(records[own], self.dtype)
            for place, start in zip(own.tolist(), starts.tolist(), strict=True):
                texts[begins[place] : ends[place]] = tokens[start : start + int(records["tokens"][place])]
        return Documents(records, texts)

    def _kept(self, records: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Return which of the sorted records are kept: the first of each text, without near duplicates."""
        copies = np.zeros(len(records), bool)
        if self.exact and len(records):
            identity = records[["key", "text_hash", "text_hash_high"]]
            copies[1:] = identity[1:] == identity[:-1]
        near = np.zeros(len(records), bool)
        if self.near and len(records):
            near = np.memmap(self.near, bool, "r")[numbers] & ~copies
        removed = {"exact duplicate": int(copies.sum()), "near duplicate": int(near.sum())}
        return np.flatnonzero(~copies & ~near), removed


def save_chunks(
    work: Path,
    results: Iterable[UnitResult],
    config: PrepareConfig,
    dtype: np.dtype[Any],
    *,
    near: Path | None,
    range_bytes: int,
) -> Chunks:
    """Save all chunks for every process, and load them again."""
    groups: dict[Group, int] = {}
    rows, unit_groups = [], {}
    first_number = num_tokens = 0
    for result in results:
        unit_groups[str(result.number)] = [groups.setdefault(group, len(groups)) for group in result.groups]
        rows += [(result.number, index, first_number, *chunk) for index, chunk in enumerate(result.chunks)]
        first_number += result.num_documents
        num_tokens += result.num_tokens
    content = {
        "chunks": rows,
        "groups": list(groups),
        "unit_groups": unit_groups,
        "dtype": dtype.str,
        "num_ranges": min(MAX_RANGES, max(1, -(-num_tokens * dtype.itemsize // range_bytes))),
        "exact": config.exact_duplicates == "remove",
        "near": str(near) if near else None,
    }
    write_atomic(work / CHUNKS_NAME, json.dumps(content))
    return Chunks.load(work)
