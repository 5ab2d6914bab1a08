"""The shards of a corpus, made from tokenized chunks.

    chunks ──count──▶ for each range of keys: kept documents, in each split ──▶ plan: which tokens each shard holds
    chunks ──write──▶ shards, each from the ranges that hold its tokens, in any order, in any process

The records alone determine which documents are kept and the place of each token, so shards are independent of each
other: a job that was killed writes only the missing ones. A shard's rows of the block table and its entry of the
manifest are written next to the chunks after the shard itself; if the entry exists, the shard is done.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtx.config.schema import PrepareConfig
from bigtx.data.corpus.manifest import BLOCK_DTYPE, SPLITS, Manifest, Shard
from bigtx.data.corpus.shards import ShardWriter, blocks_of_a_shard, token_dtype
from bigtx.data.prepare.chunks import CHUNKS_NAME, Chunks, Documents, save_chunks
from bigtx.data.prepare.encode import UnitResult
from bigtx.data.workers import Workers, advance
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError
from bigtx.utils.files import write_atomic, write_json

PLAN_NAME = "plan.json"


@dataclass
class Count:
    """The counts of one range of keys, or of the whole corpus.

    Attributes:
        removed: the documents left out, by rule.
        smallest, largest: text hashes of the kept documents.
        groups: by index into `Chunks.groups`, int64 [2 splits, 3] of documents, tokens and bytes.
    """

    removed: Counter[str]
    smallest: int
    largest: int
    groups: dict[int, np.ndarray]

    @property
    def sums(self) -> np.ndarray:
        """Return the sum over the groups, int64 [2 splits, 3]."""
        return sum(self.groups.values(), np.zeros((len(SPLITS), 3), np.int64))


def count_range(work: Path, held_out_below: int, number: int) -> Count:
    """Count a range of keys."""
    records, _, removed = _chunks(work).records(number)
    held_out = records["text_hash"] < np.uint64(held_out_below)
    groups = {
        group: np.array([_sums(records[(records["group"] == group) & split]) for split in (~held_out, held_out)])
        for group in np.unique(records["group"]).tolist()
    }
    hashes = records["text_hash"]
    smallest, largest = hashes.min(initial=np.uint64(2**64 - 1)), hashes.max(initial=np.uint64(0))
    return Count(Counter(removed), int(smallest), int(largest), groups)


def _sums(records: np.ndarray) -> list[int]:
    """Return the numbers of documents, tokens and bytes."""
    return [len(records), int(records["tokens"].sum(dtype=np.int64)), int(records["bytes"].sum(dtype=np.int64))]


def add_up(counts: list[Count]) -> Count:
    """Return the counts of the whole corpus."""
    total = Count(Counter(), 2**64 - 1, 0, {})
    for count in counts:
        total.removed.update(count.removed)
        total.smallest, total.largest = min(total.smallest, count.smallest), max(total.largest, count.largest)
        total.groups |= {group: total.groups.get(group, 0) + sums for group, sums in count.groups.items()}
    return total


@dataclass(frozen=True)
class Plan:
    """The place of every kept token.

    Attributes:
        held_out_below: texts with a smaller hash are the validation split.
        tokens_before: for each split, [ranges + 1] tokens of it in the ranges before.
        block_tokens, shard_blocks: tokens of a block, and blocks of a shard.
    """

    held_out_below: int
    tokens_before: list[list[int]]
    block_tokens: int
    shard_blocks: int

    def num_shards(self, split: int) -> int:
        """Return the number of shards of a split."""
        return -(-self.tokens_before[split][-1] // (self.block_tokens * self.shard_blocks))


@dataclass(frozen=True)
class Task:
    """Neighbouring shards for one process."""

    split: int
    first: int
    end: int


def make_tasks(plan: Plan, num_ranges: int) -> list[Task]:
    """Return all shards, in runs of about a range each, so that little is read twice."""
    tasks = []
    for split in range(len(SPLITS)):
        num_shards = plan.num_shards(split)
        length = max(1, num_shards // num_ranges)
        tasks += [Task(split, first, min(first + length, num_shards)) for first in range(0, num_shards, length)]
    return tasks


def write_shards(work: Path, corpus: Path, task: Task) -> None:
    """Write the missing shards of a task."""
    plan, chunks = _plan(work), _chunks(work)
    split = SPLITS[task.split]
    missing = [shard for shard in range(task.first, task.end) if not entry_path(work, split, shard).exists()]
    if not missing:
        return
    shard_tokens = plan.block_tokens * plan.shard_blocks
    before = plan.tokens_before[task.split]
    begin, end = missing[0] * shard_tokens, min((missing[-1] + 1) * shard_tokens, before[-1])
    writer = ShardWriter(
        corpus / split,
        first_shard=missing[0],
        shard_blocks=plan.shard_blocks,
        block_tokens=plan.block_tokens,
        dtype=chunks.dtype,
        done=lambda number, shard, rows: _save_entry(work, split, number, shard, rows),
    )
    with writer:
        first = int(np.searchsorted(before, begin, side="right")) - 1
        for number in range(first, chunks.num_ranges):
            if before[number] >= end:
                break
            documents = _of_split(chunks, plan, task.split, number)
            starts = np.cumsum(documents.records["tokens"], dtype=np.int64) - documents.records["tokens"]
            first_token, last_token = max(0, begin - before[number]), min(end, before[number + 1]) - before[number]
            inside = slice(*np.searchsorted(starts, (first_token, last_token)))
            writer.add(documents.tokens[first_token:last_token], starts[inside] - first_token)
            advance(0, 0)
        writer.finish()


def _of_split(chunks: Chunks, plan: Plan, split: int, number: int) -> Documents:
    """Return the kept documents of a range that belong to a split."""
    records, places, _ = chunks.records(number)
    held_out = records["text_hash"] < np.uint64(plan.held_out_below)
    chosen = held_out if split else ~held_out
    return chunks.documents(records[chosen], places[chosen])


def entry_path(work: Path, split: str, shard: int) -> Path:
    """Return the path of a finished shard's entry of the manifest; its rows of the block table are next to it, as
    .npy.
    """
    return work / f"{split}-{shard:06d}.shard"


def _save_entry(work: Path, split: str, number: int, shard: Shard, rows: np.ndarray) -> None:
    path, content = entry_path(work, split, number), io.BytesIO()
    np.lib.format.write_array(content, rows, allow_pickle=False)
    write_atomic(path.with_suffix(".npy"), content.getvalue())
    write_json(path, vars(shard))


def _read_rows(path: Path) -> np.ndarray:
    """Read the rows of the block table that belong to a finished shard's entry.

    Raises:
        DataError: they are damaged; the shard does not count as finished any more.
    """
    file = path.with_suffix(".npy")
    try:
        with open(file, "rb") as content:
            return np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # numpy reads a header as Python's source, which fails in many ways.
        path.unlink(missing_ok=True)
        raise DataError(f"{file} is damaged ({error}); repeat the command, which writes its shard again") from None


@functools.lru_cache(maxsize=1)
def _chunks(work: Path) -> Chunks:
    return Chunks.load(work)


@functools.lru_cache(maxsize=1)
def _plan(work: Path) -> Plan:
    return Plan(**json.loads((work / PLAN_NAME).read_bytes()))


class Assembly:
    """The step that turns the chunks of a corpus into its splits.

    Args:
        work: folder of the chunks.
        corpus: folder of the splits.
        show: receives the state, for the progress line.
    """

    def __init__(
        self, work: Path, corpus: Path, config: PrepareConfig, workers: Workers, show: Callable[[str, float], None]
    ) -> None:
        self._work, self._corpus, self._config = work, corpus, config
        self._workers, self._show = workers, show

    def run(
        self, results: list[UnitResult], tokenizer: Tokenizer, recipe: dict[str, Any], near: Path | None, memory: int
    ) -> Count:
        """Count, plan and write; return the counts of the corpus.

        Args:
            near: the file that marks the near duplicates.
            memory: bytes of tokens of a range of keys.
        """
        _chunks.cache_clear()
        _plan.cache_clear()
        self._forget_other_inputs(results)
        dtype = token_dtype(tokenizer.vocab_size)
        # Ranges are fixed when they are first made: later steps depend on them, and may be partly done.
        if (self._work / CHUNKS_NAME).exists():
            chunks = Chunks.load(self._work)
        else:
            chunks = save_chunks(self._work, results, self._config, dtype, near=near, range_bytes=memory)
        counts, held_out_below = self._count(chunks)
        total = add_up(counts)
        plan = self._save_plan(counts, held_out_below, dtype)
        tasks = make_tasks(plan, chunks.num_ranges)
        for name in SPLITS:
            (self._corpus / name).mkdir(parents=True, exist_ok=True)
        write = functools.partial(write_shards, self._work, self._corpus)
        for number, _ in enumerate(self._workers.map(write, tasks), start=1):
            self._show(f"writing shards: {number / len(tasks):.0%}", number / len(tasks))
        for split in range(len(SPLITS)):
            self._finish(split, plan, total, chunks, tokenizer, recipe)
        return total

    def _forget_other_inputs(self, results: list[UnitResult]) -> None:
        """Remove plans and files that were made from other units or for other shards than those of this job."""
        settings = [self._config.validation_fraction, self._config.block_tokens, self._config.shard_size]
        content = json.dumps([settings, [(result.number, result.key) for result in results]])
        digest = hashlib.sha256(content.encode()).hexdigest()
        marker = self._work / "assembly"
        if marker.exists() and marker.read_text() == digest:
            return
        marker.unlink(missing_ok=True)
        for path in [self._work / CHUNKS_NAME, self._work / PLAN_NAME]:
            path.unlink(missing_ok=True)
        for split in SPLITS:
            shutil.rmtree(self._corpus / split, ignore_errors=True)
            for path in self._work.glob(f"{split}-*.shard"):
                path.unlink()
        write_atomic(marker, digest)

    def _count(self, chunks: Chunks) -> tuple[list[Count], int]:
        """Count all ranges, with at least one text held out if a share is set, and never all."""
        fraction = self._config.validation_fraction
        threshold = int(fraction * 2**64)
        while True:
            count = functools.partial(count_range, self._work, threshold)
            counts = list(self._workers.map(count, range(chunks.num_ranges)))
            total = add_up(counts)
            exact = _held_out_below(fraction, total.smallest, total.largest)
            if exact == threshold:
                return counts, threshold
            threshold = exact

    def _save_plan(self, counts: list[Count], held_out_below: int, dtype: np.dtype[Any]) -> Plan:
        tokens = np.stack([count.sums[:, 1] for count in counts], axis=1)
        before = np.pad(np.cumsum(tokens, axis=1), ((0, 0), (1, 0)))
        shard_blocks = blocks_of_a_shard(self._config.shard_size, self._config.block_tokens, dtype)
        plan = Plan(held_out_below, before.tolist(), self._config.block_tokens, shard_blocks)
        write_atomic(self._work / PLAN_NAME, json.dumps(vars(plan)))
        return plan

    def _finish(
        self, split: int, plan: Plan, total: Count, chunks: Chunks, tokenizer: Tokenizer, recipe: dict[str, Any]
    ) -> None:
        """Write a split's block table and manifest; a split without documents is not written."""
        name, (num_documents, num_tokens, num_bytes) = SPLITS[split], total.sums[split].tolist()
        folder = self._corpus / name
        if not num_documents:
            folder.rmdir()
            return
        paths = [entry_path(self._work, name, shard) for shard in range(plan.num_shards(split))]
        rows = [_read_rows(path) for path in paths]
        shards = [Shard(**json.loads(path.read_bytes())) for path in paths]
        keys = ("source", "language", "documents", "tokens", "bytes")
        groups = [
            dict(zip(keys, (*chunks.groups[index], *sums[split].tolist()), strict=True))
            for index, sums in sorted(total.groups.items())
            if sums[split][0]
        ]
        Manifest(
            folder=folder,
            split=name,
            dtype=chunks.dtype,
            vocab_size=tokenizer.vocab_size,
            end_id=tokenizer.end_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            block_tokens=plan.block_tokens,
            num_tokens=num_tokens,
            num_documents=num_documents,
            num_bytes=num_bytes,
            shards=tuple(shards),
            blocks=np.concatenate(rows).astype(BLOCK_DTYPE),
            recipe=recipe,
            groups=groups,
        ).save()


def _held_out_below(fraction: float, smallest: int, largest: int) -> int:
    """Return the hash below which texts are held out: at least one text, if there are two; never all."""
    if fraction == 0 or smallest >= largest:
        return 0
    return min(max(int(fraction * 2**64), smallest + 1), largest)
