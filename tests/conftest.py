"""What all tests share: quiet single-threaded processes, test data, and the skips of what this machine lacks."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported anywhere: tests start several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where it is set, each of the processes that tests start would compile all of bigtx again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Nothing of a test run may reach a real W&B server, whoever is logged in here; a test that wants one brings its own.
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"

import hypothesis
import pytest

if TYPE_CHECKING:
    from doors import Mount

# A test run in the background of a script has SIGINT ignored, under nohup SIGHUP, and so would what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent

# A slow machine is no failure of the property under test.
hypothesis.settings.register_profile("bigtx", deadline=None, print_blob=True)
hypothesis.settings.load_profile("bigtx")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real corpora that some tests read: $BIGTX_TEST_DATA, or shared/data beside the clone."""
    folder = Path(os.environ.get("BIGTX_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set BIGTX_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def imdb_jsonl(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unlabelled reviews of the Large Movie Review Dataset, one JSON line each, in the order of their ids."""
    path = tmp_path_factory.mktemp("imdb") / "imdb.jsonl"
    reviews = dict(_imdb_reviews(test_data / "imdb"))
    if not reviews:
        pytest.skip(f"no reviews in {test_data / 'imdb'}")
    with open(path, "w", encoding="utf-8") as file:
        for number in sorted(reviews):
            print(json.dumps({"id": number, "text": reviews[number]}), file=file)
    return path


def _imdb_reviews(folder: Path) -> Iterator[tuple[int, str]]:
    for path in (folder / "train" / "unsup").glob("*.txt"):
        yield int(path.stem.partition("_")[0]), path.read_text(encoding="utf-8")
    for archive in folder.glob("*unsup*.tar.xz"):
        with tarfile.open(archive) as members:
            for member in members:
                if member.isfile() and "/unsup/" in member.name:
                    content = members.extractfile(member)
                    assert content
                    yield int(Path(member.name).stem.partition("_")[0]), content.read().decode()


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus, made by the commands that a user types: 300 documents of invented sentences."""
    import random

    from doors import bigtx

    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(1)
    words = [f"{a}{b}{c}" for a in "bdklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]
    for number in range(300):
        sentences = (" ".join(generator.choices(words, k=generator.randrange(4, 12))) for _ in range(30))
        (folder / f"{number:03d}.txt").write_text(". ".join(sentences) + ".\n", encoding="utf-8")
    for arguments in (
        ["tokenizer", "train", f"input.paths=[{folder}]", f"output={folder / 'tokenizer'}", "vocab_size=512"],
        [
            "data",
            "prepare",
            f"input.paths=[{folder}]",
            f"tokenizer={folder / 'tokenizer'}",
            f"output={folder / 'data'}",
            "validation_fraction=0.05",
            "block_tokens=4096",
            "num_processes=1",
        ],
    ):
        done = bigtx(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "data"


@pytest.fixture(scope="session")
def decoder_base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained decoder."""
    from finetunes import make_base

    return make_base(corpus, tmp_path_factory.mktemp("base") / "decoder")


@pytest.fixture(scope="session")
def encoder_base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained encoder."""
    from finetunes import SHAPES, make_base

    return make_base(corpus, tmp_path_factory.mktemp("base") / "encoder", *SHAPES["encoder"])


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts a tmpfs with options on a new folder, for the time of a test."""
    with ExitStack() as stack:

        def mount_tmpfs(folder: Path, options: str) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("may not mount file systems")
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)

        yield mount_tmpfs
