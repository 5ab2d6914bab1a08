"""Records that are left out of a resumed run: the others keep their places, and must be what they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from finetunes import labelled, write_jsonl

from bigtx.config.schema import FinetuneConfig, ModelConfig, RecordsConfig, TokenizerTrainConfig
from bigtx.data.stream.loader import Division
from bigtx.finetuning import checks
from bigtx.finetuning.inputs import RecordLoader
from bigtx.finetuning.records import TABLE_FILE, TaskData, open_task_data, read_table, write_table
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import CheckpointError, DataError

RECORDS = labelled(40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=400), [record["text"] for record in RECORDS])


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    data = RecordsConfig(train=[str(path)], validation_fraction=0.2, test_fraction=0.1, split="tail")
    return FinetuneConfig(model=ModelConfig(shape="encoder", vocab_size=400, max_sequence_length=32), data=data)


def without(config: FinetuneConfig, *lines: int | str) -> FinetuneConfig:
    file = config.data.train[0]
    names = [f"{file}, line {line}" if isinstance(line, int) else line for line in lines]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, leave_out=names))


def order(data: TaskData) -> list[str]:
    """What stands in each place of three epochs."""
    records = data.splits["train"].records
    loader = RecordLoader(
        np.array(data.lengths("train")),
        lambda places, _: [records[place].where for place in places],
        Division(global_batch_size=4, micro_batch_size=2),
        seed=1,
        start_sequence=0,
        prefetch_batches=0,
    )
    return [
        name
        for _, batches in zip(range(3 * len(records) // 4), loader, strict=False)
        for batch in batches
        for name in batch
    ]


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 8), (0.5, 20), (0.0, 0)])
def test_the_share_that_is_held_out(config: FinetuneConfig, tokenizer: Tokenizer, fraction: float, count: int) -> None:
    config.data.validation_fraction, config.data.test_fraction, config.data.min_held_out = fraction, 0.0, 0
    splits = open_task_data(config, tokenizer).splits
    assert [len(splits[name].records) for name in ("train", "validation")] == [40 - count, count]


def test_without_records_to_train_on_nothing_begins(config: FinetuneConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data\.train gives no records to train on"):
        open_task_data(without(config, *range(1, 41)), tokenizer)


@pytest.mark.parametrize("split", ["tail", "hash"])
def test_the_others_keep_their_places(tmp_path: Path, config: FinetuneConfig, tokenizer: Tokenizer, split: str) -> None:
    config.data.split = split  # type: ignore[assignment]
    whole = open_task_data(config, tokenizer)
    write_table(tmp_path, whole.table)
    lines = {name: [record.line for record in each.records] for name, each in whole.splits.items()}
    lost = [lines["train"][3], lines["train"][4], lines["train"][-1], lines["validation"][0]]
    path = Path(config.data.train[0])
    raw = path.read_text().splitlines()
    for line in lost:
        raw[line - 1] = "{broken"
    path.write_text("\n".join(raw) + "\n")
    with pytest.raises(DataError, match=r"(?s)4 records cannot be used.*data\.leave_out="):
        open_task_data(config, tokenizer)
    table = read_table(tmp_path)
    found = open_task_data(without(config, *lost), tokenizer, table=table)
    assert found.identity == whole.identity and [r.line for r in found.splits["test"].records] == lines["test"]
    assert [record.line for record in found.splits["validation"].records] == lines["validation"][1:]
    others = lines["train"]
    stand_ins = {others[3]: others[5], others[4]: others[5], others[-1]: others[0]}
    before = [int(name.rpartition(" ")[2]) for name in order(whole)]
    assert [int(name.rpartition(" ")[2]) for name in order(found)] == [stand_ins.get(line, line) for line in before]
    # What was given back is used again.
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    found = open_task_data(without(config, lost[0]), tokenizer, table=table)
    stand_ins = {others[3]: others[4]}
    assert [int(name.rpartition(" ")[2]) for name in order(found)] == [stand_ins.get(line, line) for line in before]
    assert open_task_data(config, tokenizer).identity == whole.identity


def test_the_others_must_be_what_they_were(tmp_path: Path, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
    table = open_task_data(config, tokenizer).table
    path = Path(config.data.train[0])
    raw = path.read_text().splitlines()
    raw[1] = raw[5]
    path.write_text("\n".join([*raw[:-1], "", raw[-1], raw[7]]) + "\n")
    with pytest.raises(DataError) as error:
        open_task_data(without(config, 4), tokenizer, table=table)
    for line, reason in ((2, "has changed since"), (40, "is gone"), (41, "was not among"), (42, "was not among")):
        assert f"{path}, line {line}: " in str(error.value) and reason in str(error.value)
    with pytest.raises(DataError, match="no such record"):
        open_task_data(without(config, 3, "b.jsonl"), tokenizer)
    with pytest.raises(CheckpointError, match=r"records\.jsonl\.gz"):
        read_table(tmp_path)
    write_table(tmp_path, table)
    stored = tmp_path / TABLE_FILE
    stored.write_bytes(stored.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_table(tmp_path)


def test_what_has_no_tokens_is_told_before_the_start(
    config: FinetuneConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may drop what is not seen."""
    write_jsonl(Path(config.data.train[0]), [*RECORDS, {"text": "\u200b", "label": "joy"}])
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text.replace("\u200b", "")))
    with pytest.raises(DataError, match=r"line 41: the tokenizer makes no token of the field 'text': '\\u200b'"):
        open_task_data(config, tokenizer)


@pytest.mark.parametrize(("fewest", "held_out"), [(0, 8), (8, 8), (9, 0)])
def test_a_share_of_few_records_holds_out_none(
    config: FinetuneConfig, tokenizer: Tokenizer, fewest: int, held_out: int
) -> None:
    config.data.min_held_out, config.data.test_fraction = fewest, 0.0
    splits = open_task_data(config, tokenizer).splits
    assert [len(splits[name].records) for name in ("train", "validation")] == [40 - held_out, held_out]


def test_records_are_checked_before_ranks_start(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "open_tokenizer", lambda *given: None)
    checks.check_inputs(config, 1)
    Path(config.data.train[0]).write_text("{broken\n")
    with pytest.raises(DataError, match="line 1"):
        checks.check_inputs(config, 1)
