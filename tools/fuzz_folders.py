"""The readers that tools/fuzz_readers.py tries with changed bytes, and an example of what each reads.

The examples are made by bigtx itself: a tokenizer, a corpus, a run with a checkpoint, and an export of it.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import zstandard
from fuzz_bytes import Files, Reader

from bigtx.commands.data import prepare_command
from bigtx.commands.generate import _read_prompts
from bigtx.commands.tokenizer import train_command
from bigtx.commands.wandb import plan
from bigtx.config.load import load, resolved_files, to_dict, to_yaml, yaml_of
from bigtx.config.runs import read_values, with_absolute_paths, with_moved_paths
from bigtx.config.schema import FinetuneConfig, ForeignConfig, InputConfig, PretrainConfig
from bigtx.config.schema.model import ModelConfig
from bigtx.data import recordings
from bigtx.data.corpus import inspect
from bigtx.data.corpus.manifest import MANIFEST_NAME, Manifest
from bigtx.data.corpus.verify import verify
from bigtx.data.raw.documents import Rejects
from bigtx.data.raw.read import read_documents
from bigtx.data.records.read import read_records
from bigtx.data.records.record import Broken
from bigtx.data.storage.places import as_place
from bigtx.data.stream.foreign import read_texts
from bigtx.engine.checkpoint import load_weights
from bigtx.engine.retention import choose
from bigtx.engine.trained import find_with_tokenizer, read_model
from bigtx.engine.write_weights import save_weights
from bigtx.finetuning.records import Row, read_table, write_table
from bigtx.interop.exporter import ExportSettings, export_model
from bigtx.interop.importer import import_model
from bigtx.launch import link
from bigtx.launch.world import World
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.jsonl import JsonLines
from bigtx.track.wandb_run import read_or_make_run_id
from bigtx.train import run_folder
from bigtx.utils import locks
from bigtx.utils.errors import BigtxError
from bigtx.utils.files import sha256_file, write_sealed
from bigtx.utils.locks import FolderLock, refuse_if_held

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box with joy"


def readers(scratch: Path) -> list[Reader]:
    """Return all readers; their examples are made in a folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        examples = _Examples(scratch)
    shards, rows = _archives(examples.recording), _rows()
    refuse = (BigtxError,)
    return [
        Reader("shard", shards, _read_shard, refuse),
        Reader("rows", rows, _read_rows, refuse),
        Reader("records", [*rows, *shards], _read_records, refuse),
        Reader("recording", _recordings(examples.recording), _read_recording, (recordings.BadAudioError,)),
        Reader("corpus", [_files_in(examples.corpus)], _read_corpus, refuse, _reseal_corpus),
        Reader("checkpoint", _runs(examples.run), _read_checkpoint, refuse, _reseal_checkpoint),
        Reader("model", [_files_in(examples.model)], _import, refuse),
        Reader("tokenizer", [_files_in(examples.tokenizer)], Tokenizer.load, refuse, _reseal_tokenizer),
        Reader("sentencepiece", [{"a.model": examples.sentencepiece}], _import_sentencepiece, refuse),
        Reader("tokenizer.json", [_tokenizer_files(examples.model)], Tokenizer.from_huggingface, refuse),
        Reader("config", _configs(), _read_config, refuse),
        Reader("run-folder", [_run_files(examples.run)], _read_run_folder, refuse),
        Reader(
            "prompts",
            [{"a.jsonl": b'{"prompt": "a"}\n{"messages": [{"role": "user", "content": "x"}]}\n'}],
            _read_prompts_file,
            refuse,
        ),
        Reader("link", [{"message": _hello()}], _read_message, refuse),
    ]


