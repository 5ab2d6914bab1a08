"""What a batch is for: a task turns it into a loss, and in fine-tuning records into batches and predictions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtx.finetuning.tasks.task import RecordTask

RECORD_TASKS = {
    "transcribe": "bigtx.finetuning.tasks.transcribe:Transcribe",
    "classify": "bigtx.finetuning.tasks.classify:Classify",
    "sft": "bigtx.finetuning.tasks.sft:Sft",
    "preference": "bigtx.finetuning.tasks.preference:Preference",
    "translate": "bigtx.finetuning.tasks.translate:Translate",
    "distill": "bigtx.finetuning.tasks.distill:Distill",
}
"""Where the class of each `task` of a fine-tuning is."""

FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "transcribe": (("audio",),),
    "classify": (("text", "label"),),
    "sft": (("messages",), ("prompt", "response")),
    "preference": (("chosen", "rejected"),),
    "translate": (("source", "target"),),
    "distill": (("text",),),
}
"""What a record of each `task` must have to learn from: one of these sets of fields, named as in `data.fields`."""


def task_type(name: str) -> type[RecordTask]:
    """The class of a task."""
    module, _, attribute = RECORD_TASKS[name].partition(":")
    found: type[RecordTask] = getattr(importlib.import_module(module), attribute)
    return found
