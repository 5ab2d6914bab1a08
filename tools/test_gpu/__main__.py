"""Check a GPU; see command.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # This folder, which is a package.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from test_gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
