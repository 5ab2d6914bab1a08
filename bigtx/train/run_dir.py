"""Checks of `run_dir` before anything is written there. This module imports nothing heavy.

A new run may use an empty folder, or one without files that it would overwrite: notes and logs of a scheduler are
left alone. A run in the folder is resumed, unless its checkpoints are gone: then it starts again only on request.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bigtx.config.runs import CHECKPOINTS, CONFIG, ENVIRONMENT, gives_config, has_steps, is_run, read_values, run_dir_of
from bigtx.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from bigtx.data.raw.own import RUN, kind_of
from bigtx.utils.errors import CheckpointError, ConfigError, LaunchError
from bigtx.utils.files import read_object
from bigtx.utils.shell import setting

GIVEN_CONFIG = "config.given.yaml"
"""The copy of a user's own RUN/config.yaml, which the run's config replaces."""
METRICS = "metrics.jsonl"
WANDB = ("wandb_run_id", "wandb_run_place")
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
    named: list[tuple[str, str | None]] = [("distill.teacher", config.distill.teacher)]
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
    kind = kind_of(str(folder), os.listdir(folder))
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
