"""The folder of a run, found from a checkpoint, and its config."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtx.config.load import load_run_config
from bigtx.config.runs import is_run, run_dir_of
from bigtx.utils.errors import BigtxError, ConfigError


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
    ("content", "expected"),
    [
        ('{"packages": {"bigtx": "0.1.0"}}', True),
        ('{"packages": {"torch": "2.13.0"}}', False),
        ('{"packages": ["bigtx"]}', False),
        ("{}", False),
    ],
)
def test_a_description_of_another_program_makes_no_run(tmp_path: Path, content: str, expected: bool) -> None:
    (tmp_path / "environment.json").write_text(content)
    assert is_run(tmp_path) == expected


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


@pytest.mark.parametrize(
    "model",
    [
        "{hidden_size: 8, num_heads: 3}",
        "{hidden_size: 8, num_heads: 16}",
        "{hidden_size: 12, num_heads: 4}",
        "{head_width: 3, hidden_size: 8}",
        "{hidden_size: 8, num_heads: 4, num_kv_heads: 3}",
    ],
)
def test_a_config_by_which_no_model_can_be_built_is_refused(tmp_path: Path, model: str) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {model}")
    with pytest.raises(ConfigError, match=r"^model\.\w+=\d+ \(.*config\.yaml\): "):
        load_run_config(tmp_path)
