"""What opening a run's folder writes, and which settings may have changed since."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest

from bigtx.config.load import load_run_config
from bigtx.config.schema import PretrainConfig
from bigtx.train.run_folder import MARK, check_settings, describe_run, dump, open_run_folder
from bigtx.utils.errors import CheckpointError, ConfigError, LaunchError

ENVIRONMENT: dict[str, Any] = {"packages": {"bigtx": "0.1.0"}, "argv": ["api_key=abcdefgh"], "api_key": "abcdefgh"}


class Codec:
    """A tokenizer that can be saved."""

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "own").touch()


def config_of(folder: Path, **optimizer: Any) -> PretrainConfig:
    config = PretrainConfig(run_dir=str(folder))
    config.train = dataclasses.replace(config.train, max_steps=10)
    config.optimizer = dataclasses.replace(config.optimizer, **optimizer)
    return config


def lived(folder: Path, **optimizer: Any) -> None:
    """What a life that has saved a step leaves behind."""
    config = config_of(folder, **optimizer)
    open_run_folder(config, files=[], environment=ENVIRONMENT).lock.release()
    describe_run(config, tokenizer=cast(Any, Codec()), deepspeed={"train_batch_size": 8}, environment=ENVIRONMENT)
    (folder / "checkpoints" / "step-00000005").mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 5}\n')


def opened(config: PretrainConfig) -> tuple[list[dict[str, Any]], Path | None]:
    found = open_run_folder(config, files=[], environment=ENVIRONMENT)
    assert (Path(config.run_dir) / "run.lock").is_file()
    found.lock.release()
    return found.changed, found.aside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "run"


def test_a_run_says_all_about_itself(folder: Path) -> None:
    lived(folder, learning_rate=0.25)
    assert load_run_config(folder).optimizer.learning_rate == 0.25
    assert json.loads((folder / "deepspeed.json").read_text()) == {"train_batch_size": 8}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"] == {"bigtx": "0.1.0"} and environment["api_key"] == "<hidden>"
    assert (folder / "checkpoints" / MARK).is_file() and (folder / "tokenizer" / "own").is_file()
    assert not (folder / "run.lock").exists()
    assert dump(config_of(folder, learning_rate=0.25))["optimizer"]["learning_rate"] == 0.25


def test_before_the_first_life_of_a_run_writes_more_its_environment_is_there(folder: Path) -> None:
    assert opened(config_of(folder)) == ([], None)
    assert [path.name for path in folder.iterdir()] == ["environment.json"]
    assert opened(config_of(folder, learning_rate=0.5)) == ([], None)  # No step was saved: any config may come.


def test_a_changed_setting_must_be_allowed_by_name(folder: Path) -> None:
    lived(folder)
    assert opened(config_of(folder)) == ([], None)
    config = config_of(folder, learning_rate=0.5, beta1=0.8)
    for look in (check_settings, opened):
        config.allow_changes = ["optimizer.beta1"]
        with pytest.raises(ConfigError, match=r"optimizer\.learning_rate"):
            look(config)
    assert not (folder / "run.lock").exists()
    config.allow_changes = ["optimizer.beta1", "optimizer.learning_rate"]
    check_settings(config)
    changes, aside = opened(config)
    assert aside is None and sorted(changes, key=lambda change: change["key"]) == [
        {"key": "optimizer.beta1", "old": 0.9, "new": 0.8},
        {"key": "optimizer.learning_rate", "old": 3e-4, "new": 0.5},
    ]


def test_what_the_data_complete_is_compared_once_they_are_open(folder: Path) -> None:
    lived(folder)
    config = config_of(folder)
    config.model = dataclasses.replace(config.model, vocab_size=999)
    check_settings(config)
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        opened(config)


@pytest.mark.parametrize("is_allowed", [True, False])
def test_a_run_that_has_its_checkpoints_keeps_its_history_whatever_is_allowed(folder: Path, is_allowed: bool) -> None:
    lived(folder)
    config = config_of(folder)
    config.allow_changes = ["checkpoints"] * is_allowed
    assert opened(config) == ([], None) and (folder / "metrics.jsonl").is_file()


def test_a_run_without_its_config_is_not_resumed(folder: Path) -> None:
    lived(folder)
    (folder / "config.yaml").unlink()
    for look in (check_settings, opened):
        with pytest.raises(CheckpointError, match=r"holds checkpoints but no config\.yaml"):
            look(config_of(folder))
    assert not (folder / "run.lock").exists()


def test_a_folder_that_cannot_be_written_is_named_and_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bigtx.train.run_folder.write_json", fail)
    with pytest.raises(LaunchError, match=r"run_dir=.* cannot be written: .*No space left"):
        opened(config_of(folder))
    assert not (folder / "run.lock").exists()
    with pytest.raises(LaunchError, match=r"run_dir=.* cannot be written: .*No space left"):
        describe_run(config_of(folder), tokenizer=cast(Any, Codec()), deepspeed={}, environment={})
    (folder.parent / "file").touch()
    with pytest.raises(LaunchError, match="name another folder"):
        open_run_folder(config_of(folder.parent / "file" / "run"), files=[], environment=ENVIRONMENT)
