"""Measure the data engine and its peers in the same run; print a table, or JSON with --json.

    python tools/bench/data.py [--text FILE.jsonl] [--rounds 3] [--peers PYTHON] [--json]

Figures (medians over interleaved rounds; machines are noisy, so compare the ratios):

- prepare_over_encode: seconds of `bigtx data prepare` (raw jsonl to shards, BPE 16k, exact duplicates removed; the
  whole command, including the start of its processes), divided by those of sentencepiece encoding alone in as many
  processes, from the moment when each has its texts in memory.
- second_process_gain_over_encode: the speed-up of prepare by a second process, divided by that of encoding.
  Both are measured on --repeat copies of the text, with a number before each document, so that the start of the
  processes (about a second) does not hide how the work scales; the figures for a single copy end in `_once`.
- prepare_peak_gib: maximum of the summed PSS of all processes; prepare_peak_10x_gib: the same for ten copies of the
  text.
- loader_tokens_per_second: from warm local shards in one process, rows of 2,048, uint16 on disk, int64 batches, random
  block order, no document mask; one epoch, each block's checksum verified when it is first touched.
- long_documents: `bigtx data prepare` of one document of 120 MB with one process and memory=256MB, by tokenizer and
  kind of text: its status (2: a reject), and its memory in addition to the text as a share of 1 GiB.
- open_seconds, open_mib: a manifest of 10^12 tokens, to the first batch; first_batch_ratio: the time to the first batch
  at sequence 10^8 over that at sequence 0.

--peers names a Python with the packages of tools/bench/data-peers.txt: datatrove's tokenizer and litdata's optimize are
compared with prepare, litdata's and MDS's loaders with ours.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import long_documents
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).with_name("data_peers.py")
VOCAB_SIZE = 16_384
SEQUENCE_LENGTH = 2048
LOADER_TOKENS = 1 << 27
BLOCK_TOKENS = 1 << 18
HUGE_TOKENS = 10**12
LONG_BYTES = 120_000_000
FAR_SEQUENCE = 10**8


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, help="JSON lines; default: the standard library's code")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=4, help="copies of the text (default: 4)")
    parser.add_argument("--peers", help="a Python with the packages of data-peers.txt")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--only", choices=("prepare", "memory", "long", "loader", "open"), help="one part")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return CHILDREN[options.child[0]](*options.child[1:])
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="bigtx-bench-") as scratch:
        folder = Path(scratch)
        if options.only in (None, "prepare", "memory", "long"):
            text = options.text or library_as_jsonl(folder)
            tokenizer = train_tokenizer(folder, text)
            if options.only in (None, "prepare"):
                figures |= measure_prepare(folder, text, tokenizer, options)
            if options.only in (None, "memory"):
                figures |= measure_memory(folder, text, tokenizer)
            if options.only in (None, "long"):
                figures |= measure_long(folder, text, tokenizer)
        if options.only in (None, "loader"):
            figures |= measure_loader(folder, options)
        if options.only in (None, "open"):
            figures |= measure_open(folder)
    figures["load_after"] = os.getloadavg()[0]
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print("\n".join(f"{name:<36}{value}" for name, value in figures.items()))
    return 0


def say(text: str) -> None:
    """Print progress on stderr, because stdout is for the figures."""
    print(text, file=sys.stderr, flush=True)


def library_as_jsonl(folder: Path) -> Path:
    """Write the standard library's source files as JSON lines."""
    path = folder / "library.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" not in source.parts:
                print(json.dumps({"text": source.read_text(encoding="utf-8", errors="ignore")}), file=file)
    return path


