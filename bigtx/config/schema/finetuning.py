"""A fine-tuning run: what it starts from, its task, and its records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from bigtx.config.fields import field, section
from bigtx.config.schema.training import RhythmConfig, RunConfig


@dataclass(kw_only=True)
class FieldsConfig:
    """What the fields (JSON keys, table columns) of a record are called; a name with dots leads inside."""

    text: str = "text"
    """classify: the text; transcribe: what is said."""
    pair: str = ""
    """classify: a second text that is judged with the first. Empty: none."""
    label: str = "label"
    """classify: the class."""
    messages: str = "messages"
    """sft: the chat, a list of {role, content}."""
    prompt: str = "prompt"
    """sft and preference: what is answered, where there is no chat: a text or a chat."""
    response: str = "response"
    """sft: the answer to the prompt."""
    chosen: str = "chosen"
    """preference: the better answer."""
    rejected: str = "rejected"
    """preference: the worse answer."""
    source: str = "source"
    """translate: what is read."""
    target: str = "target"
    """translate: what is written."""
    audio: str = "audio"
    """transcribe: path of the recording, relative to the file that names it."""


@dataclass(kw_only=True)
class RecordsConfig:
    """The records: files, and which of them are held out."""

    train: list[str] = field(factory=list)
    """Folders, globs, .jsonl, .csv, .tsv or .tar (webdataset) files, also .gz, .zst; texts in pairs: 'x.{de,en}'."""
    validation: list[str] = field(factory=list)
    """Records that choices are made on. Empty: validation_fraction of the others."""
    test: list[str] = field(factory=list)
    """Records that are looked at once, when the run has ended. Empty: test_fraction of the others, if above 0."""
    validation_fraction: float = field(0.1, minimum=0.0, maximum=0.9)
    """Share of the training records (without those of the test) that is held out, where `validation` names none."""
    test_fraction: float = field(0.0, minimum=0.0, maximum=0.9)
    """Share of the training records that is held out first, where `test` names none."""
    split: Literal["hash", "tail"] = "hash"
    """Which are held out: by a hash of the record, or the last ones of each class in the order of their numbers."""
    fields: FieldsConfig = field(factory=FieldsConfig)
    max_length: Optional[int] = field(None, kind="count", minimum=2)
    """Most tokens of a record (of each side, where it has two). Empty: the model's max_sequence_length."""
    too_long: Literal["truncate", "refuse"] = "truncate"
    """What happens to longer ones: cut, and counted; or the run does not start."""
    prefetch_batches: int = field(4, minimum=0, change="free")
    """Micro batches made ahead in a thread; 0 makes them in the loop."""


@dataclass(kw_only=True)
class ClassifyConfig:
    """Texts, or pairs of them, into classes."""

    classes: list[str] = field(factory=list)
    """Names of the classes, in the order of their logits. Empty: those of the training records, sorted."""
    pooling: Literal["auto", "first", "mean", "last"] = "auto"
    """What the head reads: the first token, the mean of all, the last. auto: mean in an encoder, last in a decoder."""
    truncate: Literal["end", "start", "middle"] = "end"
    """Where a text that is too long loses tokens."""
    balance: bool = False
    """Whether each class weighs the same in the loss, whatever its number of records."""
    label_smoothing: float = field(0.0, minimum=0.0, maximum=0.5)
    """Share of the target that is spread over all classes (arXiv:1512.00567)."""


@dataclass(kw_only=True)
class FinetuneTrainConfig(RhythmConfig):
    """The length and rhythm of a run: give epochs or max_steps."""

    epochs: Optional[float] = field(None, minimum=0.0, change="by_name")
    """Passes over the training records; rounded up to whole steps."""


@dataclass(kw_only=True)
class SelectionConfig:
    """Measuring on the validation records, and keeping the best checkpoint."""

    every: str = field("10 %", kind="duration")
    """How often, beside once at the end: steps, tokens, a time, or a share of the run."""
    at_start: bool = False
    """Whether also before the first step."""
    metric: str = ""
    """What the best checkpoint is best in, such as accuracy or loss. Empty: the task's own."""
    patience: Optional[int] = field(None, minimum=1)
    """End the run after so many measurements without a better one. Empty: never."""
    max_records: Optional[int] = field(None, kind="count", minimum=1)
    """Most records measured each time, the same ones. Empty: all."""
    num_examples: int = field(16, minimum=0)
    """Predictions written to predictions.jsonl and to the W&B table each time."""


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run."""

    task: Literal["classify"] = "classify"
    """What the model learns to do."""
    base: Optional[str] = field(None, change="never")
    """Run or checkpoint folder to start from, imported ones included; its model and tokenizer come along."""
    tokenizer: Optional[str] = field(None, change="never")
    """Folder of a tokenizer, where there is no base: then the section `model` says what begins from the seed."""
    data: RecordsConfig = section(RecordsConfig, change="never")
    classify: ClassifyConfig = section(ClassifyConfig, change="never")
    train: FinetuneTrainConfig = section(FinetuneTrainConfig, change="never")
    validation: SelectionConfig = section(SelectionConfig, change="by_name")
