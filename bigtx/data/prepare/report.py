"""What `bigtx data prepare` and `bigtx data merge` print: the final report, or with `--dry-run` an estimate."""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtx.config.schema import PrepareConfig
from bigtx.data.corpus.inspect import counts, describe_splits
from bigtx.data.corpus.shards import token_dtype
from bigtx.data.prepare.encode import make_units
from bigtx.data.prepare.job import REJECTS_NAME, REPORT_NAME, PartReport, Report
from bigtx.data.raw.documents import BATCH_CHARACTERS, Reject, Rejects
from bigtx.data.raw.files import describe_passed_over, list_files
from bigtx.data.raw.formats import is_compressed
from bigtx.data.raw.read import read_file
from bigtx.data.text.decontaminate import build_contamination_index
from bigtx.data.text.rules import Dropped, Needs, TextPreparation, TextRules, check_rules
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import utf8_length
from bigtx.utils.errors import DataError
from bigtx.utils.hardware import num_cores
from bigtx.utils.shell import command, settings
from bigtx.utils.units import counted, format_count, format_size, format_time

SAMPLE_SECONDS = 10.0
SAMPLE_BYTES = 32 << 20
"""Text of the sample, unless time runs out first."""
_WORK_BYTES_PER_DOCUMENT = 48
"""The bytes of the record of each document while the documents are shuffled."""


@dataclass(kw_only=True)
class Estimate:
    """The counts of the sample, and the estimate of the whole input from it.

    Attributes:
        stored_bytes: the bytes of all input files.
        sampled_bytes: the sampled bytes of them, as stored.
        num_processes: the number of processes that the time is estimated for.
        documents, text_bytes, tokens: the counts of the kept documents of the sample.
        removed: documents of the sample that a rule left out.
        rejects: documents of the sample that could not be read.
        seconds: the time for the sample, in one process.
        token_bytes: the bytes of a token on disk.
    """

    stored_bytes: int
    sampled_bytes: int = 0
    num_processes: int
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    removed: int = 0
    rejects: int = 0
    seconds: float = 0.0
    token_bytes: int

    def whole(self) -> dict[str, float]:
        """Return the estimate: documents, tokens, seconds and bytes of the whole input."""
        factor = self.stored_bytes / self.sampled_bytes
        return {
            "documents": round(self.documents * factor),
            "tokens": round(self.tokens * factor),
            "seconds": self.seconds * factor / self.num_processes,
            "bytes_on_disk": round(self.tokens * factor * self.token_bytes),
        }

    def lines(self) -> Iterator[str]:
        """Yield the estimate as text."""
        documents, tokens, seconds, disk = self.whole().values()
        work = disk + documents * _WORK_BYTES_PER_DOCUMENT
        share = self.sampled_bytes / self.stored_bytes
        yield (
            f"Sampled {format_size(self.sampled_bytes)} of {format_size(self.stored_bytes)} ({share:.2%}): "
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.text_bytes / self.tokens:.2f} bytes/token, "
            f"{self.text_bytes / self.seconds / 1e6:.1f} MB/s in one process."
        )
        if self.removed or self.rejects:
            total = self.documents + self.removed + self.rejects
            yield f"Of {total:,} documents the rules leave out {self.removed:,}, and {self.rejects:,} cannot be read."
        yield "The whole input, estimated from this sample (without the search for duplicates):"
        yield f"  documents  about {format_count(documents)}"
        yield f"  tokens     about {format_count(tokens)}"
        yield f"  time       about {format_time(max(1.0, seconds))} in {self.num_processes} processes"
        yield f"  disk       about {format_size(disk)}, and {format_size(work)} more for temporary files"

    def facts(self) -> dict[str, Any]:
        """Return the sample and the estimate as plain data."""
        return {"sample": dataclasses.asdict(self), "estimate": self.whole()}


