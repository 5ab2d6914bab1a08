"""Checks beyond types: settings that must fit each other, and files that must exist."""

from __future__ import annotations

import difflib
import glob
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtx.config.batches import batch_problems
from bigtx.config.nodes import Problem, idle
from bigtx.config.runs import CHECKPOINTS, has_steps, why_no_run
from bigtx.config.schema import (
    DataConfig,
    FilterConfig,
    FinetuneConfig,
    InputConfig,
    PrepareConfig,
    PretrainConfig,
    RecordsConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerTrainConfig,
    ValidationConfig,
)
from bigtx.config.settings import find, similar_keys
from bigtx.config.validate_distill import distill_problems
from bigtx.config.validate_finetune import task_problems
from bigtx.config.validate_model import model_problems, objective_problems, training_problems
from bigtx.utils.paths import is_url, kind_of_folder, url_problem
from bigtx.utils.processes import world_size
from bigtx.utils.shell import setting, settings
from bigtx.utils.units import Duration, parse_duration, parse_range

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
LEAST_TIMEOUT_SECONDS, LARGEST_TIMEOUT_SECONDS = 1, 30 * 86_400


def validate(config: Any) -> Iterator[Problem]:
    """Yield every problem between the settings of a configuration; yield none for a schema without such rules."""
    if isinstance(config, PretrainConfig):
        yield from _pretrain(config)
    elif isinstance(config, FinetuneConfig):
        yield from _finetune(config)
    elif isinstance(config, TokenizerTrainConfig):
        yield from _input(config.input)
        if not config.output:
            yield Problem(
                "output", "", "is not given; name the folder of the new tokenizer, e.g. output=runs/tokenizer"
            )
    elif isinstance(config, PrepareConfig):
        yield from _prepare(config)


