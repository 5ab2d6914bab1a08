"""Readers of a prepared corpus, local or remote (format: see manifest.py): its splits, its tokenizer, and the blocks of
a split, which are mapped from local shards or fetched by range.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import re
import resource
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from bigtx.data.corpus.manifest import AGAIN, DOCS_DTYPE, MEMBER_HEADER_BYTES, SPLITS, Manifest, has_split
from bigtx.data.storage.places import TRIES, Content, DamagedError, Place, RemotePath, map_file
from bigtx.tokenizer.special import DESCRIPTION, MODEL_FILES
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError
from bigtx.utils.files import json_value, kind_of_folder

TOKENIZER = "tokenizer"


def open_splits(place: Place) -> list[Manifest]:
    """Return the splits that a corpus has.

    Raises:
        DataError: it has none, or one that is not complete.
    """
    names = [name for name in SPLITS if has_split(place, name)]
    if not names:
        exists = isinstance(place, RemotePath) or place.is_dir()
        kind = None if isinstance(place, RemotePath) else kind_of_folder(place)
        lacks = f"has no split {' or '.join(SPLITS)}" if exists else "does not exist"
        what = f"is {kind}" if kind else lacks
        raise DataError(f"{place} is not a prepared corpus: it {what}. Name a folder written by `bigtx data prepare`.")
    return [Manifest.load(place / name) for name in names]


def load_tokenizer(place: Place, fingerprint: str) -> Tokenizer:
    """Return the tokenizer of a corpus; a remote one is fetched once and kept on this machine.

    Args:
        fingerprint: the tokenizer's fingerprint in the corpus's manifests.

    Raises:
        DataError: it is missing or damaged, or is not the one that the corpus was tokenized with.
    """
    if isinstance(place, RemotePath):
        return _fetch_tokenizer(place / TOKENIZER, fingerprint)
    if not (place / TOKENIZER).is_dir():
        raise DataError(
            f"{place / TOKENIZER} is missing: the tokenizer that the corpus was prepared with (fingerprint "
            f"{fingerprint[:12]}); copy it there again from where it came."
        )
    tokenizer = Tokenizer.load(place / TOKENIZER)
    _check(tokenizer, place / TOKENIZER, fingerprint)
    return tokenizer


def _check(tokenizer: Tokenizer, place: Place, fingerprint: str) -> None:
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"{place} is not the tokenizer that its corpus was prepared with (fingerprint "
            f"{tokenizer.fingerprint[:12]}, expected {fingerprint[:12]}); copy it again from where it came."
        )


def _fetch_tokenizer(place: RemotePath, fingerprint: str) -> Tokenizer:
    if not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise DataError(f"{place}: the manifest's tokenizer_fingerprint {fingerprint!r} is damaged.")
    kept = place.cache.folder / "tokenizers" / fingerprint
    # Missing, or damaged: it is fetched again.
    with contextlib.suppress(DataError):
        tokenizer = Tokenizer.load(kept)
        _check(tokenizer, kept, fingerprint)
        return tokenizer
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            tokenizer = _download(place, Path(folder) / TOKENIZER)
            _check(tokenizer, place, fingerprint)
            shutil.rmtree(kept, ignore_errors=True)
            # Another process may have fetched it meanwhile.
            with contextlib.suppress(FileExistsError, OSError):
                (Path(folder) / TOKENIZER).rename(kept)
    except OSError as error:
        raise DataError(
            f"{kept.parent} cannot keep the tokenizer of {place} ({error.strerror}); make it writable, or set another "
            "data.cache_dir."
        ) from error
    return tokenizer


def _download(place: RemotePath, folder: Path) -> Tokenizer:
    """Return a remote tokenizer's two files, in a new folder."""
    folder.mkdir()
    try:
        description = (place / DESCRIPTION).read_bytes()
        try:
            kind = json_value(description)["kind"]
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{place / DESCRIPTION} is damaged; copy the tokenizer again from where it came.") from None
        # The file's name follows from the kind; no path comes from the description.
        name = MODEL_FILES["huggingface" if kind == "huggingface" else "sentencepiece"]
        (folder / name).write_bytes((place / name).read_bytes())
        (folder / DESCRIPTION).write_bytes(description)
    except FileNotFoundError as error:
        raise DataError(f"The tokenizer at {place} is not complete; copy the corpus with its tokenizer.") from error
    return Tokenizer.load(folder)


WINDOW_BLOCKS = 64
"""Blocks whose rows are shuffled together: 16 million tokens, 32 MiB, with blocks of the usual size."""
CACHED_BLOCKS = 2 * WINDOW_BLOCKS
"""Blocks whose views a reader keeps: two windows of the order. Each may hold one file descriptor."""
FETCHES_AT_ONCE = 16
"""Remote blocks that one reader fetches at the same time."""


