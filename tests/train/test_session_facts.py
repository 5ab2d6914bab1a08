"""What a session records, and what it gives to the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train.life import Life

from bigtx.config.schema import EngineConfig, PretrainConfig
from bigtx.train import session
from bigtx.train.session import Session
from bigtx.train.state import RunState
from bigtx.utils import hardware


def test_the_history_of_a_life_is_recorded(
    told: list[str], config: PretrainConfig, resumed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.processes, "launcher_name", lambda: "torchrun")
    monkeypatch.setattr(session.processes, "slurm_place", lambda: {"slurm_job": "5"})
    config.engine = EngineConfig(zero_stage=2)
    life, events = Life(config, told), list[tuple[int, str, dict[str, Any]]]()
    life.tracker = SimpleNamespace(event=lambda step, kind, **facts: events.append((step, kind, facts)))
    life.environment, life.ranks = {"host": "here"}, SimpleNamespace(world_size=4)
    life.state, life.damaged, life.changed = RunState(step=30), [], []
    start = (30, "start", {"host": "here", "world_size": 4, "launcher": "torchrun", "slurm_job": "5"})
    life._tell_history()
    assert events == [start]
    events.clear()
    life._note_damaged("step-40 is damaged")
    life.changed = [{"key": "a", "old": 1, "new": 2}, {"key": "b", "old": 3, "new": 4}]
    life.checkpoint = resumed()
    life._tell_history()
    assert events == [
        start,
        (30, "refused_checkpoint", {"text": "step-40 is damaged"}),
        (30, "resume", {"checkpoint": "step-30", "world_size": 4, "zero_stage": 2}),
        (30, "config_change", {"key": "a", "old": 1, "new": 2}),
        (30, "config_change", {"key": "b", "old": 3, "new": 4}),
    ]
    assert told[-1] == "say warning: step-40 is damaged"


def test_the_loop_is_given_what_the_session_knows(
    told: list[str], config: PretrainConfig, resumed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker begins at the checkpoint's step, the meter with its window, the rate by the run's length."""
    trackers: list[dict[str, Any]] = []

    def tracker(run_dir: Path, settings: Any, **fields: Any) -> Any:
        trackers.append(fields)
        return SimpleNamespace(wandb_run_id="w1", event=lambda *_, **__: None)

    described: list[PretrainConfig] = []
    monkeypatch.setattr("bigtx.track.tracker.Tracker", tracker)
    monkeypatch.setattr("bigtx.train.run_folder.describe_run", lambda config, **_: described.append(config))
    config.train.micro_batch_size = 3
    config.schedule.warmup, config.schedule.name = "2k tokens", "constant"
    life = Life(config, told, total_steps=50, tokens_per_step=500, patience=4, _given_micro_batch_size=8)
    life.checkpoint = resumed(meter={"labels": 5, "loss_sum": (2.5).hex()})
    life.ranks = SimpleNamespace(rank=0, world_size=2, on_first=lambda action: action(), from_first=lambda value: value)
    life.run_dir, life.environment, life.state = Path(config.run_dir), {"host": "here"}, RunState(step=30)
    life.damaged, life.changed, life.tokenizer, life.task = [], [], None, "task"
    life.engine = SimpleNamespace(deepspeed_config={})
    made = Session._run(life)
    (fields,) = trackers
    known = {name: fields[name] for name in ("rank", "total_steps", "resumed_step", "job_type", "base")}
    assert known == {"rank": 0, "total_steps": 50, "resumed_step": 30, "job_type": "test", "base": None}
    assert made.facts["wandb_run_id"] == "w1" and made.meter.metrics()["train/loss"] == 0.5
    assert [made.schedule.factor(step) for step in (1, 4, 5)] == [0.25, 1.0, 1.0]
    assert (made.schedule.total_steps, made.patience, made.task, made.state) == (50, 4, "task", life.state)
    # The config that is kept has what was asked for, not what so many ranks could take.
    assert [one.train.micro_batch_size for one in described] == [8] and made.config.train.micro_batch_size == 3
    life.base_facts = {"checkpoint": "c", "manifest_sha256": "m", "step": 9, "wandb_run_id": "w0", "more": 1}
    Session._run(life)
    assert trackers[1]["base"] == {"checkpoint": "c", "manifest_sha256": "m", "step": 9, "wandb_run_id": "w0"}


@pytest.mark.parametrize(("asked", "ranks", "taken"), [(8, 2, 8), (8, 4, 4), (6, 2, 4), (16, 1, 16)])
def test_a_micro_batch_is_the_largest_that_divides_a_ranks_share(
    told: list[str], config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, asked: int, ranks: int, taken: int
) -> None:
    made = SimpleNamespace(world_size=ranks, notes_on_devices=lambda: ["a note"])
    seconds: list[float] = []
    monkeypatch.setattr("bigtx.engine.ranks.Ranks", lambda timeout_seconds: seconds.append(timeout_seconds) or made)
    config.train.global_batch_size, config.train.micro_batch_size = 16, asked
    config.engine.timeout = "2 min"
    life = Life(config, told)
    Session.join_ranks(life)
    assert life.config.train.micro_batch_size == taken and life.ranks is made and seconds == [120.0]
    assert told[0] == "say a note" and len(told) == 1 + (asked != taken)


def test_the_peak_of_all_ranks_is_known_of_gpus_alone(
    told: list[str], config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    life = Life(config, told)
    life.ranks = SimpleNamespace(world_size=3)
    assert life._peak_flops() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    one = hardware.peak_flops("NVIDIA H200", config.engine.precision)
    assert one and life._peak_flops() == 3 * one
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert life._peak_flops() is None
