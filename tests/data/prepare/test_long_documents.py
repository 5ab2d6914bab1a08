"""Long documents: little memory beside the text, the same ids, and a reject where they are too long for `memory`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bigtx.cli import main
from bigtx.config.schema import FilterConfig, InputConfig, PrepareConfig, TokenizerTrainConfig
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.prepare import job
from bigtx.data.prepare.job import PartReport, Report, merge, prepare
from bigtx.data.prepare.report import estimate
from bigtx.tokenizer.train import train
from bigtx.utils.errors import DataError

PROGRAM = Path(__file__).resolve().parents[3] / "tools" / "bench" / "long_documents.py"
NUM_BYTES = 8_000_000
LEAST = 1 << 26
"""The smallest `memory`: a unigram model may see 524,288 bytes of a text with it."""
SHORT, LONG, LONGER = "a few words", "words " * 80_000, "more words " * 60_000
"""The second one fits into the smallest `memory`, the third one into twice as much."""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_documents", PROGRAM)
    assert spec and spec.loader
    module = sys.modules["long_documents"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizers(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    text = bench.KINDS["prose"](None)[:200_000]
    for method in ("bpe", "unigram"):
        train(TokenizerTrainConfig(vocab_size=1000, method=method), [text]).save(folder / method)  # type: ignore[arg-type]
    return {method: folder / method for method in ("bpe", "unigram")}


def make_config(tmp_path: Path, tokenizer: Path, **changes: object) -> PrepareConfig:
    settings = {
        "input": InputConfig(paths=[str(tmp_path / "input")], max_rejects=1.0),
        "output": str(tmp_path / "corpus"),
        "tokenizer": str(tokenizer),
        "validation_fraction": 0.0,
        "num_processes": 1,
        "memory": LEAST,
    }
    return PrepareConfig(**(settings | changes))  # type: ignore[arg-type]


def write_input(tmp_path: Path, *texts: str) -> None:
    (tmp_path / "input").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "input" / f"{number}.txt").write_text(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_long_document_takes_little_memory_beside_its_text(
    bench: ModuleType, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """One after the other in one command, to save time; `make bench` prepares longer ones one by one."""
    paths = [tmp_path / f"{kind}.jsonl" for kind in bench.KINDS]
    for path in paths:
        bench.write_document(path, path.stem, NUM_BYTES)
    bpe = bench.prepare(paths, tokenizers["bpe"], tmp_path / "bpe", NUM_BYTES)
    unigram = bench.prepare(paths, tokenizers["unigram"], tmp_path / "unigram", NUM_BYTES)
    assert max(bpe["share"], unigram["share"]) < 1
    assert (bpe["status"], unigram["status"]) == (0, 2)
    assert unigram["said"].count("too long for memory=64 MiB: the tokenizer") == len(paths)
    splits = [Manifest.load(tmp_path / "bpe" / split) for split in ("train", "validation")]
    assert sum(split.num_documents for split in splits) == len(paths)
    assert sum(split.num_bytes for split in splits) >= len(paths) * NUM_BYTES


def test_the_longest_document_follows_from_memory_alone(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path, SHORT, LONG, LONGER)
    config = make_config(tmp_path, tokenizers["unigram"])
    report = prepare(config)
    assert isinstance(report, Report) and (report.train.num_documents, report.rejects.count) == (2, 1)
    (reject,) = map(json.loads, (tmp_path / "corpus" / "rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["line"]) == (str(tmp_path / "input" / "2.txt"), 1)
    assert reject["reason"] == (
        "too long for memory=64 MiB: the tokenizer would need up to 40.3 MiB for its 660,000 characters; memory=81MiB "
        "is enough"
    )
    prepare(make_config(tmp_path, tokenizers["unigram"], output=str(tmp_path / "two"), num_processes=2))
    assert contents(tmp_path / "two") == contents(tmp_path / "corpus")
    more = prepare(make_config(tmp_path, tokenizers["unigram"], output=str(tmp_path / "more"), memory=81 << 20))
    assert isinstance(more, Report) and (more.train.num_documents, more.rejects.count) == (3, 0)
    # With a BPE nothing is too long.
    whole = prepare(make_config(tmp_path, tokenizers["bpe"], output=str(tmp_path / "bpe")))
    assert isinstance(whole, Report) and (whole.train.num_documents, whole.rejects.count) == (3, 0)
    assert estimate(config).rejects == 1 and estimate(config).documents == 2
    # The same corpus with a memory that keeps the same documents, and no other one.
    assert prepare(make_config(tmp_path, tokenizers["unigram"], memory=80 << 20)).reused  # type: ignore[union-attr]
    settings = [f"input.paths=[{tmp_path / 'input'}]", f"tokenizer={tokenizers['unigram']}", "memory=81MiB"]
    settings += [f"output={tmp_path / 'corpus'}", "validation_fraction=0", "input.max_rejects=1"]
    assert main(["data", "prepare", *settings]) == 2
    assert "with memory=81 MiB more of its long documents would be kept" in capsys.readouterr().err


def test_another_memory_does_again_what_it_touches(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(tmp_path, SHORT, LONGER)
    with monkeypatch.context() as patch:
        patch.setattr(job._Job, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(make_config(tmp_path, tokenizers["unigram"]))
    report = prepare(make_config(tmp_path, tokenizers["unigram"], memory=2 * LEAST))
    assert isinstance(report, Report) and (report.train.num_documents, report.rejects.count) == (2, 0)


def test_parts_with_different_memory_are_not_merged(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    write_input(tmp_path, LONGER + "x" * 1_000_000, "y" * 2_000_000)
    for number, memory in ((1, LEAST), (2, 4 * LEAST)):
        done = prepare(make_config(tmp_path, tokenizers["unigram"], memory=memory), (number, 2))
        assert isinstance(done, PartReport) and done.num_own_units == 1
    with pytest.raises(DataError, match=r"different `memory`.* again with the same memory=; unaffected units are not"):
        merge(str(tmp_path / "corpus"), 1)
    for number in (1, 2):
        prepare(make_config(tmp_path, tokenizers["unigram"], memory=4 * LEAST), (number, 2))
    assert merge(str(tmp_path / "corpus"), 1).train.num_documents == 2


def test_filters_reject_what_they_have_no_memory_for(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    write_input(tmp_path, SHORT, LONG)
    report = prepare(make_config(tmp_path, tokenizers["bpe"], filters=FilterConfig(max_mean_word_length=9)))
    assert isinstance(report, Report) and (report.train.num_documents, report.rejects.count) == (1, 1)
    (reject,) = map(json.loads, (tmp_path / "corpus" / "rejects.jsonl").read_text().splitlines())
    assert "the filters would need up to 43.9 MiB" in reject["reason"]
