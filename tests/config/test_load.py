from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
import textwrap
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigtx.config.load import from_dict, load, parse_command_line, to_dict, to_yaml, with_settings
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import NAME, leaves
from bigtx.utils.errors import ConfigError


def read(*args: str | Path) -> PretrainConfig:
    return load(PretrainConfig, [str(argument) for argument in args], check=False)


def refusal(*args: str | Path, check: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, [str(argument) for argument in args], check=check)
    return str(caught.value)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def test_the_line_that_explains_a_setting_is_one_paragraph() -> None:
    with pytest.raises(
        ConfigError, match=r"memory=1 .*is too small.*a longer one is rejected|memory=1 .*is rejected"
    ) as caught:
        load(PrepareConfig, ["memory=1"], check=False)
    assert "\n" not in str(caught.value)


def test_later_files_and_arguments_win(tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", "seed: 2\ntrain: {max_steps: 10, sequence_length: 1k}\n")
    second = write(tmp_path, "second.yaml", "train:\n  max_steps: 20\n")
    config = read("seed=3", first, second)
    assert (config.seed, config.train.max_steps, config.train.sequence_length) == (3, 20, 1000)
    assert config.model == PretrainConfig().model


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("train.max_tokens=10B", "train.max_tokens", 10**10),
        ("train.max_steps=null", "train.max_steps", None),
        ("train.gradient_clipping=0", "train.gradient_clipping", 0.0),
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("optimizer.eps=1e-8", "optimizer.eps", 1e-8),
        ("engine.compile=true", "engine.compile", "true"),
        ("engine.deterministic=true", "engine.deterministic", True),
        ("track.wandb=off", "track.wandb", "off"),
        ("track.project=010", "track.project", "010"),
        ("track.project='null'", "track.project", "null"),
        ("track.group=12:30", "track.group", "12:30"),
        ("track.group=", "track.group", None),
        ("track.tags=[a, 'b c', on, 010]", "track.tags", ["a", "b c", "on", "010"]),
        ("track.tags=[]", "track.tags", []),
        ("track.tags=a", "track.tags", ["a"]),
        ("validation.sample_prompts=Hello, world", "validation.sample_prompts", ["Hello, world"]),
        ("schedule.warmup=5 %", "schedule.warmup", "5 %"),
        ("run_dir=runs/a=b", "run_dir", "runs/a=b"),
        ("run_dir=", "run_dir", ""),
        ("validation.sample_prompts=[\"def f(x):\\n\", 'it''s']", "validation.sample_prompts", ["def f(x):\n", "it's"]),
        ("data.sources.wiki.path=w", "data.sources.wiki.path", "w"),
        ("data.sources={wiki: {path: w, weight: 2}}", "data.sources.wiki.weight", 2.0),
        (
            "deepspeed.zero_optimization.round_robin_gradients=true",
            "deepspeed.zero_optimization.round_robin_gradients",
            True,
        ),
        ("deepspeed.x=[1, 2.5, a, '3', null]", "deepspeed.x", [1, 2.5, "a", "3", None]),
    ],
)
def test_values(argument: str, key: str, value: Any) -> None:
    found: Any = to_dict(read(argument))
    for name in key.split("."):
        found = found[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.max_stepz=1", "did you mean train.max_steps?"),
        ("modle.num_layers=1", "did you mean model"),
        ("learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("optimizer.lr=1", "did you mean optimizer.learning_rate"),
        ("model.n_layer=1", "did you mean model.num_layers"),
        ("train.learning_rate=1", "did you mean optimizer.learning_rate"),
        ("data.sources.wiki.pth=x", "did you mean data.sources."),
        ("zzz=1", "`bigtx configs explain`"),
        ("train.max_steps=many", "is not a count|is not a whole number"),
        ("train.max_steps=1.5", "not a whole number"),
        ("model.num_layers=8.0", "not a whole number"),
        ("model.num_layers=12:30", "base 60"),
        ("model.num_layers=010", "octal.*write 10"),
        ("model.num_layers='8'", "without"),
        ("model.num_layers=null", "no value"),
        ("model.num_layers=[8]", "is a list"),
        ("model.num_layers={a: 8}", "is a mapping"),
        ("model.num_layers=0", "the least is 1"),
        ("model.dropout=1.5", "the most is 0.9"),
        ("model.dropout=nan", "not a number"),
        ("model.dropout=1e999", "not a number"),
        ("model.norm=batch", "not one of rms, layer"),
        ("model.norm=LAYER", "did you mean layer"),
        ("engine.deterministic=yes", "write true"),
        ("engine.deterministic=off", "write false"),
        ("engine.deterministic=1", "not true or false"),
        ("track.project=null", "write '' for an empty text"),
        ("track.tags={a: b}", r"write track\.tags=TEXT, or 'track\.tags=\[TEXT,TEXT\]'"),
        ("track.tags=null", r"write track\.tags=TEXT, or 'track\.tags=\[TEXT,TEXT\]'"),
        ("track.tags=[[a]]", "is not text"),
        ("train.log_every=500", "500 steps"),
        ("train.log_every=12:30", "30 min"),
        ("train.log_every=3 epochs", "30 min"),
        ("train=3", "is a section"),
        ("data.sources=wiki", "entries by name"),
        ("data.sources.a/b=x", "not a YAML file and not key=value|no file"),
        ("data.sources={'a b': {path: x}}", "cannot be a name"),
        ("deepspeed=3", "keys and values"),
        ("deepspeed.a=on", "write true, or quotes"),
        ("deepspeed.a=12:30", "base 60"),
        ("run_dir=${oc.env:HOME}", "never replaces"),
        ("run_dir=runs/${seed}", "never replaces"),
        ("track.tags=['${oc.env:USER}']", "never replaces"),
        ("deepspeed.a=${now:}", "never replaces"),
        ("run_dir=???", "missing value"),
        ("track.tags=['???']", "missing value"),
        ("deepspeed.a=???", "missing value"),
        ("train..max_steps=1", "part of the key is empty"),
        ("=1", "no file"),
        ("track.tags=[a", "not YAML"),
        ("track.tags=[*x]", "not YAML|alias"),
        ("track.tags=[!!python/name:os.system a]", "tag"),
        ("--train.max_steps=1", "settings are written KEY=VALUE: train.max_steps=1"),
        ("--max-steps=1", "settings are written KEY=VALUE: train.max_steps=1"),
        ("--steps=5", "settings are written KEY=VALUE: train.max_steps=5"),
        ("--output=x", "settings are written KEY=VALUE: run_dir=x"),
        ("-o=x", "settings are written KEY=VALUE: run_dir=x"),
        ("--learning-rat=1", r"KEY=VALUE; did you mean optimizer\.learning_rate=VALUE"),
        ("--verbose", "--help shows all"),
        ("--dry-runn", "did you mean --dry-run?"),
        ("train.max_steps", r"write train\.max_steps=VALUE, without spaces"),
        ("train.max_steps=[1", r"command line: 'train.max_steps=\[1' is not YAML"),
        (tempfile.gettempdir(), r"is a folder.*did you mean data\.sources\.mine\.path="),
    ],
)
def test_refused_arguments(argument: str, words: str) -> None:
    text = refusal(argument)
    assert re.search(words, text), text
    assert "Traceback" not in text and "\n" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "train:\n  max_steps: 1\n  max_steps: 2\n",
            r"train\.max_steps .*\.yaml:3\): is a duplicate; the first is at .*\.yaml:2",
        ),
        (
            "train.max_steps: 1\n",
            r"\.yaml:1\): no such setting; in a file, max_steps is on a line of its own below train:",
        ),
        ("- a\n", "no keys at the top"),
        ("just text\n", "no keys at the top"),
        ("a: [\n", r"\.yaml:2: is not YAML"),
        ("seed: 1\n---\nseed: 2\n", "not YAML"),
        ("seed: &x 1\ntrain: {max_steps: *x}\n", r"train\.max_steps .*\.yaml:2\): uses a YAML alias"),
        ("train: &a {b: *a}\n", "alias"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "alias"),
        ("train: {<<: {max_steps: 1}}\n", "YAML merge"),
        ("? [a]\n: b\n", "not a plain name"),
        ("run_dir: !!python/object/apply:os.system [touch /tmp/never]\n", "YAML tag"),
        ("track: {api_key: 0123456789abcdef}\n", "looks like a secret"),
        ("deepspeed: {hf_token: 0123456789abcdef}\n", "looks like a secret"),
        ("run_dir: https://user:hunter2hunter2@host/x\n", "looks like a secret"),
        ("base: missing.yaml\n", r"\.yaml:1\): no file .*missing\.yaml"),
        ("base: {a: b}\n", "a file or a list of files"),
        ("seed: \x00\n", "not YAML"),
        ("run_dir: " + "[" * 3000, r"\.yaml:1: is not YAML: it is nested more than 100 levels deep"),
        (
            "".join(f"{' ' * level}a:\n" for level in range(1500)),
            r"\.yaml:100: is not YAML: it is nested more than 100",
        ),
    ],
)
def test_refused_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = refusal(path)
    assert re.search(words, message), message
    for secret in ("0123456789abcdef", "hunter2"):
        assert secret not in message


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(path)
    assert "cannot be read" in refusal(tmp_path / "config.yaml", tmp_path / "config.yaml")
    assert "no file" in refusal(tmp_path / "absent.yaml")


