"""`bigtx generate`: continue texts with a trained run, or answer them if it was fine-tuned to answer; and `bigtx chat`:
chat with a run that was trained on chats, on a terminal or through a pipe.

Standard output of `bigtx chat` has only the answers; all other output goes to standard error. torch is imported only
after the arguments, the prompts and the run folder have been checked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.api import LoadedModel, load, refuse_chatless, refuse_wordless
from bigtx.config.schema import FinetuneConfig
from bigtx.config.schema.tasks import ANSWERING
from bigtx.engine.trained import find
from bigtx.finetuning.prediction_output import write_lines
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import BigtxError, ConfigError, DataError, writes
from bigtx.utils.files import json_value, read_text
from bigtx.utils.log import say_json
from bigtx.utils.options import add_loading_options, add_writing_options, given_writing_options
from bigtx.utils.terminal import columns

if TYPE_CHECKING:
    from bigtx.finetuning.tasks.chats import Read


BATCH_SIZE = 16
"""The number of prompts of a file that are continued in one batch."""


def generate_command(argv: Sequence[str]) -> None:
    """Run `bigtx generate`.

    Raises:
        BigtxError: the run, the prompts or the settings cannot be used.
    """
    arguments = _generate_parser().parse_args(argv)
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
    else:
        job.answer(arguments.prompt, as_json=arguments.json, shows_prompt=shows_prompt)


def _generate_parser() -> Arguments:
    parser = Arguments(
        "generate",
        "Continue prompts with a trained model, or answer them if it was fine-tuned to answer: one prompt, "
        "whose text is shown as it grows, or a file of prompts, whose texts are JSON lines on standard output.",
        json="the text of a single prompt as a JSON object, when it is complete",
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
    return parser


@dataclass
class _Job:
    """One call of the command."""

    loaded: LoadedModel
    options: dict[str, Any]
    raw: bool

    def answer(self, prompt: str, *, as_json: bool, shows_prompt: bool) -> None:
        """Print a new text as it grows; or, when it is complete, the text and how it ended as a JSON object."""
        read = self.loaded.read(prompt, raw=self.raw, options=self.options)
        self._remark("the prompt", read)
        if shows_prompt and not as_json:
            print(prompt, end="", flush=True)
        started = time.monotonic()
        show = None if as_json else lambda _, text: print(text, end="", flush=True)
        (written,) = self.loaded.write([read], on_text=show, **self.options)
        if as_json:
            facts = {"checkpoint": str(self.loaded.checkpoint), "prompt": prompt, "completion": written.text}
            say_json(facts | {"num_tokens": written.num_tokens, "ended_by": written.ended_by})
        else:
            print(flush=True)
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
                write_lines([record | {"completion": written.text}])
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
    lines = read_text(path).split("\n")
    if path.suffix == ".txt":
        records = [{"prompt": line.removesuffix("\r")} for line in lines if line.strip()]
    else:
        given = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        records = [_json_record(line, f"{path}, line {number}") for number, line in given]
    if not records:
        raise DataError(f"{path} has no prompt; write one on each line")
    return records


def _json_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json_value(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if isinstance(record, dict) and ("messages" in record or isinstance(record.get("prompt"), str)):
        return record
    raise DataError(f'{where} has no prompt; each line must be an object like {{"prompt": "Once upon"}}')


PROMPT = "> "
_COMMANDS = columns(
    {
        "/reset": "start a new chat; the system prompt is kept",
        "/save FILE.jsonl": "add the chat to a file as one line, for data.train=FILE.jsonl",
        "/help": "show this list",
        "/quit": "end the program, as Ctrl-D does",
    }.items()
)
HELP = "\n".join([*_COMMANDS, "Ctrl-C ends an answer. A message that starts with / is written with //"])


def chat_command(argv: Sequence[str]) -> None:
    """Run `bigtx chat`.

    Raises:
        BigtxError: the run or the settings cannot be used, or a line from a pipe cannot be answered.
    """
    arguments = _chat_parser().parse_args(argv)
    options = given_writing_options(arguments)
    refuse_chatless(find(arguments.run)[1], arguments.run)
    loaded = load(arguments.run, weights=arguments.weights, device=arguments.device)
    chat = _Chat(loaded, options, arguments.system, arguments.json)
    if sys.stdin is not None and sys.stdin.isatty():
        _talk(chat)
    else:
        _answer_lines(chat)


def _chat_parser() -> Arguments:
    parser = Arguments(
        "chat",
        "Chat with a run that was trained on chats (finetune/chat.yaml). If standard input is not a "
        "terminal, each line of it is a message; the answers are written to standard output.",
        json="a JSON object for each answer",
        epilog=f"While it runs:\n{HELP}",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt, at the beginning of the chat (none)")
    add_writing_options(parser)
    add_loading_options(parser)
    return parser


@dataclass
class _Chat:
    """A chat so far.

    Attributes:
        system: its system prompt, if any.
        messages: the messages and answers in turn, without the system prompt.
        num_left_out: the number of messages that the model no longer reads.
    """

    loaded: LoadedModel
    options: dict[str, Any]
    system: str | None
    json: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    num_left_out: int = 0

    def answer(self, text: str, *, may_interrupt: bool) -> None:
        """Answer a message, and show the answer as it grows.

        Args:
            may_interrupt: whether Ctrl-C ends only the answer.

        Raises:
            DataError: the message cannot be encoded.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        read = self.loaded.read(self._with_system(messages), options=self.options)
        if read.remark and read.num_left_out != self.num_left_out:
            say(f"the chat {read.remark}")
        self.num_left_out = read.num_left_out
        parts: list[str] = []
        ended_by, num_tokens = "interrupt", None

        def show(index: int, part: str) -> None:
            parts.append(part)
            if not self.json:
                print(part, end="", flush=True)

        try:
            # Each turn has its own random numbers; the same turn of the same chat has the same ones.
            turn = len(self.messages) // 2
            (written,) = self.loaded.write([read], first_index=turn, on_text=show, **self.options)
            ended_by, num_tokens = written.ended_by, written.num_tokens
        except KeyboardInterrupt:
            if not may_interrupt:
                raise
        answer = "".join(parts)
        if self.json:
            write_lines([{"prompt": text, "response": answer, "num_tokens": num_tokens, "ended_by": ended_by}])
        else:
            print(flush=True)
        if answer.strip():
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        else:
            say("the answer is empty; the message and the answer are not kept in the chat")

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + messages

    def obey(self, line: str) -> bool:
        """Run the command of a line that starts with /. Return whether the chat continues.

        Raises:
            DataError: there is no such command.
            LaunchError: the file to save to cannot be written.
        """
        name, _, argument = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self.messages, self.num_left_out = [], 0
            say("a new chat begins")
        elif name == "/save":
            self._save(argument.strip())
        elif name == "/help":
            print(HELP, file=sys.stderr)
        else:
            raise DataError(
                f"there is no command {name}; /help shows all. A message that starts with / is written with //: /{name}"
            )
        return True

    def _save(self, name: str) -> None:
        if not name.endswith(".jsonl"):
            raise DataError("/save needs the name of a file of JSON lines: /save NAME.jsonl")
        if not self.messages:
            raise DataError("there is nothing to save: no message has been answered yet")
        path = Path(name).expanduser()
        line = json.dumps({"messages": self._with_system(self.messages)}, ensure_ascii=False) + "\n"
        with writes(path), open(path, "a+b") as file:
            file.seek(0)
            before = file.read()
            gap = b"\n" if before and not before.endswith(b"\n") else b""
            file.write(gap + line.encode())
        lines = (before + gap).splitlines()
        say(f"saved as line {len(lines) + 1} of {path}")


