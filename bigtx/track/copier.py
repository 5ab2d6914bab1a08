"""Copy a run's JSON lines into a W&B run; log its checkpoint as an artifact of W&B, and link it to its base.

    run A ── logs ──▶ artifact model-A:step-00001000 ── used by ──▶ run B (config.base_run names it too)

An artifact is a reference to the checkpoint's folder, with the checkpoint's manifest as its only content. Nothing large
is copied or read, and the manifest shows whether the folder is still the same.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import run_dir_of
from bigtx.track.jsonl import MODEL_EVENT, Record, parse_line

if TYPE_CHECKING:
    from wandb import Run


_STAMP = ("step", "tokens", "time")
_SUMMARIES = {"lower": "min,last", "higher": "max,last"}
_MEASURED_ONCE = ("best/", "test/", "evaluate/")


class Tail:
    """A reader of a growing file's new lines, and of its last line again when that was changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0
        self._last = b""

    def read(self) -> list[Record]:
        """Return the records that are new since the last call."""
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


class Table:
    """The rows of a step as a W&B table. They may arrive in several parts.

    Attributes:
        name: the table's name in W&B.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._tail = Tail(path)
        self._step = -1
        self._rows: list[Record] = []

    def read(self) -> list[Record]:
        """Return the rows that are new since the last call."""
        return self._tail.read()

    def take(self, records: list[Record]) -> Any:
        """Return a table of all rows of a step, including new ones.

        A logged table cannot change, so a larger one replaces it.
        """
        import wandb

        if records[-1]["step"] != self._step:
            self._step, self._rows = records[-1]["step"], []
        self._rows += records
        names = [name for name in dict.fromkeys(key for row in self._rows for key in row) if name != "time"]
        rows = [[_cell(row.get(name)) for name in names] for row in self._rows]
        return wandb.Table(columns=[*names], data=rows, allow_mixed_types=True)


class Copier:
    """A copy of the run's lines in W&B, in the order of their steps.

    Attributes:
        model: the event that names the run's checkpoint for other runs; None until it has arrived.
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
        self._first_step = first_step
        self._metrics = Tail(folder / "metrics.jsonl")
        self._tables = [
            Table("validation/samples", folder / "samples.jsonl"),
            Table("validation/predictions", folder / "predictions.jsonl"),
        ]
        self._events = Tail(folder / "events.jsonl")
        self.model: Record | None = None
        self._last: Record | None = None
        self._known: set[str] = set()
        self._event_counts: Counter[str] = Counter()

    def copy(self) -> None:
        """Copy new lines. Errors of W&B are passed on."""
        # Rows of a step are written before the next step's metrics, so in this order no row of a step is missed.
        metrics = _by_step(self._metrics.read())
        rows = [(table, _by_step(table.read())) for table in self._tables]
        for step in sorted({step for found in (metrics, *(of for _, of in rows)) for step in found}):
            if step < self._first_step:
                continue
            for record in metrics.get(step, ()):
                self._log_metrics(record)
            for table, found in rows:
                if step in found:
                    # W&B has one time for a step; the one of its metrics is used, if there are any.
                    stamp = self._last if self._last and self._last["step"] == step else found[step][-1]
                    self._log(stamp, {table.name: table.take(found[step])})
        events = [event for event in self._events.read() if "kind" in event]
        self.model = next((event for event in reversed(events) if event["kind"] == MODEL_EVENT), self.model)
        if events:
            self._event_counts.update(record["kind"] for record in events)
            self._run.summary.update({f"events/{kind}": count for kind, count in self._event_counts.items()})

    def _log_metrics(self, record: Record) -> None:
        self._last = record
        values = {name: _number(value) for name, value in record.items() if name not in _STAMP}
        for name in values.keys() - self._known:
            self._known.add(name)
            better = self._better.get(name.rpartition("/")[2])
            if better in _SUMMARIES and not name.startswith(_MEASURED_ONCE):
                self._run.define_metric(name, step_metric="train/tokens", summary=_SUMMARIES[better])
        self._log(record, values)

    def _log(self, record: Record, values: dict[str, Any]) -> None:
        self._run.log({**values, "train/tokens": record["tokens"], "_timestamp": record["time"]}, step=record["step"])


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _cell(value: Any) -> Any:
    """Return a value for a table's cell. A column has one type, so lists and dictionaries become text."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _by_step(records: list[Record]) -> dict[int, list[Record]]:
    found: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        found[record["step"]].append(record)
    return found


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
        An event with the artifact, or with the reason why there is none.
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
