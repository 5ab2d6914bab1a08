"""How W&B's client is prepared and started, with the real settings and without its process."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from bigtx.track.client import UPLOAD_SECONDS, prepare_environment, start_run


def test_the_environment_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of a service is that of another process's client; what the user has set stays."""
    monkeypatch.setenv("WANDB_SERVICE", "2-1-tcp-localhost-1")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "7")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    prepare_environment()
    names = ("WANDB_SERVICE", "WANDB_HTTP_TIMEOUT", "WANDB_ERROR_REPORTING")
    assert [os.environ.get(name) for name in names] == [None, "7", "true"]
    for name in names[1:]:
        monkeypatch.delenv(name)
    prepare_environment()
    assert [os.environ.get(name) for name in names] == [None, "5", "false"]


def test_the_settings_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    given: dict[str, Any] = {}
    metrics: list[Any] = []
    run = SimpleNamespace(define_metric=lambda *names, **named: metrics.append((*names, named)))
    monkeypatch.setattr(wandb, "init", lambda **named: given.update(named) or run)

    def stop() -> None:
        pass

    assert start_run({"pid": 12, "init": {"id": "abc"}}, "offline", stop) is run
    settings = given.pop("settings")
    assert given == {"mode": "offline", "resume": "allow", "allow_val_change": True, "id": "abc"}
    assert metrics == [("train/tokens", {}), ("*", {"step_metric": "train/tokens"})]
    # No code, no Git state and no list of packages leave the machine, and nothing waits for long.
    assert (settings.console, settings.silent, settings.save_code, settings.stop_fn) == ("off", True, False, stop)
    assert (settings.disable_code, settings.disable_git, settings.disable_job_creation) == (True, True, True)
    assert (settings.x_save_requirements, settings.x_disable_meta, settings.x_stats_pid) == (False, True, 12)
    assert (settings.init_timeout, settings.x_graphql_timeout_seconds, settings.x_service_wait) == (20, 30, 20)
    assert (settings.finish_timeout, settings.x_transaction_log_flush_interval) == (UPLOAD_SECONDS, 1)
