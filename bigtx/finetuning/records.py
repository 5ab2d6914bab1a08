"""The records of fine-tuning: reading, splits, encoding, and the table of the records before the first step.

The table is `records.jsonl.gz` in the run folder. A resumed run may leave out records that were lost or damaged since
(data.leave_out). The table identifies the other records and shows whether they changed; their splits and their order
remain the same. It has a line for each record, `[split, name, length, content]`, sorted by split and order.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from bigtx.config.schema import FinetuneConfig
from bigtx.data.recordings import look_at
from bigtx.data.records.read import read_records
from bigtx.data.records.record import BadRecordError, Broken, LeftOut, Record, split_records
from bigtx.finetuning.checks import ALLOWED, SPLITS, advice_about
from bigtx.finetuning.tasks import task_type
from bigtx.finetuning.tasks.task import Examples, Look, RecordTask
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils import log
from bigtx.utils.errors import CheckpointError, DataError, writes
from bigtx.utils.files import json_value, write_atomic

TABLE_FILE = "records.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Row:
    """An entry of the table.

    Attributes:
        split: train, validation or test.
        name: the record's `Record.where`.
        length: the length of its example, by which a run sorts records.
        content: the result of `content_of`.
    """

    split: str
    name: str
    length: int
    content: str


Table = list[Row]


def table_of(splits: Mapping[str, Sequence[Record]], lengths: Mapping[str, Sequence[int]]) -> Table:
    """Return the table of records with the lengths of their examples."""
    return [
        Row(split, record.where, length, content_of(record))
        for split, records in splits.items()
        for record, length in zip(records, lengths[split], strict=True)
    ]


def identity(table: Iterable[Row]) -> dict[str, str]:
    """Return the `digest` of the records of each split that has records."""
    contents = defaultdict(list)
    for row in table:
        contents[row.split].append(row.content)
    return {split: _digest(found) for split, found in contents.items()}


def digest(records: Iterable[Record]) -> str:
    """Return a hash of the fields of records, in their order."""
    return _digest(map(content_of, records))


def _digest(contents: Iterable[str]) -> str:
    return hashlib.sha256("".join(contents).encode()).hexdigest()


def content_of(record: Record) -> str:
    """Return a hash of the fields of a record, 32 hexadecimal digits."""
    fields = json.dumps(record.fields, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(fields.encode("utf-8", "surrogatepass"))


def arrange(table: Table, records: Iterable[Record], left_out: LeftOut) -> list[Record | None]:
    """Return the records in the order of a table, with None in the place of each left out record.

    Raises:
        DataError: records are new, changed or gone, and are not left out.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place in reversed(range(len(table))):
        places[table[place].name].append(place)
    broken, found, changed = Broken(left_out), list[Record | None]([None] * len(table)), set[int]()
    for record in records:
        own = places.get(record.where)
        if not own:
            broken.add(record.file, record.line, "was not among the records when the run started")
            continue
        place = own.pop()
        if table[place].content != content_of(record):
            changed.add(place)
            broken.add(record.file, record.line, "has changed since the run started")
        else:
            found[place] = record
    for place, row in enumerate(table):
        if found[place] is None and place not in changed:
            broken.add(row.name, 0, "was among the records when the run started, and is gone")
    broken.check(
        "A resumed run needs the records that it started with: restore them, or add them to data.leave_out "
        f"(with {ALLOWED})"
    )
    return found


def write_table(run_dir: Path, table: Table) -> None:
    """Write a table into the run folder.

    Raises:
        LaunchError: the folder cannot be written.
    """
    lines = "".join(json.dumps([row.split, row.name, row.length, row.content]) + "\n" for row in table)
    with writes(run_dir / TABLE_FILE):
        write_atomic(run_dir / TABLE_FILE, gzip.compress(lines.encode(), mtime=0))


def read_table(run_dir: Path) -> Table:
    """Read the table of a run.

    Raises:
        CheckpointError: the table is missing or damaged.
    """
    path = run_dir / TABLE_FILE
    try:
        return [Row(*json_value(line)) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise CheckpointError(
            f"{path}, the table of the run's records, cannot be read ({error}): without it no record can be left out. "
            "Restore it or the records, or start another run_dir with base=THIS_RUN"
        ) from error


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
        raise DataError(
            "data.train gives no records to train on: data.leave_out names all of them, or its files are empty; name "
            "fewer there, or other files"
        )
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
    return [record for record in _read_splits(config, LeftOut(config.data.leave_out), table)[name] if record]


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
