from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigtx.train import context as stop_module
from bigtx.train.context import EarlyStop, StopRequest
from bigtx.utils.processes import STOP_SIGNALS, stopped_at_once

STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), STATUSES.items())
def test_a_request_before_the_first_step_ends_the_run_once(number: signal.Signals, status: int) -> None:
    told: list[str] = []
    stop = StopRequest(lambda early: told.append(f"stopped {early}"))
    with pytest.raises(EarlyStop) as early:
        signal.raise_signal(number)
    assert early.value.code == status
    signal.raise_signal(signal.SIGTERM)
    assert told == ["stopped True"] and stop.came_early


def test_a_request_in_training_is_a_flag() -> None:
    told: list[str] = []
    stop = StopRequest(lambda early: told.append(f"stopping {early}"))
    stop.defer()
    assert not stop.requested
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert told == ["stopping False"] and stop.requested and not stop.came_early and stop.exit_status == 130


def test_a_signal_that_comes_while_the_first_is_handled_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    stop = StopRequest(lambda early: told.append(f"stopping {early}"))
    stop.defer()

    def named(number: int, name: type[signal.Signals] = signal.Signals) -> signal.Signals:
        monkeypatch.setattr(stop_module.signal, "Signals", name)
        signal.raise_signal(signal.SIGTERM)
        return name(number)

    monkeypatch.setattr(stop_module.signal, "Signals", named)
    signal.raise_signal(signal.SIGINT)
    assert told == ["stopping False"] and stop.exit_status == 130


def test_where_no_handler_is_heard_signals_do_what_they_do_by_themselves() -> None:
    StopRequest(lambda _: None)
    handler = signal.getsignal(signal.SIGTERM)
    with stopped_at_once():
        assert all(signal.getsignal(number) is signal.SIG_DFL for number in STOP_SIGNALS)
    assert all(signal.getsignal(number) == handler for number in STOP_SIGNALS)


def test_under_nohup_the_end_of_the_terminal_changes_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(lambda _: pytest.fail("nobody asked"))
    with stopped_at_once():
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    assert not stop.requested and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_file_asks_as_a_signal_does_and_is_deleted_when_the_request_is_answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stop_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    told: list[str] = []
    stop = StopRequest(lambda early: told.append(f"stopping {early}"))
    stop.defer()
    stop.watch(tmp_path / "STOP")
    assert not stop.requested
    (tmp_path / "STOP").touch()
    assert stop.requested and stop.requested and told == ["stopping False"] and stop.exit_status == 75
    stop.forget_file()
    stop.forget_file()
    assert not (tmp_path / "STOP").exists()


def test_a_file_is_not_looked_for_at_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 100.0
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now)
    stop = StopRequest(lambda _: None)
    stop.defer()
    stop.watch(tmp_path / "STOP")
    assert not stop.requested
    (tmp_path / "STOP").touch()
    assert not stop.requested
    now += stop_module.SECONDS_BETWEEN_LOOKS
    assert stop.requested
