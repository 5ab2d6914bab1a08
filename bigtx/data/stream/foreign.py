"""Foreign text shards: plain webdataset tars, streamed, tokenized and packed on the fly.

    shard list ──▶ this rank's ──▶ this worker's ──▶ samples ──▶ shuffle buffer ──▶ ids ──▶ rows      (in each epoch)

The list, the splits and the buffer are webdataset's. Opening and unpacking are bigtx's: webdataset's opener runs
commands (`pipe:`, curl), its decoders unpickle, and its tar reader treats a damaged shard as a short one. So shards are
read by the reader of `bigtx data prepare`, strictly: any reject refuses the shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import braceexpand
import numpy as np

from bigtx.config.schema import ForeignConfig, InputConfig
from bigtx.data.corpus.manifest import TAR_UNIT, first_problems
from bigtx.data.raw.documents import EMPTY, Reject, Rejects, in_batches
from bigtx.data.raw.formats import READ_ERRORS, decompressed, is_compressed, unreadable
from bigtx.data.raw.read import Fields
from bigtx.data.raw.rows import Origin
from bigtx.data.raw.samples import read_archive
from bigtx.data.storage.places import Place, RemotePath, as_place, open_stream
from bigtx.data.storage.remote import name_of
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError
from bigtx.utils.files import open_file
from bigtx.utils.hashing import hash64
from bigtx.utils.terminal import visible

Row = tuple[np.ndarray, np.ndarray]
"""int32 tokens [T + 1], and where in them documents start, int64 ascending."""

EXECUTABLE_SUFFIXES = ("pickle", "pkl", "pt", "pth", "pyd")
_CHECKS_AT_ONCE = 32


def expand(paths: list[str]) -> list[str]:
    """Return the shards that `data.foreign.paths` names, braces expanded.

    Raises:
        DataError: braces are not balanced, or a shard is named twice.
    """
    shards: list[str] = []
    for path in paths:
        try:
            shards.extend(braceexpand.braceexpand(path))
        except ValueError as error:
            raise DataError(f"data.foreign.paths: the braces in {path!r} are not balanced ({error}).") from None
    twice = sorted({shard for shard in shards if shards.count(shard) > 1}) if len(set(shards)) < len(shards) else []
    if twice:
        raise DataError(f"data.foreign.paths names {twice[0]} twice.")
    return shards


def check_shards(config: ForeignConfig, world_size: int) -> str:
    """Refuse shards that are missing, empty or truncated (by their sizes and ends), or fewer than the ranks.

    Returns:
        A digest of the shards' names and sizes and of the place of their text: a different digest means different data.

    Raises:
        DataError: there are such shards; the message lists all of them.
    """
    shards = expand(config.paths)
    if len(shards) < world_size:
        raise DataError(
            f"data.foreign.paths names {len(shards)} shards for {world_size} ranks, but each rank needs its own; "
            f"start at most {len(shards)} ranks, or write the text to more shards."
        )
    with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
        found = list(pool.map(_check_shard, shards))
    problems = [problem for _, problem in found if problem]
    if problems:
        raise DataError(f"data.foreign.paths: {first_problems(problems)}. Restore these shards, or leave them out.")
    names = sorted((shard.rpartition("/")[2], size) for shard, (size, _) in zip(shards, found, strict=True))
    return hashlib.sha256(json.dumps([names, config.member, config.text_field]).encode()).hexdigest()


def _check_shard(shard: str) -> tuple[int, str | None]:
    """Return a shard's size, and its fault."""
    try:
        size, end = _size_and_end(as_place(shard))
    except FileNotFoundError:
        return 0, f"{shard} is missing"
    except OSError as error:
        return 0, f"{shard} cannot be read ({error.strerror})"
    except DataError as error:
        return 0, str(error).rstrip(".")
    if size == 0:
        return size, f"{shard} is empty"
    if is_compressed(name_of(shard)):
        return size, None  # Only reading it shows whether it is complete.
    if size % TAR_UNIT or size < 2 * TAR_UNIT or any(end):
        return size, f"{shard} is not a complete tar: its {size:,} bytes do not end with an end-of-archive mark"
    return size, None


def _size_and_end(place: Place) -> tuple[int, bytes]:
    if isinstance(place, RemotePath):
        size = place.size()
        return size, place.read_bytes(size - 2 * TAR_UNIT, size) if size >= 2 * TAR_UNIT else b""
    size = place.stat().st_size
    with open_file(place) as file:
        file.seek(max(0, size - 2 * TAR_UNIT))
        return size, file.read()