def test_every_problem_is_reported_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "config.yaml", "model:\n  hiden_size: 64\n  num_layers: no\nengine:\n  zero_stage: 7\n")
    message = refusal(path, "train.max_steps=abc", "nofile.yaml", "foo=1")
    lines = message.splitlines()
    assert lines[0] == "6 problems in the configuration:"
    assert len(lines) == 7
    assert f"model.hiden_size=64 ({path}:2): no such setting; did you mean model.hidden_size?" in message
    assert f"engine.zero_stage=7 ({path}:5): is too large; the most is 3" in message
    assert "train.max_steps=abc (command line)" in message


def test_of_many_problems_the_first_are_shown_whole(tmp_path: Path) -> None:
    lines = refusal(*(f"train.a{number}={number}" for number in range(100))).splitlines()
    assert (lines[0], lines[-1]) == ("100 problems in the configuration:", "  and 80 more")
    assert [f"train.a{number}" in line for number, line in enumerate(lines[1:-1])] == [True] * 20
    at_the_limit = refusal(*(f"train.a{number}={number}" for number in range(20))).splitlines()
    assert len(at_the_limit) == 21 and "train.a19" in at_the_limit[-1]


@pytest.mark.parametrize("name", ["a" * 300, "b" * 300 + "/c.yaml", "nul\0.yaml"])
def test_a_name_that_no_file_can_have_is_refused_as_a_missing_one(tmp_path: Path, name: str) -> None:
    """The system does not only say that there is no such file: the name is too long."""
    assert "no file" in refusal(name)
    assert "no file" in refusal(write(tmp_path, "own.yaml", f"base: {json.dumps(name)}\n"))
    assert "no file" in refusal(write(tmp_path, "list.yaml", f"base: [{json.dumps(name)}]\n"))
    for schema in (PretrainConfig, FinetuneConfig, PrepareConfig, TokenizerTrainConfig):
        for setting in leaves(schema):
            if setting.kind == "path" and "\0" not in name:
                key = setting.key.replace(NAME, "a")
                with contextlib.suppress(ConfigError):
                    load(schema, [f"{key}=[{name}]" if typing.get_origin(setting.type) is list else f"{key}={name}"])


