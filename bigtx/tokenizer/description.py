"""The file that describes a tokenizer's folder: its kind, its special ids and its fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigtx.tokenizer.huggingface_model import HuggingFaceModel
from bigtx.tokenizer.sentencepiece_model import SentencePieceModel
from bigtx.tokenizer.special import SpecialIds, Template
from bigtx.utils.errors import DataError
from bigtx.utils.files import open_file
from bigtx.utils.paths import kind_of_folder

DESCRIPTION = "bigtx_tokenizer.json"
"""The file that makes a folder a tokenizer of bigtx; it is written last."""

FORMAT = 2
PLAIN_FORMAT = 1
"""The format of tokenizers without a template and with one end id; earlier releases read it."""


def read_bytes(path: Path) -> bytes:
    """Return the content of a tokenizer's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _what_instead(folder: Path) -> str:
    """Return the kind of a folder without a tokenizer, and what to do."""
    inside = folder / "tokenizer"
    kind = kind_of_folder(folder)
    if kind and (inside / DESCRIPTION).exists():
        return f"it is {kind}, whose tokenizer is {inside}; name that."
    return (
        f"it has no {DESCRIPTION}. Train one with `bigtx tokenizer train`, or import a sentencepiece or Hugging "
        "Face tokenizer with `bigtx tokenizer import PATH output=FOLDER`."
    )


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description of the tokenizer in a folder.

    Raises:
        DataError: there is none, it is damaged, or a newer bigtx wrote it.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise DataError(f"No tokenizer in {folder}: {_what_instead(folder)}")
    try:
        description = json.loads(read_bytes(path))
        kinds = (SentencePieceModel.kind, HuggingFaceModel.kind)
        known = description["format"] in (PLAIN_FORMAT, FORMAT) and description["kind"] in kinds
        SpecialIds(**description["special"])
        if description.get("template"):
            Template.from_dict(description["template"])
        str(description["fingerprint"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{path} is damaged; copy the tokenizer again from its source.") from None
    if not known:
        raise DataError(
            f"{path} has format {description['format']!r} and kind {description['kind']!r}, which this bigtx "
            f"does not know; update bigtx."
        )
    return dict(description)
