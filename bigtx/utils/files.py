"""What a path or a URL names; files and folders that are complete or missing, with their hashes; and those that bigtx
itself writes and never reads as input: corpora, tokenizers, runs, exports, lists, complete or not.

An output may be within the input folder (`input.paths=. output=corpus`). So folders and files are recognized by their
content, at every moment of a job, and the input is the same when a command is run again.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from bigtx.utils.errors import ConfigError, DataError, writes

SEAL = "sha256"
"""The key of an object's hash of itself."""
NOT_A_FILE = "not a file; write what it gives into a file first"
PROTOCOLS = ("http", "https", "s3", "gs")
"""Protocols that bigtx reads."""

_DEEPEST = 100
_TOO_DEEP = f"it is nested more than {_DEEPEST} levels deep"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)|pipe:")
RUN = "a run"
MODEL = "a Hugging Face model"
MARKS = (
    (RUN, ("config.yaml", "environment.json")),
    ("a prepared corpus", ("train/manifest.json",)),
    ("a prepared corpus", ("validation/manifest.json",)),
    ("a tokenizer", ("bigtx_tokenizer.json",)),
    ("adapters in PEFT's format", ("adapter_config.json",)),
    (MODEL, ("config.json",)),
    ("a checkpoint or a split of a corpus", ("manifest.json",)),
)
"""Kinds of folders, the more certain ones first, and the files by which each is known."""

MADE = "made by bigtx"
"""The name under which files that bigtx writes are counted where they are skipped."""
_SPLITS = ("train", "validation")
_SPLIT = {"manifest.json", "blocks.npy"}
_TOKENIZER = "bigtx_tokenizer.json"
_RUN = ({"run.lock", "logs"}, {"config.yaml", "logs"}, {"config.yaml", "checkpoints"})
"""Names that are together in a run's folder: from its start on, and if it was copied without its logs."""
_PARTIAL = ".partial"
_IN_PARTIAL = ("part-*-of-*", "tokenizer", "work", "corpus")
_REJECTS = ".rejects.jsonl"
_ABOUT = ".about.json"
_LOOKED_AT = 4096


def is_url(place: str) -> bool:
    """Return whether a place is meant as a URL, whether bigtx reads it or not; all others are paths."""
    return _URL.match(place) is not None


def url_problem(url: str) -> str | None:
    """Return why bigtx does not read a URL, as a phrase; None if it does."""
    protocol, _, rest = url.partition(":")
    if protocol == "file":
        return "is a file of this machine; write its plain path"
    if "::" in url or protocol not in PROTOCOLS or not rest.startswith("//"):
        protocols = ", ".join(f"{name}://" for name in PROTOCOLS)
        return f"is not a URL that bigtx reads; write one that begins with {protocols}"
    parts = urlsplit(url)
    if not parts.netloc:
        return "names no host or bucket"
    if "@" in parts.netloc:
        return "contains a name or password, which configs and logs would show; put them into ~/.netrc"
    return None


def kind_of_folder(folder: Path | str) -> str | None:
    """Return a folder's kind in words; None where its names do not show it."""
    return next((kind for kind, names in MARKS if all(os.path.isfile(Path(folder) / name) for name in names)), None)


def no_file(path: Path | str) -> str | None:
    """Return what is at a path where neither a file nor a folder is, in words; None where one of them is, or where
    nothing is.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), None)


def open_file(path: Path | str, buffering: int = -1) -> BinaryIO:
    """Open a file to read its bytes. A pipe is refused: it may wait for a writer forever, and gives its bytes once.

    Raises:
        OSError: it cannot be opened, or is not a file.
    """
    if kind := no_file(path):
        raise OSError(errno.EINVAL, f"it is {kind}, {NOT_A_FILE}", str(path))
    return open(path, "rb", buffering)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a file so that a reader, also after a crash or a full disk, sees the old content or the new content, never
    a part.

    Args:
        data: text is written as UTF-8.

    Raises:
        OSError: the content could not be made durable; `path` has the old content, or already the new content.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(partial, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    fsync_dir(path.parent)


def read_text(path: Path) -> str:
    """Return the text of a user's file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        with open_file(path) as file:
            return file.read().decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start + 1}") from error


def inode_of(path: Path) -> tuple[int, int] | None:
    """Return what identifies a folder while it exists; None if nothing is at the path."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def write_json(path: Path | str, value: Any) -> None:
    """Write readable JSON as `write_atomic` does; a NaN is an error, because other readers refuse it."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_value(data: bytes | str) -> Any:
    """Return the value of a JSON text that others may have written.

    Raises:
        ValueError: it is not JSON, is nested so deeply that code that walks through it would fail, or has half a
            surrogate pair, which cannot be written as UTF-8.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            member
            for outer in level
            if isinstance(outer, (dict, list))
            for member in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            break
    else:
        raise ValueError(_TOO_DEEP)
    if "\\ud" in (data if isinstance(data, str) else data.decode("utf-8", "replace")).lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half a surrogate pair, which is not a character") from None
    return value


def read_object(path: Path | str) -> dict[str, Any]:
    """Return the object that a JSON file holds; an empty one where the file is missing, damaged or holds something
    else.
    """
    try:
        value = json_value(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of a value's canonical JSON: sorted keys, no white space, ASCII alone."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path | str, content: dict[str, Any]) -> None:
    """Write an object as `write_json` does, with its own hash under the key `sha256`, which replaces an earlier one."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    write_json(path, rest | {SEAL: json_hash(rest)})


