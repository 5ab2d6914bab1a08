"""What a start of a run records, and what it gives to the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigtx.config.schema import EngineConfig, PretrainConfig
from bigtx.train import execute
from bigtx.train.context import RunContext
from bigtx.train.start import Start, complete
from bigtx.train.state import RunState
from bigtx.utils import hardware

Event = tuple[int, str, dict[str, Any]]


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trackers that are made, each with the arguments that it got and its events."""
    made: list[Any] = []

    def tracker(folder: Path, settings: Any, **fields: Any) -> Any:
        events: list[Event] = []
        made.append(SimpleNamespace(fields=fields, events=events, close=lambda *_: None))
        made[-1].event = lambda step, kind, **facts: events.append((step, kind, facts))
        return made[-1]

    monkeypatch.setattr(execute, "Tracker", tracker)
    monkeypatch.setattr(execute.processes, "launcher_name", lambda: "torchrun")
    monkeypatch.setattr(execute.processes, "slurm_place", lambda: {"slurm_job": "5"})
    return made


def opened(context: Any, found: Start, base: dict[str, Any]) -> None:
    execute.open_tracker(
        context, context.config, found, RunState(step=30), total_steps=50, better={}, job_type="pretrain", base=base
    )


def test_the_history_of_a_start_is_recorded(
    told: list[str], config: PretrainConfig, resumed: Callable[..., Any], trackers: list[Any]
) -> None:
    config.engine = EngineConfig(zero_stage=2)
    context: Any = RunContext(config)
    context.ranks = SimpleNamespace(rank=0, world_size=4)
    start = (30, "start", {"host": "here", "world_size": 4, "launcher": "torchrun", "slurm_job": "5"})
    opened(context, Start({"host": "here"}, None, []), {})
    context.note_damaged("step-40 is damaged")
    changed = [{"key": "a", "old": 1, "new": 2}, {"key": "b", "old": 3, "new": 4}]
    opened(context, Start({"host": "here"}, resumed(), changed), {})
    assert [tracker.events for tracker in trackers] == [
        [start],
        [
            start,
            (30, "refused_checkpoint", {"text": "step-40 is damaged"}),
            (30, "resume", {"checkpoint": "step-30", "world_size": 4, "zero_stage": 2}),
            (30, "config_change", {"key": "a", "old": 1, "new": 2}),
            (30, "config_change", {"key": "b", "old": 3, "new": 4}),
        ],
    ]
    assert told[-1] == "say warning: step-40 is damaged"


def test_the_tracker_begins_at_the_checkpoint_and_knows_the_base(config: PretrainConfig, trackers: list[Any]) -> None:
    context: Any = SimpleNamespace(
        config=config,
        folder=Path(config.run_dir),
        ranks=SimpleNamespace(rank=1, world_size=2),
        damaged=[],
        resources=ExitStack(),
    )
    base = {"checkpoint": "c", "manifest_sha256": "m", "step": 9, "wandb_run_id": "w0"}
    for facts in ({}, base | {"more": 1}):
        opened(context, Start({"host": "here"}, None, []), facts)
    names = ("rank", "total_steps", "resumed_step", "job_type", "base")
    assert [[tracker.fields[name] for name in names] for tracker in trackers] == [
        [1, 50, 30, "pretrain", None],
        [1, 50, 30, "pretrain", base],
    ]


def test_the_config_that_is_kept_has_the_micro_batches_that_were_asked_for(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[PretrainConfig] = []
    monkeypatch.setattr(execute, "describe_run", lambda config, **_: described.append(config))
    config.train.global_batch_size, config.train.micro_batch_size = 16, 8
    context: Any = RunContext(config)
    context.ranks = SimpleNamespace(world_size=4, on_first=lambda action: action())
    completed, engine = complete(config, context.ranks, None), SimpleNamespace(deepspeed_config={})
    execute.write_description(context, completed, Start({}, None, []), None, engine)
    assert completed.train.micro_batch_size == 4 and [one.train.micro_batch_size for one in described] == [8]


@pytest.mark.parametrize(("asked", "ranks", "taken"), [(8, 2, 8), (8, 4, 4), (6, 2, 4), (16, 1, 16)])
def test_a_micro_batch_is_the_largest_that_divides_a_ranks_share(
    told: list[str], config: PretrainConfig, asked: int, ranks: int, taken: int
) -> None:
    config.train.global_batch_size, config.train.micro_batch_size = 16, asked
    world: Any = SimpleNamespace(world_size=ranks)
    assert complete(config, world, None).train.micro_batch_size == taken and len(told) == (asked != taken)


def test_ranks_wait_as_long_as_the_config_says(
    told: list[str], config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seconds = SimpleNamespace(world_size=2, notes_on_devices=lambda: ["a note"]), list[float]()
    monkeypatch.setattr("bigtx.engine.ranks.Ranks", lambda timeout_seconds: seconds.append(timeout_seconds) or made)
    config.engine.timeout = "2 min"
    assert RunContext(config).join_ranks() is made and seconds == [120.0] and told == ["say a note"]


def test_the_meter_continues_its_window(config: PretrainConfig, resumed: Callable[..., Any]) -> None:
    found, world = resumed(meter={"labels": 5, "loss_sum": (2.5).hex()}), SimpleNamespace(world_size=2)
    assert execute.open_meter(config, world, Start({}, found, []), 1.0).metrics()["train/loss"] == 0.5


def test_the_peak_of_all_ranks_is_known_of_gpus_alone(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak() -> float | None:
        world: Any = SimpleNamespace(world_size=3)
        return execute.open_meter(config, world, Start({}, None, []), 1.0).peak_flops

    assert peak() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    one = hardware.peak_flops("NVIDIA H200", config.engine.precision)
    assert one and peak() == 3 * one
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert peak() is None
