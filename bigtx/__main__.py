"""`python -m bigtx` and the installed command `bigtx`: `bigtx.cli`, imported where Ctrl-C is heard already."""

from __future__ import annotations

import sys


def main() -> int:
    """The command; returns its exit status."""
    try:
        from bigtx.cli import main as command

        return command()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
