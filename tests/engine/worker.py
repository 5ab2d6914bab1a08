"""One rank of the engine tests: `deepspeed worker.py OUT.json SCENARIO ARGUMENTS_AS_JSON`. Rank 0 writes the answer."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from device import asynchronous_device
from engines import (
    LARGE_MODEL,
    Case,
    RowsTask,
    global_batch,
    initial_read,
    plain_loop,
    run_engine,
    slice_of_rank,
    whole_parameters,
)

from bigtx.engine import checkpoint, optimizers, retention
from bigtx.engine.checkpoint import list_checkpoints
from bigtx.engine.engine import Engine
from bigtx.engine.ranks import Ranks
from bigtx.engine.retention import Policy
from bigtx.engine.saving import Saver, save_frozen
from bigtx.model.transformer import Transformer
from bigtx.train.start import set_states


def parity(ranks: Ranks, cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Each case's greatest difference from the plain loop, which equal cases share."""
    answers = []
    known: dict[str, tuple[dict[str, torch.Tensor], list[float]]] = {}
    for fields in cases:
        case = Case(**fields)
        engine, losses, skipped = run_engine(case, ranks, steps)
        weights = whole_parameters(engine, ranks)
        plain = repr(case.plain())
        if ranks.rank == 0 and plain not in known:
            known[plain] = plain_loop(case.plain(), steps, engine.device)
        masters, expected = known.get(plain, ({}, []))
        answers.append(
            {
                **fields,
                "device": engine.device.type,
                "skipped": any(skipped),
                "loss": max((abs(a - b) for a, b in zip(losses, expected, strict=False)), default=0.0),
                "weights": max((float((weights[name] - masters[name]).abs().max()) for name in masters), default=0.0),
                "same_names": set(weights) == set(masters),
                "fell": losses[0] - losses[-1],
            }
        )
        engine.deepspeed.destroy()
    return answers


def save(ranks: Ranks, case: dict[str, Any], folder: str, before: int, after: int) -> dict[str, Any]:
    """Train, save, go on as if nothing had happened; then return to the checkpoint and do the first of that again."""
    engine, losses, skipped = run_engine(Case(**case), ranks, before)
    Path(folder).mkdir(exist_ok=True)
    if engine.frozen:
        save_frozen(engine, ranks, Path(folder), initial_read(engine, engine.config))
    saver = Saver(engine, ranks, Path(folder), Policy(2))
    saver.save({"step": before})
    _, later, skipped_later = run_engine(Case(**case), ranks, after, start=before, engine=engine)
    saver.wait()
    path = list_checkpoints(folder)[0]
    set_states(engine, checkpoint.Checkpoint(path))
    _, again, _ = run_engine(Case(**case), ranks, min(2, after), start=before, engine=engine)
    assert again == later[:2], f"{case}: {again} after the return, {later[:2]} before"
    engine.deepspeed.destroy()
    return {
        "checkpoint": str(path),
        "losses": losses,
        "later": [loss.hex() for loss in later],
        "skipped": skipped,
        "skipped_later": skipped_later,
    }


def resume(
    ranks: Ranks, cases: list[dict[str, Any]], folders: list[str], before: int, after: int
) -> list[dict[str, Any]]:
    """Load each folder's checkpoint into an engine of the case and train on."""
    answers = []
    for fields, folder in zip(cases, folders, strict=True):
        case = Case(**fields)
        config = case.config(ranks.world_size)
        opened = retention.choose(Path(folder), ranks, print)
        assert opened is not None
        engine = Engine(config, lambda config=config: Transformer(config.model))
        with mock.patch.object(checkpoint, "safe_open", wraps=checkpoint.safe_open) as open_file:
            engine.fill(opened.read, states=True)
        files = ranks.gather([Path(call.args[0]).name for call in open_file.call_args_list])
        engine.optimizer.num_updates = opened.manifest["num_updates"]
        engine.set_loss_scale(opened.manifest["loss_scale"])
        engine.set_expert_counts(opened.manifest["expert_counts"])
        equal = True
        kinds = sorted(
            {
                kind
                for group in range(len(engine.optimizer.param_groups))
                for kind in engine.optimizer.state_kinds(group)
            }
        )
        for kind in ["master", *kinds]:
            for name, value in whole_parameters(engine, ranks, kind).items():
                equal &= torch.equal(value.view(-1), opened.read(name, kind, 0, value.numel()))
        _, later, skipped = run_engine(case, ranks, after, start=before, engine=engine)
        losses = [loss.hex() for loss in later]
        answers.append({"kinds": kinds, "equal": equal, "files": files, "later": losses, "skipped_later": skipped})
        engine.deepspeed.destroy()
    return answers


