"""Fuzz all readers of files that others wrote.

    python tools/fuzz_readers.py --seconds 120                        seeds depend on the commit
    python tools/fuzz_readers.py --seconds 3600 --seed 7              other seeds
    python tools/fuzz_readers.py --readers checkpoint config          only some
    python tools/fuzz_readers.py --readers config --trial 17 --keep DIR   one trial, and its files

The readers of `fuzz_folders.py` read examples with changed bytes or values, each for an equal share of the time: see
`fuzz_bytes.py` for what they must not do.

The readers of rows, for a quarter of the time: the items that are read plus those that count as lost must be the items
of the file. Random files are made of items that are known to be good or bad: texts, JSON lines, tables, archives of
files and of samples, with random names, quotation marks, encodings, duplicates and compressions. Each file is read in
three ways:

- `bigtx data prepare`: the good items are read unchanged, each other item counts as a reject, and nothing is added.
- fine-tuning records: the same, with the records that cannot be used.
- foreign shards: all items are read, or the shard is refused and the error names it.

A file may also be cut at a random byte, or a byte may be changed: then, if items of a compressed file or an archive are
missing, there must be a reject. A failure prints the smallest such file that hypothesis found, and the seed.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import lzma
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import zstandard
from fuzz_bytes import Failure, Reader, check_examples, files_of, trials
from fuzz_folders import readers as make_readers
from fuzz_inputs import MADE, Made
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bigtx.config.schema import ForeignConfig, InputConfig
from bigtx.data.raw.documents import Rejects
from bigtx.data.raw.read import read_documents
from bigtx.data.records.read import read_records
from bigtx.data.records.record import Broken
from bigtx.data.stream.foreign import read_texts
from bigtx.utils.errors import DataError

EXAMPLES_AT_ONCE = 200
TRIALS_AT_ONCE = 5
ROWS = "items"
"""The name of the test of rows."""
ROWS_SHARES = 4
"""Its time, as a multiple of another reader's."""
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def prepare(path: Path, **options: object) -> tuple[list[str], Rejects]:
    """Read a file as `bigtx data prepare` does."""
    rejects = Rejects(1.0)
    config = InputConfig(paths=[str(path)], **options)  # type: ignore[arg-type]
    return [document.text for document in read_documents(config, rejects)], rejects


def check_prepare(made: Made, path: Path, has_metadata: bool) -> None:
    """Check that the good items are read, and that each other item counts."""
    texts, rejects = prepare(path, id_field="id" if has_metadata else "")
    assert not Counter(texts) - Counter(made.texts), f"invented: {Counter(texts) - Counter(made.texts)}"
    assert rejects.num_cut == 0 or made.name.endswith(".csv") or made.name.endswith(".tsv"), rejects.examples
    counted = len(texts) + rejects.count + rejects.num_empty
    assert counted == len(made.items), (counted, len(made.items), texts, rejects)
    if not made.hides_next:
        assert sorted(texts) == sorted(made.texts), (texts, rejects)


def check_records(made: Made, path: Path) -> None:
    """Check the same for records, with those that cannot be used; samples are judged as a whole."""
    if made.name.endswith(".txt"):
        return  # Text files are records only in folders.
    broken = Broken()
    found = [record.fields.get("text") for record in read_records([str(path)], broken)]
    context = (found, broken.count, made.items)
    if made.name.endswith(".tar"):
        is_good = len(made.texts) == len(made.items) and not made.is_strict
        assert (broken.count == 0) == is_good, context
        assert not is_good or sorted(map(str, found)) == sorted(made.texts), context
    else:
        # A record without a text may belong to another task.
        assert len(found) + broken.count == len(made.items), context
        assert made.hides_next or not Counter(made.texts) - Counter(map(str, found)), context


def check_foreign(made: Made, path: Path) -> None:
    """Check that all texts are read, or that the shard is refused and named."""
    try:
        texts = list(read_texts(str(path), ForeignConfig()))
    except DataError as error:
        assert str(path) in str(error), error
        return
    plain = []
    with tarfile.open(path) as archive:
        for info in archive:
            name = Path(info.name.lower()).name
            if info.isreg() and name.endswith((".txt", ".txt.gz")) and not name.startswith("."):
                raw = archive.extractfile(info).read()  # type: ignore[union-attr]
                plain.append((gzip.decompress(raw) if name.endswith(".gz") else raw).decode())
    assert texts == [text for text in plain if text], (texts, plain)


def check_damaged(made: Made, path: Path, content: bytes, *, is_cut: bool) -> None:
    """Check that missing items of a damaged archive or compressed file have a reject, and that no reader raises."""
    path.write_bytes(content)
    for has_metadata in (False, True):
        texts, rejects = prepare(path, id_field="id" if has_metadata else "")
        is_checked = path.suffix in COMPRESSIONS or (is_cut and path.suffix == ".tar")
        if is_checked and len(texts) + rejects.count + rejects.num_empty < len(made.items):
            assert rejects.num_cut, (texts, rejects)
    if not made.name.endswith(".txt"):
        broken = Broken()
        for _ in read_records([str(path)], broken):
            pass
    if path.suffix == ".tar":
        with contextlib.suppress(DataError):
            list(read_texts(str(path), ForeignConfig()))


