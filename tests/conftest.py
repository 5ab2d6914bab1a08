"""What all tests share: quiet single-threaded processes, test data, and the skips of what this machine lacks."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from surroundings import prepare_process

if TYPE_CHECKING:
    from doors import Mount

prepare_process()

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


@pytest.fixture(scope="session")
def imdb_reviews(test_data: Path) -> list[str]:
    """The first 1,000 unlabelled reviews in the order of their folder or archive, which are read in a second."""
    reviews = [text for _, text in itertools.islice(_imdb_reviews(test_data / "imdb"), 1000)]
    if not reviews:
        pytest.skip(f"no reviews in {test_data / 'imdb'}")
    return reviews


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that start several processes first: each takes long, and the last file of all runs on one worker."""
    first = {item.path for item in items if item.get_closest_marker("dist")}
    items.sort(key=lambda item: item.path not in first)


def pytest_collection_finish() -> None:
    """Exclude the objects of imports and of the collection, about a million, from later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus, made by the commands that a user types: 300 documents of invented sentences."""
    from corpora import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


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
    from doors import tmpfs

    with ExitStack() as stack:

        def mount_tmpfs(folder: Path, options: str) -> None:
            if not tmpfs(folder, options, stack):
                pytest.skip("may not mount file systems")

        yield mount_tmpfs
