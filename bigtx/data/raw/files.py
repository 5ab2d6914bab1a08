"""The files of the raw text: folders, globs, URLs and single files -> an ordered list.

The order depends only on the configuration and the names, so every job that reads the same input gets the same
documents in the same order, on any machine.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import BinaryIO

from bigtx.config.nodes import Problem, raise_problems
from bigtx.config.schema import InputConfig
from bigtx.data.raw import formats
from bigtx.data.raw.formats import Format
from bigtx.data.raw.readers import check_package, row_group_ranges
from bigtx.data.raw.rows import is_json_lines
from bigtx.data.storage import buckets
from bigtx.data.storage.access import CHUNK_BYTES, InputFile, is_remote, stat
from bigtx.data.storage.remote import check_scheme, name_of, scheme_of, shown
from bigtx.utils.errors import DataError
from bigtx.utils.files import MADE, NOT_A_FILE, is_own_file, kind_of_own, no_file, own_of, refuse_own

_BRACES = re.compile(r"\{(?:(\d{1,12})\.\.(\d{1,12})|([^{}]*,[^{}]*))\}")
_MAX_EXPANDED = 1_000_000
_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True)
class _Input:
    """The input, and the section of the configuration that names it, for messages."""

    config: InputConfig
    section: str

    @property
    def paths(self) -> str:
        """Return the setting that names the input."""
        return f"{self.section}.paths"

    @property
    def has_suffixes(self) -> bool:
        """Return whether the section has settings for the suffixes of texts and for what is left out of folders."""
        return self.section == "input"


def list_files(config: InputConfig, passed_over: Counter[str] | None = None, section: str = "input") -> list[InputFile]:
    """Return the files that `config.paths` names, each once.

    `passed_over`, if given, counts by suffix the files of folders and globs that are not read. `section` is the section
    of the paths in the configuration, for messages.

    Paths keep the order in which they are written, `{000..010}` and `{a,b}` in them are expanded; the files of a
    folder or glob are sorted by their path in it. Folders are read recursively, links included; names that begin with a
    dot are left out. In folders and globs, files with other suffixes are skipped; a file that is named itself must
    have a suffix that is known.

    Raises:
        ConfigError: a suffix of text files that belongs to another format.
        DataError: there are no paths, a path names nothing readable, a protocol is not supported, or a package is
            missing.
    """
    if not config.paths:
        raise DataError(
            f"No input: {section}.paths is empty. Name files, folders or globs, e.g. {section}.paths=my/texts."
        )
    raise_problems(suffix_problems(config))
    inputs = _Input(config, section)
    passed_over = Counter() if passed_over is None else passed_over
    files: dict[str, InputFile] = {}
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        paths = [expanded for path in config.paths for expanded in _expanded(path, inputs)]
        # Each file of a web server needs a request, and there may be many.
        web = [path for path in paths if _is_of_web(path)]
        asked = {path: pool.submit(_files_of, path, inputs, passed_over) for path in web}
        try:
            for path in paths:
                for file in asked[path].result() if path in asked else _files_of(path, inputs, passed_over):
                    files.setdefault(file.path if is_remote(file.path) else os.path.abspath(file.path), file)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for file in files.values():
        if formats.format_of(name_of(file.path), config.text_suffixes) is Format.PARQUET:
            check_package(file.shown, config.exclude if inputs.has_suffixes else None)
            break
    return list(files.values())


def describe_passed_over(counts: Counter[str]) -> Iterator[str]:
    """Yield the counts of files that were not read, as lines of text."""
    others = Counter({suffix: number for suffix, number in counts.items() if suffix != MADE})
    if others:
        yield f"Skipped, by their suffix: {counts_by_suffix(others)}; see input.text_suffixes."
    if counts[MADE]:
        yield f"Skipped: {counts[MADE]:,} folders or files made by bigtx."


def counts_by_suffix(counts: Counter[str]) -> str:
    """Return the numbers of files by suffix as text, the most frequent first."""
    parts = [f"{number:,} {suffix}" for suffix, number in counts.most_common(4)]
    rest = sum(counts.values()) - sum(number for _, number in counts.most_common(4))
    return ", ".join(parts + [f"{rest:,} others"] * (rest > 0))


def split_file(file: InputFile, config: InputConfig, part_bytes: int) -> list[InputFile]:
    """Cut a large local file into ranges of about `part_bytes`, for several processes.

    Files whose documents are lines are cut between lines if they are not compressed, parquet between row groups. A file
    of lines is read once for that, at the speed of the disk, to number them; so remote files are returned as they are,
    like all others.
    """
    kind = formats.format_of(file.path, config.text_suffixes)
    if is_remote(file.path) or formats.is_compressed(file.path) or file.size <= part_bytes:
        return [file]
    try:
        if kind is Format.PARQUET:
            return row_group_ranges(file, part_bytes)
        if (
            kind is Format.JSON_LINES
            or (kind is Format.TEXT and config.document_per_line)
            or (kind is Format.JSON and _holds_json_lines(file))
        ):
            return _line_ranges(file, part_bytes)
    except OSError:
        pass  # The reader reports what is wrong with it.
    return [file]


def is_left_out(relative: str, exclude: Sequence[str]) -> bool:
    """Return whether a path within a folder or archive is not to be read: hidden names, and names that `exclude`
    matches.
    """
    hidden = any(name.startswith(".") and name != ".." for name in relative.split("/"))
    return hidden or _is_excluded(relative, exclude)


def expand_braces(path: str) -> Iterator[str]:
    """Yield the paths that `{000..010}` and `{a,b}` in a path mean, in a shell's order."""
    match = _BRACES.search(path)
    if not match:
        yield path
        return
    first, last, listed = match.groups()
    if listed is None:
        # As in a shell, a leading zero gives all of them the same width.
        has_width = any(len(end) > 1 and end.startswith("0") for end in (first, last))
        width = max(len(first), len(last)) if has_width else 0
        step = 1 if int(first) <= int(last) else -1
        options: Iterable[str] = (f"{n:0{width}d}" for n in range(int(first), int(last) + step, step))
    else:
        options = listed.split(",")
    for option in options:
        yield from (f"{path[: match.start()]}{option}{rest}" for rest in expand_braces(path[match.end() :]))


