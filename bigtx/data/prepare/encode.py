"""Tokenizing: units of the input -> sorted chunks of token ids on disk, and for each unit a file that marks it as done.

    files ──make_units──▶ units ──encode (processes)──▶ work/000012-0000.index .tokens   chunks
                                                        work/000012.signatures           for near duplicates
                                                        work/000012.json                 written last: UnitResult

A unit that has a UnitResult with the same key is not done again: so a job that was killed continues where it
stopped, and one whose input or settings changed repeats only the affected units.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bigtx.config.schema import InputConfig, PrepareConfig
from bigtx.data.corpus.shards import token_dtype
from bigtx.data.prepare.chunks import RECORD_DTYPE, Chunk, Documents, chunk_path
from bigtx.data.raw.documents import Document, Reject, Rejects, in_batches
from bigtx.data.raw.files import split_file
from bigtx.data.raw.read import read_file
from bigtx.data.storage.access import InputFile
from bigtx.data.text.ngrams import Signer
from bigtx.data.text.rules import Dropped, Needs, TextPreparation, TextRules
from bigtx.data.workers import advance
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import utf8_length
from bigtx.utils.files import json_value
from bigtx.utils.hashing import hash64

NUM_EXAMPLES = 3
"""The number of documents that are shown for each rule that removed some."""

_EXAMPLE_CHARACTERS = 200
_UNITS_OF_AN_INPUT = 256
_UNIT_BYTES = (1 << 20, 64 << 20)
"""Smallest and largest unit of work."""


@dataclass(frozen=True)
class Unit:
    """A piece of the input for one process: files, or ranges of a file's lines, with their place in the file list."""

    number: int
    files: list[tuple[int, InputFile]]

    @property
    def size(self) -> int:
        """Return the bytes as stored."""
        return sum(file.size for _, file in self.files)

    def key(self, settings_digest: str) -> str:
        """Return a digest of everything that the unit's result depends on."""
        digest = hashlib.sha256(settings_digest.encode())
        for place, file in self.files:
            digest.update(json.dumps([place, *file.identity]).encode())
        return digest.hexdigest()


def make_units(files: list[InputFile], config: InputConfig) -> Iterator[Unit]:
    """Cut the input into units: small files together, large ones of lines into ranges."""
    smallest, largest = _UNIT_BYTES
    target = min(max(sum(file.size for file in files) // _UNITS_OF_AN_INPUT, smallest), largest)
    numbers = itertools.count()
    group: list[tuple[int, InputFile]] = []
    size = 0
    for place, file in enumerate(files):
        for part in split_file(file, config, target):
            group.append((place, part))
            size += part.size
            if size >= target:
                yield Unit(next(numbers), group)
                group, size = [], 0
    if group:
        yield Unit(next(numbers), group)


@dataclass
class Removed:
    """What one rule removed: documents, UTF-8 bytes, and the first few with the measured value of each."""

    documents: int = 0
    bytes: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Removed) -> None:
        """Add another one's documents."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.examples = (self.examples + other.examples)[:NUM_EXAMPLES]


@dataclass
class UnitResult:
    """The result of a unit.

    Attributes:
        key: see `Unit.key`.
        size: the size of the unit, in bytes as stored.
        num_documents, num_tokens: the counts of kept documents.
        chunks: (documents, tokens, checksum) of each chunk.
        signatures: checksum of the signatures, if there are any.
        groups: the (source, language) pairs to which the records' `group` points; None where not known.
        rejects: the documents that could not be read, in order.
        removed: the removed documents, by the name of the rule.
        passed_over: numbers of archive members that were not read because of their suffix, by suffix.
        needs: the memory that the documents need.
    """

    number: int
    key: str
    size: int
    num_documents: int = 0
    num_tokens: int = 0
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    signatures: int | None = None
    groups: list[tuple[str | None, str | None]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    removed: dict[str, Removed] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)

    @property
    def num_read(self) -> int:
        """Return the number of documents that could be read, kept or not."""
        return self.num_documents + sum(removed.documents for removed in self.removed.values())

    def chunk(self, work: Path, index: int) -> Chunk:
        """Return one of the unit's chunks."""
        return Chunk(chunk_path(work, self.number, index), *self.chunks[index])

    def save(self, work: Path) -> None:
        """Write the result, which marks the unit as done."""
        path = result_path(work, self.number)
        partial = path.with_name(f".{path.name}")
        # Not forced to the disk: a crash of the machine loses at most the units of its last seconds.
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)

    @staticmethod
    def load(work: Path, number: int) -> UnitResult | None:
        """Return a unit's result; None if it has none that can be read."""
        try:
            content = json_value(result_path(work, number).read_bytes())
            content["chunks"] = [tuple(chunk) for chunk in content["chunks"]]
            content["groups"] = [(source, language) for source, language in content["groups"]]
            content["rejects"] = [Reject(**reject) for reject in content["rejects"]]
            content["removed"] = {rule: Removed(**removed) for rule, removed in content["removed"].items()}
            content["needs"] = Needs(**content["needs"])
            return UnitResult(**content)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def is_usable(self, work: Path, key: str, dtype: np.dtype[Any]) -> bool:
        """Return whether the result has this key, and all its files are as they were written."""
        return (
            self.key == key
            and all(self.chunk(work, index).is_whole(dtype) for index in range(len(self.chunks)))
            and self.signatures == _checksum_file(signatures_path(work, self.number))
        )