def train(ranks: Ranks, cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Each case's losses, which steps were skipped, and the loss scale and AdamW's mean gradient at the end."""
    answers = []
    for fields in cases:
        engine, losses, skipped = run_engine(Case(**fields), ranks, steps)
        mean = whole_parameters(engine, ranks, "exp_avg").values()
        norm = float(torch.stack([part.norm() for part in mean]).norm())
        answers.append({"losses": losses, "skipped": skipped, "scale": engine.loss_scale(), "mean_gradient": norm})
        engine.deepspeed.destroy()
    return answers


def average(ranks: Ranks, cases: list[dict[str, Any]], steps: int) -> list[float]:
    """Each case's greatest difference between the kept average and one computed from the weights after each step."""
    answers = []
    for fields in cases:
        case = Case(**fields)
        assert case.ema is not None
        engine, _, _ = run_engine(case, ranks, 0)
        expected = whole_parameters(engine, ranks)
        for step in range(steps):
            run_engine(case, ranks, 1, start=step, engine=engine)
            for name, weight in whole_parameters(engine, ranks).items():
                expected[name] = case.ema * expected[name] + (1 - case.ema) * weight
        kept = whole_parameters(engine, ranks, "ema")
        answers.append(max(float((kept[name] - expected[name]).abs().max()) for name in expected))
        engine.deepspeed.destroy()
    return answers


def against_deepspeed(ranks: Ranks, cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Each case's losses with our reduction and with DeepSpeed's, and whether the weights are equal to the last bit."""
    answers = []
    for fields in cases:
        engine, losses, _ = run_engine(Case(**fields), ranks, steps)
        weights = whole_parameters(engine, ranks)
        engine.deepspeed.destroy()
        case = Case(**fields, overlap=False)  # Without the engine's hooks.
        engine, _, _ = run_engine(case, ranks, 0)
        del engine.deepspeed.allreduce_gradients, engine.deepspeed.optimizer.step
        engine.reduction = None
        _, expected, _ = run_engine(case, ranks, steps, engine=engine)
        others = whole_parameters(engine, ranks)
        engine.deepspeed.destroy()
        equal = all(torch.equal(weights[name], others[name]) for name in others)
        answers.append({"losses": losses, "expected": expected, "equal": equal})
    return answers


def reductions(ranks: Ranks, cases: list[dict[str, Any]], without: str) -> list[dict[str, Any]]:
    """What a step reduces, and when, by its trace.

    Args:
        without: a parameter that has no gradient on the last rank.
    """
    answers = []
    for fields in cases:
        case = Case(**fields)
        engine, _, _ = run_engine(case, ranks, 1)
        parameter = dict(engine.module.named_parameters())[without]
        sent: list[tuple[str, int]] = []
        original = optimizers._reduce_scatter

        def recording(part: Any, whole: Any, sent: Any = sent, do: Any = original, **named: Any) -> Any:
            sent.append((str(whole.dtype), whole.numel()))
            return do(part, whole, **named)

        optimizers._reduce_scatter = recording
        parameter.requires_grad_(ranks.rank < ranks.world_size - 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            run_engine(case, ranks, 1, start=1, engine=engine)
        optimizers._reduce_scatter = original
        parameter.requires_grad_(True)
        begins = {
            what: [event.time_range.start for event in trace.events() if what in event.name]
            for what in ("c10d::_reduce_scatter_base_", "AccumulateGrad")
        }
        answers.append(
            {
                "sent": ranks.gather(sent),
                "groups": len(engine.optimizer.param_groups),
                "before the last gradient": ranks.gather(
                    sum(begin < max(begins["AccumulateGrad"]) for begin in begins["c10d::_reduce_scatter_base_"])
                ),
                "names": sorted(
                    {event.name for event in trace.events() if "c10d" in event.name or "gloo" in event.name}
                ),
                "numel": sum(fragment.numel for fragment in engine.fragments),
            }
        )
        engine.deepspeed.destroy()
    return answers


def evaluate(ranks: Ranks, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each case's sums over a global batch that the ranks share, and a plain forward's over the whole of it, with the
    dropout of training where an engine has just trained."""
    answers = []
    for fields in cases:
        case = Case(**fields)
        engine, _, _ = run_engine(case, ranks, 1)
        engine.fill(initial_read(engine, engine.config), states=False)
        batch, share = global_batch(3), slice_of_rank(global_batch(3), ranks.rank, ranks.world_size, case.accumulation)
        loss_sum, num_labels = engine.evaluate(share, RowsTask())
        plain = Transformer(engine.config.model)
        plain.init_weights(1)
        with torch.no_grad():
            logits = plain.eval()(batch.tokens)
            expected = F.cross_entropy(logits.double().flatten(0, 1), batch.labels.flatten(), reduction="sum")
        answers.append({"loss_sum": loss_sum, "num_labels": num_labels, "expected": float(expected)})
        engine.deepspeed.destroy()
    return answers


def start_within(ranks: Ranks, mebibytes: int) -> dict[str, Any]:
    """Make a large model at stage 3 in so much more memory than the process holds; then try its weights in one piece.

    To be asked of a young process: later ones hold freed memory, which can be used again.
    """
    config = dataclasses.replace(Case(stage=3).config(ranks.world_size), model=LARGE_MODEL)
    engine = Engine(config, lambda: within(mebibytes, lambda: Transformer(config.model)))
    numel = sum(torch.Size(parameter.ds_shape).numel() for parameter in engine.module.parameters())
    engine.deepspeed.destroy()
    try:
        within(mebibytes, lambda: torch.empty(numel))
    except RuntimeError as error:
        return {"numel": numel, "in one piece": str(error)}
    return {"numel": numel, "in one piece": "fits"}


def within(mebibytes: int, action: Callable[[], Any]) -> Any:
    """Act with a limit on what the process may hold beyond what it holds already."""
    held = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert held
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held[1]) * 1024 + mebibytes * 2**20, before[1]))
    try:
        return action()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def several(ranks: Ranks, scenarios: dict[str, list[Any]]) -> dict[str, Any]:
    """Label -> answer of one of the scenarios, given as [name, parameters]: processes start but once."""
    return {label: SCENARIOS[name](ranks, **parameters) for label, (name, parameters) in scenarios.items()}


