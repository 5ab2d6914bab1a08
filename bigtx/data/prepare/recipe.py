"""The recipe of a prepared corpus, everything that its bytes depend on; and the folder in which it is prepared.

`<output>.partial` is shared by all jobs that tokenize a part of the corpus:

    part-2-of-3/     lock; at the end the part's recipe.json and config.yaml. An undivided job is part 1 of 1
    part-0-of-3/     the lock of the job that merges
    tokenizer/       a copy
    work/            units, chunks and finished shards' entries: see encode.py and assemble.py
    corpus/          the folder that becomes the output
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bigtx.config.load import load
from bigtx.config.schema import PrepareConfig
from bigtx.data.corpus.manifest import FORMAT_VERSION
from bigtx.data.storage.access import InputFile
from bigtx.data.storage.remote import shown
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError, LaunchError
from bigtx.utils.files import json_value, read_object
from bigtx.utils.locks import FolderLock

RECIPE_NAME = "recipe.json"

_WITHOUT_EFFECT = ("output", "num_processes", "memory", "tokenizer")
"""Settings that the bytes do not depend on (the tokenizer is included by its fingerprint)."""
_OF_THE_WHOLE = ("validation_fraction", "block_tokens", "shard_size")
"""Settings that no document's tokens depend on."""


def make_recipe(
    config: PrepareConfig, tokenizer: Tokenizer, files: list[InputFile], contamination: str | None
) -> dict[str, Any]:
    """Return the entries for each manifest: the settings, the tokenizer and the extent of the input.

    Args:
        contamination: digest of the evaluation sets' n-grams, if there are any.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _WITHOUT_EFFECT}
    # The limit of rejects decides whether there is a corpus, not its content.
    del settings["input"]["max_rejects"]
    settings["input"]["paths"] = [shown(path) for path in config.input.paths]
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "num_files": len(files),
        "input_bytes": sum(file.size for file in files),
        "contamination": contamination,
        **settings,
    }


def unit_settings_digest(recipe: dict[str, Any]) -> str:
    """Return a digest of what a document's tokens depend on, besides the document and its place."""
    without = (*_OF_THE_WHOLE, "num_files", "input_bytes", "inputs")
    settings = {name: value for name, value in recipe.items() if name not in without}
    settings["input"] = {name: value for name, value in settings["input"].items() if name not in ("paths", "exclude")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def describe_inputs(files: list[InputFile]) -> str:
    """Return a digest of the input files' paths, sizes and versions: a different digest means a different input."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{json.dumps(file.identity)}\n".encode())
    return digest.hexdigest()


def check_existing(output: Path, recipe: dict[str, Any]) -> None:
    """Accept a folder that has exactly the corpus of the recipe (with its `inputs`).

    Raises:
        DataError: it has other content, or a corpus of other settings or another input.
    """
    advice = "Choose another `output`, or remove the folder if it is not needed."
    try:
        found = json_value((output / RECIPE_NAME).read_bytes())
        found["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{output} exists and is not a corpus of `bigtx data prepare`. {advice}") from None
    changes = differences(found, recipe)
    if changes:
        raise DataError(f"{output} is a corpus already, made with other settings: {'; '.join(changes)}. {advice}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differences between two recipes, in words."""
    changes = [
        f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for name in dict.fromkeys([*new, *old])
        if name != "inputs" and old.get(name) != new.get(name)
    ]
    if not changes and old.get("inputs") != new.get("inputs"):
        changes = ["the input files were changed, moved or touched since then"]
    return changes


CONFIG_NAME = "config.yaml"


@contextmanager
def part_folder(output: Path, part: tuple[int, int]) -> Iterator[Path]:
    """Lock and yield the folder of a part (part 0 merges), so that a second job cannot work on the same part.

    Errors of the system (a full disk, a read-only folder) become messages; finished work is kept.

    Raises:
        DataError: another job holds it, or the preparation was started in another number of parts.
    """
    partial = partial_folder(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(output, part)
        try:
            yield _folder(output, part)
        finally:
            lock.release()
            if (output / RECIPE_NAME).exists():  # The corpus is complete, and no job works on it any more.
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        # numpy's error for an incomplete write has only the missing amount.
        reason = error.strerror or f"a file could not be written in full, as happens when a disk is full ({error})"
        raise DataError(
            f"Preparing {output} failed: {reason}{where}. Fix that and run the command again: it "
            f"continues from the files in {partial}. To start over, remove that folder."
        ) from error


def _lock(output: Path, part: tuple[int, int]) -> FolderLock:
    partial = partial_folder(output)
    found = list(partial.iterdir())
    others = [path for path in found if fnmatch(path.name, "part-*-of-*")]
    if found and not others:
        raise DataError(
            f"{partial} is where {output} is prepared, but has other content; move that away, or name another output."
        )
    for other in others:
        if not other.name.endswith(f"-of-{part[1]}"):
            count = other.name.rpartition("-")[2]
            raise DataError(
                f"{partial} was started in {count} part{'s' * (count != '1')}, and this command would use {part[1]}. "
                "Continue with the number of the start, or remove that folder and start over."
            )
    _folder(output, part).mkdir(exist_ok=True)
    try:
        return FolderLock(_folder(output, part))
    except LaunchError as error:
        raise DataError(f"Another `bigtx data` command is writing {output}: {error}") from error


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
