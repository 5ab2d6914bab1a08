"""What is own to pretraining and to fine-tuning: how long, from which weights, measured how often, finished when."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

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
from bigtx.engine import checkpoint as checkpoint_module
from bigtx.train import finetuning
from bigtx.train.finetuning import BASE, RESULTS, FinetuneSession
from bigtx.train.pretraining import PretrainSession, length_setting, total_steps, with_vocabulary
from bigtx.train.session import Session
from bigtx.train.state import RunState
from bigtx.utils import log
from bigtx.utils.errors import CheckpointError, ConfigError

Kind = TypeVar("Kind", bound=Session)


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "say", lambda text="": lines.append(text))
    return lines


def session(kind: type[Kind], config: Any, run_dir: Path, **fields: Any) -> Kind:
    """A session on one rank."""
    made = object.__new__(kind)
    ranks = SimpleNamespace(rank=0, world_size=1, on_first=lambda act: act(), from_first=lambda value: value)
    vars(made).update(config=config, run_dir=run_dir, ranks=ranks, checkpoint=None, dry_run=False, teacher=None)
    made.state, made.status, made.changed, made.damaged = RunState(), "failed", [], []
    vars(made).update(fields)
    return made


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


def test_a_pretraining_is_finished_after_its_last_step(tmp_path: Path, said: list[str]) -> None:
    made = session(PretrainSession, pretrain(max_steps=10), tmp_path, total_steps=10)
    assert not made.is_finished()
    made.checkpoint = at(9, suspect=True)
    assert not made.is_finished() and made.status == "failed" and said == []
    for step in (10, 11):
        made.checkpoint = at(step)
        assert made.is_finished() and made.status == "finished"
        assert said.pop().startswith(f"the run is finished: {step} steps. To train on: train.max_steps=N")
    made.checkpoint = at(10, suspect=True)
    with pytest.raises(CheckpointError, match="the last steps of the run were all skipped"):
        made.is_finished()


@pytest.mark.parametrize("at_start", [True, False])
def test_a_new_pretraining_knows_what_it_passes_over(tmp_path: Path, at_start: bool) -> None:
    config = pretrain()
    config.data.skip, config.validation.at_start = ["8-16"], at_start
    filled: list[Any] = []
    made = session(PretrainSession, config, tmp_path, initial_weights=lambda: "seed", begin_with=filled.append)
    made.begin()
    assert made.state == RunState(skipped_sequences=["8-16"], owes_validation=at_start) and filled == ["seed"]
    made.config.data.skip = ["8-16", "30-40"]
    made.resume()
    assert made.state.skipped_sequences == ["8-16", "30-40"]


def test_weights_of_another_run_are_taken_where_it_has_them(tmp_path: Path, said: list[str]) -> None:
    config = pretrain()
    config.init_from = "other"
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
    made = session(
        PretrainSession,
        config,
        tmp_path,
        initial_weights=lambda: lambda *part: ("seed", *part),
        begin_with=lambda read: filled.append([read("a.weight", "master", 1, 3), read("a.adapter.a", "master", 0, 2)]),
        engine=SimpleNamespace(shapes=lambda: shapes),
        open_other_run=lambda folder: source,
        tokenizer=SimpleNamespace(fingerprint="t"),
    )
    made.begin()
    assert filled == [[("source", "a.weight", "master", 1, 3), ("seed", "a.adapter.a", "master", 0, 2)]] and closed
    assert made.base_facts == {
        "checkpoint": str(tmp_path / "step-70"),
        "manifest_sha256": "m",
        "step": 70,
        "wandb_run_id": "w",
    }
    made.tokenizer.fingerprint = "u"
    with pytest.raises(ConfigError, match="its tokenizer is not the one of this run's data"):
        made.begin()
    source.shapes["a.weight"] = (2, 3)
    with pytest.raises(ConfigError, match=r"a.weight \(2, 3\) there, \(2, 2\) here \(1 in all\)"):
        made.begin()


@pytest.mark.parametrize("is_foreign", [True, False])
def test_rows_are_read_from_the_states_place_on(tmp_path: Path, said: list[str], is_foreign: bool) -> None:
    config = pretrain(micro_batch_size=1)
    config.seed, config.data.foreign.paths = 9, ["a.tar"] * is_foreign
    made = session(PretrainSession, config, tmp_path, tokenizer=SimpleNamespace(pad_id=3))
    made.ranks.rank, made.ranks.world_size = 1, 4
    made.objective = SimpleNamespace(prepare="prepare")  # type: ignore[assignment]
    made.data = SimpleNamespace(loader_type=lambda: lambda data, **given: (data, given))  # type: ignore[assignment]
    expected = {
        "sequence_length": 50,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "seed": 9,
        "rank": 1,
        "world_size": 4,
        "start_sequence": 16,
        "pad_id": 3,
        "prepare": "prepare",
    }
    made.state.sequences = 16
    assert made.make_loader() == (config.data, expected) and said == []
    for ranks, words in (
        (4, "where the run was; exact"),
        (2, "with 4 ranks instead of 2 the shards are split otherwise"),
    ):
        said.clear()
        made.checkpoint = at(8, world_size=ranks)
        assert made.make_loader() == (config.data, expected) and len(said) == is_foreign
        assert not is_foreign or ("reading 16 rows again" in said[0] and words in said[0])


def test_the_arithmetic_of_a_token_is_its_share_of_a_rows(tmp_path: Path) -> None:
    asked: list[dict[str, int]] = []

    def flops_of(**lengths: int) -> float:
        asked.append(lengths)
        return 9000.0

    lengths = SimpleNamespace(_asdict=lambda: {"source": 1, "target": 2, "predicted": 3})
    objective = SimpleNamespace(lengths=lengths)
    assert (
        session(PretrainSession, pretrain(), tmp_path, flops_of=flops_of, objective=objective).flops_per_token() == 180
    )
    made = session(FinetuneSession, FinetuneConfig(), tmp_path, flops_of=flops_of)
    made.lengths, made.mean_tokens = (10.4, 20.6, 5.5, 2.0), 30.0  # type: ignore[assignment]
    assert made.flops_per_token() == 9000.0 * 2 / 30
    assert asked == [{"source": 1, "target": 2, "predicted": 3}, {"source": 10, "target": 21, "predicted": 6}]


def test_a_teacher_adds_its_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtx.plan.parameters.flops_per_row", lambda model, **lengths: 100.0 * lengths["target"])
    made = session(PretrainSession, pretrain(), tmp_path)
    assert made.flops_of(source=0, target=3, predicted=1) == 300.0
    made.teacher = SimpleNamespace(flops_per_row=lambda **lengths: 10.0 * lengths["target"])  # type: ignore[assignment]
    assert made.flops_of(source=0, target=3, predicted=1) == 330.0


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
def test_a_share_of_a_fine_tuning_is_steps_rounded_up(tmp_path: Path, every: str, steps: int, expected: str) -> None:
    config = FinetuneConfig()
    config.validation.every = every
    assert session(FinetuneSession, config, tmp_path, total_steps=steps).validate_every() == expected


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
    config.train.max_steps = 10
    made = session(FinetuneSession, config, tmp_path, total_steps=10, patience=3, rows=[1, 2])
    assert not made.is_finished()
    made.checkpoint = at(step, state={"measured_since_best": waited})
    if measured_at is not None:
        (tmp_path / RESULTS).write_text(json.dumps({"tokens": measured_at}))
    assert made.is_finished() is is_finished and made.status == ("finished" if is_finished else "failed")
    assert len(said) == is_finished
    if is_finished:
        assert ("validation.patience=N" in said[0]) == (waited == 3)
    made.patience = None
    assert made.is_finished() == (is_finished and step == 10)


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
    tmp_path: Path, changed: list[str], num_held_out: int, is_forgotten: bool
) -> None:
    made = session(FinetuneSession, FinetuneConfig(), tmp_path)
    made.changed = [{"key": key} for key in changed]
    made.splits = {"validation": SimpleNamespace(records=[0] * num_held_out)}  # type: ignore[dict-item]
    made.data = SimpleNamespace(lengths=lambda split: [1] * 5)  # type: ignore[assignment]
    made.state = RunState(step=9, best_step=3, best_value=0.5, measured_since_best=2)
    facts = {"checkpoint": "c", "manifest_sha256": "m", "step": 1, "wandb_run_id": "w", "loaded": []}
    (tmp_path / BASE).write_text(json.dumps(facts))
    made.resume()
    assert (made.state.best_step, made.state.measured_since_best) == ((None, 0) if is_forgotten else (3, 2))
    assert made.base_facts == facts
    del facts["step"]
    (tmp_path / BASE).write_text(json.dumps(facts))
    made.resume()
    assert made.base_facts == {}


@pytest.mark.parametrize(("best", "asks_test"), [(10, True), (6, False)])
def test_at_its_end_a_fine_tuning_measures_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int, asks_test: bool
) -> None:
    found = at(best)
    found.path, found.read, found.close = tmp_path / f"step-{best:08d}", "best", lambda: None
    monkeypatch.setattr(checkpoint_module, "preferred", lambda folder: found.path)
    monkeypatch.setattr(checkpoint_module, "Checkpoint", lambda path: found)
    config = FinetuneConfig()
    config.validation.test, config.train.global_batch_size = asks_test, 4
    filled: list[Any] = []
    measured = SimpleNamespace(metric="loss", measure=lambda split: ({"loss": 0.5, "n": len(split.records)}, ["p"]))
    made = session(
        FinetuneSession,
        config,
        tmp_path,
        total_steps=12,
        rows=[0] * 16,
        engine=SimpleNamespace(fill=lambda read, states: filled.append((read, states))),
        measurement=measured,
        task=SimpleNamespace(tables=lambda predictions: {"table": predictions}),
        splits={name: SimpleNamespace(records=[0] * count) for name, count in (("validation", 3), ("test", 2))},
    )
    made.state = RunState(step=10, tokens=100)
    logged: list[Any] = []
    tracker = SimpleNamespace(log=lambda *record: logged.append(record), message=lambda text: None)
    made.conclude(SimpleNamespace(tracker=tracker))  # type: ignore[arg-type]
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
    assert json.loads((tmp_path / RESULTS).read_text()) == expected
    assert logged[0] == (10, 100, {"best/loss": 0.5, "best/n": 3})
    assert logged[1:] == ([(10, 100, {"test/loss": 0.5, "test/n": 2})] if asks_test else [])
    made.splits["validation"].records.clear()
    made.conclude(SimpleNamespace(tracker=tracker))  # type: ignore[arg-type]
    written = json.loads((tmp_path / RESULTS).read_text())
    assert written["chosen_by"] is None and "validation" not in written


def test_a_reference_follows_from_what_a_model_computes_untrained() -> None:
    base = ModelConfig(vocab_size=100, hidden_size=64)
    assert finetuning._that_counts(base) == {"vocab_size": 100, "hidden_size": 64}
    same = dataclasses.replace(
        base,
        dropout=0.1,
        attention_dropout=0.1,
        lora=LoraConfig(rank=4),
        experts=ExpertsConfig(balance_loss=0.5, router_z_loss=0.5),
    )
    assert finetuning._that_counts(same) == finetuning._that_counts(base)
    other = dataclasses.replace(base, experts=ExpertsConfig(num_experts=4), rope_theta=5.0)
    assert set(finetuning._that_counts(other)) == {"vocab_size", "hidden_size", "experts", "rope_theta"}


@pytest.mark.parametrize(
    ("theirs", "names", "anew"),
    [
        (["a", "b"], ["head.classes.weight", "embedding.weight"], []),
        (["b", "a"], ["head.classes.weight", "embedding.weight"], ["head.classes.weight"]),
        (None, ["head.classes.weight", "head.classes.bias"], ["head.classes.weight", "head.classes.bias"]),
        (None, ["embedding.weight"], []),
    ],
)
def test_a_head_of_other_classes_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: list[str] | None, names: list[str], anew: list[str]
) -> None:
    base = PretrainConfig(run_dir="x") if theirs is None else FinetuneConfig(classify=ClassifyConfig(classes=theirs))
    monkeypatch.setattr(finetuning, "load_run_config", lambda folder: base)
    made = session(FinetuneSession, FinetuneConfig(classify=ClassifyConfig(classes=["a", "b"])), tmp_path)
    assert made._other_classes("base", names) == anew


def test_what_is_not_trained_is_kept_once_with_the_weights_that_it_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, filled = list[Any](), list[Any]()
    monkeypatch.setattr("bigtx.engine.saving.save_frozen", lambda *given: kept.append(given[2:]))
    engine = SimpleNamespace(frozen=["a"], fill=lambda read, states: filled.append((read, states)))
    made = session(PretrainSession, pretrain(), tmp_path, engine=engine)
    made.begin_with("read")  # type: ignore[arg-type]
    assert filled == [("read", False)] and kept == [(tmp_path, "read")]
    for field, value in (
        ("dry_run", True),
        ("checkpoint", at(1)),
        ("engine", SimpleNamespace(frozen=[], fill=engine.fill)),
    ):
        other = session(PretrainSession, pretrain(), tmp_path, **({"engine": engine} | {field: value}))
        other.begin_with("read")  # type: ignore[arg-type]
    assert len(kept) == 1 and len(filled) == 4


def test_a_students_first_weights_are_the_seeds_or_its_teachers_layers(tmp_path: Path) -> None:
    config = PretrainConfig(run_dir="unused", seed=3, model=ModelConfig(vocab_size=8, hidden_size=4, init_std=1.0))
    shapes = {"embedding.weight": (8, 4)}
    made = session(PretrainSession, config, tmp_path, engine=SimpleNamespace(shapes=lambda: shapes))
    value = made.initial_weights()("embedding.weight", "master", 0, 32)
    config.seed = 4
    assert not torch.equal(value, made.initial_weights()("embedding.weight", "master", 0, 32))
    config.seed = 3
    asked: list[Any] = []
    made.teacher = SimpleNamespace(layers=lambda *given: asked.append(given) or "theirs")  # type: ignore[assignment]
    config.distill.copy_layers = False
    assert torch.equal(value[5:9], made.initial_weights()("embedding.weight", "master", 5, 9)) and not asked
    config.distill.copy_layers = True
    assert made.initial_weights() == "theirs" and asked[0][0] is shapes
    assert torch.equal(asked[0][1]("embedding.weight", "master", 5, 9), value[5:9])
