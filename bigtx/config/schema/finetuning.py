"""A fine-tuning run: its base, its task and its records, and the rules between them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Optional

from bigtx.config.nodes import Problem, idle, idle_settings
from bigtx.config.schema.model import ModelConfig
from bigtx.config.schema.preparation import path_problems, tokenizer_problems
from bigtx.config.schema.training import RhythmConfig, RunConfig, interval_problems, run_length_problems
from bigtx.config.settings import field, section
from bigtx.config.shape import num_columns

ANSWERING = ("sft", "preference")
"""Tasks that train a decoder to answer prompts and chats."""
TASKS_OF_SECTIONS = {
    "transcribe": ("transcribe",),
    "classify": ("classify",),
    "chat": ANSWERING,
    "sft": ("sft",),
    "preference": ("preference",),
    "translate": ("translate",),
}
"""The sections that only some tasks read, with these tasks."""
SHAPES_OF_TASKS = {
    "classify": ("encoder", "decoder"),
    "sft": ("decoder",),
    "preference": ("decoder",),
    "translate": ("encoder_decoder", "decoder"),
    "distill": ("decoder",),
}
"""The shapes of the models that can do a task; those of transcribe depend on its method."""
WHY_NOT_OTHERS = {
    "translate": ": an encoder cannot write texts",
    "distill": "; bigtx/pretrain.py with distill.teacher distills any shape from a prepared corpus",
}
Better = Literal["lower", "higher", "neither"]
_OF_ANSWERS: Mapping[str, Better] = {
    "loss": "lower",
    "perplexity": "lower",
    "token_accuracy": "higher",
    "exact_match": "higher",
}
METRICS: Mapping[str, Mapping[str, Better]] = {
    "classify": {
        "accuracy": "higher",
        "largest_class": "neither",
        "macro_f1": "higher",
        "loss": "lower",
        "calibration_error": "lower",
    },
    "sft": _OF_ANSWERS,
    "preference": {
        "loss": "lower",
        "margin": "higher",
        "accuracy": "higher",
        "reward_margin": "higher",
        "reward_accuracy": "higher",
        "chosen_reward": "neither",
        "rejected_reward": "neither",
    },
    "transcribe": {"wer": "lower", "cer": "lower", "loss": "lower"},
    "translate": {"bleu": "higher", "chrf": "higher", "loss": "lower"},
    "distill": _OF_ANSWERS,
}
"""The metrics of each task, and whether lower or higher values are better."""
AT_THE_END = ("exact_match",)
"""Metrics that are not measured during a run, so that they cannot select a checkpoint."""


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
    """sft and preference: the prompt, where there is no chat: a text or a chat."""
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
class ClassifyConfig:
    """Classification of texts, or of pairs of texts."""

    classes: list[str] = field(factory=list)
    """Names of the classes, in the order of their logits. Empty: the classes of the training records, sorted."""
    pooling: Literal["auto", "first", "mean", "last"] = "auto"
    """What the head reads: the first token, the mean of all, or the last. auto: last in a decoder, mean in an encoder,
    or first where model.class_head is pooler."""
    truncate: Literal["end", "start", "middle"] = "end"
    """The end at which a text that is too long is cut."""
    balance: bool = False
    """Whether each class has the same weight in the loss, independent of its number of records."""
    label_smoothing: float = field(0.0, minimum=0.0, maximum=0.5)
    """Share of the target that is spread over all classes (arXiv:1512.00567)."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for names of classes that no record can have. Labels are read without spaces around them, so
        a class with such spaces would have no records.
        """
        key, names, what = "classify.classes", self.classes, ""
        if any(not name.strip() for name in names):
            what = "names an empty class; leave it out"
        elif any(name != name.strip() for name in names):
            what = "has a name with spaces around it; labels are read without spaces, so leave them out"
        elif len(set(names)) < len(names):
            what = "names a class twice; keep one"
        elif len(names) == 1:
            what = "names one class, but two or more are needed; name the others too"
        if what:
            yield Problem(key, str(names), what)

    def pooling_problems(self, shape: str) -> Iterator[Problem]:
        """Yield a problem for a summary that a model of this shape does not have."""
        if shape == "decoder" and self.pooling == "first":
            what = "the first token of a decoder attends to no other token; write last or mean"
            yield Problem("classify.pooling", self.pooling, what, related=("model.shape",))


@dataclass(kw_only=True)
class ChatConfig:
    """sft and preference: how prompts, chats and answers are tokenized, and how answers are generated."""

    format: Literal["auto", "chat", "plain"] = "auto"
    """chat: the roles and ends of the tokenizer; plain: prompt, separator, answer, end. auto: chat if it has roles."""
    separator: str = "\n\n"
    """Text between prompt and answer in the plain format."""
    max_new_tokens: int = field(256, kind="count", minimum=1, change="free")
    """Most tokens of a generated answer."""
    temperature: float = field(0.0, minimum=0.0, maximum=1e3, change="free")
    """Temperature of generation; 0 takes the most likely token each time."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for a plain format without a separator. A tokenizer decides about the format auto."""
        if self.format == "plain" and not self.separator:
            what = "is empty, so nothing would mark the end of a prompt; write a text"
            yield Problem("chat.separator", "", what)


@dataclass(kw_only=True)
class SftConfig:
    """Answers to prompts and in chats, learned from examples; the loss is computed on the answers only."""

    answers: Literal["all", "last"] = "all"
    """Which turns of the assistant have a loss."""
    packing: bool = False
    """Pack several chats into a row; none sees another. train.global_batch_size then counts rows, not records."""
    row_length: Optional[int] = field(None, kind="count", minimum=2)
    """Tokens of a packed row. Empty: as many as one record may have."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for settings of packed rows without packing."""
        if self.row_length is not None and not self.packing:
            yield idle("sft.row_length", self.row_length, None, "without sft.packing=true")


