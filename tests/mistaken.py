"""Gives mistaken commands in one process, in which no rank can be started.

    python mistaken.py CASES.json REPORT.json

CASES is a list of {"words", "folder", "environment"}; REPORT is as long, of {"status", "out", "err", "written",
"heavy"}: the files that it changed, and the modules that it imported though a mistake needs none of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

HEAVY = ("torch", "deepspeed", "transformers", "wandb", "pyarrow", "webdataset")


def no_fork() -> int:
    """In place of `os.fork`."""
    raise AssertionError("the ranks were started")


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all that is in a folder."""
    found = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def call(case: dict[str, Any], desk: Path) -> dict[str, Any]:
    """What one command does."""
    from bigtx.cli import main

    out, err, before = io.StringIO(), io.StringIO(), files(desk)
    known = set(sys.modules)
    os.chdir(desk / case["folder"])
    os.environ.update(case["environment"])
    status: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(case["words"])
        except BaseException:
            traceback.print_exc()
    for name in case["environment"]:
        del os.environ[name]
    after = files(desk)
    written = sorted(name for name in before | after if before.get(name) != after.get(name))
    heavy = sorted(set(HEAVY) & sys.modules.keys() - known)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "written": written, "heavy": heavy}


if __name__ == "__main__":
    given, report = Path(sys.argv[1]), Path(sys.argv[2])
    os.fork = no_fork
    here = Path.cwd()
    report.write_text(json.dumps([call(case, here) for case in json.loads(given.read_text())]))
