"""The estimate of a preparation, by hand: a tenth of the input was sampled."""

from __future__ import annotations

import dataclasses

from bigtx.data.prepare.report import Estimate

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
