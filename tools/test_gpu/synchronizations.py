"""The places in a training step that wait for the GPU: while the host waits, it prepares no further work."""

from __future__ import annotations

import collections
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch

from test_gpu.child import Job
from test_gpu.plan import SMALLEST
from test_gpu.trainer import ranks, trainer
from test_gpu.training import LENGTH, TINY

Places = collections.Counter[str]


def synchronizations(job: Job) -> None:
    """Count the waits of one step by place, at each ZeRO stage, after steps that compile and allocate."""
    ranks()
    sizes = TINY if job.is_dry else {"rows": 8, "length": LENGTH, "accumulation": 2}
    for stage in (1, 0, 2, 3):
        with (
            job.attempt(f"stage {stage}"),
            trainer(SMALLEST if job.is_dry else "decoder-125m", f"engine.zero_stage={stage}", **sizes) as made,
        ):
            for _ in range(1 if job.is_dry else 3):
                made.step()
            with waits() as places:
                made.step()
            job.write(f"stage {stage}", waits=sum(places.values()), places=dict(places.most_common(20)))


@contextlib.contextmanager
def waits() -> Iterator[Places]:
    """Count the calls that wait for the device: those that torch reports, and explicit ones, which it does not."""
    places: Places = collections.Counter()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **named: Any) -> Any:
            caller = sys._getframe(1)
            while caller.f_code.co_filename.endswith("_accelerator.py") and caller.f_back:
                caller = caller.f_back
            places[_place(caller.f_code.co_filename, caller.f_lineno)] += 1
            return call(*arguments, **named)

        return count

    # DeepSpeed's accelerator calls torch.cuda; that of a CPU only returns.
    owners: list[Any] = [torch.cuda, torch.cuda.Event, torch.cuda.Stream]
    if not torch.cuda.is_available():
        owners = [deepspeed.get_accelerator()]
    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(mock.patch.object(owner, "synchronize", counted(owner.synchronize)))
        seen = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
        places.update(_place(one.filename, one.lineno) for one in seen if "synchroniz" in str(one.message))


def _place(file: str, line: int) -> str:
    """Return the end of a file's path, and the line."""
    return f"{'/'.join(Path(file).parts[-3:])}:{line}"