def estimate(config: PrepareConfig) -> Estimate:
    """Tokenize a seeded sample of the input.

    Raises:
        DataError: there is nothing to read.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    check_rules(config)
    with tempfile.TemporaryDirectory() as scratch:
        index = build_contamination_index(config.decontaminate, Path(scratch)) if config.decontaminate.paths else None
        return _sample(config, tokenizer, TextPreparation(config, tokenizer, TextRules(config, index), 1))


def _sample(config: PrepareConfig, tokenizer: Tokenizer, texts: TextPreparation) -> Estimate:
    files = list_files(config.input)
    units = list(make_units(files, config.input))
    random.Random(config.seed).shuffle(units)
    rejects, needs, begin = Rejects(max_share=1.0), Needs(), time.monotonic()
    found = Estimate(
        stored_bytes=sum(file.size for file in files),
        num_processes=config.num_processes or num_cores(),
        token_bytes=token_dtype(tokenizer.vocab_size).itemsize,
    )

    def is_enough() -> bool:
        return time.monotonic() - begin > SAMPLE_SECONDS or found.text_bytes >= SAMPLE_BYTES

    for file in (file for unit in units for _, file in unit.files):
        batch: list[str] = []
        before = found.text_bytes
        for document in read_file(file, config.input, rejects):
            outcome = texts.apply(document, needs)
            if isinstance(outcome, Dropped):
                found.removed += 1
                continue
            if isinstance(outcome, Reject):
                rejects.add(outcome)
                continue
            batch.append(outcome)
            found.documents += 1
            found.text_bytes += utf8_length(outcome)
            if sum(map(len, batch)) >= BATCH_CHARACTERS:
                found.tokens += len(tokenizer.encode_documents(batch)[0])
                batch = []
                if is_enough():
                    # The position in a compressed file is not known: text shrinks to about a third.
                    text_bytes = found.text_bytes - before
                    found.sampled_bytes += min(file.size, text_bytes // (3 if is_compressed(file.path) else 1))
                    break
        else:
            found.sampled_bytes += file.size
        found.tokens += len(tokenizer.encode_documents(batch)[0])
        if is_enough():
            break
    if not found.tokens:
        raise DataError(
            f"No text in {counted(len(files), 'sampled file')}; check input.paths and the rules.{rejects.first()}"
        )
    found.sampled_bytes, found.rejects = max(1, found.sampled_bytes), rejects.count
    found.seconds = time.monotonic() - begin
    return found


FEW_DOCUMENTS, FEW_TOKENS = 20, 100_000
"""Held-out text below both limits is too little for a stable validation loss."""


def facts(report: Report | PartReport) -> dict[str, Any]:
    """Return the report as plain data."""
    if isinstance(report, PartReport):
        return dataclasses.asdict(report) | {"output": str(report.output)}
    return {
        "output": str(report.output),
        "reused": report.reused,
        "seconds": report.seconds,
        "documents_read": report.num_read,
        "splits": [counts(manifest) for manifest in report.splits],
        "removed": {rule: {"documents": one.documents, "bytes": one.bytes} for rule, one in report.removed.items()},
        "rejects": {
            "unreadable": report.rejects.count,
            "cut_short": report.rejects.num_cut,
            "empty": report.rejects.num_empty,
        },
        "passed_over": dict(report.passed_over),
    }


def describe_report(report: Report | PartReport) -> Iterator[str]:
    """Yield the end report of `bigtx data prepare`, line by line."""
    if isinstance(report, PartReport):
        yield from describe_part(report)
        return
    if report.reused:
        yield f"{report.output} is prepared already, with these settings and this input; there is nothing to do."
    else:
        speed = sum(manifest.num_bytes for manifest in report.splits) / report.seconds / 1e6
        yield f"Prepared {report.output} in {report.seconds:.1f} s ({speed:.1f} MB of text per second)."
    yield ""
    yield from describe_splits(report.splits)
    yield ""
    yield from _describe_held_out(report)
    yield from describe_passed_over(report.passed_over)
    yield from _describe_removed(report)
    if report.rejects or report.rejects.num_empty:
        yield (
            f"Left out: {report.rejects.describe()}, {report.rejects.num_empty:,} empty; "
            f"listed in {report.output / REJECTS_NAME}."
        )
    yield ""
    yield "Next:"
    yield f"  {command('bigtx', 'data', 'inspect', report.output)}"
    values = {"data.sources.mine.path": report.output, "run_dir": "runs/mine"}
    yield f"  bigtx pretrain pretrain/small.yaml {settings(values)}"


def _describe_removed(report: Report) -> Iterator[str]:
    """Yield the counts that rules and the search for duplicates left out, with an example of each if there is one."""
    if not report.removed:
        return
    total = sum(removed.documents for removed in report.removed.values())
    yield (
        f"Removed {total:,} of {report.num_read:,} documents ({total / report.num_read:.2%}); "
        f"examples in {report.output / REPORT_NAME}:"
    )
    for rule, removed in sorted(report.removed.items(), key=lambda item: -item[1].documents):
        size = f", {format_size(removed.bytes)}" if removed.bytes else ""
        example = f", e.g. {removed.examples[0]['detail']}" if removed.examples else ""
        yield f"  {rule:<28} {removed.documents:>11,} documents{size}{example}"


def _describe_held_out(report: Report) -> Iterator[str]:
    if report.validation is None:
        yield "Nothing is held out for validation."
        return
    held_out = report.validation.num_documents
    total = held_out + report.train.num_documents
    yield f"Held out for validation: {counted(held_out, 'document')} ({held_out / total:.2%}), by a hash of the text."
    if held_out < FEW_DOCUMENTS and total >= 3 * FEW_DOCUMENTS and report.validation.num_tokens < FEW_TOKENS:
        # A hash chooses them, so a fraction that is just enough could again be too small.
        fraction = float(f"{min(0.5, 2 * FEW_DOCUMENTS / total):.1g}")
        yield (
            f"That is too little for a stable loss; validation_fraction={fraction:g} would hold out about "
            f"{round(fraction * total)}."
        )


def describe_part(report: PartReport) -> Iterator[str]:
    """Yield the result of a part, and the remaining commands."""
    number, count = report.part
    yield (
        f"Part {number} of {count}: {report.num_own_units:,} of {report.num_units:,} units tokenized, "
        f"{format_count(report.num_tokens)} tokens."
    )
    yield ""
    yield "Next:"
    for other in report.missing_parts:
        yield f"  the same command with part={other}/{count}, here or on another machine"
    yield f"  {command('bigtx', 'data', 'merge', report.output)}"
