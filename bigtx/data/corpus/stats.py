"""Statistics of a prepared corpus: for the terminal, and as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bigtx.data.corpus.inspect import counts, describe_lengths, describe_splits, length_bins, read_sample
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.corpus.splits import open_splits
from bigtx.data.storage.places import Place
from bigtx.utils.units import format_count, format_size

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
    rows = sorted(manifest.groups, key=lambda group: -int(group.get("tokens", 0)))
    names = [(_name(group.get("source")), _name(group.get("language"))) for group in rows]
    widths = [max(len(head), *(len(name[column]) for name in names)) for column, head in enumerate(_HEADS)]
    yield (
        f"{manifest.split + ', by source':<{widths[0]}}  {'language':<{widths[1]}}"
        f"{'documents':>13}{'tokens':>13}{'share':>9}{'text':>13}{'bytes/token':>13}"
    )
    for (source, language), group in zip(names, rows, strict=True):
        documents, tokens, num_bytes = (int(group.get(key, 0)) for key in ("documents", "tokens", "bytes"))
        yield (
            f"{source:<{widths[0]}}  {language:<{widths[1]}}{documents:>13,}{format_count(tokens):>13}"
            f"{tokens / max(1, manifest.num_tokens):>9.2%}{format_size(num_bytes):>13}"
            f"{num_bytes / max(1, tokens):>13.2f}"
        )


_HEADS = ("validation, by source", "language")


def _name(value: object) -> str:
    return "not known" if value is None else str(value)
