"""Near duplicates: planted ones are found, others are not, and neither memory nor files change what is found."""

from __future__ import annotations

import io
import random
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bigtx.config.schema import NearDuplicateConfig
from bigtx.data.text import near
from bigtx.data.text.near import ROW_DTYPE, SignaturePart, find_near_duplicates
from bigtx.data.text.ngrams import NOTHING, Signer
from bigtx.utils.errors import DataError

NUM_PAIRS = 2500
SMALL = NearDuplicateConfig(num_bands=3, rows_per_band=2, threshold=0.6)


def write_parts(folder: Path, signatures: np.ndarray, num_parts: int = 1) -> list[SignaturePart]:
    folder.mkdir(exist_ok=True)
    parts = []
    for number, rows in enumerate(np.array_split(signatures, num_parts)):
        path = folder / f"part-{num_parts}-{number}"
        rows.astype("<u2").tofile(path)
        parts.append(SignaturePart(path, len(rows)))
    return parts


@dataclass(frozen=True)
class Found:
    """The files that a search leaves."""

    folder: Path

    def rows(self) -> np.ndarray:
        return np.fromfile(self.folder / "rows", ROW_DTYPE)

    def removed(self) -> np.ndarray:
        return np.fromfile(self.folder / "removed", bool)

    @property
    def num_removed(self) -> int:
        return len(self.rows())


def find(parts: list[SignaturePart], folder: Path) -> Found:
    return Found(find_near_duplicates(parts, folder, SMALL, 1 << 20))


def search(
    folder: Path, signatures: np.ndarray, config: NearDuplicateConfig, num_parts: int = 1, memory: int = 64 << 20
) -> Found:
    return Found(find_near_duplicates(write_parts(folder, signatures, num_parts), folder, config, memory))


def by_definition(signatures: np.ndarray, config: NearDuplicateConfig) -> list[tuple[int, int, float]]:
    """The rows as the module's text defines them, one comparison after the other."""
    best: dict[int, tuple[float, int]] = {}
    for band in range(config.num_bands):
        groups: dict[tuple[int, ...], list[int]] = {}
        for document, row in enumerate(signatures.tolist()):
            if any(value != NOTHING for value in row):
                rows = config.rows_per_band
                groups.setdefault(tuple(row[band * rows : (band + 1) * rows]), []).append(document)
        for members in groups.values():
            group = members
            for _ in range(near.MAX_ROUNDS):
                if len(group) < 2:
                    break
                leader, rest = group[0], []
                for document in group[1:]:
                    similarity = float(np.float32((signatures[document] == signatures[leader]).mean()))
                    if similarity >= config.threshold - 1e-6:
                        best[document] = min(best.get(document, (1.0, 0)), (-similarity, leader))
                    else:
                        rest.append(document)
                group = rest
    return [(document, leader, -similarity) for document, (similarity, leader) in sorted(best.items())]


def jaccard(one: list[str], other: list[str]) -> float:
    ngrams = [{tuple(words[place : place + 5]) for place in range(len(words) - 4)} for words in (one, other)]
    return len(ngrams[0] & ngrams[1]) / len(ngrams[0] | ngrams[1])


def invented_words() -> Iterator[str]:
    draw = random.Random(2)
    while True:
        yield "".join(draw.choices("bcdfghjklmnpqrstvwxz", k=9))


def random_texts(_: object) -> Iterator[list[str]]:
    draw = random.Random(3)
    vocabulary = ["".join(draw.choices("aeioubdklmnprst", k=draw.randint(2, 8))) for _ in range(5000)]
    while True:
        yield draw.choices(vocabulary, k=700)


def imdb_texts(test_data: Path) -> Iterator[list[str]]:
    path = test_data / "imdb" / "aclImdb_train_unsup.tar.xz"
    if not path.exists():
        pytest.skip("no IMDB texts")
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and "/train/pos/" in member.name:
                content = io.TextIOWrapper(archive.extractfile(member), "utf-8").read()  # type: ignore[arg-type]
                yield "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in content).split()


