"""`bigtx checkpoints` on runs of one weight, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from doors import as_json
from engine.test_checkpoints import flip, names, write

from bigtx.cli import main
from bigtx.commands.checkpoints import command
from bigtx.config.load import to_yaml
from bigtx.config.schema import PretrainConfig, TrainConfig
from bigtx.utils.errors import ConfigError, LaunchError
from bigtx.utils.locks import FolderLock


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at 5, 10, 15, 20 and 25 whose best one is that of step 5; that of 25 is suspect."""
    for step in (5, 10, 15, 20):
        state = {"best_step": 5, "tokens": 1000 * step}
        write(tmp_path, step, state=state, zero_stage=2, world_size=4)
    write(tmp_path, 25, suspect=True)
    config = PretrainConfig(run_dir=str(tmp_path), train=TrainConfig(max_steps=30))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    return tmp_path


def keep_every(run: Path, text: str) -> None:
    config = (run / "config.yaml").read_text()
    assert "keep_every: null" in config
    (run / "config.yaml").write_text(config.replace("keep_every: null", f"keep_every: {text}"))


def shown(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return as_json(capsys, command, [str(run), *words])


def test_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_every(run, "10k tokens")
    (run / "checkpoints" / "step-00000012.damaged").mkdir()
    rows = {row["name"]: row for row in shown(run, capsys)["checkpoints"]}
    assert list(rows) == [f"step-000000{step:02d}" for step in (25, 20, 15, 10)] + [
        "step-00000005",
        "step-00000012.damaged",
    ]
    twenty = rows["step-00000020"]
    assert (twenty["step"], twenty["tokens"], twenty["zero_stage"], twenty["ranks"]) == (20, 20_000, 2, 4)
    files = [file for file in (run / "checkpoints" / "step-00000020").glob("*.safetensors")]
    assert twenty["size_bytes"] == sum(file.stat().st_size for file in files) and 0 <= twenty["age_seconds"] < 600
    marks = ("is_best", "is_permanent", "is_suspect", "is_set_aside")
    assert {name[5:]: [mark[3:] for mark in marks if row[mark]] for name, row in rows.items()} == {
        "00000025": ["suspect"],
        "00000020": ["permanent"],
        "00000015": [],
        "00000010": ["permanent"],
        "00000005": ["best"],
        "00000012.damaged": ["set_aside"],
    }
    assert main(["checkpoints", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[1].endswith("suspect") and "best" in lines[5] and "20k" in lines[2]


def test_each_damage_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    flip(folder / "step-00000020" / "rank-00000.safetensors")
    assert main(["checkpoints", str(run)]) == 0, "only --verify reads the files"
    assert main(["checkpoints", str(run), "--verify"]) == 1
    out = capsys.readouterr().out
    assert f"{folder / 'step-00000020'}: rank-00000.safetensors does not have the sha256" in out
    (folder / "step-00000015" / "rank-00000.safetensors").unlink()
    (folder / "step-00000010" / "manifest.json").write_text("{}")
    assert main(["checkpoints", str(run)]) == 1
    out = capsys.readouterr().out
    assert "rank-00000.safetensors is missing" in out and "is not of format" in out and out.count("DAMAGED") == 2


def test_what_is_not_needed_is_deleted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = shown(run, capsys, "prune=1")
    assert result["deleted"] == ["step-00000015", "step-00000010", "step-00000025"]
    assert names(run) == ["step-00000005", "step-00000020"], "the newest good one and the best"
    assert not (run / "run.lock").exists()
    assert main(["checkpoints", str(run), "--verify"]) == 0
    assert "all files have the hashes" in capsys.readouterr().out


def test_what_is_permanent_or_damaged_is_not_deleted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_every(run, "10 steps")
    (run / "checkpoints" / "step-00000015" / "manifest.json").write_text("{}")
    assert main(["checkpoints", str(run), "prune=1"]) == 1
    assert names(run) == [f"step-000000{step:02d}" for step in (5, 10, 15, 20)]


def test_nothing_is_deleted_while_the_run_trains(run: Path) -> None:
    with FolderLock(run), pytest.raises(LaunchError, match="is in use by"):
        command([str(run), "prune=1"])
    with pytest.raises(ConfigError, match="write prune=1 or more"):
        command([str(run), "prune=0"])
    with pytest.raises(ConfigError, match="is a checkpoint; name its run"):
        command([str(run / "checkpoints" / "step-00000010")])
    assert len(names(run)) == 5


def test_a_run_without_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints").rename(run / "elsewhere")
    assert main(["checkpoints", str(run)]) == 0
    assert capsys.readouterr().out == f"{run} has no checkpoint\n"
