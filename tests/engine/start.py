"""Start the ranks of an engine test: `start.py RANKS OUT.json SCENARIO ARGUMENTS_AS_JSON`, as of worker.py."""

from __future__ import annotations

import sys
from pathlib import Path

from bigtx.launch.supervisor import start_ranks
from bigtx.launch.world import World


def main() -> int:
    """Return the status of the ranks, or be one of them."""
    num_ranks = int(sys.argv.pop(1))
    status = start_ranks(World(num_ranks), Path(sys.argv[1]).parent)
    if status is not None:
        return status
    import worker

    worker.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