def bigtx(*arguments: str) -> float:
    """Run a command of bigtx; return its seconds."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bigtx", *arguments], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"bigtx {' '.join(arguments)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.monotonic() - begin


def train_tokenizer(folder: Path, text: Path, method: str = "bpe") -> Path:
    """Train a tokenizer of 16k pieces on the text."""
    output = folder / method
    settings = [f"output={output}", f"vocab_size={VOCAB_SIZE}", f"method={method}"]
    bigtx("tokenizer", "train", f"input.paths=[{text}]", *settings)
    return output


def prepare(folder: Path, text: Path, tokenizer: Path, num_processes: int) -> float:
    """Return the seconds of `bigtx data prepare`."""
    output = folder / "corpus"
    shutil.rmtree(output, ignore_errors=True)
    settings = [f"input.paths=[{text}]", f"tokenizer={tokenizer}", f"output={output}"]
    return bigtx("data", "prepare", *settings, f"num_processes={num_processes}")


def encode(text: Path, tokenizer: Path, num_processes: int) -> float:
    """Return the seconds of sentencepiece alone, from the moment when every process has its texts in memory."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_processes + 1)
    model = next(tokenizer.glob("*.model"))
    processes = [
        context.Process(target=encode_share, args=(text, model, number, num_processes, barrier))
        for number in range(num_processes)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    begin = time.monotonic()
    for process in processes:
        process.join()
    return time.monotonic() - begin


def encode_share(text: Path, model: Path, number: int, num_processes: int, barrier: Any) -> None:
    """Encode one process's share: every n-th document, in lists of about 128 KiB, as ids in Python lists."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lists: list[list[str]] = [[]]
    size = 0
    with text.open(encoding="utf-8") as file:
        for place, line in enumerate(file):
            if place % num_processes == number:
                lists[-1].append(json.loads(line)["text"])
                size += len(lists[-1][-1])
                if size > 1 << 17:
                    lists.append([])
                    size = 0
    barrier.wait()
    for texts in lists:
        processor.encode(texts, num_threads=1)


def measure_prepare(folder: Path, text: Path, tokenizer: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure prepare, encoding alone and the peers, one after the other in each round."""
    repeated = repeat(text, options.repeat, folder / "repeated.jsonl")
    seconds: dict[str, list[float]] = {}
    jobs: dict[str, Any] = {}
    for number in (1, 2):
        for name, path in (("", repeated), ("_once", text)):
            jobs[f"encode_{number}{name}"] = lambda path=path, number=number: encode(path, tokenizer, number)
            jobs[f"prepare_{number}{name}"] = lambda path=path, number=number: prepare(folder, path, tokenizer, number)
    if options.peers:
        for name in ("datatrove", "litdata_optimize"):
            jobs[name] = lambda name=name: peer(options.peers, name, folder, str(text), str(tokenizer))["seconds"]
    for number in range(options.rounds):
        for name, job in jobs.items():
            seconds.setdefault(name, []).append(job())
            say(f"round {number + 1}: {name} {seconds[name][-1]:.2f} s")
    figures: dict[str, Any] = {"text_mb": text.stat().st_size / 1e6, "repeated_mb": repeated.stat().st_size / 1e6}
    for name in ("", "_once"):
        figures[f"prepare_over_encode{name}"] = median_ratio(seconds, [f"prepare_2{name}"], [f"encode_2{name}"])
        figures[f"second_process_gain_over_encode{name}"] = median_ratio(
            seconds, [f"prepare_1{name}", f"encode_2{name}"], [f"prepare_2{name}", f"encode_1{name}"]
        )
    for name in ("datatrove", "litdata_optimize"):
        if name in seconds:
            figures[f"{name}_over_prepare_once"] = median_ratio(seconds, [name], ["prepare_2_once"])
    repeated.unlink()
    return figures | {"seconds": seconds}


def median_ratio(seconds: dict[str, list[float]], above: list[str], below: list[str]) -> float:
    """Return the median over the rounds of the product of some times divided by the product of others."""
    rounds = range(len(seconds[above[0]]))
    return statistics.median(
        math.prod(seconds[name][number] for name in above) / math.prod(seconds[name][number] for name in below)
        for number in rounds
    )


def repeat(text: Path, times: int, path: Path) -> Path:
    """Write copies of a text whose documents differ by a number before them."""
    with path.open("w", encoding="utf-8") as copies:
        for number in range(times):
            for line in text.open(encoding="utf-8"):
                print(json.dumps({"text": f"{number} {json.loads(line)['text']}"}), file=copies)
    return path


def measure_memory(folder: Path, text: Path, tokenizer: Path) -> dict[str, Any]:
    """Measure the maximum of the summed PSS of prepare's processes, for the text and for ten differing copies of it."""
    tenfold = repeat(text, 10, folder / "tenfold.jsonl")
    figures = {}
    for name, path in (("prepare_peak_gib", text), ("prepare_peak_10x_gib", tenfold)):
        with PeakMemory() as peak:
            prepare(folder, path, tokenizer, 2)
        figures[name] = peak.bytes / 2**30
        say(f"{name} {figures[name]:.2f}")
    tenfold.unlink()
    return figures


def measure_long(folder: Path, text: Path, tokenizer: Path) -> dict[str, Any]:
    """Measure the memory for one document of 120 MB."""
    tokenizers = {"bpe": tokenizer, "unigram": train_tokenizer(folder, text, "unigram")}
    found = long_documents.measure(folder, tokenizers, LONG_BYTES)
    names = ("status", "share", "seconds")
    return {"long_documents": {key: {name: one[name] for name in names} for key, one in found.items()}}


class PeakMemory:
    """A sampler of the summed PSS of this process's descendants, as a context."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.bytes = max(self.bytes, sum(map(_pss, _descendants(os.getpid()))))


def _descendants(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        try:
            tasks = Path(f"/proc/{waiting.pop()}/task").glob("*/children")
            children = [int(child) for task in tasks for child in task.read_text().split()]
        except OSError:
            continue
        found += children
        waiting += children
    return found


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def measure_loader(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the tokens per second of our loader, and of the peers' on the same tokens."""
    corpus = folder / "tokens"
    write_corpus(corpus)
    rates: dict[str, list[float]] = {}
    names = ["bigtx"] + (["litdata", "mds"] if options.peers else [])
    for number in range(options.rounds):
        for name in names:
            if name == "bigtx":
                found = child("loader", str(corpus))["tokens_per_second"]
            else:
                found = peer(options.peers, f"{name}_loader", folder, str(corpus / "tokens.npy"))["tokens_per_second"]
            rates.setdefault(name, []).append(found)
            say(f"round {number + 1}: {name} loader {found / 1e6:.0f}M tokens/s")
    shutil.rmtree(corpus)
    best = {name: statistics.median(values) for name, values in rates.items()}
    figures: dict[str, Any] = {"loader_tokens_per_second": best["bigtx"]}
    return figures | {f"{name}_loader_tokens_per_second": best[name] for name in names[1:]}


def write_corpus(folder: Path) -> None:
    """Write random tokens as a prepared split `train`, and as one array for the peers."""
    from bigtx.data.corpus.manifest import Manifest, Shard
    from bigtx.data.corpus.shards import ShardWriter

    (folder / "train").mkdir(parents=True)
    tokens = np.random.default_rng(1).integers(0, VOCAB_SIZE, LOADER_TOKENS, dtype=np.uint16)
    np.save(folder / "tokens.npy", tokens)
    shards: list[Shard] = []
    rows: list[np.ndarray] = []

    def done(_: int, shard: Shard, blocks: np.ndarray) -> None:
        shards.append(shard)
        rows.append(blocks)

    dtype = np.dtype("<u2")
    with ShardWriter(folder / "train", dtype=dtype, block_tokens=BLOCK_TOKENS, shard_blocks=128, done=done) as writer:
        for begin in range(0, LOADER_TOKENS, BLOCK_TOKENS):
            writer.add(tokens[begin : begin + BLOCK_TOKENS], np.arange(0, BLOCK_TOKENS, 512))
        writer.finish()
    blocks = np.concatenate(rows)
    save_manifest(Manifest, folder / "train", tuple(shards), blocks)


def save_manifest(manifest: Any, folder: Path, shards: tuple[Any, ...], blocks: np.ndarray) -> None:
    """Return the manifest of a split of BLOCK_TOKENS blocks."""
    manifest(
        folder=folder,
        split="train",
        dtype=np.dtype("<u2"),
        vocab_size=VOCAB_SIZE,
        end_id=0,
        tokenizer_fingerprint="0" * 64,
        block_tokens=BLOCK_TOKENS,
        num_tokens=int(blocks["tokens"].sum(dtype=np.int64)),
        num_documents=int(blocks["documents"].sum(dtype=np.int64)),
        num_bytes=4 * int(blocks["tokens"].sum(dtype=np.int64)),
        shards=shards,
        blocks=blocks,
        recipe={},
    ).save()


def measure_open(folder: Path) -> dict[str, Any]:
    """Measure a manifest of 10^12 tokens, whose shards are sparse files except for the blocks that are read."""
    corpus = folder / "huge"
    write_huge_corpus(corpus)
    figures: dict[str, Any] = {}
    seconds = {}
    for name, sequence in (("near", 0), ("far", FAR_SEQUENCE)):
        found = [child("open", str(corpus), str(sequence)) for _ in range(5)]
        seconds[name] = statistics.median(one["first_batch_seconds"] for one in found)
        figures[f"first_batch_{name}_seconds"] = seconds[name]
        if name == "near":
            figures["open_seconds"] = statistics.median(one["open_seconds"] for one in found)
            figures["open_mib"] = max(one["peak_mib"] for one in found)
    figures["first_batch_ratio"] = seconds["far"] / seconds["near"]
    shutil.rmtree(corpus)
    return figures


def write_huge_corpus(folder: Path) -> None:
    """Make shards of zeros that take no space on the disk; all blocks of zeros have the same checksum."""
    import xxhash

    from bigtx.data.corpus.manifest import BLOCK_DTYPE, Manifest, Shard
    from bigtx.data.corpus.shards import member_bytes

    (folder / "train").mkdir(parents=True)
    num_blocks, shard_blocks = HUGE_TOKENS // BLOCK_TOKENS, 4096
    tokens = member_bytes("000000.tokens.npy", np.zeros(BLOCK_TOKENS, np.uint16))
    content = len(tokens) + len(member_bytes("000000.docs.npy", np.zeros(1, "<u4")))
    shards = []
    for number in range(-(-num_blocks // shard_blocks)):
        name = f"{number:06d}.tar"
        size = min(shard_blocks, num_blocks - number * shard_blocks) * content + 1024
        with (folder / "train" / name).open("wb") as file:
            os.truncate(file.fileno(), size)
        shards.append(Shard(name, size, "0" * 64))
    blocks = np.empty(num_blocks, BLOCK_DTYPE)
    places = np.arange(num_blocks)
    blocks["shard"], blocks["tokens"], blocks["documents"] = places // shard_blocks, BLOCK_TOKENS, 1
    blocks["docs_offset"] = len(tokens)
    blocks["offset"] = places % shard_blocks * content + 640
    blocks["checksum"] = xxhash.xxh3_64_intdigest(bytes(content))
    save_manifest(Manifest, folder / "train", tuple(shards), blocks)


def make_loader(corpus: str, start_sequence: int) -> Any:
    """Make our loader as a run does: one rank, micro batches of 8."""
    from bigtx.config.schema import DataConfig, SourceConfig
    from bigtx.data.stream.loader import Division, TrainLoader

    return TrainLoader(
        DataConfig(sources={"bench": SourceConfig(path=corpus)}),
        Division(global_batch_size=64, micro_batch_size=8),
        sequence_length=SEQUENCE_LENGTH,
        seed=1,
        start_sequence=start_sequence,
        pad_id=0,
    )


def child_loader(corpus: str) -> int:
    """Read an epoch, after warming the page cache."""
    for path in Path(corpus, "train").glob("*.tar"):
        path.read_bytes()
    loader = make_loader(corpus, 0)
    num_steps = LOADER_TOKENS // SEQUENCE_LENGTH // 64 - 1
    next(loader)
    begin = time.perf_counter()
    for _ in range(num_steps):
        batches = next(loader)
    seconds = time.perf_counter() - begin
    assert batches[0].tokens.shape == (8, SEQUENCE_LENGTH)
    loader.close()
    print(json.dumps({"tokens_per_second": num_steps * 64 * SEQUENCE_LENGTH / seconds}))
    return 0


def child_open(corpus: str, sequence: str) -> int:
    """Open a manifest, and read the first batch at a place."""
    import resource

    import torch  # noqa: F401 - a run has imported it anyway, so it is not counted

    from bigtx.data.corpus.manifest import Manifest

    before = _anonymous_mib()
    begin = time.perf_counter()
    Manifest.load(Path(corpus) / "train")
    opened = time.perf_counter()
    loader = make_loader(corpus, int(sequence))
    next(loader)
    first = time.perf_counter()
    loader.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "open_seconds": opened - begin,
                "first_batch_seconds": first - opened,
                "peak_mib": peak - before,
            }
        )
    )
    return 0


def _anonymous_mib() -> float:
    """Return the present memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


CHILDREN: dict[str, Callable[..., int]] = {"loader": child_loader, "open": child_open}


def child(*arguments: str) -> dict[str, float]:
    """Run a part of this program in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(f"{arguments}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def peer(python: str, name: str, folder: Path, *arguments: str) -> dict[str, float]:
    """Run a peer's job in its own Python."""
    scratch = folder / name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    done = subprocess.run(
        [python, str(PEERS), name, str(scratch), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    shutil.rmtree(scratch)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
