"""Starting a command on all devices of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import torch

from bigtx.utils.processes import STOP_SIGNALS


def launch_on_all_devices(module: str, arguments: Sequence[str]) -> int | None:
    """Start the DeepSpeed launcher for a module where this machine has several accelerators and nobody has done so.

    Returns:
        The launcher's exit status, or None: this process is to do the work itself.
    """
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        return None
    if torch.cuda.device_count() < 2:
        return None
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--module", module, *arguments]
    launcher = subprocess.Popen(command)
    # A terminal sends Ctrl-C to all; other requests to stop are handed on. The launcher says how it ended.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, frame: _hand_on(launcher, received))
    return launcher.wait()


def _hand_on(launcher: subprocess.Popen[bytes], number: int) -> None:
    if number != signal.SIGINT:
        launcher.send_signal(number)
