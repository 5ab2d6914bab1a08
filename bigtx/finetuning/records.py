"""The records of a fine-tuning, read, split, encoded, and known by a digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigtx.config.schema import FinetuneConfig
from bigtx.data.audio.look import look_at
from bigtx.data.records.read import read_records
from bigtx.data.records.record import BadRecordError, Broken, LeftOut, Record
from bigtx.data.records.split import split_records
from bigtx.finetuning.first_records import SPLITS, advice_about
from bigtx.finetuning.record_table import Table, arrange, identity, table_of
from bigtx.finetuning.tasks import task_type
from bigtx.finetuning.tasks.task import Examples, Look, RecordTask
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils import log
from bigtx.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class TaskData:
    """All that a fine-tuning reads.

    Attributes:
        config: with what follows from the training records.
        splits: by name; validation and test may be empty. In the place of a training record that was left out since
            the run began stands the next one that was not; others are missing here.
        table: the records with which the run began.
    """

    config: FinetuneConfig
    task: RecordTask
    splits: dict[str, Examples]
    table: Table

    @property
    def identity(self) -> dict[str, str]:
        """Digests by split; others mean other records."""
        return identity(self.table)

    def lengths(self, split: str) -> list[int]:
        """Of the examples of a split, as the run began."""
        return [row.length for row in self.table if row.split == split]


def open_task_data(
    config: FinetuneConfig, tokenizer: Tokenizer, *, look: Look = look_at, table: Table | None = None
) -> TaskData:
    """Read the records of `config.data` and make them ready.

    Args:
        look: how recordings are decoded beforehand.
        table: the records with which a resumed run began, where some are to be left out of them.

    Raises:
        DataError: files or records that cannot be used, by file and line; no records to train on.
        ConfigError: the model cannot do the task.
    """
    left_out = LeftOut(config.data.leave_out)
    splits = _read_splits(config, left_out, table)
    if not any(splits["train"]):
        raise DataError("data.train gives no records to train on; see data.validation_fraction and data.test_fraction")
    kind = task_type(config.task)
    config = kind.resolve(config, tokenizer, [record for record in splits["train"] if record])
    longest, most = config.data.max_length, config.model.max_sequence_length
    if config.model.positions == "learned" and longest and longest > most:
        raise ConfigError(
            f"data.max_length={longest}, and the learned positions end at model.max_sequence_length={most}; lower "
            "the one or raise the other"
        )
    task = kind(config, tokenizer)
    present = {name: [record for record in records if record] for name, records in splits.items()}
    task.look_ahead([record for records in present.values() for record in records], look)
    broken = Broken()
    examples = {name: encode(task, records, broken) for name, records in present.items()}
    broken.check(advice_about(broken, config))
    _tell_left_out(left_out, is_resumed=table is not None)
    if table is None:
        lengths = {name: [example.length for example in split.examples] for name, split in examples.items()}
        table = table_of(present, lengths)
    else:
        examples["train"] = _in_place(splits["train"], examples["train"])
    return TaskData(config, task, examples, table)


def _in_place(records: Sequence[Record | None], present: Examples) -> Examples:
    """Examples of all places; in that of a record that is left out the one of the next that is not, or of the first."""
    places, at = [], 0
    for record in records:
        places.append(at % len(present.records))
        at += record is not None
    return Examples([present.records[place] for place in places], [present.examples[place] for place in places])


def _tell_left_out(left_out: LeftOut, *, is_resumed: bool) -> None:
    """Say what is left out.

    Raises:
        DataError: names that stand for nothing, unless what they stood for may be gone by now.
    """
    unknown = sorted(left_out.names - left_out.met)
    if unknown and not is_resumed:
        raise DataError(
            f"data.leave_out names {', '.join(map(repr, unknown))}, and there is no such record; names are as messages "
            "have them: FILE, or 'FILE, line N'"
        )
    if left_out.met:
        log.say(f"left out (data.leave_out): {'; '.join(sorted(left_out.met))}")


def read_split(config: FinetuneConfig, name: str, table: Table | None = None) -> list[Record]:
    """The records of one split, as a run with this config has them.

    Args:
        table: as for `open_task_data`.

    Raises:
        DataError: as `open_task_data`.
    """
    records = _read_splits(config, LeftOut(config.data.leave_out), table)[name]
    return [record for record in records if record]


def read_all(paths: Sequence[str], broken: Broken, exclude: Sequence[str] = ()) -> list[Record]:
    """All records of some files; `exclude` as for `read_records`. What cannot be read goes to `broken`."""
    return list(read_records(paths, broken, exclude))


def encode(task: RecordTask, records: Sequence[Record], broken: Broken) -> Examples:
    """What a task makes of records; those that it cannot use go to `broken`."""
    kept, examples = [], []
    for record in records:
        try:
            examples.append(task.encode(record))
            kept.append(record)
        except (BadRecordError, DataError) as error:  # The tokenizer refuses what is no text.
            broken.add(record.file, record.line, str(error))
    return Examples(kept, examples)


def _read_splits(config: FinetuneConfig, left_out: LeftOut, table: Table | None) -> dict[str, list[Record | None]]:
    """The records by split; where there is a table, in its order, None being one that is left out."""
    data, broken = config.data, Broken(left_out)
    read = {name: read_all(getattr(data, name), broken, data.exclude) for name in SPLITS}
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
    """The splits, after those that nobody named were held out of the training records."""
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
