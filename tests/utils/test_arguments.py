"""One grammar for every option: name=value, with --name value beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bigtx.utils.arguments import Arguments, take
from bigtx.utils.errors import ConfigError
from bigtx.utils.terminal import WIDTH


def parser() -> Arguments:
    made = Arguments("try", "Try the grammar. " * 12)
    made.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    data = made.add_mutually_exclusive_group(required=True)
    data.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    data.add_argument("--input", metavar="FILE", nargs="+", help="files, folders and globs, of which there are many")
    made.add_argument("--set", metavar="KEY=VALUE", nargs="+", default=[], help="settings")
    made.add_argument("--text", action="append", default=[], help="may be repeated")
    made.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="tokens (128)")
    made.add_argument("--weights", choices=["master", "ema"], default="master", help="100%% of them (master)")
    made.add_argument("--output", metavar="FOLDER", help="folder to make")
    return made


def read(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*words)
    message = str(caught.value)
    assert message.startswith("bigtx try: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "words",
    [
        ["r", "prompt=a = b", "max_new_tokens=5", "--json"],
        ["--json", "max-new-tokens=5", "r", "prompt=a = b"],
        ["r", "--prompt", "a = b", "--max-new-tokens", "5", "--json"],
        ["--max_new_tokens=5", "--prompt=a = b", "--json", "--", "r"],
        ["prompt=a = b", "run=r", "max_new_tokens=4", "max_new_tokens=5", "--json"],
        ["--run", "r", "--prompt=a = b", "max_new_tokens=5", "--json"],
    ],
)
def test_every_form_means_the_same(words: list[str]) -> None:
    options = read(*words)
    assert (options.run, options.prompt, options.max_new_tokens, options.json) == (Path("r"), "a = b", 5, True)
    assert (options.weights, options.output, options.set) == ("master", None, [])


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["input=a.txt"], ["a.txt"]),
        (["input=[a.txt, b c.txt]"], ["a.txt", "b c.txt"]),
        (["input=a.txt", "input=b.txt"], ["a.txt", "b.txt"]),
        (["--input", "a.txt", "b.txt", "output=o"], ["a.txt", "b.txt"]),
        (["--input", "a.txt", "--input=b.txt"], ["a.txt", "b.txt"]),
        (["input=-"], ["-"]),
        (["--input", "-", "--json"], ["-"]),
        (["input=[0-9].txt"], ["[0-9].txt"]),
    ],
)
def test_several_values(words: list[str], values: list[str]) -> None:
    assert read("r", *words).input == values


def test_values_are_taken_as_they_are() -> None:
    assert read("r", "prompt=").prompt == "" and read("r", "--prompt", "").prompt == ""
    assert read("r", "--prompt", "-5 degrees").prompt == "-5 degrees"
    assert read("r", "--prompt", "json").prompt == "json"
    assert read("r", "prompt=--json").prompt == "--json" and not read("r", "prompt=--json").json
    assert read("r", "prompt=x", "text=[a]", "text=b=c").text == ["[a]", "b=c"]
    assert read("r", "prompt=x", "-o", "out").output == "out" == read("r", "prompt=x", "-o=out").output


def test_settings_of_the_run_need_no_option() -> None:
    assert read("r", "prompt=x", "translate.num_beams=1", "set=a.b=[1,2]").set == ["translate.num_beams=1", "a.b=[1,2]"]
    assert read("r", "prompt=x", "--set", "a.b=1", "c.d=2").set == ["a.b=1", "c.d=2"]


def test_a_path_may_hold_the_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1", "output=x"):
        (tmp_path / name).mkdir()
    assert read("lr=1", "prompt=x").run == Path("lr=1")
    assert read("a/lr=2", "prompt=x").run == Path("a/lr=2") and read("./lr=2", "prompt=x").run == Path("lr=2")
    assert read("run=lr=2", "prompt=x").run == Path("lr=2")
    assert (options := read("r", "output=x", "prompt=x")).output == "x" and options.run == Path("r")
    assert "a path with = in it is written ./PATH" in refusal("lr=2", "prompt=x")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "RUN and prompt=TEXT or input=FILE are missing; write bigtx try RUN (prompt=TEXT | input=FILE)"),
        (["r"], "prompt=TEXT or input=FILE is missing"),
        (["r", "promt=x"], "no option promt; did you mean prompt=TEXT?"),
        (["r", "--max-tokens", "5"], "no option --max-tokens; did you mean max_new_tokens=N?"),
        (["model=r", "prompt=x"], "no option model; did you mean run=RUN?"),
        (["r", "prompt=x", "zzz=1"], "no option zzz; `bigtx help try` shows all"),
        (["r", "prompt=x", "max_new_tokens=many"], "max_new_tokens=many: is not a whole number"),
        (["r", "prompt=x", "weights=best"], "weights=best: is not one of master, ema"),
        (["r", "prompt=x", "input=y"], "prompt=TEXT and input=FILE cannot be given together"),
        (["r", "prompt=x", "json=true"], "json is a switch and takes no value; write --json"),
        (["r", "prompt=x", "--json=1"], "--json takes no value; write --json"),
        (["r", "prompt=x", "json"], "json has no value; write --json"),
        (["r", "prompt", "x"], "prompt has no value; write prompt=TEXT, without spaces"),
        (["r", "--prompt", "--json"], "--prompt has no value; write prompt=TEXT"),
        (["r", "Once", "upon"], "'Once' is one word too many; an option is written NAME=VALUE, e.g. prompt=TEXT"),
    ],
)
def test_mistakes(words: list[str], expected: str) -> None:
    assert expected in refusal(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", "plain-secret"],
        ["--api-key=plain-secret"],
        ["api_key=plain-secret"],
        ["--wandb-login", "plain-secret", "max_new_tokens=x"],
    ],
)
def test_values_of_unknown_options_are_not_repeated(words: list[str]) -> None:
    assert "plain-secret" not in refusal("r", "prompt=x", *words)


def test_help_is_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("wrong", "words", "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: bigtx try RUN (prompt=TEXT | input=FILE) [NAME=VALUE ...] [--json]\n")
    assert "max_new_tokens=N" in shown and "weights=master|ema" in shown and "100% of them" in shown
    assert "also -o FOLDER" in shown and "--max-new-tokens" not in shown
    assert max(map(len, shown.splitlines())) <= WIDTH


@pytest.mark.parametrize("words", [["part=2/3"], ["--part=2/3"], ["--part", "2/3"], ["part=1/3", "part=2/3"]])
def test_a_name_is_taken_out_of_settings(words: list[str]) -> None:
    assert take(["a.yaml", *words, "output=x"], "part") == ("2/3", ["a.yaml", "output=x"])


def test_a_name_that_is_not_there() -> None:
    assert take(["apart=1", "a.part=2"], "part") == (None, ["apart=1", "a.part=2"])
    assert take(["--part"], "part") == ("", [])


def test_what_stands_below_the_options_is_shown_as_it_is() -> None:
    shown = Arguments("try", epilog="While it runs:\n  /quit   end").format_help()
    assert shown.endswith("print this\n\nWhile it runs:\n  /quit   end\n")
