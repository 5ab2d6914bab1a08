"""A folder in which commands are given, their messages read, and what these advise is done."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from advice.shelf import Shelf

from bigtx.cli import main
from bigtx.config.load import load
from bigtx.config.schema import FinetuneConfig, PretrainConfig
from bigtx.utils.errors import BigtxError

TRAINING: Mapping[str, Any] = {
    "deepspeed --module bigtx.pretrain": PretrainConfig,
    "bigtx pretrain": PretrainConfig,
    "bigtx-finetune": FinetuneConfig,
    "bigtx finetune": FinetuneConfig,
}
"""Commands that train. What is followed of them is that they accept their settings."""
PROGRAMS = ("bigtx", "bigtx-finetune", "deepspeed", "hf", "iconv", "jq", "pip", "python", "rm", "unset")


class Outcome(NamedTuple):
    """What came of a command or a call.

    Attributes:
        refused: it ended with a status above 0, or with an error that a user reads.
    """

    refused: bool
    text: str


Attempt = Callable[[Sequence[str]], Outcome]
"""Does something that a message may come of, with settings or options added."""


class Case(NamedTuple):
    """A message that advises something.

    Attributes:
        shown: words of it, as in the source.
        make: prepares a folder; gives what leads to the message.
        take: finds the advice in the message, as its first group.
        fill: what is written for the words in capitals.
        value: what is written after an option that the message names alone.
        slow: whether it takes long.
    """

    shown: str
    make: Callable[[Desk], Attempt]
    take: str
    fill: Mapping[str, str]
    value: str
    slow: bool

    def words(self, message: str) -> str:
        """The advice of a message, as a user would copy it."""
        found = re.search(self.take, message, re.MULTILINE)
        assert found, f"no {self.take!r} in {message}"
        line = functools.reduce(lambda text, name: text.replace(name, self.fill[name]), self.fill, found[1])
        return f"{line} {self.value}".strip()


class Cases(list[Case]):
    """The cases of one file."""

    def case(
        self,
        shown: str,
        *take: str,
        fill: Mapping[str, str] | None = None,
        value: str = "",
        slow: bool = False,
    ) -> Callable[[Callable[[Desk], Attempt]], Callable[[Desk], Attempt]]:
        """Add a case for each advice of a message; arguments as of `Case`."""

        def add(make: Callable[[Desk], Attempt]) -> Callable[[Desk], Attempt]:
            self.extend(Case(shown, make, each, fill or {}, value, slow) for each in take)
            return make

        return add


def call(function: Callable[..., object], *arguments: Any) -> Outcome:
    """Call what raises an error that a user reads, or returns a warning or an empty text."""
    try:
        said = function(*arguments)
    except BigtxError as error:
        return Outcome(True, str(error))
    return Outcome(False, said if isinstance(said, str) else "")


class _Rights(ctypes.Structure):
    """The half of a process's capabilities that the kernel keeps in each of two words."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class Desk:
    """The current folder, with what commands need.

    Attributes:
        shelf: what takes time to make, to be copied.
        patch: changes that end with the case.
        hidden: packages that are not installed.
        said: the messages of the case that is followed.
    """

    def __init__(self, folder: Path, shelf: Shelf, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.shelf, self.patch = folder, shelf, patch
        self.hidden: list[str] = []
        self.said: list[str] = []

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def lines(self, name: str, *records: Mapping[str, Any]) -> Path:
        return self.write(name, "".join(json.dumps(record) + "\n" for record in records))

    def take(self, *names: str) -> None:
        """Copy things off the shelf."""
        for name in names:
            shutil.copytree(getattr(self.shelf, name), self.folder / name)

    def command(self, line: str) -> Attempt:
        """A command line, to which words can be added."""
        return lambda words: self.run(" ".join([line, *map(shlex.quote, words)]))

    def once(self, line: str) -> Attempt:
        """A command that is never right here: its message names another one."""
        refused = self.run(line)
        assert refused.refused, refused.text
        return lambda words: Outcome(False, refused.text)

    def done(self, *lines: str) -> None:
        """Give commands that end well."""
        for line in lines:
            outcome = self.run(line)
            assert not outcome.refused, outcome.text

    def program(self, name: str, *lines: str) -> None:
        """Put a program on the path, as lines of Python."""
        script = "\n".join([f"#!{sys.executable}", "import json, shutil, sys", *lines, ""])
        self.write(f"bin/{name}", script).chmod(0o755)
        self.patch.setenv("PATH", f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def without(self, *packages: str) -> None:
        """Let packages not be installed."""
        self.hidden += packages
        for name in packages:
            self.patch.setitem(sys.modules, name, None)

    @contextlib.contextmanager
    def as_user(self) -> Iterator[None]:
        """Obey the permissions of files in this thread, as a user other than root has to."""
        libc = ctypes.CDLL(None, use_errno=True)
        header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (_Rights * 2)()
        assert libc.capget(header, rights) == 0
        before = rights[0].effective
        rights[0].effective &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
        assert libc.capset(header, rights) == 0
        try:
            with self.patch.context() as patch:
                # For os.access root may do everything, whatever rights were taken from it.
                patch.setattr(os, "access", lambda path, mode: (os.stat(path).st_mode >> 6) & mode == mode)
                yield
        finally:
            rights[0].effective = before
            assert libc.capset(header, rights) == 0

    def run(self, line: str) -> Outcome:
        """Do what a line of a shell says."""
        first, _, rest = line.partition(" && ")
        if rest:
            self.done(first)
            return self.run(rest)
        words = shlex.split(line)
        for start, schema in TRAINING.items():
            if words[: len(start.split())] == start.split():
                return call(load, schema, words[len(start.split()) :])
        if words[:2] == ["pip", "install"]:
            self._install(words[2])
            return Outcome(False, "")
        if words[0] == "unset":
            for name in words[1:]:
                self.patch.delenv(name)
            return Outcome(False, "")
        if words[0] != "bigtx":
            done = subprocess.run(line, shell=True, capture_output=True, text=True)
            return Outcome(done.returncode != 0, done.stdout + done.stderr)
        with written() as text:
            try:
                status = main(words[1:])
            except SystemExit as end:  # Of argparse.
                status = int(end.code or 0)
        return Outcome(status != 0, text())

    def follow(self, case: Case) -> None:
        """Read the message of a case, do what it advises, and see that the message does not come again."""
        attempt = case.make(self)
        said = attempt([])
        self.said.append(said.text)
        assert case.shown in said.text, said.text
        line = case.words(said.text)
        words = shlex.split(line)
        if words[0] in PROGRAMS:
            done = self.run(line)
            assert not done.refused, f"{line}: {done.text}"
            words = []
        if said.refused or words:
            after = attempt(words)
            self.said.append(after.text)
            assert not after.refused and case.shown not in after.text, f"{line}: {after.text}"

    def _install(self, what: str) -> None:
        """See that an extra holds the packages that are missing, and give them back."""
        extra = what.removeprefix("bigtx[").removesuffix("]")
        needs = [
            need
            for need in importlib.metadata.requires("bigtx") or ()
            if extra in re.findall(r"""extra == ["'](\w+)""", need)
        ]
        for name in self.hidden:
            assert any(need.startswith(name) for need in needs), (what, name, needs)
            self.patch.delitem(sys.modules, name)
        assert self.hidden
        self.hidden = []


@contextlib.contextmanager
def written() -> Iterator[Callable[[], str]]:
    """Standard output and error together, while the block runs."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)

    def text() -> str:
        stream.seek(0)
        return stream.read()

    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield text
