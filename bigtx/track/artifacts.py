"""Models in W&B: a run's checkpoint as an artifact, and the link from a run to the one that it began from.

    run A ── logs ──▶ artifact model-A:step-00001000 ── used by ──▶ run B (config.base_run names it too)

An artifact is a reference to the checkpoint's folder, with the checkpoint's manifest as its only content: nothing large
is copied or read, and whoever has the folder can tell by the manifest whether it is still the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bigtx.config.runs import run_dir_of
from bigtx.track.jsonl import Record

if TYPE_CHECKING:
    from wandb import Run

MODEL_EVENT = "model"
"""The event that names a run's checkpoint for others."""
LINK_EVENT = "wandb_base"
"""The event that says how a run was linked to its base."""


def log_model(run: Run, event: Record) -> None:
    """Log the model artifact of a run. Raises whatever W&B raises.

    Args:
        event: of the kind MODEL_EVENT.
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
    if frozen.is_dir():  # Weights that the run does not train: no checkpoint is whole without them.
        artifact.add_reference(frozen.as_uri(), name=frozen.name, checksum=False)
    manifest = folder / "manifest.json"
    if manifest.is_file():
        artifact.add_file(str(manifest), name="manifest.json")
    run.log_artifact(artifact, aliases=["latest", f"step-{event['step']:08d}"])
    run.summary.update({f"model/{key}": event[key] for key in ("step", "checkpoint", "manifest_sha256")})


def link_base(run: Run, base: Record, *, is_online: bool) -> Record:
    """Link a run to its base: in the summary, and in W&B's lineage where that can be. Raises nothing of W&B's.

    Args:
        base: as for `Tracker`.

    Returns:
        An event: the artifact, or why there is none.
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
    """Use an artifact of the run's project; returns its name and "", or "" and why not."""
    try:
        return run.use_artifact(name, type="model").qualified_name, ""
    except Exception as error:  # Not there, of another project, not allowed: the config still holds the link.
        return "", f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}"


def artifact_name(run_id: str) -> str:
    """Of the model of a run."""
    return f"model-{run_id}"
