"""TF-IDF with logistic regression on the labelled reviews, for tools/bench/imdb.py; prints one line of JSON.

python imdb_peers.py FOLDER     a folder with pos/ and neg/; the split is that of data.split=tail with a tenth each
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

FRACTION = 0.1
STRENGTHS = (1.0, 4.0, 16.0)
"""Inverse regularisation, chosen on the validation reviews."""


def natural(path: Path) -> list[Any]:
    """Return a sort key in which numbers in names count as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def split(folder: Path) -> dict[str, tuple[list[str], list[int]]]:
    """Read texts and classes of each split."""
    parts: dict[str, tuple[list[str], list[int]]] = {name: ([], []) for name in ("train", "validation", "test")}
    for number, name in enumerate(("neg", "pos")):
        files = sorted((folder / name).glob("*.txt"), key=natural)
        num_test = int(len(files) * FRACTION)
        num_validation = int((len(files) - num_test) * FRACTION)
        first = len(files) - num_test - num_validation
        of_split = {
            "train": files[:first],
            "validation": files[first : first + num_validation],
            "test": files[first + num_validation :],
        }
        for kind, own in of_split.items():
            parts[kind][0].extend(path.read_text(encoding="utf-8") for path in own)
            parts[kind][1].extend([number] * len(own))
    return parts


def main() -> None:
    """Measure with words, then with words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    parts = split(Path(sys.argv[1]))
    found = {}
    for name, longest in (("words", 1), ("words and bigrams", 2)):
        begin = time.monotonic()
        vectorizer = TfidfVectorizer(ngram_range=(1, longest), min_df=longest)
        train = vectorizer.fit_transform(parts["train"][0])
        validation = vectorizer.transform(parts["validation"][0])
        models = [LogisticRegression(C=strength, max_iter=500).fit(train, parts["train"][1]) for strength in STRENGTHS]
        best = max(models, key=lambda model: model.score(validation, parts["validation"][1]))
        found[name] = {
            "validation": best.score(validation, parts["validation"][1]),
            "test": best.score(vectorizer.transform(parts["test"][0]), parts["test"][1]),
            "seconds": time.monotonic() - begin,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