class _Examples:
    """What bigtx writes: a tokenizer, a corpus, a run with a checkpoint, and a model in Hugging Face's layout."""

    def __init__(self, folder: Path) -> None:
        texts = folder / "texts"
        texts.mkdir(parents=True)
        for number in range(12):
            (texts / f"{number}.txt").write_text(f"{WORDS} {number}. " * (5 + number))
        self.tokenizer, self.corpus, self.run, self.model = (
            folder / n for n in ("tokenizer", "corpus", "run", "model")
        )
        _command(train_command, f"input.paths=[{texts}]", f"output={self.tokenizer}", "vocab_size=420")
        (self.tokenizer / "recipe.json").unlink()
        named = (f"input.paths=[{texts}]", f"tokenizer={self.tokenizer}", f"output={self.corpus}")
        _command(prepare_command, *named, "validation_fraction=0.2", "block_tokens=64", "num_processes=1")
        self.sentencepiece = (self.tokenizer / "tokenizer.model").read_bytes()
        self._make_run()
        self.recording = _wav()

    def _make_run(self) -> None:
        tokenizer = Tokenizer.load(self.tokenizer)
        model = ModelConfig(hidden_size=8, num_layers=1, num_heads=1, vocab_size=tokenizer.vocab_size)
        config = PretrainConfig(run_dir=str(self.run), model=model)
        shapes = parameter_shapes(model)
        chance = np.random.default_rng(1)
        weights = (
            (name, torch.from_numpy(chance.normal(size=shape).astype(np.float32))) for name, shape in shapes.items()
        )
        facts = {"step": 10, "tokenizer": tokenizer.fingerprint, "state": {"step": 10, "tokens": 640}}
        checkpoint = save_weights(self.run, facts, shapes, weights)
        (self.run / "config.yaml").write_text(yaml_of({"run_dir": str(self.run), "model": to_dict(config)["model"]}))
        tokenizer.save(self.run / "tokenizer")
        export_model(checkpoint, config, tokenizer, self.model, ExportSettings())
        for name, lines in _histories().items():
            (self.run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        (self.run / "wandb").mkdir()
        (self.run / "wandb" / "sent.json").write_text(json.dumps({"metrics.jsonl": 100}))
        (self.run / "wandb_run_id").write_text("0123456789ab\n")
        (self.run / "wandb_run_place").write_text(f"{self.run}\nhost\n12345\n")
        (self.run / "run.lock").write_text(json.dumps({"host": "h", "pid": 1, "process_start": "a/1", "since": "now"}))
        (self.run / "environment.json").write_text(json.dumps({"packages": {"bigtx": "0"}, "argv": ["a"]}))
        (self.run / "base.json").write_text(json.dumps({"checkpoint": "x", "step": 1, "manifest_sha256": "0" * 64}))
        (self.run / "deepspeed.json").write_text("{}")
        write_table(self.run, [Row("train", "a.txt", 4, "0" * 32)])


def _command(command: Callable[[list[str]], None], *words: str) -> None:
    command(list(words))


def _files_in(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _runs(folder: Path) -> list[Files]:
    """Return a run as it is, and as an older bigtx wrote it: its checkpoint's manifest has no ranges."""
    files = _files_in(folder)
    name = next(name for name in files if name.startswith("checkpoints/") and name.endswith("manifest.json"))
    content = json.loads(files[name])
    del content["ranges"]
    return [files, files | {name: json.dumps(content).encode()}]


def _tokenizer_files(folder: Path) -> Files:
    return {name: content for name, content in _files_in(folder).items() if "token" in name}


def _run_files(folder: Path) -> Files:
    return {name: content for name, content in _files_in(folder).items() if not name.startswith("checkpoints/")}


def _histories() -> dict[str, list[dict[str, Any]]]:
    steps = [{"step": step, "time": "2026-01-01T00:00:00", "train/loss": 3.0 / step} for step in range(1, 12)]
    return {
        "metrics.jsonl": steps,
        "samples.jsonl": [{"step": 5, "time": "x", "samples": [{"prompt": "a", "text": "b"}]}],
        "events.jsonl": [{"step": 0, "time": "x", "kind": "start"}, {"step": 10, "time": "x", "kind": "end"}],
        "recordings.jsonl": [["a.wav", 0, 100, 1, 800, 8000]],  # type: ignore[list-item]
    }


def _wav() -> bytes:
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, np.sin(np.arange(1600) / 9).astype(np.float32), 8000, format="WAV")
    return content.getvalue()


def _recordings(wav: bytes) -> list[Files]:
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(wav))
    flac = io.BytesIO()
    soundfile.write(flac, samples, rate, format="FLAC")
    return [{"a.wav": wav}, {"a.flac": flac.getvalue()}]


