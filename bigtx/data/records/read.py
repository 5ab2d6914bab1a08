"""Files -> records, in an order that depends on names alone; whatever cannot be read is told with file and line.

folder of folders of texts    each text a record {text, label}, the folder's name being the label (as in the
                              Large Movie Review Dataset)
folder of texts               each text a record {text}
folder of recordings          each .wav or .flac a record {audio, text}, the text being that of the .txt beside it
folder of files below         each file as if it had been named
.wav, .flac                   a record {audio, text}, as in a folder
.jsonl                        an object in each line
.csv, .tsv                    a row each; the first one names the fields
.tar                          a webdataset sample each: .json gives fields, .txt `text`, .cls `label`, .wav and
                              .flac `audio`
x.{de,en}.gz                  the lines of two text files side by side, {source, target}
"""

from __future__ import annotations

import csv
import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from bigtx.data.audio.decode import AUDIO_SUFFIXES, AudioPlace
from bigtx.data.raw import own
from bigtx.data.raw.archives import DamagedArchiveError, Member, read_members
from bigtx.data.raw.documents import Rejects
from bigtx.data.raw.formats import READ_ERRORS, decompressed, is_compressed, read_up_to, suffix_inside
from bigtx.data.raw.records import BadRecordError as BadJsonError
from bigtx.data.raw.records import not_utf8, parse_json, unreadable
from bigtx.data.records.record import WHOLE_FILE, Broken, Record
from bigtx.data.storage.access import CHUNK_BYTES
from bigtx.utils.errors import DataError
from bigtx.utils.files import NOT_A_FILE, no_file, open_file

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".tar")
TEXT_SUFFIXES = (".txt", ".md")
PAIR = re.compile(r"\{([^{},/]+),([^{},/]+)\}")
"""Two files side by side."""
MAX_RECORD_BYTES = 64 << 20
TOO_LARGE = f"longer than {MAX_RECORD_BYTES >> 20} MiB"


def read_records(paths: Sequence[str], broken: Broken, exclude: Sequence[str] = ()) -> Iterator[Record]:
    """All records of files, folders and globs, in the order given; folders and globs in the order of names.

    What cannot be read goes to `broken`.

    Args:
        exclude: names, or globs of them, of what is left out of folders.

    Raises:
        DataError: a path that names nothing, or a file whose kind is not known.
    """
    for path in paths:
        for file in expand_path(path):
            yield from _read_path(file, broken, exclude)


