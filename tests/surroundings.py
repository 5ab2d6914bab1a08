"""The environment and the signals of a process that starts many trainings: the tests and the fault drill."""

from __future__ import annotations

import os
import signal


def prepare_process() -> None:
    """Set variables and signals for this process and those that it starts. Call this before torch is imported."""
    # Several processes share few cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where this is set, each process would compile all of bigtx again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Nothing may reach a real W&B server, even if a user is logged in here; a test that needs a server starts one.
    os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"
    # In the background of a script SIGINT is ignored, under nohup SIGHUP, and started processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
