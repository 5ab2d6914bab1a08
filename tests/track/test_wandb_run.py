"""The training's end of W&B, without W&B."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtx.track import follower
from bigtx.track.wandb_run import WandbRun, read_or_make_run_id


def test_a_copied_run_gets_an_id_of_its_own_and_a_moved_one_keeps_it(tmp_path: Path) -> None:
    first, moved, copy = tmp_path / "first", tmp_path / "moved", tmp_path / "copy"
    first.mkdir()
    own = read_or_make_run_id(first)
    assert own.original == "" and read_or_make_run_id(first) == own
    first.rename(moved)
    assert read_or_make_run_id(moved) == own
    (tmp_path / "link").symlink_to(moved)
    assert read_or_make_run_id(tmp_path / "link") == own
    shutil.copytree(moved, copy)
    copied = read_or_make_run_id(copy)
    assert copied.id != own.id and (copied.original, copied.original_folder) == (own.id, str(moved))
    assert read_or_make_run_id(copy).id == copied.id and read_or_make_run_id(copy).original == ""
    assert read_or_make_run_id(moved) == own


@pytest.mark.parametrize(
    ("path", "is_moved_in_its_file_system", "is_copy"),
    [("first", False, False), ("other", True, False), ("other", False, True)],
    ids=["restored to its path", "a shared file system under another path", "copied to another path"],
)
def test_a_run_that_goes_on_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, is_moved_in_its_file_system: bool, is_copy: bool
) -> None:
    """The original is on another machine, so that nobody can see whether it is still there."""
    first, away, here = tmp_path / "first", tmp_path / "away", tmp_path / path
    first.mkdir()
    own = read_or_make_run_id(first)
    first.rename(away)
    if is_moved_in_its_file_system:
        away.rename(here)
    else:
        shutil.copytree(away, here)  # While the original is there, so the new folder has another number.
        away.rename(tmp_path / "out of sight")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    found = read_or_make_run_id(here)
    assert (found.id != own.id) == is_copy and found.original == (own.id if is_copy else "")
    assert not is_copy or found.original_folder.endswith(f":{first}")
    assert read_or_make_run_id(here).id == found.id and read_or_make_run_id(here).original == ""


def test_a_place_of_an_earlier_bigtx_has_no_host(tmp_path: Path) -> None:
    (tmp_path / "wandb_run_id").write_text("abcdef\n")
    (tmp_path / "wandb_run_place").write_text("/nowhere/run\n")
    assert read_or_make_run_id(tmp_path).id == "abcdef"
    assert (tmp_path / "wandb_run_place").read_text().splitlines()[0] == str(tmp_path)


def test_an_error_at_the_end_is_said_once_in_a_line_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, json; sys.stdin.readline(); print(json.dumps({'error': 'CommError: no\\n  Traceback: x'}))"
    real = subprocess.Popen

    def fake(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", "import sys; sys.stdin.readline();" + code], **options)

    monkeypatch.setattr(subprocess, "Popen", fake)
    said, noted = [], []
    run = WandbRun(
        tmp_path, {"mode": "online"}, said.append, lambda kind, **facts: noted.append({"kind": kind, **facts})
    )
    run.close("finished")
    (line,) = said
    assert line.startswith("warning: W&B failed (CommError: no Traceback: x)") and "\n" not in line
    assert "wandb.log" in line and [event["kind"] for event in noted] == ["wandb_error"]
    json.dumps(noted)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_an_upload_is_waited_for_if_the_host_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Offline nothing is uploaded: a follower that is still writing is left in the background."""
    report = json.dumps({"mode": mode, "url": "https://wandb.ai/x", "why": "no key", "host": "wandb.ai"})
    last = {"online": "import time; time.sleep(0.5)", "offline": "sys.stdin.read()"}[mode]
    code = f"import sys; print({report!r}, flush=True); sys.stdin.readline(); sys.stdin.readline(); {last}"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", code], **options))
    monkeypatch.setattr("bigtx.track.wandb_run.WAIT_SECONDS", 0.0)
    monkeypatch.setattr("bigtx.track.wandb_run.UPLOAD_SECONDS", 60.0 if mode == "online" else 1.0)
    monkeypatch.setattr("bigtx.track.wandb_run.answers", lambda host, timeout: True)
    said: list[str] = []
    run = WandbRun(tmp_path, {"mode": mode}, said.append, lambda kind, **facts: None)
    while not run.mode:
        time.sleep(0.01)
        run.poll()
    run.close("finished")
    left = [text for text in said if "in the background" in text]
    assert left == ([] if mode == "online" else [f"W&B is still writing {tmp_path / 'wandb'}, in the background"])


@pytest.mark.parametrize("line", [{"status": "finished", "is_complete": True}, None], ids=["reported", "killed"])
def test_a_follower_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch, line: dict[str, Any] | None) -> None:
    """After the training has ended, its follower ends too, even if W&B never returns."""
    for name in ("FINISH_SECONDS", "ORPHAN_SECONDS"):
        monkeypatch.setattr(follower, name, 0.05)
    parent: Any = SimpleNamespace(read=lambda timeout: line, is_gone=True)
    if not (child := os.fork()):
        follower.Ending(parent).wait()
        time.sleep(30)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
