from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from bigtx.config.schema import TokenizerTrainConfig
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some hundred kilobytes of source code, and a little of other scripts."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "dataclasses", "inspect", "os", "pathlib", "socket", "subprocess", "tarfile", "typing")
    sources = [(library / f"{name}.py").read_text(encoding="utf-8") for name in names]
    return [*sources, "Привет, мир! " * 50, "\tif x:\r\n\t\ty\r\n" * 50]


@pytest.fixture(scope="session")
def bpe(texts: list[str]) -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=1500), texts)


@pytest.fixture(scope="session")
def unigram(texts: list[str]) -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=1000, method="unigram"), texts[:3])
