"""The tasks of fine-tuning: a task turns records into batches, losses and predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigtx.utils import imported

if TYPE_CHECKING:
    from bigtx.finetuning.tasks.task import RecordTask

RECORD_TASKS = {
    "transcribe": "bigtx.finetuning.tasks.transcribe:Transcribe",
    "classify": "bigtx.finetuning.tasks.classify:Classify",
    "sft": "bigtx.finetuning.tasks.sft:Sft",
    "preference": "bigtx.finetuning.tasks.preference:Preference",
    "translate": "bigtx.finetuning.tasks.translate:Translate",
    "distill": "bigtx.finetuning.tasks.sft:Distill",
}
"""The class of each `task` of fine-tuning."""

FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "transcribe": (("audio",),),
    "classify": (("text", "label"),),
    "sft": (("messages",), ("prompt", "response")),
    "preference": (("chosen", "rejected"),),
    "translate": (("source", "target"),),
    "distill": (("text",),),
}
"""The fields, named as in `data.fields`, that a training record of each `task` needs: one of these sets."""


def task_type(name: str) -> type[RecordTask]:
    """Return the class of a task."""
    found: type[RecordTask] = imported(RECORD_TASKS[name])
    return found
