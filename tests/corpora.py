"""Prepared corpora: made of text by the commands that a user types, or of token ids; and shards that are damaged."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from doors import bigtx

from bigtx.data.corpus.manifest import Manifest, Shard
from bigtx.data.corpus.shards import ShardWriter, blocks_of_a_shard, token_dtype

END_ID = 3
SYLLABLES = [f"{a}{b}{c}" for a in "bdklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]
"""The words of `make_corpus`."""


def make_corpus(folder: Path, *changes: str) -> Path:
    """Make a small corpus of 300 documents by `bigtx tokenizer train` and `bigtx data prepare`. Returns its folder.

    Args:
        changes: settings of `bigtx data prepare`.
    """
    generator = random.Random(1)
    for number in range(300):
        sentences = (" ".join(generator.choices(SYLLABLES, k=generator.randrange(4, 12))) for _ in range(30))
        (folder / f"{number:03d}.txt").write_text(". ".join(sentences) + ".\n", encoding="utf-8")
    own = [f"tokenizer={folder / 'tokenizer'}", f"output={folder / 'data'}", "validation_fraction=0.05"]
    for arguments in (
        ["tokenizer", "train", f"input.paths=[{folder}]", f"output={folder / 'tokenizer'}", "vocab_size=512"],
        ["data", "prepare", f"input.paths=[{folder}]", *own, "block_tokens=4096", "num_processes=1", *changes],
    ):
        done = bigtx(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "data"


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a shard as other programs do."""
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def flip(place: int) -> Callable[[Path], None]:
    """Return a function that changes one bit of a file."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return change


def cut(num_bytes: int) -> Callable[[Path], None]:
    """Return a function that keeps only the beginning of a file."""

    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:num_bytes])

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "header": (flip(3), "Block|block"),
    "payload": (flip(900), "Block|block"),
    "member": (cut(2 * 1024 + 512), "instead of"),
    "inside": (cut(1000), "instead of"),
    "empty": (cut(0), "has 0 bytes instead of"),
    "missing": (Path.unlink, "is missing"),
}
"""Damage of a prepared shard, and words of the message about it."""


def write_split(
    folder: Path,
    parts: Iterable[list[np.ndarray]],
    *,
    split: str = "train",
    block_tokens: int,
    shard_size: int,
    vocab_size: int = 512,
    fingerprint: str = "f" * 64,
) -> Manifest:
    """Write a split as `bigtx data prepare` does, from documents that arrive in several parts."""
    folder.mkdir(parents=True)
    dtype = token_dtype(vocab_size)
    shards: list[Shard] = []
    rows: list[np.ndarray] = []
    num_tokens = num_documents = 0
    writer = ShardWriter(
        folder,
        dtype=dtype,
        block_tokens=block_tokens,
        shard_blocks=blocks_of_a_shard(shard_size, block_tokens, dtype),
        done=lambda _, shard, blocks: (shards.append(shard), rows.append(blocks)),
    )
    with writer:
        for documents in parts:
            lengths = np.array([len(document) for document in documents])
            writer.add(np.concatenate(documents), np.cumsum(lengths) - lengths)
            num_tokens += int(lengths.sum())
            num_documents += len(documents)
        writer.finish()
    manifest = Manifest(
        folder=folder,
        split=split,
        dtype=dtype,
        vocab_size=vocab_size,
        end_id=END_ID,
        tokenizer_fingerprint=fingerprint,
        block_tokens=block_tokens,
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_bytes=4 * num_tokens,
        shards=tuple(shards),
        blocks=np.concatenate(rows),
        recipe={"seed": 1},
    )
    manifest.save()
    return manifest
