"""A pretraining run: its data, objective, length and validation, and the rules between them."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from bigtx.config.nodes import Problem, idle_settings
from bigtx.config.runs import has_steps, why_no_run
from bigtx.config.schema.model import ModelConfig
from bigtx.config.schema.preparation import tokenizer_problems
from bigtx.config.schema.training import RhythmConfig, RunConfig, interval_problems, run_length_problems
from bigtx.config.settings import field, section
from bigtx.config.shape import estimate_problems, outside_estimates, side_lengths
from bigtx.utils.files import is_url, kind_of_folder, url_problem
from bigtx.utils.shell import setting, settings
from bigtx.utils.units import INTERVALS, parse_range

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
NO_CORPUS = "no such folder; name one written by `bigtx data prepare`"
SETTINGS_OF_OBJECTIVES = {
    "fill_in_middle": ("fill_in_middle_rate", "suffix_first_rate"),
    "masked": ("mask_rate", "whole_words"),
    "span_corruption": ("noise_density", "mean_span_length"),
}
"""The settings of the section `objective` that only one objective reads."""


@dataclass(kw_only=True)
class SourceConfig:
    """One prepared corpus in the mixture."""

    path: str = field("", kind="path", change="by_name")
    """Folder written by `bigtx data prepare`, here or as a URL (https://, s3://, gs://)."""
    weight: float = field(1.0, minimum=0.0, maximum=1e9)
    """Share of the sequences, relative to the other sources' weights."""
    max_epochs: Optional[float] = field(None, minimum=0.0, change="by_name")
    """Refuse to start if the run would repeat this source more often. Empty: repeat as needed."""

    def problems(self, key: str, split: str) -> Iterator[Problem]:
        """Yield a problem for a folder that is not a prepared corpus.

        Args:
            key: the source's own key.
            split: the split of the corpus that is read.
        """
        key, folder = f"{key}.path", Path(self.path)
        if not self.path:
            yield Problem(key, "", "is not given; name a folder written by `bigtx data prepare`")
        elif is_url(self.path):
            if problem := url_problem(self.path):
                yield Problem(key, self.path, problem)
        elif not os.path.isdir(folder):
            begun = os.path.isdir(f"{self.path.rstrip('/')}.partial")
            what = "is not finished yet; run its `bigtx data prepare` again" if begun else NO_CORPUS
            yield Problem(key, self.path, what)
        elif not os.path.isfile(folder / split / MANIFEST):
            yield Problem(key, self.path, _no_corpus(folder, key, split))


@dataclass(kw_only=True)
class PhaseConfig:
    """Other weights, starting at some point of the run."""

    start: Optional[int] = field(None, kind="count", minimum=1)
    """Tokens of the global order before the phase, e.g. 8B, including those of data.skip; rounded up to a sequence."""
    weights: dict[str, float] = field(factory=dict, minimum=0.0, maximum=1e9)
    """Weights by source; 0 reads none of it. Sources that are not named keep their own weight."""


@dataclass(kw_only=True)
class ForeignConfig:
    """Plain webdataset text shards, tokenized on the fly instead of data.sources; exact resume needs prepared ones."""

    paths: list[str] = field(factory=list, kind="path", change="by_name")
    """Tar shards, also compressed: files or URLs, braces in quotes, e.g. ['https://host/{0000..0099}.tar']."""
    tokenizer: str = field("", kind="path", change="by_name")
    """Folder of the tokenizer."""
    member: str = "txt"
    """Suffix of the member that holds a sample's text; json: in its field text_field."""
    text_field: str = "text"
    """Key of the text in a JSON member."""
    shuffle_buffer: int = field(1000, kind="count", minimum=0)
    """Samples of each worker from which the next one is drawn; 0 keeps the shards' order."""
    num_workers: int = field(1, minimum=1, maximum=1024)
    """Tokenizing processes of each rank, at most as many as it has shards."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for shards and a tokenizer that do not exist."""
        for path in self.paths:
            if is_url(path) and (problem := url_problem(path)):
                yield Problem("data.foreign.paths", path, problem)
            elif not is_url(path) and "{" not in path and not os.path.isfile(path):
                yield Problem("data.foreign.paths", path, "no such file")
        yield from tokenizer_problems("data.foreign.tokenizer", self.tokenizer)


@dataclass(kw_only=True)
class DataConfig:
    """The training data."""

    sources: dict[str, SourceConfig] = field(factory=dict)
    """Prepared corpora by name."""
    phases: dict[str, PhaseConfig] = field(factory=dict)
    """Later weights of the sources, by the name of each phase; before the first phase, their own weights apply."""
    skip: list[str] = field(factory=list, change="by_name")
    """Sequences of the run to skip, e.g. after a loss spike: ranges START-END, where END is the first one that is read.
    """
    document_mask: bool = False
    """Restrict attention and positions to each document of a packed row, and never predict across a boundary."""
    prefetch_batches: int = field(4, minimum=0, maximum=65_536, change="free")
    """Micro batches read ahead in a thread; 0 reads in the training loop."""
    cache_dir: str = field("~/.cache/bigtx", change="free")
    """Folder on this machine for blocks of remote corpora; all runs may share it."""
    cache_size: int = field(21_474_836_480, kind="size", minimum=0, change="free")
    """Most bytes in cache_dir; the least recently used blocks are deleted first."""
    foreign: ForeignConfig = field(factory=ForeignConfig)

    def problems(self, sequence_length: int) -> Iterator[Problem]:
        """Yield a problem for sources, phases and skipped sequences that do not fit each other."""
        if self.foreign.paths:
            yield from self._beside_foreign()
            yield from self.foreign.problems()
        elif not self.sources:
            what = (
                "is empty; name a prepared corpus, e.g. data.sources.mine.path=runs/corpus "
                "(`bigtx data prepare` writes one)"
            )
            yield Problem("data.sources", "", what)
        else:
            for name, source in self.sources.items():
                yield from source.problems(f"data.sources.{name}", "train")
            if all(source.weight == 0 for source in self.sources.values()):
                yield Problem("data.sources", "", "every weight is 0; give one source a weight above it")
        yield from self._phases(sequence_length)
        yield from self._skipped()

    def _beside_foreign(self) -> Iterator[Problem]:
        for key, value in (("sources", self.sources), ("phases", self.phases), ("skip", self.skip)):
            if value:
                names: dict[str, Any] = (
                    {f"{key}.{name}": None for name in value} if isinstance(value, dict) else {key: []}
                )
                own = settings({f"data.{name}": empty for name, empty in names.items()})
                foreign_paths = settings({"data.foreign.paths": [], "data.foreign.tokenizer": "''"})
                what = f"is for prepared corpora, but data.foreign.paths is given; write {own}, or {foreign_paths}"
                yield Problem(f"data.{key}", "", what, related=("data.foreign.paths",))

    def _phases(self, sequence_length: int) -> Iterator[Problem]:
        starts: dict[int, str] = {}
        for name, phase in self.phases.items():
            key = f"data.phases.{name}"
            if phase.start is None:
                yield Problem(f"{key}.start", "", "is not given; write the tokens before the phase, e.g. 8B")
            else:
                sequence = -(-phase.start // sequence_length)
                other = starts.setdefault(sequence, name)
                if other != name:
                    what = (
                        f"starts at sequence {sequence:,}, as does data.phases.{other}; leave one of them out, e.g. by "
                        f"{setting(f'data.phases.{name}', None)}"
                    )
                    yield Problem(f"{key}.start", str(phase.start), what, related=("train.sequence_length",))
            for source in phase.weights:
                if source not in self.sources:
                    similar = difflib.get_close_matches(source, self.sources, 3, 0.6)
                    known = f"sources are {', '.join(self.sources)}"
                    hint = f"did you mean {' or '.join(similar)}?" if similar else known
                    yield Problem(f"{key}.weights.{source}", "", f"is not a source in data.sources; {hint}")
            weights = [phase.weights.get(name, source.weight) for name, source in self.sources.items()]
            if weights and not any(weights):
                yield Problem(f"{key}.weights", "", "every weight is 0; give one source a weight above it")

    def _skipped(self) -> Iterator[Problem]:
        windows = []
        for text in self.skip:
            try:
                windows.append((*parse_range(text), text))
            except ValueError as error:
                yield Problem("data.skip", text, str(error))
        for (_, end, earlier), (start, _, text) in itertools.pairwise(sorted(windows)):
            if start < end:
                yield Problem("data.skip", text, f"overlaps {earlier}; write one range")


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The objective: what the model reads of a row of text, and what it predicts."""

    name: Literal["causal", "fill_in_middle", "masked", "span_corruption", "prefix"] = "causal"
    """causal and fill_in_middle for a decoder, masked for an encoder, span_corruption for an encoder-decoder, prefix
    for a decoder with model.prefix_attention or an encoder-decoder."""
    fill_in_middle_rate: float = field(0.5, minimum=0.0, maximum=1.0)
    """fill_in_middle: share of the documents that are rearranged (arXiv:2207.14255); the others stay causal."""
    suffix_first_rate: float = field(0.5, minimum=0.0, maximum=1.0)
    """fill_in_middle: share of the rearranged ones whose suffix is first (SPM); in the others it is second (PSM)."""
    mask_rate: float = field(0.15, minimum=0.001, maximum=0.9)
    """masked: share of the tokens that are predicted (BERT: 0.15, arXiv:1810.04805; ModernBERT: 0.3)."""
    whole_words: bool = True
    """masked: whether all tokens of a word are chosen together."""
    noise_density: float = field(0.15, minimum=0.001, maximum=0.9)
    """span_corruption: share of the tokens that are removed (arXiv:1910.10683)."""
    mean_span_length: float = field(3.0, minimum=1.0, maximum=1e6)
    """span_corruption: mean number of tokens of a removed span."""

    def problems(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield a problem for an objective that the model's shape does not allow, and for settings of another one."""
        fitting = {
            "decoder": ("prefix",) if model.prefix_attention else ("causal", "fill_in_middle"),
            "encoder": ("masked",),
            "encoder_decoder": ("span_corruption", "prefix"),
        }[model.shape]
        if self.name not in fitting:
            what = "a decoder with model.prefix_attention" if model.prefix_attention else f"model.shape={model.shape}"
            yield Problem("objective.name", self.name, f"is not possible for {what}; write {' or '.join(fitting)}")
        for owner, names in SETTINGS_OF_OBJECTIVES.items():
            if owner != self.name:
                yield from idle_settings(self, "objective", f"without objective.name={owner}", names)


@dataclass(kw_only=True)
class TrainConfig(RhythmConfig):
    """The length and intervals of a run: give max_steps or max_tokens."""

    max_tokens: Optional[int] = field(None, kind="count", minimum=1, change="by_name")
    """Input tokens of the run, e.g. 10B; rounded up to whole steps."""
    sequence_length: int = field(1024, kind="count", minimum=2, maximum=2**31 - 1)
    """Tokens of a row of text; an objective that cuts it in two defines the lengths of the parts."""
    z_loss: float = field(0.0, minimum=0.0, change="by_name")
    """Weight of the loss of the squared log-partition, which keeps logits small (PaLM, arXiv:2204.02311: 1e-4)."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for a run without one length, and for its intervals."""
        lengths = {"train.max_steps": self.max_steps, "train.max_tokens": self.max_tokens}
        yield from run_length_problems(lengths, "train.max_steps=1000")
        yield from super().problems()


@dataclass(kw_only=True)
class ValidationConfig:
    """Loss on held-out text, and samples, inside a run."""

    every: str = field("500 steps", kind="duration", units=INTERVALS)
    """How often, in addition to once at the end."""
    at_start: bool = False
    """Whether to measure before the first step too."""
    sources: dict[str, SourceConfig] = field(factory=dict)
    """Corpora whose validation split is read. Empty: those of data.sources that have one."""
    max_sequences: int = field(256, kind="count", minimum=0)
    """Sequences of each source, the same each time; 0 disables validation."""
    sample_prompts: list[str] = field(factory=list)
    """Texts that the model continues at each validation; shown, written to samples.jsonl and to the W&B table."""
    sample_tokens: int = field(48, minimum=1, maximum=2**24)
    """New tokens of each sample."""
    sample_temperature: float = field(0.8, minimum=0.0, maximum=1e3)
    """Temperature of the samples; 0 takes the most likely token."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for corpora that cannot be measured, and for an invalid interval."""
        for name, source in self.sources.items():
            key = f"validation.sources.{name}"
            yield from source.problems(key, "validation")
            why = "in validation, where each corpus is measured by itself"
            yield from idle_settings(source, key, why, ("weight", "max_epochs"))
        yield from interval_problems("validation.every", self.every)


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining run."""

    begins_with = "init_from"
    free_in_fork = ("init_from", "train.global_batch_size")
    init_from: Optional[str] = field(None, kind="path", change="never")
    """Run or checkpoint folder whose weights start this run; data, schedule and optimizer are this run's own."""
    data: DataConfig = section(DataConfig, change="never")
    objective: ObjectiveConfig = section(ObjectiveConfig, change="never")
    train: TrainConfig = section(TrainConfig, change="never")
    validation: ValidationConfig = section(ValidationConfig, change="by_name")

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for settings that do not fit each other, and for files that do not exist."""
        yield from super().problems()
        model, train = self.model, self.train
        started = has_steps(Path(self.run_dir))  # The weights have been loaded already in this case.
        if self.init_from is not None and not started and (problem := why_no_run(self.init_from)):
            yield Problem("init_from", self.init_from, problem)
        if bins := model.audio.num_mel_bins:
            what = "only `bigtx finetune` with task=transcribe reads audio; write 0"
            yield Problem("model.audio.num_mel_bins", str(bins), what)
        yield from self.objective.problems(model)
        yield from self.data.problems(train.sequence_length)
        yield from self.validation.problems()
        if model.shape == "encoder" and self.validation.sample_prompts:
            what = f"an encoder (model.shape) generates no text; write {setting('validation.sample_prompts', [])}"
            yield Problem("validation.sample_prompts", str(self.validation.sample_prompts), what)
        yield from self._row_length()
        yield from estimate_problems(self.engine, outside_estimates(self))
        tokens_per_step = train.global_batch_size * train.sequence_length
        # Rounded up to whole steps, like the length of the run.
        num_steps = -(-train.max_tokens // tokens_per_step) if train.max_tokens else train.max_steps
        yield from self.schedule.problems(num_steps, tokens_per_step)

    def _row_length(self) -> Iterator[Problem]:
        length, most = self.train.sequence_length, self.model.max_sequence_length
        if self.model.positions != "learned":
            return
        what = ""
        if self.model.shape != "encoder_decoder":
            if length > most:
                what = f"is longer than the learned positions; the most is model.max_sequence_length={most}"
        elif (longest := max(side_lengths(self.objective, length))) > most:
            what = (
                f"gives one side of a row {longest} tokens with objective.name={self.objective.name}, and the learned "
                f"positions end at model.max_sequence_length={most}; lower train.sequence_length"
            )
        if what:
            related = ("model.max_sequence_length", "objective.name")
            yield Problem("train.sequence_length", str(length), what, related=related)


def _no_corpus(folder: Path, key: str, split: str) -> str:
    """Return why a folder is not a prepared corpus with the split, and what to write."""
    if os.path.isfile(folder / MANIFEST):
        return f"is one split of a prepared corpus; write {setting(key, folder.parent)}"
    if any(os.path.isfile(folder / other / MANIFEST) for other in SPLITS):
        return f"has no {split}/{MANIFEST}: the corpus has no {split} split; name another one"
    if kind := "empty" if not any(folder.iterdir()) else kind_of_folder(folder):
        return f"is {kind}, not a prepared corpus; name a folder written by `bigtx data prepare`"
    texts = settings({"input.paths": folder, "tokenizer": "TOKENIZER", "output": "CORPUS"})
    return f"has no {split}/{MANIFEST}, so it is not a prepared corpus; `bigtx data prepare {texts}` writes one"
