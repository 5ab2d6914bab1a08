"""`bigtx generate`: continue texts with a trained run, or answer them if it was fine-tuned to answer.

torch is imported only after the arguments, the prompts and the run folder have been checked.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.api import LoadedModel, load, refuse_chatless, refuse_wordless
from bigtx.config.schema import FinetuneConfig
from bigtx.config.schema.tasks import ANSWERING
from bigtx.engine.trained import find
from bigtx.finetuning.prediction_output import as_line
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import ConfigError, DataError
from bigtx.utils.files import open_file
from bigtx.utils.log import say_json
from bigtx.utils.options import add_loading_options, add_writing_options, given_writing_options

if TYPE_CHECKING:
    from bigtx.finetuning.tasks.chats import Read

BATCH_SIZE = 16
"""The number of prompts of a file that are continued in one batch."""


def command(argv: Sequence[str]) -> int:
    """Run `bigtx generate`.

    Returns:
        The exit status.

    Raises:
        BigtxError: the run, the prompts or the settings cannot be used.
    """
    arguments = _parser().parse_args(argv)
    options = given_writing_options(arguments)
    records = _read_prompts(Path(arguments.prompts_file)) if arguments.prompts_file else []
    config = find(arguments.run)[1]
    refuse_wordless(config)
    if any("messages" in record for record in records):
        if arguments.raw:
            raise ConfigError(f"--raw: {arguments.prompts_file} holds chats, which cannot be continued as plain text")
        refuse_chatless(config, arguments.run)
    answers = isinstance(config, FinetuneConfig) and config.task in ANSWERING and not arguments.raw
    shows_prompt = config.model.shape == "decoder" and not answers
    loaded = load(arguments.run, weights=arguments.weights, device=arguments.device)
    job = _Job(loaded, options, arguments.raw)
    if arguments.prompts_file:
        job.answer_file(arguments.prompts_file, records)
    elif arguments.json:
        job.answer_as_json(arguments.prompt)
    else:
        job.answer(arguments.prompt, shows_prompt=shows_prompt)
    return 0


def _parser() -> Arguments:
    parser = Arguments(
        prog="bigtx generate",
        description="Continue prompts with a trained model, or answer them if it was fine-tuned to answer: one prompt, "
        "whose text is shown as it grows, or a file of prompts, whose texts are JSON lines on standard output.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue; '' starts a new document")
    prompts.add_argument(
        "--prompts-file",
        metavar="FILE",
        help='.txt with a prompt on each line, or .jsonl with {"prompt": ...} or, for a chat model, '
        '{"messages": [...]}',
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, also with a chat model")
    add_writing_options(parser)
    add_loading_options(parser)
    parser.add_json("the text of a single prompt as a JSON object, when it is complete")
    return parser


@dataclass
class _Job:
    """One call of the command."""

    loaded: LoadedModel
    options: dict[str, Any]
    raw: bool

    def answer(self, prompt: str, *, shows_prompt: bool) -> None:
        """Print a new text as it grows."""
        read = self.loaded.read(prompt, raw=self.raw, options=self.options)
        self._remark("the prompt", read)
        if shows_prompt:
            print(prompt, end="", flush=True)
        started = time.monotonic()
        (written,) = self.loaded.write(
            [read], on_text=lambda index, text: print(text, end="", flush=True), **self.options
        )
        print(flush=True)
        self._say_done(written.num_tokens, time.monotonic() - started)

    def answer_as_json(self, prompt: str) -> None:
        """Print a new text, and how it ended, as a JSON object."""
        read = self.loaded.read(prompt, raw=self.raw, options=self.options)
        self._remark("the prompt", read)
        started = time.monotonic()
        (written,) = self.loaded.write([read], **self.options)
        say_json(
            {
                "checkpoint": str(self.loaded.checkpoint),
                "prompt": prompt,
                "completion": written.text,
                "num_tokens": written.num_tokens,
                "ended_by": written.ended_by,
            }
        )
        self._say_done(written.num_tokens, time.monotonic() - started)

    def answer_file(self, path: str, records: list[dict[str, Any]]) -> None:
        """Print each record with its completion, in the file's order."""
        started, num_tokens = time.monotonic(), 0
        for start in range(0, len(records), BATCH_SIZE):
            batch = records[start : start + BATCH_SIZE]
            reads = []
            for number, record in enumerate(batch, start=start + 1):
                try:
                    given = record["messages"] if "messages" in record else record["prompt"]
                    reads.append(self.loaded.read(given, raw=self.raw, options=self.options))
                except DataError as error:
                    raise DataError(f"{path}, prompt {number}: {error}") from None
                self._remark(f"prompt {number}" if len(records) > 1 else "the prompt", reads[-1])
            for record, written in zip(batch, self.loaded.write(reads, first_index=start, **self.options), strict=True):
                write_line(record | {"completion": written.text})
                num_tokens += written.num_tokens
        self._say_done(num_tokens, time.monotonic() - started)

    def _remark(self, subject: str, read: Read) -> None:
        if read.remark:
            print(f"[{subject} {read.remark}]", file=sys.stderr)

    def _say_done(self, num_tokens: int, seconds: float) -> None:
        print(f"[{self.loaded.checkpoint}: {num_tokens} tokens in {seconds:.1f} s]", file=sys.stderr)


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file of prompts; a text line becomes {"prompt": line}, and blank lines are skipped."""
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
        raise DataError(f"{path} has no prompt; write one on each line")
    return records


def _text_record(line: str, where: str) -> dict[str, Any]:
    return {"prompt": line.removesuffix("\r")}


def _json_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if isinstance(record, dict) and ("messages" in record or isinstance(record.get("prompt"), str)):
        return record
    raise DataError(f'{where} has no prompt; each line must be an object like {{"prompt": "Once upon"}}')


def write_line(value: Mapping[str, Any]) -> None:
    """Write an object to standard output as a JSON line in UTF-8, for any encoding of the terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(as_line(value))
    sys.stdout.buffer.flush()
