"""What a run can be asked for, through its doors: traces, averages, masks between documents, other runs' weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doors import TINY, bigtx, losses, pretrain

pytestmark = pytest.mark.dist
STEPS = 12


def run_of(corpus: Path, run_dir: Path, *changes: str) -> list[str]:
    return [*TINY, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", f"train.max_steps={STEPS}", *changes]


@pytest.fixture(scope="module")
def sharded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that asks for much."""
    run_dir = tmp_path_factory.mktemp("sharded") / "run"
    changes = [
        "engine.zero_stage=3",
        "engine.precision=bf16",
        "engine.activation_checkpointing=selective",
        "optimizer.ema_decay=0.9",
        "data.document_mask=true",
        "track.profile_step=3",
        "track.wandb=off",
        "deepspeed.zero_optimization.stage3_max_live_parameters=123456",
    ]
    done = pretrain(*run_of(corpus, run_dir, *changes), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_it_learns(sharded: Path) -> None:
    found = losses(sharded)
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1] - 0.1


def test_a_profiled_step_leaves_a_trace_of_the_first_rank_of_the_machine(sharded: Path) -> None:
    assert [path.name for path in (sharded / "profile").iterdir()] == ["rank-00000.trace.json"]
    trace = json.loads((sharded / "profile" / "rank-00000.trace.json").read_text(encoding="utf-8"))
    assert "aten::mm" in {event.get("name") for event in trace["traceEvents"]}


def test_the_deepspeed_settings_lie_in_the_run(sharded: Path) -> None:
    written = json.loads((sharded / "deepspeed.json").read_text(encoding="utf-8"))
    assert written["zero_optimization"]["stage"] == 3
    assert written["zero_optimization"]["stage3_max_live_parameters"] == 123456
    assert written["train_batch_size"] == 8 and written["bf16"]["enabled"]


def test_the_average_can_be_used(sharded: Path) -> None:
    """It lags behind the weights of so short a run, so the likeliest texts differ."""
    texts = {}
    for weights in ("master", "ema"):
        done = bigtx(
            "generate",
            str(sharded),
            "--weights",
            weights,
            "--prompt",
            "ba",
            "--max-new-tokens",
            "30",
            "--temperature",
            "0",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        texts[weights] = done.stdout
    assert texts["master"] != texts["ema"]


def test_its_weights_start_another_run(corpus: Path, tmp_path: Path, sharded: Path) -> None:
    run_dir = tmp_path / "run"
    changes = [f"init_from={sharded}", "engine.zero_stage=0", "engine.precision=fp32", "schedule.warmup=0 steps"]
    done = pretrain(*run_of(corpus, run_dir, *changes, "data.document_mask=true", "track.wandb=off"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert abs(losses(run_dir)[1] - losses(sharded)[STEPS]) < 0.3
    assert losses(run_dir)[STEPS] < losses(run_dir)[1]
    assert not (run_dir / "profile").exists(), "nobody asked for one"
