"""Run a training with a fault inside its processes: `inject.py FAULT_AS_JSON KEY=VALUE ...`.

The fault is an object with these keys, all optional:

    command   finetune; a pretraining by default
    rank      the only rank with the fault, where the key below does not name one; by default 0 for operations, else all
    record    a file to which each operation on files below RUN/checkpoints is appended, by its label
    at, do    the label of an operation, and what happens before it, once: the name of a signal that the process sends
              itself, or of an error that the operation raises (EIO, ENOSPC)
    then      the name of a signal that the process sends itself before the next operation
    loud      [first, last, factor]: the loss of steps whose first sequence is in [first, last) is multiplied
    sleep     seconds by which each step takes longer, in its first forward pass
    flip      [rank, step, parameter]: after that step the rank's copy of the parameter has a wrong bit, once in each
              process
    kill      [roll_backs, step]: all ranks are killed after that step, once its checkpoint, if any, is durable, in a
              run that has returned to a checkpoint so often

A label is the operation and the path, with N for the number of a step: `os.rename step-N.partial`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink")
"""Audit events of operations that change a folder."""
UNIQUE = re.compile(r"[0-9]+-[0-9a-f]{8}|[0-9]{8}")
"""What differs between two saves: the names of files that are renamed later, and the numbers of steps."""


class Operations:
    """The operations that change files below a folder; each is noticed before it happens."""

    def __init__(self, fault: dict[str, Any], folder: Path) -> None:
        self.fault, self.folder = fault, folder
        self.has_begun = self.is_done = False
        self._fsync = os.fsync
        vars(os)["fsync"] = self._sync  # It has no audit event.
        sys.addaudithook(self._audit)

    def _sync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._note("os.fsync", os.readlink(f"/proc/self/fd/{number}"))
        self._fsync(descriptor)

    def _audit(self, event: str, values: tuple[Any, ...]) -> None:
        if event in CHANGES:
            path, folder = values[0], values[-1]
            if event in ("os.remove", "os.rmdir") and isinstance(folder, int) and folder >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            self._note(event, path)
        elif event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR):
            self._note(event, values[0])

    def _note(self, operation: str, path: Any) -> None:
        if self.is_done or os.environ.get("RANK") != str(self.fault.get("rank", 0)):
            return
        if not isinstance(path, str | os.PathLike) or self.folder not in (place := Path(path)).parents:
            return
        label = f"{operation} {UNIQUE.sub('N', str(place.relative_to(self.folder)))}"
        if "record" in self.fault:
            self._append(label)
        elif self.has_begun:
            self.is_done = True
            self._act(self.fault["then"])
        elif label == self.fault["at"]:
            self.has_begun, self.is_done = True, "then" not in self.fault
            self._act(self.fault["do"])

    def _append(self, label: str) -> None:
        self.is_done = True  # The record itself is not an operation.
        with open(self.fault["record"], "a", encoding="utf-8") as file:
            print(label, file=file)
        self.is_done = False

    def _act(self, name: str) -> None:
        if name.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[name])
            return
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))


class Changed:
    """A task whose loss is multiplied by a factor, and comes later."""

    def __init__(self, task: Any, factor: float, seconds: float) -> None:
        self.task, self.factor, self.seconds = task, factor, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss(self, model: Any, batch: Any) -> Any:
        """Return the task's loss times the factor."""
        time.sleep(self.seconds)
        self.seconds = 0.0
        loss = self.task.loss(model, batch)
        return loss._replace(loss_sum=loss.loss_sum * self.factor, reported_sum=loss.reported_sum * self.factor)


def change_steps(fault: dict[str, Any]) -> None:
    """Replace the function of a training step by one with the fault."""
    from bigtx.train import loop

    train_step = loop.train_step

    def with_fault(run: Any, *rest: Any, **named: Any) -> Any:
        task, (first, last, factor) = run.task, fault.get("loud", (0, 0, 1.0))
        if fault.get("rank", run.ranks.rank) == run.ranks.rank:
            is_loud = first <= run.state.sequences < last
            run.task = Changed(task, factor if is_loud else 1.0, fault.get("sleep", 0.0))
        try:
            result = train_step(run, *rest, **named)
        finally:
            run.task = task
        rank, step, name = fault.get("flip", (0, 0, ""))
        if (rank, step) == (run.ranks.rank, run.state.step):
            del fault["flip"]
            flip_bit(run.engine, name)
        if "kill" in fault and fault["kill"] == [run.state.roll_backs, run.state.step]:
            run.saver.wait()
            run.ranks.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    loop.train_step = with_fault


def flip_bit(engine: Any, name: str) -> None:
    """Change the lowest bit of the exponent of a parameter's last element."""
    import torch

    bits = engine.module.get_parameter(name).detach().view(-1)[-1:]
    integers = bits.view({2: torch.int16, 4: torch.int32}[bits.element_size()])
    integers ^= 1 << (7 if bits.dtype == torch.bfloat16 else 23)


def main() -> int:
    """Run the command with the fault; return its exit status."""
    fault, arguments = json.loads(sys.argv[1]), sys.argv[2:]
    sys.path[0] = str(ROOT)
    name = fault.get("command", "pretrain")
    sys.argv = [str(ROOT / "bigtx" / f"{name}.py"), *arguments]
    from bigtx import finetune, pretrain
    from bigtx.train import command
    from bigtx.utils import imported

    run_dir = next(word.partition("=")[2] for word in arguments if word.startswith("run_dir="))
    if "record" in fault or "at" in fault:
        Operations(fault, Path(run_dir) / "checkpoints")

    def with_fault(name: str) -> Any:
        found = imported(name)
        if name.endswith((":pretrain", ":finetune")):  # In each rank.
            change_steps(fault)
        return found

    vars(command)["imported"] = with_fault
    return (finetune if name == "finetune" else pretrain).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
