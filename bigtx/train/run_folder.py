"""The run folder: one run at a time opens it, and it holds everything about the run.

config.yaml        the resolved config            tokenizer/       copied from the data
deepspeed.json     as given to DeepSpeed          environment.json versions, commit, hardware
config.given.yaml  the user's own config.yaml, if there was one
metrics.jsonl, samples.jsonl, events.jsonl, wandb/, logs/ and checkpoints/ grow during the run
frozen/            the weights that the run does not train, if there are any; they belong to every checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.load import to_dict, yaml_of
from bigtx.config.runs import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    checkpoint_named,
    gives_config,
    has_steps,
    is_run,
    read_values,
    run_dir_of,
    with_absolute_paths,
)
from bigtx.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from bigtx.utils import processes
from bigtx.utils.errors import CheckpointError, ConfigError, LaunchError, writes
from bigtx.utils.files import RUN, kind_of_own, read_object, write_atomic, write_json
from bigtx.utils.locks import FolderLock, refuse_if_held
from bigtx.utils.secrets import scrub
from bigtx.utils.shell import setting

if TYPE_CHECKING:
    from bigtx.tokenizer.tokenizer import Tokenizer


GIVEN_CONFIG = "config.given.yaml"
"""The copy of a user's own RUN/config.yaml, which the run's config replaces."""
METRICS = "metrics.jsonl"
WANDB = ("wandb_run_id", "wandb_run_place", "wandb_task.json")
HISTORY = (METRICS, "samples.jsonl", "predictions.jsonl", "events.jsonl", "results.json", "base.json", *WANDB)
"""Files that record the course of the run, besides its config."""
FOLDERS = ("tokenizer", "frozen", "frozen.partial")
WRITTEN = (CONFIG, GIVEN_CONFIG, ENVIRONMENT, "deepspeed.json", "reference.safetensors", *HISTORY, *FOLDERS)
"""Names that a run overwrites. It adds files to other folders (logs, wandb, profile, evaluations);
`checkpoints` may exist before the run, on another disk."""
MARK = "README.bigtx"
"""A file in `checkpoints` since the run's start. If it is gone, checkpoints that were there are gone too."""


def check_run_dir(config: RunConfig, files: Iterable[Path] = ()) -> None:
    """Refuse a `run_dir` in which a run would overwrite something.

    Args:
        files: the config files that the command names, and those they build on.

    Raises:
        ConfigError: the folder is an input of the run, is not a run, or holds files that no run wrote.
        CheckpointError: the folder is a run whose checkpoints are gone, or whose config is missing or damaged.
        LaunchError: the folder or its checkpoints cannot be written.
    """
    run_dir = Path(config.run_dir)
    _check_place(run_dir)
    if not run_dir.is_dir():
        return  # The folder is created later.
    for key, name in _inputs(config):
        if run_dir.resolve() in (Path(name).resolve(), run_dir_of(name).resolve()):
            raise ConfigError(
                f"run_dir={run_dir} is also named by {key}; a run needs a folder of its own: name another folder"
            )
    if not is_run(run_dir):
        _refuse_other_files(run_dir, is_given=gives_config(run_dir, files))
    saved_values(run_dir)
    _check_checkpoints(run_dir, config)