def _expanded(path: str, inputs: _Input) -> list[str]:
    """Return the paths that braces mean in a shell."""
    check_scheme(path)
    if "{" not in path or (not is_remote(path) and os.path.lexists(path)):
        return [path]
    paths = list(itertools.islice(expand_braces(path), _MAX_EXPANDED + 1))
    if len(paths) > _MAX_EXPANDED:
        raise DataError(f"{shown(path)} in {inputs.paths} expands to more than {_MAX_EXPANDED:,} paths; use fewer.")
    for expanded in paths:
        check_scheme(expanded)
    return paths


def _is_of_web(path: str) -> bool:
    return scheme_of(path).startswith("http")


def _files_of(path: str, inputs: _Input, passed_over: Counter[str]) -> list[InputFile]:
    """Return the files that a path means, with their sizes and versions."""
    if _is_of_web(path):
        if "*" in name_of(path):
            raise DataError(
                f"{shown(path)} in {inputs.paths}: a web server does not list its files. Name them, e.g. with "
                "{000..010}."
            )
        _refuse_unknown(path, inputs)
    try:
        if not is_remote(path):
            return _local_files(path, inputs, passed_over)
        if glob.has_magic(path) and not _is_of_web(path):
            base, candidates = _fixed_part(path), buckets.glob(path)
            for folder in [found for found, (size, _) in candidates.items() if size < 0]:
                candidates.pop(folder)
                candidates.update(buckets.find(folder))
        else:
            size, version = stat(path)
            if size >= 0:
                _refuse_unknown(path, inputs)
                return [InputFile(path, size, version=version, name=name_of(path).rpartition("/")[2])]
            base, candidates = path.rstrip("/"), buckets.find(path)
    except OSError as error:
        raise _unreachable(path, inputs, error) from None
    relative = {found: found[len(base) :].lstrip("/") for found in candidates}
    names = [found for found in relative if not is_left_out(relative[found], inputs.config.exclude)]
    return [
        InputFile(found, candidates[found][0], version=candidates[found][1], name=relative[found])
        for found in _known(path, names, inputs, passed_over)
    ]


def _local_files(path: str, inputs: _Input, passed_over: Counter[str]) -> list[InputFile]:
    if os.path.isdir(path):
        refuse_own(path, inputs.paths)
        base, candidates = path, list(_walk(path, inputs, passed_over))
    elif kind := no_file(path):
        raise DataError(f"{path} (named in {inputs.paths}) is {kind}, {NOT_A_FILE}.")
    elif os.path.exists(path):
        _refuse_unknown(path, inputs)
        return [_local(path, os.path.basename(path))]
    elif glob.has_magic(path):
        base = _fixed_part(path)
        candidates, known = [], dict[str, bool]()
        for match in sorted(glob.glob(path, recursive=True)):
            if _is_excluded(os.path.relpath(match, base), inputs.config.exclude) or own_of(match, base, known):
                continue
            if os.path.isdir(match):
                candidates += _walk(match, inputs, passed_over)
            elif not no_file(match):
                candidates.append(match)
        passed_over.update({MADE: sum(known.values())} if any(known.values()) else {})
    else:
        raise DataError(f"There is no file or folder {path} (named in {inputs.paths}).")
    return [_local(found, os.path.relpath(found, base)) for found in _known(path, candidates, inputs, passed_over)]


def _local(path: str, name: str) -> InputFile:
    try:
        size, version = stat(path)
    except OSError:
        size, version = 0, ""  # A broken link: the reader rejects it by name.
    return InputFile(path, size, version=version, name=name)


def _unreachable(path: str, inputs: _Input, error: OSError) -> DataError:
    return DataError(f"{shown(path)} (named in {inputs.paths}) cannot be read: {error.strerror or error}.")


