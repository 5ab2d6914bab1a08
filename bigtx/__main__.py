"""`python -m bigtx` and the installed command `bigtx`: they import `bigtx.cli` where Ctrl-C is already handled."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command; return its exit status."""
    try:
        from bigtx.cli import main as command

        return command()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
