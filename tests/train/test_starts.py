"""How a start of a run begins and ends, with an engine and ranks that only take note."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train.attempts import Attempt

from bigtx.config.schema import EngineConfig, PretrainConfig
from bigtx.train import loop
from bigtx.train.context import EarlyStop, RunContext
from bigtx.train.state import RunState
from bigtx.utils import heartbeat, log, processes
from bigtx.utils.errors import BigtxError, CheckpointError, LaunchError
from bigtx.utils.locks import FolderLock


def with_lock(attempted: Attempt, ends: Callable[[], bool]) -> Callable[[], bool]:
    """A loop that ends so, after it has seen that the folder is held."""

    def act() -> bool:
        assert (attempted.context.folder / "run.lock").is_file()
        assert attempted.context.state
        attempted.context.state.step = 7
        return ends()

    return act


def tail(told: list[str], count: int) -> list[str]:
    return [line for line in told if not line.startswith("say")][-count:]


@pytest.mark.parametrize("asks", [False, True])
def test_a_finished_run_lets_go_of_its_folder_and_its_ranks(
    told: list[str], attempt: Callable[..., Attempt], asks: bool
) -> None:
    attempted = attempt()

    def end() -> bool:
        if asks:
            (attempted.context.folder / "STOP").touch()
        return True

    attempted.in_loop = with_lock(attempted, end)
    assert attempted.run() == 0 and attempted.context.status == "finished"
    assert tail(told, 7) == [
        "conclude",
        "name the model",
        "close tracker finished 7",
        "close loader",
        "close tracker finished 7",
        "barrier",
        "leave",
    ]
    assert not (attempted.context.folder / "run.lock").exists() and not (attempted.context.folder / "STOP").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (None, 75)])
def test_a_stopped_run_answers_lets_go_and_says_how_to_resume(
    told: list[str], attempt: Callable[..., Attempt], number: signal.Signals | None, status: int
) -> None:
    attempted = attempt()

    def end() -> bool:
        if number:
            signal.raise_signal(number)
        else:
            (attempted.context.folder / "STOP").touch()
        assert attempted.context.stop.requested
        return False

    attempted.in_loop = with_lock(attempted, end)
    assert attempted.run() == status and attempted.context.status == "stopped"
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
    assert not (attempted.context.folder / "run.lock").exists() and not (attempted.context.folder / "STOP").exists()


@pytest.mark.parametrize("speaks", [True, False])
def test_an_error_of_the_user_is_said_by_the_first_rank_and_nobody_is_waited_for(
    told: list[str], attempt: Callable[..., Attempt], speaks: bool
) -> None:
    attempted, error = attempt(speaks=speaks), BigtxError("what went wrong")

    def end() -> bool:
        raise error

    attempted.in_loop = with_lock(attempted, end)
    with pytest.raises(BigtxError, match="what went wrong"):
        attempted.run()
    assert error.reported and attempted.context.status == "failed"
    expected = ["close loader", "close tracker failed 7", "error what went wrong"]
    assert tail(told, len(expected) - (not speaks)) == expected[: None if speaks else -1]
    assert "barrier" not in told and not (attempted.context.folder / "run.lock").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gloo] Connection closed by peer [10.0.0.1]:1", "lost the connection to another rank"),
        ("Connection reset by peer", "lost the connection to another rank"),
        ("NCCL communicator was aborted", "lost the connection to another rank"),
        ("Timed out waiting 20000ms for recv", "rank 3, rank 5 did not answer within engine.timeout=30 min"),
        # The second of two collectives that a rank waits for, after the first has reached the time-out.
        ("Application timeout caused pair closure", "rank 3, rank 5 did not answer"),
        ("Watchdog caught collective operation timeout", "rank 3, rank 5 did not answer"),
    ],
)
def test_a_rank_that_is_gone_or_silent_is_no_fault_of_this_one(
    told: list[str], attempt: Callable[..., Attempt], text: str, message: str
) -> None:
    attempted = attempt()

    def end() -> bool:
        raise RuntimeError(text)

    attempted.in_loop = with_lock(attempted, end)
    with pytest.raises(LaunchError, match=message) as raised:
        attempted.run()
    assert raised.value.exit_status == 1 and raised.value.reported
    assert sum(line.startswith("error ") for line in told) == 1
    assert not (attempted.context.folder / "run.lock").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Broken pipe", "lost the connection"),
        ("Timed out waiting 20000ms for recv", "another rank did not answer within engine.timeout=30 min"),
    ],
)
def test_with_a_supervisor_it_is_the_supervisor_that_names_a_rank_that_is_gone(
    told: list[str], attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    reported: dict[str, Any] = {}
    monkeypatch.setattr(log, "report", lambda **facts: reported.update(facts) or True)
    attempted = attempt()

    def end() -> bool:
        raise RuntimeError(text)

    attempted.in_loop = with_lock(attempted, end)
    with pytest.raises(LaunchError, match=message) as raised:
        attempted.run()
    assert raised.value.reported and not any(line.startswith("error ") for line in told)
    assert reported == {"step": 7, "lost": True, "error": str(raised.value)}


def test_a_defect_keeps_its_traceback_and_not_the_lock(told: list[str], attempt: Callable[..., Attempt]) -> None:
    attempted = attempt()
    attempted.in_loop = with_lock(attempted, lambda: [][0])
    with pytest.raises(IndexError):
        attempted.run()
    assert tail(told, 2) == ["close loader", "close tracker failed 7"]
    assert not any(line.startswith("error ") for line in told)
    assert not (attempted.context.folder / "run.lock").exists()


def test_a_request_before_the_first_step_ends_the_run_on_the_spot(
    told: list[str], attempt: Callable[..., Attempt]
) -> None:
    attempted = attempt(in_data=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(EarlyStop) as stopped:
        attempted.run()
    assert stopped.value.code == 75 and attempted.context.status == "stopped"
    assert told[-1] == "say stopped before the first step; nothing to save"


def test_another_ranks_end_hides_no_early_request(told: list[str], attempt: Callable[..., Attempt]) -> None:
    def end() -> None:
        with pytest.raises(EarlyStop):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(EarlyStop) as stopped:
        attempt(in_data=end).run()
    assert stopped.value.code == 130


def test_a_request_while_the_run_ends_changes_nothing(told: list[str], attempt: Callable[..., Attempt]) -> None:
    attempted = attempt(at_end=True)
    attempted.context.resources.callback(lambda: signal.raise_signal(signal.SIGTERM))
    assert attempted.run() == 0 and tail(told, 2) == ["barrier", "leave"] and attempted.context.stop.requested


@pytest.mark.parametrize("is_supervised", [True, False])
def test_a_folder_that_is_held_is_refused_before_anything_is_written(
    told: list[str], config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, is_supervised: bool
) -> None:
    """The supervisor refuses it, where there is one; else each rank does."""
    monkeypatch.setattr(processes, "is_supervised", lambda: is_supervised)
    folder = Path(config.run_dir)
    folder.mkdir()
    context = RunContext(config)
    with FolderLock(folder):
        if is_supervised:
            with context:
                pass
        else:
            with pytest.raises(LaunchError, match="is in use by process"):
                context.__enter__()
            assert told == []
        assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_a_run_with_nothing_left_lets_go_without_an_engine(told: list[str], attempt: Callable[..., Attempt]) -> None:
    attempted = attempt(at_end=True)
    assert attempted.run() == 0 and tail(told, 2) == ["barrier", "leave"] and attempted.engine is None
    assert list(attempted.context.start_up.seconds)[-2:] == ["data", "folder"]
    assert not (attempted.context.folder / "run.lock").exists()


@pytest.mark.parametrize(("error", "is_kept"), [(None, False), (BigtxError("x"), False), (ValueError("x"), True)])
def test_a_dry_run_leaves_nothing_but_what_explains_a_defect(
    told: list[str], attempt: Callable[..., Attempt], config: PretrainConfig, error: Exception | None, is_kept: bool
) -> None:
    attempted = attempt(dry_run=True, at_end=True)

    def act() -> None:
        folder = attempted.context.folder
        assert folder != Path(config.run_dir) and folder.is_dir() and attempted.context.config.track.wandb == "off"
        if error:
            raise error

    attempted.in_data = act
    if error:
        with pytest.raises(type(error)):
            attempted.run()
    else:
        attempted.run()
    assert attempted.context.folder.is_dir() is is_kept and not Path(config.run_dir).exists()
    if is_kept:
        attempted.context.folder.rmdir()


@pytest.mark.parametrize(("precision", "harmless"), [("fp16", 2), ("bf16", 0), ("fp32", 0)])
def test_all_that_a_checkpoint_knows_comes_back(
    told: list[str],
    attempt: Callable[..., Attempt],
    config: PretrainConfig,
    resumed: Callable[..., Any],
    precision: Any,
    harmless: int,
) -> None:
    config.engine = EngineConfig(precision=precision)
    found, attempted = resumed(), attempt()
    assert attempted.run() == 0
    begun = [line for line in told if not line.startswith("say")][:4]
    assert begun == [
        "fill from the file states=True",
        "loss scale {'cur_scale': 2.0}",
        "expert counts [[1.0]]",
        "conclude",
    ]
    assert attempted.engine.optimizer.num_updates == 27 and found.closed
    state = attempted.context.state
    assert state
    assert (state.step, state.sequences, state.tokens, state.best_step, state.best_value) == (30, 240, 999, 20, 0.5)
    assert (state.skipped_in_a_row, state.harmless_skips) == (3, harmless)


def test_other_settings_have_all_of_the_skips_that_are_allowed(
    told: list[str], attempt: Callable[..., Attempt], resumed: Callable[..., Any]
) -> None:
    resumed()
    attempted = attempt(changed=[{"key": "optimizer.learning_rate", "old": 1, "new": 2}])
    assert attempted.run() == 0 and attempted.context.state
    assert attempted.context.state.skipped_in_a_row == 0 and attempted.context.state.step == 30


def test_a_new_run_begins_by_its_own_weights(
    told: list[str], attempt: Callable[..., Attempt], config: PretrainConfig
) -> None:
    config.engine = EngineConfig(precision="fp16")
    attempted = attempt()
    assert attempted.run() == 0 and not any("fill" in line for line in told)
    assert attempted.context.state == RunState(harmless_skips=2)


@pytest.mark.parametrize(
    ("key", "message"),
    [("tokenizer", "with another tokenizer"), ("data", "on other data"), ("teacher", "with another teacher")],
)
def test_a_checkpoint_of_other_inputs_is_refused(
    told: list[str], attempt: Callable[..., Attempt], resumed: Callable[..., Any], key: str, message: str
) -> None:
    resumed(**{key: "other"})
    attempted = attempt()
    with pytest.raises(CheckpointError, match=rf"{message}.*it had other"):
        attempted.run()
    assert not (attempted.context.folder / "run.lock").exists()


def test_the_loop_knows_the_phases_of_its_start(
    told: list[str], attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda run, stop: seen.append(run.start_up) or True)
    attempted = attempt()
    assert attempted.run() == 0 and seen == [attempted.context.start_up]
    assert list(attempted.context.start_up.seconds)[-1] == "tracker"


def test_a_rank_that_ends_itself_says_that_it_is_stuck(
    told: list[str], config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sights: list[Any] = []
    monkeypatch.setattr("bigtx.launch.watchdog.describe", lambda culprits, seen, *_: sights.extend(seen) or "it hangs")
    monkeypatch.setattr(heartbeat, "write_stacks", lambda *given: "stacks")
    monkeypatch.setattr(heartbeat, "place_in", lambda *given: "loss.py")
    monkeypatch.setattr(heartbeat, "waits_for_gpu", lambda stack: False)
    monkeypatch.setattr("os._exit", lambda status: told.append(f"exit {status}"))
    ranks = SimpleNamespace(rank=2, is_first_to_fail=lambda: True)
    ended: Any = SimpleNamespace(folder=tmp_path, ranks=ranks, config=config)
    vigil: Any = SimpleNamespace(beat=SimpleNamespace(phase="forward"), still=7.0)
    RunContext._end_stuck(ended, vigil, "stack")
    assert [(sight.rank, sight.is_stuck) for sight in sights] == [(2, True)]
    assert told[0].startswith("error it hangs") and told[1:] == ["exit 1"]