def _known(path: str, candidates: list[str], inputs: _Input, passed_over: Counter[str]) -> list[str]:
    """Return those of a folder's or glob's files that are read, sorted; the others are counted."""
    files = sorted({found for found in candidates if formats.format_of(found, inputs.config.text_suffixes)})
    others = Counter(formats.suffix_of(found) for found in set(candidates).difference(files))
    passed_over.update(others)
    if not files:
        inside = f"; it has {counts_by_suffix(others)}" if others else ""
        suffixes = "the suffixes of text files in input.text_suffixes, or " if inputs.has_suffixes else ""
        raise DataError(
            f"No text in {path}: no file in it ends in {_listed([*inputs.config.text_suffixes, *formats.SUFFIXES])} "
            f"(plain or compressed){inside}. Name {suffixes}another folder."
        )
    return files


def suffix_problems(config: InputConfig) -> Iterator[Problem]:
    """Yield a problem for each suffix of text files that has no effect because its files are read in another way."""
    for suffix in config.text_suffixes:
        kind = formats.format_of(f"a{suffix}", ())
        if kind or formats.is_compressed(f"a{suffix}"):
            what = f"{kind.value}, not as plain text" if kind else "archives or compressed files"
            yield Problem("input.text_suffixes", "", f"files that end in {suffix} are read as {what}; leave it out")


def _refuse_unknown(path: str, inputs: _Input) -> None:
    """Refuse a file that is named itself and has an unknown suffix."""
    name = name_of(path)
    if formats.format_of(name, inputs.config.text_suffixes):
        return
    suffixes = inputs.config.text_suffixes
    named = f"input.text_suffixes ({_listed(suffixes)})" if inputs.has_suffixes else _listed(suffixes)
    raise DataError(
        f"The format of {shown(path)} is not known: its name does not end in one of "
        f"{_listed(formats.SUFFIXES)}, or in one of {named}, "
        f"plain or with one of {_listed(formats.COMPRESSION_SUFFIXES)}: "
        f"{formats.why_unknown(name, suffixes if inputs.has_suffixes else None)}."
    )


def _walk(folder: str, inputs: _Input, passed_over: Counter[str]) -> Iterator[str]:
    """Yield all files below a folder that are not excluded and not made by bigtx; links to folders are followed, each
    once.
    """
    visited: set[str] = set()
    pending = [folder]
    while pending:
        current = pending.pop()
        real = os.path.realpath(current)
        if real in visited:
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"Cannot read the folder {current}: {error.strerror}.") from error
        names = {entry.name for entry in entries}
        if current != folder and kind_of_own(current, names):
            passed_over[MADE] += 1
            continue
        for entry in entries:
            if entry.name.startswith(".") or _is_excluded(os.path.relpath(entry.path, folder), inputs.config.exclude):
                continue
            if entry.is_dir():
                pending.append(entry.path)
            elif is_own_file(entry.path, names):
                passed_over[MADE] += 1
            elif entry.is_file() or (entry.is_symlink() and not no_file(entry.path)):
                # A broken link is rejected by name when it is read; pipes and devices are not texts.
                yield entry.path


def _is_excluded(relative: str, exclude: Sequence[str]) -> bool:
    names = relative.split("/")
    for pattern in exclude:
        if "/" not in pattern:
            if fnmatch.filter(names, pattern):
                return True
        # With a leading slash, */test/* matches a folder test at the top too.
        elif fnmatch.fnmatchcase(relative, pattern) or fnmatch.fnmatchcase(f"/{relative}", pattern):
            return True
    return False


def _fixed_part(pattern: str) -> str:
    """Return the folder before the first wildcard of a glob."""
    parts = pattern.split("/")
    fixed = "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1]))
    return fixed or ("/" if pattern.startswith("/") else ".")


def _listed(suffixes: tuple[str, ...] | list[str]) -> str:
    return ", ".join(suffixes)


def _line_ranges(file: InputFile, part_bytes: int) -> list[InputFile]:
    parts: list[InputFile] = []
    with open(file.path, "rb") as stream:
        start, first_line = 0, 1
        while start < file.size:
            num_lines = _skip_lines(stream, min(part_bytes, file.size - start))
            end = stream.tell()
            if end == start:
                break  # The file has become shorter; the reader reports it.
            parts.append(replace(file, size=end - start, start=start, end=end, first_line=first_line))
            start, first_line = end, first_line + num_lines
    return parts


def _holds_json_lines(file: InputFile) -> bool:
    with open(file.path, "rb") as stream:
        return is_json_lines(stream.read(CHUNK_BYTES))


def _skip_lines(stream: BinaryIO, num_bytes: int) -> int:
    """Read at least `num_bytes` and up to the end of the line; return how many lines that was."""
    num_lines, last = 0, b"\n"
    while num_bytes > 0 and (chunk := stream.read(min(num_bytes, CHUNK_BYTES))):
        num_lines, num_bytes, last = num_lines + chunk.count(b"\n"), num_bytes - len(chunk), chunk
    while not last.endswith(b"\n") and (last := stream.readline(CHUNK_BYTES)):
        num_lines += last.endswith(b"\n")
    return num_lines
