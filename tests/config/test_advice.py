"""What a message says to write is accepted, by the loader and by the shell."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bigtx.config.changes import compare, refuse
from bigtx.config.load import from_dict, load, to_dict
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import find
from bigtx.finetuning import inputs as finetune_inputs
from bigtx.pretraining.corpora import length_setting
from bigtx.train.start import say_finished
from bigtx.utils.errors import ConfigError
from bigtx.utils.shell import command, setting, settings

LEAD = r"(?:write|e\.g\.|mean|by|needs|or|add|also|so|of|and)[:,]? "
WORD = re.compile(LEAD + r"('[\w.]+=[^']*'|[a-z_]+(?:\.\w+)*=(?:''|[^\s;,)'?:]+))")
"""A setting that a message advises, as a word of a shell."""


def advised(message: str, schema: type) -> list[str]:
    """The settings that a message shows with a value to write; what follows `the problem` of each line."""
    found = []
    for line in message.splitlines():
        what = line.partition("): ")[2] or line.partition(": ")[2]
        for word in WORD.findall(what.replace(", or ", " or ")):
            (argument,) = shlex.split(word)
            key, _, value = argument.partition("=")
            if find(schema, key) and value not in ("N", "VALUE", "..."):
                found.append(argument)
    return found


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what settings may name."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("corpus/train", "corpus/validation"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    for name in ("texts", "my texts", "reviews", "runs/mine", "runs/corpus", "tokenizer"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(tmp_path / "corpus", tmp_path / "runs" / "corpus", dirs_exist_ok=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("model: {}\n", encoding="utf-8")
    (tmp_path / "shard.tar").write_bytes(b"")
    (tmp_path / "recipe.yaml").write_text("train: {max_tokens: 1M}\n")
    (tmp_path / "epochs.yaml").write_text("train: {epochs: 2}\n")
    return tmp_path


PRETRAIN = ["data.sources.a.path=corpus", "run_dir=runs/new"]
FINETUNE = ["tokenizer=tokenizer", "data.train=reviews", "run_dir=runs/new", "train.epochs=1"]
STEPS = "train.max_steps=5"
CASES: list[tuple[type, list[str]]] = [
    (PretrainConfig, [*PRETRAIN, "recipe.yaml", STEPS]),
    (PretrainConfig, PRETRAIN),
    (PretrainConfig, [*PRETRAIN[:1], STEPS]),
    (PretrainConfig, [*PRETRAIN[1:], STEPS]),
    (PretrainConfig, [*PRETRAIN[1:], STEPS, "corpus"]),
    (PretrainConfig, [*PRETRAIN[1:], STEPS, "data.sources.a.path=corpus/train"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "model.lora.alpha=3"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "model.experts.num_active=3"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "model.audio.strides=[3]"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "model.position_offset=2"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "objective.mask_rate=0.3"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "distill.weight=0.3"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "optimizer.train_also=[head.*]"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "model.norm_bias=true"]),
    (
        PretrainConfig,
        [*PRETRAIN, STEPS, "distill.teacher=runs/mine", "distill.copy_layers=true", "init_from=runs/mine"],
    ),
    (PretrainConfig, [*PRETRAIN, STEPS, "data.phases.one.start=5", "data.phases.two.start=5"]),
    (
        PretrainConfig,
        [*PRETRAIN, STEPS, "model.shape=encoder", "objective.name=masked", "validation.sample_prompts=[a]"],
    ),
    (PretrainConfig, [*PRETRAIN, STEPS, "data.foreign.paths=shard.tar", "data.foreign.tokenizer=tokenizer"]),
    (PretrainConfig, [*PRETRAIN, STEPS, "engine.offload_parameters=cpu"]),
    (FinetuneConfig, [*FINETUNE[:3]]),
    (FinetuneConfig, [*FINETUNE[:3], "epochs.yaml", STEPS]),
    (FinetuneConfig, ["tokenizer=tokenizer", "run_dir=runs/new", "train.epochs=1"]),
    (FinetuneConfig, [*FINETUNE, "sft.row_length=64"]),
    (FinetuneConfig, [*FINETUNE, "task=sft", "model.prefix_attention=true"]),
    (FinetuneConfig, [*FINETUNE, "translate.num_beams=2"]),
    (FinetuneConfig, [*FINETUNE, "task=preference", "distill.teacher=runs/mine"]),
    (FinetuneConfig, [*FINETUNE[:1], *FINETUNE[2:], "reviews"]),
    (PrepareConfig, ["tokenizer=tokenizer", "output=new"]),
    (PrepareConfig, ["tokenizer=tokenizer", "output=new", "my texts"]),
    (TokenizerTrainConfig, ["input.paths=texts"]),
    (PrepareConfig, ["tokenizer=tokenizer", "output=new", "input.paths={a: b}"]),
]


@pytest.mark.parametrize(("schema", "arguments"), CASES)
def test_advice_is_accepted(places: Path, schema: type, arguments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(schema, arguments)
    advice = advised(str(caught.value), schema)
    assert advice, caught.value
    kept = [argument for argument in arguments if not (Path(argument).is_dir() or "{a: b}" in argument)]
    outcomes = {}
    for way in advice:
        given = ["input.paths=texts" if "TEXT" in way else way]
        try:
            load(schema, [*kept, *given])
            outcomes[way] = ""
        except ConfigError as error:
            outcomes[way] = str(error)
    # A message may name two settings that are to be written together.
    if any(outcomes.values()) and "''" in str(caught.value):
        load(schema, [*kept, *advice[-2:]])
        outcomes = {way: text for way, text in outcomes.items() if way not in advice[-2:]}
    assert not any(outcomes.values()), outcomes


@pytest.mark.parametrize(("schema", "key"), [(PretrainConfig, "init_from"), (FinetuneConfig, "base")])
def test_a_run_that_cannot_change_tells_how_to_start_another(places: Path, schema: Any, key: str) -> None:
    config = from_dict(schema, {"seed": 2, "train": {"max_steps": 3}})
    with pytest.raises(ConfigError) as caught:
        refuse(compare(to_dict(from_dict(schema, {})), config), config)
    message = str(caught.value)
    assert f"{key}=THIS_RUN" in message and "'allow_changes=[train.max_steps]'" in message
    assert load(schema, ["allow_changes=[train.max_steps]"], check=False).allow_changes == ["train.max_steps"]
    with pytest.raises(ConfigError, match=f"with {key}=THIS_RUN"):
        load(schema, ["allow_changes=[seed]"])


def test_settings_in_messages_are_words_for_every_shell() -> None:
    """Read back by the shells that are here, in a folder whose files the brackets match."""
    values = {"allow_changes": ["train.max_steps", "a b"], "run_dir": "my runs/it's", "train.max_steps": None}
    line = f"printf '%s\\n' {settings(values)} {command('x y', '*')}"
    expected = ['allow_changes=[train.max_steps,"a b"]', "run_dir=my runs/it's", "train.max_steps=null", "x y", "*"]
    for shell in filter(shutil.which, ("bash", "zsh", "sh")):
        assert subprocess.check_output([shell, "-c", line], text=True).splitlines() == expected
    assert load(PretrainConfig, [setting("allow_changes", ["a b"]).strip("'")], check=False).allow_changes == ["a b"]


def test_no_source_shows_brackets_unquoted() -> None:
    """Lists in messages are made by `shell.setting`: to zsh, brackets alone are a pattern that matches no file."""
    package = Path(__file__).resolve().parents[2] / "bigtx"
    bare = re.compile(LEAD + r"[a-z_]+(\.[a-z_]+)*=\[")
    found = []
    for path in package.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if bare.search(line) and '"' in line.partition("=[")[0] and '"""' not in line:
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert not found


@pytest.mark.parametrize(
    ("schema", "length"),
    [
        (PretrainConfig, "train.max_tokens"),
        (PretrainConfig, "train.max_steps"),
        (FinetuneConfig, "train.epochs"),
        (FinetuneConfig, "train.max_steps"),
        (FinetuneConfig, "train.min_steps"),
    ],
)
def test_a_finished_run_tells_how_to_train_on(
    places: Path, capsys: pytest.CaptureFixture[str], schema: Any, length: str
) -> None:
    base = PRETRAIN if schema is PretrainConfig else FINETUNE if length == "train.min_steps" else FINETUNE[:3]
    begun = load(schema, [*base, f"{length}=32768"])
    found = finetune_inputs.length_setting(begun, 27) if schema is FinetuneConfig else length_setting(begun)
    say_finished(1, [found])
    words = shlex.split(re.findall(r"train longer: (.*);", capsys.readouterr().out)[0])
    resumed = load(schema, [*base, *(word.replace("=N", "=65536") for word in words)])
    found = compare(to_dict(begun), resumed)
    assert {change.key for change in found} == {length, "allow_changes"}
    refuse(found, resumed)
