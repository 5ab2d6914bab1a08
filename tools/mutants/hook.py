"""Load a mutant, or record lines, in each Python process that a test starts.

A `.pth` file of the environment imports this module where BIGTX_MUTANTS names its folder, since tests set PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, FrameType, ModuleType
from typing import Any

FOLDER = "BIGTX_MUTANTS"
"""The variable with the folder of this file."""
MUTANT = "BIGTX_MUTANT"
"""The variable with a module's name, its file, and the file that replaces it, on three lines."""
LINES = "BIGTX_MUTANTS_LINES"
"""The variable with the file for the lines of bigtx that run."""

# Tests replace these.
_open, _write, _close = os.open, os.write, os.close


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, mutated: str) -> None:
        super().__init__(name, path)
        self._mutated = mutated

    def get_code(self, fullname: str) -> CodeType:
        with open(self._mutated, "rb") as file:
            return compile(file.read(), self.path, "exec", dont_inherit=True)


class MutantFinder:
    """A finder that loads one module from another file."""

    def __init__(self, name: str, path: str, mutated: str) -> None:
        self._name, self._path, self._mutated = name, path, mutated

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the mutant's spec for its module, and None for other modules; Python's import calls this."""
        if name != self._name:
            return None
        loader = _Loader(name, self._path, self._mutated)
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


class Recorder:
    """A recorder that writes each line of a package to a file when it first runs, so that a kill loses no lines."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._path = ""
        self._left: dict[int, tuple[CodeType, set[int]]] = {}

    def switch(self, path: str) -> None:
        """Write to another file, in this process and in those that it starts."""
        self._path = os.environ[LINES] = path
        self._left = {}

    def start(self) -> None:
        """Start recording, in this thread and in later ones."""
        threading.settrace(self._call)
        sys.settrace(self._call)

    def stop(self) -> None:
        """Stop recording, because slow code, such as imports, is slower while it is traced."""
        os.environ.pop(LINES, None)
        threading.settrace(None)
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if not code.co_filename.startswith(self._prefix):
            return None
        return self._line if self._left_of(code) else None

    def _left_of(self, code: CodeType) -> set[int]:
        found = self._left.get(id(code))
        if found is None:
            # A reference to the code is kept, so that no other object gets its id.
            found = self._left[id(code)] = code, {line for *_, line in code.co_lines() if line}
        return found[1]

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        left = self._left_of(frame.f_code)
        if frame.f_lineno in left and event == "line":
            left.discard(frame.f_lineno)
            try:
                file = _open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                _write(file, f"{frame.f_code.co_filename}:{frame.f_lineno}\n".encode())
                _close(file)
            except OSError:
                pass
        return self._line


def install() -> None:
    """Load a mutant or start recording, as the environment requests."""
    if words := os.environ.get(MUTANT):
        name, path, mutated = words.split("\n")
        sys.meta_path.insert(0, MutantFinder(name, path, mutated))
    elif file := os.environ.get(LINES):
        recorder.switch(file)
        recorder.start()


recorder = Recorder(os.path.abspath(__file__).rsplit("/", 3)[0] + "/bigtx/")
