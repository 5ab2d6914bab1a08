"""The check of a whole corpus against what was written: every hash, every header, every token."""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from bigtx.data.corpus.blocks import TOKENIZER, block_views, is_block, load_tokenizer, open_splits
from bigtx.data.corpus.manifest import (
    AGAIN,
    BLOCKS_NAME,
    DOCS_DTYPE,
    MEMBER_HEADER_BYTES,
    NPY_HEADER_BYTES,
    SPLITS,
    TAR_UNIT,
    Manifest,
    has_split,
    shard_problem,
)
from bigtx.data.storage.places import Place, open_stream
from bigtx.data.workers import Workers, advance
from bigtx.utils.errors import DataError
from bigtx.utils.hardware import num_cores
from bigtx.utils.log import ProgressLine
from bigtx.utils.units import clock, counted, format_size

_PROBLEMS_SHOWN = 5
"""The number of problems of one shard that are listed; the others are counted."""


@dataclass
class Verified:
    """The amount that `verify` read, and the problems."""

    num_shards: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class _ShardResult:
    """The result of one shard: its first and last edge, which must fit its neighbours, and its problems.

    Attributes:
        begins: whether a document starts with its first token; None if that is not known.
        ends: whether its last token ends a document; None if that is not known.
    """

    begins: bool | None = None
    ends: bool | None = None
    problems: list[str] = field(default_factory=list)


def verify(place: Place, num_processes: int) -> Verified:
    """Read all of a corpus and compare it with its manifests, its tables and its tokenizer.

    Args:
        num_processes: 0 uses every core.

    Raises:
        DataError: there is no corpus.
    """
    begin, result = time.monotonic(), Verified()
    manifests = _open(place, result)
    tasks = [(manifest, shard) for manifest in manifests for shard in range(len(manifest.shards))]
    result.num_shards, result.num_blocks = len(tasks), sum(len(manifest.blocks) for manifest in manifests)
    result.num_bytes = sum(manifest.shards[shard].size for manifest, shard in tasks)
    line = ProgressLine()

    def show(num_bytes: int, _: int) -> None:
        seconds = max(time.monotonic() - begin, 1e-6)
        share = num_bytes / max(1, result.num_bytes)
        left = f", {clock(seconds / share - seconds)} left" if share else ""
        line.show(f"verifying: {share:.0%}{left}, {num_bytes / seconds / 1e6:,.0f} MB/s", share)

    processes = max(1, min(num_processes or num_cores(), len(tasks)))
    with Workers(processes, _nothing, show) as workers:
        found = list(workers.map(_check_shard, [(manifest.folder, shard) for manifest, shard in tasks]))
    line.clear()
    result.problems += [problem for shard in found for problem in shard.problems]
    for manifest in manifests:
        own = [part for (of, _), part in zip(tasks, found, strict=True) if of is manifest]
        result.problems += _check_edges(manifest, own)
    result.seconds = time.monotonic() - begin
    return result


def _open(place: Place, result: Verified) -> list[Manifest]:
    """Return the splits with intact manifests and tables; add the problems of the others and of the tokenizer to
    `result`.
    """
    names = [name for name in SPLITS if has_split(place, name)]
    if not names:
        open_splits(place)
    manifests = []
    for name in names:
        try:
            manifests.append(Manifest.load(place / name, check_shards=False))
        except DataError as error:
            result.problems.append(str(error))
    for manifest in manifests:
        result.problems += _check_table(manifest)
        try:
            tokenizer = load_tokenizer(place, manifest.tokenizer_fingerprint)
        except DataError as error:
            result.problems.append(f"{place / TOKENIZER}: {error}")
            continue
        if (manifest.vocab_size, manifest.end_id) != (tokenizer.vocab_size, tokenizer.end_id):
            result.problems.append(
                f"{manifest.folder}: the manifest has {manifest.vocab_size} ids and the end id {manifest.end_id}, its "
                f"tokenizer {tokenizer.vocab_size} and {tokenizer.end_id}"
            )
    return manifests


def _check_table(manifest: Manifest) -> Iterator[str]:
    """Whether the blocks follow each other from shard to shard, each as long as the manifest says."""
    shards, tokens = manifest.blocks["shard"], manifest.blocks["tokens"]
    if (shards[1:] < shards[:-1]).any():
        yield f"{manifest.folder / BLOCKS_NAME}: its blocks are not in the order of their shards"
    if (tokens[:-1] != manifest.block_tokens).any() or tokens[-1] > manifest.block_tokens:
        yield (
            f"{manifest.folder}: the manifest has block_tokens={manifest.block_tokens}, and blocks of the table have "
            "other lengths"
        )


def _nothing() -> None:
    """Do nothing: a process needs no set-up."""


@functools.lru_cache(maxsize=2)
def _manifest(folder: Place) -> Manifest:
    return Manifest.load(folder, check_shards=False)


def _check_shard(task: tuple[Place, int]) -> _ShardResult:
    """Read one shard from its beginning to its end."""
    folder, shard = task
    manifest, result = _manifest(folder), _ShardResult()
    problem = shard_problem(manifest, shard)
    if problem:
        return _ShardResult(problems=[problem])
    path = manifest.shard_path(shard)
    try:
        with open_stream(path) as stream:
            for text in _read_shard(manifest, shard, stream, result):
                result.problems.append(f"{path}: {text}")
    except (DataError, OSError) as error:
        result.problems.append(f"{path} cannot be read: {error}")
    more = len(result.problems) - _PROBLEMS_SHOWN
    if more > 0:
        result.problems[_PROBLEMS_SHOWN:] = [f"{path}: and {more} more"]
    return result


