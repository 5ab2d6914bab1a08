"""`python -m bigtx` is the `bigtx` command."""

from __future__ import annotations

import sys

from bigtx.cli import main

sys.exit(main())