def _archives(recording: bytes) -> list[Files]:
    record = json.dumps({"text": WORDS, "id": 1}).encode()
    members = {
        "a.txt": WORDS.encode(),
        "b.txt": b"b",
        "b.json": record,
        "c.txt": b"c",
        "c.json": b'{"id": 3}',
        "d.txt.gz": gzip.compress(b"d"),
    }
    alone = {"a.json": record, "b.json": record}
    sounds = {"a.wav": recording, "a.txt": b"one", "b.wav": recording, "b.cls": b"x"}
    found = [{"a.tar": _tar(members, layout)} for layout in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
    long = {f"{'deep/' * 40}ü{number}.txt": b"text" for number in range(3)}
    found += [{"a.tar": _tar(long, layout)} for layout in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
    return [
        *found,
        {"a.tar.gz": gzip.compress(found[0]["a.tar"])},
        *({"a.tar": _tar(each, tarfile.GNU_FORMAT)} for each in (alone, sounds)),
    ]


def _tar(members: Files, layout: int) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=layout) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


def _rows() -> list[Files]:
    import pyarrow
    import pyarrow.parquet

    records = [{"id": number, "text": f"{WORDS} {number}", "label": "x", "more": {"a": [1]}} for number in range(20)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), table)
    return [
        {"a.jsonl": lines},
        {"a.json": json.dumps(records).encode()},
        {"a.json.gz": gzip.compress(lines)},
        {"a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(lines)},
        {"a.jsonl.xz": lzma.compress(lines)},
        {"a.jsonl.bz2": bz2.compress(lines)},
        {"a.csv": b"id,text,label\n" + b"".join(b'%d,"a ""b"", c",x\n' % number for number in range(20))},
        {"a.txt": WORDS.encode() * 20},
        {"a.parquet": table.getvalue()},
    ]


def _configs() -> list[Files]:
    run = to_yaml(FinetuneConfig(run_dir="x"))
    short = b"base: base.yaml\ntrain:\n  max_steps: 100\ndata:\n  sources:\n    a: {path: x, weight: 0.5}\n"
    return [{"a.yaml": short, "base.yaml": b"model:\n  hidden_size: 64\n"}, {"a.yaml": run.encode()}]


def _hello() -> bytes:
    hello = {"node": 1, "num_nodes": 2, "num_local": 1, "host": "h", "facts": {"python": "3.11"}}
    messages = [hello, {"clock": 1.0, "node": 1}, {"sees": True, "node": 1}, {"stop": 15, "node": 1}]
    return b"".join(json.dumps(message).encode() + b"\n" for message in messages)


def _only(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.is_file())


def _read_shard(folder: Path) -> None:
    for _ in read_texts(str(_only(folder)), ForeignConfig()):
        pass


def _read_rows(folder: Path) -> None:
    for options in ({}, {"id_field": "id", "language_field": "label"}):
        for _ in read_documents(InputConfig(paths=[str(_only(folder))], **options), Rejects(1.0)):  # type: ignore[arg-type]
            pass


def _read_records(folder: Path) -> None:
    if (path := _only(folder)).suffix == ".txt":
        return  # Text files are records only in folders.
    for record in read_records([str(path)], Broken()):
        if isinstance(place := record.fields.get("audio"), recordings.AudioPlace):
            with contextlib.suppress(recordings.BadAudioError):
                recordings.examine(place)


def _read_recording(folder: Path) -> None:
    path = _only(folder)
    place = recordings.AudioPlace(path.name, str(path), 0, path.stat().st_size)
    recordings.read_header(place)
    recordings.decode(place, 16_000)


def _read_corpus(folder: Path) -> None:
    verify(as_place(str(folder)), 1)
    for _ in inspect.describe(as_place(str(folder)), split="train", num_samples=2, seed=1):
        pass
    inspect.statistics(as_place(str(folder)))
    Manifest.load(folder / "validation")


def _reseal(path: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    write_sealed(path, content)


def _reseal_corpus(folder: Path) -> None:
    for split in ("train", "validation"):

        def update(content: dict[str, Any], place: Path = folder / split) -> None:
            content["blocks_sha256"] = sha256_file(place / "blocks.npy")
            for shard in content["shards"]:
                path = place / shard["name"]
                shard |= {"size": path.stat().st_size, "sha256": sha256_file(path)}

        _reseal(folder / split / MANIFEST_NAME, update)


def _read_checkpoint(folder: Path) -> None:
    checkpoint, config, _ = find_with_tokenizer(folder)
    choose(folder, _Alone(), lambda text: None)  # type: ignore[arg-type]
    for _ in load_weights(checkpoint):
        pass
    read_model(checkpoint, config.model, device=torch.device("cpu"), dtype=torch.float32)


class _Alone:
    """The only rank, without a process group."""

    rank, world_size = 0, 1

    def from_first(self, value: Any) -> Any:
        """Return the value of this rank."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        return [value]


def _reseal_checkpoint(folder: Path) -> None:
    def update(content: dict[str, Any]) -> None:
        for name, entry in content["files"].items():
            path = place / name
            entry |= {"size": path.stat().st_size, "sha256": sha256_file(path)}

    place = folder / "checkpoints" / "step-00000010"
    _reseal(place / "manifest.json", update)


def _import(folder: Path) -> None:
    import_model(folder, folder.parent / f"{folder.name}-imported")


def _reseal_tokenizer(folder: Path) -> None:
    path = folder / "bigtx_tokenizer.json"
    try:
        Tokenizer.load(folder)
    except BigtxError as error:
        if found := re.search(r"fingerprint (\w+), expected", str(error)):
            content = json.loads(path.read_bytes())
            path.write_text(json.dumps(content | {"fingerprint": found[1]}))


def _import_sentencepiece(folder: Path) -> None:
    tokenizer = Tokenizer.from_sentencepiece(_only(folder))
    tokenizer.decode(tokenizer.encode(WORDS))


def _read_config(folder: Path) -> None:
    path = folder / "a.yaml"
    for schema in (PretrainConfig, FinetuneConfig):
        with contextlib.suppress(BigtxError):
            to_yaml(load(schema, [str(path)]))
    resolved_files(path)


def _read_run_folder(folder: Path) -> None:
    for read in (_read_values, _read_lock, _read_history, _read_id, _read_table, _read_parts):
        with contextlib.suppress(BigtxError):
            read(folder)


def _read_values(folder: Path) -> None:
    values = read_values(folder)
    with_moved_paths(PretrainConfig, with_absolute_paths(PretrainConfig, values), Path("/a"), folder)
    load(PretrainConfig, [str(folder)], check=False)


def _read_lock(folder: Path) -> None:
    refuse_if_held(folder)
    with mock.patch.object(locks, "LOCK_PATIENCE_SECONDS", 0.0), FolderLock(folder):
        pass


def _read_history(folder: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
        lines = JsonLines(folder / name, warn=lambda text: None, up_to_step=8)
        lines.merge({"step": 8, "time": "now", "a": 1})
        lines.close()


def _read_id(folder: Path) -> None:
    read_or_make_run_id(folder)
    plan(folder)  # What `bigtx wandb sync --dry-run` reads.


def _read_table(folder: Path) -> None:
    read_table(folder)


def _read_parts(folder: Path) -> None:
    recordings.look_at([], memory=folder / recordings.FILE)
    run_folder.check_run_dir(PretrainConfig(run_dir=str(folder)))
    Tokenizer.load(folder / "tokenizer")


def _read_prompts_file(folder: Path) -> None:
    _read_prompts(_only(folder))


def _read_message(folder: Path) -> None:
    # A pair of sockets has no options of TCP.
    ours, theirs = socket.socketpair()
    with ours, theirs, mock.patch.object(link, "_kept_alive", lambda connection: connection):
        content = _only(folder).read_bytes()[:60_000]
        theirs.sendall(content)
        theirs.shutdown(socket.SHUT_WR)
        peers: dict[int, Any] = {}
        link._admit(World(1, num_nodes=2), ours, peers)
        if peers:
            found = link.Link(0, {}, list(peers.values()))
            link._answers(peers, ("clock", "sees"), 0.0)
            found.receive()