def natural(text: str) -> list[Any]:
    """A sorting key in which numbers count as numbers: 9_7 comes before 10_1."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def expand_path(path: str) -> list[str]:
    """The files and folders that a path or a glob stands for; two files side by side stay one path.

    Raises:
        DataError: there is none.
    """
    if kind := no_file(path):
        raise DataError(f"{path} is {kind}, {NOT_A_FILE} (or, for `bigtx predict`, give it by `--input -`)")
    if PAIR.search(path) or Path(path).exists():
        return [path]
    found = sorted((each for each in glob.glob(path, recursive=True) if not no_file(each)), key=natural)
    if not found:
        raise DataError(f"no file or folder {path!r} to read records from")
    return found


def _read_path(path: str, broken: Broken, exclude: Sequence[str]) -> Iterator[Record]:
    if PAIR.search(path):
        yield from _read_side_by_side(path, broken)
    elif Path(path).is_dir():
        yield from _read_folder(Path(path), broken, exclude)
    else:
        yield from _read_file(path, broken)


def _read_folder(folder: Path, broken: Broken, exclude: Sequence[str]) -> Iterator[Record]:
    left_out = (".*", *exclude)
    own.refuse_own(str(folder), "data")
    entries = sorted(
        (
            folder / name
            for name in own.without_own(str(folder), os.listdir(folder))
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out) and not no_file(folder / name)
        ),
        key=_by_name,
    )
    files = [entry for entry in entries if suffix_inside(entry.name) in RECORD_SUFFIXES]
    if files:
        for file in files:
            yield from _read_file(str(file), broken)
        return
    recordings = [entry for entry in entries if _is_recording(entry.name)]
    if recordings:
        stems = {entry.stem for entry in recordings}
        for file in entries:
            if file in recordings:
                yield from _recording(file, broken)
            elif _is_text(file) and file.stem not in stems:
                broken.add(str(file), 0, f"a text without a recording beside it ({' or '.join(AUDIO_SUFFIXES)})")
        return
    classes = [entry for entry in entries if entry.is_dir() and any(map(_is_text, entry.iterdir()))]
    texts = [entry for entry in entries if _is_text(entry)]
    if not classes and not texts:
        raise DataError(
            f"{folder} holds no records: neither {', '.join(RECORD_SUFFIXES + AUDIO_SUFFIXES)} files, nor a folder of "
            "texts a class, nor texts"
        )
    for file in [] if classes else texts:
        yield from _text_record(file, {}, broken)
    for of_class in classes:
        for file in sorted(filter(_is_text, of_class.iterdir()), key=_by_name):
            yield from _text_record(file, {"label": of_class.name}, broken)


def _by_name(path: Path) -> list[Any]:
    return natural(path.name)


def _is_text(path: Path) -> bool:
    return suffix_inside(path.name) in TEXT_SUFFIXES and not path.name.startswith(".")


def _is_recording(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def _recording(path: Path, broken: Broken) -> Iterator[Record]:
    """A file of sound as a record, with the text beside it if there is one."""
    try:
        fields = {"audio": AudioPlace(path.name, str(path), 0, path.stat().st_size)}
    except OSError as error:
        broken.add(str(path), 0, unreadable(error))
        return
    text = path.with_suffix(".txt")
    if text.is_file():
        yield from (Record(record.fields, str(path), WHOLE_FILE) for record in _text_record(text, fields, broken))
    else:
        yield Record(fields, str(path), WHOLE_FILE)


def _text_record(path: Path, others: dict[str, Any], broken: Broken) -> Iterator[Record]:
    """A text file as a record, beside other fields."""
    try:
        with open_file(path) as stored:
            raw = read_up_to(decompressed(stored, path.name), MAX_RECORD_BYTES + 1)
    except READ_ERRORS as error:
        broken.add(str(path), 0, unreadable(error))
        return
    if len(raw) > MAX_RECORD_BYTES:
        broken.add(str(path), 0, TOO_LARGE)
        return
    try:
        yield Record({"text": raw.decode("utf-8-sig"), **others}, str(path), WHOLE_FILE)
    except UnicodeDecodeError as error:
        broken.add(str(path), 0, not_utf8(raw, error))


def _read_file(path: str, broken: Broken) -> Iterator[Record]:
    if _is_recording(path):
        yield from _recording(Path(path), broken)
        return
    suffix = suffix_inside(path)
    readers = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".csv": _read_table, ".tsv": _read_table}
    if suffix not in (*readers, ".tar"):
        raise DataError(
            f"cannot tell what records {path} holds: it ends in none of {', '.join(RECORD_SUFFIXES + AUDIO_SUFFIXES)}"
        )
    try:
        with open_file(path) as stored:
            stream = decompressed(stored, path)
            if suffix == ".tar":
                yield from _read_samples(stream, path, broken)
            else:
                yield from readers[suffix](stream, path, broken)
    except READ_ERRORS as error:
        broken.add(path, 0, unreadable(error))


def read_jsonl(stream: BinaryIO, path: str, broken: Broken) -> Iterator[Record]:
    """A record in each line that is not blank.

    Args:
        path: what errors name the stream.
    """
    line = 0
    while raw := stream.readline(MAX_RECORD_BYTES + 1):
        line += 1
        if len(raw) > MAX_RECORD_BYTES:
            broken.add(path, line, TOO_LARGE)
            while not raw.endswith(b"\n") and (raw := stream.readline(CHUNK_BYTES)):
                pass
            continue
        if not raw.strip():
            continue
        try:
            yield Record(parse_json(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw), path, line)
        except UnicodeDecodeError as error:
            broken.add(path, line, not_utf8(raw, error))
        except BadJsonError as error:
            broken.add(path, line, str(error))


def _read_table(stream: BinaryIO, path: str, broken: Broken) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _Decoded(stream)
    reader = csv.reader(lines, delimiter="\t" if suffix_inside(path) == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        line = lines.number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            broken.add(path, lines.number, f"not UTF-8: {error.reason} at byte {error.start + 1} of the line")
            continue
        except csv.Error as error:
            broken.add(path, line, str(error))
            continue
        if header is None:
            header = row
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                broken.add(path, 1, f"the first line names columns twice: {', '.join(repeated)}")
                return
        elif row and len(row) != len(header):
            broken.add(path, line, f"{len(row)} fields where the first line names {len(header)} columns")
        elif row:
            yield Record(dict(zip(header, row, strict=True)), path, line)


class _Decoded:
    """The lines of a stream as text, counted."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.number = 0

    def __iter__(self) -> _Decoded:
        return self

    def __next__(self) -> str:
        raw = self._stream.readline()
        if not raw:
            raise StopIteration
        self.number += 1
        return raw.decode("utf-8-sig" if self.number == 1 else "utf-8")