def _check_place(run_dir: Path) -> None:
    """Refuse a folder that cannot be created or written."""
    place = run_dir
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place):
        raise LaunchError(f"run_dir={run_dir} cannot be written: {place} is not a folder; name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise LaunchError(f"run_dir={run_dir} cannot be written: {place} is read-only for you; name another folder")


def saved_values(run_dir: Path) -> dict[str, Any] | None:
    """Return the config of the run so far as plain values; None where no step was saved, so that any config may follow.

    Raises:
        CheckpointError: the config is missing or damaged.
    """
    if not has_steps(run_dir):
        return None
    if not (run_dir / CONFIG).is_file():
        raise CheckpointError(
            f"{run_dir} holds checkpoints but no {CONFIG}: restore that file from a copy, or name another run_dir"
        )
    return read_values(run_dir)


def are_checkpoints_gone(run_dir: Path) -> bool:
    """Return whether a run has made steps, may have saved them, and has no checkpoint now."""
    metrics = run_dir / METRICS
    has_history = metrics.is_file() and metrics.stat().st_size > 0
    return has_history and not has_steps(run_dir) and not (run_dir / CHECKPOINTS / MARK).is_file()


def _inputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Return each path that the run reads, with the setting that names it."""
    fork = None if config.fork_from is None else str(checkpoint_named(config.fork_from))
    named: list[tuple[str, str | None]] = [("distill.teacher", config.distill.teacher), ("fork_from", fork)]
    if isinstance(config, FinetuneConfig):
        named += [("base", config.base), ("tokenizer", config.tokenizer)]
        for split in ("train", "validation", "test"):
            named += [(f"data.{split}", name) for name in getattr(config.data, split)]
    if isinstance(config, PretrainConfig):
        named += [("init_from", config.init_from), ("data.foreign.tokenizer", config.data.foreign.tokenizer)]
        for place, sources in (("data", config.data.sources), ("validation", config.validation.sources)):
            named += [(f"{place}.sources.{name}.path", source.path) for name, source in sources.items()]
    return ((key, name) for key, name in named if name)


def _refuse_other_files(run_dir: Path, *, is_given: bool) -> None:
    if kind := _other_kind(run_dir):
        raise ConfigError(f"run_dir={run_dir} is {kind}; a run would overwrite its files: name another folder")
    own, kept = run_dir / CONFIG, run_dir / GIVEN_CONFIG
    there = [name for name in WRITTEN if (run_dir / name).exists() or (run_dir / name).is_symlink()]
    if is_given:
        there.remove(CONFIG)
        if kept.is_file() and kept.read_bytes() == own.read_bytes():
            there.remove(GIVEN_CONFIG)
    if there:
        hint = f" (to use it as the config, name it in the command: {own})" if there == [CONFIG] else ""
        raise ConfigError(
            f"run_dir={run_dir} holds {', '.join(there)}, which no run wrote and a run would overwrite{hint}; "
            f"move {'it' if len(there) == 1 else 'them'} elsewhere, or name another folder"
        )


def _other_kind(folder: Path) -> str | None:
    """Return what a folder is, if bigtx or another library wrote it and it is not a run."""
    kind = kind_of_own(str(folder), os.listdir(folder))
    if kind not in (None, RUN):
        return kind
    if {"format", "sha256"} <= read_object(folder / "manifest.json").keys():
        return "a checkpoint"
    if "model_type" in read_object(folder / "config.json"):
        return "a model in Hugging Face's format"
    if "peft_type" in read_object(folder / "adapter_config.json"):
        return "a folder of adapters in PEFT's format"
    return None


def _check_checkpoints(run_dir: Path, config: RunConfig) -> None:
    folder = run_dir / CHECKPOINTS
    if folder.is_symlink() and not folder.exists():
        raise CheckpointError(
            f"{folder} is a link to {os.readlink(folder)}, which is missing; mount that disk, or point the link to "
            "the checkpoints"
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, but checkpoints need one; move it elsewhere")
    if are_checkpoints_gone(run_dir) and CHECKPOINTS not in config.allow_changes:
        raise CheckpointError(
            f"{run_dir} has made steps ({METRICS}), but {folder} holds no checkpoint of them; restore that folder, "
            "or mount its disk. To start again at step 0 on purpose, add "
            f"{setting('allow_changes', [CHECKPOINTS])}: the files of the run so far are then kept in "
            f"{run_dir / 'history-N'}"
        )
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(f"{folder} cannot be written; make it writable, or name another run_dir")


NOT_COMPARED = ("run_dir", "allow_changes")
"""Settings that have no effect on the training."""
COMPLETED = (
    "model.vocab_size",
    "model.num_classes",
    "model.class_head",
    "classify.classes",
    "classify.pooling",
    "chat.format",
)
"""Settings that a run completes from its data or its teacher, so that its config has more settings than the command."""
BASE_FACTS = ("checkpoint", "manifest_sha256", "step", "wandb_run_id")
"""Keys that identify the run whose weights another run started from."""
README = """The checkpoints of a run of bigtx. The run folder is the parent of this folder, or of a link to it.

bigtx writes this file when the run starts. A run that has made steps and finds neither this file nor a checkpoint
does not start again at step 0, since its checkpoints must have been moved or deleted.
"""


@dataclass(frozen=True)
class Opened:
    """The state of the folder when it was opened.

    Attributes:
        lock: the lock of the folder, held until the run ends.
        changed: settings that differ from the run so far, each allowed by name.
        aside: the folder of the earlier history, where a run without its checkpoints starts again.
    """

    lock: FolderLock
    changed: list[dict[str, Any]]
    aside: Path | None


def open_run_folder(config: RunConfig, *, files: Iterable[Path], environment: dict[str, Any]) -> Opened:
    """Create or reopen the folder, and compare settings if the run has made steps. Only rank 0 calls this, after
    `check_run_dir`.

    Args:
        files: the config files of the command.
        environment: versions, commit, hardware.

    Raises:
        LaunchError: the folder cannot be written, or another run holds it.
        ConfigError: the config differs from the run's in a way that resume does not allow.
        CheckpointError: the folder holds something else, or its config is missing.
    """
    run_dir = Path(config.run_dir)
    with writes(f"run_dir={config.run_dir!r}", "; name another folder"), ExitStack() as stack:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run_dir)
        stack.callback(lock.release)
        changed = _changed_settings(run_dir, config)
        if not is_run(run_dir):
            if gives_config(run_dir, files):
                write_atomic(run_dir / GIVEN_CONFIG, (run_dir / CONFIG).read_bytes())
            # After this line the folder counts as a run, even if this start fails.
            write_json(run_dir / ENVIRONMENT, scrub(environment))
        begins_again = CHECKPOINTS in config.allow_changes and are_checkpoints_gone(run_dir)
        opened = Opened(lock, changed, _set_history_aside(run_dir) if begins_again else None)
        stack.pop_all()  # The lock is held until the run ends.
        return opened


def _set_history_aside(run_dir: Path) -> Path:
    """Move the files of a run that lost its checkpoints into a new folder inside the run folder."""
    number = 1
    while (aside := run_dir / f"history-{number}").exists():
        number += 1
    aside.mkdir()
    if (run_dir / CONFIG).is_file():
        shutil.copy2(run_dir / CONFIG, aside / CONFIG)
    # The metrics are moved last: while they are in place, the next start does this again.
    for name in sorted(HISTORY, key=METRICS.__eq__):
        if (run_dir / name).is_file():
            (run_dir / name).rename(aside / name)
    return aside


def check_folder(config: RunConfig, files: Iterable[Path]) -> None:
    """Refuse a run folder that another run holds, or in which the run would overwrite something.

    It is called before anything is written there, and before the ranks could fail at a port that the other run uses.

    Raises:
        LaunchError, ConfigError, CheckpointError: see `refuse_if_held` and `check_run_dir`.
    """
    refuse_if_held(config.run_dir)
    if processes.rank() == 0:
        check_run_dir(config, files)


def check_teacher(config: RunConfig) -> None:
    """Refuse a teacher that is not a run or has no checkpoint, before torch is imported to read it.

    Raises:
        BigtxError: see `find_with_tokenizer`.
    """
    if config.distill.teacher:
        from bigtx.engine.trained import find_with_tokenizer

        find_with_tokenizer(config.distill.teacher)


def check_settings(config: RunConfig) -> None:
    """Refuse changes of settings that resume does not allow, before the data are read.

    Settings that follow from the data are compared when the folder is opened.

    Raises:
        ConfigError: as `open_run_folder`.
        CheckpointError: the run's config is missing or damaged.
    """
    _changed_settings(Path(config.run_dir), config, but=COMPLETED)


def _changed_settings(run_dir: Path, config: RunConfig, but: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the settings that differ from the run so far, all of them allowed; where no step was saved, from the run
    that this one forks, or none.

    Args:
        but: settings that are not compared.
    """
    saved, place = saved_values(run_dir), run_dir
    if saved is None and config.fork_from is not None:
        place = run_dir_of(checkpoint_named(config.fork_from))
        saved = _values_of_origin(place, config)
    if saved is None:
        return []
    if place == run_dir:
        _refuse_other_kind(saved, config)
    from bigtx.config import changes

    try:
        found = [change for change in changes.compare(saved, config) if change.key not in but]
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place / CONFIG} is damaged; restore it from a copy") from error
    if place == run_dir:
        changes.refuse(found, config)
    else:
        changes.refuse_other_origin(found, config)
    return [
        {"key": change.key, "old": change.old, "new": change.new} for change in found if change.key not in NOT_COMPARED
    ]