def _read_shard(manifest: Manifest, shard: int, stream: BinaryIO, result: _ShardResult) -> Iterator[str]:
    """Yield the problems of a shard, one at a time."""
    digest, position = hashlib.sha256(), 0
    first, last = np.searchsorted(manifest.blocks["shard"], (shard, shard + 1)).tolist()
    for block in range(first, last):
        begin, end = manifest.block_range(block)
        if begin != position or end > manifest.shards[shard].size:
            yield f"the block table has block {block} at bytes {begin:,} to {end:,}, not from byte {position:,} on"
            result.ends = None
            break
        content = stream.read(end - begin)
        digest.update(content)
        advance(len(content), 0)
        position = end
        if len(content) < end - begin:
            yield f"it is truncated within block {block}"
            break
        if not is_block(manifest, block, content):
            yield f"block {block} (bytes {begin:,} to {end:,}) is damaged"
            result.ends = None
            continue
        yield from _check_members(manifest, block, content)
        yield from _check_tokens(manifest, block, content, result, is_first=block == first)
    rest = stream.read()
    digest.update(rest)
    if rest != bytes(2 * TAR_UNIT):
        yield f"{len(rest):,} bytes follow its last block instead of an end-of-archive mark of {2 * TAR_UNIT:,} zeros"
    if digest.hexdigest() != manifest.shards[shard].sha256:
        yield "its SHA-256 is not the manifest's"


def _check_members(manifest: Manifest, block: int, content: bytes) -> Iterator[str]:
    """Yield a problem for headers that differ from the table, as other readers of tar and npy read them."""
    record = manifest.blocks[block]
    for name, dtype, count, begin in (
        (f"{block:06d}.tokens.npy", manifest.dtype, int(record["tokens"]), 0),
        (f"{block:06d}.docs.npy", DOCS_DTYPE, int(record["documents"]), int(record["docs_offset"])),
    ):
        try:
            info = tarfile.TarInfo.frombuf(content[begin : begin + TAR_UNIT], "utf-8", "strict")
            array = io.BytesIO(content[begin + TAR_UNIT : begin + MEMBER_HEADER_BYTES])
            np.lib.format.read_magic(array)
            shape, _, found = np.lib.format.read_array_header_1_0(array)
        except (tarfile.HeaderError, ValueError) as error:
            yield f"block {block}: the headers of {name} cannot be read ({error})"
            continue
        size = NPY_HEADER_BYTES + count * dtype.itemsize
        if (info.name, info.size, info.isreg(), shape, found) != (name, size, True, (count,), dtype):
            yield (
                f"block {block}: the table has {name} of {size:,} bytes, but the shard the member {info.name!r} of "
                f"{info.size:,} bytes, an array {shape} of {found}"
            )


def _check_tokens(
    manifest: Manifest, block: int, content: bytes, result: _ShardResult, *, is_first: bool
) -> Iterator[str]:
    """Yield a problem for ids outside the vocabulary, and for documents that do not start exactly after ends."""
    tokens, starts = block_views(manifest, block, content, MEMBER_HEADER_BYTES)
    if len(tokens) == 0:
        yield f"block {block} has no tokens"
        return
    if int(tokens.max()) >= manifest.vocab_size:
        yield f"block {block} has the id {int(tokens.max())}, but the vocabulary has {manifest.vocab_size}"
    begins = bool(len(starts)) and int(starts[0]) == 0
    ends = tokens == manifest.end_id
    expected = np.flatnonzero(ends[:-1]) + 1
    if not np.array_equal(expected, starts[1:] if begins else starts):
        yield f"block {block}: its documents do not start where the previous ones end"
    if is_first:
        result.begins = begins
    elif result.ends is not None and begins != result.ends:
        yield f"block {block}: a document starts there, or does not, unlike the end of the previous block"
    result.ends = bool(ends[-1])


def _check_edges(manifest: Manifest, shards: list[_ShardResult]) -> Iterator[str]:
    """Yield a problem where the shards of a split do not fit at documents' borders, or within a document."""
    before: bool | None = True
    for shard, result in enumerate(shards):
        if None not in (before, result.begins) and before != result.begins:
            path = manifest.shard_path(shard)
            yield f"{path}: a document starts there, or does not, unlike the end of the previous shard"
        before = result.ends
    if before is False:
        yield f"{manifest.folder}: the last document has no end"


def describe(place: Place, result: Verified) -> str:
    """Return the outcome, for the terminal.

    Raises:
        DataError: there are problems; the message lists all of them.
    """
    size = f"{result.num_shards:,} shards, {result.num_blocks:,} blocks, {format_size(result.num_bytes)}"
    if result.problems:
        listed = "".join(f"\n  {problem}" for problem in result.problems)
        raise DataError(
            f"{place} differs from what was written ({size} read): {counted(len(result.problems), 'problem')}."
            f"{listed}\n"
            f"Copy the damaged files again from where they were prepared, or {AGAIN}."
        )
    speed = result.num_bytes / max(result.seconds, 1e-6) / 1e6
    return f"{place} is as it was written: {size} read in {result.seconds:.1f} s ({speed:,.0f} MB/s)."
