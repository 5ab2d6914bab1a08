"""Files of a run that were damaged: what they say is done without, or found out again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtx.finetuning.base import BASE, read_base_facts
from bigtx.finetuning.run import RESULTS, is_finished
from bigtx.interop.card import _losses
from bigtx.track.wandb_run import read_or_make_run_id

CONTENTS = [b"", b"\0" * 30, b"[1]", b"5", b'{"tokens": ', b"\xff\xfe", b"[" * 100_000, b'{"checkpoint": "x"}']


def finished_run() -> tuple[Any, Any]:
    """Return as much of the inputs of a run and of its checkpoint as reading these files needs."""
    state = {"tokens": 7, "step": 3, "measured_since_best": 0}
    settings = SimpleNamespace(train=SimpleNamespace(max_steps=3), validation=SimpleNamespace(patience=None))
    inputs = SimpleNamespace(config=settings, rows=[], total_steps=3)
    return inputs, SimpleNamespace(origin={}, checkpoint=SimpleNamespace(manifest={"state": state}))


@pytest.mark.parametrize("content", CONTENTS)
def test_results_and_base(tmp_path: Path, content: bytes) -> None:
    for name in (RESULTS, BASE):
        (tmp_path / name).write_bytes(content)
    assert is_finished(*finished_run(), tmp_path) is False
    assert read_base_facts(tmp_path) == {}
    (tmp_path / RESULTS).write_text('{"tokens": 7}')
    assert is_finished(*finished_run(), tmp_path) is True


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"\0" * 8, b"a b", b"../x", "ü".encode()])
def test_the_id_of_the_wandb_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wandb_run_id").write_bytes(content)
    (tmp_path / "wandb_run_place").write_bytes(content)
    found = read_or_make_run_id(tmp_path)
    assert found.id.isalnum() and read_or_make_run_id(tmp_path) == found
    (tmp_path / "wandb_run_id").write_text("my-run.2\n")
    assert read_or_make_run_id(tmp_path).id == "my-run.2"


def test_the_losses_of_a_model_card(tmp_path: Path) -> None:
    lines = ['{"step": "many", "validation/a/loss": 1.0}', '{"step": 1, "validation/a/loss": 2.5}']
    lines += ['{"step": 2, "validation/a/loss": "x"}', '{"step": 3, "validation/b/loss": [1]}', "[1]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "| a | 1 | 2.5000 |" in _losses(tmp_path / "metrics.jsonl", {"step": 3})
