"""What pretraining and fine-tuning do each in its own way: length, first weights, measurements, end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigtx.config.schema import (
    ClassifyConfig,
    ExpertsConfig,
    FinetuneConfig,
    LoraConfig,
    ModelConfig,
    PretrainConfig,
)
from bigtx.config.shape import total_steps
from bigtx.data.stream.loader import Division
from bigtx.finetuning import base as base_module
from bigtx.finetuning import run as finetune_run
from bigtx.finetuning.base import BASE, other_classes, read_base_facts
from bigtx.finetuning.inputs import Inputs
from bigtx.pretraining import run as pretrain_run
from bigtx.pretraining.corpora import length_setting, with_vocabulary
from bigtx.train import start
from bigtx.train.start import Start
from bigtx.train.state import RunState
from bigtx.train.teacher import Teacher
from bigtx.utils import log
from bigtx.utils.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "say", lambda text="": lines.append(text))
    return lines


def context(folder: Path, *, dry_run: bool = False) -> Any:
    """Return the context of a run on one rank."""
    ranks = SimpleNamespace(
        rank=0,
        world_size=1,
        on_first=lambda action: action(),
        once=lambda action: action(),
        from_first=lambda value: value,
    )
    return SimpleNamespace(folder=folder, ranks=ranks, dry_run=dry_run)


def found(checkpoint: Any = None, changed: list[str] | None = None) -> Start:
    return Start({}, checkpoint, [{"key": key} for key in changed or []])


def pretrain(**train: Any) -> PretrainConfig:
    config = PretrainConfig(run_dir="unused")
    config.train = dataclasses.replace(config.train, global_batch_size=2, sequence_length=50, **train)
    return config


def at(step: int, **facts: Any) -> Any:
    """A checkpoint."""
    state = RunState(step=step, tokens=10 * step).to_dict() | facts.pop("state", {})
    return SimpleNamespace(path=Path(f"step-{step}"), manifest={"step": step, "state": state, **facts})


def test_a_run_has_as_many_steps_as_its_tokens_need() -> None:
    assert [total_steps(pretrain(max_steps=None, max_tokens=tokens)) for tokens in (1000, 1001, 1, 100)] == [
        10,
        11,
        1,
        1,
    ]
    assert total_steps(pretrain(max_steps=7)) == 7
    assert length_setting(pretrain(max_steps=7)) == "train.max_steps"
    assert length_setting(pretrain(max_steps=None, max_tokens=5)) == "train.max_tokens"


def test_a_vocabulary_is_taken_from_the_tokenizer_and_may_be_larger() -> None:
    data: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=300), tokenizer_place="here")
    for given, found in ((None, 300), (300, 300), (512, 512)):
        config = PretrainConfig(run_dir="unused", model=ModelConfig(vocab_size=given))
        assert with_vocabulary(config, data).model.vocab_size == found
    with pytest.raises(ConfigError, match=r"model.vocab_size=299 is smaller than the tokenizer's 300 ids in here"):
        with_vocabulary(PretrainConfig(run_dir="unused", model=ModelConfig(vocab_size=299)), data)


def test_a_pretraining_is_finished_after_its_last_step(said: list[str]) -> None:
    config = pretrain(max_steps=10)
    assert not pretrain_run.is_finished(config, found())
    assert not pretrain_run.is_finished(config, found(at(9, suspect=True))) and said == []
    for step in (10, 11):
        assert pretrain_run.is_finished(config, found(at(step)))
        assert said.pop().startswith(f"the run is finished: {step} steps. To train longer: train.max_steps=N")
    with pytest.raises(CheckpointError, match="the last steps of the run were all skipped"):
        pretrain_run.is_finished(config, found(at(10, suspect=True)))


def test_weights_of_another_run_are_taken_where_it_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretrain()
    shapes = {"a.weight": (2, 2), "a.adapter.a": (1, 2), "a.adapter.b": (2, 1)}
    closed: list[bool] = []
    source = SimpleNamespace(
        shapes={"a.weight": (2, 2)},
        manifest={"tokenizer": "t", "step": 70, "wandb_run_id": "w"},
        manifest_sha256="m",
        path=tmp_path / "step-70",
        read=lambda *part: ("source", *part),
        close=lambda: closed.append(True),
    )
    filled: list[Any] = []

    def fill(read: Any, *, states: bool) -> None:
        assert not states
        filled.append([read("a.weight", "master", 1, 3), read("a.adapter.a", "master", 0, 2)])

    engine: Any = SimpleNamespace(shapes=lambda: shapes, frozen=[], fill=fill)
    tokenizer = SimpleNamespace(fingerprint="t")
    inputs: Any = SimpleNamespace(config=config, data=SimpleNamespace(tokenizer=tokenizer), teacher=None)
    monkeypatch.setattr(start, "initial_weights", lambda *_: lambda *part: ("seed", *part))
    monkeypatch.setattr(start, "open_other_run", lambda context, folder: source)
    assert pretrain_run.set_first_weights(context(tmp_path), inputs, engine) == {}
    assert filled.pop() == [("seed", "a.weight", "master", 1, 3), ("seed", "a.adapter.a", "master", 0, 2)]
    config.init_from = "other"
    assert pretrain_run.set_first_weights(context(tmp_path), inputs, engine) == {
        "checkpoint": str(tmp_path / "step-70"),
        "manifest_sha256": "m",
        "step": 70,
        "wandb_run_id": "w",
    }
    assert filled == [[("source", "a.weight", "master", 1, 3), ("seed", "a.adapter.a", "master", 0, 2)]] and closed
    tokenizer.fingerprint = "u"
    with pytest.raises(ConfigError, match="its tokenizer is not the tokenizer of this run's data"):
        pretrain_run.set_first_weights(context(tmp_path), inputs, engine)
    source.shapes["a.weight"] = (2, 3)
    with pytest.raises(ConfigError, match=r"a.weight \(2, 3\) there, \(2, 2\) here \(1 in all\)"):
        pretrain_run.set_first_weights(context(tmp_path), inputs, engine)


@pytest.mark.parametrize("is_foreign", [True, False])
def test_rows_are_read_from_the_states_place_on(said: list[str], is_foreign: bool) -> None:
    config = pretrain(micro_batch_size=1)
    config.train.global_batch_size = 4
    config.seed, config.data.foreign.paths = 9, ["a.tar"] * is_foreign
    loader_type = lambda: lambda data, division, **given: (data, division, given)  # noqa: E731
    data = SimpleNamespace(tokenizer=SimpleNamespace(pad_id=3), loader_type=loader_type)
    inputs: Any = SimpleNamespace(config=config, data=data, objective=SimpleNamespace(prepare="prepare"))
    ranks: Any = SimpleNamespace(rank=1, world_size=4)
    division = Division(global_batch_size=4, micro_batch_size=1, rank=1, world_size=4)
    expected = {
        "sequence_length": 50,
        "seed": 9,
        "start_sequence": 16,
        "pad_id": 3,
        "prepare": "prepare",
    }
    state = RunState(sequences=16)
    loader: Any = pretrain_run.open_loader(inputs, ranks, state, found())
    assert loader == (config.data, division, expected) and said == []
    for before, words in (
        (4, "the run's position; exact"),
        (2, "with 4 ranks instead of 2 the shards are split differently"),
    ):
        said.clear()
        loader = pretrain_run.open_loader(inputs, ranks, state, found(at(8, world_size=before)))
        assert loader == (config.data, division, expected) and len(said) == is_foreign
        assert not is_foreign or ("reading 16 rows again" in said[0] and words in said[0])


def test_the_operations_of_a_token_are_its_share_of_a_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []

    def flops_of(config: Any, teacher: Any, **lengths: int) -> float:
        asked.append(lengths)
        return 9000.0

    monkeypatch.setattr(start, "flops_of", flops_of)
    task = SimpleNamespace(lengths=lambda rows: (10.4, 20.6, 5.5, 2.0))
    data: Any = SimpleNamespace(task=task)
    inputs = Inputs(FinetuneConfig(), None, None, data, [], 1, 30.0, {})  # type: ignore[arg-type]
    assert inputs.flops_per_token() == 9000.0 * 2 / 30
    assert asked == [{"source": 10, "target": 21, "predicted": 6}]


def test_a_teacher_adds_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "flops_per_row", lambda model, **lengths: 100.0 * lengths["target"])
    teacher: Any = SimpleNamespace(flops_per_row=lambda **lengths: 10.0 * lengths["target"])
    assert start.flops_of(pretrain(), None, source=0, target=3, predicted=1) == 300.0
    assert start.flops_of(pretrain(), teacher, source=0, target=3, predicted=1) == 330.0


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        ("25 %", 10, "3 steps"),
        ("10 %", 30, "3 steps"),
        ("5 %", 10, "1 steps"),
        ("0 %", 10, "1 steps"),
        ("100 %", 7, "7 steps"),
        ("7 steps", 10, "7 steps"),
        ("30 min", 10, "30 min"),
    ],
)
def test_a_share_of_a_fine_tuning_is_steps_rounded_up(every: str, steps: int, expected: str) -> None:
    config = FinetuneConfig()
    config.validation.every = every
    assert finetune_run.validate_every(config, steps) == expected


@pytest.mark.parametrize(
    ("step", "waited", "measured_at", "is_finished"),
    [
        (10, 0, 100, True),
        (9, 0, 90, False),
        (9, 2, 90, False),
        (9, 3, 90, True),
        (9, 3, 80, False),  # The results are of an earlier end.
        (10, 0, None, False),
    ],
)
def test_a_fine_tuning_is_finished_once_its_best_was_measured(
    tmp_path: Path, step: int, waited: int, measured_at: int | None, is_finished: bool, said: list[str]
) -> None:
    config = FinetuneConfig()
    config.train.max_steps, config.validation.patience = 10, 3
    inputs: Any = SimpleNamespace(config=config, total_steps=10, rows=[1, 2])
    assert not finetune_run.is_finished(inputs, found(), tmp_path)
    stopped = found(at(step, state={"measured_since_best": waited}))
    if measured_at is not None:
        (tmp_path / finetune_run.RESULTS).write_text(json.dumps({"tokens": measured_at}))
    assert finetune_run.is_finished(inputs, stopped, tmp_path) is is_finished
    assert len(said) == is_finished
    if is_finished:
        assert ("validation.patience=N" in said[0]) == (waited == 3)
    config.validation.patience = None
    assert finetune_run.is_finished(inputs, stopped, tmp_path) == (is_finished and step == 10)


@pytest.mark.parametrize("is_resumed", [True, False])
def test_a_fine_tuning_resumes_where_it_has_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_resumed: bool
) -> None:
    asked, ended = dict[str, Any](), list[str]()

    def replaced(module: Any, name: str, result: Any) -> None:
        monkeypatch.setattr(module, name, lambda *given, **named: (asked.update({name: (*given, named)}), result)[1])

    config = FinetuneConfig(run_dir=str(tmp_path))
    config.train.global_batch_size, config.validation.every, config.validation.patience = 4, "25 %", 3
    config.schedule.warmup = "100 tokens"
    task = SimpleNamespace(better={"loss": "lower"})
    inputs: Any = SimpleNamespace(config=config, task=task, facts={"data": "d"}, tokenizer="tokenizer", teacher=None)
    inputs.total_steps, inputs.mean_tokens, inputs.rows, inputs.flops_per_token = 10, 12.4, [0] * 3, lambda: 5.0
    here, engine, state = context(tmp_path), SimpleNamespace(frozen=[]), RunState(step=3)
    here.join_ranks, here.start_up = lambda: here.ranks, SimpleNamespace(end=ended.append)
    here.resources = SimpleNamespace(callback=lambda close: None)
    folder = found(at(3) if is_resumed else None)
    splits = {"validation": "validation records"}
    replaced(start, "open_folder", folder)
    replaced(start, "build_engine", engine)
    for name in ("resume", "begin"):
        replaced(finetune_run, name, (state, {"step": 70}, splits))
    for name, result in (
        ("open_inputs", inputs),
        ("is_finished", False),
        ("describe_trained", "all"),
        ("write_description", None),
        ("open_loader", SimpleNamespace(close=None)),
        ("open_tracker", SimpleNamespace(wandb_run_id="w")),
        ("Measurement", "measurement"),
        ("with_teacher", task),
        ("open_meter", "meter"),
        ("open_saver", "saver"),
        ("open_guards", "guards"),
        ("execute", 7),
    ):
        replaced(finetune_run, name, result)
    assert finetune_run.finetune(here) == 7 and ended == ["engine"]
    if is_resumed:
        assert asked["resume"] == (here, inputs, engine, folder, {}) and "begin" not in asked
    else:
        assert asked["begin"] == (here, inputs, engine, {}) and "resume" not in asked
    assert asked["build_engine"] == (config, "tokenizer", {})
    assert asked["open_loader"] == (here, inputs, splits, state, {})
    named = {"total_steps": 10, "better": task.better, "job_type": "finetune", "base": {"step": 70}}
    assert asked["open_tracker"] == (here, config, folder, state, named)
    assert asked["Measurement"] == (config, engine, here.ranks, task, "validation records", {})
    assert asked["open_meter"] == (config, here.ranks, folder, 5.0, {})
    _, run, ending = asked["execute"]
    assert (run.schedule.total_steps, run.schedule.warmup_steps) == (10, 2)  # Of 4 x 12.4 tokens, rounded to 50.
    assert (run.validate_every, run.patience) == ("3 steps", 3)
    assert run.facts == {"data": "d", "wandb_run_id": "w"} and run.state is state
    assert ending["conclude"].keywords == {"measurement": "measurement", "splits": splits, "num_rows": 3}


@pytest.mark.parametrize(
    ("changed", "num_held_out", "is_forgotten"),
    [
        ([], 5, False),
        (["optimizer.learning_rate"], 4, False),
        (["validation.metric"], 5, True),
        (["validation.max_records"], 5, True),
        (["data.leave_out"], 5, False),
        (["data.leave_out"], 4, True),
    ],
)
def test_values_that_cannot_be_compared_are_forgotten(
    changed: list[str], num_held_out: int, is_forgotten: bool
) -> None:
    splits = {"validation": SimpleNamespace(records=[0] * num_held_out)}
    inputs: Any = SimpleNamespace(data=SimpleNamespace(splits=splits, lengths=lambda split: [1] * 5))
    state = RunState(step=9, best_step=3, best_value=0.5, measured_since_best=2)
    finetune_run.forget_other_best(state, found(changed=changed), inputs)
    assert (state.best_step, state.measured_since_best) == ((None, 0) if is_forgotten else (3, 2))


def test_the_facts_of_a_base_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    facts = {"checkpoint": "c", "manifest_sha256": "m", "step": 1, "wandb_run_id": "w", "loaded": []}
    (tmp_path / BASE).write_text(json.dumps(facts))
    assert read_base_facts(tmp_path) == facts
    del facts["step"]
    (tmp_path / BASE).write_text(json.dumps(facts))
    assert read_base_facts(tmp_path) == {}


@pytest.mark.parametrize(("best", "asks_test"), [(10, True), (6, False)])
def test_at_its_end_a_fine_tuning_measures_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int, asks_test: bool
) -> None:
    kept = at(best)
    kept.path, kept.read, kept.close = tmp_path / f"step-{best:08d}", "best", lambda: None
    monkeypatch.setattr(finetune_run, "preferred", lambda folder: kept.path)
    monkeypatch.setattr(finetune_run, "Checkpoint", lambda path: kept)
    config = FinetuneConfig()
    config.validation.test, config.train.global_batch_size = asks_test, 4
    filled, logged = list[Any](), list[Any]()
    measurement: Any = SimpleNamespace(
        metric="loss",
        config=config,
        task=SimpleNamespace(tables=lambda predictions: {"table": predictions}),
        measure=lambda split: ({"loss": 0.5, "n": len(split.records)}, ["p"]),
    )
    splits: Any = {name: SimpleNamespace(records=[0] * count) for name, count in (("validation", 3), ("test", 2))}
    run: Any = SimpleNamespace(
        config=config,
        run_dir=tmp_path,
        ranks=context(tmp_path).ranks,
        engine=SimpleNamespace(fill=lambda read, states: filled.append((read, states))),
        schedule=SimpleNamespace(total_steps=12),
        state=RunState(step=10, tokens=100),
        tracker=SimpleNamespace(log=lambda *record: logged.append(record), message=lambda text: None),
    )
    finetune_run.write_results(run, measurement=measurement, splits=splits, num_rows=16)
    assert filled == ([] if best == 10 else [("best", False)])
    expected = {
        "checkpoint": f"step-{best:08d}",
        "step": best,
        "total_steps": 12,
        "epochs": 2.5,
        "tokens": 100,
        "chosen_by": "loss",
        "validation": {"records": 3, "loss": 0.5, "n": 3, "table": ["p"]},
    }
    if asks_test:
        expected["test"] = {"records": 2, "loss": 0.5, "n": 2, "table": ["p"]}
    assert json.loads((tmp_path / finetune_run.RESULTS).read_text()) == expected
    assert logged[0] == (10, 100, {"best/loss": 0.5, "best/n": 3})
    assert logged[1:] == ([(10, 100, {"test/loss": 0.5, "test/n": 2})] if asks_test else [])
    splits["validation"].records.clear()
    finetune_run.write_results(run, measurement=measurement, splits=splits, num_rows=16)
    written = json.loads((tmp_path / finetune_run.RESULTS).read_text())
    assert written["chosen_by"] is None and "validation" not in written


def test_a_reference_follows_from_what_a_model_computes_untrained() -> None:
    base = ModelConfig(vocab_size=100, hidden_size=64)
    assert finetune_run._settings_of_outputs(base) == {"vocab_size": 100, "hidden_size": 64}
    same = dataclasses.replace(
        base,
        dropout=0.1,
        attention_dropout=0.1,
        lora=LoraConfig(rank=4),
        experts=ExpertsConfig(balance_loss=0.5, router_z_loss=0.5),
    )
    assert finetune_run._settings_of_outputs(same) == finetune_run._settings_of_outputs(base)
    other = dataclasses.replace(base, experts=ExpertsConfig(num_experts=4), rope_theta=5.0)
    assert set(finetune_run._settings_of_outputs(other)) == {"vocab_size", "hidden_size", "experts", "rope_theta"}


@pytest.mark.parametrize(
    ("theirs", "names", "fresh"),
    [
        (["a", "b"], ["head.classes.weight", "embedding.weight"], []),
        (["b", "a"], ["head.classes.weight", "embedding.weight"], ["head.classes.weight"]),
        (None, ["head.classes.weight", "head.classes.bias"], ["head.classes.weight", "head.classes.bias"]),
        (None, ["embedding.weight"], []),
    ],
)
def test_a_head_of_other_classes_begins_from_the_seed(
    monkeypatch: pytest.MonkeyPatch, theirs: list[str] | None, names: list[str], fresh: list[str]
) -> None:
    base = PretrainConfig(run_dir="x") if theirs is None else FinetuneConfig(classify=ClassifyConfig(classes=theirs))
    monkeypatch.setattr(base_module, "load_run_config", lambda folder: base)
    config = FinetuneConfig(classify=ClassifyConfig(classes=["a", "b"]))
    assert other_classes(config, "base", names) == fresh


def test_what_is_not_trained_is_kept_once_with_the_weights_that_it_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, filled = list[Any](), list[Any]()
    monkeypatch.setattr(start, "save_frozen", lambda *given: kept.append(given[2:]))
    read: Any = "read"
    engine: Any = SimpleNamespace(frozen=["a"], fill=lambda read, states: filled.append((read, states)))
    start.set_first_weights(context(tmp_path), engine, read)
    assert filled == [("read", False)] and kept == [(tmp_path, "read")]
    start.set_first_weights(context(tmp_path, dry_run=True), engine, read)
    start.set_first_weights(context(tmp_path), engine, read, keep_frozen=False)
    engine.frozen = []
    start.set_first_weights(context(tmp_path), engine, read)
    assert len(kept) == 1 and len(filled) == 4


def test_a_students_first_weights_are_the_seeds_or_its_teachers_layers() -> None:
    config = PretrainConfig(run_dir="unused", seed=3, model=ModelConfig(vocab_size=8, hidden_size=4, init_std=1.0))
    shapes = {"embedding.weight": (8, 4)}
    engine: Any = SimpleNamespace(shapes=lambda: shapes)
    value = start.initial_weights(engine, config, None)("embedding.weight", "master", 0, 32)
    config.seed = 4
    assert not torch.equal(value, start.initial_weights(engine, config, None)("embedding.weight", "master", 0, 32))
    config.seed = 3
    asked: list[Any] = []
    teacher: Any = SimpleNamespace(layers=lambda *given: asked.append(given) or "theirs")
    config.distill.copy_layers = False
    own = start.initial_weights(engine, config, teacher)
    assert torch.equal(value[5:9], own("embedding.weight", "master", 5, 9)) and not asked
    config.distill.copy_layers = True
    assert start.initial_weights(engine, config, teacher) == "theirs" and asked[0][0] is shapes
    assert torch.equal(asked[0][1]("embedding.weight", "master", 5, 9), value[5:9])


@pytest.mark.parametrize(("longest", "is_refused"), [(64, False), (65, True)])
def test_a_teacher_reads_rows_as_long_as_its_learned_positions(longest: int, is_refused: bool) -> None:
    model = ModelConfig(vocab_size=100, positions="learned", max_sequence_length=64)
    tokenizer: Any = SimpleNamespace(fingerprint="t")
    teacher: Any = SimpleNamespace(model=model, tokenizer=tokenizer)
    problems = list(Teacher._problems(teacher, PretrainConfig(run_dir="unused", model=model), tokenizer, longest))
    assert problems == ["it has 64 learned positions, and rows are up to 65 long"] * is_refused


def test_the_files_of_a_base_are_closed_once_its_weights_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    source = SimpleNamespace(
        manifest={"tokenizer": "t", "step": 70}, shapes={}, path=tmp_path, close=lambda: told.append("close")
    )
    transfer = SimpleNamespace(
        initialized=[], read=lambda *given: "read", describe=lambda: "all", to_dict=lambda: {"loaded": []}
    )
    monkeypatch.setattr(start, "initial_weights", lambda *given: "initial")
    monkeypatch.setattr(start, "open_other_run", lambda *given: source)
    monkeypatch.setattr(start, "set_first_weights", lambda *given, **named: told.append(f"set {given[2]}"))
    monkeypatch.setattr(start, "facts_of", lambda opened: {"step": 70})
    monkeypatch.setattr(finetune_run, "other_classes", lambda *given: [])
    monkeypatch.setattr(finetune_run, "plan_transfer", lambda *given, **named: transfer)
    monkeypatch.setattr(finetune_run, "untrained_roles", lambda *given: None)
    engine: Any = SimpleNamespace(shapes=dict, frozen=[])
    inputs: Any = SimpleNamespace(config=FinetuneConfig(), teacher=None, tokenizer=SimpleNamespace(fingerprint="t"))
    facts = finetune_run.set_first_weights(context(tmp_path), inputs, engine, "base")
    assert facts == {"step": 70, "loaded": []} and told == ["set read", "close"]
