"""The final report of `bigtx data prepare` and `bigtx data merge`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bigtx.data.corpus.inspect import counts, describe_splits
from bigtx.data.prepare.job import REJECTS_NAME, REPORT_NAME, PartReport, Report
from bigtx.data.raw.files import describe_passed_over
from bigtx.utils.shell import command, settings
from bigtx.utils.units import format_count, format_size

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


def describe_report(report: Report) -> Iterator[str]:
    """Yield the end report of `bigtx data prepare`, line by line."""
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
    yield (
        f"Held out for validation: {held_out:,} document{'s' * (held_out != 1)} ({held_out / total:.2%}), "
        "by a hash of the text."
    )
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
