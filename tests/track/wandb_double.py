"""A W&B server for tests: answers what wandb's client asks over HTTP, and keeps what it is given."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class StoredRun:
    """What the server holds of one run."""

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    resumes: int = 0


class WandbDouble:
    """The server, on a free loopback port while the `with` block lasts.

    Attributes:
        runs: by id.
        uploads: contents of uploaded files by name.
        artifacts: what was said of each artifact at its creation, by "name:alias".
        uses: (run id, "name:alias") of each use of an artifact.
        refuse: answer every question with "unauthorized".
        silent: swallow every request: accept, read, never answer.
        hush_file: be silent from when this file exists.
        deleted: ids of runs that were deleted, which W&B does not take again.
        most_steps: be silent as soon as a run has so many steps, if it is not None.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.uploads: dict[str, bytes] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.uses: list[tuple[str, str]] = []
        self.refuse = False
        self.silent = False
        self.hush_file: Path | None = None
        self.deleted: set[str] = set()
        self.most_steps: int | None = None
        self._stopping = threading.Event()
        double = self

        class Handler(_Handler):
            server_double = double

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WandbDouble:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_if_silent(self) -> None:
        while (self.silent or (self.hush_file and self.hush_file.exists())) and not self._stopping.wait(0.05):
            pass

    def stream(self, run_id: str, request: dict[str, Any]) -> None:
        """Take lines of a run's files: each chunk says at which line it begins."""
        run = self.runs[run_id]
        for name, chunk in request.get("files", {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if name.endswith((".jsonl", ".json")) else []
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] : chunk["offset"] + len(lines)] = lines
                self.silent = self.silent or (self.most_steps is not None and len(run.history) >= self.most_steps)
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if request.get("complete"):
            run.exit_codes.append(request.get("exitcode"))

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        known = getattr(self, f"_answer_{operation}", None)
        return known(variables) if known else {}

    def _answer_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "viewer": {
                "id": "u",
                "flags": "{}",
                "entity": "team",
                "username": "u",
                "email": "u@example.org",
                "admin": False,
                "teams": {"edges": [{"node": {"name": "team"}}]},
                "apiKeys": {"edges": []},
            }
        }

    def _answer_ServerInfo(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "serverInfo": {
                "features": [],
                "cliVersionInfo": {"max_cli_version": "99.0"},
                "latestLocalVersionInfo": None,
            }
        }

    _answer_ServerFeatures = _answer_ServerFeaturesQuery = _answer_ServerInfo

    def _answer_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": None}
        run.resumes += 1
        tail = [json.dumps(run.history[-1])] if run.history else []
        bucket = {
            "name": variables["name"],
            "summaryMetrics": json.dumps(run.summary),
            "displayName": variables["name"],
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "P", "name": "bigtx", "entity": {"id": "E", "name": "team"}, "bucket": bucket}}

    def _answer_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables.get("name") or variables["id"].removeprefix("S-")
        is_new = run_id not in self.runs
        run = self.runs.setdefault(run_id, StoredRun())
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        project = {"id": "P", "name": variables.get("project") or "bigtx", "entity": {"id": "E", "name": "team"}}
        bucket = {
            "id": f"S-{run_id}",
            "name": run_id,
            "displayName": run_id,
            "description": "",
            "config": "{}",
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _answer_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}

    def _answer_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        asked = variables["input"]
        for alias in asked["aliases"]:
            self.artifacts[f"{alias['artifactCollectionName']}:{alias['alias']}"] = asked
        sequence = {"id": "Q", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": "A", "state": "PENDING", "artifactSequence": sequence}}}

    def _manifest(self) -> dict[str, Any]:
        file = {
            "id": "F",
            "name": "m",
            "displayName": "wandb_manifest.json",
            "uploadHeaders": [],
            "uploadUrl": f"{self.url}/upload/manifest",
        }
        return {"artifactManifest": {"id": "M", "file": file}}

    def _answer_CreateArtifactManifest(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": self._manifest()}

    def _answer_UpdateArtifactManifest(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": self._manifest()}

    def _answer_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        asked = variables.get("input", variables)
        names = [file["name"] for file in asked.get("artifactFiles") or asked.get("files") or []]
        nodes = [
            {
                "id": "f",
                "name": name,
                "displayName": name,
                "uploadUrl": f"{self.url}/upload/artifact/{name}",
                "uploadHeaders": [],
                "storagePath": name,
                "uploadMultipartUrls": None,
                "artifact": {"id": "A"},
            }
            for name in names
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _answer_CommitArtifact(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": "A", "digest": "d"}}}

    def _answer_ArtifactMembershipByName(self, variables: dict[str, Any]) -> dict[str, Any]:
        asked = self.artifacts.get(variables["name"])
        if asked is None:
            return {"project": {"artifactCollectionMembership": None}}
        project = {"id": "P", "internalId": "P", "name": "bigtx", "entity": {"name": "team"}}
        collection = {"__typename": "ArtifactSequence", "name": asked["artifactCollectionName"], "project": project}
        artifact = {
            "__typename": "Artifact",
            "id": variables["name"],
            "artifactSequence": collection,
            "versionIndex": 0,
            "artifactType": {"name": asked["artifactTypeName"]},
            "description": None,
            "metadata": asked["metadata"],
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 1,
            "digest": asked["digest"],
            "commitHash": None,
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [],
        }
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "M",
            "versionIndex": 0,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [],
            "artifactCollection": collection,
            "artifact": artifact,
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def _answer_UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        asked = variables.get("input", variables)
        self.uses.append((asked["runName"], asked["artifactID"]))
        return {"useArtifact": {"artifact": {"id": asked["artifactID"]}}}

    def _answer_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_double: WandbDouble

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send({})

    def do_PUT(self) -> None:
        self.server_double.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._send({})

    def do_POST(self) -> None:
        body = self._body()
        double = self.server_double
        if self.path.endswith("/file_stream"):
            double.stream(self.path.split("/")[4], json.loads(body))
            self._send({})
        elif self.path == "/graphql":
            if double.refuse:
                self._send({"errors": [{"message": "unauthorized"}]}, 401)
                return
            request = json.loads(body)
            if double.deleted & {str(value) for value in (request.get("variables") or {}).values()}:
                message = "run was previously created and deleted; try a new run name"
                self._send({"errors": [{"message": message}]}, 409)
                return
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request.get("query", ""))
            self._send({"data": double.answer(operation[1] if operation else "", request.get("variables") or {})})
        else:
            self._send({})

    def _body(self) -> bytes:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _send(self, answer: dict[str, Any], status: int = 200) -> None:
        self.server_double.wait_if_silent()
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
