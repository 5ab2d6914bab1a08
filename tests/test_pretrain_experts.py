"""A mixture of experts, trained as its users do."""

from __future__ import annotations

from pathlib import Path

import pytest
from doors import TINY, last_step, losses, pretrain, read_lines

EXPERTS = ["model.experts.num_experts=4", "model.experts.expert_size=64", "model.experts.shared_size=32"]


@pytest.mark.dist
def test_two_ranks_learn_and_tell_where_the_tokens_go(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ["train.max_steps=30", "train.log_every=5 steps", "optimizer.learning_rate=3e-3", "engine.zero_stage=2"]
    done = pretrain(*TINY, *EXPERTS, *settings, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "train/loss" in line]
    assert len(lines) == 6 and last_step(run_dir) == 30
    for line in lines:
        # Of four experts, the largest share is between an even one and half of all: two are active for each token.
        assert 0 <= line["experts/min_load"] <= 1 <= line["experts/max_load"] <= 2
        assert 0.9 < line["experts/balance"] < 2 and line["experts/router_z"] > 0
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.5 and losses(run_dir)
