"""A command whose ranks do what its arguments say: `program.py FOLDER WORK_OF_RANK_0 WORK_OF_RANK_1 ...`.

NODE=K/N:PORT in the environment makes it one of N machines, which meet at PORT; the works are those of its ranks.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from bigtx.launch.supervisor import start_ranks
from bigtx.launch.world import World
from bigtx.utils import log
from bigtx.utils.errors import ConfigError, exit_cleanly

folder = Path(sys.argv[1])
works = sys.argv[2:]


def do(work: str) -> int:
    """Do one rank's work; returns its exit status."""
    name, _, argument = work.partition(":")
    match name:
        case "end":
            return int(argument)
        case "die":
            os.kill(os.getpid(), int(argument))
        case "raise":
            log.report(step=7)
            raise RuntimeError(argument)
        case "refuse":
            raise ConfigError(argument)
        case "lose":
            time.sleep(0.2)
            log.report(lost=True, error="lost the connection")
            return 2
        case "obey":
            asked: list[int] = []
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, lambda received, _: asked.append(received))
            (folder / f"ready-{os.environ['RANK']}").touch()
            while not asked:
                time.sleep(0.02)
            log.report(stopped=True)
            log.say(f"saved on {signal.Signals(asked[0]).name}")
            return 130 if asked[0] == signal.SIGINT else 75
        case "hang":
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            (folder / f"ready-{os.environ['RANK']}").touch()
            time.sleep(600)
        case "leave" | "daemon":
            left = subprocess.Popen(["sleep", "601"], start_new_session=name == "daemon")
            (folder / "left").write_text(str(left.pid))
            return int(argument)
    return 0


@exit_cleanly
def main() -> int:
    """Start the ranks; each does its work."""
    node, count, port = map(int, re.split("[/:]", os.environ.get("NODE", "0/1:0")))
    status = start_ranks(World(len(works), count, node, os.environ.get("ADDRESS", "127.0.0.1"), port), folder)
    if status is not None:
        return status
    log.setup(folder, int(os.environ["RANK"]))
    print("words for the log")
    return do(works[int(os.environ["LOCAL_RANK"])])


if __name__ == "__main__":
    sys.exit(main())
