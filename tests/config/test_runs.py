"""The folder of a run, found from a checkpoint, and its config."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtx.config.load import load_run_config
from bigtx.config.runs import run_dir_of
from bigtx.utils.errors import BigtxError


def test_the_run_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    (disk / "step-00000001").mkdir(parents=True)
    run.mkdir()
    (run / "checkpoints").symlink_to("../disk")
    step = run / "checkpoints" / "step-00000001"
    (tmp_path / "best").symlink_to("run/checkpoints/step-00000001")
    (tmp_path / "other").symlink_to(run)
    for folder in (run, step, tmp_path / "best", tmp_path / "other", tmp_path / "other" / "checkpoints" / step.name):
        assert run_dir_of(folder).samefile(run), folder
    monkeypatch.chdir(tmp_path)
    assert run_dir_of("run/checkpoints/step-00000001").samefile(run)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\0" * 100,
        "[1]",
        "model: 5",
        "a: !!python/object/apply:os.system [id]",
        "model: {num_la",
        "[" * 9999,
        "1: 2",
    ],
)
def test_a_damaged_config_is_one_paragraph(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(BigtxError, match=r"config\.yaml"):
        load_run_config(tmp_path)
