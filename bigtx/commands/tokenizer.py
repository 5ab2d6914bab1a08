"""`bigtx tokenizer train | import | inspect`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bigtx.config.load import JSON, PRINT_CONFIG, parse_command_line
from bigtx.config.schema import TokenizerTrainConfig
from bigtx.data.prepare.recipe import RECIPE_NAME, describe_inputs, differences
from bigtx.data.raw.documents import Rejects
from bigtx.data.raw.files import describe_passed_over, list_files, suffix_problems
from bigtx.data.raw.read import read_documents
from bigtx.data.storage.access import InputFile
from bigtx.tokenizer import report
from bigtx.tokenizer.huggingface_model import SENTENCEPIECE_NAMES, TOKENIZER_CONFIG
from bigtx.tokenizer.special import DESCRIPTION
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import draw_sample, problems, train_on_sample
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import ConfigError, DataError
from bigtx.utils.files import json_value, new_folder, read_text, refuse_filled, write_json
from bigtx.utils.log import said_aside, say_json
from bigtx.utils.processes import stopped_at_once
from bigtx.utils.shell import command
from bigtx.utils.units import counted, format_size

_SAY_EVERY_SECONDS = 10.0


def train_command(argv: Sequence[str]) -> None:
    """Train a tokenizer on text files, and print a report."""
    parsed = parse_command_line(
        TokenizerTrainConfig,
        argv,
        program="bigtx tokenizer train",
        flags=PRINT_CONFIG | JSON,
        example="input.paths=my/texts output=my/tokenizer vocab_size=16k",
        rules=lambda config: [*suffix_problems(config.input), *problems(config)],
    )
    _refuse_unusable(parsed.config.output)
    with said_aside(parsed.json):
        facts = _train(parsed.config, [item for item in argv if item.startswith("input.")])
    if parsed.json:
        say_json(facts)


def _train(config: TokenizerTrainConfig, input_settings: Sequence[str]) -> dict[str, Any]:
    """Train a tokenizer, unless the same one exists already, and print a report.

    Args:
        input_settings: the settings of the input as the user wrote them, for the next command.

    Returns:
        The result as plain data.
    """
    begin = time.perf_counter()
    passed_over: Counter[str] = Counter()
    files = list_files(config.input, passed_over)
    recipe = _recipe(config, files)
    prepare = command("bigtx", "data", "prepare", *input_settings, f"tokenizer={config.output}", "output=FOLDER")
    if (Path(config.output) / DESCRIPTION).exists():
        tokenizer = _same_as_trained(config.output, recipe)
        print(
            f"{config.output} is trained already with these settings and this input; there is nothing to do "
            f"({tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:12]}).\nNext: {prepare}"
        )
        return report.facts(tokenizer, config.output) | {"reused": True}
    print(f"Reading {counted(len(files), 'file')}, {format_size(sum(file.size for file in files))}")
    for line in describe_passed_over(passed_over):
        print(line)
    rejects = Rejects(config.input.max_rejects)
    sample = draw_sample(_texts(config, rejects), config.max_bytes, config.seed)
    rejects.check(sample.num_documents, len(files))
    rejected = f"; skipped: {rejects.describe()}" if rejects else ""
    print(f"{counted(sample.num_documents, 'document')}, {format_size(sample.num_bytes)} of text{rejected}")
    print(f"Learning {config.vocab_size:,} pieces ({config.method}) from {format_size(sample.training_bytes)}")
    with stopped_at_once():
        tokenizer = train_on_sample(config, sample)
    _save(tokenizer, config.output, recipe | {"fingerprint": tokenizer.fingerprint})
    texts = sample.held_out or [piece.decode() for piece in sample.training[:64]]
    print(f"\nOn {'held-out documents' if sample.held_out else 'the text that it was trained on'}:")
    measures = _print_figures(tokenizer, texts)
    print(f"\nHard texts:\n{report.examples(tokenizer)}")
    if remark := report.remark_on_size(tokenizer, measures, sample.num_bytes):
        print(f"\n{remark}")
    seconds = time.perf_counter() - begin
    print(
        f"\n{tokenizer.vocab_size:,} ids in {seconds:.0f} s: {config.output} "
        f"(fingerprint {tokenizer.fingerprint[:12]})\nNext: {prepare}"
    )
    read = {"documents": sample.num_documents, "bytes": sample.num_bytes, "learned_bytes": sample.training_bytes}
    held_out = measures.facts() | {"held_out": bool(sample.held_out)}
    return report.facts(tokenizer, config.output) | {
        "reused": False,
        "read": read,
        "measured": held_out,
        "seconds": seconds,
    }


def import_command(argv: Sequence[str]) -> None:
    """Import a tokenizer that was made elsewhere."""
    parser = Arguments("tokenizer import", "Import a tokenizer that was made elsewhere, with unchanged ids.")
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="a sentencepiece .model file, or a Hugging Face tokenizer.json or its folder",
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="folder of the tokenizer")
    options = parser.parse_args(argv)
    if (Path(options.output) / DESCRIPTION).exists():
        raise _already_there(options.output)
    _refuse_unusable(options.output)
    tokenizer = _bring(options.path)
    _save(tokenizer, options.output)
    changed = [name for name, text in report.HARD_TEXTS.items() if tokenizer.decode(tokenizer.encode(text)) != text]
    if options.json:
        say_json(report.facts(tokenizer, options.output) | {"loses_something_of": changed})
        return
    print(
        f"{tokenizer.vocab_size:,} ids ({tokenizer.kind}): {options.output} (fingerprint {tokenizer.fingerprint[:12]})"
    )
    print(f"Special ids: {report.special_line(tokenizer)}")
    print(f"Around texts: {report.template_line(tokenizer)}")
    if changed:
        print(f"Decoding does not restore: {', '.join(changed)}")
    print(f"Next: {command('bigtx', 'tokenizer', 'inspect', options.output)}")


def inspect_command(argv: Sequence[str]) -> None:
    """Show how a tokenizer encodes texts."""
    parser = Arguments("tokenizer inspect", "Show how a tokenizer encodes texts.")
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder written by `bigtx tokenizer train` or `bigtx tokenizer import`"
    )
    parser.add_argument("--text", metavar="TEXT", action="append", default=[], help="a text to show; may be repeated")
    parser.add_argument(
        "--file", metavar="FILE", action="append", type=Path, default=[], help="a file to measure; may be repeated"
    )
    options = parser.parse_args(argv)
    tokenizer = Tokenizer.load(options.folder)
    if options.json:
        texts = options.text or ([] if options.file else list(report.HARD_TEXTS.values()))
        files = [{"file": str(path)} | report.measure(tokenizer, [read_text(path)]).facts() for path in options.file]
        shown = {"texts": [report.text_facts(tokenizer, text) for text in texts], "files": files}
        say_json(report.facts(tokenizer, options.folder) | shown)
        return
    print(f"{options.folder}: {tokenizer.kind}, {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint}")
    print(f"Special ids: {report.special_line(tokenizer)}")
    print(f"Around texts: {report.template_line(tokenizer)}")
    for text in options.text:
        print(f"\n{report.visible(text)}\n  {report.example(tokenizer, text)}\n  ids: {tokenizer.encode(text)}")
    for path in options.file:
        print(f"\n{path}:")
        _print_figures(tokenizer, [read_text(path)])
    if not options.text and not options.file:
        print(f"\nHard texts:\n{report.examples(tokenizer)}")


def _texts(config: TokenizerTrainConfig, rejects: Rejects) -> Iterator[str]:
    """Yield the documents' texts, and print the progress now and then."""
    next_line = time.monotonic() + _SAY_EVERY_SECONDS
    num_characters = 0
    for number, document in enumerate(read_documents(config.input, rejects), 1):
        num_characters += len(document.text)
        if time.monotonic() > next_line:
            next_line = time.monotonic() + _SAY_EVERY_SECONDS
            print(f"  {number:,} documents, {num_characters / 1e6:,.0f} million characters so far", flush=True)
        yield document.text


