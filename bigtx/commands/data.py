"""`bigtx data prepare | merge | inspect | stats | verify`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from bigtx.config.load import JSON, PRINT_CONFIG, parse_command_line
from bigtx.config.nodes import Problem
from bigtx.config.schema import PrepareConfig
from bigtx.config.schema.pretraining import SPLITS
from bigtx.utils.arguments import Arguments, take
from bigtx.utils.errors import ConfigError
from bigtx.utils.log import said_aside, say, say_json, say_result

PART = "part"
FLAGS = PRINT_CONFIG | {"--dry-run": "estimate tokens, time and disk from a sample, and end"} | JSON
ABOUT_PART = {f"{PART}=I/N": "tokenize only part I of N; `bigtx data merge` makes the corpus from the parts"}


def _rules(config: PrepareConfig) -> Iterable[Problem]:
    from bigtx.data.raw.files import suffix_problems

    return suffix_problems(config.input)


def prepare_command(argv: Sequence[str]) -> None:
    """Turn raw text into tokenized shards, and print a report."""
    part, rest = _take_part(argv)
    parsed = parse_command_line(
        PrepareConfig,
        rest,
        program="bigtx data prepare",
        flags=FLAGS,
        others=ABOUT_PART,
        example="input.paths=my/texts tokenizer=my/tokenizer output=my/corpus",
        rules=_rules,
    )
    # Slow imports come after the check of the config.
    from bigtx.data.prepare.job import prepare
    from bigtx.data.prepare.report import describe_report, estimate, facts

    if parsed.dry_run:
        with said_aside(parsed.json):
            sampled = estimate(parsed.config)
        say_result(parsed.json, sampled.facts, sampled.lines)
        return
    try:
        with said_aside(parsed.json):
            report = prepare(parsed.config, part)
    except KeyboardInterrupt:
        say("Interrupted. Nothing is lost: the same command resumes the job.")
        raise
    say_result(parsed.json, lambda: facts(report), lambda: describe_report(report))


def _take_part(argv: Sequence[str]) -> tuple[tuple[int, int], list[str]]:
    """Split `part=I/N` from a command line. Return (I, N), which is (1, 1) without it, and the other words.

    Raises:
        ConfigError: the value is not a part.
    """
    written, rest = take(argv, PART)
    if written is None:
        return (1, 1), rest
    match = re.fullmatch(r"(\d+)/(\d+)", written)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count or count < 2:
        raise ConfigError(f"{PART}={written}: write it as I/N with 1 <= I <= N and N at least 2, e.g. {PART}=2/4")
    return (number, count), rest


def merge_command(argv: Sequence[str]) -> None:
    """Merge the parts of a preparation into one corpus."""
    parser = Arguments(
        "data merge", "Merge the parts that `bigtx data prepare ... part=I/N` has tokenized into one corpus."
    )
    parser.add_argument("output", metavar="OUTPUT", help="the `output` of the parts")
    parser.add_argument("--processes", metavar="N", type=int, default=0, help="0 (the default) uses every core")
    options = parser.parse_args(argv)
    from bigtx.data.prepare.job import merge
    from bigtx.data.prepare.report import describe_report, facts

    with said_aside(options.json):
        report = merge(options.output, options.processes)
    say_result(options.json, lambda: facts(report), lambda: describe_report(report))


def inspect_command(argv: Sequence[str]) -> None:
    """Show a prepared corpus."""
    parser = _corpus_parser("data inspect", "Show a prepared corpus: its shards, counts, lengths and decoded samples.")
    parser.add_argument("--samples", metavar="N", type=int, default=3, help="documents to decode (3)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="the split to show (train)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="chooses the samples (0)")
    options = parser.parse_args(argv)
    from bigtx.data.corpus import inspect
    from bigtx.data.storage.places import as_place

    place = as_place(options.corpus)
    chosen = {"split": options.split, "num_samples": options.samples, "seed": options.seed}
    say_result(options.json, lambda: inspect.facts(place, **chosen), lambda: inspect.describe(place, **chosen))


def stats_command(argv: Sequence[str]) -> None:
    """Show statistics of a prepared corpus."""
    parser = _corpus_parser(
        "data stats", "Show statistics of a prepared corpus: documents and tokens, by source and language, and lengths."
    )
    options = parser.parse_args(argv)
    from bigtx.data.corpus import inspect
    from bigtx.data.storage.places import as_place

    place = as_place(options.corpus)
    say_result(options.json, lambda: inspect.statistics(place), lambda: inspect.describe_statistics(place))


def verify_command(argv: Sequence[str]) -> None:
    """Read all of a prepared corpus and check that it is unchanged."""
    parser = _corpus_parser(
        "data verify",
        "Read all of a prepared corpus and compare it with its hashes, its block table and its tokenizer.",
    )
    parser.add_argument("--processes", metavar="N", type=int, default=0, help="0 (the default) uses every core")
    options = parser.parse_args(argv)
    from bigtx.data.corpus import verify
    from bigtx.data.storage.places import as_place

    place = as_place(options.corpus)
    with said_aside(options.json):
        result = verify.verify(place, options.processes)
    if options.json:
        say_json({"corpus": str(place)} | dataclasses.asdict(result))
    outcome = verify.describe(place, result)
    if not options.json:
        say(outcome)


def _corpus_parser(command: str, about: str) -> Arguments:
    """Return the parser of a command that takes a prepared corpus."""
    parser = Arguments(command, about)
    parser.add_argument("corpus", metavar="CORPUS", help="a folder written by `bigtx data prepare`, or the URL of one")
    return parser
