"""The description and the statistics of a prepared corpus, as text for the terminal and as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigtx.data.corpus.blocks import load_tokenizer, open_reader, open_splits
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.storage.places import Place
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError
from bigtx.utils.terminal import table
from bigtx.utils.units import format_count, format_size

_BLOCKS_READ = 64
"""Blocks that lengths and samples are taken from; documents are shuffled, so these are a random part of the corpus."""
_BAR_WIDTH = 40
_SAMPLE_CHARACTERS = 600


def describe(place: Place, *, split: str, num_samples: int, seed: int) -> Iterator[str]:
    """Yield lines that describe a corpus: its splits and shards, lengths of documents, decoded samples of one split.

    Raises:
        DataError: it is not a complete corpus.
    """
    manifests = open_splits(place)
    chosen = _choose(place, manifests, split)
    yield from describe_splits(manifests)
    yield ""
    yield f"{chosen.vocab_size:,} ids of tokenizer {chosen.tokenizer_fingerprint[:12]}, {chosen.dtype.name} on disk"
    yield from _describe_shards(chosen)
    sample = read_sample(chosen)
    yield ""
    yield from describe_lengths(chosen, sample.lengths)
    tokenizer = load_tokenizer(place, chosen.tokenizer_fingerprint)
    for number in _draw(sample, num_samples, seed):
        yield ""
        yield from _describe_document(sample, number, tokenizer)


def facts(place: Place, *, split: str, num_samples: int, seed: int) -> dict[str, Any]:
    """Return the description as plain data; samples are not shortened.

    Raises:
        DataError: it is not a complete corpus.
    """
    manifests = open_splits(place)
    chosen = _choose(place, manifests, split)
    sample = read_sample(chosen)
    tokenizer = load_tokenizer(place, chosen.tokenizer_fingerprint)
    samples = [(number, sample.document(number).tolist()) for number in _draw(sample, num_samples, seed)]
    return {
        "corpus": str(place),
        "splits": [counts(manifest) for manifest in manifests],
        "split": split,
        "shards": [
            {"path": str(chosen.folder / shard.name), "bytes": shard.size, "sha256": shard.sha256}
            for shard in chosen.shards
        ],
        "samples": [
            {"document": number, "tokens": len(ids) + 1, "text": tokenizer.decode(ids)} for number, ids in samples
        ],
    }


def counts(manifest: Manifest) -> dict[str, Any]:
    """Return the counts of a split's manifest, as plain data."""
    return {
        "split": manifest.split,
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "bytes": manifest.num_bytes,
        "bytes_per_token": manifest.bytes_per_token,
        "blocks": len(manifest.blocks),
        "shards": len(manifest.shards),
        "bytes_on_disk": sum(shard.size for shard in manifest.shards),
        "vocab_size": manifest.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
    }


def _choose(place: Place, manifests: list[Manifest], split: str) -> Manifest:
    chosen = next((manifest for manifest in manifests if manifest.split == split), None)
    if chosen is None:
        raise DataError(f"{place} has no split {split!r}; it has {' and '.join(m.split for m in manifests)}.")
    return chosen


def _draw(sample: Sample, num_samples: int, seed: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).permutation(len(sample.lengths))[:num_samples].tolist()
    return drawn


def describe_splits(manifests: list[Manifest]) -> Iterator[str]:
    """Yield a table of splits."""
    heads = ("", "documents", "tokens", "text", "bytes/token", "blocks", "shards", "on disk")
    rows = [
        (
            manifest.split,
            f"{manifest.num_documents:,}",
            format_count(manifest.num_tokens),
            format_size(manifest.num_bytes),
            f"{manifest.bytes_per_token:.2f}",
            f"{len(manifest.blocks):,}",
            f"{len(manifest.shards):,}",
            format_size(sum(shard.size for shard in manifest.shards)),
        )
        for manifest in manifests
    ]
    yield from table([heads, *rows])


def _describe_shards(manifest: Manifest) -> Iterator[str]:
    shown = manifest.shards if len(manifest.shards) <= 8 else manifest.shards[:6]
    for shard in shown:
        yield f"  {manifest.folder / shard.name}  {format_size(shard.size)}  sha256 {shard.sha256[:12]}"
    if len(shown) < len(manifest.shards):
        yield f"  and {len(manifest.shards) - len(shown):,} more"


@dataclass(frozen=True)
class Sample:
    """The documents that are complete in the first blocks of a split.

    Attributes:
        tokens: the tokens of the blocks.
        bounds: int64 [documents + 1], where in them each document starts, and where the last one ends.
    """

    tokens: np.ndarray
    bounds: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, its end included: [documents]."""
        return np.diff(self.bounds)

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of a document, without its end."""
        return self.tokens[self.bounds[number] : self.bounds[number + 1] - 1]


