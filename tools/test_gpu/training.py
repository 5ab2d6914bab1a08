"""How fast training is, and where the time of a step goes: sizes, ZeRO stages, Muon, and no compilation."""

from __future__ import annotations

from typing import Any

from throughput import MICRO_BATCH_TOKENS

from test_gpu.causes import causes
from test_gpu.child import Job
from test_gpu.plan import SMALLEST
from test_gpu.trainer import ranks, trainer

LENGTH = 2048
RECOMPUTED: dict[str, dict[str, Any]] = {"decoder-7b": {"engine.activation_checkpointing": "full"}}
"""Settings that a model needs to fit one GPU of 140 GB."""

TINY = {"rows": 2, "length": 64, "vocab_size": 512, "accumulation": 2}
"""The sizes of a dry run."""

OTHERS = {
    "stage 0": ("engine.zero_stage=0",),
    "stage 1": ("engine.zero_stage=1",),
    "stage 2": ("engine.zero_stage=2",),
    "stage 3": ("engine.zero_stage=3",),
    "muon": ("optimizer.name=muon",),
    "not compiled": ("engine.compile=false",),
}


def training(job: Job) -> None:
    """Train the model of this case, and profile one step."""
    ranks()
    settings = [f"{key}={value}" for key, value in RECOMPUTED.get(job.case, {}).items()]
    with trainer(job.case, *settings, **sizes_of(job)) as made:
        measured = made.measure(steps=2 if job.is_dry else 8)
        # Written before the profile, so that its failure does not lose the speed; the table shows the last line.
        job.write(job.case, **measured)
        with job.attempt("profile"):
            job.write(job.case, **measured, **causes(made.step))


def stages(job: Job) -> None:
    """Train the 125M model in other ways."""
    ranks()
    sizes = TINY if job.is_dry else {"rows": 16, "length": LENGTH, "accumulation": 2}
    for label, settings in OTHERS.items():
        with job.attempt(label), trainer(SMALLEST if job.is_dry else "decoder-125m", *settings, **sizes) as made:
            job.write(label, **made.measure(steps=1 if job.is_dry else 4, warm=1))


def sizes_of(job: Job) -> dict[str, int]:
    """Return the sizes of the batches of a model."""
    if job.is_dry:
        return TINY
    tokens = MICRO_BATCH_TOKENS.get(job.case, 4 * LENGTH)
    return {"rows": tokens // LENGTH, "length": LENGTH}
