"""A prepared corpus as a whole, local or remote: its splits and its tokenizer."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from bigtx.data.corpus.manifest import SPLITS, Manifest, has_split
from bigtx.data.storage.places import Place, RemotePath
from bigtx.tokenizer.description import DESCRIPTION
from bigtx.tokenizer.huggingface_model import HuggingFaceModel
from bigtx.tokenizer.sentencepiece_model import SentencePieceModel
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError
from bigtx.utils.paths import kind_of_folder

TOKENIZER = "tokenizer"


def open_splits(place: Place, *, check_shards: bool = True) -> list[Manifest]:
    """Return the splits that a corpus has.

    Raises:
        DataError: it has none, or one that is not complete.
    """
    names = [name for name in SPLITS if has_split(place, name)]
    if not names:
        exists = isinstance(place, RemotePath) or place.is_dir()
        kind = None if isinstance(place, RemotePath) else kind_of_folder(place)
        lacks = f"has no split {' or '.join(SPLITS)}" if exists else "does not exist"
        what = f"is {kind}" if kind else lacks
        raise DataError(f"{place} is not a prepared corpus: it {what}. Name a folder written by `bigtx data prepare`.")
    return [Manifest.load(place / name, check_shards=check_shards) for name in names]


def load_tokenizer(place: Place, fingerprint: str) -> Tokenizer:
    """Return the tokenizer of a corpus; a remote one is fetched once and kept on this machine.

    Args:
        fingerprint: the tokenizer's fingerprint in the corpus's manifests.

    Raises:
        DataError: it is missing or damaged, or is not the one that the corpus was tokenized with.
    """
    if isinstance(place, RemotePath):
        return _fetch_tokenizer(place / TOKENIZER, fingerprint)
    if not (place / TOKENIZER).is_dir():
        raise DataError(
            f"{place / TOKENIZER} is missing: the tokenizer that the corpus was prepared with (fingerprint "
            f"{fingerprint[:12]}); copy it there again from where it came."
        )
    tokenizer = Tokenizer.load(place / TOKENIZER)
    _check(tokenizer, place / TOKENIZER, fingerprint)
    return tokenizer


def _check(tokenizer: Tokenizer, place: Place, fingerprint: str) -> None:
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"{place} is not the tokenizer that its corpus was prepared with (fingerprint "
            f"{tokenizer.fingerprint[:12]}, expected {fingerprint[:12]}); copy it again from where it came."
        )


def _fetch_tokenizer(place: RemotePath, fingerprint: str) -> Tokenizer:
    if not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise DataError(f"{place}: the manifest's tokenizer_fingerprint {fingerprint!r} is damaged.")
    kept = place.cache.folder / "tokenizers" / fingerprint
    # Missing, or damaged: it is fetched again.
    with contextlib.suppress(DataError):
        tokenizer = Tokenizer.load(kept)
        _check(tokenizer, kept, fingerprint)
        return tokenizer
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            tokenizer = _download(place, Path(folder) / TOKENIZER)
            _check(tokenizer, place, fingerprint)
            shutil.rmtree(kept, ignore_errors=True)
            # Another process may have fetched it meanwhile.
            with contextlib.suppress(FileExistsError, OSError):
                (Path(folder) / TOKENIZER).rename(kept)
    except OSError as error:
        raise DataError(
            f"{kept.parent} cannot keep the tokenizer of {place} ({error.strerror}); set another data.cache_dir."
        ) from error
    return tokenizer


def _download(place: RemotePath, folder: Path) -> Tokenizer:
    """Return a remote tokenizer's two files, in a new folder."""
    folder.mkdir()
    try:
        description = (place / DESCRIPTION).read_bytes()
        try:
            kind = json.loads(description)["kind"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError(f"{place / DESCRIPTION} is damaged; copy the tokenizer again from where it came.") from None
        # The file's name follows from the kind; no path comes from the description.
        name = HuggingFaceModel.file_name if kind == HuggingFaceModel.kind else SentencePieceModel.file_name
        (folder / name).write_bytes((place / name).read_bytes())
        (folder / DESCRIPTION).write_bytes(description)
    except FileNotFoundError as error:
        raise DataError(f"The tokenizer at {place} is not complete; copy the corpus with its tokenizer.") from error
    return Tokenizer.load(folder)
