"""All advice in the source is followed by a test, and what messages name is there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from advice.messages import OPTIONS, PACKAGE, REGISTRY, advice, constants, is_advice, is_made_from, messages, texts_of
from advice.test_advice_followed import CASES
from config.test_advice import CASES as CONFIG_CASES
from config.test_advice import places  # noqa: F401 - a fixture
from doors import ROOT

from bigtx.cli import COMMANDS, main
from bigtx.commands.suggestions import MEANT
from bigtx.config.load import load
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import find, leaves
from bigtx.utils.errors import ConfigError

WITHOUT = 75

SCHEMAS = (PretrainConfig, FinetuneConfig, PrepareConfig, TokenizerTrainConfig)
SECTIONS = sorted({setting.key.split(".")[0] for schema in SCHEMAS for setting in leaves(schema) if "." in setting.key})
SETTING = re.compile(rf"(?<![\w./{{'-])(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+(?![\w(./{{])")
COMMAND = re.compile(r"`bigtx ([a-z]+)(?: ([a-z]+))?")


def entries() -> Iterator[tuple[str, str]]:
    """Each line of the list: a module, and words of a message."""
    for module, followed in REGISTRY["followed"].items():
        yield from ((module, words) for words in followed)
    for table in REGISTRY["reasons"].values():
        yield from ((module, words) for module, listed in table.items() for words in listed)


def texts(module: str) -> set[str]:
    return {message.text for message in advice() if message.place.partition(":")[0] == module}


def meant(module: str, words: str) -> set[str]:
    """The texts that a line of the list is about: the one that is equal, or those with these words."""
    found = texts(module)
    return {words} & found or {text for text in found if words in text}


def test_each_advice_is_in_the_list_once() -> None:
    """A new message that advises something needs a line in tests/advice.yaml, and a case that does what it says."""
    assert len(advice()) > 500
    counts = Counter((module, text) for module, words in entries() for text in meant(module, words))
    missing = [f"{place}: {text}" for place, text in advice() if not counts[place.partition(":")[0], text]]
    assert not missing, "\n".join(missing)
    assert not [each for each, count in counts.items() if count > 1]


def test_each_line_of_the_list_is_about_one_message() -> None:
    assert not [(module, words) for module, words in entries() if len(meant(module, words)) != 1]


def test_the_tests_of_the_list_are_there() -> None:
    cases = {case.make.__name__ for case in CASES}
    for name in {name for followed in REGISTRY["followed"].values() for name in followed.values()}:
        file, _, function = name.partition("::")
        there = re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE) if function else name in cases
        assert there, name


def test_most_advice_is_followed() -> None:
    """The number of reasons may only fall: a new message gets a case."""
    assert sum(len(listed) for table in REGISTRY["reasons"].values() for listed in table.values()) <= WITHOUT


def test_what_looks_like_advice_is_found() -> None:
    """In a module of its own, so that the search cannot become blind."""
    source = (
        '"""write a=1"""\ndef f(x):\n    """Return; write b=1."""\n    raise Error(f"{x} is no; write c.d={x}")\n'
        'say("it is damaged; restore it from a copy")\nsay("5 steps")\nsay(f"no {x}; did you mean {y}?")\n'
        'say("it is missing: pip install \'bigtx[s3]\'")\nsay("Run `bigtx data verify` of it")\n'
    )
    found = [text for _, text in texts_of(ast.parse(source)) if is_advice(text)]
    assert [text[:12] for text in found] == [
        "{x} is no; w",
        "it is damage",
        "no {x}; did ",
        "it is missin",
        "Run `bigtx d",
    ]


def test_advice_of_configurations_is_made_from_its_texts(places: Path) -> None:  # noqa: F811
    """As the cases of this folder do themselves."""
    said = [_said(schema, arguments) for schema, arguments in CONFIG_CASES]
    for module, followed in REGISTRY["followed"].items():
        for words, name in followed.items():
            if name.startswith("tests/config/test_advice.py"):
                (text,) = meant(module, words)
                assert any(is_made_from(each, text) for each in said), words


def _said(schema: type, arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(schema, arguments)
    return str(caught.value)


def test_what_messages_name_is_there() -> None:
    known = {*COMMANDS, *(name.split()[0] for name in COMMANDS), "pretrain", "finetune"}
    wrong = []
    for place, text in messages():
        for key in SETTING.findall(text):
            if not any(find(schema, key) for schema in SCHEMAS):
                wrong.append(f"{place}: {key}")
        for first, second in COMMAND.findall(text):
            if first not in known or (f"{first} {second}" not in known and first not in COMMANDS and second):
                wrong.append(f"{place}: bigtx {first} {second}")
    assert not wrong, "\n".join(wrong)


def test_files_and_extras_that_messages_name_are_there() -> None:
    said = "\n".join(text for _, text in (*messages(), *constants()))
    extras = set(re.findall(r"\bbigtx\[(\w+)\]", said))
    assert (
        extras
        and extras <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    )
    recipes = set(re.findall(r"\b(?:pretrain|finetune|model|data|tokenizer)/[\w.-]+\.yaml\b", said))
    assert recipes and not [name for name in recipes if not (ROOT / "configs" / name).is_file()]
    pages = set(re.findall(r"\bdocs/[\w-]+\.md\b", said))
    assert pages and not [name for name in pages if not (ROOT / name).is_file()]
    targets = set(re.findall(r"`make ([a-z-]+)", said))
    assert not [name for name in targets if f"\n{name}:" not in (ROOT / "Makefile").read_text()]


def test_options_that_messages_name_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    """In a command that a message shows, each word with = is an option of the command or a setting."""
    shown = re.compile(r"\bbigtx ([a-z]+(?: [a-z]+)?)((?: [^\s`;,]+)*)")
    checked, wrong = 0, []
    for place, text in messages():
        for words, rest in shown.findall(text):
            name = next((each for each in (words, words.split()[0]) if each in COMMANDS), "")
            keys = re.findall(r"(?:^| )'?([a-z_]+(?:\.[a-z_]+)*)=", rest) if name else []
            if keys:
                main(["help", *name.split()])
                options = re.findall(r"^  ([a-z_]+)=", capsys.readouterr().out, re.MULTILINE)
                unknown = [key for key in keys if key not in options and not any(find(each, key) for each in SCHEMAS)]
                wrong += [f"{place}: bigtx {name} {key}=" for key in unknown]
                checked += len(keys)
    assert checked > 3 and not wrong, "\n".join(wrong)


def test_what_other_programs_call_a_command_leads_to_ours(capsys: pytest.CaptureFixture[str]) -> None:
    named = {command for text in MEANT.values() for command in re.findall(r"`(bigtx [^`]+)`", text)}
    assert len(named) > 10
    for command in named:
        words = command.removeprefix("bigtx ").replace("FILE", "finetune/chat.yaml").split()
        try:
            assert main([*words, "--help"]) == 0, command
        except SystemExit as end:
            assert not end.code, command


def test_options_are_shown_as_name_and_value() -> None:
    """A dash is for switches: no text says `--output FILE` or `-o FILE`."""
    names = "|".join(OPTIONS).replace("_", "[_-]")
    dashed = re.compile(rf"(?<![\w-])(?:--(?:{names})(?![\w-])|-o (?=[A-Z]))")
    wrong = [f"{place}: {text}" for place, text in constants() if dashed.search(text)]
    assert not wrong, "\n".join(wrong)


def test_numbers_of_settings_are_shown_as_they_are_written() -> None:
    """A setting of 1,024 would be read as a text."""
    grouped = re.compile(r"\b[a-z_]+\.?[a-z_.]+=\{[^{}]*:,\}")
    found = [path.name for path in PACKAGE.rglob("*.py") if grouped.search(path.read_text(encoding="utf-8"))]
    assert not found
