"""Settings of a fine-tuning that must fit its task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from bigtx.config.nodes import Problem, idle
from bigtx.config.schema import FinetuneConfig, TranscribeConfig
from bigtx.config.schema.finetuning import ANSWERING

TASK_SECTIONS = {
    "transcribe": ("transcribe",),
    "classify": ("classify",),
    "chat": ANSWERING,
    "sft": ("sft",),
    "preference": ("preference",),
    "translate": ("translate",),
}
"""Sections that only some tasks read."""


def task_problems(config: FinetuneConfig) -> Iterator[Problem]:
    """Yield a problem for settings of another task, and for those that do not fit each other."""
    for name, tasks in TASK_SECTIONS.items():
        if config.task in tasks:
            continue
        section = getattr(config, name)
        for field in dataclasses.fields(section):
            value, default = getattr(section, field.name), getattr(type(section)(), field.name)
            if value != default:
                yield idle(f"{name}.{field.name}", value, default, f"without task={' or '.join(tasks)}")
    for name in ("train", "validation", "test"):
        for path in getattr(config.data, name):
            if config.run_dir and os.path.realpath(path) == os.path.realpath(config.run_dir):
                what = f"is the folder that data.{name} reads; name another one (it may be inside)"
                yield Problem("run_dir", config.run_dir, what, related=(f"data.{name}",))
    yield from _classes(config.classify.classes)
    yield from _speech(config)
    if config.task == "sft" and config.sft.row_length is not None and not config.sft.packing:
        yield idle("sft.row_length", config.sft.row_length, None, "without sft.packing=true")


def _classes(classes: list[str]) -> Iterator[Problem]:
    """Yield a problem for names of classes with spaces around them. Labels are read without such spaces, so a class
    with them would have no records.
    """
    key = "classify.classes"
    if any(not name.strip() for name in classes):
        yield Problem(key, str(classes), "names an empty class; leave it out")
    elif any(name != name.strip() for name in classes):
        yield Problem(
            key,
            str(classes),
            "has a name with spaces around it; labels are read without spaces, so leave them out",
        )
    elif len(set(classes)) < len(classes):
        yield Problem(key, str(classes), "names a class twice; keep one")
    elif len(classes) == 1:
        yield Problem(key, str(classes), "names one class, but two or more are needed; name the others too")


def _speech(config: FinetuneConfig) -> Iterator[Problem]:
    """Check that only task=transcribe has an audio encoder."""
    model, settings = config.model, config.transcribe
    bins = model.audio.num_mel_bins
    if (config.task == "transcribe") != bool(bins):
        what = (
            "task=transcribe needs an audio encoder; write its mel bins, e.g. 80"
            if not bins
            else f"gives the model an audio encoder, which task={config.task} cannot use; write task=transcribe, or 0"
        )
        yield Problem("model.audio.num_mel_bins", str(bins), what, related=("task",))
    if config.task != "transcribe":
        return
    wanted = "encoder" if settings.method == "ctc" else "encoder_decoder"
    if model.shape != wanted:
        yield Problem(
            "transcribe.method",
            settings.method,
            f"is for model.shape={wanted}, and it is {model.shape}",
            related=("model.shape",),
        )
    for name in ("label_smoothing", "num_beams", "length_penalty"):
        value, default = getattr(settings, name), getattr(TranscribeConfig(), name)
        if settings.method == "ctc" and value != default:
            yield idle(f"transcribe.{name}", value, default, "with transcribe.method=ctc")
