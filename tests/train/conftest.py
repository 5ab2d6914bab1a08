"""What tests of the starts of a run share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train.attempts import Attempt

from bigtx.config.schema import PretrainConfig
from bigtx.engine import retention
from bigtx.train import context, execute, loop
from bigtx.train.state import RunState
from bigtx.utils import hardware, log
from bigtx.utils.processes import STOP_SIGNALS


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a run does and prints, in order; afterwards the process's signals are as before."""
    lines: list[str] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.setattr(log, "setup", lambda *_: None)
    monkeypatch.setattr(log, "say", lambda text="": lines.append(f"say {text}"))
    monkeypatch.setattr(context, "say_from_any_rank", lambda error: lines.append(f"error {error}"))
    monkeypatch.setattr(hardware, "describe", lambda: {"packages": {"bigtx": "0"}})
    monkeypatch.setattr(loop, "train", lambda run, stop: run.in_loop())
    monkeypatch.setattr(execute, "_announce_model", lambda run: lines.append("name the model"))
    yield lines
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(run_dir=str(tmp_path / "run"))


def saved(**manifest: Any) -> Any:
    """A checkpoint to resume from."""
    state = RunState(step=30, sequences=240, tokens=999, skipped_in_a_row=3, best_step=20, best_value=0.5).to_dict()
    facts = {"tokenizer": "t", "data": "d", "state": state, "num_updates": 27, "loss_scale": {"cur_scale": 2.0}}
    return SimpleNamespace(
        path=Path("step-30"), manifest=facts | {"expert_counts": [[1.0]]} | manifest, read="the file", closed=[]
    )


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def use(**manifest: Any) -> Any:
        found = saved(**manifest)
        found.close = lambda: found.closed.append(True)
        monkeypatch.setattr(retention, "choose", lambda folder, ranks, warn: found)
        return found

    return use


@pytest.fixture
def attempt(told: list[str], config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attempt]:
    """Make a start of a run; arguments are its attributes."""

    def make(**fields: Any) -> Attempt:
        made = Attempt(config, told, **fields)
        monkeypatch.setattr("bigtx.engine.ranks.Ranks", made.ranks)
        return made

    return make
