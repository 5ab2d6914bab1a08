"""The whole promise at once: real shards, a mixture in two phases, and every way to read it gives the same list."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from corpora import write_split

from bigtx.config.schema import DataConfig, PhaseConfig, SourceConfig
from bigtx.data.stream.loader import Division, TrainLoader
from bigtx.data.stream.order import check_sources, epochs, make_order

LENGTH, BLOCK, GLOBAL_BATCH, NUM_STEPS = 16, 256, 192, 8
TOKENS = {"books": 9_000, "code": 2_001, "web": 21_700}
SECOND_PHASE = 643  # Within a step.
SHARES = {
    "books": (Fraction(3, 10), Fraction(1, 16)),
    "code": (Fraction(1, 10), Fraction(15, 16)),
    "web": (Fraction(6, 10), Fraction(0)),
}


def first_id(name: str) -> int:
    """Every token of the three sources has an id of its own, so that a row tells where it was read."""
    return 4 + list(TOKENS).index(name) * 21_844


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("sources")
    for name, num_tokens in TOKENS.items():
        tokens = first_id(name) + np.arange(num_tokens)
        documents = np.split(tokens, range(50, num_tokens, 50))
        write_split(folder / name / "train", [documents], block_tokens=BLOCK, shard_size=4096, vocab_size=1 << 16)
    return DataConfig(
        sources={name: SourceConfig(path=str(folder / name), weight=float(share[0])) for name, share in SHARES.items()},
        phases={"late": PhaseConfig(start=SECOND_PHASE * LENGTH - 5, weights={"web": 0.0, "code": 4.5})},
    )


def read(
    data: DataConfig, *, world_size: int, micro_batch_size: int, start: int = 0, num_steps: int = NUM_STEPS
) -> tuple[list[tuple[int, int]], int]:
    """(number, first token) of each sequence, in the order of the global batches, and the position after them."""
    loaders = [
        TrainLoader(
            data,
            Division(
                global_batch_size=GLOBAL_BATCH, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size
            ),
            sequence_length=LENGTH,
            seed=5,
            start_sequence=start,
            pad_id=0,
        )
        for rank in range(world_size)
    ]
    found = []
    for _, loader in itertools.product(range(num_steps), loaders):
        for batch in next(loader):
            assert batch.tokens.shape == (micro_batch_size, LENGTH)
            # Ids follow each other, so every label is its token's successor; only a source's last row is shorter.
            whole = batch.labels >= 0
            assert (batch.labels[whole] == batch.tokens[whole] + 1).all()
            assert (batch.tokens[whole].diff() == 1).sum() >= whole.sum() - micro_batch_size
            found += list(zip(batch.sequence_ids.tolist(), batch.tokens[:, 0].tolist(), strict=True))
    (position,) = {loader.next_sequence for loader in loaders}
    for loader in loaders:
        loader.close()
    return found, position


@pytest.fixture(scope="module")
def reference(data: DataConfig) -> list[tuple[int, int]]:
    return read(data, world_size=1, micro_batch_size=1)[0]


def by_source(sequences: list[tuple[int, int]]) -> dict[str, list[int]]:
    """Each source's tokens, counted from its first one, where its rows begin."""
    return {
        name: [token - first_id(name) for _, token in sequences if 0 <= token - first_id(name) < num_tokens]
        for name, num_tokens in TOKENS.items()
    }


SLOW = pytest.mark.slow


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW), 8])
@pytest.mark.parametrize("micro_batch_size", [1, pytest.param(2, marks=SLOW), 8])
@pytest.mark.parametrize("prefetch_batches", [0, 3])
def test_ranks_micro_batches_reading_ahead_and_resumes_change_nothing(
    data: DataConfig,
    reference: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    micro_batch_size: int,
    prefetch_batches: int,
) -> None:
    monkeypatch.setattr(data, "prefetch_batches", prefetch_batches)
    whole, _ = read(data, world_size=world_size, micro_batch_size=micro_batch_size)
    assert whole == reference
    # Stopped after three steps, and gone on with another number of ranks.
    first, position = read(data, world_size=world_size, micro_batch_size=micro_batch_size, num_steps=3)
    others = {1: 4, 2: 8, 3: 1, 4: 3, 8: 2}
    rest, _ = read(data, world_size=others[world_size], micro_batch_size=2, start=position, num_steps=NUM_STEPS - 3)
    assert first + rest == reference