def read_texts(shard: str, config: ForeignConfig) -> Iterator[str]:
    """Yield the text of each sample of a shard, by the reader of `bigtx data prepare`, without empty texts.

    Raises:
        DataError: the shard cannot be read or is damaged, has code, its keys are duplicate or interleaved, or a
            sample has no text; the message names the shard and the sample.
    """
    fields = Fields(InputConfig(text_field=config.text_field), "data.foreign", ("text_field", "member"))
    options = dataclasses.replace(fields.options, only=config.member, forbidden=EXECUTABLE_SUFFIXES, strict=True)
    rejects = Rejects(0.0, _refuse)
    try:
        with open_stream(as_place(shard)) as stored:
            rows = read_archive(decompressed(stored, name_of(shard)), Origin(shard, shard), options, rejects)
            yield from (document.text for document in fields.documents(rows, rejects))
    except READ_ERRORS as error:
        raise DataError(f"{shard} is refused: {unreadable(error)}.") from error


def _refuse(reject: Reject) -> None:
    if reject.reason != EMPTY:
        raise DataError(
            f"{visible(reject.file)} is refused: {visible(reject.reason)}. Restore it, or leave it out; "
            "`bigtx data prepare` lists such samples and reads the others."
        )


@dataclass(frozen=True)
class RowStream:
    """The endless rows of one worker of one rank.

    Attributes:
        seed: the seed of the run.
        worker, num_workers: the part of the rank's shards to read; `announce` passes it to webdataset's splits.
    """

    config: ForeignConfig
    sequence_length: int
    seed: int
    rank: int
    world_size: int
    worker: int
    num_workers: int

    def announce(self) -> None:
        """Write the rank and the worker into this process's environment, where webdataset's splits read them."""
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.world_size)}
        os.environ |= {"WORKER": str(self.worker), "NUM_WORKERS": str(self.num_workers)}

    def rows(self) -> Iterator[Row]:
        """Yield rows of sequence_length inputs with their labels; each begins with the last label of the previous row.

        Raises:
            DataError: a shard is refused, or there is no text.
        """
        tokenizer = Tokenizer.load(self.config.tokenizer)
        length, tokens, starts = self.sequence_length, np.empty(0, np.int32), np.empty(0, np.int64)
        for batch in in_batches(self._endless_texts(), len):
            ids, lengths = tokenizer.encode_documents(batch)
            starts = np.concatenate([starts, len(tokens) + np.cumsum(lengths) - lengths])
            tokens = np.concatenate([tokens, ids])
            num_rows = (len(tokens) - 1) // length
            for begin in range(0, num_rows * length, length):
                first, last = np.searchsorted(starts, (begin, begin + length + 1))
                yield tokens[begin : begin + length + 1].copy(), starts[first:last] - begin
            used = num_rows * length
            tokens, starts = tokens[used:].copy(), starts[np.searchsorted(starts, used) :] - used

    def _endless_texts(self) -> Iterator[str]:
        """Yield the texts of this worker's shards, epoch after epoch."""
        for epoch in itertools.count():
            is_empty = True
            for text in self._texts(epoch):
                is_empty = False
                yield text
            if is_empty:
                raise DataError("The shards of data.foreign.paths have no text: every sample is empty.")

    def _texts(self, epoch: int) -> Iterator[str]:
        """Yield the texts of this worker's shards in one epoch."""
        # Imported late, because it imports torch.
        from webdataset import filters
        from webdataset.shardlists import SimpleShardList, split_by_node, split_by_worker

        shards = SimpleShardList(expand(self.config.paths), seed=int(hash64(self.seed, epoch)[0]))
        own = split_by_worker(split_by_node(iter(shards)))
        texts = (text for shard in own for text in read_texts(shard["url"], self.config))
        size = self.config.shuffle_buffer
        if size < 2:
            return texts
        seed = int(hash64(self.seed, epoch, self.rank, self.worker)[0])
        shuffled: Iterator[str] = filters.shuffle(size, initial=size, seed=seed)(texts)
        return shuffled


def num_workers(config: ForeignConfig, world_size: int) -> int:
    """Return the number of workers of each rank: no more than it has shards."""
    return max(1, min(config.num_workers, len(expand(config.paths)) // world_size))