def test_base_files_are_found_from_where_they_are_named(tmp_path: Path) -> None:
    write(tmp_path, "model/small.yaml", "model: {num_layers: 2, num_heads: 2}\n")
    write(tmp_path, "common.yaml", "base: model/small.yaml\nseed: 5\nmodel: {num_heads: 4}\n")
    write(tmp_path, "more.yaml", "seed: 6\ntrack: {tags: [a, b]}\n")
    top = write(tmp_path, "runs/top.yaml", "base: [../common.yaml, ../more.yaml]\ntrack: {tags: [c]}\ntrain:\n")
    config = read(top)
    assert (config.model.num_layers, config.model.num_heads, config.seed, config.track.tags) == (2, 4, 6, ["c"])


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    assert "is circular" in refusal(tmp_path / "a.yaml")
    # Twice the same file without a circle is none.
    write(tmp_path, "c.yaml", "seed: 4\n")
    assert read(write(tmp_path, "d.yaml", "base: [c.yaml, c.yaml]\n")).seed == 4


def test_null_takes_an_entry_out(tmp_path: Path) -> None:
    below = write(tmp_path, "below.yaml", "data: {sources: {a: {path: x}, b: {path: y}}}\n")
    assert list(read(below, "data.sources.a=null").data.sources) == ["b"]
    assert read(below, "data.sources=null").data.sources == {}
    assert read(below, "data.sources.a.path=z").data.sources["a"].path == "z"


