from __future__ import annotations

from pathlib import Path

import pytest
from doors import Mount


@pytest.fixture
def small_disk(tmp_path: Path, mount: Mount) -> Path:
    """A file system of 1 MiB, where this user may make one."""
    mount(tmp_path / "disk", "size=1m")
    return tmp_path / "disk"
