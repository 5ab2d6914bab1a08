"""`bigtx pretrain` in which one rank waits at a place: `waiting_rank.py PLACE RANK SECONDS KEY=VALUE ...`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "tests"]


def install(place: str, rank: str, seconds: float) -> None:
    """Make the rank wait.

    Args:
        place: as it reads rows after 40 calls (`data`), in the forward of step 3 (`forward`), in the first one (`first
            forward`), in each one (`each forward`), or for each batch of a validation (`validation`).
        rank: its number.
        seconds: how long.
    """
    from bigtx.data.stream import loader
    from bigtx.pretraining.objectives import LikelihoodTask

    read_rows, loss = loader.read_rows, LikelihoodTask.loss
    calls = {"rows": 0, "loss": 0}

    def slow_rows(*arguments: Any) -> Any:
        calls["rows"] += 1
        if place == "data" and calls["rows"] > 40 and os.environ["RANK"] == rank:
            time.sleep(seconds)
        return read_rows(*arguments)

    def slow_loss(self: LikelihoodTask, engine: Any, batch: Any) -> Any:
        calls["loss"] += engine.module.training
        number = calls["loss"] if engine.module.training else 0
        at = {"forward": number == 9, "first forward": number == 1, "each forward": number, "validation": not number}
        if at.get(place) and os.environ["RANK"] == rank:
            time.sleep(seconds)
        return loss(self, engine, batch)

    loader.read_rows = slow_rows  # type: ignore[assignment]
    LikelihoodTask.loss = slow_loss  # type: ignore


if __name__ == "__main__":
    from bigtx.pretrain import main

    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # DeepSpeed's launcher adds it.
    install(words[0], words[1], float(words[2]))
    sys.exit(main(words[3:]))
