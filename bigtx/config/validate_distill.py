"""Settings of a distillation that must fit the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from bigtx.config.nodes import Problem
from bigtx.config.schema import DistillConfig, FinetuneConfig, PretrainConfig, RunConfig


def distill_problems(config: RunConfig) -> Iterator[Problem]:
    """A teacher that is not there, for what none can teach, or settings without one."""
    settings = config.distill
    if settings.teacher is None:
        if isinstance(config, FinetuneConfig) and config.task == "distill":
            yield Problem("distill.teacher", "", "is not given; name the run that the student learns from")
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if value != getattr(DistillConfig(), field.name):
                yield Problem(f"distill.{field.name}", str(value), "says nothing without distill.teacher; leave it out")
        return
    if not Path(settings.teacher).is_dir():
        yield Problem("distill.teacher", settings.teacher, "no such folder; name a run or one of its checkpoints")
    if isinstance(config, FinetuneConfig):
        if config.task == "preference" or (config.task == "transcribe" and config.transcribe.method == "ctc"):
            what = "preference" if config.task == "preference" else "transcribe with transcribe.method=ctc"
            yield Problem("distill.teacher", settings.teacher, f"cannot teach task={what}; leave it out")
        started_from = config.base
    else:
        assert isinstance(config, PretrainConfig)
        started_from = config.init_from
    if settings.copy_layers and started_from is not None:
        yield Problem(
            "distill.copy_layers", "true", f"the weights come from {started_from} already; leave one of them out"
        )