def _read_samples(stream: BinaryIO, path: str, broken: Broken) -> Iterator[Record]:
    """The samples of a webdataset shard: neighbouring members whose names agree up to the first dot."""
    rejects = Rejects(1.0, sink=lambda reject: broken.add(reject.file, reject.line, reject.reason))
    key, fields, first, is_whole = "", dict[str, Any](), "", True
    seen: set[str] = set()
    try:
        for member in read_members(stream, path, rejects):
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if f"{folder}{slash}{stem}" != key:
                if fields and is_whole:
                    yield Record(fields, first, WHOLE_FILE)
                key, fields, first, is_whole = f"{folder}{slash}{stem}", {}, f"{path}/{member.name}", True
                if key in seen:
                    broken.add(first, 0, f"the key {key!r} comes twice in the shard, or its members are interleaved")
                    is_whole = False
                seen.add(key)
            before = broken.count
            fields |= _member_fields(member, suffix.lower(), path, broken)
            is_whole = is_whole and broken.count == before
    except DamagedArchiveError as error:
        broken.add(path, 0, str(error))
        return
    if fields and is_whole:
        yield Record(fields, first, WHOLE_FILE)


def _member_fields(member: Member, suffix: str, archive: str, broken: Broken) -> dict[str, Any]:
    """What a member adds to its sample; members with other suffixes are passed over, and never decoded."""
    names = {"txt": "text", "cls": "label", "json": ""} | dict.fromkeys(
        (suffix.removeprefix(".") for suffix in AUDIO_SUFFIXES), "audio"
    )
    if suffix not in names:
        return {}
    where = f"{archive}/{member.name}"
    if names[suffix] == "audio" and not is_compressed(archive):
        return {"audio": AudioPlace(member.name, archive, member.content_offset, member.size)}
    raw = member.stream.read(MAX_RECORD_BYTES + 1)
    try:
        if len(raw) > MAX_RECORD_BYTES:
            raise BadJsonError(TOO_LARGE)
        if names[suffix] == "audio":
            return {"audio": AudioPlace(member.name, archive, member.content_offset, member.size, raw)}
        if suffix == "json":
            return parse_json(raw)
        text = raw.decode("utf-8-sig")
        return {names[suffix]: text.strip() if suffix == "cls" else text}
    except UnicodeDecodeError as error:
        broken.add(where, 0, not_utf8(raw, error))
    except BadJsonError as error:
        broken.add(where, 0, str(error))
    return {}


def _read_side_by_side(path: str, broken: Broken) -> Iterator[Record]:
    """The lines of two files, as `source` and `target`."""
    match = PAIR.search(path)
    assert match is not None
    files = [path[: match.start()] + side + path[match.end() :] for side in match.groups()]
    sides = []
    for file in files:
        try:
            with open_file(file) as stored:
                sides.append(decompressed(stored, file).read().split(b"\n"))
        except FileNotFoundError:
            raise DataError(f"no file {file}, one of the two that {path!r} stands for") from None
        except READ_ERRORS as error:
            broken.add(file, 0, unreadable(error))
            return
    sides = [lines[:-1] if lines[-1] == b"" else lines for lines in sides]
    if len(sides[0]) != len(sides[1]):
        counts = " and ".join(f"{file} has {len(lines):,}" for file, lines in zip(files, sides, strict=True))
        broken.add(path, 0, f"the two files must have as many lines: {counts}")
        return
    for line, pair in enumerate(zip(*sides, strict=True), start=1):
        texts = []
        for file, raw in zip(files, pair, strict=True):
            try:
                texts.append(raw.removesuffix(b"\r").decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                broken.add(file, line, not_utf8(raw, error))
        if len(texts) == len(pair):
            yield Record({"source": texts[0], "target": texts[1]}, files[0], line)
