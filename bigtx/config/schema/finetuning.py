"""A fine-tuning run: its base, its task and its records, and the rules between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Optional

from bigtx.config.nodes import Problem, idle_settings
from bigtx.config.schema.preparation import path_problems, tokenizer_problems
from bigtx.config.schema.tasks import (
    ANSWERING,
    AT_THE_END,
    METRICS,
    SHAPES_OF_TASKS,
    TASKS_OF_SECTIONS,
    WHY_NOT_OTHERS,
    ChatConfig,
    ClassifyConfig,
    PreferenceConfig,
    SftConfig,
    TranscribeConfig,
    TranslateConfig,
)
from bigtx.config.schema.training import RhythmConfig, RunConfig, interval_problems, run_length_problems
from bigtx.config.settings import field, section
from bigtx.config.shape import estimate_problems


@dataclass(kw_only=True)
class FieldsConfig:
    """Names of the fields (JSON keys, table columns) of a record; a name with dots leads into nested objects."""

    text: str = "text"
    """classify and distill: the text; transcribe: the spoken text."""
    pair: str = ""
    """classify: a second text that is classified with the first. Empty: none."""
    label: str = "label"
    """classify: the class."""
    messages: str = "messages"
    """sft: the chat, a list of {role, content}."""
    prompt: str = "prompt"
    """sft and preference without a field of chats: the prompt, a text or a chat."""
    response: str = "response"
    """sft: the answer to the prompt."""
    chosen: str = "chosen"
    """preference: the better answer."""
    rejected: str = "rejected"
    """preference: the worse answer."""
    source: str = "source"
    """translate: the source text."""
    target: str = "target"
    """translate: the target text."""
    audio: str = "audio"
    """transcribe: path of the recording, relative to the file that contains it."""


@dataclass(kw_only=True)
class RecordsConfig:
    """The records: files, and which of them are held out."""

    train: list[str] = field(factory=list, kind="path")
    """Folders, globs, .jsonl, .csv, .tsv or .tar (webdataset) files, also .gz, .zst; texts in pairs: 'x.{de,en}'."""
    validation: list[str] = field(factory=list, kind="path")
    """Records of the validation, by which choices are made. Empty: validation_fraction of the others."""
    test: list[str] = field(factory=list, kind="path")
    """Records of the test, which are read once, at the end of the run. Empty: test_fraction of the others, if above 0.
    """
    exclude: list[str] = field(factory=list)
    """Names of files and folders to leave out of folders, e.g. [unsup] or ['*.bak']."""
    leave_out: list[str] = field(factory=list, change="by_name")
    """Records to leave out, as messages name them: 'a.jsonl, line 7', 'rec/7.flac'; a file or folder as a whole."""
    validation_fraction: float = field(0.1, minimum=0.0, maximum=0.9)
    """Share of the training records (without those of the test) that is held out for validation, if `validation` is
    empty.
    """
    test_fraction: float = field(0.0, minimum=0.0, maximum=0.9)
    """Share of the training records that is held out for the test, before validation, if `test` is empty."""
    min_held_out: int = field(0, minimum=0)
    """Fewest records that a fraction holds out; if it would be fewer, none are held out: they could not decide
    anything.
    """
    split: Literal["hash", "tail"] = "hash"
    """Which records are held out, in proportion for each class: by a hash of the record, or the last in reading order.
    """
    fields: FieldsConfig = field(factory=FieldsConfig)
    max_length: Optional[int] = field(None, kind="count", minimum=2)
    """Most tokens of a record (of each side, where it has two). Empty: the model's max_sequence_length."""
    too_long: Literal["truncate", "refuse"] = "truncate"
    """What happens to longer records: they are cut and counted, or the run does not start."""
    prefetch_batches: int = field(4, minimum=0, maximum=65_536, change="free")
    """Micro batches prepared ahead in a thread; 0 prepares them in the training loop."""

    def problems(self, run_dir: str) -> Iterator[Problem]:
        """Yield a problem for missing records, and for records in the folder of the run."""
        if not self.train:
            yield Problem("data.train", "", "is empty; name files or folders of records, e.g. data.train=reviews/")
        for name in ("train", "validation", "test"):
            paths = getattr(self, name)
            yield from path_problems(f"data.{name}", paths)
            if run_dir and os.path.realpath(run_dir) in map(os.path.realpath, paths):
                what = f"is the folder that data.{name} reads; name another one (it may be inside)"
                yield Problem("run_dir", run_dir, what, related=(f"data.{name}",))


@dataclass(kw_only=True)
class FinetuneTrainConfig(RhythmConfig):
    """The length and intervals of a run: give epochs or max_steps."""

    epochs: Optional[float] = field(None, minimum=0.0, maximum=1e6, change="by_name")
    """Passes over the training records; rounded up to whole steps."""
    min_steps: int = field(0, kind="count", minimum=0, change="by_name")
    """Fewest steps of a run whose length is train.epochs: fewer records are read more often."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for a run without one length, and for its intervals."""
        lengths = {"train.epochs": self.epochs, "train.max_steps": self.max_steps}
        yield from run_length_problems(lengths, "train.epochs=3")
        yield from super().problems()