def _refuse_other_kind(saved: dict[str, Any], config: RunConfig) -> None:
    """Refuse the folder of a run of another kind or task; nearly all settings differ, so a list of them hides that."""
    before, now = saved.get("task"), getattr(config, "task", None)
    if before != now:
        kind = f"a fine-tuning with task={before}" if before else "a pretraining"
        raise ConfigError(f"run_dir={config.run_dir} holds another run, {kind}; name another folder")


def _values_of_origin(place: Path, config: RunConfig) -> dict[str, Any]:
    values = read_values(place)
    if ("task" in values) != isinstance(config, FinetuneConfig):
        kind = "fine-tuning" if "task" in values else "pretraining"
        raise ConfigError(
            f"fork_from={config.fork_from}: that run is a {kind}, and a fork is of the same kind; to start from its "
            f"weights alone, write {config.begins_with}={place} instead"
        )
    return values


def describe_run(
    config: RunConfig, *, tokenizer: Tokenizer, deepspeed: dict[str, Any], environment: dict[str, Any]
) -> None:
    """Write the files that describe the run, once the engine is built. Only rank 0 calls this.

    Raises:
        LaunchError: the folder cannot be written.
    """
    run_dir = Path(config.run_dir)
    with writes(f"run_dir={config.run_dir!r}"):
        (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
        write_atomic(run_dir / CHECKPOINTS / MARK, README)
        write_atomic(run_dir / CONFIG, yaml_of(with_absolute_paths(type(config), to_dict(config))))
        write_json(run_dir / "deepspeed.json", deepspeed)
        write_json(run_dir / ENVIRONMENT, scrub(environment))
        tokenizer.save(run_dir / "tokenizer")


def dump(config: RunConfig) -> dict[str, Any]:
    """Return the resolved config as JSON-ready data."""
    resolved: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
    return resolved
