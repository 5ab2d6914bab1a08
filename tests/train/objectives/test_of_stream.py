"""Objectives in the loader: the same rows on any ranks, in any micro batch, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bigtx.config.schema import DataConfig, ModelConfig, ObjectiveConfig, PretrainConfig, SourceConfig, TrainConfig
from bigtx.data.stream.loader import Division, TrainLoader, ValidationBatches
from bigtx.data.stream.rows import Batch, RowFormat
from bigtx.pretraining import make_objective
from bigtx.pretraining.objectives import Objective
from bigtx.tokenizer.tokenizer import Tokenizer

# Blocks of 4,096 tokens end with a short row.
LENGTH, STEPS, GLOBAL_BATCH = 120, 10, 8
KINDS = {
    "fill_in_middle": ModelConfig(),
    "masked": ModelConfig(shape="encoder"),
    "span_corruption": ModelConfig(shape="encoder_decoder"),
    "prefix": ModelConfig(prefix_attention=True),
}
Row = dict[str, torch.Tensor]


def objective_of(corpus: Path, name: str, *, document_mask: bool, purpose: str = "train") -> Objective:
    config = PretrainConfig(
        model=KINDS[name],
        data=DataConfig(document_mask=document_mask),
        train=TrainConfig(sequence_length=LENGTH),
        objective=ObjectiveConfig(name=name),  # type: ignore[arg-type]
    )
    return make_objective(config, Tokenizer.load(corpus / "tokenizer"), purpose=purpose)


def rows_of(batch: Batch) -> dict[int, Row]:
    """What the model reads of each row, by its number; rows without segments are of one."""
    inputs: dict[str, Any] = {"segment_ids": torch.zeros_like(batch.tokens), **batch.inputs()}
    if batch.target_tokens is not None:
        inputs.setdefault("target_segment_ids", torch.zeros_like(batch.target_tokens))
    return {
        int(number): {name: part[row] for name, part in inputs.items()}
        for row, number in enumerate(batch.sequence_ids.tolist())
    }


def read(
    corpus: Path, objective: Objective, *, ranks: int, micro_batch_size: int, first_step: int = 0
) -> dict[int, Row]:
    """The rows of all ranks from a step on."""
    found: dict[int, Row] = {}
    for rank in range(ranks):
        loader = TrainLoader(
            DataConfig(
                sources={"a": SourceConfig(path=str(corpus))},
                document_mask=objective.document_mask,
                prefetch_batches=2,
            ),
            Division(global_batch_size=GLOBAL_BATCH, micro_batch_size=micro_batch_size, rank=rank, world_size=ranks),
            sequence_length=LENGTH,
            seed=1,
            start_sequence=first_step * GLOBAL_BATCH,
            pad_id=objective.tokenizer.pad_id,
            prepare=objective.prepare,
        )
        for _ in range(first_step, STEPS):
            for batch in next(loader):
                found |= rows_of(batch)
        loader.close()
    return found


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_ranks_micro_batches_and_resume_change_no_row(corpus: Path, name: str, document_mask: bool) -> None:
    objective = objective_of(corpus, name, document_mask=document_mask)
    alone = read(corpus, objective, ranks=1, micro_batch_size=2)
    assert len(alone) == STEPS * GLOBAL_BATCH
    again = objective_of(corpus, name, document_mask=document_mask)
    others = read(corpus, again, ranks=4, micro_batch_size=1), read(corpus, again, ranks=2, micro_batch_size=4)
    resumed = read(corpus, again, ranks=2, micro_batch_size=2, first_step=6)
    assert others[0].keys() == others[1].keys() == alone.keys() and min(resumed) == 6 * GLOBAL_BATCH
    for rows in (*others, resumed):
        for number, row in rows.items():
            assert row.keys() == alone[number].keys()
            assert all(torch.equal(part, alone[number][key]) for key, part in row.items()), number


@pytest.mark.parametrize("name", KINDS)
def test_validation_asks_the_same_each_time(corpus: Path, name: str) -> None:
    def measured(micro_batch_size: int) -> dict[int, Row]:
        batches = ValidationBatches(
            str(corpus),
            RowFormat(sequence_length=LENGTH, pad_id=0, document_mask=False),
            micro_batch_size=micro_batch_size,
            max_sequences=8,
            rank=0,
            world_size=1,
            prepare=objective_of(corpus, name, document_mask=False, purpose="validation").prepare,
        )
        assert all(batch.num_labels > 0 for batch in batches)
        return {number: row for batch in batches for number, row in rows_of(batch).items()}

    first, second = measured(4), measured(2)
    assert first.keys() == second.keys() == set(range(8))
    for number, row in first.items():
        assert all(torch.equal(part, second[number][key]) for key, part in row.items())
