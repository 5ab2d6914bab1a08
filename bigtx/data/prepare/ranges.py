"""All chunks of a corpus as ranges of keys, each of which any process can read at any time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtx.config.schema import PrepareConfig
from bigtx.data.prepare.chunks import RECORD_DTYPE, Chunk, Documents, key_range
from bigtx.data.prepare.encode import UnitResult, chunk_path
from bigtx.utils.files import write_atomic

CHUNKS_NAME = "chunks.json"
MAX_RANGES = 1 << 16

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
            [
                Chunk(
                    chunk_path(work, row["unit"], row["index"]),
                    row["num_documents"],
                    row["num_tokens"],
                    row["checksum"],
                )
                for row in rows
            ],
            [row["first_number"] for row in rows],
            [(source, language) for source, language in content["groups"]],
            [np.array(content["unit_groups"][str(row["unit"])], np.uint32) for row in rows],
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
            same = np.ones(len(records) - 1, bool)
            for name in ("key", "text_hash", "text_hash_high"):
                same &= records[name][1:] == records[name][:-1]
            copies[1:] = same
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
        for index, (documents, tokens, checksum) in enumerate(result.chunks):
            rows.append(
                {
                    "unit": result.number,
                    "index": index,
                    "first_number": first_number,
                    "num_documents": documents,
                    "num_tokens": tokens,
                    "checksum": checksum,
                }
            )
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
