"""Settings of a run that are at work in one place each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bigtx.config.schema import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    RecordsConfig,
    SelectionConfig,
    SourceConfig,
    TrainConfig,
    ValidationConfig,
)
from bigtx.config.shape import total_steps
from bigtx.engine.retention import Policy
from bigtx.finetuning.checks import check_records
from bigtx.finetuning.measure import Measurement
from bigtx.finetuning.tasks.task import Examples
from bigtx.pretraining import run as pretrain_run
from bigtx.pretraining import validation as validation_module
from bigtx.pretraining.corpora import RunData, length_setting, place_of, validation_sources
from bigtx.train.execute import open_saver
from bigtx.utils.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, (48, 0.8)), ({"sample_tokens": 5}, (5, 0.8)), ({"sample_temperature": 0.3}, (48, 0.3))],
)
def test_samples(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: tuple[int, float]) -> None:
    asked: dict[str, Any] = {}

    def write(*arguments: Any, **settings: Any) -> list[Any]:
        asked.update(settings)
        return []

    monkeypatch.setattr("bigtx.model.write.write", write)
    monkeypatch.setattr("bigtx.model.write.plain_prompts", lambda *arguments: [])
    validation: Any = validation_module.Validation.__new__(validation_module.Validation)
    validation.config = PretrainConfig(validation=ValidationConfig(**settings))
    validation.engine = SimpleNamespace(module=SimpleNamespace(eval=lambda: None))
    validation.tokenizer, validation.ranks = None, SimpleNamespace(from_first=None)
    validation._sample(["a"], 1)
    assert (asked["max_new_tokens"], asked["sampling"].temperature) == expected


def test_the_cache_of_remote_corpora(tmp_path: Path) -> None:
    config = PretrainConfig(data=DataConfig(cache_dir=str(tmp_path / "cache"), cache_size=12345))
    place: Any = place_of(config, SourceConfig(path="https://example.com/corpus"))
    assert (place.cache.folder, place.cache.max_bytes) == (tmp_path / "cache", 12345)


def test_the_corpora_to_validate_on(tmp_path: Path) -> None:
    sources = {name: SourceConfig(path=str(tmp_path / name)) for name in ("a", "b", "c")}
    for name in ("a", "b"):
        (tmp_path / name / "validation").mkdir(parents=True)
    config = PretrainConfig(data=DataConfig(sources=sources))
    assert validation_sources(config) == {"a": sources["a"], "b": sources["b"]}
    config.validation.sources = {"b": sources["b"]}
    assert validation_sources(config) == {"b": sources["b"]}
    config.validation.sources = {"c": sources["c"]}
    with pytest.raises(ConfigError, match="has no validation split"):
        validation_sources(config)


def test_the_length_of_a_run() -> None:
    by_tokens = PretrainConfig(train=TrainConfig(max_tokens=1001, sequence_length=10, global_batch_size=5))
    assert total_steps(by_tokens) == 21 and length_setting(by_tokens) == "train.max_tokens"
    by_steps = PretrainConfig(train=TrainConfig(max_steps=7))
    assert total_steps(by_steps) == 7 and length_setting(by_steps) == "train.max_steps"


def test_records_that_are_measured_and_shown() -> None:
    task: Any = SimpleNamespace(chosen_by="loss")
    records: list[Any] = list(range(10))
    for settings, expected in (({}, (10, 16)), ({"max_records": 5, "num_examples": 3}, (5, 3))):
        config = FinetuneConfig(validation=SelectionConfig(**settings))
        measurement = Measurement(config, None, None, task, Examples(records, records))  # type: ignore[arg-type]
        assert (len(measurement.held_out.records), measurement.num_examples) == expected


def test_the_weight_of_the_z_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(model=ModelConfig(vocab_size=70), train=TrainConfig(max_steps=1, z_loss=0.5))
    data = RunData(SimpleNamespace(fingerprint=""), "", {}, "")  # type: ignore[arg-type]
    objective = SimpleNamespace(describe=lambda: "", lengths=SimpleNamespace(source=0, target=1))
    monkeypatch.setattr(pretrain_run, "open_run_data", lambda *arguments, once: data)
    monkeypatch.setattr(pretrain_run, "make_objective", lambda *arguments, purpose: objective)
    monkeypatch.setattr(pretrain_run, "with_vocabulary", lambda config, data: config)
    ranks: Any = SimpleNamespace(world_size=1, once=None)
    assert pretrain_run.open_inputs(config, ranks).task.z_loss == 0.5


def test_folders_of_records_that_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n' * 4)
    check_records(FinetuneConfig(data=RecordsConfig(train=[str(tmp_path)])))
    with pytest.raises(DataError):
        check_records(FinetuneConfig(data=RecordsConfig(train=[str(tmp_path)], exclude=["a.jsonl"])))


@pytest.mark.parametrize("is_async", [True, False])
def test_how_checkpoints_are_written(tmp_path: Path, is_async: bool) -> None:
    config = PretrainConfig(train=TrainConfig(async_checkpoints=is_async, keep_checkpoints=5, keep_every="9 steps"))
    context: Any = SimpleNamespace(ranks=None, folder=tmp_path)
    saver = open_saver(context, config, engine=cast(Any, None))
    assert saver.in_background is is_async and saver.policy == Policy(5, "9 steps")