def _bring(path: Path) -> Tokenizer:
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    if (path / "tokenizer.json").exists() or path.suffix == ".json":
        return Tokenizer.from_huggingface(path)
    models = sorted(path.glob("*.model")) if path.is_dir() else [path]
    if len(models) != 1:
        what = f"{path} has no tokenizer.json and {len(models) or 'no'} sentencepiece .model files; name the file."
        raise DataError(what)
    # The model does not say which special ids belong around texts: transformers does, by the settings in its folder.
    folder = models[0].parent
    is_of_huggingface = any((folder / name).is_file() for name in (TOKENIZER_CONFIG, "config.json"))
    if is_of_huggingface and models[0].name in SENTENCEPIECE_NAMES:
        from bigtx.interop.tokenizer import import_tokenizer

        return import_tokenizer(folder)
    return Tokenizer.from_sentencepiece(models[0])


def _recipe(config: TokenizerTrainConfig, files: list[InputFile]) -> dict[str, Any]:
    """Return what determines a tokenizer: the settings, and the files of the input with their sizes and times."""
    settings = dataclasses.asdict(config)
    del settings["output"], settings["input"]["max_rejects"]
    settings |= {f"input.{name}": value for name, value in settings.pop("input").items()}
    return {"settings": settings, "inputs": describe_inputs(files)}


def _same_as_trained(output: str, recipe: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer in a folder, if it was trained with this recipe.

    Raises:
        ConfigError: it was made from another recipe; the message says what differs.
        DataError: it is damaged.
    """
    tokenizer = Tokenizer.load(output)
    try:
        found = json_value((Path(output) / RECIPE_NAME).read_bytes())
        settings, inputs = dict(found["settings"]), found["inputs"]
        known = found["fingerprint"] == tokenizer.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise _already_there(output)
    now, same_files = recipe["settings"], inputs == recipe["inputs"]
    if same_files:
        settings["input.paths"] = now["input.paths"]  # Another way to write the same files is not a difference.
    changes = differences(settings, now)
    if not same_files and not changes:
        changes = ["the input files have been changed, moved or touched since then"]
    if changes:
        raise _already_there(output, f", with other settings or input: {'; '.join(changes)}")
    return tokenizer


def _already_there(output: str, how: str = "") -> ConfigError:
    return ConfigError(
        f"{output} has a tokenizer already{how}. Corpora may have been prepared with it: name another output, or "
        f"delete that folder first."
    )


def _refuse_unusable(output: str) -> None:
    # This is checked before the work.
    if not (Path(output) / DESCRIPTION).exists():
        refuse_filled(Path(output))
    nearest = next(path for path in (Path(output).absolute(), *Path(output).absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "cannot be written to" if nearest.is_dir() else "is a file"
        raise ConfigError(f"output={output} cannot be made: {nearest} {what}; name another folder.")


def _save(tokenizer: Tokenizer, output: str, recipe: dict[str, Any] | None = None) -> None:
    with new_folder(Path(output)) as folder:
        if recipe:  # Copies in runs and corpora do not have this file.
            write_json(folder / RECIPE_NAME, recipe)
        tokenizer.save(folder)


def _print_figures(tokenizer: Tokenizer, texts: list[str]) -> report.Measures:
    measures = report.measure(tokenizer, texts)
    print(report.figures(tokenizer, measures))
    print(f"  most of the text is in: {report.pieces_line(tokenizer, measures)}")
    return measures
