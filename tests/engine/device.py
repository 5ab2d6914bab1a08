"""An accelerator on the CPU whose work is asynchronous, as a GPU's is: DeepSpeed waits for it where it waits for a GPU.

With DeepSpeed's own accelerator for CPUs, which says that all work is done at once, it leaves these waits out.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGES = tuple(
    Path(file).parent for file in (deepspeed.__file__, Path(__file__).parents[2] / "bigtx" / "__init__.py")
)


def place() -> str | None:
    """The innermost function of bigtx or DeepSpeed that runs now; None where a test called torch itself."""
    frame: Any = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        for package in PACKAGES:
            if path.is_relative_to(package):
                return f"{path.relative_to(package.parent)} {frame.f_code.co_name}"
        if path.parent == Path(__file__).parent and path != Path(__file__):
            return None
        frame = frame.f_back
    return None


@dataclass
class Found:
    """How often each function waited for the device, and read a value from it."""

    waits: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin to count."""
        self.waits.clear()
        self.reads.clear()

    def wait(self, *_: Any) -> None:
        """Count a wait."""
        self._note(self.waits)

    def read(self) -> None:
        """Count a read."""
        self._note(self.reads)

    @staticmethod
    def _note(counts: Counter[str]) -> None:
        if (found := place()) is not None:
            counts[found] += 1


class Reads(TorchDispatchMode):
    """Count operations whose result Python sees: on a GPU each of them waits for all work before it."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and run the operation."""
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.read()
        return operation(*args, **(kwargs or {}))


def mark_class(found: Found) -> type:
    """A class of streams and events that are never finished until one waits for them."""

    class Mark:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            found.wait()

        def record(self, *_: Any) -> None: ...

        wait = wait_stream = wait_event = record

        def record_event(self, event: Any = None) -> Any:
            return event or Mark()

    return Mark


@contextmanager
def asynchronous_device() -> Iterator[Found]:
    """Make the CPU such a device for engines that are built and trained inside; give what is found."""
    found = Found()
    mark = mark_class(found)
    stream = mark()
    doubles = {
        "is_synchronized_device": lambda self: False,
        "synchronize": found.wait,
        "Stream": mark,
        "Event": mark,
        "stream": lambda self, stream: nullcontext(),
        "current_stream": lambda self, index=None: stream,
        "default_stream": lambda self, index=None: stream,
    }
    record_stream = mock.patch.object(torch.Tensor, "record_stream", lambda self, stream: None)
    with mock.patch.multiple(CPU_Accelerator, **doubles), record_stream, Reads(found):
        yield found
