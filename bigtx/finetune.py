"""Fine-tune a run: `bigtx finetune CONFIG.yaml base=RUN [KEY=VALUE ...]`, or `deepspeed bigtx/finetune.py ...`.

config -> base and records -> engine -> loop -> results. The same command on the same `run_dir` resumes the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # As a script: Python has put this file's folder first, where `config` or `data` would hide other packages.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry or ".").resolve() != here]

from bigtx.utils.errors import exit_cleanly

EXAMPLE = "finetune/imdb.yaml base=runs/mine data.train=reviews run_dir=runs/sentiment"


@exit_cleanly
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    # These are imported here, where Ctrl-C ends the command without a traceback.
    from bigtx.config.schema import FinetuneConfig
    from bigtx.train.command import run_training

    return run_training(
        FinetuneConfig,
        sys.argv[1:] if argv is None else argv,
        check_inputs="bigtx.finetuning.checks:check_inputs",
        train="bigtx.finetuning.run:finetune",
        program="bigtx finetune",
        example=EXAMPLE,
    )


if __name__ == "__main__":
    sys.exit(main())
