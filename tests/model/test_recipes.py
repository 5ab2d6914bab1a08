"""The figures in the comments of the large recipes, computed again from their settings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from bigtx.config import shape
from bigtx.config.load import load
from bigtx.config.runs import shipped_folder
from bigtx.config.schema import PretrainConfig
from bigtx.model.plan import (
    BUS_BETWEEN_NODES,
    BUS_IN_NODE,
    HOP_SECONDS,
    cheapest_recompute,
    communication_seconds,
    plan_lines,
    plan_run,
)
from bigtx.model.size import count_parameters
from bigtx.utils.errors import ConfigError
from bigtx.utils.hardware import peak_flops

RECIPES = ["1.3b", "7b", "13b", "30b"]
PEAK = peak_flops("H100", "bf16") or 0.0


def recipe(size: str) -> tuple[str, PretrainConfig]:
    """The text of a recipe, and its config with the vocabulary of its model's file."""
    path = shipped_folder() / f"pretrain/gpt-{size}.yaml"
    config = load(PretrainConfig, [str(path)], check=False)
    named = re.search(r"vocabulary of ([\d,]+)", Path(shipped_folder() / f"model/decoder-{size}.yaml").read_text())
    assert named
    config.model.vocab_size = int(named[1].replace(",", ""))
    return path.read_text(), config


def gpus_of(text: str) -> list[int]:
    named = re.search(r"bigtx configs plan \S+ gpus=([\d,]+)", text)
    assert named
    return [int(number) for number in named[1].split(",")]


def lines_of(config: PretrainConfig, gpus: list[int]) -> list[str]:
    return plan_lines(config, [plan_run(config, number, PEAK) for number in gpus], "H100")


def table_of(text: str) -> list[str]:
    return [line.removeprefix("#   ") for line in text.splitlines() if re.match(r"#   (?!bigtx)", line)]


@pytest.mark.parametrize("size", RECIPES)
def test_the_table_in_the_comment_is_that_of_the_settings(size: str) -> None:
    text, config = recipe(size)
    assert table_of(text) == lines_of(config, gpus_of(text))


@pytest.mark.parametrize("size", RECIPES)
def test_the_other_figures_of_the_comment(size: str) -> None:
    text, config = recipe(size)
    (memory,) = re.findall(r"with (\d+) GB", text)
    assert all(plan_run(config, number, PEAK).memory < int(memory) * 1e9 for number in gpus_of(text))
    (tokens,) = re.findall(r"global_batch_size: \d+  # ([\d,]+) tokens per step", text)
    assert int(tokens.replace(",", "")) == config.train.global_batch_size * config.train.sequence_length
    assert config.train.max_tokens is not None
    assert round(config.train.max_tokens / count_parameters(config.model).total) == 20
    ((number, unit),) = re.findall(r"on ([\d.]+)([BT]) tokens", text.splitlines()[0])
    assert float(number) * {"B": 1e9, "T": 1e12}[unit] == config.train.max_tokens


@pytest.mark.parametrize("size", ["125m", "350m", "760m", "1.3b", "3b", "7b", "13b", "30b", "70b"])
def test_shapes_suit_the_kernels(size: str) -> None:
    model = load(PretrainConfig, [f"model/decoder-{size}.yaml"], check=False).model
    assert shape.head_width(model) == 128
    assert shape.mlp_size(model) % 128 == 0


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("train", "micro_batch_size", 1),
        ("train", "global_batch_size", 2048),
        ("train", "sequence_length", 2048),
        ("train", "max_tokens", 10**9),
        ("engine", "zero_stage", 2),
        ("engine", "bucket_size", 10**7),
        ("engine", "activation_checkpointing", "none"),
        ("model", "num_layers", 30),
        ("model", "vocab_size", 64_000),
        ("optimizer", "name", "muon"),
    ],
)
def test_a_changed_setting_changes_the_table(section: str, setting: str, value: object) -> None:
    text, config = recipe("7b")
    part = dataclasses.replace(getattr(config, section), **{setting: value})
    assert lines_of(dataclasses.replace(config, **{section: part}), gpus_of(text)) != table_of(text)


def test_auto_is_the_cheapest_recomputation_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    _, config = recipe("7b")
    needed = {}
    for choice in ("none", "selective", "full"):
        engine = dataclasses.replace(config.engine, activation_checkpointing=choice)
        needed[choice] = plan_run(dataclasses.replace(config, engine=engine), 8, PEAK).memory
    assert needed["none"] > needed["selective"] > needed["full"]
    for choice, memory in needed.items():
        assert cheapest_recompute(config, 8, memory) == choice
        assert f"engine.activation_checkpointing=auto is {choice}" in capsys.readouterr().out
    assert cheapest_recompute(config, 8, 10**9) == "full" and cheapest_recompute(config, 8, None) == "none"


def test_communication_is_what_the_stages_send() -> None:
    _, config = recipe("1.3b")
    total = count_parameters(config.model).total

    def seconds(stage: int, num_gpus: int, micro_batches: int) -> float:
        return communication_seconds(
            config.model, stage=stage, num_gpus=num_gpus, micro_batches=micro_batches, bucket=total
        )

    assert seconds(1, 1, 64) == 0
    # Each rank's part of the gradient in fp32, weights in 16 bits from each: once in a step.
    assert seconds(1, 8, 1) == seconds(1, 8, 8) == pytest.approx(6 * total * 7 / 8 / BUS_IN_NODE + 7 * 2 * HOP_SECONDS)
    assert seconds(0, 8, 8) == pytest.approx(8 * total * 7 / 8 / BUS_IN_NODE + 7 * 2 * HOP_SECONDS)
    # Gradients in each micro batch, weights once.
    assert seconds(2, 64, 4) == pytest.approx(
        (4 * 8 + 2) * total * 63 / 64 / BUS_BETWEEN_NODES + 63 * (4 * 2 + 1) * HOP_SECONDS
    )
    # Weights twice and gradients once in each micro batch, of 24 blocks and the rest.
    assert seconds(3, 64, 4) == pytest.approx(
        4 * 8 * total * 63 / 64 / BUS_BETWEEN_NODES + 63 * 4 * (2 * 25 + 1) * HOP_SECONDS
    )


@pytest.mark.parametrize(
    ("num_gpus", "changes", "said"),
    [
        (3, {}, "gpus=3: train.global_batch_size=1024 cannot be divided over 3 ranks"),
        (8, {"engine": {"offload_optimizer": "cpu"}}, "engine.offload_optimizer: the plan covers only decoders"),
        (8, {"engine": {"activation_checkpointing": "auto"}}, "auto depends on the memory of a GPU"),
        (8, {"model": {"shape": "encoder"}}, "model.shape=encoder: the plan covers only decoders"),
    ],
)
def test_what_cannot_be_planned_is_refused(num_gpus: int, changes: dict[str, dict[str, object]], said: str) -> None:
    _, config = recipe("7b")
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan_run(dataclasses.replace(config, **parts), num_gpus, PEAK)
