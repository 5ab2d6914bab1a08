"""How a command ends: its streams, and requests to stop."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from doors import ROOT, environment

from bigtx.utils.errors import (
    BigtxError,
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
)
from bigtx.utils.terminal import LONGEST_MESSAGE

WORK = """
import sys
from pathlib import Path
from bigtx.utils.errors import exit_cleanly

@exit_cleanly
def main():
    Path(sys.argv[1]).write_text("the work is done")
    print("done: Füße → é")
    print("warning: ü", file=sys.stderr)

sys.exit(main())
"""


def in_shell(redirection: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'exec "$@" {redirection}', "bash", sys.executable, *arguments]
    variables = environment(**{"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | changes)
    return subprocess.run(command, capture_output=True, text=True, encoding="latin-1", timeout=60, env=variables)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">&-", "it is closed"),
        (">&- 2>&-", ""),
        ("</dev/null >&- 2>&-", ""),
        ("2>&-", None),
        (">/dev/full", "No space left on device"),
    ],
)
def test_an_output_that_cannot_be_written_comes_after_the_work(
    tmp_path: Path, redirection: str, reason: str | None, unbuffered: str
) -> None:
    done = in_shell(redirection, "-c", WORK, str(tmp_path / "work"), PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == (0 if reason is None else 1), done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (tmp_path / "work").read_text() == "the work is done"
    if reason:
        assert done.stderr.count(f"standard output cannot be written: {reason}; what is missing there is lost") == 1


@pytest.mark.parametrize(
    ("last", "status"),
    [("return 1", 1), ("raise DataError('no')", 2), ("sys.exit(0)", 1), ("raise KeyboardInterrupt", 130)],
)
def test_a_lost_output_changes_no_other_status(tmp_path: Path, last: str, status: int) -> None:
    code = WORK.replace(
        '    print("warning', f'    from bigtx.utils.errors import DataError\n    {last}\n    print("warning'
    )
    done = in_shell(">/dev/full", "-c", code, str(tmp_path / "work"))
    assert done.returncode == status and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.stderr.count("standard output cannot be written: No space left on device") == 1


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-"])
def test_the_progress_of_a_run_may_go_nowhere(tmp_path: Path, redirection: str) -> None:
    """As that of a training whose terminal is gone: it is in the run folder's log."""
    code = WORK.replace("    print(", "    from bigtx.utils import log\n    log.say(", 1)
    done = in_shell(redirection, "-c", code, str(tmp_path / "work"))
    assert done.returncode == 0 and (tmp_path / "work").read_text() == "the work is done", done.stderr


def test_another_error_of_a_file_keeps_its_traceback(tmp_path: Path) -> None:
    code = WORK.replace('print("done: Füße → é")', "open('/dev/full', 'w').write('x' * 100_000)")
    done = in_shell("", "-c", code, str(tmp_path / "work"))
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_full_output_is_noticed_at_the_first_flush(tmp_path: Path) -> None:
    code = WORK.replace('print("done: Füße → é")', 'print("done", flush=True)')
    done = in_shell(">/dev/full", "-c", code, str(tmp_path / "work"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "cannot be written" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_is_not_utf8_gets_escapes(tmp_path: Path, encoding: str) -> None:
    done = in_shell("", "-c", WORK, str(tmp_path / "work"), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("done: Füße \\u2192 é\n" if encoding == "latin-1" else "done: F\\xfc\\xdfe \\u2192 \\xe9\n")


def test_a_file_does_not_get_the_number_of_a_closed_output(tmp_path: Path) -> None:
    code = WORK.replace("Path(sys.argv[1]).write_text", "import os; os.write(1, b'x'); Path(sys.argv[1]).write_text")
    done = in_shell(">&-", "-c", code, str(tmp_path / "work"))
    assert done.returncode == 1 and (tmp_path / "work").read_text() == "the work is done"


@pytest.mark.parametrize(
    "arguments",
    [["-m", "bigtx", "configs", "list"], ["-m", "bigtx.pretrain", "a.yaml"], ["-m", "bigtx.finetune", "a.yaml"]],
)
def test_ctrl_c_while_modules_are_imported(tmp_path: Path, arguments: list[str]) -> None:
    """Python sends itself the signal when the first module is imported that is slow to read."""
    hook = """
    import os, signal, sys

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name in ("difflib", "yaml"):
                os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.meta_path.insert(0, Finder())
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(hook))
    variables = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=variables)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


@pytest.mark.parametrize("kind", [BigtxError, ConfigError, DataError, CheckpointError, LaunchError])
def test_a_long_message_is_cut_in_the_middle(kind: type[BigtxError]) -> None:
    """It names the file at its start and says at its end what to do, whatever a damaged file made it quote."""
    exact = "x" * LONGEST_MESSAGE
    assert str(kind(exact)) == exact
    message = str(kind(f"a/manifest.json is damaged ({'y' * 100_000}); prepare it again"))
    assert len(message) == LONGEST_MESSAGE and "[... 100,047 characters, shortened ...]" in message
    assert message.startswith("a/manifest.json is damaged (yyy") and message.endswith("yyy); prepare it again")
    assert str(pickle.loads(pickle.dumps(kind(message)))) == message
