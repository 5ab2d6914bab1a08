"""The recipe of a prepared corpus: everything that its bytes depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from bigtx.config.schema import PrepareConfig
from bigtx.data.corpus.manifest import FORMAT_VERSION
from bigtx.data.raw.read import InputFile
from bigtx.data.storage.remote import shown
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError

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
        found = json.loads((output / RECIPE_NAME).read_bytes())
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
