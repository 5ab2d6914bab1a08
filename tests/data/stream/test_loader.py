"""The batches of a run: exact whatever the ranks, the micro batch and the place of the resume."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bigtx.config.schema import DataConfig, SourceConfig
from bigtx.data.corpus.blocks import BlockReader
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.stream.loader import Division, Prefetcher, TrainLoader, ValidationBatches
from bigtx.data.stream.order import check_sources, rows_of_blocks
from bigtx.data.stream.rows import IGNORED_LABEL, PADDING_SEQUENCE, Batch, RowFormat
from bigtx.utils.errors import DataError

END_ID = 3
LENGTH = 16
GLOBAL_BATCH = 8


@pytest.fixture
def data(tmp_path: Path, make_corpus) -> DataConfig:
    sources = {}
    for number, (name, weight) in enumerate({"web": 0.6, "books": 0.3, "code": 0.1}.items()):
        make_corpus(tmp_path / name, num_documents=20 + 10 * number, seed=number)
        sources[name] = SourceConfig(path=str(tmp_path / name), weight=weight)
    return DataConfig(sources=sources, document_mask=True)


def load(
    data: DataConfig,
    num_steps: int,
    *,
    world_size: int = 1,
    micro_batch_size: int = 2,
    start: int = 0,
    rank: int = 0,
    global_batch_size: int = GLOBAL_BATCH,
) -> list[list[Batch]]:
    loader = TrainLoader(
        data,
        Division(
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size
        ),
        sequence_length=LENGTH,
        seed=5,
        start_sequence=start,
        pad_id=0,
    )
    steps = [next(loader) for _ in range(num_steps)]
    assert loader.next_sequence == start + num_steps * global_batch_size
    assert loader.wait_seconds > 0
    loader.close()
    return steps


def fields(steps: list[list[Batch]], name: str) -> np.ndarray:
    return np.concatenate([getattr(batch, name).numpy() for step in steps for batch in step])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("prefetch_batches", [0, 3])
def test_the_global_list_is_the_same_for_any_ranks_micro_batch_and_start(
    data: DataConfig, world_size: int, micro_batch_size: int, prefetch_batches: int
) -> None:
    if GLOBAL_BATCH % (world_size * micro_batch_size):
        pytest.skip("does not divide")
    reference = load(data, 6)
    data.prefetch_batches = prefetch_batches
    for first_step in (0, 4):
        ranks = [
            load(
                data,
                6 - first_step,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                rank=rank,
                start=first_step * GLOBAL_BATCH,
            )
            for rank in range(world_size)
        ]
        for step in range(6 - first_step):
            of_step = [rank[step] for rank in ranks]
            for name in ("sequence_ids", "tokens", "labels", "positions", "segment_ids"):
                expected = fields([reference[first_step + step]], name)
                assert np.array_equal(fields(of_step, name), expected), name
        assert fields(reference, "sequence_ids").tolist() == list(range(6 * GLOBAL_BATCH))


def test_the_order_of_the_config_file_decides_nothing(data: DataConfig) -> None:
    turned = DataConfig(sources=dict(reversed(data.sources.items())), document_mask=True)
    assert np.array_equal(fields(load(data, 3), "tokens"), fields(load(turned, 3), "tokens"))


@pytest.mark.parametrize("document_mask", [False, True])
def test_an_epoch_predicts_every_token_but_each_blocks_first(tmp_path: Path, make_corpus, document_mask: bool) -> None:
    make_corpus(tmp_path)
    manifest = Manifest.load(tmp_path / "train")
    data = DataConfig(sources={"web": SourceConfig(path=str(tmp_path))}, document_mask=document_mask)
    num_rows = sum((int(tokens) - 1 + LENGTH - 1) // LENGTH for tokens in manifest.blocks["tokens"])
    steps = load(data, num_rows, global_batch_size=1, micro_batch_size=1)
    labels = fields(steps, "labels")
    reader = BlockReader(manifest)
    blocks = [reader.block(block) for block in range(len(manifest.blocks))]
    if document_mask:
        expected = [np.delete(tokens, np.union1d(starts, [0])) for tokens, starts in blocks]
    else:
        expected = [tokens[1:] for tokens, _ in blocks]
    assert sorted(labels[labels != IGNORED_LABEL].tolist()) == sorted(np.concatenate(expected).tolist())


def test_documents_are_kept_apart(data: DataConfig) -> None:
    steps = load(data, 6)
    tokens, labels = fields(steps, "tokens"), fields(steps, "labels")
    positions, segments = fields(steps, "positions"), fields(steps, "segment_ids")
    assert (positions[:, 0] == 0).all() and (segments[:, 0] == 0).all()
    for row in range(len(tokens)):
        for place in range(1, LENGTH):
            begins = segments[row, place] != segments[row, place - 1]
            assert positions[row, place] == (0 if begins else positions[row, place - 1] + 1)
            padding = tokens[row, place - 1] == 0
            # A document begins after every end of text; padding, once begun, is one segment.
            assert padding or begins == (tokens[row, place - 1] == END_ID or tokens[row, place] == 0)
            assert not begins or labels[row, place - 1] == IGNORED_LABEL
    ends = tokens == END_ID
    assert ends.any() and (labels[ends] == IGNORED_LABEL).all()
    assert ((labels == IGNORED_LABEL) | (labels != 0)).all()


def test_without_the_mask_rows_are_plain(data: DataConfig) -> None:
    data.document_mask = False
    batch = load(data, 1)[0][0]
    assert batch.positions is None and batch.segment_ids is None
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


def test_a_damaged_block_reaches_the_consumer_as_it_is(tmp_path: Path, make_corpus) -> None:
    make_corpus(tmp_path)
    path = tmp_path / "train" / "000000.tar"
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        load(DataConfig(sources={"web": SourceConfig(path=str(tmp_path))}), 100)
    assert not [thread for thread in threading.enumerate() if thread.name == "bigtx-prefetch"]


def test_closing_ends_the_thread_at_any_moment(data: DataConfig) -> None:
    def endless() -> Iterator[Batch]:
        while True:
            yield load(data, 1)[0][0]

    data.prefetch_batches = 0
    for depth in (1, 5):
        prefetcher = Prefetcher(endless(), depth)
        next(prefetcher)
        prefetcher.close()
        prefetcher.close()
        assert list(prefetcher) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "bigtx-prefetch"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_sequences", [5, 12, 10_000])
def test_validation_reads_the_same_rows_with_any_ranks(
    tmp_path: Path, make_corpus, world_size: int, max_sequences: int
) -> None:
    make_corpus(tmp_path)
    batches = [
        ValidationBatches(
            tmp_path,
            RowFormat(sequence_length=LENGTH, pad_id=0, document_mask=False),
            micro_batch_size=2,
            max_sequences=max_sequences,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in batches}) == 1
    rows = {}
    for batch in (batch for rank in batches for batch in rank):
        assert batch.tokens.shape == (2, LENGTH)
        for number, tokens, labels in zip(batch.sequence_ids.tolist(), batch.tokens, batch.labels, strict=True):
            if number == PADDING_SEQUENCE:
                assert (labels == IGNORED_LABEL).all() and (tokens == 0).all()
            else:
                assert number not in rows
                rows[number] = (tokens.tolist(), labels.tolist())
    assert sorted(rows) == list(range(batches[0].num_sequences))
    block, _ = BlockReader(batches[0].manifest).block(0)
    total = int(rows_of_blocks(batches[0].manifest.blocks["tokens"], LENGTH).sum())
    number = next(number for number in rows if 0 < number * total // len(rows) < len(block) // LENGTH - 1)
    begin = number * total // len(rows) * LENGTH  # Evenly spread over the split, whatever part of it is read.
    assert rows[number] == (block[begin : begin + LENGTH].tolist(), block[begin + 1 : begin + LENGTH + 1].tolist())
    assert batches[0].num_sequences == max_sequences or max_sequences == 10_000


def test_sources_that_do_not_fit_are_named_together(tmp_path: Path, make_corpus) -> None:
    make_corpus(tmp_path / "web")
    make_corpus(tmp_path / "books", fingerprint="0" * 64)
    web = SourceConfig(path=str(tmp_path / "web"))
    missing = {name: SourceConfig(path=str(tmp_path / name)) for name in ("nowhere", "lost")}
    with pytest.raises(DataError, match=r"sources.lost: .*\n.*sources.nowhere: "):
        check_sources(DataConfig(sources={"web": web} | missing), sequence_length=LENGTH)
    both = DataConfig(sources={"web": web, "books": SourceConfig(path=str(tmp_path / "books"))})
    with pytest.raises(DataError, match=r"sources.web: .*another tokenizer"):
        check_sources(both, sequence_length=LENGTH)
    with pytest.raises(DataError, match="names no source"):
        check_sources(DataConfig(sources={"web": SourceConfig(path="x", weight=0)}), sequence_length=LENGTH)


def test_too_many_epochs_are_refused_with_the_figures(tmp_path: Path, make_corpus) -> None:
    make_corpus(tmp_path)
    source = SourceConfig(path=str(tmp_path), max_epochs=2)
    data = DataConfig(sources={"web": source})
    rows = int(((Manifest.load(tmp_path / "train").blocks["tokens"].astype(int) + LENGTH - 2) // LENGTH).sum())
    check_sources(data, sequence_length=LENGTH, num_sequences=2 * rows)
    with pytest.raises(DataError, match=rf"2\.\d+ epochs of {rows} rows, but max_epochs allows 2"):
        check_sources(data, sequence_length=LENGTH, num_sequences=2 * rows + 1)