def check(folder: Path, made: Made, suffix: str, damage: tuple[str, float]) -> None:
    """Check one file in all ways."""
    content = COMPRESSIONS[suffix](made.content)
    path = folder / f"{made.name}{suffix}"
    path.write_bytes(content)
    try:
        for has_metadata in (False, True):
            check_prepare(made, path, has_metadata)
        check_records(made, path)
        if path.suffix == ".tar":
            check_foreign(made, path)
        how, where = damage
        place = int(where * len(content))
        if how == "cut" and place > 0:
            check_damaged(made, path, content[:place], is_cut=True)
        elif how == "flip":
            flipped = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
            check_damaged(made, path, flipped, is_cut=False)
    finally:
        path.unlink()


def fuzz_rows(scratch: Path, first: int, seconds: float) -> str:
    """Fuzz the readers of rows for a time. Returns what was done.

    Raises:
        AssertionError: an item is missing or was added; other errors are those of a reader.
    """
    end, number = time.monotonic() + seconds, first
    while number == first or time.monotonic() < end:

        @seed(number)
        @settings(
            max_examples=EXAMPLES_AT_ONCE,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(
            MADE,
            st.sampled_from(list(COMPRESSIONS)),
            st.tuples(st.sampled_from(["", "cut", "flip"]), st.floats(0, 0.999)),
        )
        def try_one(made: Made, suffix: str, damage: tuple[str, float]) -> None:
            check(scratch, made, suffix, damage)

        try:
            try_one()
        except BaseException:
            again = f"python tools/fuzz_readers.py --readers {ROWS} --seed {number} --seconds 1"
            print(f"seed {number} fails: {again}", file=sys.stderr)
            raise
        number += 1
    return f"{ROWS}: {(number - first) * EXAMPLES_AT_ONCE:,} files in seeds {first} to {number - 1}"


def fuzz_bytes(reader: Reader, scratch: Path, others: Sequence[bytes], first: int, seconds: float) -> int:
    """Read changed files for a time, and show one failure of each kind. Returns the number of kinds."""
    end, kinds, number = time.monotonic() + seconds, set[str](), first
    while number == first or time.monotonic() < end:
        for failure in trials(reader, range(number, number + TRIALS_AT_ONCE), scratch, others):
            if failure and failure.what not in kinds:
                kinds.add(failure.what)
                show(reader, failure)
        number += TRIALS_AT_ONCE
    print(f"{reader.name}: {number - first:,} folders in trials {first} to {number - 1}", flush=True)
    return len(kinds)


def show(reader: Reader, failure: Failure) -> None:
    """Print a failure, and the command that repeats it."""
    again = f"python tools/fuzz_readers.py --readers {reader.name} --trial {failure.number} --keep FOLDER"
    print(f"\n{reader.name}: {failure.what}\n{failure.details}\nTo write its files: {again}", file=sys.stderr)


def seed_of_commit() -> int:
    """Return a seed that depends on the commit, so that each commit tests other files."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return int(found.stdout.strip()[:8] or "0", 16)


def main() -> int:
    """Fuzz for the given time."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of files that others wrote.")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long (default: 120)")
    parser.add_argument("--seed", type=int, help="the first seed (default: from the commit)")
    parser.add_argument("--readers", nargs="+", help="names of readers (default: all)")
    parser.add_argument("--trial", type=int, help="read only this trial")
    parser.add_argument("--keep", type=Path, help="a new folder for the files of the trial")
    options = parser.parse_args()
    begin = time.monotonic()
    first = seed_of_commit() if options.seed is None else options.seed
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        readers = {reader.name: reader for reader in make_readers(Path(folder) / "examples")}
        names = options.readers or [ROWS, *readers]
        if unknown := [name for name in names if name != ROWS and name not in readers]:
            parser.error(f"unknown: {', '.join(unknown)}; the readers are {', '.join([ROWS, *readers])}")
        others = [content for reader in readers.values() for files in reader.examples for content in files.values()]
        for reader in readers.values():
            check_examples(reader, scratch)
        if options.trial is not None:
            if options.keep:
                files_of(readers[names[0]], options.trial, options.keep, others)
                print(f"the files of trial {options.trial} are in {options.keep}")
            first, options.seconds = options.trial, 0.0
        left = options.seconds - (time.monotonic() - begin)
        seconds = left / (len(names) + ROWS_SHARES - 1 if ROWS in names else len(names))
        if ROWS in names:
            print(fuzz_rows(scratch, first, ROWS_SHARES * seconds), flush=True)
        kinds = sum(fuzz_bytes(readers[name], scratch, others, first, seconds) for name in names if name != ROWS)
    print(f"{kinds} kinds of failure" if kinds else "nothing found")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
