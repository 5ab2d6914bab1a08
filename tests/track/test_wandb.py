"""W&B from real processes: offline runs read back, online ones against a server double, and all that can break."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from bigtx.config.schema import TrackConfig
from bigtx.track import Tracker
from bigtx.track.client import last_step, read_log
from bigtx.track.wandb_run import answers
from bigtx.utils.errors import LaunchError

HERE = Path(__file__).parent
KEY = "0123456789abcdefghijklmnopqrstuvwxyzKEY0"
# Only a guard against hanging for ever.
GUARD_SECONDS = 180

sys.path.insert(0, str(HERE))
from wandb_double import WandbDouble  # noqa: E402


def run_program(
    folder: Path, *, url: str = "", key: str = "", env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "HOME": str(folder.parent),
        "PYTHONPATH": str(HERE.parent.parent),
        "WANDB_BASE_URL": url or dead_url(),
    }
    environment |= {"WANDB_API_KEY": key} if key else {}
    command = [sys.executable, str(HERE / "program.py"), json.dumps({"folder": str(folder), **options})]
    result = subprocess.run(
        command, env={**environment, **(env or {})}, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False
    )
    assert result.returncode == (-9 if options.get("kill") else 0), result.stderr
    assert result.stderr == ""
    wait_for_follower(folder)
    return result


def wait_for_follower(folder: Path) -> None:
    """Return when the process that writes W&B's files has ended; it may outlive the training a little."""
    path = folder / "wandb" / ".lock"
    deadline = time.monotonic() + GUARD_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    # W&B's own process writes the end of its file after its client has gone.
    files = list(folder.glob("wandb/*run-*/*.wandb"))
    while time.monotonic() < deadline and any(holds(path) for path in files):
        time.sleep(0.05)


def holds(path: Path) -> bool:
    """Whether any process has the file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.readlink() == path:
                return True
        except OSError:
            continue
    return False


def dead_url() -> str:
    """A loopback address where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "events.jsonl") if event["kind"] == kind]


