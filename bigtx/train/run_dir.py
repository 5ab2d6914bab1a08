"""Which folder may be a run's. Looked at before anything is written there, and imports nothing heavy.

A new run takes an empty folder, or one whose files are none that it would write over: notes and logs of a scheduler are
left alone. A run in the folder is resumed, unless its checkpoints are gone: then it begins again only on request.
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
"""A user's own RUN/config.yaml, kept where the run's takes its name."""
METRICS = "metrics.jsonl"
WANDB = ("wandb_run_id", "wandb_run_place")
HISTORY = (METRICS, "samples.jsonl", "predictions.jsonl", "events.jsonl", "results.json", "base.json", *WANDB)
"""What says how the run went, besides its config."""
FOLDERS = ("tokenizer", "frozen", "frozen.partial")
WRITTEN = (CONFIG, GIVEN_CONFIG, ENVIRONMENT, "deepspeed.json", "reference.safetensors", *HISTORY, *FOLDERS)
"""What a run overwrites. To other folders (logs, wandb, profile, evaluations) it adds files;
`checkpoints` may be made before the run, on another disk."""
MARK = "README.bigtx"
"""In `checkpoints`, from the run's beginning on: where it is gone, so are the checkpoints that may have been there."""


def check_run_dir(config: RunConfig, files: Iterable[Path] = ()) -> None:
    """Refuse a `run_dir` in which a run would destroy something.

    Args:
        files: the config files that the command names, and those they build on.

    Raises:
        ConfigError: it is an input of the run, something else than a run, or holds files that are not a run's.
        CheckpointError: it is a run whose checkpoints are gone, or whose config is missing or damaged.
        LaunchError: it or its checkpoints cannot be written.
    """
    run_dir = Path(config.run_dir)
    _check_place(run_dir)
    if not run_dir.is_dir():
        return  # It is made later.
    for key, name in _inputs(config):
        if run_dir.resolve() in (Path(name).resolve(), run_dir_of(name).resolve()):
            raise ConfigError(f"run_dir={run_dir} is what {key} names; a run needs a folder of its own: name another")
    if not is_run(run_dir):
        _refuse_other_files(run_dir, is_given=gives_config(run_dir, files))
    saved_values(run_dir)
    _check_checkpoints(run_dir, config)


def _check_place(run_dir: Path) -> None:
    """Refuse a folder that cannot be made, or cannot be written into."""
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
        CheckpointError: it is missing or damaged.
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
    """Places that the run reads, by the key that names them."""
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
        raise ConfigError(f"run_dir={run_dir} is {kind}; a run would write over its files: name another folder")
    own, kept = run_dir / CONFIG, run_dir / GIVEN_CONFIG
    there = [name for name in WRITTEN if (run_dir / name).exists() or (run_dir / name).is_symlink()]
    if is_given:
        there.remove(CONFIG)
        if kept.is_file() and kept.read_bytes() == own.read_bytes():
            there.remove(GIVEN_CONFIG)
    if there:
        hint = f" (to train by it, name it in the command: {own})" if there == [CONFIG] else ""
        raise ConfigError(
            f"run_dir={run_dir} holds {', '.join(there)}, which no run wrote and a run would write over{hint}; "
            f"move {'it' if len(there) == 1 else 'them'} away, or name another folder"
        )


def _other_kind(folder: Path) -> str | None:
    """Return what a folder is, if it is something of bigtx or of another library, but not a run."""
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
            f"{folder} is a link to {os.readlink(folder)}, which is not there; mount that disk, or make the link "
            "lead to the checkpoints"
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, and checkpoints are written into one; move it away")
    if are_checkpoints_gone(run_dir) and CHECKPOINTS not in config.allow_changes:
        raise CheckpointError(
            f"{run_dir} has made steps ({METRICS}), but {folder} holds no checkpoint of them; give that folder back, "
            "or mount its disk. To begin again at step 0 on purpose, add "
            f"{setting('allow_changes', [CHECKPOINTS])}: what the run has written until now is then kept in a folder "
            "beside"
        )
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(f"{folder} cannot be written; make it writable, or name another run_dir")