@dataclass(kw_only=True)
class PreferenceConfig:
    """The better of two answers, learned by direct preference optimization (DPO, arXiv:2305.18290)."""

    beta: float = field(0.1, minimum=1e-4, maximum=1e3)
    """How strongly the model is kept near its base: the reward is beta times the log-ratio to it."""
    max_equal: float = field(0.05, minimum=0.0, maximum=1.0)
    """Largest share of pairs whose answers are the same after they are cut to data.max_length; above it the run does
    not start. Such a pair teaches nothing."""
    label_smoothing: float = field(0.0, minimum=0.0, maximum=0.49)
    """Probability that the answers of a pair are swapped (conservative DPO)."""


@dataclass(kw_only=True)
class TranscribeConfig:
    """Speech to text."""

    method: Literal["seq2seq", "ctc"] = "seq2seq"
    """seq2seq: a decoder writes the text; ctc: an encoder alone predicts it column by column."""
    normalize: Literal["none", "lower", "words"] = "none"
    """Normalization of the texts: none, lower case, or lower case without punctuation, with apostrophes kept."""
    max_seconds: float = field(30.0, minimum=0.1, maximum=1e6)
    """Longest recording; data.too_long decides what happens to longer ones."""
    num_frequency_masks: int = field(2, minimum=0, maximum=1000)
    """Frequency bands that are masked in training (SpecAugment, arXiv:1904.08779)."""
    max_frequency_mask: float = field(0.25, minimum=0.0, maximum=1.0)
    """Largest width of a frequency band, as a share of the mel bins."""
    num_time_masks: int = field(2, minimum=0, maximum=1000)
    """Time bands that are masked in training."""
    max_time_mask: float = field(0.1, minimum=0.0, maximum=1.0)
    """Largest length of a time band, as a share of the recording."""
    speed_change: float = field(0.0, minimum=0.0, maximum=0.5)
    """In training, speed up a third of the recordings by this share, and slow down a third; 0.1 is usual. 0: none."""
    noise_db: Optional[float] = field(None, minimum=-20.0, maximum=100.0)
    """In training, add white noise at this many dB below the recording, or up to 30 dB lower. Empty: none."""
    label_smoothing: float = field(0.0, minimum=0.0, maximum=0.5)
    """seq2seq: share of each label that is spread over the vocabulary (arXiv:1512.00567)."""
    num_beams: int = field(1, minimum=1, maximum=1000, change="free")
    """seq2seq: beams in prediction; 1 takes the most likely token each time."""
    length_penalty: float = field(0.6, minimum=0.0, maximum=100.0, change="free")
    """seq2seq: exponent of the length penalty: a beam's score is divided by a power of its length (arXiv:1609.08144).
    """
    cache_size: int = field(268_435_456, kind="size", minimum=0, change="free")
    """Most bytes of decoded recordings that each rank keeps in memory; others are decoded again each time."""

    def problems(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield a problem for a method that is not possible for the model, and for settings of the other one."""
        wanted = "encoder" if self.method == "ctc" else "encoder_decoder"
        if model.shape != wanted:
            what = f"is for model.shape={wanted}, and it is {model.shape}"
            yield Problem("transcribe.method", self.method, what, related=("model.shape",))
        if self.method == "ctc":
            names = ("label_smoothing", "num_beams", "length_penalty")
            yield from idle_settings(self, "transcribe", "with transcribe.method=ctc", names)
        most = model.max_sequence_length
        if model.positions == "learned" and model.audio.num_mel_bins:
            longest = num_columns(model, math.floor(self.max_seconds * model.audio.sample_rate))
            if longest > most:
                yield Problem(
                    "transcribe.max_seconds",
                    f"{self.max_seconds:g}",
                    f"these are {longest:,} columns of the encoder, and the learned positions end at "
                    f"model.max_sequence_length={most}; lower the first or raise the second",
                    related=("model.max_sequence_length",),
                )


@dataclass(kw_only=True)
class TranslateConfig:
    """Translation of one text into another: any sequence-to-sequence task."""

    prefix: str = ""
    """Text before each source, e.g. 'German to English: ', where one model does several tasks (arXiv:1910.10683)."""
    label_smoothing: float = field(0.1, minimum=0.0, maximum=0.5)
    """Share of each label that is spread over the vocabulary (arXiv:1512.00567)."""
    num_beams: int = field(5, minimum=1, maximum=1000, change="free")
    """Beams in prediction; 1 takes the most likely token each time. Validation within a
    run always does that."""
    length_penalty: float = field(0.6, minimum=0.0, maximum=100.0, change="free")
    """Exponent of the length penalty: a beam's score is divided by a power of its length (arXiv:1609.08144, equation
    14).
    """
    max_ratio: float = field(2.0, minimum=0.0, maximum=1e3, change="free")
    """Most generated tokens: this times the tokens of the source, plus max_added."""
    max_added: int = field(10, minimum=0, maximum=2**24, change="free")
    """See max_ratio."""


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
        """Yield a problem for an interval that is none, and for a metric that cannot select a checkpoint of a task."""
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
            yield Problem(
                "base",
                "",
                "is not given; name the run to start from, e.g. base=runs/mine, or the tokenizer of a model from the "
                "seed",
                related=("tokenizer",),
            )
        if self.tokenizer is not None:
            yield from tokenizer_problems("tokenizer", self.tokenizer)
        yield from self.data.problems(self.run_dir)
        yield from self.validation.problems(self.task)
        yield from self.schedule.problems(self.train.max_steps, None)
        yield from self.task_problems()
        yield from self._teacher()

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
