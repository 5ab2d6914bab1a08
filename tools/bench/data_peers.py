"""The peers' jobs for tools/bench/data.py, run by a Python that has the peers; each prints one line of JSON.

python data_peers.py JOB SCRATCH_FOLDER ARGUMENTS ...
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

SEQUENCE_LENGTH = 2048
BATCH = 8


def datatrove(scratch: Path, text: str, tokenizer: str) -> dict[str, float]:
    """Run JsonlReader and DocumentTokenizer in two processes, with a byte-level BPE of as many pieces, because
    sentencepiece models are not supported; only the pipeline is timed."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    with open(text, encoding="utf-8") as file:
        sample = [json.loads(line)["text"] for _, line in zip(range(5000), file, strict=False)]
    fast.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=16_384, special_tokens=["<|endoftext|>"]))
    fast.save(str(scratch / "tokenizer.json"))
    # datatrove gives whole files to each task.
    halves = scratch / "halves"
    halves.mkdir()
    lines = Path(text).read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(2):
        (halves / f"{number}.jsonl").write_text("".join(lines[number::2]), encoding="utf-8")
    begin = time.monotonic()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(halves)),
            DocumentTokenizer(
                output_folder=str(scratch / "tokens"),
                tokenizer_name_or_path=str(scratch / "tokenizer.json"),
                eos_token="<|endoftext|>",
            ),
        ],
        tasks=2,
        workers=2,
        logging_dir=str(scratch / "logs"),
    ).run()
    return {"seconds": time.monotonic() - begin}


_processors: dict[str, Any] = {}


def tokenize_range(job: tuple[str, str, int, int]) -> Iterator[Any]:
    """Yield the tokens of the lines in a range of bytes, a document at a time."""
    import sentencepiece
    import torch

    text, model, begin, end = job
    if model not in _processors:
        _processors[model] = sentencepiece.SentencePieceProcessor(model_file=model)
    with open(text, "rb") as file:
        file.seek(begin)
        while file.tell() < end:
            ids = _processors[model].encode(json.loads(file.readline())["text"])
            yield torch.tensor(ids, dtype=torch.int32)


def litdata_optimize(scratch: Path, text: str, tokenizer: str) -> dict[str, float]:
    """Run litdata's optimize with the same sentencepiece model, in two workers, with a document per item."""
    import litdata

    model = str(next(Path(tokenizer).glob("*.model")))
    size = os.path.getsize(text)
    bounds = [0]
    with open(text, "rb") as file:
        for number in range(1, 32):
            file.seek(size * number // 32)
            file.readline()
            bounds.append(file.tell())
    bounds.append(size)
    jobs = [(text, model, begin, end) for begin, end in itertools.pairwise(bounds) if end > begin]
    begin_time = time.monotonic()
    litdata.optimize(
        fn=tokenize_range,
        inputs=jobs,
        output_dir=str(scratch / "optimized"),
        num_workers=2,
        chunk_bytes="64MB",
        item_loader=litdata.TokensLoader(),
    )
    return {"seconds": time.monotonic() - begin_time}


def give_blocks(job: tuple[str, int, int]) -> Iterator[Any]:
    """Yield the tokens of an array, a block at a time."""
    import torch

    path, begin, end = job
    tokens = np.load(path, mmap_mode="r")
    for place in range(begin, end, 1 << 18):
        yield torch.from_numpy(np.array(tokens[place : min(end, place + (1 << 18))], np.uint16))


def litdata_loader(scratch: Path, array: str) -> dict[str, float]:
    """Read litdata's StreamingDataset of fixed rows through its loader, in this process."""
    import litdata
    import torch

    tokens = np.load(array, mmap_mode="r")
    litdata.optimize(
        fn=give_blocks,
        inputs=[(array, 0, len(tokens))],
        output_dir=str(scratch / "optimized"),
        num_workers=1,
        chunk_bytes="64MB",
        item_loader=litdata.TokensLoader(),
    )
    dataset = litdata.StreamingDataset(
        str(scratch / "optimized"), item_loader=litdata.TokensLoader(block_size=SEQUENCE_LENGTH + 1), shuffle=True
    )
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
    return rate(batch.to(torch.int64) for batch in loader)


def mds_loader(scratch: Path, array: str) -> dict[str, float]:
    """Read MosaicML's MDS of fixed rows through torch's loader, in this process."""
    import torch

    # It also imports its image datasets, which need a torchvision that fits torch; none of them is used here.
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    setattr(sys.modules["torchvision.datasets"], "VisionDataset", type("VisionDataset", (), {}))  # noqa: B010
    import streaming

    tokens = np.load(array, mmap_mode="r")
    with streaming.MDSWriter(out=str(scratch / "mds"), columns={"tokens": "ndarray:uint16"}) as writer:
        for place in range(0, len(tokens) - SEQUENCE_LENGTH, SEQUENCE_LENGTH):
            writer.write({"tokens": np.array(tokens[place : place + SEQUENCE_LENGTH + 1])})
    dataset = streaming.StreamingDataset(local=str(scratch / "mds"), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH)
    return rate(batch["tokens"].to(torch.int64) for batch in loader)


def rate(batches: Iterator[Any]) -> dict[str, float]:
    """Return tokens per second over all batches except the first."""
    next(batches)
    num_rows, begin = 0, time.perf_counter()
    for batch in batches:
        num_rows += len(batch)
    return {"tokens_per_second": num_rows * SEQUENCE_LENGTH / (time.perf_counter() - begin)}


JOBS = {job.__name__: job for job in (datatrove, litdata_optimize, litdata_loader, mds_loader)}

if __name__ == "__main__":
    figures = JOBS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
    print(json.dumps(figures))
