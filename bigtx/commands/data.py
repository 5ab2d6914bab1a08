"""`bigtx data prepare | merge | inspect | stats | verify`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from bigtx.config.load import parse_command_line
from bigtx.config.options import JSON, PRINT_CONFIG
from bigtx.config.schema import PrepareConfig
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import ConfigError
from bigtx.utils.log import say

PART = "--part"
FLAGS = PRINT_CONFIG | {
    "--dry-run": "estimate tokens, time and disk from a sample, and end",
    PART: "i/n: tokenize only the i-th of n shares; `bigtx data merge` makes the corpus of them",
}


def prepare_command(argv: Sequence[str]) -> int:
    """Turn raw text into tokenized shards, and say what came of it."""
    part, rest = _take_part(argv)
    parsed = parse_command_line(
        PrepareConfig,
        rest,
        program="bigtx data prepare",
        flags=FLAGS,
        example="input.paths=my/texts tokenizer=my/tokenizer output=my/corpus",
    )
    # Heavy imports wait until the config is known to be good.
    from bigtx.data.prepare.estimate import estimate
    from bigtx.data.prepare.job import PartReport, prepare
    from bigtx.data.prepare.report import describe_part, describe_report

    if parsed.dry_run:
        for line in estimate(parsed.config).lines():
            say(line)
        return 0
    try:
        report = prepare(parsed.config, part)
    except KeyboardInterrupt:
        say("Interrupted. Nothing is lost: the same command goes on from here.")
        raise
    for line in describe_part(report) if isinstance(report, PartReport) else describe_report(report):
        say(line)
    return 0


def _take_part(argv: Sequence[str]) -> tuple[tuple[int, int], list[str]]:
    """`--part i/n` of a command line, (1, 1) without, and what else there is.

    Raises:
        ConfigError: it names no part.
    """
    rest: list[str] = []
    written: str | None = None
    arguments = iter(argv)
    for argument in arguments:
        if argument == PART:
            written = next(arguments, "")
        elif argument.startswith(f"{PART}="):
            written = argument.partition("=")[2]
        else:
            rest.append(argument)
    if written is None:
        return (1, 1), rest
    match = re.fullmatch(r"(\d+)/(\d+)", written)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count or count < 2:
        raise ConfigError(f"{PART} {written}: write it as i/n with 1 <= i <= n and n at least 2, e.g. {PART} 2/4")
    return (number, count), rest


def merge_command(argv: Sequence[str]) -> int:
    """Make one corpus of the parts of a preparation."""
    parser = Arguments(
        prog="bigtx data merge",
        description="Make one corpus of the parts that `bigtx data prepare ... --part i/n` tokenized.",
    )
    parser.add_argument("output", help="the `output` that the parts were given")
    parser.add_argument("--processes", type=int, default=0, help="0 (the default) uses every core")
    options = parser.parse_args(argv)
    from bigtx.data.prepare.job import merge
    from bigtx.data.prepare.report import describe_report

    for line in describe_report(merge(options.output, options.processes)):
        say(line)
    return 0


def inspect_command(argv: Sequence[str]) -> int:
    """Show a prepared corpus."""
    from bigtx.data.corpus.inspect import describe
    from bigtx.data.corpus.manifest import SPLITS
    from bigtx.data.storage.places import as_place

    parser = Arguments(
        prog="bigtx data inspect",
        description="Show a prepared corpus: its shards, counts, lengths and decoded samples.",
    )
    _add_corpus(parser)
    parser.add_argument("--samples", type=int, default=3, help="documents to decode (default: 3)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which split to look into (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the samples (default: 0)")
    options = parser.parse_args(argv)
    for line in describe(as_place(options.corpus), split=options.split, num_samples=options.samples, seed=options.seed):
        say(line)
    return 0


def stats_command(argv: Sequence[str]) -> int:
    """Show the figures of a prepared corpus."""
    parser = Arguments(
        prog="bigtx data stats",
        description="Show a prepared corpus in figures: documents and tokens, by source and language, and lengths.",
    )
    _add_corpus(parser)
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    options = parser.parse_args(argv)
    from bigtx.data.corpus import stats
    from bigtx.data.storage.places import as_place

    place = as_place(options.corpus)
    if options.json:
        say(json.dumps(stats.statistics(place), indent=2, ensure_ascii=False))
        return 0
    for line in stats.describe_statistics(place):
        say(line)
    return 0


def verify_command(argv: Sequence[str]) -> int:
    """Read all of a prepared corpus to see that it is what was written."""
    parser = Arguments(
        prog="bigtx data verify",
        description="Read all of a prepared corpus and compare it with its hashes, its block table and its tokenizer.",
    )
    _add_corpus(parser)
    parser.add_argument("--processes", type=int, default=0, help="0 (the default) uses every core")
    options = parser.parse_args(argv)
    from bigtx.data.corpus import verify
    from bigtx.data.storage.places import as_place

    place = as_place(options.corpus)
    say(verify.describe(place, verify.verify(place, options.processes)))
    return 0


def _add_corpus(parser: Arguments) -> None:
    parser.add_argument("corpus", help="a folder written by `bigtx data prepare`, or the URL of one")
