"""`bigtx predict`: predict for records with a fine-tuned run, and write a JSON line for each, or a table on a terminal.

    files, folders, standard input ──▶ chunks of records ──▶ {...the record's fields, "prediction": ...}

For a record that cannot be used the line is `{..., "error": ...}`, so line i of the output is always record i of the
input; the exit status is then 1. An existing output file is continued: its lines are compared with the input, and
`FILE.about.json` in the same folder says which weights wrote it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.data.records.read import expand_path
from bigtx.data.records.record import Record
from bigtx.engine.trained import find
from bigtx.finetuning.prediction_output import Item, Output, arriving, fields_of, read_items, read_stdin, write_lines
from bigtx.utils import __version__
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import EXIT_SOME_FAILED, ConfigError
from bigtx.utils.options import add_loading_options, add_predicting_options, check_options
from bigtx.utils.terminal import visible
from bigtx.utils.units import counted

if TYPE_CHECKING:
    from bigtx.api import LoadedModel
    from bigtx.finetuning.predictions import Outcome

Show = Callable[[Sequence[Item], Sequence[Mapping[str, Any]]], None]
"""A function that shows or writes records and their output lines."""
STDIN = "-"
CHUNK_BATCHES = 8
"""Batches of a chunk, within which records are sorted by length, and which is written as a whole."""
MAX_SHOWN = 5
"""Errors that are also printed on standard error."""


def command(argv: Sequence[str]) -> int:
    """Run `bigtx predict`.

    Returns:
        The exit status: 1 if some records could not be used.

    Raises:
        BigtxError: the run, the input or the output cannot be used.
    """
    arguments = _parser().parse_args(argv)
    check_options({"batch_size": arguments.batch_size})
    if STDIN in arguments.input and len(arguments.input) > 1:
        raise ConfigError("input=-: standard input cannot be combined with files")
    if bool(arguments.input) == bool(arguments.text):
        raise ConfigError("write input=FILE or text=TEXT: one of them says what to predict for (both may be repeated)")
    files = [file for path in arguments.input if path != STDIN for file in expand_path(path)]
    checkpoint, config = find(arguments.run)
    from bigtx.finetuning.predictions import task_config

    config = task_config(config, arguments.run, arguments.set)
    arguments.too_long = arguments.too_long or config.data.too_long
    job = _Job(arguments, checkpoint)
    if arguments.input == [STDIN] and arguments.output is None:
        job.run(arriving(job.batch_size), job.show())
        return job.report()
    if arguments.text:
        items = job.given_texts()
    else:
        items = read_stdin() if arguments.input == [STDIN] else read_items(files)
    chunks = iter(lambda: list(itertools.islice(items, job.batch_size * CHUNK_BATCHES)), [])
    if arguments.output is None:
        job.run(chunks, job.show())
    else:
        with Output(Path(arguments.output), job.facts()) as output:
            job.run(chunks, lambda _, lines: output.write(lines), output)
    return job.report()


def _parser() -> Arguments:
    parser = Arguments(
        "predict",
        "Predict for records with a fine-tuned run. The output has a JSON line for each record, in the "
        'order of the input, with the record\'s own fields and "prediction", or "error" if the record cannot be used '
        "(the exit status is then 1). A terminal shows a table with the answer, its probability, and the beginning of "
        "the text.",
        json="JSON lines on a terminal too",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a fine-tuned run, or of one of its checkpoints")
    parser.add_argument(
        "--input",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help=".jsonl, .csv, .tsv or .tar files (also .gz, .zst), folders, globs; -: JSON lines from standard input",
    )
    parser.add_argument("--text", metavar="TEXT", action="append", default=[], help="a text; may be repeated")
    parser.add_argument(
        "--output", metavar="FILE", help="the file to write; the same command resumes (standard output)"
    )
    add_predicting_options(parser)
    parser.add_argument(
        "--too-long",
        choices=["truncate", "refuse"],
        help="cut records that are too long for the model, or report them as errors (as in training)",
    )
    add_loading_options(parser)
    return parser


class _Job:
    """One call of the command, which loads the model when it is first needed, and counts records."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path) -> None:
        from bigtx.finetuning.predictions import BATCH_SIZE

        self.arguments, self.checkpoint = arguments, checkpoint
        self.batch_size = arguments.batch_size or BATCH_SIZE
        self.num_records = self.num_failed = self.num_cut = self.num_kept = 0
        self.shown: list[str] = []
        self.started = time.monotonic()

    def facts(self) -> dict[str, Any]:
        """Return what an output file depends on, in addition to the records."""
        from bigtx.engine.checkpoint import Checkpoint

        return {
            "bigtx": __version__,
            "checkpoint": str(self.checkpoint.absolute()),
            "manifest_sha256": Checkpoint(self.checkpoint).manifest_sha256,
            "weights": self.arguments.weights,
            "too_long": self.arguments.too_long,
            "set": sorted(self.arguments.set),
            "input": self.arguments.input or self.arguments.text,
        }

    def given_texts(self) -> Iterator[Item]:
        """Yield the texts of the command line as records.

        Raises:
            DataError: the task needs more of a record than one text.
        """
        for number, text in enumerate(self.arguments.text, start=1):
            yield Record(self.loaded.fields_of(text, number), "text", number)

    def show(self) -> Show:
        """Return the function that writes to standard output: a table on a terminal, otherwise JSON lines."""
        if self.arguments.json or not sys.stdout.isatty():
            return lambda _, lines: write_lines(lines)
        from bigtx.finetuning.prediction_output import PredictionTable

        return PredictionTable(self.loaded.task, sys.stdout, shutil.get_terminal_size().columns).add

    def run(self, chunks: Iterable[list[Item]], show: Show, output: Output | None = None) -> None:
        """Predict for the records that are not in the output yet."""
        for chunk in chunks:
            if output is not None and (known := output.known(chunk)) is not None:
                self.num_kept += len(chunk)
                self._count(known)
                continue
            lines = self._predict(chunk)
            self._count(lines)
            show(chunk, lines)
        if output is not None:
            output.finish()

    def _predict(self, chunk: Sequence[Item]) -> list[dict[str, Any]]:
        from bigtx.finetuning.predictions import predict_records

        records, loaded = [item for item in chunk if isinstance(item, Record)], self.loaded
        device = next(loaded.model.parameters()).device
        found = predict_records(loaded.task, loaded.model, records, batch_size=self.batch_size, device=device)
        outcomes = iter(found)
        return [
            fields_of(item) | (_added(next(outcomes)) if isinstance(item, Record) else {"error": item.error})
            for item in chunk
        ]

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """Return the model, with the settings of the command; it is loaded at the first use."""
        from bigtx.api import load
        from bigtx.finetuning.predictions import task_config

        loaded = load(self.checkpoint, weights=self.arguments.weights, device=self.arguments.device)
        config = task_config(loaded.config, self.arguments.run, self.arguments.set)
        data = dataclasses.replace(config.data, too_long=self.arguments.too_long)
        return dataclasses.replace(loaded, config=dataclasses.replace(config, data=data))

    def _count(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.num_records += len(lines)
        for line in lines:
            self.num_cut += "num_cut" in line
            if "prediction" not in line:
                self.num_failed += 1
                if len(self.shown) < MAX_SHOWN:
                    self.shown.append(str(line.get("error")))

    def report(self) -> int:
        """Print a summary on standard error. Return the exit status."""
        kept = f", {self.num_kept:,} of them already in the output" if self.num_kept else ""
        seconds = time.monotonic() - self.started
        _say(f"[{self.checkpoint}: {counted(self.num_records, 'record')}{kept}, in {seconds:.1f} s]")
        if self.num_cut:
            _say(
                f'[cut to the length that the model reads: {counted(self.num_cut, "record")}; "num_cut" is the number '
                "of tokens that were cut; with too_long=refuse such records are errors]"
            )
        if not self.num_failed:
            return 0
        first = f", the first {MAX_SHOWN} of them" if self.num_failed > MAX_SHOWN else ""
        _say(f'{counted(self.num_failed, "record")} could not be used ("error" in the output){first}:')
        for reason in self.shown:
            _say(f"  {reason}")
        return EXIT_SOME_FAILED


def _added(outcome: Outcome) -> dict[str, Any]:
    if outcome.prediction is None:
        return {"error": outcome.error}
    return {"prediction": outcome.prediction} | ({"num_cut": outcome.num_cut} if outcome.num_cut else {})


def _say(text: str) -> None:
    # Text from a file must not control the terminal.
    print(visible(text), file=sys.stderr)
