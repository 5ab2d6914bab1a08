"""What `bigtx pretrain` and `bigtx finetune` have in common.

config, checked ─▶ this process is a rank (of deepspeed, torchrun, srun): it trains
                └▶ else it looks at the run folder and at what the run reads, starts a rank for each GPU, and watches
                   over them (see `bigtx.launch`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bigtx.config.batches import batch_problems
from bigtx.config.load import Parsed, parse_command_line, raise_problems, to_dict
from bigtx.config.schema import RunConfig
from bigtx.launch.parents import watch_launchers
from bigtx.launch.supervisor import start_ranks
from bigtx.launch.world import World, find_world
from bigtx.train.run_folder import check_settings
from bigtx.train.session import Session, check_folder
from bigtx.utils import processes
from bigtx.utils.errors import LaunchError, say_from_any_rank

Config = TypeVar("Config", bound=RunConfig)


def run_training(
    schema: type[Config],
    session: Callable[[], type[Session[Config]]],
    argv: Sequence[str],
    *,
    program: str,
    example: str,
) -> int:
    """Train by a command line, in all ranks that it asks for.

    Args:
        schema: of the config.
        session: gives the kind of training; called once the config is known to be good.
        argv: without the program's name.
        program, example: for the help.

    Returns:
        The exit status.

    Raises:
        BigtxError: of the config, the run folder, what the run reads, or the training itself.
    """
    parsed = parse_command_line(schema, argv, program=program, example=example)
    world, kind = _find_world(parsed), session()
    if world is None:
        watch_launchers()
    else:
        raise_problems(list(batch_problems(parsed.config.train, world.size)))
        if not parsed.dry_run:
            check_folder(parsed.config, parsed.files)
            check_settings(parsed.config)
        kind.check_inputs(parsed.config, world.size)
        status = start_ranks(world, Path(parsed.config.run_dir), to_dict(parsed.config))
        if status is not None:
            return status
    processes.share_cores()
    with kind(parsed.config, dry_run=parsed.dry_run, files=parsed.files) as life:
        return life.run()


def _find_world(parsed: Parsed[Config]) -> World | None:
    """As `find_world`; of half an environment of a launcher every process complains, for none knows its rank."""
    try:
        return find_world(parsed.num_ranks, divides=parsed.config.train.global_batch_size)
    except LaunchError as error:
        say_from_any_rank(error)
        raise
