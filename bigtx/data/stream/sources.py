"""The corpora of a run, opened, and the checks that they fit the run and each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigtx.config.schema import DataConfig, SourceConfig
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.storage.places import Cache, as_place
from bigtx.data.stream.mixture import Phase
from bigtx.data.stream.order import Order, SkippedWindows, SourceOrder, rows_of_blocks
from bigtx.utils.errors import DataError


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture, opened."""

    name: str
    config: SourceConfig
    manifest: Manifest


def open_sources(data: DataConfig) -> list[Source]:
    """Open the training split of each source with a weight in some phase, sorted by name.

    So the order of a config file has no effect.

    Raises:
        DataError: a source is missing, unfinished or damaged; one message lists all of them.
    """
    cache = Cache(data.cache_dir, data.cache_size)
    opened, problems = [], []
    for name, config in sorted(data.sources.items()):
        if not config.weight and not any(phase.weights.get(name) for phase in data.phases.values()):
            continue
        try:
            opened.append(Source(name, config, Manifest.load(as_place(config.path, cache) / "train")))
        except DataError as error:
            problems.append(f"data.sources.{name}: {error}")
    if not opened and not problems:
        problems.append(
            "data.sources names no source with a weight above 0; give one as data.sources.NAME.path=FOLDER, "
            "with a folder written by `bigtx data prepare`."
        )
    if problems:
        raise DataError("\n".join(problems))
    return opened


def make_order(data: DataConfig, sources: list[Source], *, sequence_length: int, seed: int) -> Order:
    """Return the global order of a run over opened sources.

    Raises:
        DataError: the phases cannot be mixed exactly.
    """
    rows = [rows_of_blocks(source.manifest.blocks["tokens"], sequence_length) for source in sources]
    parts = [SourceOrder(source.name, block_rows) for source, block_rows in zip(sources, rows, strict=True)]
    phases = [Phase(0, [source.config.weight for source in sources])]
    for phase in sorted(data.phases.values(), key=lambda phase: phase.start or 0):
        start = -(-(phase.start or 0) // sequence_length)
        weights = [phase.weights.get(source.name, source.config.weight) for source in sources]
        phases.append(Phase(start, weights))
    return Order(parts, phases, seed)


def rows_read(data: DataConfig, order: Order, num_sequences: int) -> list[int]:
    """Return how many rows of each source a run of `num_sequences` sequences reads, without those of data.skip."""
    if num_sequences == 0:
        return [0] * len(order.sources)
    skipped = SkippedWindows(data.skip)
    end = skipped.after(0, num_sequences)
    bounds = [(0, end), *((stop, start) for start, stop in skipped.before(end))]
    counts = [np.subtract(order.mixture.counts(stop), order.mixture.counts(start)) for start, stop in bounds]
    return [int(count) for count in np.sum(counts, axis=0)]


def epochs(data: DataConfig, sources: list[Source], *, sequence_length: int, num_sequences: int) -> list[float]:
    """Return how often a run of `num_sequences` sequences reads each of the sources."""
    order = make_order(data, sources, sequence_length=sequence_length, seed=0)
    read = rows_read(data, order, num_sequences)
    return [count / part.num_rows for part, count in zip(order.sources, read, strict=True)]


def check_sources(
    data: DataConfig,
    *,
    sequence_length: int,
    num_sequences: int | None = None,
    tokenizer_fingerprint: str | None = None,
) -> list[Source]:
    """Open the training split of all sources and refuse those that cannot be used for training.

    Args:
        sequence_length: tokens T of a row.
        num_sequences: sequences that the run reads, for `max_epochs`; None disables the check of repetition.
        tokenizer_fingerprint: the tokenizer that the sources must have; None: any, but the same for all.

    Raises:
        DataError: a source is missing or damaged, has no row, has another tokenizer, or would repeat too often.
    """
    sources = open_sources(data)
    problems = [_without_rows(source) for source in sources if _num_rows(source, sequence_length) == 0]
    expected = tokenizer_fingerprint or sources[0].manifest.tokenizer_fingerprint
    problems += [
        _other_tokenizer(source, expected) for source in sources if source.manifest.tokenizer_fingerprint != expected
    ]
    if not problems and num_sequences is not None:
        problems += _too_many_epochs(data, sources, sequence_length, num_sequences)
    if problems:
        raise DataError("\n".join(problems))
    return sources


def _num_rows(source: Source, sequence_length: int) -> int:
    return int(rows_of_blocks(source.manifest.blocks["tokens"], sequence_length).sum())


def _without_rows(source: Source) -> str:
    return (
        f"data.sources.{source.name}: {source.manifest.folder} has {source.manifest.num_tokens} tokens, "
        "too few for one row. Prepare more text."
    )


def _other_tokenizer(source: Source, expected: str) -> str:
    return (
        f"data.sources.{source.name}: {source.manifest.folder} was tokenized with another tokenizer "
        f"(fingerprint {source.manifest.tokenizer_fingerprint[:12]}) than this run uses ({expected[:12]}). "
        "Prepare it again with the run's tokenizer."
    )


def _too_many_epochs(data: DataConfig, sources: list[Source], sequence_length: int, num_sequences: int) -> list[str]:
    order = make_order(data, sources, sequence_length=sequence_length, seed=0)
    problems = []
    for source, part, count in zip(sources, order.sources, rows_read(data, order, num_sequences), strict=True):
        limit = source.config.max_epochs
        if limit is not None and count > limit * part.num_rows:
            problems.append(
                f"data.sources.{source.name}: the run would read {count:,} rows of it, {count / part.num_rows:.2f} "
                f"epochs of {part.num_rows:,} rows, but max_epochs allows {limit:g}. Train for fewer steps, lower its "
                "weight, add data, or raise max_epochs."
            )
    return problems