def poison(ranks: Ranks, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A NaN on the last rank at step 2, then a refused update: what they do to the weights."""
    answers = []
    for fields in cases:
        case = Case(**fields)
        engine, _, first = run_engine(case, ranks, 2)
        before = whole_parameters(engine, ranks)
        poisoned = {2: ranks.world_size - 1}
        asked: list[tuple[float, float]] = []

        def refuses(loss: float, norm: float, asked: list[tuple[float, float]] = asked) -> bool:
            asked.append((loss, norm))
            return True

        _, _, nan = run_engine(case, ranks, 1, start=2, engine=engine, poison=poisoned, refuses=refuses)
        asked_of_nan = len(asked)
        _, refused_losses, refused = run_engine(case, ranks, 1, start=2, engine=engine, refuses=refuses)
        after = whole_parameters(engine, ranks)
        updates = engine.optimizer.num_updates
        _, losses, later = run_engine(case, ranks, 2, start=3, engine=engine)
        answers.append(
            {
                "skipped": ranks.gather((nan, refused)) == [([True], [True])] * ranks.world_size,
                "asked": asked_of_nan == 0 and len(asked) == 1 and 0 < asked[0][1] < 100,
                "same_loss": asked[0][0] == refused_losses[0] and len(set(ranks.gather(asked[0]))) == 1,
                "unchanged": all(torch.equal(before[name], after[name]) for name in before),
                "updates": updates,
                "finite_after": all(loss == loss for loss in losses),
                "skipped_others": any(first + later),
            }
        )
        engine.deepspeed.destroy()
    return answers


def cores(ranks: Ranks) -> list[list[int]]:
    """The cores that each rank may use."""
    return ranks.gather(sorted(os.sched_getaffinity(0)))


def waits(ranks: Ranks, cases: list[dict[str, Any]]) -> list[dict[str, dict[str, int]]]:
    """How often, and where, one step of each case waits for a device whose work is asynchronous, and reads its values.
    DeepSpeed's timer would begin to wait at the third step."""
    answers = []
    for fields in cases:
        with asynchronous_device() as found:
            engine, _, _ = run_engine(Case(**fields), ranks, 3)
            found.clear()
            run_engine(Case(**fields), ranks, 1, start=3, engine=engine)
            answers.append({"waits": dict(found.waits), "reads": dict(found.reads)})
            engine.deepspeed.destroy()
    return answers


def agree(ranks: Ranks) -> dict[str, Any]:
    """What ranks make of values of their own."""
    rank = ranks.rank
    done = ranks.on_first(lambda: f"done by {rank}")
    begun = ranks.begin_sum([rank, 7])
    between = ranks.sum([5])
    return {
        "begun before": ranks.gather(begun() + between),
        "sums": ranks.gather(ranks.sum([rank + 1, 10, 2**40])),
        "gathered": ranks.gather(ranks.gather({"rank": rank})),
        "first": ranks.gather(ranks.from_first(f"of {rank}")),
        "on first": ranks.gather(done),
    }


def time_outs(ranks: Ranks, cases: list[dict[str, Any]]) -> list[float]:
    """The seconds that collectives wait in each process group, DeepSpeed's included, once engines have trained."""
    for fields in cases:
        engine, _, _ = run_engine(Case(**fields), ranks, 1)
        engine.deepspeed.destroy()
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


SCENARIOS: dict[str, Any] = {
    function.__name__: function
    for function in (
        parity,
        train,
        average,
        against_deepspeed,
        reductions,
        evaluate,
        save,
        resume,
        poison,
        start_within,
        several,
        cores,
        waits,
        agree,
        time_outs,
    )
}


def allow_fp16_on_cpu() -> None:
    """DeepSpeed refuses fp16 where the CPU has no instructions for it, but torch computes it all the same."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True


def main() -> None:
    """Run one scenario."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    out, scenario, parameters = arguments[0], arguments[1], json.loads(arguments[2])
    torch.set_num_threads(1)
    ranks = Ranks(timeout_seconds=300)
    allow_fp16_on_cpu()
    answer = SCENARIOS[scenario](ranks, **parameters)
    if ranks.rank == 0:
        Path(out).write_text(json.dumps(answer), encoding="utf-8")
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    main()
