"""Multi30k, German to English: compare bigtx's recipe with torch.nn.Transformer in a plain loop, with the same time.

    python tools/bench/translation.py FOLDER TOKENIZER --minutes 20

FOLDER has {train,val,test_2016_flickr}.{de,en}.gz, TOKENIZER is that of configs/finetune/multi30k.yaml. The arms run
one after the other with all cores, or with --at-once 2 side by side with half of them each. Only the time of training
counts; the evaluation (beam search, BLEU) is the same for all arms. The learning rate of the plain loop rises over a
tenth of the time and then falls to zero, or with --schedule article as the inverse square root; each of --rates gets
the whole time, and the best on the validation pairs counts. The program prints a line for each arm, then JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config.schema import ModelConfig
from bigtx.model.beam import Beam, beam_search
from bigtx.model.cache import KeyValueCache
from bigtx.model.embed import Text, sinusoids
from bigtx.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = {
    "article": {"d_model": 512, "nhead": 8, "num_layers": 6, "dim_feedforward": 2048, "rate": 5e-4},
    "middle": {"d_model": 256, "nhead": 4, "num_layers": 3, "dim_feedforward": 1024, "rate": 1e-3},
    "small": {"d_model": 128, "nhead": 4, "num_layers": 3, "dim_feedforward": 512, "rate": 2e-3},
}
"""arXiv:1706.03762's base model, and two that fit 29,000 pairs better; the peak rate of Adam unless --rates says."""
BATCH_SIZE = 128
SMOOTHING, DROPOUT = 0.1, 0.1
BEAM = Beam(size=5, length_penalty=0.6)
IGNORED = -100
TEST = "test_2016_flickr"
WINDOW = 32
"""The number of batches whose pairs are sorted by length together."""

Pairs = list[tuple[list[int], list[int]]]


class Plain(nn.Module):
    """A torch.nn.Transformer with sinusoids, and one table for both sides and the head."""

    def __init__(self, vocab_size: int, *, d_model: int, nhead: int, num_layers: int, dim_feedforward: int) -> None:
        super().__init__()
        self.size = d_model
        self.table = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.table.weight, std=d_model**-0.5)
        self.transformer = nn.Transformer(
            d_model, nhead, num_layers, num_layers, dim_feedforward, DROPOUT, batch_first=True
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens: [B, T] -> [B, T, D]."""
        places = torch.arange(tokens.shape[1])[None]
        x = self.table(tokens) * math.sqrt(self.size) + sinusoids(places, self.size)
        return F.dropout(x, DROPOUT, self.training)

    def read(self, source: Tensor, is_padding: Tensor) -> Tensor:
        """Encode sources [B, S]."""
        found: Tensor = self.transformer.encoder(self.embed(source), src_key_padding_mask=is_padding)
        return found

    def write(self, target: Tensor, memory: Tensor, is_padding: Tensor) -> Tensor:
        """Compute the decoder's hidden states [B, T, D]."""
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).isinf()
        found: Tensor = self.transformer.decoder(
            self.embed(target), memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=is_padding
        )
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits [..., V]."""
        return F.linear(hidden, self.table.weight)

    def forward(
        self,
        tokens: Tensor | None,
        *,
        target_tokens: Tensor,
        target_positions: Tensor,
        cache: KeyValueCache,
        segment_ids: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Decode as bigtx's beam search expects: the cache has the tokens, which are read again at each step."""
        with torch.autocast("cpu", torch.bfloat16):
            if tokens is not None and segment_ids is not None:
                cache.source = Text(self.read(tokens, segment_ids == 1), torch.zeros_like(tokens), segment_ids)
            source = cache.source
            assert source is not None and source.segment_ids is not None
            cache.place(target_positions)
            as_keys = target_tokens[:, None, :, None]
            history = cache.layers[0].extend(as_keys, as_keys)[0][:, 0, :, 0]
            hidden = self.write(history, source.x, source.segment_ids == 1)[:, -1:]
            return self.logits(hidden).float()


def read_texts(folder: Path, name: str) -> list[tuple[str, str]]:
    """Read pairs of lines."""
    sides = []
    for side in ("de", "en"):
        with gzip.open(folder / f"{name}.{side}.gz", "rt", encoding="utf-8") as file:
            sides.append(file.read().split("\n"))
    return [(source, target) for source, target in zip(*sides, strict=True) if source and target]