@dataclass(kw_only=True)
class SelectionConfig:
    """Measurements on the validation records, and the choice of the best checkpoint."""

    every: str = field("10 %", kind="duration")
    """How often, in addition to once at the end: steps, tokens, a time, or a share of the run."""
    at_start: bool = False
    """Whether to measure before the first step too; that measurement is reported, and is never the best."""
    metric: str = ""
    """The metric of the best checkpoint, such as accuracy or loss. Empty: the task's own."""
    patience: Optional[int] = field(None, minimum=1)
    """End the run after this many measurements without an improvement. Empty: never."""
    max_records: Optional[int] = field(None, kind="count", minimum=1)
    """Most records of a measurement, the same each time. Empty: all."""
    test: bool = True
    """Whether the test records are read at the end of the run; write false to compare runs before one is tested."""
    num_examples: int = field(16, minimum=0)
    """Predictions written to predictions.jsonl and to the W&B table each time."""

    def problems(self, task: str) -> Iterator[Problem]:
        """Yield a problem for an invalid interval, and for a metric that cannot select a checkpoint of a task."""
        yield from interval_problems("validation.every", self.every, shares=True)
        usable = [name for name, better in METRICS[task].items() if better != "neither" and name not in AT_THE_END]
        if self.metric and self.metric not in usable:
            what = f"cannot select the best checkpoint of task={task}; write one of {', '.join(usable)}"
            yield Problem("validation.metric", self.metric, what, related=("task",))


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run."""

    begins_with = "base"
    task: Literal["classify", "sft", "preference", "transcribe", "translate", "distill"] = "classify"
    """The task that the model learns."""
    base: Optional[str] = field(None, kind="path", change="never")
    """Folder of the run or checkpoint to start from, an imported one included; its model and tokenizer are used."""
    tokenizer: Optional[str] = field(None, kind="path", change="never")
    """Folder of a tokenizer, if there is no base: then `model` describes a model with random weights from the seed."""
    data: RecordsConfig = section(RecordsConfig, change="never")
    classify: ClassifyConfig = section(ClassifyConfig, change="never")
    chat: ChatConfig = section(ChatConfig, change="never")
    sft: SftConfig = section(SftConfig, change="never")
    preference: PreferenceConfig = section(PreferenceConfig, change="never")
    transcribe: TranscribeConfig = section(TranscribeConfig, change="never")
    translate: TranslateConfig = section(TranslateConfig, change="never")
    train: FinetuneTrainConfig = section(FinetuneTrainConfig, change="never")
    validation: SelectionConfig = section(SelectionConfig, change="by_name")

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for settings that do not fit each other, and for files that do not exist."""
        yield from super().problems()
        if self.base is None and self.tokenizer is None and self.distill.teacher is None:
            what = (
                "is not given; name the run to start from, e.g. base=runs/mine, or the tokenizer of a model from the "
                "seed"
            )
            yield Problem("base", "", what, related=("tokenizer",))
        if self.tokenizer is not None:
            yield from tokenizer_problems("tokenizer", self.tokenizer)
        yield from self.data.problems(self.run_dir)
        yield from self.validation.problems(self.task)
        yield from self.schedule.problems(self.train.max_steps, None)
        yield from self.task_problems()
        yield from self._teacher()
        yield from estimate_problems(self.engine, ["fine-tuning"])

    def task_problems(self) -> Iterator[Problem]:
        """Yield a problem for settings of another task, and for those that do not fit the task."""
        for name, tasks in TASKS_OF_SECTIONS.items():
            if self.task not in tasks:
                yield from idle_settings(getattr(self, name), name, f"without task={' or '.join(tasks)}")
        yield from self.classify.problems()
        if self.task == "classify":
            yield from self.classify.pooling_problems(self.model.shape)
        elif self.task == "sft":
            yield from self.sft.problems()
        elif self.task == "transcribe":
            yield from self.transcribe.problems(self.model)
        if self.task in ANSWERING:
            yield from self.chat.problems()
        yield from self._model()
        bins = self.model.audio.num_mel_bins
        if self.task == "transcribe" and not bins:
            what = "task=transcribe needs an audio encoder; write its mel bins, e.g. 80"
            yield Problem("model.audio.num_mel_bins", str(bins), what, related=("task",))
        if self.task != "transcribe" and bins:
            what = f"gives the model an audio encoder, which task={self.task} cannot use; write task=transcribe, or 0"
            yield Problem("model.audio.num_mel_bins", str(bins), what, related=("task",))

    def _model(self) -> Iterator[Problem]:
        """Check that the model can do the task, and reads records of the given length."""
        task, model, longest = self.task, self.model, self.data.max_length
        shapes, most = SHAPES_OF_TASKS.get(task, ()), model.max_sequence_length
        if shapes and model.shape not in shapes:
            needs = " or ".join(f"a{'n' * shape.startswith('e')} {shape}" for shape in shapes)
            what = f"needs {needs}, and the model is an {model.shape}{WHY_NOT_OTHERS.get(task, '')}"
            yield Problem("task", task, what, related=("model.shape",))
        if task in ANSWERING and model.prefix_attention:
            what = (
                f"with task={task} the answers of a chat would attend to themselves; write "
                "model.prefix_attention=false, which does not change the weights"
            )
            yield Problem("model.prefix_attention", "true", what, related=("task",))
        advice = f"model.max_sequence_length={most}; lower the first or raise the second"
        related = ("model.max_sequence_length",)
        if longest and model.positions == "learned" and longest > most:
            what = f"is longer than the learned positions, which end at {advice}"
            yield Problem("data.max_length", str(longest), what, related=related)
        elif longest and task == "translate" and model.shape == "decoder" and 2 * longest > most:
            what = f"is for each side, and the decoder reads both in one text of at most {advice}"
            yield Problem("data.max_length", str(longest), what, related=related)

    def _teacher(self) -> Iterator[Problem]:
        teacher = self.distill.teacher
        if teacher is None:
            if self.task == "distill":
                yield Problem("distill.teacher", "", "is not given; name the run that the student learns from")
            return
        is_ctc = self.task == "transcribe" and self.transcribe.method == "ctc"
        if is_ctc or self.task == "preference":
            what = f"does not work with task={self.task}{' with transcribe.method=ctc' if is_ctc else ''}"
            yield Problem("distill.teacher", teacher, f"{what}; write distill.teacher=null")
