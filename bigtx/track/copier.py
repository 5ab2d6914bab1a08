"""Copy a run's JSON lines into a W&B run; log its checkpoint as an artifact of W&B, and link it to its base.

    run A ── logs ──▶ artifact model-A:step-00001000 ── used by ──▶ run B (config.base_run names it too)

An artifact is a reference to the checkpoint's folder, with the checkpoint's manifest as its only content. Nothing large
is copied or read, and the manifest shows whether the folder is still the same.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import run_dir_of
from bigtx.track.jsonl import MODEL_EVENT, Record, is_stamped, parse_line

if TYPE_CHECKING:
    from wandb import Run


_STAMP = ("step", "tokens", "time")
_SUMMARIES = {"lower": "min,last", "higher": "max,last"}
_MEASURED_ONCE = ("best/", "test/", "evaluate/")


class Tail:
    """A reader of a growing file's new lines. A file of the same name that replaces it is read from its beginning.

    Attributes:
        num_damaged: the number of lines that are not valid records.
        was_replaced: whether the last call found another file of the same name.
    """

    def __init__(self, path: Path, is_valid: Callable[[Record], bool]) -> None:
        """Begin with the first line.

        Args:
            is_valid: whether a record has what its file's records have.
        """
        self._path = path
        self._is_valid = is_valid
        self._start = 0
        self._inode = 0
        self.num_damaged = 0
        self.was_replaced = False

    def read(self, *, but_last: bool = False) -> list[Record]:
        """Return the records that are new since the last call.

        Args:
            but_last: leave the last line for a later call, because it may still be rewritten.
        """
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                self.was_replaced = self._inode not in (0, inode)
                if self.was_replaced:
                    self._start = 0
                self._inode = inode
                file.seek(self._start)
                text = file.read()
        except OSError:
            return []
        lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
        if but_last:
            lines = lines[:-1]
        self._start += sum(map(len, lines))
        found = [record for line in lines if (record := parse_line(line)) is not None and self._is_valid(record)]
        self.num_damaged += len(lines) - len(found)
        return found


class Copier:
    """A copy of the run's lines in W&B, in the order of their steps.

    A step is copied once it is complete, in one row: W&B accepts nothing more for a step that it has stored. The last
    line of metrics.jsonl may be extended, and rows of a step are written before the next step's metrics. So a step is
    complete when a later line of metrics exists, or when the run has ended.

    Attributes:
        model: the event that names the run's checkpoint for other runs; None until it has arrived.
        last_step: the last step that W&B has; -1 without any.
        num_sent: the number of steps that were copied.
    """

    def __init__(self, run: Run, folder: Path, first_step: int, better: Mapping[str, str]) -> None:
        """Open the files.

        Args:
            run: the run in W&B.
            folder: the run folder.
            first_step: the first step to copy.
            better: as for `Tracker`.
        """
        self._run = run
        self._better = better
        self._metrics = Tail(folder / "metrics.jsonl", is_stamped)
        self._tables = {
            f"validation/{name}": Tail(folder / f"{name}.jsonl", is_stamped) for name in ("samples", "predictions")
        }
        self._events = Tail(folder / "events.jsonl", lambda event: isinstance(event.get("kind"), str))
        self._waiting: dict[int, dict[str, list[Record]]] = {}
        self._known: set[str] = set()
        self._event_counts: Counter[str] = Counter()
        self.model: Record | None = None
        self.last_step = first_step - 1
        self.num_sent = 0

    @property
    def num_damaged(self) -> int:
        """Return the number of damaged lines, which are not copied."""
        return sum(tail.num_damaged for tail in (self._metrics, *self._tables.values(), self._events))

    def copy(self, *, is_final: bool = False) -> None:
        """Copy the steps that are complete and new. Errors of W&B are passed on.

        Args:
            is_final: whether no line will be added to any step.
        """
        metrics = self._metrics.read(but_last=not is_final)
        if self._metrics.was_replaced:
            # The run has returned to an earlier step. W&B keeps the steps that it has; the others are read again.
            self._waiting.clear()
        for name, records in [("", metrics), *((name, tail.read()) for name, tail in self._tables.items())]:
            for record in records:
                if record["step"] > self.last_step:
                    self._waiting.setdefault(record["step"], {}).setdefault(name, []).append(record)
        complete = math.inf if is_final else max((record["step"] for record in metrics), default=-1)
        for step in sorted(step for step in self._waiting if step <= complete):
            self._log(step, self._waiting.pop(step))
        events = self._events.read()
        self.model = next((event for event in reversed(events) if event["kind"] == MODEL_EVENT), self.model)
        if events:
            self._event_counts.update(event["kind"] for event in events)
            self._run.summary.update({f"events/{kind}": count for kind, count in self._event_counts.items()})

    def _log(self, step: int, found: dict[str, list[Record]]) -> None:
        """Log the row of a step: its metrics and its tables."""
        stamp = (found.get("") or next(iter(found.values())))[-1]
        metrics = {name: value for record in found.pop("", ()) for name, value in record.items() if name not in _STAMP}
        for name in metrics.keys() - self._known:
            self._known.add(name)
            better = self._better.get(name.rpartition("/")[2])
            if better in _SUMMARIES and not name.startswith(_MEASURED_ONCE):
                self._run.define_metric(name, step_metric="train/tokens", summary=_SUMMARIES[better])
        values = {name: _number(value) for name, value in metrics.items()}
        values |= {name: _table(rows) for name, rows in found.items()}
        stamped = {**values, "train/tokens": stamp["tokens"], "_timestamp": stamp["time"]}
        self._run.log(stamped, step=step, commit=True)
        self.last_step = step
        self.num_sent += 1


def _table(rows: list[Record]) -> Any:
    import wandb

    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "time"]
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return wandb.Table(columns=[*names], data=cells, allow_mixed_types=True)


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _cell(value: Any) -> Any:
    """Return a value for a table's cell. A column has one type, so lists and dictionaries become text."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


