"""A step neither waits for the device nor reads values from it, except in the places that are listed here.

On the meta device there are no values: an operation that reads one raises an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.engines import MODEL, SHAPES, RowsTask, global_batch
from engine.ranks import run_ranks
from torch import nn
from train.objectives import test_objectives as objectives
from train.tasks import test_neighbours as tasks

from bigtx.config.schema import OptimizerConfig, PretrainConfig
from bigtx.engine import engine as engines
from bigtx.engine.engine import Engine
from bigtx.engine.fragments import held_fragments
from bigtx.engine.optimizers import Optimizer
from bigtx.engine.trainable import parameter_groups
from bigtx.model.transformer import Recompute, Transformer
from bigtx.pretraining.objectives import LikelihoodTask

META = torch.device("meta")


def on_meta(model: Any) -> Transformer:
    """A model in training, with dropout, without values."""
    with META:
        made = Transformer(dataclasses.replace(model, dropout=0.1))
    made.dropout_seed = 3
    return made.train()


class Passes:
    """DeepSpeed's engine, whose step does nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *arguments: Any, **fields: Any) -> Any:
        return self.module(*arguments, **fields)

    def train(self) -> None: ...

    def step(self) -> None: ...

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()


@pytest.fixture
def make_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the part of a step before its update, with two equal micro batches."""
    monkeypatch.setattr(engines.dist, "all_reduce", lambda tensor: None)
    # The meta device has no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    monkeypatch.setattr(Engine, "_update", lambda *arguments: (1.0, True, False))

    def step(model: Transformer, task: Any, batch: Any) -> None:
        engine = object.__new__(Engine)
        config = PretrainConfig(model=model.config)
        num_experts = model.config.experts.num_experts
        counts = torch.ones((2, num_experts), device=META) if num_experts else None
        optimizer = SimpleNamespace(set_learning_rate_factor=lambda factor: None)
        vars(engine).update(
            config=config, deepspeed=Passes(model), optimizer=optimizer, world_size=2, device=META,
            expert_counts=counts, _forwards=deque(), replicated=False, stage=1, reduction=None,
        )  # fmt: skip
        moved = batch.to(META)
        engine.train_step([moved, moved], task, num_labels=9, num_tokens=99, learning_rate_factor=1.0)
        gradients = [parameter.grad for parameter in model.parameters()]
        assert any(gradient is not None and gradient.is_meta for gradient in gradients)

    return step


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_every_shape_reads_no_value(make_step: Any, shape: str, recompute: Recompute) -> None:
    model = on_meta(dataclasses.replace(MODEL, **SHAPES[shape]))
    model.activation_checkpointing = recompute
    make_step(model, RowsTask(shape), global_batch(0))


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("name", objectives.SHAPES)
def test_a_step_of_every_objective_reads_no_value(make_step: Any, name: str, document_mask: bool) -> None:
    batch = objectives.make(name, document_mask=document_mask).prepare(
        objectives.rows(document_mask=document_mask, short=True)
    )
    model = dataclasses.replace(
        MODEL, shape=objectives.SHAPES[name], vocab_size=objectives.VOCABULARY, max_sequence_length=objectives.LENGTH
    )
    make_step(on_meta(model), LikelihoodTask(z_loss=1e-4), batch)


@pytest.mark.parametrize("case", tasks.CASES)
def test_a_step_of_every_task_reads_no_value(make_step: Any, case: str) -> None:
    task, examples = tasks.examples_of(case, tasks.train(tasks.TokenizerTrainConfig(vocab_size=420), tasks.TEXTS))
    make_step(on_meta(task.config.model), task, task.collate(examples, tasks.NUMBERS[: len(examples)]))


@pytest.mark.parametrize("method", ["ctc", "seq2seq"])
def test_a_step_on_recordings_reads_no_value(
    make_step: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device has no kernel for CTC. That of CUDA reads the lengths on the host."""

    def ctc_loss(scores: torch.Tensor, labels: torch.Tensor, *lengths: Any, **settings: Any) -> torch.Tensor:
        assert not any(torch.is_tensor(part) for part in lengths) and len(lengths[0]) == len(labels)
        return scores.sum((0, 2))

    monkeypatch.setattr(torch.nn.functional, "ctc_loss", ctc_loss)
    task, examples = tasks.recordings(method, tmp_path)
    make_step(on_meta(task.config.model), task, task.collate(examples, tasks.NUMBERS))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_reads_no_value(name: Any) -> None:
    model = on_meta(MODEL)
    config = OptimizerConfig(name=name, ema_decay=0.9)
    optimizer = Optimizer(parameter_groups(config, model.named_parameters()), config, torch.bfloat16, META)
    held = held_fragments(SimpleNamespace(optimizer=optimizer, module=model))
    flats = [(index, flat) for index, group in enumerate(optimizer.param_groups) for flat in group["params"]]
    optimizer.bind(held, flats, replicated=True)
    optimizer.set_learning_rate_factor(0.5)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()


ZERO = "deepspeed/runtime/zero"
WAITS: dict[int, set[str]] = {
    0: set(),
    1: set(),
    2: {f"{ZERO}/stage_1_and_2.py independent_gradient_partition_epilogue"},
    3: {
        f"{ZERO}/partitioned_param_coordinator.py _fetch_sub_module_impl",
        f"{ZERO}/stage3.py __reduce_and_partition_ipg_grads",
        f"{ZERO}/stage3.py independent_gradient_partition_epilogue",
        f"{ZERO}/partition_parameters.py _allgather_params_coalesced",
    },
}
"""Where a step waits for the device, by stage: docs/performance.md has line and reason of each."""
READ = "bigtx/engine/optimizers.py __float__"
READS: dict[int, set[str]] = {
    0: {READ},
    1: {READ},
    2: {f"{ZERO}/stage_1_and_2.py has_overflow", "deepspeed/runtime/utils.py is_invalid_grad_norm"},
    3: {"deepspeed/runtime/utils.py is_invalid_grad_norm"},
}
"""Where an update reads the norm of the gradient, and whether something is not finite."""


@pytest.mark.dist
def test_where_a_step_waits_for_the_device(tmp_path: Path) -> None:
    """In bf16 with AdamW. Further micro batches read nothing, and at stages 0 and 1 do not wait."""
    accumulations = (1, 4)
    # In so small a model stage 3 would gather nothing.
    gathers = {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}
    tried = [
        {"stage": stage, "precision": "bf16", "accumulation": accumulation, "deepspeed": gathers if stage == 3 else {}}
        for stage, accumulation in itertools.product(WAITS, accumulations)
    ]
    answers = run_ranks(tmp_path, 2, "waits", cases=tried)
    for stage in WAITS:
        one, four = (answers.pop(0) for _ in accumulations)
        assert set(one["waits"]) == set(four["waits"]) == WAITS[stage], stage
        assert one["reads"] == four["reads"] and set(one["reads"]) <= READS[stage] | {READ}, stage
