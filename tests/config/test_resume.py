"""`bigtx pretrain RUN`: a run is resumed from its own config, wherever the command is called and the run was moved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtx.config.load import parse_command_line, to_dict
from bigtx.config.runs import with_absolute_paths, with_moved_paths
from bigtx.config.schema import FinetuneConfig, PretrainConfig
from bigtx.utils.errors import ConfigError


def make_run(folder: Path, **settings: Any) -> Path:
    """A run's folder, as far as its config goes: what it holds was written from the project's folder."""
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps({"packages": {"bigtx": "0"}}))
    values = {"run_dir": str(folder), **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def parsed(*arguments: str, schema: type = PretrainConfig) -> Any:
    return parse_command_line(schema, arguments, program="bigtx", check=False).config


def test_a_run_is_its_own_config(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train={"max_steps": 7}, seed=5)
    config = parsed(str(run))
    assert (config.run_dir, config.train.max_steps, config.seed) == (str(run), 7, 5)


def test_settings_behind_a_run_may_change_since_they_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train={"max_steps": 7}, seed=5, allow_changes=["optimizer.learning_rate"])
    config = parsed(str(run), "train.max_steps=9", "seed=6", "track.wandb=off")
    # What was allowed once is not allowed for ever, and what may never change is not made free.
    assert config.allow_changes == ["train.max_steps"]
    assert parsed("train.max_steps=9", f"run_dir={run}").allow_changes == []


def test_a_moved_run_finds_what_moved_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, kept = tmp_path / "old", tmp_path / "kept"
    kept.mkdir()
    (old / "corpus").mkdir(parents=True)
    sources = {"a": {"path": str(old / "corpus")}, "b": {"path": str(kept)}, "c": {"path": "s3://bucket/c"}}
    make_run(old / "runs" / "one", data={"sources": sources})
    old.rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new" / "runs")
    config = parsed("one")
    assert config.run_dir == "one"
    assert {name: source.path for name, source in config.data.sources.items()} == {
        "a": str(tmp_path / "new" / "corpus"),
        "b": str(kept),
        "c": "s3://bucket/c",
    }


def test_a_run_of_the_other_kind_is_named(tmp_path: Path) -> None:
    pretrained, finetuned = make_run(tmp_path / "p"), make_run(tmp_path / "f", task="classify")
    with pytest.raises(ConfigError, match=rf"is a fine-tuned run; to resume it: bigtx finetune {finetuned}"):
        parsed(str(finetuned))
    with pytest.raises(ConfigError, match=rf"bigtx pretrain {pretrained}; to fine-tune it: base={pretrained}"):
        parsed(str(pretrained), schema=FinetuneConfig)


def test_paths_of_a_saved_config_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(FinetuneConfig(), base="runs/base", run_dir="runs/new")
    config.data.train = ["a.jsonl", "https://host/b.jsonl"]
    values = with_absolute_paths(FinetuneConfig, to_dict(config))
    assert (values["base"], values["run_dir"]) == (str(tmp_path / "runs/base"), str(tmp_path / "runs/new"))
    assert values["data"]["train"] == [str(tmp_path / "a.jsonl"), "https://host/b.jsonl"]
    assert values["tokenizer"] is None and values["data"]["test"] == []


def test_a_fine_tuned_run_is_resumed_though_its_base_is_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", task="classify", base=str(tmp_path / "gone"), model={"hidden_size": 96})
    config = parsed(str(run), schema=FinetuneConfig)
    assert (config.base, config.model.hidden_size) == (str(tmp_path / "gone"), 96)


def test_a_path_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    values = {"base": str(tmp_path / "data"), "run_dir": "x"}
    assert with_moved_paths(FinetuneConfig, values, tmp_path / "a", tmp_path / "b") == values