LINK_EVENT = "wandb_base"
"""The kind of event that says how a run was linked to its base."""


def log_model(run: Run, event: Record) -> None:
    """Log the model artifact of a run. Errors of W&B are passed on.

    Args:
        run: the run in W&B.
        event: an event of the kind MODEL_EVENT.
    """
    import wandb

    folder = Path(event["checkpoint"])
    artifact = wandb.Artifact(
        artifact_name(run.id),
        type="model",
        metadata={key: event[key] for key in ("step", "checkpoint", "manifest_sha256")},
    )
    artifact.add_reference(folder.as_uri(), name=folder.name, checksum=False)
    frozen = run_dir_of(folder) / "frozen"
    if frozen.is_dir():  # The weights that the run does not train; each checkpoint needs them.
        artifact.add_reference(frozen.as_uri(), name=frozen.name, checksum=False)
    manifest = folder / "manifest.json"
    if manifest.is_file():
        artifact.add_file(str(manifest), name="manifest.json")
    run.log_artifact(artifact, aliases=["latest", f"step-{event['step']:08d}"])
    run.summary.update({f"model/{key}": event[key] for key in ("step", "checkpoint", "manifest_sha256")})


def link_base(run: Run, base: Record, *, is_online: bool) -> Record:
    """Link a run to its base in the summary, and in W&B's lineage where that is possible. Does not raise W&B's errors.

    Args:
        run: the run in W&B.
        base: the base, as for `Tracker`.
        is_online: whether W&B is online.

    Returns:
        An event with the artifact, or with the reason why it is missing.
    """
    run.summary.update({f"base/{key}": value for key, value in base.items() if value != ""})
    artifact = ""
    if not base.get("wandb_run_id"):
        why = "the base was not in W&B"
    elif not is_online:
        why = "W&B is offline"
    else:
        artifact, why = _use(run, f"{artifact_name(base['wandb_run_id'])}:step-{base['step']:08d}")
    return {"event": LINK_EVENT, "base": base["checkpoint"], "artifact": artifact} | ({"why_not": why} if why else {})


def _use(run: Run, name: str) -> tuple[str, str]:
    """Use an artifact of the run's project. Returns its name and "", or "" and the reason why that failed."""
    try:
        return run.use_artifact(name, type="model").qualified_name, ""
    except Exception as error:  # It is missing, of another project, or not allowed. The config still has the link.
        return "", f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}"


def artifact_name(run_id: str) -> str:
    """Return the artifact's name for the model of a run."""
    return f"model-{run_id}"
