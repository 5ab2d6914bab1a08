"""The loop with an engine that computes nothing: what is measured, saved, reported and ended, and when."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bigtx.engine.engine import StepResult
from bigtx.track.tracker import Tracker
from bigtx.train import loop, state
from bigtx.train.context import StartUp, StopRequest
from bigtx.train.loop import Run
from bigtx.train.state import Meter, RolledBack, RunState
from bigtx.utils.errors import BigtxError, CheckpointError


@dataclass
class Ranks:
    """This one and another, which brings as many labels and tokens, and may ask to stop at a step: while it is made,
    the next one is agreed on. `told` has the agreements, in their order."""

    rank: int = 0
    stops_at: int = 0
    told: list[str] = dataclasses.field(default_factory=list)

    def begin_sum(self, numbers: list[int]) -> Callable[[], list[int]]:
        number = sum(line.startswith("begin") for line in self.told) + 1
        self.told.append(f"begin {number}")
        labels, tokens, votes, seconds, failed = numbers
        votes = int(votes) + (number == self.stops_at + 1)

        def sums() -> list[int]:
            self.told.append(f"end {number}")
            return [2 * labels, 2 * tokens, votes, seconds, int(failed)]

        return sums


@dataclass
class Loader:
    """Two micro batches of 3 labels and 5 tokens a step, from 8 sequences a global batch."""

    next_sequence: int = 0
    wait_seconds: float = 0.0

    def __next__(self) -> list[Any]:
        self.next_sequence += 8
        self.wait_seconds += 0.5
        batch = SimpleNamespace(num_labels=3)
        batch.to = lambda device, batch=batch: batch
        return [batch, batch]

    def num_tokens(self, micro_batches: list[Any]) -> int:
        return 5 * len(micro_batches)


class Life:
    """One life of a run, and all that happened in it, in order."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.save_seconds = 100.0, 50.0
        self.events: list[str] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.told: list[dict[str, Any]] = []
        self.saved: list[dict[str, Any]] = []
        self.waited_at: list[int] = []
        self.has_failed = False
        self.factors: list[float] = []
        self.asked: list[tuple[int, int]] = []
        self.shown: list[tuple[int, int, float]] = []
        self.run_dir, self.ranks = tmp_path, Ranks()
        self.state, self.stop = RunState(), SimpleNamespace(requested=False)
        self.not_finite: set[int] = set()
        self.values: dict[int, float] = {}
        self.rates = {"matrices": 0.02, "vectors": 0.001}
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(loop, "time", clock)
        monkeypatch.setattr(state, "time", clock)
        monkeypatch.setattr(loop, "keep_freed_memory", lambda: None)
        self.train_settings = {"log_every": "1 steps", "checkpoint_every": "1000 steps"}
        self.validate_every, self.patience, self.total_steps = "1000 steps", None, 10
        self.start_up: StartUp | None = None
        self.after_step: Callable[[int], None] = lambda step: None
        self.guards: Any = None

    def train_step(self, micro_batches: list[Any], task: Any, **fields: Any) -> StepResult:
        self.now += 2.0
        step = self.state.step + 1
        self.factors.append(fields["learning_rate_factor"])
        self.asked.append((fields["num_labels"], fields["num_tokens"]))
        self.after_step(step)
        bad = step in self.not_finite
        return StepResult(torch.tensor(math.nan if bad else 24.0), math.inf if bad else 0.5, skipped=bad)

    def open_loader(self) -> Any:
        return Loader(next_sequence=self.state.sequences)

    def report(self, tracker: Any, state: RunState) -> bool:
        self.now += 100.0
        self.events.append(f"measure {state.step}")
        return state.step in self.values and state.judge(self.values[state.step], lower=True)

    def save(self, facts: dict[str, Any], **fields: Any) -> None:
        """Stand for a saver's."""
        self.now += self.save_seconds
        self.events.append(f"save {facts['step']}")
        self.saved.append(facts | fields)

    def wait(self) -> None:
        self.waited_at.append(self.state.step)
        if self.has_failed:
            raise CheckpointError("the disk is full")

    def take_saved(self) -> None:
        return None

    def train(self) -> bool:
        optimizer = SimpleNamespace(learning_rates=lambda: self.rates)
        train = SimpleNamespace(max_skipped_steps=2, **self.train_settings)
        tracker = SimpleNamespace(
            begin=lambda: self.events.append("begin"),
            log=lambda step, tokens, metrics: self.logged.update({step: {"tokens": tokens, **metrics}}),
            progress=lambda step, tokens, metrics: self.shown.append((step, tokens, metrics["train/loss"])),
            message=lambda text: self.events.append(text),
            check_folder=lambda: None,
            state=lambda: {"metrics.jsonl": {"lines": len(self.logged), "unwritten": []}},
            event=lambda step, kind, **facts: self.told.append({"step": step, "kind": kind, **facts}),
        )
        self.run = Run(
            config=cast(Any, SimpleNamespace(train=train, track=SimpleNamespace(profile_step=None))),
            run_dir=self.run_dir,
            ranks=cast(Any, self.ranks),
            engine=cast(
                Any,
                SimpleNamespace(device=torch.device("cpu"), optimizer=optimizer, train_step=self.train_step),
            ),
            task=cast(Any, None),
            loader=self.open_loader(),
            open_loader=self.open_loader,
            schedule=cast(Any, SimpleNamespace(total_steps=self.total_steps, factor=lambda step: step / 100)),
            validation=self,
            tracker=cast(Tracker, tracker),
            meter=Meter(flops_per_token=1.0, peak_flops=None),
            saver=cast(Any, self),
            state=self.state,
            facts={"data": "abc"},
            validate_every=self.validate_every,
            patience=self.patience,
            start_up=self.start_up,
            guards=self.guards,
        )
        return loop.train(self.run, cast(StopRequest, self.stop))


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Life:
    return Life(tmp_path, monkeypatch)