def batches(pairs: Pairs, generator: random.Random) -> list[Pairs]:
    """Yield the batches of an epoch, with pairs of similar length together."""
    order = list(range(len(pairs)))
    generator.shuffle(order)
    found = []
    for begin in range(0, len(order), WINDOW * BATCH_SIZE):
        window = sorted(order[begin : begin + WINDOW * BATCH_SIZE], key=lambda place: max(map(len, pairs[place])))
        found += [
            [pairs[place] for place in window[first : first + BATCH_SIZE]]
            for first in range(0, len(window), BATCH_SIZE)
        ]
    generator.shuffle(found)
    return found


def filled(rows: list[list[int]], value: int) -> Tensor:
    """Pad ids to int64 [B, T]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def train(model: Plain, pairs: Pairs, *, pad_id: int, rate: float, seconds: float, schedule: str) -> tuple[int, float]:
    """Train for the given time; return the number of steps, and the mean loss of the last 50."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-9)
    generator, begin, steps, losses = random.Random(1), time.monotonic(), 0, list[float]()
    model.train()
    while True:
        for batch in batches(pairs, generator):
            share = (time.monotonic() - begin) / seconds
            if share >= 1.0:
                return steps, sum(losses[-50:]) / len(losses[-50:])
            fall = math.sqrt(0.1 / max(share, 0.1)) if schedule == "article" else (1.0 - share) / 0.9
            for group in optimizer.param_groups:
                group["lr"] = rate * min((share + 1e-3) / 0.1, fall)
            source, labels = (filled([pair[side] for pair in batch], pad_id) for side in (0, 1))
            given = torch.cat((torch.full_like(labels[:, :1], pad_id), labels[:, :-1]), dim=1)
            # The end and padding have different ids, so this is exact.
            padding = source == pad_id
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.write(given, model.read(source, padding), padding)
                known = labels != pad_id
                logits = model.logits(hidden[known])
            loss = F.cross_entropy(logits.float(), labels[known], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            steps += 1


def bleu(model: Plain, tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> float:
    """Compute cased, detokenised BLEU."""
    import sacrebleu

    model.eval()
    # torch's kernels for inference do not support autocast.
    torch.backends.mha.set_fastpath_enabled(False)
    sources = [[*tokenizer.encode(source), tokenizer.end_id] for source, _ in texts]
    written = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda place: -len(sources[place]))
    for begin in range(0, len(order), 64):
        places = order[begin : begin + 64]
        found = beam_search(
            model,
            ModelConfig(shape="encoder_decoder", num_layers=1),
            [sources[place] for place in places],
            max_new_tokens=[2 * len(sources[place]) + 10 for place in places],
            beam=BEAM,
            end_ids=tokenizer.end_ids,
            start_id=tokenizer.pad_id,
        )
        for place, best in zip(places, found, strict=True):
            written[place] = tokenizer.decode(best.ids)
    return float(sacrebleu.corpus_bleu(written, [[target for _, target in texts]]).score)


def plain_arm(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    """Measure one size of torch.nn.Transformer."""
    folder, tokenizer = Path(arguments.folder), Tokenizer.load(arguments.tokenizer)
    pairs = [
        ([*tokenizer.encode(source), tokenizer.end_id], [*tokenizer.encode(target), tokenizer.end_id])
        for source, target in read_texts(folder, "train")
    ]
    settings = dict(SIZES[size])
    rates = arguments.rates or [settings.pop("rate")]
    settings.pop("rate", None)
    best: dict[str, Any] = {}
    for rate in rates:
        torch.manual_seed(1)
        model = Plain(tokenizer.vocab_size, **settings)  # type: ignore[arg-type]
        seconds = 60 * arguments.minutes
        steps, loss = train(
            model, pairs, pad_id=tokenizer.pad_id, rate=rate, seconds=seconds, schedule=arguments.schedule
        )
        found = {"rate": rate, "steps": steps, "epochs": steps * BATCH_SIZE / len(pairs), "loss": loss}
        found["validation"] = bleu(model, tokenizer, read_texts(folder, "val"))
        if not best or found["validation"] > best["validation"]:
            best, kept = found, model
    return best | {
        "parameters": sum(parameter.numel() for parameter in kept.parameters()),
        "seconds": 60 * arguments.minutes,
        "test": bleu(kept, tokenizer, read_texts(folder, TEST)),
    }


def bigtx_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the recipe, with as many steps as fit the time at the speed of the first steps."""
    folder = Path(arguments.folder).resolve()
    data = [
        f"data.{name}=['{folder}/{file}.{{de,en}}.gz']" for name, file in (("train", "train"), ("validation", "val"))
    ]
    common = [sys.executable, str(ROOT / "bigtx" / "finetune.py"), str(ROOT / "configs" / "finetune" / "multi30k.yaml")]
    common += [f"tokenizer={arguments.tokenizer}", *data, "track.wandb=off"]
    with tempfile.TemporaryDirectory() as scratch:
        unmeasured = ["data.validation=[]", "data.validation_fraction=0", "data.test=[]", "train.log_every=20 steps"]
        _run([*common, *unmeasured, *_length(40), f"run_dir={scratch}/trial"])
        last = _lines(Path(scratch, "trial"))[-1]
        # Validation during the run takes a part of the time.
        steps = max(20, int(0.95 * 60 * arguments.minutes * last["perf/tokens_per_second"] * 40 / last["tokens"]))
        run = Path(scratch, "run")
        _run([*common, *_length(steps), f"data.test=['{folder}/{TEST}.{{de,en}}.gz']", f"run_dir={run}"])
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        lines = [line for line in _lines(run) if "train/loss" in line]
    # The time counts from the first step; the first line is some steps later.
    seconds = (lines[-1]["time"] - lines[0]["time"]) * steps / max(1, steps - lines[0]["step"])
    return {
        "steps": steps,
        "seconds": seconds,
        "validation": results["validation"]["bleu"],
        "test": results["test"]["bleu"],
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def _length(steps: int) -> list[str]:
    return ["train.epochs=null", f"train.max_steps={steps}"]


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def all_arms(arguments: argparse.Namespace) -> None:
    """Run each arm in its own process, several at once, each on its share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [set(cores[place :: arguments.at_once]) for place in range(arguments.at_once)]
    waiting, running, found = list(arguments.arms), dict[int, tuple[str, subprocess.Popen[str]]](), dict[str, Any]()
    minutes = arguments.minutes
    try:
        while waiting or running:
            # The true time of bigtx is known when it has ended; the others get at least as much.
            alone = any(name == "bigtx" for name, _ in running.values())
            for place, share in enumerate(shares):
                if place not in running and waiting and not alone:
                    name = waiting.pop(0)
                    running[place] = (name, _start(name, share, minutes))
                    alone = name == "bigtx"
            for place, (name, process) in list(running.items()):
                if process.poll() is not None:
                    output = process.stdout.read() if process.stdout else ""
                    if process.returncode:
                        sys.exit(f"{name} failed: {output}")
                    found[name] = json.loads(output.splitlines()[-1])
                    shown = ", ".join(f"{key} {_shown(value)}" for key, value in found[name].items())
                    print(f"{name}: {shown}", flush=True)
                    if name == "bigtx":
                        minutes = max(minutes, found[name]["seconds"] / 60)
                    del running[place]
            time.sleep(0.5)
    finally:
        for _, process in running.values():
            process.terminate()
    others = [result["test"] for name, result in found.items() if name != "bigtx"]
    if "bigtx" in found and others:
        found["ratio to the best other"] = found["bigtx"]["test"] / max(others)
    print(json.dumps({"torch": torch.__version__, "cores": len(cores), "minutes": arguments.minutes, **found}))


def _start(name: str, share: set[int], minutes: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--minutes", str(minutes), "--arm", name],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(len(share))},
        preexec_fn=lambda: os.sched_setaffinity(0, share),
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("tokenizer")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, for each arm (and rate)")
    parser.add_argument("--arms", nargs="+", default=["bigtx", *SIZES], choices=["bigtx", *SIZES])
    parser.add_argument("--at-once", type=int, default=1, help="arms side by side, each on its share of the cores")
    parser.add_argument("--rates", nargs="+", type=float, help="peak rates of Adam to try instead of each size's own")
    parser.add_argument("--schedule", choices=["linear", "article"], default="linear")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm is None:
        all_arms(arguments)
    else:
        result = bigtx_arm(arguments) if arguments.arm == "bigtx" else plain_arm(arguments, arguments.arm)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