def test_every_epoch_has_each_sequence_once(reference: list[tuple[int, int]]) -> None:
    assert [number for number, _ in reference] == list(range(NUM_STEPS * GLOBAL_BATCH))
    for name, begins in by_source(reference).items():
        blocks = range(0, TOKENS[name], BLOCK)
        rows = [begin for block in blocks for begin in range(block, min(block + BLOCK, TOKENS[name]) - 1, LENGTH)]
        for epoch in range(0, len(begins), len(rows)):
            drawn = begins[epoch : epoch + len(rows)]
            assert len(set(drawn)) == len(drawn) and set(drawn) <= set(rows)
            assert len(drawn) < len(rows) or sorted(drawn) == rows
    code = by_source(reference)["code"]
    assert len(code) > 5 * 125 and code[:125] != code[125:250]


def test_no_prefix_is_off_by_more_than_two_sequences(reference: list[tuple[int, int]]) -> None:
    counts, ideal = dict.fromkeys(TOKENS, 0), dict.fromkeys(TOKENS, Fraction(0))
    for number, token in reference:
        for name, shares in SHARES.items():
            counts[name] += 0 <= token - first_id(name) < TOKENS[name]
            ideal[name] += shares[number >= SECOND_PHASE]
            assert abs(counts[name] - ideal[name]) <= 2, (number, name)
    assert sum(counts.values()) == len(reference)


@pytest.mark.parametrize("world_size", [1, 4])
def test_skipped_windows_leave_the_others_as_they_were(
    data: DataConfig, reference: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    # Across a step's border, a whole step and more, and within one.
    monkeypatch.setattr(data, "skip", ["180-200", "400-700", "1_100-1.101k"])
    left = [(n, token) for n, token in reference if not (180 <= n < 200 or 400 <= n < 700 or n == 1100)]
    whole, position = read(data, world_size=world_size, micro_batch_size=2, num_steps=6)
    assert whole == left[: 6 * GLOBAL_BATCH]
    assert position == whole[-1][0] + 1 == 6 * GLOBAL_BATCH + 321
    first, position = read(data, world_size=world_size, micro_batch_size=2, num_steps=2)
    assert position == 404 + 300
    rest, _ = read(data, world_size=2, micro_batch_size=8, start=position, num_steps=4)
    assert first + rest == whole
    # What a run reads of each source counts against max_epochs, what it passes over does not.
    sources = check_sources(data, sequence_length=LENGTH)
    repeated = epochs(data, sources, sequence_length=LENGTH, num_sequences=6 * GLOBAL_BATCH)
    rows = [(tokens // BLOCK) * BLOCK // LENGTH + -(-(tokens % BLOCK - 1) // LENGTH) for tokens in TOKENS.values()]
    assert repeated == [len(begins) / count for begins, count in zip(by_source(whole).values(), rows, strict=True)]


def test_a_source_that_no_phase_reads_is_not_opened(data: DataConfig, tmp_path: Path) -> None:
    nowhere = {"gone": SourceConfig(path=str(tmp_path / "nowhere"), weight=0.0)}
    without = DataConfig(sources=data.sources | nowhere, phases=data.phases)
    assert [source.name for source in check_sources(without, sequence_length=LENGTH)] == list(TOKENS)


@pytest.mark.parametrize(("start", "first"), [(3 * LENGTH, 3), (3 * LENGTH + 1, 4), (10**12 * LENGTH, 10**12)])
def test_a_phase_begins_with_a_whole_sequence(data: DataConfig, start: int, first: int) -> None:
    sources = {"books": data.sources["books"], "web": SourceConfig(path=data.sources["web"].path, weight=0.0)}
    phases = {"late": PhaseConfig(start=start, weights={"books": 0.0, "web": 1.0})}
    switched = DataConfig(sources=sources, phases=phases)
    order = make_order(switched, check_sources(switched, sequence_length=LENGTH), sequence_length=LENGTH, seed=1)
    assert order.places(np.arange(first - 2, first + 2)).source.tolist() == [0, 0, 1, 1]
