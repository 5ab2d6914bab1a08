"""The manifest of one prepared split: its content, the place of every block, and the settings that made it.

A split is a folder:

    manifest.json   written last, atomically: a split without one does not exist
    blocks.npy      the block table, one BLOCK_DTYPE record per block, little-endian
    000000.tar ...  shards: uncompressed tars, per block the members 000042.tokens.npy and 000042.docs.npy

A member is a tar header of 512 bytes, an npy header of 128 bytes, the payload, and zeros up to a multiple of 512. The
two members of a block follow each other, so a block is one contiguous range of its shard, and the table's byte
offsets make every token addressable without reading a header.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tokenize
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bigtx.data.storage.places import Content, DamagedError, Place, RemotePath, as_place, map_file
from bigtx.utils.errors import DataError
from bigtx.utils.files import SEAL, json_value, sha256_file, unsealed, write_sealed

FORMAT = "bigtx-blocks"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
MANIFEST_NAME = "manifest.json"
BLOCKS_NAME = "blocks.npy"
AGAIN = "remove the corpus's folder and prepare it again"
"""The advice for a damaged corpus; while its folder exists, `bigtx data prepare` does not change it."""
TAR_UNIT = 512
NPY_HEADER_BYTES = 128
MEMBER_HEADER_BYTES = TAR_UNIT + NPY_HEADER_BYTES
"""The tar header and the npy header in front of a payload."""

BLOCK_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # index into the manifest's shards
        ("tokens", "<u4"),  # tokens in the block
        ("documents", "<u4"),  # documents that start in the block
        ("docs_offset", "<u4"),  # bytes from the token payload's start to the docs payload's start
        ("offset", "<u8"),  # byte offset of the token payload in the shard
        ("checksum", "<u8"),  # xxh3_64 of the block's two members, headers and padding included
    ]
)
DOCS_DTYPE = np.dtype("<u4")
"""Starts of documents within their block, in tokens."""

_ASKED_SHARDS = 256
"""Remote shards whose sizes are checked when a split is opened, evenly spaced; the others are checked when read,
and `bigtx data verify` reads all of them."""
_ASKED_AT_ONCE = 32


def padded_size(num_bytes: int) -> int:
    """Return how many bytes a file of so many bytes takes in a tar, without its tar header."""
    return (num_bytes + TAR_UNIT - 1) // TAR_UNIT * TAR_UNIT


_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("split", "tokenizer_fingerprint"), str),
    **dict.fromkeys(("vocab_size", "end_id", "block_tokens", "num_tokens", "num_documents", "num_bytes"), int),
}
"""The fields of a manifest that its file has under the same names, and their types."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the split's folder, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a split.

    Attributes:
        folder: the split's folder; a URL is a RemotePath.
        split: its name, `train` or `validation`.
        dtype: the dtype of the tokens on disk, `<u2` or `<u4`.
        vocab_size, end_id, tokenizer_fingerprint: those of the tokenizer; every document ends with end_id.
        block_tokens: tokens of every block except the last.
        num_tokens, num_documents: counts over all blocks; end_id counts as a token of its document.
        num_bytes: UTF-8 bytes of the documents' text, the denominator of bits per byte.
        shards: in order.
        blocks: BLOCK_DTYPE records, in order; memory-mapped after `load`.
        recipe: the settings that made the split.
        groups: documents, tokens and bytes per `source` and `language`, if they are known.
        blocks_sha256: the hash of the block table, and so of all tokens and their order; "" before `save` and `load`.
    """

    folder: Place
    split: str
    dtype: np.dtype[Any]
    vocab_size: int
    end_id: int
    tokenizer_fingerprint: str
    block_tokens: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    shards: tuple[Shard, ...]
    blocks: np.ndarray = field(repr=False)
    recipe: dict[str, Any] = field(default_factory=dict, repr=False)
    groups: list[dict[str, Any]] = field(default_factory=list, repr=False)
    blocks_sha256: str = ""

    @property
    def bytes_per_token(self) -> float:
        """Return the UTF-8 bytes of text per token, the ends of documents counted as tokens."""
        return self.num_bytes / max(1, self.num_tokens)

    def shard_path(self, shard: int) -> Place:
        """Return the path or URL of a shard by its index."""
        return self.folder / self.shards[shard].name

    def block_range(self, block: int) -> tuple[int, int]:
        """Return the first byte of a block in its shard and the byte after the last: the range of its checksum."""
        record = self.blocks[block]
        docs = int(record["offset"]) + int(record["docs_offset"])
        docs_file = NPY_HEADER_BYTES + int(record["documents"]) * DOCS_DTYPE.itemsize
        return int(record["offset"]) - MEMBER_HEADER_BYTES, docs - NPY_HEADER_BYTES + padded_size(docs_file)

    def save(self) -> None:
        """Write the block table, then manifest.json: after that, the split exists."""
        assert isinstance(self.folder, Path)
        path = self.folder / BLOCKS_NAME
        np.save(path, self.blocks, allow_pickle=False)
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in _FIELDS},
            "dtype": self.dtype.str,
            "num_blocks": len(self.blocks),
            "blocks_sha256": sha256_file(path),
            "shards": [vars(shard) for shard in self.shards],
            "recipe": self.recipe,
        }
        if self.groups:
            content["groups"] = self.groups
        write_sealed(self.folder / MANIFEST_NAME, content)

    @staticmethod
    def load(folder: str | Place, *, check_shards: bool = True) -> Manifest:
        """Open a split and check everything that can be checked without reading its shards.

        Args:
            folder: a path, a URL, or the result of `as_place`.
            check_shards: whether to check the shards' sizes; `verify` reports them itself.

        Raises:
            DataError: no manifest, another format, a manifest or a block table that was changed, a shard missing or of
                another size, or a URL that cannot be read.
        """
        folder = as_place(folder)
        content = _read_content(folder)
        try:
            manifest = _from_content(folder, content)
        except (KeyError, TypeError, ValueError, OverflowError, tokenize.TokenError) as error:  # The last by numpy.
            path = folder / MANIFEST_NAME
            message = f"{path} is damaged ({type(error).__name__}: {error!s:.300}); {AGAIN}."
            raise DataError(message) from error
        name = str(folder).rpartition("/")[2]
        if name in SPLITS and manifest.split != name:
            raise DataError(
                f"{folder / MANIFEST_NAME} says that it is the split {manifest.split!r}: it was copied or renamed. "
                f"Restore it, or {AGAIN}."
            )
        if check_shards:
            check_sizes(manifest)
        _check_blocks(manifest)
        return manifest


def has_split(corpus: str | Place, split: str) -> bool:
    """Return whether a prepared corpus has this split (small ones may have no validation split)."""
    place = as_place(corpus) / split
    return (place / MANIFEST_NAME).is_file() if isinstance(place, RemotePath) else place.is_dir()


def _read_content(folder: Place) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(f"There is no prepared split at {folder}; `bigtx data prepare` writes one.")
    try:
        content = json_value(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{folder} has no {MANIFEST_NAME}: it is not a prepared split, or lost that file. Name a folder written "
            f"by `bigtx data prepare`; or restore the file, or {AGAIN}."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); {AGAIN}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of `bigtx data prepare` (its `format` is not {FORMAT!r}).")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, this bigtx reads version {FORMAT_VERSION}; "
            f"use the bigtx that wrote it, or {AGAIN}."
        )
    found = unsealed(content)
    if found is None:
        what = (
            f"does not have the hash that it contains (`{SEAL}`): it was changed or damaged since it was written"
            if SEAL in content
            else f"has no hash of itself (`{SEAL}`): it was written by an earlier bigtx, or changed since"
        )
        raise DataError(f"{path} {what}; restore it or {AGAIN}.")
    return found


def _from_content(folder: Place, content: dict[str, Any]) -> Manifest:
    shards = tuple(Shard(str(item["name"]), int(item["size"]), str(item["sha256"])) for item in content["shards"])
    for shard in shards:
        # Names come from a file: they must not lead out of the folder.
        if not re.fullmatch(r"\d{6,}\.tar", shard.name):
            raise ValueError(f"shard name {shard.name!r}")
    dtype = np.dtype(content["dtype"])
    if dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise ValueError(f"dtype {content['dtype']!r}")
    return Manifest(
        **{name: kind(content[name]) for name, kind in _FIELDS.items()},
        folder=folder,
        dtype=dtype,
        shards=shards,
        blocks=_load_blocks(folder / BLOCKS_NAME, str(content["blocks_sha256"]), int(content["num_blocks"])),
        recipe=dict(content["recipe"]),
        groups=[dict(group) for group in content.get("groups", [])],
        blocks_sha256=str(content["blocks_sha256"]),
    )


def _load_blocks(path: Place, sha256: str, num_blocks: int) -> np.ndarray:
    try:
        content = _fetch_table(path, sha256) if isinstance(path, RemotePath) else _map_table(path, sha256)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it or {AGAIN}.") from None
    except DamagedError:
        raise DataError(
            f"{path} was changed or damaged since it was written (its SHA-256 is not the manifest's); "
            f"restore it or {AGAIN}."
        ) from None
    # Not `np.load`: it also reads archives and pickles, and fails in other ways at each of them.
    start = io.BytesIO(content[:4096])
    if np.lib.format.read_magic(start) != (1, 0):
        raise ValueError(f"{BLOCKS_NAME} has another version")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(start)
    except Exception as error:  # numpy reads a header as Python's source, which fails in many ways.
        raise ValueError(f"{BLOCKS_NAME} has no header that can be read: {error}") from None
    if dtype != BLOCK_DTYPE or shape != (num_blocks,):
        raise ValueError(f"{BLOCKS_NAME} holds {shape} records of {dtype}")
    return np.frombuffer(content, dtype, num_blocks, start.tell())


def _map_table(path: Path, sha256: str) -> Content:
    if not path.is_file():
        raise FileNotFoundError
    if sha256_file(path) != sha256:
        raise DamagedError
    return map_file(path)


def _fetch_table(path: RemotePath, sha256: str) -> Content:
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"blocks_sha256 {sha256!r}")
    return path.cache.get(
        f"{sha256[:32]}/{BLOCKS_NAME}", path.read_bytes, lambda found: hashlib.sha256(found).hexdigest() == sha256
    )


def shard_problem(manifest: Manifest, shard: int) -> str | None:
    """Return the fault of a shard by its size, as a phrase that names it, or None for a shard without a fault."""
    path, expected = manifest.shard_path(shard), manifest.shards[shard].size
    try:
        size = path.size() if isinstance(path, RemotePath) else path.stat().st_size
    except OSError:
        return f"{path} is missing"
    except DataError as error:
        return str(error).rstrip(".")
    return f"{path} has {size:,} bytes instead of {expected:,}" if size != expected else None


def check_sizes(manifest: Manifest) -> None:
    """Check the sizes of the shards.

    Raises:
        DataError: shards are missing or have other sizes; of many remote ones, only some are checked.
    """
    count = len(manifest.shards)
    asked = min(count, _ASKED_SHARDS) if isinstance(manifest.folder, RemotePath) else count
    chosen = [number * count // asked for number in range(asked)]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        problems = [text for text in pool.map(functools.partial(shard_problem, manifest), chosen) if text]
    if problems:
        raise DataError(
            f"The shards of {manifest.folder} are not those of its manifest: {first_problems(problems)}. "
            f"Copy them again from where they were prepared, or {AGAIN}."
        )


def first_problems(problems: list[str]) -> str:
    """Return the first few of some problems, and the number of the others."""
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _check_blocks(manifest: Manifest) -> None:
    blocks = manifest.blocks
    if len(blocks) == 0 or blocks["shard"].max() >= len(manifest.shards):
        raise DataError(f"{manifest.folder} lists no block that its shards have; {AGAIN}.")
    sizes = np.array([shard.size for shard in manifest.shards], dtype=np.uint64)
    # In pieces: the temporary arrays would be larger than the table of a large corpus.
    pieces = (blocks[begin : begin + (1 << 16)] for begin in range(0, len(blocks), 1 << 16))
    if not all(_lies_within(piece, sizes, manifest.dtype) for piece in pieces):
        raise DataError(f"{manifest.folder / BLOCKS_NAME} points to places outside its shards; {AGAIN}.")
    counts = int(blocks["tokens"].sum(dtype=np.int64)), int(blocks["documents"].sum(dtype=np.int64))
    if counts != (manifest.num_tokens, manifest.num_documents):
        raise DataError(f"{manifest.folder}: the block table and the manifest have different counts; {AGAIN}.")


def _lies_within(blocks: np.ndarray, sizes: np.ndarray, dtype: np.dtype[Any]) -> bool:
    token_bytes = blocks["tokens"].astype(np.uint64) * np.uint64(dtype.itemsize)
    docs_bytes = blocks["documents"].astype(np.uint64) * np.uint64(DOCS_DTYPE.itemsize)
    good = blocks["offset"] + blocks["docs_offset"] + docs_bytes <= sizes[blocks["shard"]]
    good &= token_bytes <= blocks["docs_offset"]
    good &= (blocks["offset"] >= MEMBER_HEADER_BYTES) & (blocks["offset"] % np.uint64(4) == 0)
    return bool(good.all())
