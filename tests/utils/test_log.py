from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtx.utils import log

ROOT = Path(__file__).resolve().parents[2]

START = """
import logging, os, sys, threading, warnings
from bigtx.utils import log
early = logging.getLogger("DeepSpeed")
early.propagate = False
early.addHandler(logging.StreamHandler(sys.stdout))
log.setup(sys.argv[1], int(os.environ.get("RANK", "0")))
"""


def run(tmp_path: Path, code: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", START + code, str(tmp_path)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (path,) = (tmp_path / "logs").iterdir()
    return done, path.read_text()


CHATTER = """
print("from print")
print("from stderr", file=sys.stderr)
os.write(1, b"from C\\n")
os.system("echo from a child; echo from its stderr >&2")
logging.getLogger("DeepSpeed").warning("from deepspeed")
logging.getLogger("torch.distributed").info("from torch")
warnings.warn("from warnings")
log.say("for the user")
"""


def test_chatter_goes_to_the_log_and_our_words_to_both(tmp_path: Path) -> None:
    done, logged = run(tmp_path, CHATTER)
    assert (done.returncode, done.stdout, done.stderr) == (0, "for the user\n", "")
    for words in ("print", "stderr", "C", "a child", "its stderr", "deepspeed", "torch", "warnings"):
        assert logged.count(f"from {words}\n") == 1, logged
    assert "for the user\n" in logged


def test_other_ranks_say_nothing_and_log_everything(tmp_path: Path) -> None:
    done, logged = run(tmp_path, CHATTER + "log.say_error('the end')", RANK="3", WORLD_SIZE="4")
    assert (done.stdout, done.stderr) == ("", "")
    assert "for the user\n" in logged and "the end\n" in logged
    assert (tmp_path / "logs" / "rank-00003.log").is_file()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_crash_reaches_the_screen_and_the_log_from_any_rank(tmp_path: Path, rank: str) -> None:
    done, logged = run(tmp_path, "raise ValueError('a defect')", RANK=rank, WORLD_SIZE="2")
    assert done.returncode == 1
    for text in (done.stderr, logged):
        assert f"rank {rank}: Traceback" in text and text.endswith("ValueError: a defect\n")


def test_a_crash_in_a_thread_reaches_both(tmp_path: Path) -> None:
    code = "thread = threading.Thread(target=lambda: 1 / 0, name='reader'); thread.start(); thread.join()"
    done, logged = run(tmp_path, code)
    for text in (done.stderr, logged):
        assert "thread reader" in text and "ZeroDivisionError" in text


def test_a_crash_in_c_shows_where_on_the_screen(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "os.abort()")
    assert done.returncode == -6
    assert "Fatal Python error: Aborted" in done.stderr


SPILLED = """
print("printed", os.environ["A_TOKEN"])
logging.getLogger("torch").info("logged %s", os.environ["A_TOKEN"])
warnings.warn("https://me:hunter2@host/x?X-Amz-Signature=abc123")
thread = threading.Thread(target=lambda: open(os.environ["A_TOKEN"]), name="reader")
thread.start()
thread.join()
log.say_error("refused: " + os.environ["A_TOKEN"])
raise RuntimeError("password=correct-horse " + os.environ["A_TOKEN"])
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_no_secret_reaches_the_screen_or_the_log(tmp_path: Path, rank: str) -> None:
    """Printed, logged, warned about, in a thread's traceback, in an error, in the traceback at the end."""
    done, logged = run(tmp_path, SPILLED, RANK=rank, WORLD_SIZE="2", A_TOKEN="battery-staple")
    for words in ("printed <hidden>", "logged <hidden>", "'<hidden>'", "refused: <hidden>", "password=<hidden>"):
        assert words in logged, logged
    for text in (done.stdout, done.stderr, logged):
        assert not any(secret in text for secret in ("battery-staple", "hunter2", "abc123", "correct-horse"))


def test_what_a_supervisor_shows_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "battery-staple")
    received, sent = os.pipe()
    monkeypatch.setattr(log, "_supervisor", sent)
    log.report(error="cannot open battery-staple", step=3)
    assert json.loads(os.read(received, 1000)) == {"error": "cannot open <hidden>", "step": 3}


def test_a_long_error_fits_into_the_pipe_that_nobody_reads_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    received, sent = os.pipe()
    monkeypatch.setattr(log, "_supervisor", sent)
    os.set_blocking(sent, False)  # A write that does not fit would be lost here, and would hang a rank.
    assert log.report(error="begin " + "\u2620" * 300_000 + " end")
    said = json.loads(os.read(received, 1_000_000))["error"]
    assert said.startswith("begin ") and said.endswith(" end") and "300,010 characters, shortened" in said


def test_a_user_error_reaches_the_screen_once(tmp_path: Path) -> None:
    code = """
from bigtx.utils.errors import DataError, exit_cleanly
@exit_cleanly
def main():
    raise DataError("the shard is gone")
sys.exit(main())
"""
    done, logged = run(tmp_path, code)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "DataError: the shard is gone\n")
    assert "DataError: the shard is gone\n" in logged


def test_a_screen_or_disk_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    code = """
full = os.open("/dev/full", os.O_WRONLY)
os.dup2(full, log.console().fileno())
log.say("nobody hears")
os.dup2(full, sys.stdout.fileno())
print("nor this")
logging.getLogger("x").warning("nor this")
os._exit(7)
"""
    done, _ = run(tmp_path, code)
    assert (done.returncode, done.stderr) == (7, "")


def test_restore_gives_the_screen_back(tmp_path: Path) -> None:
    done, logged = run(tmp_path, "log.restore(); print('back'); os.system('echo and its children'); log.say('too')")
    assert sorted(done.stdout.splitlines()) == ["and its children", "back", "too"]
    assert logged == ""


def test_the_log_is_appended_to(tmp_path: Path) -> None:
    run(tmp_path, "print('first')")
    _, logged = run(tmp_path, "print('second')")
    assert logged == "first\nsecond\n"
