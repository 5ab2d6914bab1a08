"""The table of messages in the guide shows messages that bigtx prints."""

from __future__ import annotations

import re

import pytest
from advice.messages import messages
from doors import ROOT

GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
TABLE = GUIDE.partition("## Trouble\n")[2].partition("\n## ")[0]
QUOTED = [text for row in re.findall(r"^\| (.*?) \|", TABLE, re.MULTILINE) for text in re.findall("`([^`]+)`", row)]
FILLED_IN = r"\.\.\.|\bHOST:PORT\b|\d+ \.rst"
OF_A_SHELL = "zsh: "


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_exist(quoted: str) -> None:
    texts = [text for _, text in messages()]
    for part in filter(None, map(str.strip, re.split(FILLED_IN, quoted))):
        assert part.startswith(OF_A_SHELL) or any(part in text for text in texts), part
