"""Train in this process; write the files of bigtx whose functions run in the third step, and all of its modules.

python tests/traced_step.py OUTPUT KEY=VALUE...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from bigtx.config.load import load
from bigtx.config.schema import PretrainConfig
from bigtx.train.context import RunContext

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Train by a pretraining's settings and write the files and modules as JSON."""
    files: set[str] = set()
    modules: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT / "bigtx"):
            files.add(path.relative_to(ROOT / "bigtx").as_posix())

    with RunContext(load(PretrainConfig, sys.argv[2:])) as context:
        from bigtx.pretraining.run import pretrain
        from bigtx.train import loop

        train_step = loop.train_step

        def traced(run: Any, *arguments: Any) -> Any:
            if run.state.step != 2:
                return train_step(run, *arguments)
            modules.extend(sorted(name for name in sys.modules if name.split(".")[0] == "bigtx"))
            sys.setprofile(note)
            try:
                return train_step(run, *arguments)
            finally:
                sys.setprofile(None)

        loop.train_step = traced
        pretrain(context)
    Path(sys.argv[1]).write_text(json.dumps({"files": sorted(files), "modules": modules}))


if __name__ == "__main__":
    main()