class Segment:
    """One local W&B log, read back."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.run_id = self.job_type = ""
        self.exit_codes: list[int] = []
        self.kinds: set[str] = set()
        for text in read_log(path):
            record = Record.FromString(text)
            kind = record.WhichOneof("record_type")
            self.kinds.add(kind)
            if kind == "run":
                self.run_id, self.job_type = record.run.run_id, record.run.job_type
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                row = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                self.history.append(row)
            elif kind == "summary":
                self.summary |= {item.key: json.loads(item.value_json) for item in record.summary.update}
            elif kind == "exit":
                self.exit_codes.append(record.exit.exit_code)

    def table(self, row: dict[str, Any], name: str = "samples") -> list[list[Any]]:
        path = self.folder / "files" / row[f"validation/{name}.path"]
        return json.loads(path.read_text(encoding="utf-8"))["data"]


def segments(folder: Path) -> list[Segment]:
    paths = folder.glob("wandb/*run-*/*.wandb")
    return [Segment(path) for path in sorted(paths, key=lambda path: path.parent.name.removeprefix("offline-"))]


def history(folder: Path) -> list[dict[str, Any]]:
    return [row for segment in segments(folder) for row in segment.history]


def steps(rows: list[dict[str, Any]]) -> list[int]:
    return [row["_step"] for row in rows]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_an_offline_run_reads_back(folder: Path) -> None:
    result = run_program(folder, last_step=12, wait_at=4)
    (segment,) = segments(folder)
    assert segment.config["model"] == {"hidden_size": 8}
    assert segment.config["environment"] == {"python": "3"}
    assert segment.run_id == (folder / "wandb_run_id").read_text().strip()
    assert segment.exit_codes == [0]
    lines = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13)) == steps(segment.history)
    for line, row in zip(lines, segment.history, strict=True):
        named = {name: value for name, value in line.items() if "/" in name}
        assert {name: row[name] for name in named} == named
        assert row["train/tokens"] == line["tokens"]
        assert row["_timestamp"] == pytest.approx(line["time"], abs=0.002)  # W&B keeps whole milliseconds.
    expected = [[10, 1000, "def ", "f(x):\n  é"], [10, 1000, "a", "10"]]
    assert segment.table(segment.history[9]) == expected
    started = next(event for event in read_jsonl(folder / "events.jsonl") if event["kind"] == "wandb")
    assert started["mode"] == "offline" and started["why"].startswith("no API key")
    assert "wandb:" not in result.stdout


def test_killed_and_resumed_offline(folder: Path) -> None:
    run_program(folder, last_step=12, wait_at=8, step_seconds=0.05, kill=True)
    run_program(folder, last_step=20, resumed_step=10, wait_at=16)
    first, second = segments(folder)
    assert first.run_id == second.run_id
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == list(range(1, 21))
    assert steps(history(folder)) == list(range(1, 21))
    assert [row["step"] for row in read_jsonl(folder / "samples.jsonl")] == [5, 5, 10, 10, 15, 15, 20, 20]
    (replayed,) = events(folder, "wandb_replayed_steps")
    assert (replayed["first"], replayed["last"]) == (11, 11)  # The killed run might have added to its last line.


def test_what_wandb_missed_comes_from_the_files(folder: Path) -> None:
    folder.mkdir()
    lines = [{"step": step, "tokens": step, "time": 1000.0 + step, "train/loss": "NaN"} for step in range(1, 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_program(folder, last_step=9, resumed_step=6)
    rows = history(folder)
    assert steps(rows) == list(range(1, 10))
    assert rows[0]["_timestamp"] == 1001.0
    assert math.isnan(float(rows[0]["train/loss"]))


def test_an_online_run_and_its_resume(folder: Path) -> None:
    with WandbDouble() as server:
        run_program(folder, url=server.url, key=KEY, last_step=12, kill=True, wait_at=10)
        result = run_program(folder, url=server.url, key=KEY, last_step=20, resumed_step=10, wait_at=16)
    run_id = (folder / "wandb_run_id").read_text().strip()
    assert list(server.runs) == [run_id]
    run = server.runs[run_id]
    assert run.resumes == 1
    assert steps(run.history) == list(range(1, 21))
    assert run.config["model"]["value"] == {"hidden_size": 8}
    assert run.summary["train/loss"] == {"min": 0.05, "last": 0.05}
    assert run.summary["events/resume"] == 1
    assert run.exit_codes == [1, 0]
    tables = [name for name in server.uploads if "media/table" in name]
    assert {name.rpartition("samples_")[2].partition("_")[0] for name in tables} == {"5", "10", "15", "20"}
    assert f"W&B: {server.url}/team/bigtx/runs/{run_id}" in result.stdout


def a_checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "base" / "checkpoints" / "step-00000010"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    return path


def test_a_run_and_its_base_offline(folder: Path, tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path)
    base = {"checkpoint": "/else/step-00000004", "manifest_sha256": "abc", "step": 4, "wandb_run_id": "the-base"}
    facts = {"job_type": "finetune", "base": base, "predict": True, "model": str(checkpoint)}
    run_program(folder, last_step=5, wait_at=4, **facts)
    (segment,) = segments(folder)
    assert segment.job_type == "finetune"
    assert segment.config["base_run"] == base
    assert {key: segment.summary[f"base/{key}"] for key in base} == base
    assert segment.summary["model/checkpoint"] == str(checkpoint) and "artifact" in segment.kinds
    (link,) = events(folder, "wandb_base")
    assert (link["artifact"], link["why_not"]) == ("", "W&B is offline")
    row = [5, 500, "a.jsonl, line 1", "A text.", "woe", "joy", '{"joy": 0.75, "woe": 0.25}']
    assert segment.table(segment.history[4], "predictions") == [row]


def test_the_lineage_of_a_run_online(folder: Path, tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path)
    with WandbDouble() as server:
        run_program(tmp_path / "first", url=server.url, key=KEY, last_step=10, wait_at=4, model=str(checkpoint))
        first = (tmp_path / "first" / "wandb_run_id").read_text().strip()
        base = {"checkpoint": str(checkpoint), "manifest_sha256": "abc", "step": 10, "wandb_run_id": first}
        run_program(folder, url=server.url, key=KEY, last_step=5, wait_at=4, base=base, predict=True)
        lost = tmp_path / "lost"
        run_program(lost, url=server.url, key=KEY, last_step=5, wait_at=4, base={**base, "step": 7})
    run_id = (folder / "wandb_run_id").read_text().strip()
    name = f"model-{first}:step-00000010"
    assert server.uses == [(run_id, name)]
    assert json.loads(server.artifacts[name]["metadata"])["checkpoint"] == str(checkpoint)
    assert server.artifacts[name]["artifactTypeName"] == "model"
    assert server.uploads["artifact/manifest.json"] == b"{}"
    assert [event["artifact"] for event in events(folder, "wandb_base")] == [f"team/bigtx/{name}"]
    assert server.runs[run_id].summary["base/wandb_run_id"] == first
    assert [name for name in server.uploads if "media/table/validation/predictions_5_" in name]
    (link,) = events(lost, "wandb_base")
    assert link["artifact"] == "" and "step-00000007" in link["why_not"], "a base that is not there stops nothing"
    assert len(read_jsonl(lost / "metrics.jsonl")) == 5


def test_offline_first_then_online(folder: Path) -> None:
    run_program(folder, last_step=10)
    with WandbDouble() as server:
        run_program(folder, url=server.url, key=KEY, last_step=15, resumed_step=10)
    assert steps(server.runs[(folder / "wandb_run_id").read_text().strip()].history) == list(range(1, 16))


def test_a_stopped_run_is_not_finished(folder: Path) -> None:
    run_program(folder, last_step=3, status="stopped")
    (segment,) = segments(folder)
    assert segment.exit_codes == [1]
    assert "preempting" in segment.kinds


@pytest.mark.parametrize("trouble", ["dead port", "silent", "refuses"])
def test_a_server_that_does_not_serve(folder: Path, trouble: str) -> None:
    with WandbDouble() as server:
        server.silent = trouble == "silent"
        server.refuse = trouble == "refuses"
        url = "" if trouble == "dead port" else server.url
        result = run_program(folder, url=url, key=KEY, wandb="online", last_step=6, wait_at=6)
    assert "warning: W&B offline" in result.stdout
    assert events(folder, "wandb")[0]["mode"] == "offline"
    assert steps(history(folder))[-6:] == list(range(1, 7))


def test_a_server_that_falls_silent(folder: Path, tmp_path: Path) -> None:
    hush = tmp_path / "hush"
    with WandbDouble() as server:
        server.hush_file = hush
        result = run_program(folder, url=server.url, key=KEY, last_step=8, wait_at=4, hush_at=6, hush_file=str(hush))
    assert steps(history(folder)) == list(range(1, 9))
    # The bound that is promised, with room for a loaded machine.
    assert float(result.stdout.split("CLOSED online ")[1]) < 25


def test_a_moved_folder_is_not_made_again_at_its_old_place(folder: Path) -> None:
    folder.mkdir()
    facts: dict[str, Any] = {"run_config": {}, "environment": {}, "rank": 0, "total_steps": 9, "better": {}}
    tracker = Tracker(folder, TrackConfig(wandb="offline"), **facts)
    for step in (1, 2, 3):
        tracker.log(step, step, {"train/loss": 1.0})
        tracker.samples(step, step, [{"prompt": "a", "completion": "b"}])
    deadline = time.monotonic() + GUARD_SECONDS
    assert tracker._wandb
    while not tracker._wandb.mode and time.monotonic() < deadline:
        time.sleep(0.05)
        tracker.progress(3, 3, {})
    moved = folder.rename(folder.parent / "moved")
    with pytest.raises(LaunchError, match=f"was moved to {moved}"):
        tracker.log(4, 4, {"train/loss": 1.0})
    tracker.close("failed")
    wait_for_follower(moved)
    assert not folder.exists() and [line["step"] for line in read_jsonl(moved / "metrics.jsonl")] == [1, 2, 3]
    shutil.rmtree(moved)
    tracker = Tracker(folder.parent, TrackConfig(wandb="off"), **facts)
    tracker.check_folder()
    shutil.rmtree(folder.parent)
    with pytest.raises(LaunchError, match="was deleted"):
        tracker.check_folder()
    tracker.close("failed")


def test_wandb_killed(folder: Path) -> None:
    run_program(folder, last_step=20, wait_at=4, kill_core_at=8, step_seconds=0.3)
    assert steps(history(folder)) == list(range(1, 21))
    assert len(events(folder, "wandb_error")) == 1
    assert len({segment.run_id for segment in segments(folder)}) == 1


@pytest.mark.slow
def test_wandb_stuck(folder: Path) -> None:
    result = run_program(folder, last_step=10, wait_at=4, stop_core_at=6)
    assert len(read_jsonl(folder / "metrics.jsonl")) == 10
    assert float(result.stdout.split("CLOSED ")[1].split()[1]) < 25


def test_a_full_disk_stops_nothing(small_disk: Path) -> None:
    folder = small_disk / "run"
    result = run_program(folder, last_step=40, wait_at=10, fill_at=20, step_seconds=0.05)
    assert "step 40/40" in result.stdout
    assert result.stdout.count("warning: cannot write") == 1
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")][:19] == list(range(1, 20))


def test_wandb_cannot_start(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise RuntimeError('broken on purpose')")
    result = run_program(folder, last_step=60, step_seconds=0.1, env={"PYTHONPATH": f"{tmp_path}:{HERE.parent.parent}"})
    assert result.stdout.count("warning: W&B is turned off") == 1
    assert "broken on purpose" in events(folder, "wandb_off")[0]["error"]
    assert len(read_jsonl(folder / "metrics.jsonl")) == 60


def test_no_secret_in_any_file(folder: Path) -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "the-aws-secret-value",
        "SLURM_JOB_TOKEN": "the-slurm-token-value",
        "HF_TOKEN": "hf_" + "x" * 30,
    }
    config = {
        "note": "uses the-aws-secret-value here",
        "api_key": "the-config-key",
        "argv": ["--password", "hunter2-hunter2"],
    }
    with WandbDouble() as server:
        run_program(folder, url=server.url, key=KEY, last_step=6, config=config, env=secrets)
        run_program(folder, url=server.url, key=KEY, last_step=9, config=config, env=secrets, resumed_step=5)
        sent = json.dumps([vars(run) for run in server.runs.values()]).encode() + b"".join(server.uploads.values())
    texts = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {Path("sent"): sent}
    for secret in [*secrets.values(), KEY, "the-config-key", "hunter2-hunter2"]:
        assert [path for path, text in texts.items() if secret.encode() in text] == []


def test_a_torn_log_ends_where_it_was_torn(folder: Path) -> None:
    run_program(folder, last_step=300)
    (path,) = folder.glob("wandb/*run-*/*.wandb")
    whole = list(read_log(path))
    assert last_step(folder, path.stem.removeprefix("run-")) == 300
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    torn = list(read_log(path))
    assert 0 < len(torn) < len(whole)
    assert torn == whole[: len(torn)]


def log_of(records: list[bytes]) -> bytes:
    """A log of W&B: blocks of 32,768 bytes, with a header before the file and one before each part of a record."""
    log = b":W&B" + bytes(3)
    for record in records:
        rest, is_first = record, True
        while is_first or rest:
            room = 32768 - len(log) % 32768 - 7
            if room < 0:
                log += bytes(room + 7)
                continue
            part, rest = rest[:room], rest[room:]
            kind = (1 if is_first else 4) if not rest else (2 if is_first else 3)
            log += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            is_first = False
    return log


def test_a_log_has_records_in_several_blocks(tmp_path: Path) -> None:
    records = [b"first", bytes(range(256)) * 400, b"x" * 32768, b"", b"last"]
    (tmp_path / "run-a.wandb").write_bytes(log_of(records))
    assert list(read_log(tmp_path / "run-a.wandb")) == records


def test_a_run_without_a_log_has_no_step(tmp_path: Path) -> None:
    assert last_step(tmp_path, "a") == -1


def test_asking_whether_a_host_answers() -> None:
    with WandbDouble() as server:
        assert answers(server.url, timeout=30)
        assert answers(server.url, timeout=30, proxies={"http": dead_url()})  # A server on this machine needs no proxy.
        server.silent = True
        assert not answers(server.url, timeout=0.2)
    assert not answers(dead_url(), timeout=0.2)
    assert not answers("http://", timeout=0.2)


def test_a_silent_name_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over, waited = threading.Event(), threading.Event()

    def silent(*_: Any, **__: Any) -> Any:
        over.wait(GUARD_SECONDS)
        waited.set()
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    assert not answers("http://api.example.org", timeout=0.2)
    assert not waited.is_set()
    over.set()
