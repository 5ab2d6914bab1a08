"""The records of fine-tuning: reading, splits, encoding, and their digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigtx.config.schema import FinetuneConfig
from bigtx.data.recordings import look_at
from bigtx.data.records.read import read_records
from bigtx.data.records.record import BadRecordError, Broken, LeftOut, Record, split_records
from bigtx.finetuning.checks import SPLITS, advice_about
from bigtx.finetuning.record_table import Table, arrange, identity, table_of
from bigtx.finetuning.tasks import task_type
from bigtx.finetuning.tasks.task import Examples, Look, RecordTask
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils import log
from bigtx.utils.errors import DataError


@dataclass(frozen=True)
class TaskData:
    """The records of fine-tuning under their task.

    Attributes:
        config: the config with everything that follows from the training records.
        splits: examples by split; validation and test may be empty. A training record that was left out since the run
            started is replaced by the next one; left out records of other splits are missing.
        table: the records with which the run started.
    """

    config: FinetuneConfig
    task: RecordTask
    splits: dict[str, Examples]
    table: Table

    @property
    def identity(self) -> dict[str, str]:
        """Return digests by split, which identify the records."""
        return identity(self.table)

    def lengths(self, split: str) -> list[int]:
        """Return the lengths of the examples of a split at the start of the run."""
        return [row.length for row in self.table if row.split == split]


def open_task_data(
    config: FinetuneConfig, tokenizer: Tokenizer, *, look: Look = look_at, table: Table | None = None
) -> TaskData:
    """Read and encode the records of `config.data`.

    Args:
        look: decodes recordings in advance.
        table: the records with which a resumed run started, if some of them are left out now.

    Raises:
        DataError: files or records cannot be used, by file and line; or there are no records to train on.
        ConfigError: the model cannot do the task.
    """
    left_out = LeftOut(config.data.leave_out)
    splits = _read_splits(config, left_out, table)
    if not any(splits["train"]):
        raise DataError("data.train gives no records to train on; see data.validation_fraction and data.test_fraction")
    kind = task_type(config.task)
    config = kind.resolve(config, tokenizer, [record for record in splits["train"] if record])
    task = kind(config, tokenizer)
    present = {name: [record for record in records if record] for name, records in splits.items()}
    task.look_ahead([record for records in present.values() for record in records], look)
    broken = Broken()
    examples = {name: encode(task, records, broken) for name, records in present.items()}
    broken.check(advice_about(broken, config))
    _report_left_out(left_out, is_resumed=table is not None)
    if table is None:
        lengths = {name: [example.length for example in split.examples] for name, split in examples.items()}
        table = table_of(present, lengths)
    else:
        examples["train"] = _in_place(splits["train"], examples["train"])
    return TaskData(config, task, examples, table)


def _in_place(records: Sequence[Record | None], present: Examples) -> Examples:
    """Return the examples of all places; a left out record is replaced by the next one present, or by the first."""
    places, at = [], 0
    for record in records:
        places.append(at % len(present.records))
        at += record is not None
    return Examples([present.records[place] for place in places], [present.examples[place] for place in places])


def _report_left_out(left_out: LeftOut, *, is_resumed: bool) -> None:
    """Log which records are left out.

    Raises:
        DataError: a name has no record, and the run is new, so that the record cannot have been removed since.
    """
    unknown = sorted(left_out.names - left_out.met)
    if unknown and not is_resumed:
        raise DataError(
            f"data.leave_out names {', '.join(map(repr, unknown))}, and there is no such record; write names as in "
            "messages: FILE, or 'FILE, line N'"
        )
    if left_out.met:
        log.say(f"left out (data.leave_out): {'; '.join(sorted(left_out.met))}")


def read_split(config: FinetuneConfig, name: str, table: Table | None = None) -> list[Record]:
    """Return the records of one split of a run with this config.

    Args:
        table: as for `open_task_data`.

    Raises:
        DataError: as `open_task_data`.
    """
    records = _read_splits(config, LeftOut(config.data.leave_out), table)[name]
    return [record for record in records if record]


def encode(task: RecordTask, records: Sequence[Record], broken: Broken) -> Examples:
    """Encode records for a task, and add unusable ones to `broken`."""
    kept, examples = [], []
    for record in records:
        try:
            examples.append(task.encode(record))
            kept.append(record)
        except (BadRecordError, DataError) as error:  # The tokenizer refuses invalid text.
            broken.add(record.file, record.line, str(error))
    return Examples(kept, examples)


def _read_splits(config: FinetuneConfig, left_out: LeftOut, table: Table | None) -> dict[str, list[Record | None]]:
    """Return the records by split; with a table, in its order, and None in the place of each left out record."""
    data, broken = config.data, Broken(left_out)
    read = {name: list(read_records(getattr(data, name), broken, data.exclude)) for name in SPLITS}
    broken.check(advice_about(broken, config))
    kept = {name: [record for record in records if record.where not in left_out] for name, records in read.items()}
    if table is None:
        return {name: list(records) for name, records in _divide(config, kept).items()}
    found: dict[str, list[Record | None]] = {name: [] for name in SPLITS}
    arranged = arrange(table, [record for records in kept.values() for record in records], left_out)
    for row, record in zip(table, arranged, strict=True):
        found[row.split].append(record)
    return found


def _divide(config: FinetuneConfig, splits: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """Return the splits, with unnamed ones held out of the training records."""
    data, kind = config.data, task_type(config.task)
    for name, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if getattr(data, name) or not fraction:
            continue
        records = splits["train"]
        groups = [kind.group_of(record, config) for record in records]
        kept, held = split_records(records, groups, fraction, data.split, name)
        if len(held) < data.min_held_out:
            continue
        splits["train"], splits[name] = [records[place] for place in kept], [records[place] for place in held]
    return splits
