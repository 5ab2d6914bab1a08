"""The inputs of fine-tuning: the base's tokenizer, the teacher, the records under their task, the length of the run
that follows from them, and its batches, which a thread prepares ahead.

The order of the records is a pure function of (lengths, seed, batch size), so a position in it is one number.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigtx.config.schema import FinetuneConfig
from bigtx.data import recordings
from bigtx.data.stream.loader import Division, StepLoader
from bigtx.engine.checkpoint import step_folders
from bigtx.finetuning.checks import open_tokenizer
from bigtx.finetuning.records import Table, TaskData, open_task_data, read_table
from bigtx.finetuning.tasks.task import RecordTask
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train import start
from bigtx.train.context import RunContext
from bigtx.train.teacher import Teacher
from bigtx.utils import log
from bigtx.utils.shell import setting

FEW_STEPS = 30
"""Fewer steps than this train little: most of them belong to the learning rate's warm-up and decay."""
SOME_STEPS = 100
"""The number of steps that the warning about too few steps suggests."""


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


def _first_table(context: RunContext[FinetuneConfig]) -> Table | None:
    """Return the records with which the run started, if it has made steps and some are left out now."""
    if not context.config.data.leave_out or context.dry_run:
        return None
    folder = context.folder
    return context.ranks.once(lambda: read_table(folder) if step_folders(folder) else None)


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


def total_steps(config: FinetuneConfig, num_rows: int) -> int:
    """Return the number of optimizer steps of a run.

    Args:
        num_rows: the rows of an epoch: records, or packed rows of them.
    """
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    assert train.epochs is not None
    return max(train.min_steps, _steps_of_epochs(config, num_rows))


def length_setting(config: FinetuneConfig, num_rows: int) -> str:
    """Return the setting that determines the length of a run."""
    if config.train.max_steps is not None:
        return "train.max_steps"
    return "train.min_steps" if config.train.min_steps > _steps_of_epochs(config, num_rows) else "train.epochs"


def _steps_of_epochs(config: FinetuneConfig, num_rows: int) -> int:
    assert config.train.epochs is not None
    return max(1, -(-round(config.train.epochs * num_rows) // config.train.global_batch_size))


def describe_length(config: FinetuneConfig, total_steps: int, num_rows: int) -> list[str]:
    """Describe the steps and epochs of a run, with a warning if there are few steps.

    Args:
        total_steps: the number of steps of the whole run.
        num_rows: the rows of an epoch: records, or packed rows of them.
    """
    train = config.train
    size = train.global_batch_size
    asked = ""
    if train.epochs is not None:
        asked = f" (train.epochs={train.epochs:g} in whole steps)"
        if length_setting(config, num_rows) == "train.min_steps":
            alone = _steps_of_epochs(config, num_rows)
            asked = (
                f" (train.min_steps={train.min_steps}, since train.epochs={train.epochs:g} would be {alone:,} steps)"
            )
    said = [f"{total_steps:,} steps of {size:,} make {total_steps * size / num_rows:.3g} epochs{asked}"]
    if total_steps < FEW_STEPS:
        advice = f"train.max_steps={SOME_STEPS}"
        if train.epochs is not None:
            advice = f"train.epochs={math.ceil(SOME_STEPS * size / num_rows)}, which makes {SOME_STEPS} steps or more"
        said.append(
            f"warning: {total_steps:,} steps are so few that the model will hardly learn anything; write e.g. "
            f"{advice}, or a smaller train.global_batch_size"
        )
    return said


def describe_held_out(config: FinetuneConfig) -> str:
    """Return the message that there are no validation records, and why."""
    data = config.data
    why = "data.validation_fraction"
    if data.validation_fraction and data.min_held_out:
        why = f"{setting('data.validation_fraction', data.validation_fraction)} would hold out fewer than "
        why += setting("data.min_held_out", data.min_held_out)
    return f"no validation records: the newest checkpoint counts as the best ({why})"


WINDOW_BATCHES = 32
"""Global batches whose records are sorted by length together, so that little padding is needed."""


class RecordOrder:
    """The record at each position i of a run.

    Each epoch is a permutation of its own; a batch may cross the border of two. Within a window of
    batches the records are sorted by length, then cut into global batches, whose order is drawn.
    """

    def __init__(self, lengths: np.ndarray, *, global_batch_size: int, seed: int) -> None:
        """Args:
        lengths: int [N], of each record; equal lengths leave the records unsorted.
        """
        assert len(lengths), "no records"
        self._lengths, self._size, self._seed = lengths, global_batch_size, seed
        self._window = functools.lru_cache(maxsize=1)(self._draw_window)
        self._permutation = functools.lru_cache(maxsize=1)(self._permute)

    def batch(self, number: int) -> np.ndarray:
        """Return the records of a global batch, int64 [global_batch_size]; batch 0 is the first."""
        window, place = divmod(number, WINDOW_BATCHES)
        return self._window(window)[place * self._size : (place + 1) * self._size]

    def _draw_window(self, window: int) -> np.ndarray:
        span = WINDOW_BATCHES * self._size
        numbers = np.arange(window * span, (window + 1) * span)
        epochs, places = np.divmod(numbers, len(self._lengths))
        own = np.unique(epochs).tolist()
        records = np.concatenate([self._permutation(epoch)[places[epochs == epoch]] for epoch in own])
        records = records[np.argsort(self._lengths[records], kind="stable")]
        shuffled = self._generator("window", window).permutation(WINDOW_BATCHES)
        return records.reshape(WINDOW_BATCHES, self._size)[shuffled].ravel()

    def _permute(self, epoch: int) -> np.ndarray:
        return self._generator("epoch", epoch).permutation(len(self._lengths))

    def _generator(self, what: str, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, {"epoch": 0, "window": 1}[what] << 48 | number]))


Collate = Callable[[Sequence[int], Sequence[int]], Any]
"""(records, their numbers in the run) -> a micro batch on the CPU."""


class RecordLoader(StepLoader):
    """An endless iterator over optimizer steps."""

    def __init__(
        self,
        lengths: np.ndarray,
        collate: Collate,
        division: Division,
        *,
        seed: int,
        start_sequence: int,
        prefetch_batches: int,
    ) -> None:
        """Args:
        lengths: int [N], of each record.
        """
        self._order = RecordOrder(lengths, global_batch_size=division.global_batch_size, seed=seed)
        self._collate = collate
        super().__init__(division, start_sequence, prefetch_batches)

    def num_tokens(self, micro_batches: list[Any]) -> int:
        """Return the number of tokens of records, without padding."""
        return sum(batch.num_tokens for batch in micro_batches)

    def _micro_batches(self, start_sequence: int) -> Iterator[Any]:
        division, size = self._division, self._division.global_batch_size
        assert start_sequence % size == 0
        # Neighbours have about equal length: dealt in turns, they give every rank about the same work.
        places = np.arange(size)[division.rank :: division.world_size].reshape(-1, division.micro_batch_size)
        for step in itertools.count(start_sequence // size):
            records = self._order.batch(step)
            yield from (self._collate(records[own].tolist(), (step * size + own).tolist()) for own in places)
