"""The folder in which a corpus is prepared: `<output>.partial`, shared by all jobs that tokenize a part of it.

corpus.partial/
  part-2-of-3/     lock; at the end the part's recipe.json and config.yaml. An undivided job is part 1 of 1
  part-0-of-3/     the lock of the job that merges
  tokenizer/       a copy
  work/            units, chunks and finished shards' entries: see encode.py and assemble.py
  corpus/          the folder that becomes the output
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bigtx.config.load import load
from bigtx.config.schema import PrepareConfig
from bigtx.data.prepare.recipe import RECIPE_NAME, differences
from bigtx.utils.errors import DataError, LaunchError
from bigtx.utils.files import read_object
from bigtx.utils.locks import FolderLock

CONFIG_NAME = "config.yaml"


@contextmanager
def working(output: Path) -> Iterator[None]:
    """Turn errors of the system (a full disk, a read-only folder) into messages; finished work is kept."""
    partial = partial_folder(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        # numpy's error for an incomplete write has only the missing amount.
        reason = error.strerror or f"a file could not be written in full, as happens when a disk is full ({error})"
        raise DataError(
            f"Preparing {output} failed: {reason}{where}. Fix that and run the command again: it "
            f"continues from the files in {partial}. To start over, remove that folder."
        ) from error


@contextmanager
def part_folder(output: Path, part: tuple[int, int]) -> Iterator[Path]:
    """Lock and yield the folder of a part (part 0 merges), so that a second job cannot work on the same part.

    Raises:
        DataError: another job holds it, or the preparation was started in another number of parts.
    """
    found = list(partial_folder(output).iterdir())
    others = [path for path in found if fnmatch(path.name, "part-*-of-*")]
    if found and not others:
        raise DataError(
            f"{partial_folder(output)} is where {output} is prepared, but has other content; move that away, or name "
            "another output."
        )
    for other in others:
        if not other.name.endswith(f"-of-{part[1]}"):
            count = other.name.rpartition("-")[2]
            raise DataError(
                f"{partial_folder(output)} was started in {count} part{'s' * (count != '1')}, and this command would "
                f"use {part[1]}. Continue with the number of the start, or remove that folder and start over."
            )
    folder = _folder(output, part)
    folder.mkdir(exist_ok=True)
    try:
        lock = FolderLock(folder)
    except LaunchError as error:
        raise DataError(f"Another `bigtx data` command is writing {output}: {error}") from error
    try:
        yield folder
    finally:
        lock.release()
        if (output / RECIPE_NAME).exists():  # The corpus is complete, and no job works on it any more.
            shutil.rmtree(partial_folder(output), ignore_errors=True)


def partial_folder(output: Path) -> Path:
    """Return the folder in which a corpus is prepared."""
    return output.with_name(f"{output.name}.partial")


def _folder(output: Path, part: tuple[int, int]) -> Path:
    return partial_folder(output) / f"part-{part[0]}-of-{part[1]}"


def is_done(output: Path, part: tuple[int, int]) -> bool:
    """Return whether a part has tokenized all its units."""
    return (_folder(output, part) / RECIPE_NAME).exists()


def count_parts(output: Path) -> int:
    """Return in how many parts the preparation of a corpus was started.

    Raises:
        DataError: there are no parts to merge.
    """
    counts = {path.name.rpartition("-")[2] for path in partial_folder(output).glob("part-*-of-*")}
    if len(counts) != 1 or counts == {"1"}:
        raise DataError(
            f"{partial_folder(output)} has no parts to merge; `bigtx data prepare ... output={output} part=1/N` "
            "makes one."
        )
    return int(counts.pop())


def common_recipe(output: Path, num_parts: int) -> tuple[dict[str, Any], PrepareConfig]:
    """Return the recipe (with `num_units`) and the configuration of all parts.

    Raises:
        DataError: a part is not done, or was made with other settings than the first.
    """
    folders = [_folder(output, (number, num_parts)) for number in range(1, num_parts + 1)]
    missing = [number for number in range(1, num_parts + 1) if not is_done(output, (number, num_parts))]
    if missing:
        named = ", ".join(f"part={number}/{num_parts}" for number in missing)
        raise DataError(f"Not all parts of {output} are done: run `bigtx data prepare` with {named} first.")
    recipes = [read_object(folder / RECIPE_NAME) for folder in folders]
    for number, recipe in enumerate(recipes, start=1):
        if not isinstance(recipe.get("num_units"), int):
            raise DataError(f"Part {number} of {output} is damaged. Run part={number}/{num_parts} again.")
    for number, recipe in enumerate(recipes[1:], start=2):
        changes = differences(recipes[0], recipe)
        if changes:
            raise DataError(
                f"Part {number} of {output} was made with other settings than part 1: {'; '.join(changes)}. "
                f"Run part={number}/{num_parts} again with the settings and the input of part 1."
            )
    return recipes[0], load(PrepareConfig, [str(folders[0] / CONFIG_NAME)], check=False)
