"""Damaged and hostile files for tools/fuzz_readers.py, and the process in which they are read.

A `Reader` has examples: folders of files that it reads. Each trial changes some bytes of an example, or some values
where a file is JSON or YAML, and reads the result in a child process, which reports:

- an exception that is not one of the reader's own;
- more than 5 seconds of processor time, or a minute of waiting;
- more memory than ten times the files and a constant;
- a program, a connection, a pickle or a library that was started or opened;
- a file that was written outside of the trial's folder;
- the end of the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtx.utils.terminal import LONGEST_MESSAGE

Files = dict[str, bytes]
"""The content of each file, by its path in the folder."""

CPU_SECONDS = 5.0
WAITING_SECONDS = 60.0
MEMORY_FACTOR = 10
MEMORY_BASE = 96 << 20
"""Bytes that any reader may use, besides ten times the input: buffers, a first import, a decoder's tables."""
MEMORY_LIMIT = 4 << 30
"""Bytes of address space that a trial may add; an allocation of more is an error of the reader."""

PICKLE = b"cos\nsystem\n(S'touch EXECUTED'\ntR."
NUMBERS = (0, 1, -1, 2, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        [],
        {},
        [[]],
        [{}],
        {"a": {}},
        "x",
        "0",
        "../../outside",
        "/etc/passwd",
        "pipe:touch EXECUTED",
    ),
    *NUMBERS,
    *(10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "\ud800", "\0", "a" * 5000, "${oc.env:HOME}"),
)
TOKENS = (
    *(PICKLE, b"\0" * 64, b"\xff" * 64, b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"- " * 2000, b"\n" * 5000),
    *(
        b"../../outside",
        b"!!python/object/apply:os.system ['touch EXECUTED']",
        b"${oc.env:HOME}",
        b"&a [*a, *a]",
        b"*a",
    ),
    *(
        b"pipe:touch EXECUTED",
        b"'",
        b'"',
        b"\r",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"1e999",
        b"-1",
        b"9" * 5000,
        b": ",
        b"|",
    ),
)


@dataclass(frozen=True)
class Reader:
    """A reader of files that others wrote.

    Attributes:
        name: a word for the command line.
        examples: folders that it can read.
        read: reads the folder.
        refusals: the exceptions by which it refuses a file.
        repair: makes hashes and sizes in the folder agree with the changed files, as an attacker would.
    """

    name: str
    examples: Sequence[Files]
    read: Callable[[Path], object]
    refusals: tuple[type[BaseException], ...]
    repair: Callable[[Path], None] | None = None


def changed(chance: random.Random, reader: Reader, others: Sequence[bytes]) -> Files:
    """Return one of the reader's examples with some changes in one file, rarely in two.

    Args:
        others: contents of files of any kind, to take pieces of.
    """
    files = dict(chance.choice(reader.examples))
    for _ in range(chance.choice((1, 1, 1, 2))):
        name = chance.choice(sorted(files))
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            content = files[name]
            if chance.random() < 0.6 and (found := _with_other_value(chance, content)) is not None:
                files[name] = found
            elif chance.random() < 0.4 and name.endswith((".yaml", ".txt", ".csv", ".jsonl")):
                files[name] = _with_other_line(chance, content)
            else:
                files[name] = _with_other_bytes(chance, content, others)
    return files


