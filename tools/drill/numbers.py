"""Faults of numbers: losses that are not finite, a loss spike, a flipped bit of a parameter."""

from __future__ import annotations

import itertools
import json

from doors import losses, same_weights

from drill.catalogue import fault
from drill.scene import Scene, Training, expect

BATCH = 8
"""Sequences of a step."""
NAN_AT = 6


def _step(number: int) -> list[int]:
    """Return the sequences of a step: the first, and the first of the next step."""
    return [(number - 1) * BATCH, number * BATCH]


@fault(
    18,
    "nan",
    "all ranks skip the step together; it is logged; weights and optimizer states are unchanged",
    fast=True,
    matrix=True,
)
def nan(scene: Scene) -> str:
    """NaN on one rank, at every ZeRO stage, in bf16 and fp32."""
    cases = [(f"engine.zero_stage={a}", f"engine.precision={b}") for a, b in itertools.product(range(4), PRECISIONS)]
    tried: list[tuple[str, ...]] = [()] if scene.is_matrix else list(cases)
    if scene.is_fast:
        tried = [("engine.zero_stage=0", "engine.precision=fp32"), ("engine.zero_stage=2",)]
    for changes in tried:
        run = scene.training(*changes, "train.checkpoint_every=1 steps", f"train.max_steps={NAN_AT}")
        run.injected = {"rank": 1, "loud": [*_step(NAN_AT), float("nan")]}
        run.run().refused("the run is not finished")
        name = " ".join(changes)
        skipped = [event["step"] for event in run.events("skipped_step")]
        expect(skipped == [NAN_AT], f"{name}: skipped steps are {skipped}")
        first, second = (_hashes(run, step) for step in (NAN_AT - 1, NAN_AT))
        expect(first == second, f"{name}: the weights have changed")
    return f"{len(tried)} of {len(tried)} stages and precisions: skipped by all ranks, weights unchanged"


PRECISIONS = ("bf16", "fp32")
"""Those of a CPU."""


def _hashes(run: Training, step: int) -> dict[str, str]:
    path = run.run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    return {name: entry["sha256"] for name, entry in json.loads(path.read_text())["files"].items()}


@fault(
    19,
    "loss-spike",
    "the run returns to the previous checkpoint and skips that window of the data, a bounded number of times; each "
    "part of it is logged",
)
def loss_spike(scene: Scene) -> str:
    """A loss spike of two steps, which one window of the data causes."""
    guards = ("guards.window=8", "guards.spike=roll_back", "guards.patience=2", "guards.max_roll_backs=2")
    run = scene.training(*guards, "schedule.warmup=0 steps")
    run.injected = {"loud": [_step(13)[0], _step(14)[1], 3.0]}
    run.run().succeeded()
    spikes = [event["step"] for event in run.events("spike")]
    returns = [(event["step"], event["checkpoint"], event["skipped_sequences"]) for event in run.events("roll_back")]
    expect(spikes == [13, 14], f"spikes: {spikes}")
    expect(returns == [(14, "step-00000010", "80-112")], f"returns: {returns}")
    skipped = scene.training(*guards, "schedule.warmup=0 steps", "data.skip=[80-112]")
    check_same(run, skipped)
    forever = scene.training(*guards, "schedule.warmup=0 steps")
    forever.injected = {"loud": [_step(13)[0], 10_000, 3.0]}
    forever.run().refused("guards.max_roll_backs allows no more")
    return "back to step 10, the data of 13 and 14 are skipped as by data.skip; a spike that never ends ends the run"


@fault(
    20,
    "bit-flip",
    "found by the periodic hash across ranks, the rank is named; after the return to the previous checkpoint nothing "
    "is lost",
)
def bit_flip(scene: Scene) -> str:
    """One bit of a parameter flipped on one replica."""
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "bf16")):
        changes = (f"engine.zero_stage={stage}", f"engine.precision={precision}")
        run = scene.training(*changes, "guards.verify_replicas_every=1 steps")
        run.injected = {"flip": [1, 13, "embedding.weight"]}
        end = run.run().succeeded()
        (event,) = run.events("roll_back")
        expect("rank 1 (" in event["why"] and event["why"] in end.out, f"stage {stage}: {event['why']}; {end.tail()}")
        check_same(run, scene.training(*changes))
    return "rank 1 and the parameter are named at stages 0, 1 and 2; nothing lost"


def check_same(run: Training, other: Training) -> None:
    """Check that a run which returned to a checkpoint has the losses and the weights of an unbroken one."""
    reference = run.scene.reference(other)
    expect(losses(run.run_dir) == losses(reference), "other losses than the unbroken run")
    same_weights(run.run_dir, reference)


@fault(
    49,
    "nan-streak",
    "no good checkpoint is pruned in the streak; the run ends with an error; it resumes from the last good one",
    fast=True,
)
def nan_streak(scene: Scene) -> str:
    """A streak of steps that are not finite, across several saves."""
    from bigtx.engine.checkpoint import is_suspect, read_manifest

    run = scene.training("train.max_skipped_steps=100", "train.max_steps=40")
    run.injected = {"rank": 1, "loud": [_step(21)[0], 10_000, float("nan")]}
    run.run().refused("the run is not finished")
    good = [path.name for path in run.checkpoints() if not is_suspect(read_manifest(path))]
    expect(good == ["step-00000015", "step-00000020"], f"good checkpoints after the streak: {good}")
    end = run.resume()
    expect("step-00000020 is used" in end.out, end.tail())
    expect(list(losses(run.run_dir)) == list(range(1, 41)), "steps are missing or twice in metrics.jsonl")
    run.check_nothing_lost(20)
    run.check_whole()
    return "both good checkpoints are kept, status 2; resumed from step 20 without the fault, nothing is lost"