def test_the_best_model_is_saved_wherever_it_is_measured(life: Life) -> None:
    life.validate_every = "2 steps"
    life.values = {2: 3.0, 4: 2.0, 6: 2.5, 8: 1.0, 10: 5.0}
    assert life.train()
    saves = [event for event in life.events if event.startswith("save")]
    assert saves == ["save 2", "save 4", "save 8", "save 10"]
    assert [(facts["step"], facts["state"]["best_step"]) for facts in life.saved] == [(2, 2), (4, 4), (8, 8), (10, 8)]


def test_checkpoints_and_measurements_each_have_their_own_rhythm_and_the_last_step_has_both(life: Life) -> None:
    life.validate_every, life.train_settings = "3 steps", {"log_every": "4 steps", "checkpoint_every": "5 steps"}
    life.total_steps = 11
    assert life.train()
    expected = ["begin", "measure 3", "save 5", "measure 6", "measure 9", "save 10", "measure 11", "save 11"]
    assert life.events == expected
    assert sorted(life.logged) == [4, 8, 11]


def test_a_stop_saves_at_once_and_the_next_life_measures_first(life: Life) -> None:
    life.validate_every, life.ranks.stops_at = "2 steps", 4
    assert not life.train()
    assert life.events == ["begin", "measure 2", "save 4"]
    assert life.saved[-1]["state"]["owes_validation"]
    life.state, life.events = RunState.from_dict(life.saved[-1]["state"]), []
    life.ranks = Ranks(stops_at=1)
    assert not life.train()
    assert life.events == ["begin", "measure 4", "save 5"]
    assert not life.saved[-1]["state"]["owes_validation"]


def test_only_the_last_checkpoint_may_not_be_left_out(life: Life) -> None:
    life.train_settings, life.total_steps = {"log_every": "4 steps", "checkpoint_every": "3 steps"}, 7
    assert life.train()
    assert [(saved["step"], saved["may_wait"]) for saved in life.saved] == [(3, True), (6, True), (7, False)]


def test_a_stop_between_measurements_owes_none(life: Life) -> None:
    life.validate_every, life.ranks.stops_at = "2 steps", 3
    assert not life.train()
    assert life.events == ["begin", "measure 2", "save 3"] and not life.saved[-1]["state"]["owes_validation"]


