"""Copying a run's JSON lines into a W&B run."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.track.jsonl import Record, parse_line

if TYPE_CHECKING:
    from wandb import Run

_SAMPLE_COLUMNS: list[str | int] = ["step", "tokens", "prompt", "completion"]


class Tail:
    """The new lines of a growing file, and its last line again whenever that was written anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0
        self._last = b""

    def read(self) -> list[Record]:
        """The records that are new since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._start)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        if not lines:
            return []
        new = lines[1:] if lines[0] == self._last else lines
        self._last = lines[-1]
        self._start += len(whole) - len(self._last)
        return [record for line in new if (record := parse_line(line)) is not None]


class Copier:
    """Gives the run's lines to W&B in the order of their steps."""

    def __init__(self, run: Run, folder: Path, first_step: int) -> None:
        self._run = run
        self._first_step = first_step
        self._metrics = Tail(folder / "metrics.jsonl")
        self._samples = Tail(folder / "samples.jsonl")
        self._events = Tail(folder / "events.jsonl")
        self._sample_step = -1
        self._sample_rows: list[list[Any]] = []
        self._known: set[str] = set()
        self._event_counts: Counter[str] = Counter()

    def copy(self) -> None:
        """Copy what is new. Raises whatever W&B raises."""
        # Samples of a step are written before the next step's metrics, so reading in this order misses none of a step.
        by_step: defaultdict[int, list[Record]] = defaultdict(list)
        for record in [*self._metrics.read(), *self._samples.read()]:
            by_step[record["step"]].append(record)
        for step in sorted(step for step in by_step if step >= self._first_step):
            for record in by_step[step]:
                if "completion" not in record:
                    self._log_metrics(record)
            self._log_samples([record for record in by_step[step] if "completion" in record])
        events = self._events.read()
        if events:
            self._event_counts.update(record["kind"] for record in events)
            self._run.summary.update({f"events/{kind}": count for kind, count in self._event_counts.items()})

    def _log_metrics(self, record: Record) -> None:
        values = {name: _number(value) for name, value in record.items() if name not in ("step", "tokens", "time")}
        for name in values.keys() - self._known:
            self._known.add(name)
            if best := best_of(name):
                self._run.define_metric(name, step_metric="train/tokens", summary=f"{best},last")
        self._log(record, values)

    def _log_samples(self, records: list[Record]) -> None:
        import wandb

        if not records:
            return
        last = records[-1]
        if last["step"] != self._sample_step:
            self._sample_step, self._sample_rows = last["step"], []
        self._sample_rows += [[record[str(name)] for name in _SAMPLE_COLUMNS] for record in records]
        # A table is fixed once logged; should more rows of the step come, a larger one takes its place.
        self._log(last, {"validation/samples": wandb.Table(columns=_SAMPLE_COLUMNS, data=self._sample_rows)})

    def _log(self, record: Record, values: dict[str, Any]) -> None:
        self._run.log({**values, "train/tokens": record["tokens"], "_timestamp": record["time"]}, step=record["step"])


def best_of(name: str) -> str:
    """Whether the summary keeps the "min" or the "max" of a metric, or neither ("")."""
    last = name.rpartition("/")[2]
    if last in ("loss", "perplexity", "bits_per_byte"):
        return "min"
    return "max" if last in ("accuracy", "f1") else ""


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
