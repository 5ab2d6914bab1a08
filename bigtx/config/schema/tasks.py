"""The tasks of fine-tuning: their settings, models and metrics, and the rules between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Optional

from bigtx.config.nodes import Problem, idle, idle_settings
from bigtx.config.schema.model import ModelConfig
from bigtx.config.settings import field
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
                what = (
                    f"these are {longest:,} columns of the encoder, and the learned positions end at "
                    f"model.max_sequence_length={most}; lower the first or raise the second"
                )
                yield Problem(
                    "transcribe.max_seconds", f"{self.max_seconds:g}", what, related=("model.max_sequence_length",)
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
