"""A checkpoint that is written while training continues, and the start of another process from it."""

from __future__ import annotations

import json
import time
from typing import Any

from bigtx.engine import retention
from bigtx.engine.retention import Policy
from bigtx.engine.saving import Saver
from bigtx.train.start import set_states
from test_gpu import timing
from test_gpu.child import Job
from test_gpu.plan import SMALLEST
from test_gpu.trainer import Trainer, ranks, trainer
from test_gpu.training import LENGTH, TINY

RUN = "run"
NEXT = "next.json"
"""The loss of the step after the checkpoint, in the scratch folder."""


def save(job: Job) -> None:
    """Save in the background, and measure the steps meanwhile."""
    only = ranks()
    with _trainer(job) as made:
        alone = [_step_ms(made) for _ in range(4)][1:]
        (job.scratch / RUN).mkdir()
        saver = Saver(made.engine, only, job.scratch / RUN, Policy(1))
        saver.save({"step": 1})
        before = made.loss(made.step())
        (job.scratch / NEXT).write_text(json.dumps(before))
        during = []
        while not (saved := saver.take_saved()):
            during.append(_step_ms(made))
            if saver.has_failed:
                break
        saver.wait()
        assert saved is not None
        figures: dict[str, Any] = {name.partition("/")[2]: value for name, value in saved.metrics().items()}
        job.write("save", **figures, step_ms_alone=min(alone), step_ms_meanwhile=during[:20])


def resume(job: Job) -> None:
    """Verify and read the checkpoint, and compare the next loss with that of the process that wrote it."""
    only = ranks()
    with _trainer(job) as made:
        began = time.perf_counter()
        opened = retention.choose(job.scratch / RUN, only, print)
        assert opened is not None, "the phase save has written no checkpoint"
        verified = time.perf_counter()
        set_states(made.engine, opened)
        timing.wait()
        read = time.perf_counter()
        expected, loss = json.loads((job.scratch / NEXT).read_text()), made.loss(made.step())
        seconds = {"verify_seconds": verified - began, "read_seconds": read - verified}
        job.write("resume", **seconds, loss=loss, expected=expected, is_equal=loss == expected)
        assert abs(loss - expected) <= 1e-4 * expected, f"the next loss is {loss} instead of {expected}"


def _trainer(job: Job) -> Any:
    sizes = TINY if job.is_dry else {"rows": 8, "length": LENGTH, "accumulation": 2}
    return trainer(SMALLEST if job.is_dry else "decoder-350m", **sizes)


def _step_ms(made: Trainer) -> float:
    return timing.milliseconds(made.step, rounds=1, warm=0)