def _with_other_bytes(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    # Headers decide more than payloads, so half of all places are near the start.
    size = len(content)
    start = chance.randrange(min(size, chance.choice((64, 600, size + 1))) + 1)
    stop = min(size, start + chance.choice((1, 2, 4, 8, 64, 512, size)))
    piece = content[start:stop]
    other = chance.choice(others)
    at = chance.randrange(len(other) + 1)
    number = chance.choice(NUMBERS) % 2 ** (8 * (width := chance.choice((1, 2, 4, 8))))
    return chance.choice(
        (
            lambda: content[:start] + bytes(b ^ (1 << chance.randrange(8)) for b in piece[:8]) + content[start + 8 :],
            lambda: content[:start] + chance.randbytes(len(piece)) + content[stop:],
            lambda: content[:start],
            lambda: content[:start] + content[stop:],
            lambda: content[:stop] + piece + content[stop:],
            lambda: content[:start] + bytes(len(piece)) + content[stop:],
            lambda: content[:start] + other[at : at + len(piece)] + content[stop:],
            lambda: content[:start] + other[at:],
            lambda: content[:start] + chance.choice(TOKENS) + content[chance.choice((start, stop)) :],
            lambda: (
                content[:start] + number.to_bytes(width, chance.choice(("little", "big"))) + content[start + width :]
            ),
        )
    )()


def _with_other_line(chance: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    before, sign, _ = lines[at].partition(b":")
    value = chance.choice(TOKENS) if chance.random() < 0.4 else repr(chance.choice(VALUES)).encode()
    lines[at : at + 1] = chance.choice(
        ([], [lines[at]] * 2, [before + sign + b" " + value], [value], [b"  " + lines[at]], [lines[at].strip()])
    )
    return b"\n".join(lines)


def _with_other_value(chance: random.Random, content: bytes) -> bytes | None:
    """Return JSON, JSON lines or a safetensors file with one value changed; None for another file."""
    lines = content.split(b"\n")
    if len(lines) > 2 and lines[0].startswith((b"{", b"[")) and lines[0].endswith((b"}", b"]")):
        at = chance.randrange(len(lines))
        lines[at] = _with_other_value(chance, lines[at]) or lines[at]
        return b"\n".join(lines)
    length = int.from_bytes(content[:8], "little")
    head = 8 if 0 < length <= len(content) - 8 else 0
    body = content[head : head + length] if head else content
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, (dict, list)) or not value:
        return None
    parent: Any = value
    while True:
        key = chance.choice(list(parent)) if isinstance(parent, dict) else chance.randrange(len(parent))
        if not isinstance(parent[key], (dict, list)) or not parent[key] or chance.random() < 0.3:
            break
        parent = parent[key]
    how = chance.randrange(8)
    if how == 0:
        del parent[key]
    elif how == 1:
        parent[key] = [parent[key]] * chance.choice((1, 2, 300))
    elif how == 2 and isinstance(parent[key], (int, float)):
        parent[key] = parent[key] * chance.choice((-1, 2, 1000)) + chance.choice((-1, 0, 1))
    elif how == 3 and isinstance(parent, dict):
        parent[str(chance.choice(VALUES))] = parent.pop(key)
    else:
        parent[key] = chance.choice(VALUES)
    written = json.dumps(value).encode()
    return len(written).to_bytes(8, "little") + written + content[head + length :] if head else written


@dataclass(frozen=True)
class Failure:
    """A trial that a reader failed.

    Attributes:
        number: the trial's number; the same number gives the same files.
        what: the fault, in a line.
        details: e.g. a traceback.
    """

    number: int
    what: str
    details: str = ""


def trials(reader: Reader, numbers: range, scratch: Path, others: Sequence[bytes]) -> Iterator[Failure | None]:
    """Read the changed files of these numbers in child processes, and yield the result of each trial."""
    numbers_left = numbers
    while numbers_left:
        done = 0
        for failure in _in_child(reader, numbers_left, scratch, others):
            done += 1
            yield failure
        numbers_left = numbers_left[done:]


def write(files: Files, folder: Path) -> None:
    """Write files into a new folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def check_examples(reader: Reader, scratch: Path) -> None:
    """Check that the reader reads at least one of its examples; this also imports what it needs."""
    num_read = 0
    for files in reader.examples:
        folder = scratch / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        write(files, folder)
        if reader.repair:
            reader.repair(folder)
        with contextlib.suppress(*reader.refusals):
            reader.read(folder)
            num_read += 1
    assert num_read, f"{reader.name} reads none of its examples"


def files_of(reader: Reader, number: int, folder: Path, others: Sequence[bytes]) -> None:
    """Write the files of one trial into a new folder."""
    chance = random.Random(f"{reader.name} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write(changed(chance, reader, others), folder)
    if reader.repair and chance.random() < 0.8:
        with contextlib.suppress(Exception):  # Files that are too damaged to repair.
            reader.repair(folder)


def _in_child(reader: Reader, numbers: range, scratch: Path, others: Sequence[bytes]) -> Iterator[Failure | None]:
    """Yield the results of the trials up to the one that ends the child, with it."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        status = 1
        try:
            _child(reader, numbers, scratch, others, theirs)
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    done, waits = 0, False
    with open(ours, "rb", buffering=0) as pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        received = b""
        while True:
            if not selector.select(WAITING_SECONDS):
                os.kill(pid, signal.SIGKILL)
                waits = True
            elif not (data := pipe.read(1 << 16)):
                break
            else:
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    found = json.loads(line)
                    yield None if found is None else Failure(**found)
                    done += 1
    _, status = os.waitpid(pid, 0)
    if done < len(numbers):
        yield Failure(numbers[done], _why_ended(status, waits), _stack(scratch))


def _why_ended(status: int, waits: bool) -> str:
    if waits:
        return f"waits for more than {WAITING_SECONDS:g} s"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"computes for more than {CPU_SECONDS:g} s"
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    return f"the process ended: {how}"


def _stack(scratch: Path) -> str:
    path = scratch / "stderr"
    return path.read_text(errors="replace")[-3000:] if path.exists() else ""


def _child(reader: Reader, numbers: range, scratch: Path, others: Sequence[bytes], pipe: int) -> None:
    import faulthandler

    errors = os.open(scratch / "stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    faulthandler.enable(errors, all_threads=False)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, used + MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = _Watch(scratch)
    sys.addaudithook(watch)
    for number in numbers:
        folder = scratch / "trial"
        files_of(reader, number, folder, others)
        failure = _trial(reader, number, folder, watch)
        os.write(pipe, json.dumps(vars(failure) if failure else None).encode() + b"\n")


def _trial(reader: Reader, number: int, folder: Path, watch: _Watch) -> Failure | None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    os.ftruncate(2, 0)
    before = _reset_peak()
    watch.found, watch.is_on = [], True
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        reader.read(folder)
    except reader.refusals as error:
        if len(str(error)) > LONGEST_MESSAGE:
            return Failure(number, f"a message of more than {LONGEST_MESSAGE:,} characters", str(error)[:1000])
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in last if "/bigtx/" in frame.filename] or list(last)
        where = f"{'/'.join(Path(own[-1].filename).parts[-3:])}:{own[-1].lineno}" if own else "?"
        return Failure(number, f"{type(error).__name__} at {where}", traceback.format_exc()[-4000:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.is_on = False
    if watch.found:
        return Failure(number, f"opens or starts {watch.found[0]}", "\n".join(watch.found))
    grown = _peak() - before
    if grown > MEMORY_FACTOR * size + MEMORY_BASE:
        return Failure(number, f"more than {MEMORY_FACTOR} times the memory", f"{grown:,} bytes for {size:,}")
    return None


def _reset_peak() -> int:
    """Return the memory in use, in bytes, and measure the peak again from here."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _field("VmRSS")


def _peak() -> int:
    return _field("VmHWM")


def _field(name: str) -> int:
    with open("/proc/self/status") as file:
        found = next((line for line in file if line.startswith(name + ":")), f"{name}: 0 kB")
    return int(found.split()[1]) * 1024


class _Watch:
    """An audit hook that notes what a reader must not do."""

    STARTS = (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "subprocess.Popen",
        "pty.spawn",
        "pickle.find_class",
    )
    CONNECTIONS = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "webbrowser.open")
    WRITES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.is_on = False
        self.found: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note an event of Python's that this class names."""
        if not self.is_on:
            return
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in self.STARTS or event in self.CONNECTIONS:
            self.found.append(f"{event} {arguments!r:.200}")
        elif (is_write or event in self.WRITES) and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((self.folder + os.sep, "/dev/", "/proc/self/")):
                self.found.append(f"{event} {path}")
