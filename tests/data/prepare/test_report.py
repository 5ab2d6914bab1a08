"""The estimate of a preparation, by hand: a tenth of the input was sampled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bigtx.config.schema import InputConfig, PrepareConfig, TokenizerTrainConfig
from bigtx.data.prepare import report
from bigtx.data.prepare.report import Estimate, estimate
from bigtx.tokenizer.train import train

SAMPLE = Estimate(
    stored_bytes=20 * 2**20,
    sampled_bytes=2 * 2**20,
    num_processes=2,
    documents=4_096,
    text_bytes=3_000_000,
    tokens=2**19,
    removed=30,
    rejects=2,
    seconds=60.0,
    token_bytes=2,
)


def test_the_lines_of_an_estimate() -> None:
    assert list(SAMPLE.lines()) == [
        "Sampled 2 MiB of 20 MiB (10.00%): 4,096 documents, 524,288 tokens, 5.72 bytes/token, 0.1 MB/s in one process.",
        "Of 4,128 documents the rules leave out 30, and 2 cannot be read.",
        "The whole input, estimated from this sample (without the search for duplicates):",
        "  documents  about 41k",
        "  tokens     about 5.24M",
        "  time       about 5 min in 2 processes",
        # 2 bytes of each token; in addition 48 bytes of each document.
        "  disk       about 10 MiB, and 11.9 MiB more for temporary files",
    ]


def test_what_is_not_left_out_is_not_mentioned() -> None:
    for removed, rejects in ((0, 0), (1, 0), (0, 1)):
        lines = list(dataclasses.replace(SAMPLE, removed=removed, rejects=rejects).lines())
        assert any(line.startswith("Of ") for line in lines) == bool(removed or rejects)


def test_the_facts_of_an_estimate() -> None:
    facts = SAMPLE.facts()
    assert facts["estimate"] == {
        "documents": 40_960,
        "tokens": 5_242_880,
        "seconds": 300.0,
        "bytes_on_disk": 10_485_760,
    }
    assert facts["sample"]["tokens"] == 2**19 and facts["sample"]["rejects"] == 2


def test_a_sample_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of processes is the one that is set, or that of the cores."""
    texts = [f"number {number} of the words that are counted" for number in range(200)]
    tokenizer = train(TokenizerTrainConfig(vocab_size=400), texts)
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("\n".join(texts))
    config = PrepareConfig(
        input=InputConfig(paths=[str(tmp_path / "a.txt")], document_per_line=True),
        tokenizer=str(tmp_path / "tokenizer"),
        num_processes=3,
    )
    monkeypatch.setattr(report, "num_cores", lambda: 5)
    found = estimate(config)
    assert (found.documents, found.num_processes) == (200, 3)
    assert (found.removed, found.rejects, found.text_bytes) == (0, 0, sum(map(len, texts)))
    assert found.sampled_bytes == found.stored_bytes == found.text_bytes + 199
    assert found.tokens == sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))
    assert estimate(dataclasses.replace(config, num_processes=0)).num_processes == 5