class BlockReader:
    """A reader of the blocks of a split from memory-mapped shards; each block is verified when it is first read."""

    def __init__(self, manifest: Manifest) -> None:
        _allow_open_files()
        self.manifest = manifest
        self.block = functools.lru_cache(maxsize=CACHED_BLOCKS)(self._read_block)
        self._shard = functools.lru_cache(maxsize=CACHED_BLOCKS // 8)(self._map_shard)
        self._verified = np.zeros(len(manifest.blocks), dtype=bool)

    def expect(self, blocks: Iterable[int]) -> None:
        """Accept the blocks that will be read soon. Mapped shards need no preparation."""

    def close(self) -> None:
        """Stop fetching."""

    def _read_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and the document starts of a block.

        Returns:
            tokens: [n] read-only view of the shard, in the manifest's dtype.
            starts: [documents] uint32, ascending; a document that began in an earlier block has no entry.

        Raises:
            DataError: the block's bytes are not those that were written.
        """
        record = self.manifest.blocks[block]
        content = self._shard(int(record["shard"]))
        if not self._verified[block]:
            self._verify(block, content)
        return block_views(self.manifest, block, content, int(record["offset"]))

    def _verify(self, block: int, content: mmap.mmap) -> None:
        begin, end = self.manifest.block_range(block)
        if not is_block(self.manifest, block, memoryview(content)[begin:end]):
            raise damaged_block(self.manifest, block, f"Copy the shard again from where it was prepared, or {AGAIN}.")
        self._verified[block] = True

    def _map_shard(self, shard: int) -> mmap.mmap:
        path = self.manifest.shard_path(shard)
        assert isinstance(path, Path)
        try:
            content = map_file(path)
        except (OSError, ValueError) as error:
            hint = "was the corpus moved or removed during the run?"
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                hint = "the limit of open files is too low for so many shards and sources: raise it (ulimit -Hn)."
            raise DataError(f"{path} cannot be read ({error}); {hint}") from error
        if len(content) != self.manifest.shards[shard].size:
            raise DataError(
                f"{path} has {len(content):,} bytes instead of {self.manifest.shards[shard].size:,}; "
                f"was it changed during the run? Restore it or {AGAIN}."
            )
        return content


class RemoteBlockReader(BlockReader):
    """A reader of the blocks of a split by range from remote shards, through the cache of this machine.

    Threads fetch the expected blocks, so that reading them later does not wait. A block is verified whenever it
    comes from the network or from the cache; a damaged one is fetched again once.
    """

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        assert isinstance(manifest.folder, RemotePath)
        self._cache = manifest.folder.cache
        self._pool = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="bigtx-fetch")
        self._given_up = threading.Event()
        self._coming: dict[int, Future[Content]] = {}
        self._read: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self.block = self._read_block  # type: ignore[assignment]

    def expect(self, blocks: Iterable[int]) -> None:
        """Start to fetch blocks that are not here yet, in their order, CACHED_BLOCKS at most."""
        for block in blocks:
            if block in self._read:
                self._read.move_to_end(block)
            elif block not in self._coming and len(self._coming) < CACHED_BLOCKS:
                self._coming[block] = self._pool.submit(self._fetch, block)

    def close(self) -> None:
        """Stop fetching, and do not wait for transfers in progress."""
        self._given_up.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        views = self._read.get(block)
        if views is None:
            coming = self._coming.pop(block, None)
            content = coming.result() if coming else self._fetch(block)
            views = block_views(self.manifest, block, content, MEMBER_HEADER_BYTES)
            self._read[block] = views
            if len(self._read) > CACHED_BLOCKS:
                self._read.popitem(last=False)
        return views

    def _fetch(self, block: int) -> Content:
        begin, end = self.manifest.block_range(block)
        shard = self.manifest.shard_path(int(self.manifest.blocks[block]["shard"]))
        assert isinstance(shard, RemotePath)
        try:
            # The table's hash covers all of the split's bytes, so a corpus that is prepared again shares no pieces.
            return self._cache.get(
                f"{self.manifest.blocks_sha256[:32]}/{block >> 12:x}/{block:x}",
                lambda: shard.read_bytes(begin, end, tries=TRIES, given_up=self._given_up),
                lambda content: is_block(self.manifest, block, content),
            )
        except DamagedError:
            advice = "It was fetched twice; check the shard on its own machine, with `bigtx data verify`."
            raise damaged_block(self.manifest, block, advice) from None
        except FileNotFoundError:
            raise DataError(f"{shard} is missing; was the corpus moved or removed during the run?") from None


def open_reader(manifest: Manifest) -> BlockReader:
    """Return the reader for the split's place."""
    return RemoteBlockReader(manifest) if isinstance(manifest.folder, RemotePath) else BlockReader(manifest)


def is_block(manifest: Manifest, block: int, content: Content | memoryview) -> bool:
    """Return whether the bytes have the checksum of the block table."""
    return xxhash.xxh3_64_intdigest(content) == int(manifest.blocks[block]["checksum"])


def block_views(manifest: Manifest, block: int, content: Content, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a block's tokens and document starts, as views of the bytes in which its token payload begins at
    `offset`.
    """
    record = manifest.blocks[block]
    tokens = np.frombuffer(content, manifest.dtype, int(record["tokens"]), offset)
    starts = np.frombuffer(content, DOCS_DTYPE, int(record["documents"]), offset + int(record["docs_offset"]))
    return tokens, starts


def damaged_block(manifest: Manifest, block: int, advice: str) -> DataError:
    """Return the error for a block whose bytes are not those that were written."""
    begin, end = manifest.block_range(block)
    path = manifest.shard_path(int(manifest.blocks[block]["shard"]))
    return DataError(
        f"Block {block} of {manifest.folder} is damaged: bytes {begin:,} to {end:,} of {path} are not those that were "
        f"written. {advice}"
    )


def _allow_open_files() -> None:
    """Raise this process's limit of open files as much as allowed: every mapped shard holds one, and 1024 is usual."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