def unsealed(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return what `write_sealed` was given; None if the hash is missing or is not that of the content."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return rest if content.get(SEAL) == json_hash(rest) else None


def fsync_dir(path: Path | str) -> None:
    """Make the names in a folder durable: a rename may otherwise be lost with the power.

    Raises:
        OSError: they could not be written.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems refuse to, with errors of their own; their renames are durable by themselves.
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def refuse_filled(folder: Path) -> None:
    """Refuse a folder that is not empty, before the work starts.

    Raises:
        ConfigError: the folder has content, or is a file.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f"{folder} exists already and is not an empty folder; name another one")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, next to the final one, which it becomes at the end; after an error or a kill there is no
    final folder.

    What an earlier attempt left behind is removed.

    Raises:
        ConfigError: the name is in use already.
        LaunchError: it cannot be written.
    """
    refuse_filled(folder)
    # Resolved, because "." and names ending in ".." have no name to add to.
    partial = folder.resolve().with_name(f".{folder.resolve().name}.unfinished")
    with writes(folder), contextlib.ExitStack() as stack:
        if partial.exists():
            shutil.rmtree(partial)
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for inner, _, _ in os.walk(partial):
            fsync_dir(inner)
        os.rename(partial, folder.resolve())
        fsync_dir(partial.parent)


def publish(partial: Path, final: Path) -> None:
    """Give a complete folder its name, so that it stays after a loss of power.

    Raises:
        OSError: it could not be renamed.
    """
    fsync_dir(partial)
    os.rename(partial, final)
    fsync_dir(final.parent)


def without_own(folder: str, names: Sequence[str]) -> list[str]:
    """Return the names of files and folders that bigtx did not make.

    Args:
        names: all names in the folder.
    """
    beside = set(names)
    return [name for name in names if not _is_own(os.path.join(folder, name), beside)]


def _is_own(path: str, beside: Collection[str]) -> bool:
    return _kind_of_listed(path) is not None if os.path.isdir(path) else is_own_file(path, beside)


def _kind_of_listed(folder: str) -> str | None:
    try:
        return kind_of_own(folder, os.listdir(folder))
    except OSError:
        return None  # The reader reports what is wrong.


def kind_of_own(folder: str, names: Collection[str]) -> str | None:
    """Return the kind of a folder that bigtx made, e.g. "a tokenizer"; None if it did not make it.

    Args:
        names: the names in it.
    """
    found = set(names)
    if _TOKENIZER in found:
        return "a tokenizer"
    if any(run <= found for run in _RUN):
        return RUN
    if found >= _SPLIT and _names_blocks(folder):
        return "a part of a corpus"
    if any(split in found and _names_blocks(os.path.join(folder, split)) for split in _SPLITS):
        return "a prepared corpus"
    # During a preparation, and the rest of one that was killed while it cleaned up.
    in_partial = found and all(any(fnmatch.fnmatch(name, own) for own in _IN_PARTIAL) for name in found)
    return "a corpus in preparation" if folder.endswith(_PARTIAL) and in_partial else None


def own_of(path: str, base: str, known: dict[str, bool]) -> str | None:
    """Return the first of the folders between a base and a path, or the path itself, that bigtx made.

    Args:
        known: the results for earlier folders; new ones are added.
    """
    parts = os.path.relpath(path, base).split(os.sep)
    for count in range(1, len(parts) + 1):
        each = os.path.join(base, *parts[:count])
        if each not in known:
            pair = (each + _ABOUT, each.removesuffix(_ABOUT))
            known[each] = _is_own(each, {os.path.basename(other) for other in pair if os.path.isfile(other)})
        if known[each]:
            return each
    return None


def refuse_own(path: str, setting: str = "") -> None:
    """Refuse a folder as input if bigtx made it.

    Raises:
        DataError: bigtx made it.
    """
    kind = _kind_of_listed(path)
    # A user may have put a tokenizer next to the texts.
    if kind and not os.path.isfile(os.path.join(path, _TOKENIZER)):
        named = f" (named in {setting})" if setting else ""
        raise DataError(f"{path}{named} is {kind}, which was made by bigtx; name the folder to read.")


def is_own_file(path: str, beside: Collection[str]) -> bool:
    """Return whether a file is a list of rejects, the card of an export, or predictions of `bigtx predict` or their
    description.

    Args:
        beside: the names in its folder.
    """
    if path.endswith(_REJECTS):
        begin = _begin(path)
        return not begin or begin.startswith(b'{"file": ')
    if os.path.basename(path) == "README.md":
        begin = _begin(path)
        return begin.startswith(b"---\n") and b"\n- bigtx\n" in begin.partition(b"\n---\n")[0]
    name = os.path.basename(path)
    return name.removesuffix(_ABOUT) in beside if name.endswith(_ABOUT) else name + _ABOUT in beside


def _names_blocks(split: str) -> bool:
    return b'"bigtx-blocks"' in _begin(os.path.join(split, "manifest.json"))


def _begin(path: str) -> bytes:
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return file.read(_LOOKED_AT)
    return b""