def read_sample(manifest: Manifest) -> Sample:
    """Return the first blocks of a split; this is quick for a corpus of any size."""
    reader = open_reader(manifest)
    numbers = range(min(_BLOCKS_READ, len(manifest.blocks)))
    reader.expect(numbers)
    blocks = [reader.block(number) for number in numbers]
    reader.close()
    tokens = np.concatenate([tokens for tokens, _ in blocks])
    before = np.cumsum([0, *(len(tokens) for tokens, _ in blocks)])
    starts = [starts + begin for begin, (_, starts) in zip(before.tolist(), blocks, strict=False)]
    bounds = np.concatenate([*starts, [len(tokens)] if len(blocks) == len(manifest.blocks) else []])
    return Sample(tokens, bounds.astype(np.int64))


def length_bins(lengths: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield the counts of lengths between powers of two: (from, to, documents)."""
    bins = np.floor(np.log2(lengths)).astype(int)
    for exponent, count in enumerate(np.bincount(bins).tolist()):
        if exponent >= bins.min():
            yield 2**exponent, 2 ** (exponent + 1) - 1, count


def describe_lengths(manifest: Manifest, lengths: np.ndarray) -> Iterator[str]:
    """Yield the mean, the quartiles and a histogram of documents' tokens."""
    part = "" if len(lengths) == manifest.num_documents else f" (of {len(lengths):,} documents)"
    if len(lengths) == 0:
        yield "No document is complete in the blocks that were read."
        return
    named = zip(("shortest", "25 %", "median", "75 %", "longest"), np.percentile(lengths, _QUANTILES), strict=True)
    quartiles = "  ".join(f"{name} {value:,.0f}" for name, value in named)
    yield f"Tokens of a document in {manifest.split}{part}: mean {lengths.mean():,.0f}  {quartiles}"
    bins = list(length_bins(lengths))
    largest = max(count for _, _, count in bins)
    for low, high, count in bins:
        yield f"  {low:>11,} to {high:>11,} {count:>11,} {'█' * round(_BAR_WIDTH * count / largest)}".rstrip()


def _describe_document(sample: Sample, number: int, tokenizer: Tokenizer) -> Iterator[str]:
    tokens = sample.document(number)
    text = tokenizer.decode(tokens.tolist())
    yield f"--- document {number}: {len(tokens) + 1:,} tokens, {len(text.encode()):,} bytes"
    yield text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + " ..."


_QUANTILES = (0, 25, 50, 75, 100)


def statistics(place: Place) -> dict[str, Any]:
    """Return the figures of a corpus as plain data.

    Returns:
        Per split: counts, tokens and documents by source and language if they are known, and the lengths of the
        documents in its first blocks, which are a random part of it.

    Raises:
        DataError: it is not a complete corpus.
    """
    return {"corpus": str(place), "splits": [_of_split(manifest) for manifest in open_splits(place)]}


def describe_statistics(place: Place) -> Iterator[str]:
    """Yield the statistics as lines.

    Raises:
        DataError: it is not a complete corpus.
    """
    manifests = open_splits(place)
    yield from describe_splits(manifests)
    for manifest in manifests:
        if manifest.groups:
            yield ""
            yield from _describe_groups(manifest)
    for manifest in manifests:
        yield ""
        yield from describe_lengths(manifest, read_sample(manifest).lengths)


def _of_split(manifest: Manifest) -> dict[str, Any]:
    lengths = read_sample(manifest).lengths
    figures = counts(manifest) | {"groups": manifest.groups}
    if len(lengths):
        figures["lengths"] = {
            "documents_read": len(lengths),
            "mean": float(lengths.mean()),
            "quantiles": {
                str(quantile): float(value)
                for quantile, value in zip(_QUANTILES, np.percentile(lengths, _QUANTILES), strict=True)
            },
            "histogram": [{"from": low, "to": high, "documents": count} for low, high, count in length_bins(lengths)],
        }
    return figures


def _describe_groups(manifest: Manifest) -> Iterator[str]:
    """Yield a table of sources and languages, the largest first."""
    rows = [(f"{manifest.split}, by source", "language", "documents", "tokens", "share", "text", "bytes/token")]
    for group in sorted(manifest.groups, key=lambda group: -int(group.get("tokens", 0))):
        source, language = (
            "not known" if group.get(key) is None else str(group[key]) for key in ("source", "language")
        )
        documents, tokens, num_bytes = (int(group.get(key, 0)) for key in ("documents", "tokens", "bytes"))
        share, ratio = f"{tokens / max(1, manifest.num_tokens):.2%}", f"{num_bytes / max(1, tokens):.2f}"
        rows.append((source, language, f"{documents:,}", format_count(tokens), share, format_size(num_bytes), ratio))
    yield from table(rows, left=2)