def say(text: str) -> None:
    """Print a line that is not an answer to standard error."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def _talk(chat: _Chat) -> None:
    """Chat on a terminal."""
    import readline  # noqa: F401 - adds line editing to input()

    say(f"{chat.loaded.checkpoint}; /help shows the commands, Ctrl-D ends the chat")
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise
        try:
            if not _take(chat, line, may_interrupt=True):
                return
        except BigtxError as error:
            say(str(error))


def _answer_lines(chat: _Chat) -> None:
    """Answer the message in each line of standard input.

    Raises:
        BigtxError: a line cannot be answered; the message names it.
    """
    for number, line in enumerate(_lines(), start=1):
        try:
            if not _take(chat, line.decode(), may_interrupt=False):
                return
        except UnicodeDecodeError as error:
            reason = f"it is not UTF-8: {error.reason} at byte {error.start + 1}"
            raise DataError(f"standard input, line {number}: {reason}") from None
        except BigtxError as error:
            raise type(error)(f"standard input, line {number}: {error}") from None


def _lines() -> Iterator[bytes]:
    """Yield the lines of standard input as they arrive; none if it is closed."""
    if sys.stdin is None:
        return
    with os.fdopen(os.dup(sys.stdin.fileno()), "rb") as stream:
        yield from iter(stream.readline, b"")


def _take(chat: _Chat, line: str, *, may_interrupt: bool) -> bool:
    """Answer a message or run a command. Return whether the chat continues."""
    text = line.rstrip("\r\n")
    if not text.strip():
        return True
    if text.startswith("/") and not text.startswith("//"):
        return chat.obey(text)
    chat.answer(text[1:] if text.startswith("//") else text, may_interrupt=may_interrupt)
    return True
