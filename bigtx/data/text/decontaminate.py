"""Decontamination: documents that share an n-gram of words with an evaluation set.

    evaluation texts ──▶ n-grams as 64-bit hashes, sorted, one file for each n ──▶ mapped into memory by each process

An n-gram is `ngram` words, as in GPT-3 (arXiv:2005.14165, appendix C: 13 words, in lower case, without punctuation). An
evaluation text of fewer words is one n-gram of its own length, if it has at least `min_words` (GPT-3: 8): shorter runs
of words occur in many documents by chance, and would remove much of the corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bigtx.config.schema import DecontaminateConfig, InputConfig
from bigtx.data.raw.documents import Rejects, in_batches
from bigtx.data.raw.files import list_files
from bigtx.data.raw.read import Fields, documents_of
from bigtx.data.text.ngrams import hash_ngrams, hash_words, hash_words_in_parts, words_at
from bigtx.utils.errors import DataError
from bigtx.utils.files import write_atomic, write_json

INDEX_NAME = "contamination"
_VERSION = 1
"""The version of the words and hashes: a new version changes the digest."""
_MERGE_HASHES = 1 << 23
_BLOCK = 1 << 16
"""The number of n-grams that are looked up at once."""
_SCREEN_BITS = (10, 24)
"""Smallest and largest logarithm of the screen's size."""


def build_contamination_index(config: DecontaminateConfig, folder: Path) -> Path:
    """Read the evaluation sets and write their n-grams.

    Memory grows with the n-grams of the evaluation sets, at about 40 bytes each.

    Args:
        config: a config with `paths`.
        folder: an existing folder; a folder `contamination` is made in it.

    Returns:
        The new folder, for `Contamination` and `contamination_digest`.

    Raises:
        DataError: a set cannot be read in full, or no text in them is long enough.
    """
    hashes: dict[int, list[np.ndarray]] = {}
    num_texts = num_short = longest = 0
    needed = min(config.min_words, config.ngram)
    for texts in _batches(config):
        words, counts = hash_words(texts)
        bounds = [0, *np.cumsum(counts).tolist()]
        for begin, end in pairwise(bounds):
            n = min(config.ngram, end - begin)
            num_texts += 1
            if n < needed:
                num_short += 1
                longest = max(longest, n)
                continue
            hashes.setdefault(n, []).append(hash_ngrams(words[begin:end], n))
        for parts in hashes.values():
            if sum(map(len, parts)) > _MERGE_HASHES and len(parts) > 1:
                parts[:] = [np.unique(np.concatenate(parts))]
    if not hashes:
        lower = f", or write decontaminate.min_words={longest}" if longest > 1 else ""
        raise DataError(
            f"None of the {num_texts:,} texts in decontaminate.paths has {needed} words, so no n-gram can be compared; "
            f"name evaluation sets with longer texts{lower}."
        )
    index = folder / INDEX_NAME
    index.mkdir(exist_ok=True)
    digest = hashlib.sha256(f"{_VERSION}".encode())
    for n in sorted(hashes):
        content = np.unique(np.concatenate(hashes[n])).astype("<u8").tobytes()
        digest.update(f" {n} {len(content)} ".encode())
        digest.update(content)
        write_atomic(index / f"{n}.u8", content)
    described = {"ngrams": sorted(hashes), "digest": digest.hexdigest(), "texts": num_texts, "too_short": num_short}
    write_json(index / "index.json", described)
    return index


def contamination_digest(index: Path) -> str:
    """Return a digest of an index: equal for equal n-grams, in any files and any order."""
    return str(_describe(index)["digest"])


@dataclass(frozen=True)
class _Set:
    """The n-grams of one length."""

    n: int
    hashes: np.ndarray
    screen: np.ndarray
    """bool [a power of two]: whether any hash begins with these bits. This excludes most n-grams that are in no set."""

    def find(self, words: np.ndarray) -> int | None:
        """Return the place of the first n-gram that is in the set."""
        for begin in range(0, len(words) - self.n + 1, _BLOCK):
            ngrams = hash_ngrams(words[begin : begin + _BLOCK + self.n - 1], self.n)
            places = np.flatnonzero(self.screen[_first_bits(ngrams, len(self.screen))])
            found = np.searchsorted(self.hashes, ngrams[places])
            equal = self.hashes[np.minimum(found, len(self.hashes) - 1)] == ngrams[places]
            if equal.any():
                return begin + int(places[np.argmax(equal)])
        return None


class Contamination:
    """The search for the n-grams of an index in texts.

    Args:
        index: the folder that `build_contamination_index` wrote; its files are mapped, so processes share the memory.
    """

    def __init__(self, index: Path) -> None:
        self._sets = []
        for n in _describe(index)["ngrams"]:
            hashes = np.memmap(index / f"{n}.u8", "<u8", "r")
            bits = min(max(len(hashes).bit_length() + 3, _SCREEN_BITS[0]), _SCREEN_BITS[1])
            screen = np.zeros(1 << bits, bool)
            screen[_first_bits(hashes, len(screen))] = True
            self._sets.append(_Set(n, hashes, screen))

    def find(self, text: str) -> str:
        """Return the first n-gram of the text that is in an evaluation set, as words, or no words if no n-gram is."""
        found: dict[int, int] = {}
        for first, words in hash_words_in_parts(text, max(ngrams.n for ngrams in self._sets) - 1):
            for ngrams in self._sets:
                if ngrams.n not in found and (place := ngrams.find(words)) is not None:
                    found[ngrams.n] = first + place
            if self._sets[0].n in found:
                break
        return " ".join(words_at(text, found[min(found)], min(found))) if found else ""


def _first_bits(hashes: np.ndarray, size: int) -> np.ndarray:
    """Return the indices into a table of a power of two."""
    return (hashes >> np.uint64(65 - size.bit_length())).astype(np.int64)


def _batches(config: DecontaminateConfig) -> Iterator[list[str]]:
    """Yield the evaluation texts, some at a time."""
    rejects = Rejects(max_share=1.0)
    settings = InputConfig(paths=config.paths, text_field=config.text_field, document_per_line=config.document_per_line)
    fields = Fields(settings, "decontaminate", ("text_field", "document_per_line"))
    documents = documents_of(list_files(settings, section="decontaminate"), fields, rejects)
    yield from in_batches((document.text for document in documents), len)
    if rejects:
        raise DataError(
            f"Not all texts of decontaminate.paths can be read ({rejects.describe()}), so their n-grams could not be "
            f"removed from the corpus. Repair them, or name others. The first:"
            f"{rejects.first()}"
        )


def _describe(index: Path) -> dict[str, Any]:
    return dict(json.loads((index / "index.json").read_bytes()))
