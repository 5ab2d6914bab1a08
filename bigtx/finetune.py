"""Fine-tune a run: `bigtx-finetune CONFIG.yaml base=RUN [KEY=VALUE ...]`, or `deepspeed bigtx/finetune.py ...`.

config -> base and records -> engine -> loop -> results. The same command on the same `run_dir` goes on where it was.
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

EXAMPLE = "finetune/imdb.yaml base=runs/mine data.train=reviews run_dir=runs/sentiment"


@exit_cleanly
def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    # Here, where Ctrl-C ends the command without a traceback.
    from bigtx.config.load import parse_command_line
    from bigtx.config.schema import FinetuneConfig

    arguments = sys.argv[1:] if argv is None else argv
    parsed = parse_command_line(FinetuneConfig, arguments, program="bigtx-finetune", example=EXAMPLE)
    # Heavy imports wait until the config is known to be good.
    share_cores()
    from bigtx.engine.launch import launch_on_all_devices

    status = launch_on_all_devices("bigtx.finetune", arguments)
    if status is not None:
        return status
    from bigtx.train.finetuning import FinetuneSession

    with FinetuneSession(parsed.config, dry_run=parsed.dry_run, files=parsed.files) as session:
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
