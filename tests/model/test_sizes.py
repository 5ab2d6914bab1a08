"""Every number in the tables of docs/sizes.md, computed again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtx.config.load import load
from bigtx.config.runs import shipped_folder
from bigtx.config.schema import ModelConfig, PretrainConfig
from bigtx.model.plan import (
    RESERVE,
    Recompute,
    activation_bytes,
    buffer_bytes,
    bytes_per_parameter,
    loss_bytes,
    state_bytes,
)
from bigtx.model.size import count_parameters, flops_per_token
from bigtx.utils.hardware import peak_flops

PAGE = Path(__file__).parents[2] / "docs" / "sizes.md"
SIZES = ["1m", "8m", "10m", "30m", "125m", "350m", "760m", "1.3b", "3b", "7b", "13b", "30b", "70b"]
ROW = 2048
MFU = 0.4
TOKENS_PER_PARAMETER = 20
"""Training tokens per parameter at which a compute budget is spent best (Hoffmann et al. 2022, arXiv:2203.15556,
table 3)."""
BYTES_PER_TOKEN = 4
"""Approximate UTF-8 bytes of English text per token, with a vocabulary of 16k to 50k."""
USEFUL_EPOCHS = 4
"""Repetitions up to which text is worth nearly as much as new text (Muennighoff et al. 2023, arXiv:2305.16264)."""
Table = list[list[str]]


def model_of(size: str) -> ModelConfig:
    """A shipped decoder, with the vocabulary that its file names."""
    path = shipped_folder() / f"model/decoder-{size}.yaml"
    model = load(PretrainConfig, [str(path)], check=False).model
    named = re.search(r"vocabulary of ([\d,]+)", path.read_text(encoding="utf-8"))
    assert named
    model.vocab_size = int(named[1].replace(",", ""))
    return model


MODELS = {size: model_of(size) for size in SIZES}


def parameters(size: str) -> int:
    """Of a shipped decoder."""
    return count_parameters(MODELS[size]).total


def figure(value: float) -> str:
    """A number of three digits, with what people write behind millions."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:,.0f}"


def size_of(num_bytes: float) -> str:
    """Bytes of files."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    raise AssertionError(num_bytes)


def gigabytes(num_bytes: float) -> str:
    """Gigabytes of memory, of 10^9 bytes."""
    value = num_bytes / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """A time in the unit that people would choose."""
    for unit, name in ((365 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} seconds"


def per_parameter() -> Table:
    """What ZeRO keeps."""
    return [
        [str(stage), *(f"{bytes_per_parameter(stage, ranks, states):.3g}" for ranks in (1, 8, 64) for states in (2, 1))]
        for stage in range(4)
    ]


def states() -> Table:
    """Gigabytes on each GPU."""
    places = [(0, 1), (1, 1), (1, 8), (2, 8), (3, 8), (1, 64), (2, 64), (3, 64)]
    rows = []
    for size, model in MODELS.items():
        adamw = [state_bytes(model, stage=stage, num_ranks=ranks, optimizer="adamw") for stage, ranks in places]
        muon = state_bytes(model, stage=1, num_ranks=1, optimizer="muon")
        rows.append([size, f"{parameters(size):,}", *map(gigabytes, adamw), gigabytes(muon)])
    return rows


def activations() -> Table:
    """Gigabytes for a row."""
    choices: tuple[Recompute, ...] = ("none", "selective", "full")
    return [
        [
            size,
            *(gigabytes(activation_bytes(model, num_tokens=ROW, recompute=recompute)) for recompute in choices),
            gigabytes(loss_bytes(model, num_tokens=ROW)),
        ]
        for size, model in MODELS.items()
    ]


def training_bytes(model: ModelConfig, ranks: int, stage: int, recompute: Recompute) -> int:
    """On each GPU, in a step with AdamW in bf16."""
    states = state_bytes(model, stage=stage, num_ranks=ranks, optimizer="adamw")
    activations = activation_bytes(model, num_tokens=ROW, recompute=recompute, stage=stage)
    return states + buffer_bytes(model, stage=stage) + activations + loss_bytes(model, num_tokens=ROW) + RESERVE


def largest(memory: int, ranks: int, stage: int, recompute: Recompute) -> str:
    """The largest shipped decoder that fits."""
    fitting = [size for size, model in MODELS.items() if training_bytes(model, ranks, stage, recompute) <= memory * 1e9]
    return fitting[-1]


def fitting() -> Table:
    """Without recomputation, and with all of it."""
    return [
        [
            f"{memory} GB",
            str(ranks),
            *(
                f"{largest(memory, ranks, stage, 'none')}, {largest(memory, ranks, stage, 'full')}"
                for stage in range(4)
            ),
        ]
        for memory in (24, 40, 80, 141)
        for ranks in (1, 8, 64)
    ]


def times() -> Table:
    """Of training with 20 tokens a parameter."""
    rows = []
    for size in SIZES[4:]:
        model, tokens = MODELS[size], TOKENS_PER_PARAMETER * parameters(size)
        row = [size, figure(tokens), size_of(tokens * BYTES_PER_TOKEN)]
        row.append(f"{tokens * flops_per_token(model, ROW):.1e}")
        for device, count in (("A100", 1), ("H100", 1), ("H100", 8), ("H100", 64)):
            peak = peak_flops(device, "bf16")
            assert peak
            speed = MFU * count * peak
            row.append(duration(tokens * flops_per_token(model, ROW) / speed))
        rows.append(row)
    return rows


def texts() -> Table:
    """From the text that there is to the size of a model."""
    rows = []
    for num_bytes in (1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12):
        tokens = num_bytes / BYTES_PER_TOKEN
        wanted = tokens * USEFUL_EPOCHS / TOKENS_PER_PARAMETER
        size = [size for size in SIZES if parameters(size) <= wanted] or SIZES[:1]
        rows.append([size_of(num_bytes), figure(tokens), figure(tokens * USEFUL_EPOCHS), figure(wanted), size[-1]])
    return rows


def laptops() -> Table:
    """With the arithmetic that the demo did each second: 6,000 tokens/s of 5.1M parameters in rows of 128 (docs/log.md,
    2026-11-24: 5.6k to 6.9k)."""
    demo = load(PretrainConfig, ["pretrain/small.yaml"], check=False).model
    demo.vocab_size = 8192
    speed = 6000 * flops_per_token(demo, 128)
    rows = []
    for size in SIZES[:4]:
        tokens = TOKENS_PER_PARAMETER * parameters(size)
        seconds = tokens * flops_per_token(MODELS[size], 128) / speed
        rate = tokens / seconds
        rows.append([size, f"{rate:,.0f}", figure(tokens), duration(seconds), figure(rate * 3600)])
    return rows


TABLES: dict[str, Callable[[], Table]] = {
    "Bytes per parameter": per_parameter,
    "Model states": states,
    "Activations": activations,
    "The largest that fits": fitting,
    "How long it takes": times,
    "From your text": texts,
    "Without a GPU": laptops,
}


def tables_of_page() -> dict[str, Table]:
    """The rows of each section's table, without its head."""
    found: dict[str, Table] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return {heading: rows[2:] for heading, rows in found.items()}


@pytest.mark.parametrize("heading", TABLES)
def test_table(heading: str) -> None:
    assert tables_of_page()[heading] == TABLES[heading]()


def test_no_table_is_left_out() -> None:
    assert set(tables_of_page()) == set(TABLES)