def test_a_stop_at_the_last_step_finishes_the_run(life: Life) -> None:
    life.after_step = lambda step: setattr(life.stop, "requested", step == life.total_steps)
    assert life.train()
    assert life.events == ["begin", "measure 10", "save 10"] and not life.state.owes_validation


def test_the_own_vote_counts_too(life: Life) -> None:
    life.after_step = lambda step: setattr(life.stop, "requested", step >= 3)
    assert not life.train()
    assert life.events == ["begin", "save 4"]


def test_patience_ends_the_run_with_a_checkpoint(life: Life) -> None:
    life.validate_every, life.patience = "1 steps", 3
    life.values = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0, 5: 4.0, 6: 1.0}
    assert life.train() and life.state.step == 5
    saves = [event for event in life.events if event.startswith("save")]
    assert saves == ["save 1", "save 2", "save 5"]
    assert life.told == [{"step": 5, "kind": "early_stop", "best_step": 2, "best_value": 2.0}]
    assert "no better measurement in 3 validations: the run ends here" in life.events


def test_a_run_without_patience_left_makes_no_more_steps(life: Life) -> None:
    life.patience, life.state = 2, RunState(step=5, measured_since_best=2)
    assert life.train() and life.state.step == 5 and not life.saved


def test_at_its_own_end_a_run_is_not_called_an_early_stop(life: Life) -> None:
    life.validate_every, life.patience, life.total_steps = "1 steps", 2, 3
    life.values = {1: 1.0, 2: 2.0, 3: 3.0}
    assert life.train() and life.told == []


def test_where_the_seconds_of_a_start_went_is_recorded_after_its_first_step(life: Life) -> None:
    life.state, life.start_up = RunState(step=4), StartUp()
    life.start_up.end("engine")
    assert life.train()
    (told,) = [event for event in life.told if event["kind"] == "start_up"]
    assert told["step"] == 5 and list(told["seconds"]) == ["command", "engine", "first_step"]
    assert all(seconds >= 0 for seconds in told["seconds"].values())


def test_a_run_at_its_end_does_nothing(life: Life) -> None:
    life.state = RunState(step=10)
    assert life.train() and life.events == ["begin"]


def test_a_window_has_its_own_time_and_the_loss_of_all_ranks(life: Life) -> None:
    """Steps take 2 and 4 s, measuring 100 s, saving 50 s; both ranks have 12 labels and 20 tokens a step."""
    life.validate_every = "1 steps"
    life.after_step = lambda step: setattr(life, "now", life.now + 2 * (step % 2 == 0))
    life.train_settings = {"log_every": "2 steps", "checkpoint_every": "1 steps"}
    life.state = RunState(step=2, owes_validation=True)
    life.total_steps = 6
    life.train()
    assert life.asked == [(12, 20)] * 4
    assert life.factors == [0.03, 0.04, 0.05, 0.06]
    assert sorted(life.logged) == [4, 6]
    assert life.shown == [(4, 40, 2.0), (6, 80, 2.0)]
    for step, metrics in life.logged.items():
        assert metrics["tokens"] == 20 * (step - 2)
        assert metrics["train/loss"] == 2.0
        assert metrics["perf/tokens_per_second"] == pytest.approx(40 / 6)
        assert metrics["perf/step_seconds"] == 3.0
        assert metrics["perf/data_wait_fraction"] == pytest.approx(1 / 6)


def test_the_rate_that_is_shown_is_that_of_vectors_and_others_only_where_they_differ(life: Life) -> None:
    life.total_steps = 1
    life.train()
    rates = {name: value for name, value in life.logged[1].items() if "learning_rate" in name}
    assert rates == {
        "train/learning_rate": 0.001,
        "train/learning_rate/matrices": 0.02,
        "train/learning_rate/vectors": 0.001,
    }
    assert life.logged[1]["train/grad_norm"] == 0.5 and life.logged[1]["train/skipped_steps"] == 0
    for rates in ({"matrices": 0.02, "vectors": 0.02}, {"adapters": 0.02}):
        life.state, life.logged, life.rates = RunState(), {}, rates
        life.train()
        assert {name for name in life.logged[1] if "learning_rate" in name} == {"train/learning_rate"}
        assert life.logged[1]["train/learning_rate"] == 0.02


