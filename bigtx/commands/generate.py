"""`bigtx generate`: continue texts with a trained run. `load` gives the same, and predictions, to Python.

Nothing heavy is imported before the arguments, the prompts and the run folder have been found good.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import run_dir_of
from bigtx.config.schema import RunConfig
from bigtx.engine.trained import Weights, find, find_with_tokenizer, read_model
from bigtx.train.prediction_lines import as_line
from bigtx.utils.errors import ConfigError, DataError, LaunchError
from bigtx.utils.files import open_file
from bigtx.utils.options import SAMPLING, check_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bigtx.model.decode import OnToken
    from bigtx.model.transformer import Transformer
    from bigtx.tokenizer.tokenizer import Tokenizer
    from bigtx.train.tasks.task import RecordTask

BATCH_SIZE = 16
"""Prompts of a file that are continued side by side."""


def command(argv: Sequence[str]) -> int:
    """`bigtx generate`.

    Returns:
        The exit status.

    Raises:
        BigtxError: a run, prompts or settings that cannot be used.
    """
    arguments = _parser().parse_args(argv)
    check_options({name: getattr(arguments, name) for name in SAMPLING}, command_line=True)
    records = _read_prompts(Path(arguments.prompts_file)) if arguments.prompts_file else []
    refuse_wordless(find(arguments.run)[1])
    loaded = load(arguments.run, weights=arguments.weights, device=arguments.device)
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    started, num_tokens = time.monotonic(), 0

    def count(index: int, token: int) -> None:
        nonlocal num_tokens
        num_tokens += 1

    _remark_on_length(loaded, [record["prompt"] for record in records] or [arguments.prompt])
    if arguments.prompts_file:
        _answer_file(loaded, records, options, count)
    else:
        _answer_prompt(loaded, arguments.prompt, options, count)
    seconds = time.monotonic() - started
    print(f"[{loaded.checkpoint}: {num_tokens} tokens in {seconds:.1f} s]", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bigtx generate",
        description="Continue prompts with a trained model: one on the terminal as it grows, or a file of them as "
        "JSON lines on standard output.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue; '' starts a new document")
    prompts.add_argument(
        "--prompts-file", metavar="FILE", help='.txt with a prompt on each line, or .jsonl with {"prompt": ...}'
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="tokens of a continuation (128)")
    parser.add_argument("--temperature", metavar="X", type=float, default=0.8, help="0: the likeliest token (0.8)")
    parser.add_argument("--top-k", metavar="N", type=int, help="draw from the N likeliest tokens only (all)")
    parser.add_argument("--top-p", metavar="X", type=float, help="draw from the likeliest that reach X together (all)")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="another seed, another text (1)")
    parser.add_argument(
        "--weights", choices=["master", "ema"], default="master", help="ema: the averaged copy (master)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    return parser


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    """The records of a file of prompts; a text line becomes {"prompt": line}, and blank lines are left out."""
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path} is neither .txt (a prompt on each line) nor .jsonl (objects with a prompt)")
    try:
        with open_file(path) as file:
            lines = file.read().decode().split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start + 1}") from error
    read = _json_record if path.suffix == ".jsonl" else _text_record
    records = [read(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise DataError(f"{path} holds no prompt; write one on each line")
    return records


def _text_record(line: str, where: str) -> dict[str, Any]:
    return {"prompt": line.removesuffix("\r")}


def _json_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(f'{where} has no prompt; each line is an object like {{"prompt": "Once upon"}}')
    return record


def _remark_on_length(loaded: LoadedModel, prompts: Sequence[str]) -> None:
    """Say of which prompts the model reads the end alone."""
    window = loaded.config.model.max_sequence_length
    for number, prompt in enumerate(prompts, start=1):
        # No token stands for less than a byte, so that most prompts need not be encoded for this.
        if len(prompt.encode("utf-8", "surrogatepass")) <= window:
            continue
        num_tokens = len(_read_before(loaded, prompt))
        if num_tokens > window:
            which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            print(
                f"[{which} has {num_tokens:,} tokens; the model reads the last {window:,} (model.max_sequence_length)]",
                file=sys.stderr,
            )


def _read_before(loaded: LoadedModel, prompt: str) -> list[int]:
    """The ids of a prompt as the model reads them."""
    is_decoder = loaded.config.model.shape == "decoder"
    encode = loaded.tokenizer.encode_prompts if is_decoder else loaded.tokenizer.encode_sources
    return encode([prompt])[0]


def _answer_prompt(loaded: LoadedModel, prompt: str, options: dict[str, Any], count: OnToken) -> None:
    """Show a continuation as it grows."""
    is_decoder = loaded.config.model.shape == "decoder"
    stream = loaded.tokenizer.stream(after=_read_before(loaded, prompt) if is_decoder else ())

    def show(index: int, token: int) -> None:
        count(index, token)
        print(stream.push(token), end="", flush=True)

    if is_decoder:
        print(prompt, end="", flush=True)
    loaded.generate(prompt, on_token=show, **options)
    print(stream.flush())


def write_line(value: Mapping[str, Any]) -> None:
    """Write an object to standard output as a JSON line in UTF-8, whatever the encoding of the terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(as_line(value))
    sys.stdout.buffer.flush()


def _answer_file(loaded: LoadedModel, records: list[dict[str, Any]], options: dict[str, Any], count: OnToken) -> None:
    """Print each record with its completion, in the file's order."""
    for start in range(0, len(records), BATCH_SIZE):
        batch = records[start : start + BATCH_SIZE]
        prompts = [record["prompt"] for record in batch]
        completions = loaded.generate_batch(prompts, first_index=start, on_token=count, **options)
        for record, completion in zip(batch, completions, strict=True):
            write_line(record | {"completion": completion})
