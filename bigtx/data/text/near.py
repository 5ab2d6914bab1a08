"""Near duplicates of a whole corpus from its signatures, on disk.

    signatures ──▶ (band key, document) in partitions by key ──▶ groups of equal keys ──▶ verified rows ──▶ sorted rows
                       written in reading order                  compared by signature     by document

Documents that agree in one band form one group. The group's earliest document leads it: those whose signatures
agree with the leader's by the threshold are its duplicates; the others form a group with its own leader, and so on, at
most MAX_ROUNDS times. So a text that is copied 10^5 times costs 10^5 comparisons per band, not 10^10, and the first of
near duplicates is always kept. A duplicate may lead others in another band: documents that are near duplicates of a
removed document are removed too.

The result depends only on the signatures and their order, not on the memory or on their division into files.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigtx.config.schema import NearDuplicateConfig
from bigtx.data.storage.places import map_file
from bigtx.data.text.ngrams import NOTHING, SIGNATURE_DTYPE
from bigtx.utils.errors import DataError
from bigtx.utils.files import publish
from bigtx.utils.hashing import hash64

MAX_ROUNDS = 64
"""The most leaders of one group; a document that agrees with none of them is not a duplicate by this band."""

ROW_DTYPE = np.dtype([("duplicate", "<u8"), ("leader", "<u8"), ("similarity", "<f4")])
_ENTRY_DTYPE = np.dtype([("key", "<u8"), ("document", "<u8")])

_SORT_FACTOR = 8
"""Bytes that grouping needs for each byte of a partition, and sorting for each byte of rows."""
_OPEN_PARTS = 256


@dataclass(frozen=True)
class SignaturePart:
    """Signatures of successive documents: a file of SIGNATURE_DTYPE [num_documents, hashes] only.

    A part without documents needs no file.
    """

    path: Path
    num_documents: int


def find_near_duplicates(
    parts: list[SignaturePart], folder: Path, config: NearDuplicateConfig, memory_bytes: int
) -> Path:
    """Find the documents that are near duplicates of an earlier one.

    Files of a killed call are removed, and the folder `near` appears complete or not at all.

    Args:
        parts: the parts in reading order; documents are numbered from 0 through all of them.
        folder: a folder `near` is made in it with the result; temporary files need 16 bytes for each document and band.
        memory_bytes: about how much memory to use, for any number of documents; at least 4 MiB are used.

    Returns:
        The folder `near` with two files: `rows`, ROW_DTYPE sorted by duplicate, one for each, with its nearest leader,
        the earliest of them if several are as near; and `removed`, one byte for each document, 1 for duplicates.

    Raises:
        DataError: a part does not have its expected size.
        OSError: the folder cannot be written.
    """
    partial, final = folder / "near.partial", folder / "near"
    for left in (partial, final):
        if left.exists():
            shutil.rmtree(left)
    partial.mkdir(parents=True)
    memory_bytes = max(memory_bytes, 4 << 20)
    signatures = _Signatures(parts, config.num_bands * config.rows_per_band)
    num_documents = signatures.num_documents
    found = _Partitions(
        partial / "found", ROW_DTYPE, num_documents * config.num_bands * ROW_DTYPE.itemsize, memory_bytes
    )
    finder = _GroupFinder(signatures, config.threshold, found, memory_bytes)
    for path in _write_entries(signatures, partial / "keys", config, memory_bytes):
        finder.search(path)
    found.flush()
    _write_result(partial, found, num_documents)
    shutil.rmtree(partial / "keys")
    shutil.rmtree(partial / "found")
    publish(partial, final)
    return final


class _Partitions:
    """Records in many files, by number; they are gathered in memory and appended at intervals, each file in order."""

    def __init__(self, folder: Path, dtype: np.dtype, total_bytes: int, memory_bytes: int) -> None:
        folder.mkdir()
        self._folder = folder
        self.count = max(1, -(-total_bytes * _SORT_FACTOR * 2 // memory_bytes))
        self.dtype = dtype
        self._limit = memory_bytes // 8
        self._gathered: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0

    def add(self, numbers: np.ndarray, records: np.ndarray) -> None:
        """Put each record into the file of its number."""
        self._gathered.append((numbers.astype(np.int64), records))
        self._size += records.nbytes
        if self._size >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write the gathered records."""
        if not self._gathered:
            return
        numbers, records = (np.concatenate(arrays) for arrays in zip(*self._gathered, strict=True))
        self._gathered, self._size = [], 0
        order = np.argsort(numbers, kind="stable")
        numbers, records = numbers[order], records[order]
        bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for begin, end in itertools.pairwise(bounds):
            if end > begin:
                with open(self.path(int(numbers[begin])), "ab") as file:
                    records[begin:end].tofile(file)

    def path(self, number: int) -> Path:
        """Return the file of a number, which exists if the number has records."""
        return self._folder / f"{number:06d}"

    def paths(self) -> Iterator[tuple[int, Path]]:
        """Return the numbers and files that exist, in the order of the numbers."""
        return ((number, self.path(number)) for number in range(self.count) if self.path(number).exists())