def load_whole(work: Path, dtype: np.dtype[Any], number: int) -> UnitResult | None:
    """Return a unit's result if all its files are as they were written, else None."""
    result = UnitResult.load(work, number)
    return result if result and result.is_usable(work, result.key, dtype) else None


def result_path(work: Path, number: int) -> Path:
    """Return the path of a unit's result."""
    return work / f"{number:06d}.json"


def signatures_path(work: Path, number: int) -> Path:
    """Return the path of the signatures of a unit's documents, in reading order."""
    return work / f"{number:06d}.signatures"


@dataclass(frozen=True)
class EncodeJob:
    """The parameters that every process needs to tokenize units.

    Attributes:
        num_processes: the number of processes that share the memory.
        work: folder of the results.
        tokenizer: folder of the tokenizer.
        contamination: index of the evaluation sets, if there are any.
        settings_digest: the digest of all settings that a unit's result depends on.
        chunk_bytes: token bytes gathered before they are sorted and written.
    """

    config: PrepareConfig
    num_processes: int
    work: Path
    tokenizer: Path
    contamination: Path | None
    settings_digest: str
    chunk_bytes: int


class Encoder:
    """The tokenization of units."""

    def __init__(self, job: EncodeJob) -> None:
        self._job = job
        self._tokenizer = Tokenizer.load(job.tokenizer)
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        rules = TextRules(job.config, job.contamination)
        self._texts = TextPreparation(job.config, self._tokenizer, rules, job.num_processes)
        near = job.config.near_duplicates
        self._signer = Signer(near) if near.enabled else None

    def encode(self, unit: Unit) -> UnitResult:
        """Read, clean, tokenize, sort and write the documents of a unit, unless that was done before."""
        key = unit.key(self._job.settings_digest)
        done = UnitResult.load(self._job.work, unit.number)
        if done and done.needs.allows(self._job.config.memory) and done.is_usable(self._job.work, key, self._dtype):
            return done
        for path in (result_path(self._job.work, unit.number), signatures_path(self._job.work, unit.number)):
            path.unlink(missing_ok=True)
        result = UnitResult(unit.number, key, unit.size)
        rejects = Rejects(max_share=1.0, sink=result.rejects.append)
        gathered: list[Documents] = []
        groups: dict[tuple[str | None, str | None], int] = {}
        documents = self._documents(unit, rejects, result)
        for batch in in_batches(documents, lambda placed: len(placed[1].text)):
            with self._texts.turn(document.text for _, document in batch):
                gathered.append(self._encode_batch(batch, result, groups))
                if self._signer:
                    self._sign(unit, [document.text for _, document in batch])
                if sum(part.tokens.nbytes for part in gathered) >= self._job.chunk_bytes:
                    self._write_chunk(result, gathered)
                    gathered = []
            del batch  # Its texts may be long, and the next ones are read now.
        if gathered:
            self._write_chunk(result, gathered)
        result.groups = list(groups)
        result.passed_over = dict(rejects.passed_over)
        result.signatures = _checksum_file(signatures_path(self._job.work, unit.number))
        result.save(self._job.work)
        return result

    def _documents(self, unit: Unit, rejects: Rejects, result: UnitResult) -> Iterator[tuple[int, Document]]:
        """Yield the documents that the rules keep, cleaned."""
        for place, file in unit.files:
            for document in read_file(file, self._job.config.input, rejects):
                outcome = self._texts.apply(document, result.needs)
                if isinstance(outcome, Dropped):
                    result.removed.setdefault(outcome.rule, Removed()).add(_describe_dropped(document, outcome))
                elif isinstance(outcome, Reject):
                    rejects.add(outcome)
                else:
                    yield place, document._replace(text=outcome)
                del document, outcome  # They may be long, and the next one is read now.

    def _encode_batch(
        self, batch: list[tuple[int, Document]], result: UnitResult, groups: dict[tuple[str | None, str | None], int]
    ) -> Documents:
        """Return the documents' ids, each with the end id, and their records."""
        records = np.empty(len(batch), RECORD_DTYPE)
        hashes, sizes = zip(*(_hash_and_size(document.text) for _, document in batch), strict=True)
        records["text_hash_high"], records["text_hash"] = np.array(hashes, np.uint64).T
        records["bytes"] = sizes
        ids, lengths = self._tokenizer.encode_documents([document.text for _, document in batch])
        records["tokens"] = lengths
        records["number"] = np.arange(result.num_documents, result.num_documents + len(batch))
        records["group"] = [
            groups.setdefault((document.source, document.language), len(groups)) for _, document in batch
        ]
        if self._job.config.exact_duplicates == "remove":
            records["key"] = hash64(self._job.config.seed, records["text_hash"])
        else:
            # Copies that are kept get keys of their own; otherwise they would be next to each other.
            places = [place for place, _ in batch]
            numbers = [document.number for _, document in batch]
            records["key"] = hash64(self._job.config.seed, places, numbers, records["text_hash"])
        result.num_documents += len(batch)
        result.num_tokens += len(ids)
        advance(int(records["bytes"].sum()), len(ids))
        return Documents(records, ids.astype(self._dtype, copy=False))

    def _write_chunk(self, result: UnitResult, gathered: list[Documents]) -> None:
        """Write the gathered documents as the unit's next chunk."""
        chunk = Chunk.write(chunk_path(self._job.work, result.number, len(result.chunks)), gathered)
        result.chunks.append((chunk.num_documents, chunk.num_tokens, chunk.checksum))

    def _sign(self, unit: Unit, texts: list[str]) -> None:
        """Add the signatures of a batch to the unit's."""
        assert self._signer
        with open(signatures_path(self._job.work, unit.number), "ab") as file:
            self._signer.sign(texts).tofile(file)


