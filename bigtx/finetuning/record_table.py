"""The records of a run as they were before its first step: `records.jsonl.gz` in the run folder.

A resumed run may do without records that were lost or damaged since (data.leave_out). The table says which the others
are, that they are what they were, and in which split and order, so that each keeps its place.

A line for each record, `[split, name, length, content]`; the splits one after the other, each in its order.
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
    """What is known of a record.

    Attributes:
        split: train, validation or test.
        name: `Record.where`.
        length: of its example, by which a run orders records.
        content: what `content_of` gave.
    """

    split: str
    name: str
    length: int
    content: str


Table = list[Row]


def table_of(splits: Mapping[str, Sequence[Record]], lengths: Mapping[str, Sequence[int]]) -> Table:
    """The table of records, and of the lengths of their examples."""
    return [
        Row(split, record.where, length, content_of(record))
        for split, records in splits.items()
        for record, length in zip(records, lengths[split], strict=True)
    ]


def identity(table: Iterable[Row]) -> dict[str, str]:
    """By split, what `digest` gives for its records; splits without records are left out."""
    contents = defaultdict(list)
    for row in table:
        contents[row.split].append(row.content)
    return {split: _digest(found) for split, found in contents.items()}


def digest(records: Iterable[Record]) -> str:
    """What the fields of records hash to, in their order."""
    return _digest(map(content_of, records))


def _digest(contents: Iterable[str]) -> str:
    return hashlib.sha256("".join(contents).encode()).hexdigest()


def content_of(record: Record) -> str:
    """32 hexadecimal digits that stand for the fields of a record."""
    fields = json.dumps(record.fields, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(fields.encode("utf-8", "surrogatepass"))


def arrange(table: Table, records: Iterable[Record], left_out: LeftOut) -> list[Record | None]:
    """The records in the order of a table; None in the place of one that is left out.

    Raises:
        DataError: records that the table does not have, or that have changed or gone since, and are not left out.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place in reversed(range(len(table))):
        places[table[place].name].append(place)
    broken, found, changed = Broken(left_out), list[Record | None]([None] * len(table)), set[int]()
    for record in records:
        own = places.get(record.where)
        if not own:
            broken.add(record.file, record.line, "was not among the records when the run began")
            continue
        place = own.pop()
        if table[place].content != content_of(record):
            changed.add(place)
            broken.add(record.file, record.line, "is another record than it was when the run began")
        else:
            found[place] = record
    for place, row in enumerate(table):
        if found[place] is None and place not in changed:
            broken.add(row.name, 0, "was among the records when the run began, and is gone")
    broken.check("A resumed run has the records that it began with: restore them, or name them in data.leave_out too.")
    return found


def write(run_dir: Path, table: Table) -> None:
    """Keep a table.

    Raises:
        LaunchError: the folder cannot be written.
    """
    lines = "".join(json.dumps([row.split, row.name, row.length, row.content]) + "\n" for row in table)
    try:
        write_atomic(run_dir / FILE, gzip.compress(lines.encode(), mtime=0))
    except OSError as error:
        raise LaunchError(f"{run_dir / FILE} cannot be written: {error}") from error


def read(run_dir: Path) -> Table:
    """The table of a run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = run_dir / FILE
    try:
        return [Row(*json.loads(line)) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise CheckpointError(
            f"{path}, which says what records the run had, cannot be read ({error}): without it none can be left out. "
            "Restore it or the records, or begin another run_dir with base=THIS_RUN"
        ) from error
