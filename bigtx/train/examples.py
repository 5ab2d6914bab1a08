"""The records of a fine-tuning, read, split, encoded, and known by a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtx.config.schema import FinetuneConfig
from bigtx.data.records.read import read_records
from bigtx.data.records.record import BadRecordError, Broken, Record
from bigtx.data.records.split import split_records
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train.tasks import task_type
from bigtx.train.tasks.task import RecordTask
from bigtx.utils.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """Records of one split, and what the task made of them, in the same order."""

    records: list[Record]
    examples: list[Any]

    @property
    def num_cut(self) -> int:
        """Records that were too long."""
        return sum(example.num_cut > 0 for example in self.examples)


@dataclass(frozen=True)
class TaskData:
    """All that a fine-tuning reads.

    Attributes:
        config: with what follows from the training records.
        splits: by name; validation and test may be empty.
        identity: digests by split; others mean other records.
    """

    config: FinetuneConfig
    task: RecordTask
    splits: dict[str, Examples]
    identity: dict[str, str]


def open_task_data(config: FinetuneConfig, tokenizer: Tokenizer) -> TaskData:
    """Read the records of `config.data` and make them ready.

    Raises:
        DataError: files or records that cannot be used, by file and line; no records to train on.
        ConfigError: the model cannot do the task.
    """
    splits = _read_splits(config)
    if not splits["train"]:
        raise DataError("data.train gives no records to train on; see data.validation_fraction and data.test_fraction")
    kind = task_type(config.task)
    config = kind.resolve(config, tokenizer, splits["train"])
    longest, most = config.data.max_length, config.model.max_sequence_length
    if config.model.positions == "learned" and longest and longest > most:
        raise ConfigError(
            f"data.max_length={longest:,}, and the learned positions end at model.max_sequence_length={most:,}; lower "
            "the one or raise the other"
        )
    task = kind(config, tokenizer)
    broken = Broken()
    examples = {name: encode(task, records, broken) for name, records in splits.items()}
    broken.check()
    identity = {name: digest(records) for name, records in splits.items() if records}
    return TaskData(config, task, examples, identity)


def read_split(config: FinetuneConfig, name: str) -> list[Record]:
    """The records of one split, as a run with this config has them.

    Raises:
        DataError: as `open_task_data`.
    """
    return _read_splits(config)[name]


def read_all(paths: Sequence[str], exclude: Sequence[str] = ()) -> list[Record]:
    """All records of some files; `exclude` as for `read_records`.

    Raises:
        DataError: one cannot be read.
    """
    broken = Broken()
    records = list(read_records(paths, broken, exclude))
    broken.check()
    return records


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


def _read_splits(config: FinetuneConfig) -> dict[str, list[Record]]:
    data, kind = config.data, task_type(config.task)
    splits = {name: read_all(getattr(data, name), data.exclude) for name in SPLITS}
    for name, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if getattr(data, name) or not fraction:
            continue
        records = splits["train"]
        groups = [kind.group_of(record, config) for record in records]
        kept, held = split_records(records, groups, fraction, data.split, name)
        splits["train"], splits[name] = [records[place] for place in kept], [records[place] for place in held]
    return splits


def digest(records: Sequence[Record]) -> str:
    """What the fields of records hash to, in their order."""
    found = hashlib.sha256()
    for record in records:
        found.update(json.dumps(record.fields, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()
