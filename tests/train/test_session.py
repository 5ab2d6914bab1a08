"""How a life of a run begins and ends, with an engine and ranks that only take note."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train.life import Life

from bigtx.config.schema import EngineConfig, PretrainConfig
from bigtx.train.state import RunState
from bigtx.train.stop import EarlyStop
from bigtx.utils import log, processes
from bigtx.utils.errors import BigtxError, CheckpointError, LaunchError
from bigtx.utils.locks import FolderLock


def live(life: Life) -> int:
    with life:
        return life.run()


def with_lock(life: Life, ends: Callable[[], bool]) -> Callable[[], bool]:
    """A loop that ends so, after it has seen that the folder is held."""

    def act() -> bool:
        assert (life.run_dir / "run.lock").is_file()
        life.state.step = 7
        return ends()

    return act


def tail(told: list[str], count: int) -> list[str]:
    return [line for line in told if not line.startswith("say")][-count:]


@pytest.mark.parametrize("asks", [False, True])
def test_a_finished_run_lets_go_of_its_folder_and_its_ranks(
    told: list[str], config: PretrainConfig, asks: bool
) -> None:
    life = Life(config, told)

    def end() -> bool:
        if asks:
            (life.run_dir / "STOP").touch()
        return True

    life.in_loop = with_lock(life, end)
    assert live(life) == 0 and life.status == "finished"
    assert tail(told, 7) == [
        "conclude",
        "name the model",
        "close tracker finished 7",
        "close loader",
        "close tracker finished 7",
        "barrier",
        "leave",
    ]
    assert not (life.run_dir / "run.lock").exists() and not (life.run_dir / "STOP").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (None, 75)])
def test_a_stopped_run_answers_lets_go_and_says_how_to_resume(
    told: list[str], config: PretrainConfig, number: signal.Signals | None, status: int
) -> None:
    life = Life(config, told)

    def end() -> bool:
        if number:
            signal.raise_signal(number)
        else:
            (life.run_dir / "STOP").touch()
        assert life.stop.requested
        return False

    life.in_loop = with_lock(life, end)
    assert live(life) == status and life.status == "stopped"
    assert tail(told, 6) == [
        "message stopping: a checkpoint is saved after this step",
        "close tracker stopped 7",
        "close loader",
        "close tracker stopped 7",
        "barrier",
        "leave",
    ]
    assert told.count("message stopping: a checkpoint is saved after this step") == 1
    assert any("stopped at step 7 with a checkpoint" in line for line in told)
    assert not (life.run_dir / "run.lock").exists() and not (life.run_dir / "STOP").exists()


@pytest.mark.parametrize("speaks", [True, False])
def test_an_error_of_the_user_is_said_by_the_first_rank_and_nobody_is_waited_for(
    told: list[str], config: PretrainConfig, speaks: bool
) -> None:
    life, error = Life(config, told, speaks=speaks), BigtxError("what went wrong")

    def end() -> bool:
        raise error

    life.in_loop = with_lock(life, end)
    with pytest.raises(BigtxError, match="what went wrong"):
        live(life)
    assert error.reported and life.status == "failed"
    expected = ["close loader", "close tracker failed 7", "error what went wrong"]
    assert tail(told, len(expected) - (not speaks)) == expected[: None if speaks else -1]
    assert "barrier" not in told and not (life.run_dir / "run.lock").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gloo] Connection closed by peer [10.0.0.1]:1", "lost the connection to another rank"),
        ("Connection reset by peer", "lost the connection to another rank"),
        ("NCCL communicator was aborted", "lost the connection to another rank"),
        ("Timed out waiting 20000ms for recv", "rank 3, 5 did not answer within engine.timeout=30 min"),
        ("Watchdog caught collective operation timeout", "rank 3, 5 did not answer"),
    ],
)
def test_a_rank_that_is_gone_or_silent_is_no_fault_of_this_one(
    told: list[str], config: PretrainConfig, text: str, message: str
) -> None:
    life = Life(config, told)

    def end() -> bool:
        raise RuntimeError(text)

    life.in_loop = with_lock(life, end)
    with pytest.raises(LaunchError, match=message) as raised:
        live(life)
    assert raised.value.exit_status == 1 and raised.value.reported
    assert sum(line.startswith("error ") for line in told) == 1
    assert not (life.run_dir / "run.lock").exists()


def test_with_a_supervisor_it_is_the_supervisor_that_names_a_rank_that_is_gone(
    told: list[str], config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: dict[str, Any] = {}
    monkeypatch.setattr(log, "report", lambda **facts: reported.update(facts) or True)
    life = Life(config, told)

    def end() -> bool:
        raise RuntimeError("Broken pipe")

    life.in_loop = with_lock(life, end)
    with pytest.raises(LaunchError, match="lost the connection") as raised:
        live(life)
    assert raised.value.reported and not any(line.startswith("error ") for line in told)
    assert reported == {"step": 7, "lost": True, "error": str(raised.value)}


def test_a_defect_keeps_its_traceback_and_not_the_lock(told: list[str], config: PretrainConfig) -> None:
    life = Life(config, told)
    life.in_loop = with_lock(life, lambda: [][0])
    with pytest.raises(IndexError):
        live(life)
    assert tail(told, 2) == ["close loader", "close tracker failed 7"]
    assert not any(line.startswith("error ") for line in told)
    assert not (life.run_dir / "run.lock").exists()


def test_a_request_before_the_first_step_ends_the_run_on_the_spot(told: list[str], config: PretrainConfig) -> None:
    life = Life(config, told, in_data=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(EarlyStop) as stopped:
        live(life)
    assert stopped.value.code == 75 and life.status == "stopped"
    assert told[-1] == "say stopped before the first step; nothing to save"


def test_another_ranks_end_hides_no_early_request(told: list[str], config: PretrainConfig) -> None:
    def end() -> None:
        with pytest.raises(EarlyStop):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(EarlyStop) as stopped:
        live(Life(config, told, in_data=end))
    assert stopped.value.code == 130


def test_a_request_while_the_run_ends_changes_nothing(told: list[str], config: PretrainConfig) -> None:
    life = Life(config, told, at_end=True)
    life.loader = SimpleNamespace(close=lambda: signal.raise_signal(signal.SIGTERM))
    assert live(life) == 0 and tail(told, 2) == ["barrier", "leave"] and life.stop.requested


@pytest.mark.parametrize("is_supervised", [True, False])
def test_a_folder_that_is_held_is_refused_before_anything_is_written(
    told: list[str], config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, is_supervised: bool
) -> None:
    """By the supervisor, where there is one; else by each rank."""
    monkeypatch.setattr(processes, "is_supervised", lambda: is_supervised)
    folder = Path(config.run_dir)
    folder.mkdir()
    life = Life(config, told, at_end=True)
    with FolderLock(folder):
        if is_supervised:
            life.__enter__()
            life.__exit__(None, None, None)
        else:
            with pytest.raises(LaunchError, match="is in use by process"):
                life.__enter__()
            assert told == []
        assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_a_run_with_nothing_left_lets_go_without_an_engine(told: list[str], config: PretrainConfig) -> None:
    life = Life(config, told, at_end=True)
    assert live(life) == 0 and tail(told, 2) == ["barrier", "leave"] and not hasattr(life, "engine")
    assert not (life.run_dir / "run.lock").exists()


@pytest.mark.parametrize(("error", "is_kept"), [(None, False), (BigtxError("x"), False), (ValueError("x"), True)])
def test_a_dry_run_leaves_nothing_but_what_explains_a_defect(
    told: list[str], config: PretrainConfig, error: Exception | None, is_kept: bool
) -> None:
    life = Life(config, told, dry_run=True, at_end=True)

    def act() -> None:
        assert life.run_dir != Path(config.run_dir) and life.run_dir.is_dir() and life.config.track.wandb == "off"
        if error:
            raise error

    life.in_data = act
    if error:
        with pytest.raises(type(error)):
            live(life)
    else:
        live(life)
    assert life.run_dir.is_dir() is is_kept and not Path(config.run_dir).exists()
    if is_kept:
        life.run_dir.rmdir()


@pytest.mark.parametrize(("precision", "harmless"), [("fp16", 2), ("bf16", 0), ("fp32", 0)])
def test_all_that_a_checkpoint_knows_comes_back(
    told: list[str], config: PretrainConfig, resumed: Callable[..., Any], precision: Any, harmless: int
) -> None:
    config.engine = EngineConfig(precision=precision)
    found, life = resumed(), Life(config, told)
    assert live(life) == 0
    begun = [line for line in told if not line.startswith("say")][:4]
    assert begun == [
        "fill from the file states=True",
        "loss scale {'cur_scale': 2.0}",
        "expert counts [[1.0]]",
        "resume",
    ]
    assert life.engine.optimizer.num_updates == 27 and found.closed
    state = life.state
    assert (state.step, state.sequences, state.tokens, state.best_step, state.best_value) == (30, 240, 999, 20, 0.5)
    assert (state.skipped_in_a_row, state.harmless_skips) == (3, harmless)


def test_other_settings_have_all_of_the_skips_that_are_allowed(
    told: list[str], config: PretrainConfig, resumed: Callable[..., Any]
) -> None:
    resumed()
    life = Life(config, told)
    with life:
        life.join_ranks()
        life.open_folder()
        life.changed = [{"key": "optimizer.learning_rate", "old": 1, "new": 2}]
        life.build_engine()
        life.load_weights()
    assert life.state.skipped_in_a_row == 0 and life.state.step == 30


def test_a_new_run_begins_by_its_own_weights(told: list[str], config: PretrainConfig) -> None:
    config.engine = EngineConfig(precision="fp16")
    life = Life(config, told)
    assert live(life) == 0 and "begin" in told and "resume" not in told
    assert life.state == RunState(harmless_skips=2)


@pytest.mark.parametrize(
    ("key", "message"),
    [("tokenizer", "with another tokenizer"), ("data", "on other data"), ("teacher", "under another teacher")],
)
def test_a_checkpoint_of_other_inputs_is_refused(
    told: list[str], config: PretrainConfig, resumed: Callable[..., Any], key: str, message: str
) -> None:
    resumed(**{key: "other"})
    life = Life(config, told)
    with pytest.raises(CheckpointError, match=rf"{message}.*it had other"):
        live(life)
    assert not (life.run_dir / "run.lock").exists()
