"""Files -> records, in an order that depends on names only; what cannot be read is reported with file and line.

folder of folders of texts    each text a record {text, label}, the folder's name being the label (as in the
                              Large Movie Review Dataset)
folder of texts               each text a record {text}
folder of recordings          each .wav or .flac a record {audio, text}, with the text of the .txt next to it
folder of files below         each file as if it were named itself
.wav, .flac                   a record {audio, text}, as in a folder
.jsonl, .json                 an object in each line, or one object
.csv, .tsv                    a row each; the first one names the fields
.tar                          a webdataset sample each: .json gives fields, .txt `text`, .cls `label`, .wav and
                              .flac `audio`; files of the kinds above in it are read as they are
x.{de,en}.gz                  the lines of two text files side by side, {source, target}

All except the last are read by the reader of `bigtx data prepare`, as rows of all their fields.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from bigtx.data.raw import documents, formats
from bigtx.data.raw.archives import Member
from bigtx.data.raw.documents import Rejects
from bigtx.data.raw.formats import BadRowError
from bigtx.data.raw.read import read_rows
from bigtx.data.raw.rows import Options, Origin, Row, lines, read_json_lines, too_long
from bigtx.data.recordings import AUDIO_SUFFIXES, AudioPlace
from bigtx.data.records.record import WHOLE_FILE, Broken, Record
from bigtx.data.storage.access import InputFile
from bigtx.utils.errors import DataError
from bigtx.utils.files import NOT_A_FILE, no_file, open_file, refuse_own, without_own

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tar")
TEXT_SUFFIXES = (".txt", ".md")
PAIR = re.compile(r"\{([^{},/]+),([^{},/]+)\}")
"""The pattern of two parallel files."""


def read_records(paths: Sequence[str], broken: Broken, exclude: Sequence[str] = ()) -> Iterator[Record]:
    """Yield all records of files, folders and globs, in the order given; folders and globs in the order of names.

    What cannot be read is added to `broken`.

    Args:
        exclude: names, or globs of names, to leave out of folders.

    Raises:
        DataError: a path that names nothing, or a file whose kind is not known.
    """
    for path in paths:
        for file in expand_path(path):
            yield from _read_path(file, broken, exclude)


def natural(text: str) -> list[Any]:
    """Return a sorting key in which numbers count as numbers: 9_7 comes before 10_1."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def expand_path(path: str) -> list[str]:
    """Return the files and folders that a path or a glob means; two parallel files stay one path.

    Raises:
        DataError: they do not exist.
    """
    if kind := no_file(path):
        raise DataError(f"{path} is {kind}, {NOT_A_FILE} (or, for `bigtx predict`, pass it by `input=-`)")
    if PAIR.search(path) or Path(path).exists():
        return [path]
    found = sorted((each for each in glob.glob(path, recursive=True) if not no_file(each)), key=natural)
    if not found:
        raise DataError(f"no file or folder {path!r} to read records from")
    return found


def read_jsonl(stream: BinaryIO, path: str, broken: Broken) -> Iterator[Record]:
    """Yield the record of each line that is not blank.

    Args:
        path: the name of the stream in errors.
    """
    yield from _records(read_json_lines(stream, Origin(path, path), Options(), broken.rejects()), broken)


def _read_path(path: str, broken: Broken, exclude: Sequence[str]) -> Iterator[Record]:
    if PAIR.search(path):
        yield from _read_side_by_side(path, broken)
    elif Path(path).is_dir():
        yield from _read_folder(Path(path), broken, exclude)
    else:
        yield from _read_file(path, broken, exclude)


def _read_folder(folder: Path, broken: Broken, exclude: Sequence[str]) -> Iterator[Record]:
    left_out = (".*", *exclude)
    refuse_own(str(folder))
    entries = sorted(
        (
            folder / name
            for name in without_own(str(folder), os.listdir(folder))
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out) and not no_file(folder / name)
        ),
        key=_by_name,
    )
    files = [entry for entry in entries if formats.suffix_inside(entry.name) in RECORD_SUFFIXES]
    if files:
        for file in files:
            yield from _read_file(str(file), broken, exclude)
        return
    recordings = [entry for entry in entries if _is_recording(entry.name)]
    if recordings:
        stems = {entry.stem for entry in recordings}
        for file in entries:
            if file in recordings:
                yield from _recording(file, broken)
            elif _is_text(file) and file.stem not in stems:
                broken.add(str(file), 0, f"a text without a recording next to it ({' or '.join(AUDIO_SUFFIXES)})")
        return
    classes = [entry for entry in entries if entry.is_dir() and any(map(_is_text, entry.iterdir()))]
    texts = [entry for entry in entries if _is_text(entry)]
    if not classes and not texts:
        raise DataError(
            f"{folder} has no records: no {', '.join(RECORD_SUFFIXES + AUDIO_SUFFIXES)} files, no folder of texts "
            "for each class, and no texts"
        )
    for file in [] if classes else texts:
        yield from _text_record(file, {}, broken)
    for of_class in classes:
        for file in sorted(filter(_is_text, of_class.iterdir()), key=_by_name):
            yield from _text_record(file, {"label": of_class.name}, broken)


