"""The inputs of fine-tuning: the base's tokenizer, the teacher, and the records under their task."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from bigtx.config.schema import FinetuneConfig
from bigtx.data import recordings
from bigtx.engine.checkpoint import step_folders
from bigtx.finetuning import record_table
from bigtx.finetuning.base import open_tokenizer
from bigtx.finetuning.notes import describe_held_out, describe_length, total_steps
from bigtx.finetuning.records import TaskData, open_task_data
from bigtx.finetuning.tasks.task import RecordTask
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train import start
from bigtx.train.context import RunContext
from bigtx.train.teacher import Teacher
from bigtx.utils import log


@dataclass(frozen=True)
class Inputs:
    """The inputs of fine-tuning, opened and checked.

    Attributes:
        config: the complete config.
        rows: the rows of an epoch: training examples, or packed rows of them.
        total_steps: the number of optimizer steps of the run.
        mean_tokens: the mean number of tokens of a row.
        facts: what every checkpoint's manifest records about the inputs.
    """

    config: FinetuneConfig
    tokenizer: Tokenizer
    teacher: Teacher | None
    data: TaskData
    rows: list[Any]
    total_steps: int
    mean_tokens: float
    facts: dict[str, Any]

    @property
    def task(self) -> RecordTask:
        """Return the task."""
        return self.data.task

    def flops_per_token(self) -> float:
        """Return the floating-point operations of a training step per token of a record of mean length."""
        source, target, predicted, num_rows = map(round, self.task.lengths(self.rows))
        flops = start.flops_of(self.config, self.teacher, source=source, target=target, predicted=predicted)
        return flops * num_rows / self.mean_tokens


def open_inputs(context: RunContext[FinetuneConfig]) -> Inputs:
    """Open the base's tokenizer and the teacher, read the records, and complete the config from them.

    Raises:
        DataError: some records cannot be used.
        ConfigError: the tokenizer is not the base's, or the model or the teacher cannot do the task.
    """
    ranks, config = context.ranks, context.config
    teacher = start.open_teacher(config, ranks)
    config = start.complete(config, ranks, teacher)
    tokenizer = open_tokenizer(config, context.folder)
    if tokenizer is None:
        assert teacher is not None
        tokenizer = teacher.tokenizer
    if config.model.vocab_size is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    share = (ranks.rank, ranks.world_size)
    data = open_task_data(
        config,
        tokenizer,
        look=functools.partial(
            recordings.look_at, memory=context.folder / recordings.FILE, share=share, gather=ranks.gather
        ),
        table=_first_table(context),
    )
    config, task, train = data.config, data.task, data.splits["train"].examples
    task.begin(train)
    facts: dict[str, Any] = {"tokenizer": tokenizer.fingerprint, "seed": config.seed, "data": data.identity}
    if config.data.leave_out:
        facts["left_out"] = config.data.leave_out
    facts |= start.check_teacher_fits(teacher, config, tokenizer, task.max_length)
    rows = task.pack(train)
    mean_tokens = max(1.0, task.mean_tokens(rows))
    inputs = Inputs(config, tokenizer, teacher, data, rows, total_steps(config, len(rows)), mean_tokens, facts)
    _describe(inputs)
    return inputs


def _first_table(context: RunContext[FinetuneConfig]) -> record_table.Table | None:
    """Return the records with which the run started, if it has made steps and some are left out now."""
    if not context.config.data.leave_out or context.dry_run:
        return None
    folder = context.folder
    return context.ranks.once(lambda: record_table.read(folder) if step_folders(folder) else None)


def _describe(inputs: Inputs) -> None:
    config, task, splits, rows = inputs.config, inputs.task, inputs.data.splits, inputs.rows
    counts = ", ".join(f"{len(split.records):,} {name}" for name, split in splits.items() if split.records)
    packed = f" in {len(rows):,} rows" if len(rows) < len(splits["train"].records) else ""
    length, *warnings = describe_length(config, inputs.total_steps, len(rows))
    log.say(f"task: {config.task}; records: {counts}{packed}, {inputs.mean_tokens:.0f} tokens on average; {length}")
    for line in task.review(splits) + warnings:
        log.say(line)
    cut = sum(split.num_cut for split in splits.values())
    if cut:
        total = sum(len(split.records) for split in splits.values())
        log.say(
            f"{cut:,} of {total:,} records ({cut / total:.1%}) are longer than {task.limit} and were cut "
            "(data.too_long)"
        )
    if not splits["validation"].records:
        log.say(describe_held_out(config))