class _Signatures:
    """The signatures of all documents, by their numbers; pages that were read are released."""

    def __init__(self, parts: list[SignaturePart], num_hashes: int) -> None:
        self._parts = parts = [part for part in parts if part.num_documents]
        self.num_hashes = num_hashes
        self.row_bytes = num_hashes * SIGNATURE_DTYPE.itemsize
        self._firsts = np.cumsum([0, *(part.num_documents for part in parts)])
        self.num_documents = int(self._firsts[-1])
        self._open: OrderedDict[int, mmap.mmap] = OrderedDict()
        for part in parts:
            size, expected = _size(part.path), part.num_documents * self.row_bytes
            if size != expected:
                raise DataError(
                    f"{part.path} has {size:,} bytes, but its signatures need {expected:,}: it was changed after it "
                    "was written. Repeat the command; `bigtx data prepare` writes it again."
                )

    def read(self, num_documents: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield all in order, so many at a time: the number of the first, and signatures [documents, num_hashes]."""
        for first, part in zip(self._firsts.tolist(), self._parts, strict=False):
            with open(part.path, "rb") as file:
                for begin in range(0, part.num_documents, num_documents):
                    count = min(num_documents, part.num_documents - begin)
                    read = np.fromfile(file, SIGNATURE_DTYPE, count * self.num_hashes)
                    yield first + begin, read.reshape(count, self.num_hashes)

    def gather(self, documents: np.ndarray) -> np.ndarray:
        """Return the signatures of any documents, [documents, num_hashes]."""
        rows = np.empty((len(documents), self.num_hashes), SIGNATURE_DTYPE)
        order = np.argsort(documents, kind="stable")
        ascending = documents[order].astype(np.int64)
        bounds = np.searchsorted(ascending, self._firsts)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            chosen = slice(bounds[number], bounds[number + 1])
            mapped = self._mapped(number)
            part = np.frombuffer(mapped, SIGNATURE_DTYPE).reshape(-1, self.num_hashes)
            rows[order[chosen]] = part[ascending[chosen] - self._firsts[number]]
            del part
            mapped.madvise(mmap.MADV_DONTNEED)
        return rows

    def _mapped(self, number: int) -> mmap.mmap:
        if number not in self._open:
            if len(self._open) >= _OPEN_PARTS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = map_file(self._parts[number].path)
            self._open[number].madvise(mmap.MADV_RANDOM)
        self._open.move_to_end(number)
        return self._open[number]


def _write_entries(
    signatures: _Signatures, folder: Path, config: NearDuplicateConfig, memory_bytes: int
) -> Iterator[Path]:
    """Distribute (key, document) of all bands over files by key, with documents in order; return the files."""
    entries = signatures.num_documents * config.num_bands
    partitions = _Partitions(folder, _ENTRY_DTYPE, entries * _ENTRY_DTYPE.itemsize, memory_bytes)
    chunk = max(1, memory_bytes // 8 // (signatures.row_bytes + config.num_bands * 8 * _ENTRY_DTYPE.itemsize))
    for first, rows in signatures.read(chunk):
        speaking = np.flatnonzero((rows != NOTHING).any(axis=1))
        records = np.empty(len(speaking), _ENTRY_DTYPE)
        records["document"] = speaking + first
        for band in range(config.num_bands):
            columns = rows[speaking, band * config.rows_per_band : (band + 1) * config.rows_per_band]
            records["key"] = hash64(band, *columns.T)
            partitions.add(records["key"] % np.uint64(partitions.count), records.copy())
    partitions.flush()
    return (path for _, path in partitions.paths())


class _Group(NamedTuple):
    """Entries of one partition that do not have a leader yet, with those of one group next to each other."""

    groups: np.ndarray
    documents: np.ndarray


class _GroupFinder:
    """The search for leaders and their duplicates in one partition."""

    def __init__(self, signatures: _Signatures, threshold: float, found: _Partitions, memory_bytes: int) -> None:
        self._signatures = signatures
        # Counted in entries: a share would depend on its rounding.
        self._needed = int(np.ceil(threshold * signatures.num_hashes - 1e-9))
        self._found = found
        self._span = -(-signatures.num_documents // found.count)
        self._memory = memory_bytes
        self._chunk = max(1, memory_bytes // 16 // (3 * signatures.row_bytes + 64))

    def search(self, path: Path) -> None:
        """Search a file of entries; if it is larger than expected, its largest groups are searched in the file."""
        if path.stat().st_size * _SORT_FACTOR <= self._memory:
            self._search_entries(np.fromfile(path, _ENTRY_DTYPE))
        else:
            self._search_large(path)

    def _search_entries(self, entries: np.ndarray) -> None:
        order = np.argsort(entries["key"], kind="stable")
        groups = np.cumsum(np.diff(entries["key"][order], prepend=entries["key"][order[:1]]) != 0)
        left = _with_company(_Group(groups, entries["document"][order]))
        for _ in range(MAX_ROUNDS):
            if not len(left.groups):
                return
            firsts = np.diff(left.groups, prepend=-1) != 0
            leaders = left.documents[firsts][np.cumsum(firsts) - 1]
            agreeing = firsts.copy()
            for begin in range(0, len(leaders), self._chunk):
                part = slice(begin, begin + self._chunk)
                others = np.flatnonzero(~firsts[part]) + begin
                agreeing[others] = self._compare(left.documents[others], leaders[others])
            left = _with_company(_Group(left.groups[~agreeing], left.documents[~agreeing]))

    def _search_large(self, path: Path) -> None:
        """Search a file of too many entries: single keys that fill it are searched in it, one pass each round."""
        chunk = max(1, self._memory // _SORT_FACTOR // _ENTRY_DTYPE.itemsize)
        # A key with too many entries is frequent in the file, and so among its first entries.
        keys, counts = np.unique(np.fromfile(path, _ENTRY_DTYPE, chunk)["key"], return_counts=True)
        large = keys[np.argmax(counts)]
        group, others = path.with_name(f"{path.name}.group"), path.with_name(f"{path.name}.others")
        with open(group, "wb") as inside, open(others, "wb") as outside:
            for entries in _read_entries(path, chunk):
                entries[entries["key"] == large].tofile(inside)
                entries[entries["key"] != large].tofile(outside)
        self._search_file(group, chunk)
        group.unlink()
        self.search(others)
        others.unlink()

    def _search_file(self, path: Path, chunk: int) -> None:
        """Search one group that is in a file."""
        rest = path.with_name(f"{path.name}.rest")
        for _ in range(MAX_ROUNDS):
            if path.stat().st_size <= _ENTRY_DTYPE.itemsize:
                break
            leader = np.fromfile(path, _ENTRY_DTYPE, 1)["document"]
            with open(rest, "wb") as file:
                for entries in _read_entries(path, min(chunk, self._chunk)):
                    others = entries[entries["document"] != leader]
                    agree = self._compare(others["document"], np.repeat(leader, len(others)))
                    others[~agree].tofile(file)
            rest.replace(path)

    def _compare(self, documents: np.ndarray, leaders: np.ndarray) -> np.ndarray:
        """Return which documents are duplicates of their leaders; these are recorded."""
        gathered = self._signatures.gather(leaders)
        equal = np.count_nonzero(self._signatures.gather(documents) == gathered, axis=1)
        agree = equal >= self._needed
        rows = np.empty(int(agree.sum()), ROW_DTYPE)
        rows["duplicate"] = documents[agree]
        rows["leader"] = leaders[agree]
        rows["similarity"] = equal[agree] / np.float32(self._signatures.num_hashes)
        self._found.add(rows["duplicate"] // np.uint64(self._span), rows)
        return agree


def _with_company(entries: _Group) -> _Group:
    """Return the entries whose group has more than one."""
    same = np.diff(entries.groups) == 0
    kept = np.zeros(len(entries.groups), bool)
    kept[1:] |= same
    kept[:-1] |= same
    return _Group(entries.groups[kept], entries.documents[kept])


def _read_entries(path: Path, count: int) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(entries := np.fromfile(file, _ENTRY_DTYPE, count)):
            yield entries


def _write_result(partial: Path, found: _Partitions, num_documents: int) -> None:
    """Keep one row for each duplicate."""
    with open(partial / "rows", "wb") as file, open(partial / "removed", "wb") as marks:
        marks.truncate(num_documents)
        for _, path in found.paths():
            rows = np.fromfile(path, ROW_DTYPE)
            rows = rows[np.lexsort((rows["leader"], -rows["similarity"], rows["duplicate"]))]
            rows = rows[np.diff(rows["duplicate"], prepend=~rows["duplicate"][:1]) != 0]
            rows.tofile(file)
            first, last = int(rows["duplicate"][0]), int(rows["duplicate"][-1])
            removed = np.zeros(last - first + 1, bool)
            removed[(rows["duplicate"] - np.uint64(first)).astype(np.int64)] = True
            marks.seek(first)
            removed.tofile(marks)
        for written in (file, marks):
            written.flush()
            os.fsync(written.fileno())


def _size(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if the file is missing."""
    return path.stat().st_size if path.exists() else 0
