"""The texts in bigtx's source that a user may see, and what they advise."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from doors import ROOT

from bigtx.cli import COMMANDS, main

PACKAGE = ROOT / "bigtx"
REGISTRY: Any = yaml.safe_load((ROOT / "tests" / "advice.yaml").read_text(encoding="utf-8"))
"""The list of all advice, with the tests that follow it."""
LEAD = r"(?i:\b(?:write|set|add|also|e\.g\.|mean|by|needs|or|give|so|without|then|choose|use|allow more with):?,? )"
"""What stands before a setting that is to be written."""


def _options() -> list[str]:
    """The names of options with a value, as the help of the commands shows them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for command in COMMANDS:
            assert main(["help", *command.split()]) == 0
    return sorted(set(re.findall(r"^  ([a-z_]+)=", shown.getvalue(), re.MULTILINE)))


OPTIONS = _options()
COPYABLE = re.compile(
    LEAD + r"[\"'(]*(?:[a-z_]+(?:\.[\w]+)*|\{[^{}]*\})=(?!=)"  # a setting with a value
    r"|=\S+ (?:is enough|would|cuts)\b|; write \{|use is \{|=THIS_RUN"
    r"|`(?:bigtx |wandb |hf |\{_)|\bbigtx-finetune \{|\bdeepspeed --"
    r"|\bbigtx (?:tokenizer|data|import|export|generate|predict|evaluate|chat|configs|pretrain|finetune) "
    r"|(?<=.)(?<![\w-])--[a-z]"
    rf"|(?<=[\s(`])(?:{'|'.join(OPTIONS)})=[\w.-]"  # an option with a value
    r"|(?<![\w.~}/])/(?:help|quit|reset|save)\b"  # a command of a chat
    r"|\{(?:shell\.)?(?:settings?|command)\("
    r"|\b(?:pip install|iconv|jq|ffmpeg|ulimit|unset) "
)
"""What a user can copy: a setting with a value, a command, an option, or what the package writes as such."""
VERBS = (
    "add|allow|ask|begin|build|change|check|choose|close|continue|convert|copy|create|delete|drop|edit|export|fetch|fix|free"
    "|give|import|increase|install|keep|leave|let|look|lower|make|mount|move|name|need|open|pass|pick|point|prepare"
    "|print|put|raise|read|reduce|relax|remove|rename|repair|repeat|replace|restore|resume|run|save|see|select|send"
    "|set|shorten|show|shrink|split|start|stop|submit|take|train|try|turn|unset|update|upgrade|use|wait|write"
)
"""Of what a user can do."""
IMPERATIVE = re.compile(
    rf"(?:^[\s(;,]*|[;:.?!(][ )]|, (?:or |and |then )?|\b(?:or|and) )(?i:{VERBS}) |\bdid you mean\b|; see ",
    re.MULTILINE,
)
"""Where a text tells a user to do something."""
NO_MESSAGES = ("add_argument", "columns", "compile", "Arguments", "_corpus_parser", "parse_command_line")
"""Calls whose texts are help and patterns."""


class Message(NamedTuple):
    """A text of the source, with braces around what is filled in."""

    place: str
    text: str


@functools.cache
def messages() -> list[Message]:
    """All texts of the package that are more than a word, without docstrings, help and assertions."""
    return [
        Message(f"{path.relative_to(PACKAGE).as_posix()}:{number}", text)
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, text in texts_of(ast.parse(path.read_text(encoding="utf-8")))
    ]


@functools.cache
def advice() -> list[Message]:
    """The texts that advise something."""
    return [message for message in messages() if is_advice(message.text)]


def is_advice(text: str) -> bool:
    return bool(COPYABLE.search(text) or IMPERATIVE.search(text))


@functools.cache
def told_by(case: str) -> list[str]:
    """The texts of the source that the list says to be followed by a case."""
    found = []
    for module, followed in REGISTRY["followed"].items():
        for words in (words for words, name in followed.items() if name == case):
            own = {message.text for message in advice() if message.place.partition(":")[0] == module}
            found += {words} & own or [text for text in own if words in text]
    return found


def fixed_pieces(text: str) -> list[str]:
    """What stands outside of the braces of a text, in its order."""
    pieces, depth = [""], 0
    for sign in text:
        depth += sign == "{"
        if not depth:
            pieces[-1] += sign
        elif sign == "}" and depth == 1:
            pieces.append("")
        depth -= sign == "}"
    return [piece for piece in pieces if piece.strip()]


def is_made_from(said: str, text: str) -> bool:
    """Whether what was printed holds a text of the source, its braces filled in."""
    place = 0
    for piece in fixed_pieces(text):
        place = said.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def constants() -> Iterator[Message]:
    """All constant texts of the package, help included, but for docstrings and the names of options themselves."""
    for path in sorted(PACKAGE.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        left_out = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            if isinstance(node, ast.Call) and _name(node.func) == "add_argument":
                left_out += node.args
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
                yield Message(f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno}", node.value)


def texts_of(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The texts below a node that a user may see, with their lines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Assert) or (isinstance(child, ast.Call) and _name(child.func) in NO_MESSAGES):
            continue
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.JoinedStr):
            yield child.lineno, "".join(map(_piece, child.values))
        elif isinstance(child, ast.Constant) and isinstance(child.value, str) and " " in child.value:
            yield child.lineno, child.value
        elif not isinstance(child, ast.Dict) or not _are_titles(child):
            yield from texts_of(child)


def _piece(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    assert isinstance(value, ast.FormattedValue)
    return f"{{{ast.unparse(value.value)}}}"


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _are_titles(table: ast.Dict) -> bool:
    """Whether a table's keys are commands or options, and its values say what they are for."""
    keys = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    return bool(keys) and all(
        str(key).startswith(("--", "bigtx ", "data ", "pretraining ", "tokenizer ")) for key in keys[:1]
    )
