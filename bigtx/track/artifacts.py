"""Log a run's checkpoint as an artifact of W&B, and link a run to its base.

    run A ── logs ──▶ artifact model-A:step-00001000 ── used by ──▶ run B (config.base_run names it too)

An artifact is a reference to the checkpoint's folder, with the checkpoint's manifest as its only content. Nothing large
is copied or read, and the manifest shows whether the folder is still the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bigtx.config.runs import run_dir_of
from bigtx.track.jsonl import Record

if TYPE_CHECKING:
    from wandb import Run

MODEL_EVENT = "model"
"""The kind of event that names a run's checkpoint for other runs."""
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