def _checksum_file(path: Path) -> int | None:
    """Return the xxh3_64 of a file, or None if the file is missing."""
    try:
        with open(path, "rb") as file:
            digest = xxhash.xxh3_64()
            while content := file.read(1 << 20):
                digest.update(content)
            return digest.intdigest()
    except FileNotFoundError:
        return None


def _hash_and_size(text: str) -> tuple[tuple[int, int], int]:
    """Return the xxh3_128 of a text in two halves, the high one first, and its size, both in UTF-8."""
    content = text.encode()
    return divmod(xxhash.xxh3_128_intdigest(content), 1 << 64), len(content)


def _describe_dropped(document: Document, dropped: Dropped) -> Removed:
    example = {
        "file": document.file,
        "line": document.line,
        "id": document.id,
        "detail": dropped.detail,
        "text": document.text[:_EXAMPLE_CHARACTERS],
    }
    return Removed(1, utf8_length(document.text), [example])


_job: EncodeJob
_encoder: Encoder | None = None


def set_up(job: EncodeJob) -> None:
    """Prepare this process for `encode_unit`."""
    global _job, _encoder
    _job, _encoder = job, None


def encode_unit(unit: Unit) -> UnitResult:
    """Tokenize a unit, in a process that was set up."""
    global _encoder
    _encoder = _encoder or Encoder(_job)
    return _encoder.encode(unit)
