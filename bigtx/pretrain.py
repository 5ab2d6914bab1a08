"""Pretrain a model: `bigtx pretrain CONFIG.yaml [KEY=VALUE ...]`, `deepspeed bigtx/pretrain.py ...`, `python ...`.

config -> data -> engine -> loop. The same command on the same `run_dir` resumes the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # As a script: Python has put this file's folder first, where `config` or `data` would hide other packages.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry or ".").resolve() != here]

from bigtx.utils.errors import exit_cleanly

EXAMPLE = "pretrain/small.yaml data.sources.mine.path=corpus run_dir=runs/mine"


@exit_cleanly
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    # These are imported here, where Ctrl-C ends the command without a traceback.
    from bigtx.config.schema import PretrainConfig
    from bigtx.train.command import run_training

    return run_training(
        PretrainConfig,
        sys.argv[1:] if argv is None else argv,
        check_inputs="bigtx.pretraining.corpora:check_inputs",
        train="bigtx.pretraining.run:pretrain",
        program="bigtx pretrain",
        example=EXAMPLE,
    )


if __name__ == "__main__":
    sys.exit(main())