def _every_run(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems that any kind of run can have."""
    if not config.run_dir:
        yield Problem("run_dir", "", "is not given; name the folder of the run, e.g. run_dir=runs/first")
    for key in config.allow_changes:
        yield from _allowed_change(type(config), key)
    yield from model_problems(config.model)
    yield from distill_problems(config)
    yield from batch_problems(config.train, world_size())
    yield from _engine(config)


def _finetune(config: FinetuneConfig) -> Iterator[Problem]:
    yield from _every_run(config)
    yield from training_problems(config)
    if config.base is None and config.tokenizer is None and config.distill.teacher is None:
        yield Problem(
            "base",
            "",
            "is not given; name the run to start from, e.g. base=runs/mine, or the tokenizer of a model from the seed",
            related=("tokenizer",),
        )
    if config.tokenizer is not None and not Path(config.tokenizer).is_dir():
        yield Problem("tokenizer", config.tokenizer, "no such folder; name one written by `bigtx tokenizer train`")
    yield from _records(config.data)
    train = config.train
    yield from _run_length({"train.epochs": train.epochs, "train.max_steps": train.max_steps}, "train.epochs=3")
    yield from _rhythms(
        {"train.log_every": train.log_every, "train.checkpoint_every": train.checkpoint_every}, config.engine.timeout
    )
    yield from _rhythms({"validation.every": config.validation.every}, config.engine.timeout, shares=True)
    yield from _schedule(config.schedule, train.max_steps, None)
    yield from task_problems(config)


def _run_length(lengths: Mapping[str, float | None], example: str) -> Iterator[Problem]:
    """Check that a run has exactly one length.

    Args:
        lengths: the values of the two settings that may give the length.
        example: one of the settings with a value.
    """
    first, second = lengths
    related = tuple(lengths)
    if None not in lengths.values():
        what = f"{second} is given too; write only one of them, or unset one by {first}=null or {second}=null"
        yield Problem(first, "", what, related=related)
    elif set(lengths.values()) == {None}:
        yield Problem(first, "", f"is not given, nor is {second}; write one, e.g. {example}", related=related)
    for key, length in lengths.items():
        if length == 0:
            yield Problem(key, "0", "trains nothing; write a number above 0")


def _records(data: RecordsConfig) -> Iterator[Problem]:
    if not data.train:
        yield Problem("data.train", "", "is empty; name files or folders of records, e.g. data.train=reviews/")
    for name in ("train", "validation", "test"):
        yield from _paths(f"data.{name}", getattr(data, name))


def _pretrain(config: PretrainConfig) -> Iterator[Problem]:
    yield from _every_run(config)
    started = has_steps(Path(config.run_dir))  # The weights have been loaded already in this case.
    if config.init_from is not None and not started and (problem := why_no_run(config.init_from)):
        yield Problem("init_from", config.init_from, problem)
    yield from training_problems(config)
    yield from objective_problems(config)
    yield from _data(config.data)
    yield from _phases(config.data, config.train.sequence_length)
    yield from _skip(config.data.skip)
    yield from _validation(config.validation)
    train = config.train
    yield from _lengths(config)
    yield from _rhythms(
        {
            "train.log_every": train.log_every,
            "train.checkpoint_every": train.checkpoint_every,
            "validation.every": config.validation.every,
        },
        config.engine.timeout,
    )
    tokens_per_step = train.global_batch_size * train.sequence_length
    # Rounded up to whole steps, like the length of the run.
    num_steps = -(-train.max_tokens // tokens_per_step) if train.max_tokens else train.max_steps
    yield from _schedule(config.schedule, num_steps, tokens_per_step)


def _allowed_change(schema: type[RunConfig], key: str) -> Iterator[Problem]:
    if key == CHECKPOINTS:
        return  # Allows the run to start again without them.
    setting = find(schema, key)
    if setting is None or setting.section:
        similar = similar_keys(schema, key)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        yield Problem(
            "allow_changes", key, f"no such setting{hint}" if setting is None else "is a section; name its settings"
        )
    elif setting.change == "never":
        what = f"can never change within a run; start a new one in another run_dir, with {schema.begins_with}=THIS_RUN"
        yield Problem("allow_changes", key, what)


def _data(data: DataConfig) -> Iterator[Problem]:
    if data.foreign.paths:
        yield from _foreign(data)
        return
    if not data.sources:
        yield Problem(
            "data.sources",
            "",
            "is empty; name a prepared corpus, e.g. data.sources.mine.path=runs/corpus "
            "(`bigtx data prepare` writes one)",
        )
        return
    yield from _sources(data.sources, "data.sources", "train")
    if all(source.weight == 0 for source in data.sources.values()):
        yield Problem("data.sources", "", "every weight is 0; give one source a weight above it")


def _foreign(data: DataConfig) -> Iterator[Problem]:
    foreign = data.foreign
    for key, value in (("sources", data.sources), ("phases", data.phases), ("skip", data.skip)):
        if value:
            names: dict[str, Any] = {f"{key}.{name}": None for name in value} if isinstance(value, dict) else {key: []}
            own = settings({f"data.{name}": empty for name, empty in names.items()})
            foreign_paths = settings({"data.foreign.paths": [], "data.foreign.tokenizer": "''"})
            what = f"is for prepared corpora, but data.foreign.paths is given; write {own}, or {foreign_paths}"
            yield Problem(f"data.{key}", "", what, related=("data.foreign.paths",))
    for path in foreign.paths:
        if is_url(path) and (problem := url_problem(path)):
            yield Problem("data.foreign.paths", path, problem)
        elif not is_url(path) and "{" not in path and not Path(path).is_file():
            yield Problem("data.foreign.paths", path, "no such file")
    if not foreign.tokenizer:
        yield Problem("data.foreign.tokenizer", "", "is not given; name a folder written by `bigtx tokenizer train`")
    elif not Path(foreign.tokenizer).is_dir():
        yield Problem(
            "data.foreign.tokenizer",
            foreign.tokenizer,
            "no such folder; name one written by `bigtx tokenizer train`",
        )


def _phases(data: DataConfig, sequence_length: int) -> Iterator[Problem]:
    starts: dict[int, str] = {}
    for name, phase in data.phases.items():
        key = f"data.phases.{name}"
        if phase.start is None:
            yield Problem(f"{key}.start", "", "is not given; write the tokens before the phase, e.g. 8B")
        else:
            sequence = -(-phase.start // sequence_length)
            other = starts.setdefault(sequence, name)
            if other != name:
                yield Problem(
                    f"{key}.start",
                    str(phase.start),
                    f"starts at sequence {sequence:,}, as does data.phases.{other}; leave one of them out, e.g. by "
                    f"{setting(f'data.phases.{name}', None)}",
                    related=("train.sequence_length",),
                )
        for source in phase.weights:
            if source not in data.sources:
                similar = difflib.get_close_matches(source, data.sources, 3, 0.6)
                hint = f"did you mean {' or '.join(similar)}?" if similar else f"sources are {', '.join(data.sources)}"
                yield Problem(f"{key}.weights.{source}", "", f"is not a source in data.sources; {hint}")
        if data.sources and not any(phase.weights.get(name, source.weight) for name, source in data.sources.items()):
            yield Problem(f"{key}.weights", "", "every weight is 0; give one source a weight above it")


def _skip(ranges: list[str]) -> Iterator[Problem]:
    windows = []
    for text in ranges:
        try:
            windows.append((*parse_range(text), text))
        except ValueError as error:
            yield Problem("data.skip", text, str(error))
    for (_, end, earlier), (start, _, text) in itertools.pairwise(sorted(windows)):
        if start < end:
            yield Problem("data.skip", text, f"overlaps {earlier}; write one range")


def _validation(validation: ValidationConfig) -> Iterator[Problem]:
    yield from _sources(validation.sources, "validation.sources", "validation")
    plain = SourceConfig()
    for name, source in validation.sources.items():
        for field in ("weight", "max_epochs"):
            value, default = getattr(source, field), getattr(plain, field)
            if value != default:
                why = "in validation, where each corpus is measured by itself"
                yield idle(f"validation.sources.{name}.{field}", value, default, why)


def _sources(sources: dict[str, SourceConfig], key: str, split: str) -> Iterator[Problem]:
    for name, source in sources.items():
        path = f"{key}.{name}.path"
        if not source.path:
            yield Problem(path, "", "is not given; name a folder written by `bigtx data prepare`")
        elif is_url(source.path):
            if problem := url_problem(source.path):
                yield Problem(path, source.path, problem)
        elif not Path(source.path).is_dir():
            begun = Path(f"{source.path.rstrip('/')}.partial").is_dir()
            what = "is not finished yet; run its `bigtx data prepare` again" if begun else "no such folder; name one"
            yield Problem(path, source.path, what if begun else f"{what} written by `bigtx data prepare`")
        elif not (Path(source.path) / split / MANIFEST).is_file():
            yield Problem(path, source.path, _no_corpus(Path(source.path), path, split))


def _no_corpus(folder: Path, key: str, split: str) -> str:
    """Return why a folder is not a prepared corpus with the split, and what to write."""
    if (folder / MANIFEST).is_file():
        return f"is one split of a prepared corpus; write {setting(key, folder.parent)}"
    if any((folder / other / MANIFEST).is_file() for other in SPLITS):
        return f"has no {split}/{MANIFEST}: the corpus has no {split} split; name another one"
    if kind := "empty" if not any(folder.iterdir()) else kind_of_folder(folder):
        return f"is {kind}, not a prepared corpus; name a folder written by `bigtx data prepare`"
    texts = settings({"input.paths": folder, "tokenizer": "TOKENIZER", "output": "CORPUS"})
    return f"has no {split}/{MANIFEST}, so it is not a prepared corpus; `bigtx data prepare {texts}` writes one"


def _lengths(config: PretrainConfig) -> Iterator[Problem]:
    train, model = config.train, config.model
    lengths = {"train.max_steps": train.max_steps, "train.max_tokens": train.max_tokens}
    yield from _run_length(lengths, "train.max_steps=1000")
    # An encoder-decoder reads a row in two parts, whose lengths the objective defines.
    whole = model.shape != "encoder_decoder"
    if whole and model.positions == "learned" and train.sequence_length > model.max_sequence_length:
        yield Problem(
            "train.sequence_length",
            str(train.sequence_length),
            f"is longer than the learned positions; the most is model.max_sequence_length={model.max_sequence_length}",
            related=("model.max_sequence_length",),
        )


def _rhythms(every: dict[str, str], timeout: str, *, shares: bool = False) -> Iterator[Problem]:
    for key, text in every.items():
        duration = _duration(text)
        if duration and duration.value == 0:
            yield Problem(key, text, "is not an interval; write a duration above 0, such as 100 steps")
        elif duration and duration.unit == "fraction" and not shares:
            yield Problem(key, text, "is a share of the run; write steps, tokens or a time, such as 100 steps")
    waits = _duration(timeout)
    if waits and waits.unit != "seconds":
        yield Problem("engine.timeout", timeout, "is not a time; write one such as 30 min")
    elif waits and not LEAST_TIMEOUT_SECONDS <= waits.value <= LARGEST_TIMEOUT_SECONDS:
        yield Problem("engine.timeout", timeout, "is not between 1 s and 30 days; write a time such as 30 min")


def _schedule(schedule: ScheduleConfig, num_steps: int | None, tokens_per_step: int | None) -> Iterator[Problem]:
    """Check that warm-up and decay are durations of the run and, if its length is known, fit into it."""
    parts = {"schedule.warmup": schedule.warmup}
    if schedule.name == "warmup_stable_decay":
        parts["schedule.decay"] = schedule.decay
    shares = {}
    for key, text in parts.items():
        duration = _duration(text)
        if duration and duration.unit == "seconds":
            yield Problem(key, text, "is a time; write steps, tokens or a share of the run, such as 5 %")
        elif duration and (share := _share_of_run(duration, num_steps, tokens_per_step)) is not None:
            shares[key] = share
    # The lengths of the run in steps and in tokens differ by rounding.
    if sum(shares.values()) > 1 + 1e-6:
        key = max(shares, key=lambda name: shares[name])
        whole = " and ".join(f"{name}={parts[name]}" for name in shares)
        yield Problem(
            key, parts[key], f"{whole} are longer than the whole run; shorten them", related=("train.max_steps", *parts)
        )


def _share_of_run(duration: Duration, num_steps: int | None, tokens_per_step: int | None) -> float | None:
    """Convert a duration in steps, tokens or shares to a share of the run; None if the run's length is not known."""
    if duration.unit == "fraction":
        return duration.value
    if not num_steps:
        return None
    if duration.unit == "steps":
        return duration.value / num_steps
    return duration.value / (num_steps * tokens_per_step) if tokens_per_step else None


def _engine(config: RunConfig) -> Iterator[Problem]:
    engine = config.engine
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        yield Problem(
            "engine.offload_optimizer", engine.offload_optimizer, "needs engine.zero_stage 1, 2 or 3; it is 0"
        )
    if engine.offload_parameters != "none" and engine.zero_stage != 3:
        yield Problem(
            "engine.offload_parameters",
            engine.offload_parameters,
            f"needs engine.zero_stage=3; it is {engine.zero_stage}",
        )


def _prepare(config: PrepareConfig) -> Iterator[Problem]:
    yield from _input(config.input)
    if not config.output:
        yield Problem("output", "", "is not given; name the folder of the prepared corpus, e.g. output=runs/corpus")
    if not config.tokenizer:
        yield Problem("tokenizer", "", "is not given; name a folder written by `bigtx tokenizer train`")
    elif not Path(config.tokenizer).is_dir():
        yield Problem("tokenizer", config.tokenizer, "no such folder; name one written by `bigtx tokenizer train`")
    yield from _filters(config.filters)
    yield from _paths("decontaminate.paths", config.decontaminate.paths)


def _filters(filters: FilterConfig) -> Iterator[Problem]:
    for name in ("words", "mean_word_length"):
        least, most = getattr(filters, f"min_{name}"), getattr(filters, f"max_{name}")
        if least is not None and most is not None and least > most:
            yield Problem(
                f"filters.min_{name}",
                str(least),
                f"is above filters.max_{name}={most}, so no document could be kept",
                related=(f"filters.max_{name}",),
            )


def _input(config: InputConfig) -> Iterator[Problem]:
    if not config.paths:
        yield Problem("input.paths", "", "is empty; name files, folders or globs, e.g. input.paths=texts/")
    yield from _paths("input.paths", config.paths)


def _paths(key: str, paths: list[str]) -> Iterator[Problem]:
    for path in paths:
        if is_url(path) or "{" in path:
            continue  # URLs and patterns of braces are expanded when they are read.
        if not glob.has_magic(path) and not Path(path).exists():
            yield Problem(key, path, "no such file or folder")
        elif glob.has_magic(path) and not Path(path).exists() and not any(glob.iglob(path, recursive=True)):
            yield Problem(key, path, "matches no file")


def _duration(text: str) -> Duration | None:
    try:
        return parse_duration(text)
    except ValueError:
        # The converter has reported it.
        return None
