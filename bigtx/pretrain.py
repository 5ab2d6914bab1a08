"""Pretrain a model: `deepspeed bigtx/pretrain.py CONFIG.yaml [KEY=VALUE ...]`, or `python bigtx/pretrain.py ...`.

config -> data -> engine -> loop. The same command on the same `run_dir` goes on where the run was.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script: Python put this file's folder first, where `config` or `data` would hide other packages.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry or ".").resolve() != here]

from bigtx.utils.errors import exit_cleanly
from bigtx.utils.processes import share_cores


@exit_cleanly
def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    # Here, where Ctrl-C ends the command without a traceback.
    from bigtx.config.load import parse_command_line
    from bigtx.config.schema import PretrainConfig

    parsed = parse_command_line(PretrainConfig, sys.argv[1:] if argv is None else argv, program="bigtx/pretrain.py")
    # Heavy imports wait until the config is known to be good.
    share_cores()
    from bigtx.train.pretraining import PretrainSession

    with PretrainSession(parsed.config, dry_run=parsed.dry_run, files=parsed.files) as session:
        session.join_ranks()
        session.open_data()
        session.open_folder()
        if session.is_finished():
            return 0
        session.build_engine()
        session.load_weights()
        return session.train()


if __name__ == "__main__":
    sys.exit(main())
