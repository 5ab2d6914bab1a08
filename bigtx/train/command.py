"""What `bigtx pretrain` and `bigtx finetune` have in common.

config, checked ─▶ this process is a rank (of deepspeed, torchrun, srun): it trains
                └▶ else it checks the run folder and the run's inputs, starts a rank for each GPU, and supervises the
                   ranks (see `bigtx.launch`)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigtx.config.load import Parsed, parse_command_line, to_dict
from bigtx.config.nodes import raise_problems
from bigtx.launch.supervisor import start_ranks
from bigtx.launch.world import World, find_world, watch_launchers
from bigtx.train.context import Config, RunContext
from bigtx.train.run_folder import check_folder, check_settings
from bigtx.utils import imported, processes
from bigtx.utils.errors import LaunchError, say_from_any_rank


def run_training(
    schema: type[Config],
    argv: Sequence[str],
    *,
    check_inputs: str,
    train: str,
    program: str,
    example: str,
) -> int:
    """Run the training of a command line, in all its ranks.

    Args:
        schema: the class of the config.
        argv: the arguments without the program's name.
        check_inputs: the name of the function that checks the run's inputs, given the config and the number of ranks.
            It is imported once the config is valid, and does not import torch.
        train: the name of the function that trains in a `RunContext` and returns the exit status. It is imported, with
            torch, in each rank once requests to stop are handled.
        program, example: texts for the help.

    Returns:
        The exit status.

    Raises:
        BigtxError: the config, the run folder, the inputs or the training fail.
    """
    parsed = parse_command_line(schema, argv, program=program, example=example)
    world = _find_world(parsed)
    if world is None:
        watch_launchers()
    else:
        raise_problems(parsed.config.train.division_problems(world.size))
        if not parsed.dry_run:
            check_folder(parsed.config, parsed.files)
            check_settings(parsed.config)
        imported(check_inputs)(parsed.config, world.size)
        status = start_ranks(world, Path(parsed.config.run_dir), to_dict(parsed.config))
        if status is not None:
            return status
    processes.share_cores()
    processes.extend_segments()
    with RunContext(parsed.config, dry_run=parsed.dry_run, files=parsed.files) as context:
        exit_status: int = imported(train)(context)
        return exit_status


def _find_world(parsed: Parsed[Config]) -> World | None:
    """Return the result of `find_world`. If a launcher set only some of its variables, every process reports it,
    because none knows its rank."""
    try:
        return find_world(parsed.num_ranks, divides=parsed.config.train.global_batch_size)
    except LaunchError as error:
        say_from_any_rank(error)
        raise
