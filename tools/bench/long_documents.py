"""Measure the memory of `bigtx data prepare` for one long document (used by data.py and by the tests).

python tools/bench/long_documents.py prepare ARGUMENTS     `bigtx data prepare`, and its peak memory as JSON
"""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BOUND = 2**30 / 120_000_000
"""Bytes of memory that a byte of a document may take, in addition to the text."""
MEMORY = 256_000_000 / 120_000_000
"""`memory` per byte of the document."""

_PIECE = 1 << 20
"""Random characters; a document consists of copies of them."""


def _prose(draw: random.Random) -> str:
    library = Path(sysconfig.get_path("stdlib"))
    return "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "socket"))


KINDS: dict[str, Callable[[random.Random], str]] = {
    "prose": _prose,
    "digits": lambda draw: "".join(draw.choices("0123456789", k=_PIECE)),
    "base64": lambda draw: base64.b64encode(draw.randbytes(_PIECE)).decode(),
    "chinese": lambda draw: "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(_PIECE // 3)),
}


def write_document(path: Path, kind: str, num_bytes: int) -> None:
    """Write JSON lines with one document of about `num_bytes` bytes of UTF-8."""
    piece = KINDS[kind](random.Random(1))
    text = piece * -(-num_bytes // len(piece.encode()))
    if kind != "chinese":
        text = text[:num_bytes]
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare(paths: list[Path], tokenizer: Path, output: Path, num_bytes: int) -> dict[str, Any]:
    """Prepare documents of `num_bytes` each in one process.

    Returns:
        `status` of the command, its `seconds`, its `peak` memory in bytes, the `share` of the bound that it takes in
        addition to the text, and what it `said` in an error.
    """
    short = output.with_name("short.jsonl")
    short.write_text(json.dumps({"text": "some words"}) + "\n", encoding="utf-8")
    memory = max(1 << 26, int(MEMORY * num_bytes))
    before = _prepare([short], tokenizer, output.with_name(f"{output.name}-short"), memory)["peak"]
    begin = time.monotonic()
    found = _prepare(paths, tokenizer, output, memory) | {"seconds": time.monotonic() - begin}
    return found | {"share": (found["peak"] - before - num_bytes) / (BOUND * num_bytes)}


def _prepare(paths: list[Path], tokenizer: Path, output: Path, memory: int) -> dict[str, Any]:
    arguments = [f"input.paths=[{','.join(map(str, paths))}]", f"tokenizer={tokenizer}", f"output={output}"]
    command = [sys.executable, __file__, "prepare", *arguments, "num_processes=1", f"memory={memory}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}


def measure(folder: Path, tokenizers: dict[str, Path], num_bytes: int) -> dict[str, dict[str, Any]]:
    """Prepare a document of each kind with each tokenizer; return what `prepare` does, by "tokenizer, kind"."""
    found, path = {}, folder / "long.jsonl"
    for kind in KINDS:
        write_document(path, kind, num_bytes)
        for name, tokenizer in tokenizers.items():
            found[f"{name}, {kind}"] = prepare([path], tokenizer, folder / f"{name}-{kind}", num_bytes)
    return found


def main() -> int:
    """Run the command in this process; the last line of the output has its status."""
    from bigtx.cli import main as bigtx

    status = bigtx(["data", *sys.argv[1:]])
    # ru_maxrss is not used, because it starts with the memory of the parent when it started this process.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"status": status, "peak": peak * 1024}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
