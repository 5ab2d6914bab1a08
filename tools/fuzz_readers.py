"""Fuzz all readers of rows: the items that are read plus those that count as lost must be the items of the file.

    python tools/fuzz_readers.py --seconds 120             seeds depend on the commit
    python tools/fuzz_readers.py --seconds 3600 --seed 7   other seeds

Random files are made of items that are known to be good or bad: texts, JSON lines, tables, archives of files and of
samples, with random names, quotation marks, encodings, duplicates and compressions. Each file is read in three ways:

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
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard
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


def rounds(first_seed: int, seconds: float) -> Iterator[int]:
    """Yield seeds until the time is over."""
    end = time.monotonic() + seconds
    number = first_seed
    while time.monotonic() < end:
        yield number
        number += 1


def seed_of_commit() -> int:
    """Return a seed that depends on the commit, so that each commit tests other files."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return int(found.stdout.strip()[:8] or "0", 16)


def main() -> int:
    """Fuzz for the given time."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of rows.")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long (default: 120)")
    parser.add_argument("--seed", type=int, help="the first seed (default: from the commit)")
    options = parser.parse_args()
    first = seed_of_commit() if options.seed is None else options.seed
    count = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in rounds(first, options.seconds):

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
                check(Path(scratch), made, suffix, damage)

            try:
                try_one()
            except BaseException:
                print(f"seed {number} fails: python tools/fuzz_readers.py --seed {number} --seconds 1", file=sys.stderr)
                raise
            count += EXAMPLES_AT_ONCE
    print(f"{count:,} files in seeds {first} to {number}: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
