"""Record what happens in the training loop."""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from bigtx.config.schema import TrackConfig
from bigtx.config.schema.tasks import Better
from bigtx.track.console import Console, open_nowhere, shorten
from bigtx.track.jsonl import EVENTS, MODEL_EVENT, RECORD_FILES, TASK_FILE, JsonLines, append_missing, plain
from bigtx.utils.errors import LaunchError
from bigtx.utils.files import inode_of, write_sealed
from bigtx.utils.secrets import scrub
from bigtx.utils.shell import command

if TYPE_CHECKING:
    from bigtx.track.wandb_run import WandbRun

_SHOWN_SAMPLE_LENGTH = 600


class Tracker:
    """The record of a run's metrics, samples and events in its folder, in W&B and on the console.

    Only rank 0 writes; on the other ranks the calls have no effect. Use it from one thread.

    Attributes:
        wandb_run_id: the W&B run's id, "" where W&B is off.
        lost: what could not be written to the folder until `close`, in words; "" if everything is there.
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: TrackConfig,
        *,
        run_config: Mapping[str, Any],
        environment: Mapping[str, Any],
        rank: int,
        total_steps: int,
        better: Mapping[str, Better],
        resumed_step: int = 0,
        saved: Mapping[str, Any] | None = None,
        name: str = "",
        job_type: str = "pretrain",
        base: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """Open the run's files, remove steps that will be repeated, and start W&B in the background.

        Args:
            run_dir: the run folder; it exists.
            config: the settings of tracking.
            run_config: the resolved config, for W&B.
            environment: versions, commit, hardware, for W&B under the key `environment`.
            rank: this process's rank.
            total_steps: optimizer steps of the whole run, 0 if unknown.
            better: which values are better, by the metric's name without its group. W&B's summary keeps the best value
                of metrics that have one.
            resumed_step: the step whose checkpoint was loaded; 0 starts at the beginning, and removes the records of
                earlier starts.
            saved: what `state` returned when that checkpoint was saved; None if that is unknown.
            name: W&B's display name; "" stands for the run folder's name.
            job_type: W&B's job type.
            base: the source of the weights: `checkpoint` (its folder), `manifest_sha256`, `step` and `wandb_run_id`
                ("" for none) of a run; W&B links the two runs.
            stream: the stream of the console lines, `bigtx.utils.log.console()` in a run; None discards them.

        Raises:
            LaunchError: The run folder cannot be written.
        """
        self.wandb_run_id = self.lost = ""
        self._wandb: WandbRun | None = None
        self._is_writer = rank == 0
        if not self._is_writer:
            return
        self._run_dir, self._inode, self._job_type = Path(run_dir), inode_of(Path(run_dir)), job_type
        folder = Path(run_dir).resolve()
        self._console = Console(stream or open_nowhere(), total_steps=total_steps)
        self._has_warned = False
        up_to_step = resumed_step or -1
        self._files = {
            name: JsonLines(folder / name, warn=self._warn, up_to_step=math.inf if name == EVENTS else up_to_step)
            for name in RECORD_FILES
        }
        self._metrics, self._samples, self._predictions, self._events = self._files.values()
        self._step = resumed_step
        self._report_missing_lines(saved or {})
        named = {"name": name or folder.name, "job_type": job_type}
        about = {**run_config, "environment": dict(environment)}
        self._start_wandb(folder, config, named, about, resumed_step=resumed_step, better=better, base=base)

    def _start_wandb(
        self,
        folder: Path,
        config: TrackConfig,
        named: Mapping[str, str],
        about: Mapping[str, Any],
        *,
        resumed_step: int,
        better: Mapping[str, Better],
        base: Mapping[str, Any] | None,
    ) -> None:
        """Write what W&B needs besides the records, for `bigtx wandb sync`. Unless W&B is off, start the process that
        copies the records to it.

        Args:
            named: the display name and the job type.
            about: the config of the run in W&B.
            resumed_step, better, base: see `__init__`.
        """
        is_off = config.wandb == "off" or os.environ.get("WANDB_MODE") == "disabled"
        if not is_off and (original := self._choose_run_id(folder)):
            about = {**about, "copied_from": original}
            source = {"checkpoint": original["folder"], "manifest_sha256": "", "step": resumed_step}
            base = base or source | {"wandb_run_id": original["wandb_run_id"]}
        init = {
            "id": self.wandb_run_id,
            "dir": str(folder),
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": list(config.tags),
            **named,
            "config": scrub({**about} | ({"base_run": base} if base else {})),
        }
        task = {"init": init, "base": scrub(base or {}), "better": dict(better)}
        with contextlib.suppress(OSError):  # The next start writes it.
            write_sealed(folder / TASK_FILE, plain(task))
        if not is_off:
            from bigtx.track.wandb_run import WandbRun

            own = {"mode": config.wandb, "resumed_step": resumed_step}
            self._wandb = WandbRun(folder, task | own, show=self._console.message, note=self._note)

    def _choose_run_id(self, folder: Path) -> dict[str, str]:
        """Read or make the folder's W&B id. Return the run that the folder is a copy of; empty if it is not a copy."""
        from bigtx.track.wandb_run import read_or_make_run_id

        own = read_or_make_run_id(folder)
        self.wandb_run_id = own.id
        if not own.original:
            return {}
        self._note("wandb_copy", original=own.original, folder=own.original_folder)
        self._console.message(
            f"W&B: this folder is a copy of {own.original_folder}, whose run there is {own.original}; the copy is "
            f"the run {own.id}"
        )
        return {"wandb_run_id": own.original, "folder": own.original_folder}

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of a step to metrics.jsonl, from which they are copied to W&B.

        Several calls for the same step write one line.

        Args:
            step: optimizer steps done.
            tokens: input tokens seen by all ranks; W&B's x axis.
            metrics: values by name, `group/name`.
        """
        if not self._is_writer:
            return
        self._step = step
        self.check_folder()
        self._metrics.merge({"step": step, "tokens": tokens, "time": _now(), **metrics})
        self._poll()

    def samples(self, step: int, tokens: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Show samples and write them to samples.jsonl and to W&B's table `validation/samples`.

        Args:
            step: optimizer steps done; one call a step.
            tokens: input tokens seen by all ranks.
            rows: samples, each with a `prompt` and its `completion`.
        """
        if not self._is_writer or not rows:
            return
        self._console.message(f"samples at step {step} ({shorten(tokens)} tokens)")
        for row in rows:
            self._console.message(_shown_sample(row["prompt"], row["completion"]))
        stamp = {"step": step, "tokens": tokens, "time": _now()}
        self._samples.extend([{**stamp, **row} for row in rows])
        self._poll()

    def predictions(self, step: int, tokens: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write predictions for records to predictions.jsonl and to W&B's table `validation/predictions`.

        Args:
            step: optimizer steps done; one call a step.
            tokens: input tokens seen by all ranks.
            rows: predictions, each with the record's `input`, its `answer` and the prediction.
        """
        if not self._is_writer or not rows:
            return
        stamp = {"step": step, "tokens": tokens, "time": _now()}
        self._predictions.extend([{**stamp, **row} for row in rows])
        self._poll()

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Record an event (a resume, a skipped step, a changed setting, a signal) in events.jsonl.

        W&B's summary counts the events of each kind.

        Args:
            step: optimizer steps done.
            kind: the kind of event.
            **facts: further fields of the record.
        """
        if not self._is_writer:
            return
        self._step = step
        self._note(kind, **facts)
        self._poll()

    def model(self, step: int, checkpoint: Path, manifest_sha256: str) -> None:
        """Record the checkpoint that other runs may use. W&B keeps a reference to it as the run's model artifact.

        Args:
            step: the step of the checkpoint.
            checkpoint: its folder.
            manifest_sha256: the hash of its manifest.
        """
        self.event(step, MODEL_EVENT, checkpoint=str(Path(checkpoint).absolute()), manifest_sha256=manifest_sha256)

    def message(self, text: str) -> None:
        """Print a line for the user, above the progress bar."""
        if self._is_writer:
            self._console.message(text)

    def rewind(self, step: int) -> None:
        """Remove the metrics, samples and predictions of later steps: the run has returned to this one.

        W&B cannot remove steps: it keeps those that it has, and continues after them.

        Raises:
            LaunchError: a file cannot be written.
        """
        if not self._is_writer:
            return
        self._step = step
        for file in (self._metrics, self._samples, self._predictions):
            file.rewind(step)
        self._console.begin(step)

    def begin(self) -> None:
        """Show that the steps begin: on a terminal, draw the bar at the step of the resume."""
        if self._is_writer:
            self._console.begin(self._step)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint records of the files: how many lines they have, and those only in memory."""
        if not self._is_writer:
            return {}
        return {name: {"lines": file.num_lines, "unwritten": file.unwritten()} for name, file in self._files.items()}

    def check_folder(self) -> None:
        """Check that the run folder is at its place. Nothing may be written to a new folder at that path.

        Raises:
            LaunchError: it was moved or deleted.
        """
        if not self._is_writer or inode_of(self._run_dir) == self._inode:
            return
        place = self._metrics.place()
        self._note("moved", place=place)
        if not place:
            raise LaunchError(
                f"{self._run_dir} was deleted while the run trained (step {self._step:,}), so the run has ended; start "
                "it again with a run_dir that nothing deletes"
            )
        again = command("bigtx", self._job_type, Path(place).parent)
        raise LaunchError(
            f"{self._run_dir} was moved to {Path(place).parent} while the run trained (step {self._step:,}), so the "
            f"run has ended. Everything is in the new place; to resume from the last checkpoint there: {again}"
        )

    def progress(self, step: int, tokens: int, figures: Mapping[str, float]) -> None:
        """Show the progress of the run; see `Console.progress` for the figures."""
        if self._is_writer:
            self._console.progress(step, tokens, figures)
            self._poll()

    def close(
        self,
        status: Literal["finished", "stopped", "failed"],
        step: int | None = None,
        *,
        owes_validation: bool = False,
    ) -> None:
        """Record how the run ended, and close everything. A W&B server that does not answer takes 3 s at most.

        Args:
            status: finished (all steps are done), stopped (on request, to be resumed later) or failed (an error).
            step: optimizer steps done; None for the number of the last call.
            owes_validation: whether a resume adds measurements to the last line, so that W&B receives that line later.
        """
        if not self._is_writer:
            return
        self._is_writer = False
        self._step = self._step if step is None else step
        self._note("end", status=status, **({"owes_validation": True} if owes_validation else {}))
        self._console.close()
        if self._wandb:
            self._wandb.close(status, is_complete=not owes_validation)
        for file in self._files.values():
            file.close()
        lost = [f"{count} of {name}" for name, file in self._files.items() if (count := len(file.unwritten()))]
        self.lost = (
            f"the disk of {self._run_dir} is full, and lines could not be written: {', '.join(lost)}" if lost else ""
        )

    def _report_missing_lines(self, saved: Mapping[str, Any]) -> None:
        """Report lines that a checkpoint counted and that are gone now."""
        for name, file in self._files.items():
            num_saved = saved.get(name, {}).get("lines", 0)
            if name != EVENTS and (missing := num_saved - file.num_lines) > 0:
                self._note("missing_lines", file=name, missing=missing, of=num_saved)
                self._console.message(
                    f"warning: {missing} of {num_saved} lines of {self._run_dir / name} up to step {self._step} are "
                    "missing or damaged; the run continues without them"
                )

    def _note(self, kind: str, **facts: Any) -> None:
        self._events.append({"step": self._step, "time": _now(), "kind": kind, **scrub(facts)})

    def _warn(self, text: str) -> None:
        # A full disk affects all files, so one warning is enough.
        if not self._has_warned:
            self._has_warned = True
            self._console.message(
                f"warning: {text}; the run continues and tries again later. Until then, its lines are in memory and in "
                "its checkpoints"
            )

    def _poll(self) -> None:
        if self._wandb:
            self._wandb.poll()


def restore_lines(folder: Path, saved: Mapping[str, Any]) -> None:
    """Write the lines that are only in a checkpoint, because the disk was full when they were made.

    Args:
        folder: the run folder.
        saved: see `Tracker`.

    Raises:
        LaunchError: they still cannot be written.
    """
    for name in RECORD_FILES:
        if records := saved.get(name, {}).get("unwritten"):
            append_missing(folder / name, records)


def _now() -> float:
    return round(time.time(), 3)


def _shown_sample(prompt: str, completion: str) -> str:
    text = f"{prompt}▸{completion}"
    if len(text) > _SHOWN_SAMPLE_LENGTH:
        text = text[:_SHOWN_SAMPLE_LENGTH] + " ..."
    return textwrap.indent(text, "  ")