def test_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    below = write(tmp_path, "below.yaml", "train: {max_steps: 3}\n")
    assert read(below, write(tmp_path, "above.yaml", "train:\n  # all commented out\n")).train.max_steps == 3


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "shipped/pretrain/tiny.yaml", "seed: 9\n")
    monkeypatch.setattr("bigtx.config.runs.shipped_folder", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert read("pretrain/tiny.yaml").seed == read("configs/pretrain/tiny.yaml").seed == 9
    write(tmp_path, "pretrain/tiny.yaml", "seed: 10\n")
    assert read("pretrain/tiny.yaml").seed == 10


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGTX_SEED", "7")
    monkeypatch.setenv("SEED", "7")
    assert read() == PretrainConfig()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda text: "${" not in text and text != "???"
)


@settings(max_examples=40)
@example(
    {"deepspeed": {"ax": "Infinity", "bx": "y", "cx": "nan", "dx": "12:30", "ex": "010", "fx": "0E0", "gx": "1_0"}}
)
@given(
    st.fixed_dictionaries(
        {
            "run_dir": TEXT,
            "validation": st.fixed_dictionaries({"sample_prompts": st.lists(TEXT, max_size=3)}),
            "optimizer": st.fixed_dictionaries(
                {"learning_rate": st.floats(0, 1), "name": st.sampled_from(["adamw", "muon"])}
            ),
            "train": st.fixed_dictionaries({"max_tokens": st.none() | st.integers(1, 10**15)}),
            "deepspeed": st.dictionaries(
                st.from_regex(r"[a-z]{1,5}x", fullmatch=True),
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
                max_size=3,
            ),
        }
    )
)
def test_a_config_written_comes_back(values: dict[str, Any]) -> None:
    try:
        config = from_dict(PretrainConfig, values)
    except ConfigError as error:
        assert "secret" in str(error)
        return
    assert to_dict(config)["deepspeed"] == values["deepspeed"]
    text = to_yaml(config)
    assert yaml.safe_load(text) == to_dict(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(text, encoding="utf-8")
        assert read(path) == config


def test_from_dict_refuses_like_load() -> None:
    with pytest.raises(ConfigError, match=r"train\.max_steps=-1.*\n.*old=1: no such setting"):
        from_dict(PretrainConfig, {"train": {"max_steps": -1}, "old": 1})


def test_every_setting_is_documented() -> None:
    for setting in leaves(PretrainConfig):
        assert setting.doc, setting.key


def test_parse_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--local_rank=1", "seed=2", "--dry-run", "--local-rank", "0"]
    parsed = parse_command_line(PretrainConfig, argv, program="deepspeed bigtx/pretrain.py", check=False)
    assert (parsed.config.seed, parsed.dry_run) == (2, True)
    assert not parse_command_line(PretrainConfig, [], program="x", check=False).dry_run
    with pytest.raises(ConfigError, match="--dry-run"):
        parse_command_line(PrepareConfig, ["--dry-run"], program="x", flags=["--print-config"], check=False)
    with pytest.raises(SystemExit) as caught:
        parse_command_line(PretrainConfig, ["--help"], program="deepspeed bigtx/pretrain.py")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert shown.startswith("usage: deepspeed bigtx/pretrain.py [FILE.yaml ...] [KEY=VALUE ...]")
    for word in ("run_dir", "optimizer", "bigtx configs explain KEY", "--dry-run"):
        assert word in shown


def test_the_working_folder_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/somebody")
    monkeypatch.setenv("DATABASE_PASSWORD", "correct-horse")
    assert read("run_dir=/home/somebody/runs").run_dir == "/home/somebody/runs"
    message = refusal("run_dir=runs/correct-horse")
    assert "looks like a secret" in message and "correct-horse" not in message


def test_settings_of_a_command_change_what_may_change_freely_in_what_it_reads() -> None:
    config = FinetuneConfig(task="translate")
    changed = with_settings(config, ["translate.num_beams=1"], sections=("translate",))
    assert changed.translate.num_beams == 1 and config.translate.num_beams != 1
    assert dataclasses.replace(changed, translate=config.translate) == config
    for argument in ("translate.prefix=x", "train.log_every=1 steps", "translate.beams=1", "translate={}"):
        with pytest.raises(ConfigError, match=r"cannot be set here; the settings that can are translate\.num_beams"):
            with_settings(config, [argument], sections=("translate",))
    with pytest.raises(ConfigError, match="is too small"):
        with_settings(config, ["translate.num_beams=0"], sections=("translate",))


SECRET = "sk-0123456789abcdef0123456789"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-key", "plain-secret"],
        ["--api-key=plain-secret"],
        ["--apikey", "plain-secret", "train.max_steps=x"],
        ["api_key=plain-secret"],
        ["data.sources={api_key: plain-secret}"],
        ["track.tags={password: plain-secret}"],
        ["track.tags={a: [{token: plain-secret}]}"],
        ["train.max_steps={hf_token: plain-secret}"],
        ["optimizer={api_key: plain-secret}"],
        ["api_key=[plain-secret"],
        ["api_key..x=plain-secret"],
        [f"track.tags={{a: {SECRET}}}"],
        [f"train.max_steps={SECRET}"],
        [f"--seed={SECRET}"],
        [f"seed=[{SECRET}"],
    ],
)
def test_values_of_rejected_settings_are_not_repeated(arguments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, arguments, check=False)
    assert "plain-secret" not in str(caught.value) and SECRET not in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.yaml"], "no file 'absent.yaml'"),
        (["--lr", "3e-4"], "--lr: settings are written KEY=VALUE: optimizer.learning_rate=3e-4"),
        (["--steps", "5"], "--steps: settings are written KEY=VALUE: train.max_steps=5"),
        (["child.yaml"], "no file"),
        (["."], "is a folder, not a YAML file"),
    ],
)
def test_one_mistake_is_one_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "child.yaml").write_text("base: gone.yaml\n")
    (tmp_path / "corpus" / "train").mkdir(parents=True)
    (tmp_path / "corpus" / "train" / "manifest.json").touch()
    rest = ["run_dir=r", "data.sources.a.path=corpus", "train.max_steps=1"] if "--lr" in arguments else []
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, [*arguments, *rest])
    text = str(caught.value)
    assert words in text and "\n" not in text and not text.startswith(":"), text


