"""tools/audit.py: what pip-audit's answers mean. `make audit` itself needs a network."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from doors import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import audit

FAULT = {"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2.1"]}
GOOD = {"name": "good", "version": "1.0", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ([GOOD, SKIPPED], 0, "1 packages searched, 0 vulnerabilities known\nnot in the lists: torch"),
        ([{"name": "bad", "version": "2.0", "vulns": [FAULT]}], 1, "bad 2.0: PYSEC-1, CVE-2026-1; repaired in 2.1"),
        ([SKIPPED, SKIPPED], 2, "The audit was not done"),
        (None, 2, "is there a network? ConnectionError: no route"),
    ],
)
def test_answers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: list[dict[str, object]] | None,
    status: int,
    words: str,
) -> None:
    out = "" if answer is None else json.dumps({"dependencies": answer})
    done = subprocess.CompletedProcess([], 1, out, "Traceback\nConnectionError: no route\n")
    monkeypatch.setattr(subprocess, "run", lambda *rest, **options: done)
    assert audit.main() == status
    shown = capsys.readouterr()
    assert words in shown.out + shown.err