def test_a_skipped_step_is_recorded_with_its_sequences(life: Life) -> None:
    life.not_finite = {2, 3, 5, 6, 8}
    life.total_steps = 9
    assert life.train()
    skips = [event for event in life.told if event["kind"] == "skipped_step"]
    assert [(event["step"], event["sequences"]) for event in skips] == [
        (2, "8-16"),
        (3, "16-24"),
        (5, "32-40"),
        (6, "40-48"),
        (8, "56-64"),
    ]
    assert all(event["grad_norm"] == math.inf for event in skips)
    assert "step 5 (sequences 32-40) skipped: its gradient is not finite" in life.events
    assert life.logged[9]["train/skipped_steps"] == 5 and math.isnan(life.logged[8]["train/loss"])


def test_more_skipped_steps_in_a_row_than_allowed_end_the_run(life: Life) -> None:
    life.not_finite = {2, 3, 5, 6, 7}
    with pytest.raises(BigtxError, match=r"3 steps in a row \(up to step 7\) .*train.max_skipped_steps.* sequence 56"):
        life.train()
    assert not life.saved and life.state.step == 7


@pytest.mark.parametrize(("harmless", "is_refused"), [(0, True), (1, True), (2, False)])
def test_a_run_that_ends_in_skipped_steps_is_not_finished(life: Life, harmless: int, is_refused: bool) -> None:
    life.state, life.not_finite = RunState(harmless_skips=harmless), {9, 10}
    if is_refused:
        with pytest.raises(BigtxError, match=r"not finished: its last 2 steps \(up to step 10\) .*sequence 80"):
            life.train()
    else:
        assert life.train()
    (saved,) = life.saved
    assert saved.get("suspect", False) is is_refused and saved["is_skipping"]


def test_a_checkpoint_knows_the_run_the_state_and_the_open_window(life: Life) -> None:
    life.train_settings = {"log_every": "4 steps", "checkpoint_every": "6 steps"}
    life.total_steps = 7
    life.train()
    facts = life.saved[0]
    assert (facts["step"], facts["data"], facts["state"]["tokens"], facts["state"]["sequences"]) == (6, "abc", 120, 48)
    # Two steps since the last line of metrics.
    assert facts["meter"] == {"labels": 24, "loss_sum": (48.0).hex()}
    assert not facts["is_skipping"] and "suspect" not in facts
    assert "step" not in life.run.facts


@pytest.mark.parametrize(("rank", "saves"), [(0, ["save 4", "save 7", "save 10"]), (1, ["save 10"])])
def test_a_rhythm_of_time_goes_by_the_clock_of_rank_0(life: Life, rank: int, saves: list[str]) -> None:
    """As the time is summed over ranks, the others bring none. Steps of 10 s, asked before each."""
    life.ranks.rank = rank
    life.train_settings = {"log_every": "5 steps", "checkpoint_every": "30 s"}
    life.after_step = lambda step: setattr(life, "now", 100.0 + 10 * step)
    life.save_seconds = 0.0
    assert life.train()
    assert [event for event in life.events if event.startswith("save")] == saves


def test_a_run_ends_when_its_last_checkpoint_is_durable(life: Life) -> None:
    life.ranks.stops_at = 4
    assert not life.train()
    assert life.events[-1] == "save 4" and life.waited_at == [4]
    life.waited_at, life.not_finite = [], {6, 7, 8}
    with pytest.raises(BigtxError, match="3 steps in a row"):
        life.train()
    assert life.waited_at == [8], "an error of all ranks does not cost the checkpoint that is being written"


def test_a_save_that_failed_ends_the_run_at_the_next_step(life: Life) -> None:
    life.train_settings["checkpoint_every"] = "3 steps"
    life.after_step = lambda step: setattr(life, "has_failed", step >= 5)
    with pytest.raises(CheckpointError, match="full"):
        life.train()
    assert life.state.step == 6 and life.events[-1] == "save 3"