def test_a_saved_config_means_the_folder_that_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = tmp_path / "old", tmp_path / "new place"
    new.mkdir()
    (new / "config.yaml").write_text(f"run_dir: {old}\nseed: 5\n")
    saved = [str(new / "config.yaml")]
    assert load(PretrainConfig, saved, check=False).run_dir == str(old), "a user's own file, not a run's"
    (new / "environment.json").write_text('{"packages": {"bigtx": "0.1.0"}}')
    for schema in (PretrainConfig, FinetuneConfig):
        assert load(schema, saved, check=False).run_dir == str(new)
    assert load(PretrainConfig, ["new place/config.yaml"], check=False).run_dir == "new place"
    assert load(PretrainConfig, [*saved, "run_dir=third"], check=False).run_dir == "third"
    (new / "config.yaml").write_text("run_dir: ./new place\n")
    assert load(PretrainConfig, saved, check=False).run_dir == "./new place", "the same place in the run's words"


@pytest.mark.parametrize(("width", "rate"), [(192, 7.8e-4), (768, 2e-4), (4096, 3.7e-5)])
def test_a_learning_rate_of_null_follows_the_width(width: int, rate: float) -> None:
    settings = ["optimizer.learning_rate=null", f"model.hidden_size={width}"]
    assert load(PretrainConfig, settings, check=False).optimizer.learning_rate == rate
    given = load(PretrainConfig, [settings[1], "optimizer.learning_rate=0.5"], check=False)
    assert given.optimizer.learning_rate == 0.5, "a number is taken as it is"


def test_the_home_folder_in_paths_of_files_and_of_the_command_line(tmp_path: Path) -> None:
    # A shell replaces ~ only at the start of a word; a folder named ~ would be made, and removed with all of a home.
    home = Path.home()
    text = "run_dir: ~/run\ndata: {foreign: {paths: [~/a, '~/b', c~/d]}}\n"
    config = load(PretrainConfig, [str(write(tmp_path, "mine.yaml", text)), "init_from=~/first"], check=False)
    assert (config.run_dir, config.init_from) == (str(home / "run"), str(home / "first"))
    assert config.data.foreign.paths == [str(home / "a"), str(home / "b"), "c~/d"]
    prepared = load(PrepareConfig, ["input.paths=[~/a]", "output=~/corpus", "tokenizer=~/t"], check=False)
    assert (prepared.input.paths, prepared.output) == ([str(home / "a")], str(home / "corpus"))
    assert prepared.tokenizer == str(home / "t")