def pair(words: list[str], similarity: float, new: Iterator[str], draw: random.Random) -> tuple[str, str] | None:
    """Two texts whose 5-grams have just this Jaccard similarity; None if the words are too few or repeat themselves.

    A new word at least five words from the next one and from the ends costs five of m n-grams, and so k of them give
    (m - 5 k) / (m + 5 k): 0.9 with m = 95 k, and 0.5 with m = 15 k.
    """
    per_change, changes = (95, (1, 6)) if similarity == 0.9 else (15, (7, 30))
    num_changes = min(draw.randint(*changes), (len(words) - 4) // per_change)
    if num_changes < changes[0]:
        return None
    one = [word.lower() for word in words[: num_changes * per_change + 4]]
    slot = (len(one) - 8) // num_changes
    other = list(one)
    for number in range(num_changes):
        other[4 + number * slot + draw.randrange(slot - 4)] = next(new)
    if jaccard(one, other) != similarity:
        return None
    # What does not count differs everywhere.
    return " ".join(one), ",\n".join(word.upper() for word in other) + "!"


@pytest.mark.parametrize("texts", [random_texts, imdb_texts])
def test_planted_duplicates_are_found_and_half_equal_texts_are_not(
    tmp_path: Path, texts: object, request: pytest.FixtureRequest
) -> None:
    """Of pairs whose similarity is exactly 0.9 at least 99 % are found; of pairs at 0.5 fewer than 1 %."""
    source = texts(request.getfixturevalue("test_data") if texts is imdb_texts else None)  # type: ignore[operator]
    draw, new = random.Random(4), invented_words()
    pairs: dict[float, list[tuple[str, str]]] = {0.9: [], 0.5: []}
    for words in source:
        similarity = 0.9 if len(pairs[0.9]) <= len(pairs[0.5]) else 0.5
        if made := pair(words, similarity, new, draw):
            pairs[similarity].append(made)
        if min(map(len, pairs.values())) >= NUM_PAIRS:
            break
    assert min(map(len, pairs.values())) >= NUM_PAIRS
    config = NearDuplicateConfig()
    # All first texts, then all second ones, so that pairs do not stand side by side.
    both = pairs[0.9][:NUM_PAIRS] + pairs[0.5][:NUM_PAIRS]
    signatures = Signer(config).sign([text for place in (0, 1) for text in (made[place] for made in both)])
    found = search(tmp_path, signatures, config, num_parts=7)
    removed = found.removed().reshape(2, 2, NUM_PAIRS).mean(axis=2)
    assert removed[1, 0] >= 0.99, "pairs at 0.9 that were found"
    assert removed[1, 1] < 0.01, "pairs at 0.5 that were removed"
    assert removed[0].max() < 0.01, "first texts of pairs that were removed"
    rows = found.rows()
    right = rows[rows["duplicate"] == rows["leader"] + 2 * NUM_PAIRS]
    assert len(right) >= 0.99 * NUM_PAIRS
    assert abs(float(right["similarity"].mean()) - 0.9) < 0.01


def draw_signatures(count: int, num_hashes: int, seed: int) -> np.ndarray:
    """Families of documents that share many values, so that groups need several rounds."""
    random_state = np.random.default_rng(seed)
    families = random_state.integers(0, 4, (7, num_hashes))
    signatures = families[random_state.integers(0, 7, count)]
    changed = random_state.random(signatures.shape) < 0.35
    signatures[changed] = random_state.integers(0, 4, int(changed.sum()))
    signatures[random_state.random(count) < 0.03] = NOTHING
    return signatures.astype("<u2")


@pytest.mark.parametrize("seed", range(3))
def test_the_rows_are_those_of_the_definition(tmp_path: Path, seed: int) -> None:
    signatures = draw_signatures(400, 6, seed)
    found = search(tmp_path, signatures, SMALL, num_parts=5)
    expected = np.array(by_definition(signatures, SMALL), ROW_DTYPE)
    assert 50 < len(expected) < 400
    assert (found.rows() == expected).all() and found.num_removed == len(expected)
    assert np.flatnonzero(found.removed()).tolist() == expected["duplicate"].tolist()


def test_a_group_has_a_bounded_number_of_leaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MAX_ROUNDS", 2)
    signatures = draw_signatures(300, 6, seed=9)
    few = search(tmp_path / "few", signatures, SMALL)
    assert (few.rows() == np.array(by_definition(signatures, SMALL), ROW_DTYPE)).all()
    monkeypatch.undo()
    assert few.num_removed < search(tmp_path / "many", signatures, SMALL).num_removed


def test_memory_and_files_change_nothing(tmp_path: Path) -> None:
    """With the smallest memory, one group is larger than what may be sorted at once and is searched from its file."""
    signatures = np.random.default_rng(1).integers(0, 3000, (90_000, 6)).astype("<u2")
    signatures[::2] = 7
    signatures[1:20_000:2, :2] = 7  # In the group by one band, but unlike its leader.
    signatures[1:20_000:40, 2:4] = 7  # Like it by the threshold.
    one = search(tmp_path / "one", signatures, SMALL, memory=1 << 30)
    tracemalloc.start()
    other = search(tmp_path / "other", signatures, SMALL, num_parts=300, memory=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one.num_removed > 45_000
    for name in ("rows", "removed"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    assert sorted(path.name for path in other.folder.iterdir()) == ["removed", "rows"]
    # 4 MiB is the least that is taken; the entries of the bands alone are 4.3 MB, and a search in one piece takes 24.
    assert peak < 6 << 20


def test_a_text_that_is_copied_often_costs_a_comparison_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = 0
    gather = near._Signatures.gather

    def counted(self: near._Signatures, documents: np.ndarray) -> np.ndarray:
        nonlocal gathered
        gathered += len(documents)
        return gather(self, documents)

    monkeypatch.setattr(near._Signatures, "gather", counted)
    signatures = np.full((100_000, 6), 11, "<u2")
    found = search(tmp_path, signatures, SMALL)
    assert found.num_removed == 99_999 and not found.removed()[0]
    assert (found.rows()["leader"] == 0).all() and (found.rows()["similarity"] == 1).all()
    assert gathered <= 2 * SMALL.num_bands * 100_000


def test_what_a_killed_search_left_is_thrown_away(tmp_path: Path) -> None:
    signatures = draw_signatures(200, 6, seed=5)
    expected = (search(tmp_path, signatures, SMALL).folder / "rows").read_bytes()
    (tmp_path / "near.partial" / "keys").mkdir(parents=True)
    (tmp_path / "near.partial" / "keys" / "000000").write_bytes(bytes(160))
    again = search(tmp_path, signatures, SMALL)
    assert (again.folder / "rows").read_bytes() == expected
    assert not (tmp_path / "near.partial").exists()


def test_texts_without_words_are_near_to_nothing(tmp_path: Path) -> None:
    config = NearDuplicateConfig()
    texts = ["...", "a b c d e f", "!?", "", "A, b, c, d, e, f"]
    found = search(tmp_path, Signer(config).sign(texts), config)
    assert found.rows()[["duplicate", "leader"]].tolist() == [(4, 1)]


def test_no_documents_have_no_duplicates(tmp_path: Path) -> None:
    found = find([], tmp_path)
    assert (len(found.rows()), len(found.removed())) == (0, 0)


def test_signatures_that_were_cut_short_are_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, draw_signatures(10, 6, seed=1))
    parts[0].path.write_bytes(parts[0].path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"part-1-0 has 119 bytes, but its signatures need 120"):
        find(parts, tmp_path)
    parts[0].path.unlink()
    with pytest.raises(DataError, match="has 0 bytes"):
        find(parts, tmp_path)


def test_a_part_without_documents_needs_no_file(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, draw_signatures(100, 6, seed=2), num_parts=2)
    expected = find(parts, tmp_path).rows().tolist()
    empty = SignaturePart(tmp_path / "absent", 0)
    assert find([empty, parts[0], empty, parts[1]], tmp_path).rows().tolist() == expected


def test_how_similar_two_documents_have_to_be(tmp_path: Path) -> None:
    signatures = np.arange(24).reshape(2, 12).astype("<u2") + 1
    signatures[1, :9] = signatures[0, :9]  # Three quarters are the same.
    for threshold, count in ((0.7, 1), (0.8, 0)):
        config = NearDuplicateConfig(num_bands=3, rows_per_band=4, threshold=threshold)
        assert search(tmp_path / str(threshold), signatures, config).num_removed == count
