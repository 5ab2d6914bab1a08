"""Settings of a distillation that must fit the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bigtx.config.nodes import Problem, idle
from bigtx.config.runs import why_no_run
from bigtx.config.schema import DistillConfig, FinetuneConfig, RunConfig


def distill_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for a missing teacher, for a task that cannot have one, and for settings without a teacher."""
    settings = config.distill
    if settings.teacher is None:
        if isinstance(config, FinetuneConfig) and config.task == "distill":
            yield Problem("distill.teacher", "", "is not given; name the run that the student learns from")
        for field in dataclasses.fields(settings):
            value, default = getattr(settings, field.name), getattr(DistillConfig(), field.name)
            if value != default:
                yield idle(f"distill.{field.name}", value, default, "without distill.teacher")
        return
    if problem := why_no_run(settings.teacher):
        yield Problem("distill.teacher", settings.teacher, problem)
    deaf = isinstance(config, FinetuneConfig) and config.task == "transcribe" and config.transcribe.method == "ctc"
    if deaf or (isinstance(config, FinetuneConfig) and config.task == "preference"):
        what = "transcribe with transcribe.method=ctc" if deaf else "preference"
        yield Problem(
            "distill.teacher", settings.teacher, f"does not work with task={what}; write distill.teacher=null"
        )
    started_from = getattr(config, config.begins_with)
    if settings.copy_layers and started_from is not None:
        begins_with = config.begins_with
        what = f"the weights already come from {begins_with}={started_from}; write false, or {begins_with}=null"
        yield Problem("distill.copy_layers", "true", what, related=(begins_with,))
