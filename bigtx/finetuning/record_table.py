"""The table of a run's records before its first step: `records.jsonl.gz` in the run folder.

A resumed run may leave out records that were lost or damaged since (data.leave_out). The table identifies the other
records and shows whether they changed; their splits and their order remain the same.

The table has a line for each record, `[split, name, length, content]`, sorted by split and order.
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

from bigtx.data.records.record import Broken, LeftOut, Record
from bigtx.utils.errors import CheckpointError, LaunchError
from bigtx.utils.files import write_atomic

FILE = "records.jsonl.gz"


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
    broken.check("A resumed run needs the records that it started with: restore them, or add them to data.leave_out.")
    return found


def write(run_dir: Path, table: Table) -> None:
    """Write a table into the run folder.

    Raises:
        LaunchError: the folder cannot be written.
    """
    lines = "".join(json.dumps([row.split, row.name, row.length, row.content]) + "\n" for row in table)
    try:
        write_atomic(run_dir / FILE, gzip.compress(lines.encode(), mtime=0))
    except OSError as error:
        raise LaunchError(f"{run_dir / FILE} cannot be written: {error}") from error


def read(run_dir: Path) -> Table:
    """Read the table of a run.

    Raises:
        CheckpointError: the table is missing or damaged.
    """
    path = run_dir / FILE
    try:
        return [Row(*json.loads(line)) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise CheckpointError(
            f"{path}, the table of the run's records, cannot be read ({error}): without it no record can be left out. "
            "Restore it or the records, or start another run_dir with base=THIS_RUN"
        ) from error