def _by_name(path: Path) -> list[Any]:
    return natural(path.name)


def _is_text(path: Path) -> bool:
    return formats.suffix_inside(path.name) in TEXT_SUFFIXES and not path.name.startswith(".")


def _is_recording(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def _recording(path: Path, broken: Broken) -> Iterator[Record]:
    """Yield an audio file as a record, with the text next to it if there is one."""
    try:
        fields = {"audio": AudioPlace(path.name, str(path), 0, path.stat().st_size)}
    except OSError as error:
        broken.add(str(path), 0, formats.unreadable(error))
        return
    text = path.with_suffix(".txt")
    if text.is_file():
        yield from (Record(record.fields, str(path), WHOLE_FILE) for record in _text_record(text, fields, broken))
    else:
        yield Record(fields, str(path), WHOLE_FILE)


def _text_record(path: Path, others: dict[str, Any], broken: Broken) -> Iterator[Record]:
    """Yield a text file as a record, with other fields."""
    for record in _records(_rows(str(path), Options(text_suffixes=TEXT_SUFFIXES), broken), broken):
        yield Record({**record.fields, **others}, record.file, WHOLE_FILE)


def _read_file(path: str, broken: Broken, exclude: Sequence[str]) -> Iterator[Record]:
    if _is_recording(path):
        yield from _recording(Path(path), broken)
        return
    if formats.suffix_inside(path) not in RECORD_SUFFIXES:
        raise DataError(
            f"the format of {path} is not known: its name does not end in one of "
            f"{', '.join(RECORD_SUFFIXES + AUDIO_SUFFIXES)}; {formats.why_unknown(path)}"
        )
    members: dict[str, Any] = {".cls": ("label", _label)}
    members |= dict.fromkeys(AUDIO_SUFFIXES, ("audio", _Recordings(path)))
    options = Options(text_suffixes=TEXT_SUFFIXES, exclude=exclude, members=members, strict=True)
    yield from _records(_rows(path, options, broken), broken)


def _rows(path: str, options: Options, broken: Broken) -> Iterator[Row]:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        broken.add(path, 0, formats.unreadable(error))
        return
    yield from read_rows(InputFile(path, size), options, broken.rejects())


def _records(rows: Iterator[Row], broken: Broken) -> Iterator[Record]:
    """Yield rows as records; report those with a text that is not valid text."""
    for row in rows:
        # A file or sample as a whole has a name, and lines have numbers.
        line = row.line if row.id is None else WHOLE_FILE
        try:
            formats.check_texts(row.fields)
        except BadRowError as error:
            broken.add(row.file, line, str(error))
        else:
            yield Record(row.fields, row.file, line)


def _label(member: Member, stream: BinaryIO) -> str:
    return formats.decode(formats.without_signature(_bytes_of(stream))).strip()


class _Recordings:
    """The places of the recordings of an archive; those of a compressed one are kept in memory."""

    def __init__(self, archive: str) -> None:
        self._archive, self._is_packed = archive, formats.is_compressed(archive)

    def __call__(self, member: Member, stream: BinaryIO) -> AudioPlace:
        content = _bytes_of(stream) if self._is_packed else None
        return AudioPlace(member.name, self._archive, member.content_offset, member.size, content)


def _bytes_of(stream: BinaryIO) -> bytes:
    """Return all bytes of a member.

    Raises:
        BadRowError: there are too many, or they cannot be read.
    """
    try:
        raw = formats.read_up_to(stream, documents.MAX_DOCUMENT_BYTES + 1)
    except formats.READ_ERRORS as error:
        raise BadRowError(formats.unreadable(error)) from None
    if len(raw) > documents.MAX_DOCUMENT_BYTES:
        raise BadRowError(too_long())
    return raw


def _read_side_by_side(path: str, broken: Broken) -> Iterator[Record]:
    """Yield the lines of two files, as `source` and `target`."""
    match = PAIR.search(path)
    assert match is not None
    files = [path[: match.start()] + side + path[match.end() :] for side in match.groups()]
    sides = []
    for file in files:
        rejects = Rejects(1.0, broken.reject)
        try:
            with open_file(file) as stored:
                sides.append(list(lines(formats.decompressed(stored, file), Origin(file, file), rejects)))
        except FileNotFoundError:
            raise DataError(f"no file {file}, which is one of the two files of {path!r}") from None
        except OSError as error:
            broken.add(file, 0, formats.unreadable(error))
            return
        if rejects:
            return
    if len(sides[0]) != len(sides[1]):
        counts = " and ".join(f"{file} has {len(found):,}" for file, found in zip(files, sides, strict=True))
        broken.add(path, 0, f"the two files must have the same number of lines: {counts}")
        return
    for (line, source), (_, target) in zip(*sides, strict=True):
        texts = []
        for file, raw in zip(files, (source, target), strict=True):
            try:
                texts.append(formats.decode(raw.removesuffix(b"\n").removesuffix(b"\r")))
            except BadRowError as error:
                broken.add(file, line, str(error))
        if len(texts) == len(files):
            yield Record({"source": texts[0], "target": texts[1]}, files[0], line)
