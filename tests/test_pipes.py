"""A pipe that nobody writes into, wherever a file is named: refused with the reason, and nothing waits for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from bigtx.cli import main
from bigtx.config.load import load
from bigtx.config.schema import FinetuneConfig, ForeignConfig, InputConfig, PretrainConfig
from bigtx.data.raw.files import list_files
from bigtx.data.recordings import AudioPlace, look_at
from bigtx.data.records.read import read_records
from bigtx.data.records.record import Broken
from bigtx.data.stream import foreign
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import BigtxError, DataError

REFUSED = "is a pipe, not a file; write what it gives into a file first"


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    """Opening a pipe for reading waits for somebody who writes."""

    def fail(*_: object) -> NoReturn:
        pytest.fail("waited for a pipe", pytrace=False)

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    return path


def test_in_place_of_input(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    for path in (pipe(tmp_path / "texts" / "b.txt"), "/dev/null"):
        with pytest.raises(DataError, match=r"is a (pipe|device), not a file"):
            list_files(InputConfig(paths=[str(path)]))
    (tmp_path / "texts" / "c.txt").symlink_to(tmp_path / "texts" / "b.txt")
    for named in (tmp_path / "texts", tmp_path / "texts" / "*.txt"):
        assert [Path(file.path).name for file in list_files(InputConfig(paths=[str(named)]))] == ["a.txt"]


def test_in_place_of_records(tmp_path: Path) -> None:
    fifo = pipe(tmp_path / "records" / "a.jsonl")
    with pytest.raises(DataError, match=REFUSED):
        list(read_records([str(fifo)], Broken()))
    for number in (1, 2):
        (tmp_path / "records" / f"{number}.txt").write_text("a text")
    pipe(tmp_path / "records" / "3.txt")
    assert len(list(read_records([str(tmp_path / "records")], Broken()))) == 2
    pipe(tmp_path / "x.de")
    (tmp_path / "x.en").write_text("a line\n")
    broken = Broken()
    assert not list(read_records([str(tmp_path / "x.{de,en}")], broken)) and "it is a pipe" in broken.listed()
    place = AudioPlace("a.wav", str(pipe(tmp_path / "a.wav")), 0, 100)
    assert "it is a pipe" in str(look_at([place])[place])


def test_a_process_substitution_is_refused_with_the_reason(tmp_path: Path) -> None:
    """`<(...)` is a pipe with a name such as /dev/fd/63."""
    read, write = os.pipe()
    try:
        with pytest.raises(DataError, match=f"/dev/fd/{read} {REFUSED}"):
            list(read_records([f"/dev/fd/{read}"], Broken()))
    finally:
        os.close(read)
        os.close(write)


def test_in_place_of_shards_and_tokenizers(tmp_path: Path) -> None:
    shards = f"{pipe(tmp_path / '0.tar').parent}/{{0..0}}.tar"
    with pytest.raises(DataError, match=r"0\.tar cannot be read \(it is a pipe"):
        foreign.check_shards(ForeignConfig(paths=[shards]), world_size=1)
    for path, read in (
        (pipe(tmp_path / "tokenizer" / "bigtx_tokenizer.json").parent, Tokenizer.load),
        (pipe(tmp_path / "a.model"), Tokenizer.from_sentencepiece),
        (pipe(tmp_path / "tokenizer.json"), Tokenizer.from_huggingface),
    ):
        with pytest.raises(BigtxError, match="it is a pipe"):
            read(path)


@pytest.mark.parametrize(
    "command",
    [
        "data prepare {0}",
        "data verify {0}",
        "tokenizer train input.paths=[{0}] output=tokenizer",
        "tokenizer train {0}",
        "predict {0} --input a.jsonl",
        "predict . --input {0}",
        "evaluate {0} --data a.jsonl",
        "generate {0} --prompt x",
        "generate . --prompts-file {0}",
        "export {0} --to hf -o out",
        "import {0} -o run",
    ],
)
def test_every_command_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    fifo = pipe(tmp_path / ("a.yaml" if command.endswith(" {0}") else "pipe.jsonl"))
    assert main(command.format(fifo).split()) == 2
    told = capsys.readouterr().err
    assert str(fifo) in told and "Traceback" not in told


def test_in_place_of_configs_and_runs(tmp_path: Path) -> None:
    """As the entry points of trainings read them."""
    config, base = pipe(tmp_path / "a.yaml"), pipe(tmp_path / "base")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    for schema, arguments in (
        (PretrainConfig, [str(config)]),
        (PretrainConfig, [str(tmp_path / "b.yaml")]),
        (FinetuneConfig, [str(config)]),
        (FinetuneConfig, [f"base={base}", f"data.train={config}", f"run_dir={tmp_path / 'run'}"]),
    ):
        with pytest.raises(BigtxError, match=str(tmp_path)):
            load(schema, arguments)