def test_the_ranks_agree_on_a_step_while_the_one_before_is_made(life: Life) -> None:
    """Each agreement begins before the forward pass of the step before, and is collected after its update."""
    life.total_steps = 3
    life.after_step = lambda step: life.ranks.told.append(f"step {step}")
    assert life.train()
    assert life.ranks.told == [
        *("begin 1", "end 1"),
        *("begin 2", "step 1", "end 2"),
        *("begin 3", "step 2", "end 3"),
        "step 3",
    ]


def test_python_collects_no_garbage_within_steps(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only at steps that all ranks know, and after a measurement."""
    found: list[bool] = []
    collected: list[int] = []
    monkeypatch.setattr(loop, "COLLECT_EVERY", 4)
    monkeypatch.setattr(gc, "collect", lambda: collected.append(life.state.step))
    life.after_step = lambda step: found.append(gc.isenabled())
    life.validate_every = "5 steps"
    assert life.train()
    assert found == [False] * 10 and collected == [0, 4, 5, 8, 10] and gc.isenabled()


class Returning:
    """Guards that return the run from step 6 to step 4 once, as if step 4 had a checkpoint."""

    def __init__(self, life: Life) -> None:
        self.life, self.asked, self.returns, self.may_refuse = life, list[tuple[int, int]](), [6], True

    def before_step(self, state: RunState, elapsed: float) -> None:
        self.asked.append((state.step, int(elapsed)))

    def refuses(self, loss: float, norm: float) -> bool:
        return False

    def after_step(self, run: Run, *, sequences: str, refused: bool) -> None:
        if run.state.step in self.returns:
            self.returns.clear()
            run.state.restore(RunState(step=4, tokens=80, sequences=48, owes_validation=True).to_dict())
            run.loader = run.open_loader()
            raise RolledBack

    def before_save(self, run: Run) -> None:
        self.life.events.append(f"compare {run.state.step}")

    def to_dict(self) -> dict[str, list[float]]:
        return {"losses": [1.0]}


def test_a_run_that_returns_does_the_steps_again(life: Life) -> None:
    """What is due goes by the steps and tokens of the checkpoint. A validation that it owes is made."""
    life.guards = Returning(life)
    life.train_settings = {"log_every": "40 tokens", "checkpoint_every": "3 steps"}
    assert life.train()
    assert [step for step, _ in life.guards.asked] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]
    assert [event for event in life.events if event != "begin"] == [
        *("compare 3", "save 3", "measure 4", "compare 6", "save 6", "compare 9", "save 9"),
        *("measure 10", "compare 10", "save 10"),
    ]
    assert [step for step, *_ in life.shown] == [2, 4, 6, 8, 10]
    assert life.saved[1]["state"]["sequences"] == 48 + 2 * 8 and life.saved[1]["guards"] == {"losses": [1.0]}
    assert life.logged[10]["train/roll_backs"] == 0 == life.logged[10]["train/spikes"]


def test_a_refused_update_is_no_non_finite_step(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    life.total_steps = 3
    real = life.train_step
    life.guards = Returning(life)

    def refused(*arguments: Any, **fields: Any) -> StepResult:
        assert fields["refuses"] == life.guards.refuses and fields["may_refuse"]
        result = real(*arguments, **fields)
        return dataclasses.replace(result, skipped=True, refused=True) if life.state.step == 1 else result

    monkeypatch.setattr(life, "train_step", refused)
    assert life.train()
    assert life.state.skipped_steps == 0 and life.told == [] and math.isnan(life.logged[2]["train/loss"])


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_profile_has_the_kernels_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    found: list[Any] = []

    @contextlib.contextmanager
    def profile(activities: list[Any], **settings: Any) -> Iterator[Any]:
        found.extend(activities)
        yield SimpleNamespace(export_chrome_trace=lambda path: Path(path).touch())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).touch())
    monkeypatch.setattr(loop, "profile", profile)
    with loop.profiled(tmp_path, enabled=True, rank=3):
        pass
    assert [activity.name for activity in found] == ["CPU", *["CUDA"] * has_gpu]
    names = ["rank-00003.memory.pickle"] * has_gpu + ["rank-00003.trace.json"]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
