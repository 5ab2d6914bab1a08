"""The engine against a plain torch loop, and its checkpoints against themselves: real ranks, many engines a process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.ranks import OPTIMIZERS, PRECISIONS, STAGES, Saved, cases, check_parity, run_ranks

from bigtx.engine import checkpoint
from bigtx.engine.engine import Engine
from bigtx.engine.trainable import PART_MULTIPLE
from bigtx.utils.errors import CheckpointError

LEAST_FALL = 0.05
"""Of the loss in three steps. The slow tests make ten."""


@pytest.mark.dist
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 4)])
def test_parity_with_a_plain_loop(tmp_path: Path, world_size: int, accumulation: int) -> None:
    check_parity(run_ranks(tmp_path, world_size, "parity", cases=cases((accumulation,)), steps=3), LEAST_FALL)


@pytest.mark.dist
def test_ranks_and_micro_batches_change_rounding_alone(tmp_path: Path) -> None:
    """One rank with micro batches of 8 and of 2, and two ranks with those of 2; with dropout and with experts."""
    dropping = [{"stage": 1, "dropout": 0.2}, {"stage": 1, "shape": "experts"}]
    alone, cut, shared = ([case | {"accumulation": accumulation} for case in dropping] for accumulation in (1, 4, 2))
    on_one = run_ranks(tmp_path, 1, "train", cases=alone + cut, steps=8)
    on_two = run_ranks(tmp_path, 2, "train", cases=shared, steps=8)
    for expected, *others in zip(on_one[:2], on_one[2:], on_two, strict=True):
        assert expected["losses"][0] - expected["losses"][-1] > 0.1
        for other in others:
            assert other["losses"] == pytest.approx(expected["losses"], abs=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("precision", "optimizer"), [("fp32", "muon"), pytest.param("bf16", "adamw", marks=pytest.mark.slow)]
)
def test_parity_of_encoders_and_encoder_decoders_and_experts(tmp_path: Path, precision: str, optimizer: str) -> None:
    """Tied tables too: source and target go through one, the head is the same. Experts with the losses of routing.

    In bf16 with AdamW: under Muon's rate the roundings of an encoder-decoder grow within ten steps to 4e-3 of a loss
    that has fallen by 73 %.
    """
    tried: list[dict[str, Any]] = [
        {
            "stage": stage,
            "precision": precision,
            "accumulation": 2,
            "optimizer": optimizer,
            "shape": shape,
            "tied": True,
        }
        for stage, shape in itertools.product(STAGES, ("encoder", "encoder_decoder", "experts"))
    ]
    check_parity(run_ranks(tmp_path, 2, "parity", cases=tried, steps=3), LEAST_FALL)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parity_of_every_combination(tmp_path: Path, world_size: int) -> None:
    every = cases((1, 4 if world_size < 4 else 2))
    extra = [
        {"stage": stage, "precision": precision, "accumulation": 2, "optimizer": optimizer, "tied": True}
        for stage, precision, optimizer in itertools.product(STAGES, PRECISIONS, OPTIMIZERS)
    ]
    offloaded = [
        {"stage": stage, "precision": "bf16", "accumulation": 2, "optimizer": optimizer, "offload": True}
        for stage, optimizer in itertools.product((1, 2, 3), OPTIMIZERS)
    ]
    # The longest of these tests: after ten steps tied weights differ by up to 2.4e-5, from rounding alone.
    check_parity(run_ranks(tmp_path, world_size, "parity", cases=every + extra + offloaded, steps=10), slack=1.5)


STAGE_1: dict[str, Any] = {"stage": 1, "precision": "bf16"}


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_our_reduction_gives_what_deepspeed_s_gives(tmp_path: Path, world_size: int) -> None:
    """To the last bit without clipping: two ranks add in either order alike, and the factor between a mean and a sum is
    a power of two. Clipping divides where DeepSpeed multiplies, and takes the norm in another order."""
    tried = [STAGE_1 | {"optimizer": optimizer, "accumulation": 2} for optimizer in OPTIMIZERS]
    tried = [case | {"clipping": clipping} for case in tried for clipping in (0.0, 1e6, 0.5)]
    answers = run_ranks(tmp_path, world_size, "against_deepspeed", cases=tried, steps=4)
    for case, answer in zip(tried, answers, strict=True):
        if case["clipping"] == 0.5:
            assert answer["losses"] == pytest.approx(answer["expected"], abs=2e-3), case
            assert answer["losses"] != pytest.approx(answers[0]["losses"], abs=1e-4) or case["optimizer"] == "muon"
        else:
            assert answer["equal"] and answer["losses"] == answer["expected"], case


@pytest.mark.dist
def test_gradients_are_reduced_while_the_backward_pass_continues(tmp_path: Path) -> None:
    """A trace of two ranks shows collectives before the last gradient is complete. A rank on which a parameter has no
    gradient begins them in the same order."""
    raw = {"communication_data_type": "bf16"}
    tried = [STAGE_1 | {"accumulation": 2} | case for case in ({}, {"overlap": False}, {"deepspeed": raw})]
    without = "decoder.blocks.1.mlp.up.weight"
    overlapped, after, narrow = run_ranks(tmp_path, 2, "reductions", cases=tried, without=without)
    for answer in (overlapped, after, narrow):
        first, last = answer["sent"]
        assert first == last and len(first) == answer["groups"] > 5
        assert 2 * answer["numel"] <= sum(numel for _, numel in first)
        assert not any(numel % (2 * PART_MULTIPLE) for _, numel in first)
    assert all(2 < number < overlapped["groups"] for number in overlapped["before the last gradient"][:1]), overlapped
    assert after["before the last gradient"] == [0, 0]
    dtypes = [{dtype for dtype, _ in answer["sent"][0]} for answer in (overlapped, narrow)]
    assert dtypes == [{"torch.float32"}, {"torch.bfloat16"}]


@pytest.mark.dist
def test_parity_with_gradients_that_are_sent_in_16_bits(tmp_path: Path) -> None:
    raw = {"communication_data_type": "bf16"}
    tried = [STAGE_1 | {"optimizer": optimizer, "accumulation": 2, "deepspeed": raw} for optimizer in OPTIMIZERS]
    check_parity(run_ranks(tmp_path, 2, "parity", cases=tried, steps=3), LEAST_FALL)


PARTS: dict[str, dict[str, Any]] = {
    "adapters": {"rank": 4},
    "adapters and more": {
        "rank": 4,
        "train_also": ["*norm*", "decoder.blocks.1.mlp.up.*"],
        "freeze": ["*.0.*.adapter.?"],
    },
    "upper half": {"freeze": ["embedding.*", "decoder.blocks.0.*"], "layer_decay": 0.5},
    "lower half": {"freeze": ["decoder.blocks.1.*", "decoder.norm.*", "head.*"], "layer_decay": 0.5},
}
"""What is trained, where that is not all."""


def parts(optimizer: str, *, precision: str = "fp32", **fields: Any) -> list[dict[str, Any]]:
    case = {"accumulation": 2, "optimizer": optimizer, "precision": precision} | fields
    return [case | {"stage": stage} | part for stage, part in itertools.product(STAGES, PARTS.values())]


@pytest.mark.dist
def test_parity_where_parts_are_trained(tmp_path: Path) -> None:
    check_parity(run_ranks(tmp_path, 2, "parity", cases=parts("muon"), steps=3), least_fall=0.003)


@pytest.mark.slow
@pytest.mark.dist
def test_parity_where_parts_are_trained_in_every_combination(tmp_path: Path) -> None:
    tried = [*parts("adamw"), *parts("muon", precision="bf16"), *parts("adamw", precision="bf16", recompute="full")]
    tried += [
        {
            "stage": stage,
            "precision": "fp32",
            "optimizer": "adamw",
            "shape": shape,
            "rank": 4,
            "accumulation": 2,
            "tied": True,
        }
        | ({"freeze": ["encoder.*"]} if shape == "encoder_decoder" else {})
        for stage, shape in itertools.product(STAGES, ("encoder", "encoder_decoder", "experts"))
    ]
    tried += [
        {
            "stage": stage,
            "precision": "bf16",
            "optimizer": "adamw",
            "rank": 4,
            "offload": True,
            "offload_parameters": stage == 3,
        }
        for stage in (1, 2, 3)
    ]
    check_parity(run_ranks(tmp_path, 2, "parity", cases=tried, steps=3), least_fall=-0.01)


@pytest.mark.dist
def test_resume_of_adapters_with_other_ranks_and_stages(tmp_path: Path) -> None:
    saved = Saved(tmp_path, (1, 3), "fp32", ("adamw",), rank=4)
    for run in saved.runs.values():
        own = checkpoint.Checkpoint(checkpoint.newest(run["folder"]))
        assert own.frozen is not None and all(".adapter." in name for name in own.manifest["parameters"])
        assert own.kinds("embedding.weight") == ["master", "ema"]
    saved.check_resumed((1, 2), [(1, 1, "adamw"), (1, 0, "adamw"), (3, 1, "adamw"), (3, 3, "adamw"), (1, 2, "adamw")])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("part", PARTS)
def test_resume_of_parts_from_every_stage_to_every_stage(tmp_path: Path, part: str, precision: str) -> None:
    saved = Saved(tmp_path, STAGES, precision, ("adamw",), **PARTS[part])
    saved.check_resumed((1, 2), [(source, target, "adamw") for source, target in itertools.product(STAGES, STAGES)])


@pytest.mark.dist
def test_a_nan_on_one_rank_changes_no_weight(tmp_path: Path) -> None:
    poisoned = [
        {"stage": stage, "precision": precision, "optimizer": optimizer, "accumulation": 2}
        for stage, precision in itertools.product(STAGES, PRECISIONS)
        for optimizer in ("muon",)
    ]
    # With a loss scale at which nothing overflows.
    scale = {"fp16": {"initial_scale_power": 8}}
    poisoned += [{"stage": stage, "precision": "fp16", "deepspeed": scale} for stage in (1, 2, 3)]
    skipped = {"skipped": True, "asked": True, "same_loss": True}
    unharmed = {"unchanged": True, "updates": 2, "finite_after": True, "skipped_others": False}
    for case, answer in zip(poisoned, run_ranks(tmp_path, 2, "poison", cases=poisoned), strict=True):
        assert answer == skipped | unharmed, case


@pytest.mark.dist
def test_resume_with_other_ranks_and_stages(tmp_path: Path) -> None:
    saved = Saved(tmp_path, (1, 3), "fp32", ("muon",))
    saved.check_resumed((1, 2, 4), [(1, 1, "muon"), (1, 3, "muon"), (3, 0, "muon"), (3, 3, "muon"), (1, 2, "muon")])


@pytest.mark.slow
@pytest.mark.dist
def test_resume_of_experts_with_other_ranks_and_stages(tmp_path: Path) -> None:
    saved = Saved(tmp_path, (1, 3), "fp32", OPTIMIZERS, shape="experts")
    targets = itertools.product(((1, 1), (1, 3), (3, 0), (3, 2)), OPTIMIZERS)
    saved.check_resumed((1, 2), [(source, target, optimizer) for (source, target), optimizer in targets])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume_from_every_stage_to_every_stage(tmp_path: Path, precision: str) -> None:
    saved = Saved(tmp_path, STAGES, precision, OPTIMIZERS)
    saved.check_resumed((1, 2, 4), list(itertools.product(STAGES, STAGES, OPTIMIZERS)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint by two ranks."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(folder, 2, "save", case={"stage": 2, "precision": "bf16"}, folder=str(folder), before=1, after=1)
    return folder


@pytest.mark.dist
def test_a_checkpoint_is_read_without_deepspeed(written: Path) -> None:
    code = (
        "import sys; from bigtx.engine.checkpoint import load_weights, newest\n"
        f"weights = dict(load_weights(newest({str(written)!r})))\n"
        "assert 'deepspeed' not in sys.modules; print(*weights['embedding.weight'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["256", "64"]  # 200 ids, padded to a multiple of 128.


@pytest.mark.dist
def test_damage_is_found_before_anything_is_used(written: Path, tmp_path: Path) -> None:
    import random
    import shutil

    source = checkpoint.newest(written)
    generator = random.Random(1)
    files = [*sorted(checkpoint.Checkpoint(source).manifest["files"]), "manifest.json"]
    for attempt in range(200):
        copy = tmp_path / source.name
        shutil.copytree(source, copy)
        victim = copy / files[attempt % len(files)]
        content = bytearray(victim.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        victim.write_bytes(content)
        with pytest.raises(CheckpointError, match=victim.name):
            next(iter(checkpoint.load_weights(copy)))
        shutil.rmtree(copy)


@pytest.mark.dist
def test_an_unfinished_checkpoint_does_not_exist(written: Path, tmp_path: Path) -> None:
    import shutil

    source = checkpoint.newest(written)
    folder = tmp_path / "checkpoints"
    shutil.copytree(source, folder / "step-00000009.partial")
    shutil.copytree(source, folder / "step-00000008")
    (folder / "step-00000008" / "manifest.json").unlink()
    assert checkpoint.list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.newest(tmp_path)


def test_files_that_are_gone_are_named_in_their_order(tmp_path: Path) -> None:
    files = {f"rank-0000{rank}.safetensors": {"size": 1, "sha256": "0" * 64} for rank in (2, 0, 1)}
    checkpoint.write_manifest(tmp_path, {"format": 1, "step": 1, "parameters": {}, "files": files})
    with pytest.raises(CheckpointError, match=r"rank-00000.* is .*rank-00001.* is .*rank-00002.* is "):
        checkpoint.Checkpoint(tmp_path)


def test_checkpoints_on_a_disk_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(CheckpointError, match=r"checkpoints is a link to .*/disk, which is missing; mount that disk"):
        checkpoint.newest(tmp_path)


def test_a_pickle_in_place_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    import pickle

    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    payload = pickle.dumps(Malicious())
    (folder / "rank-00000.safetensors").write_bytes(payload)
    import hashlib

    digest = hashlib.sha256(payload).hexdigest()
    files = {"rank-00000.safetensors": {"size": len(payload), "sha256": digest}}
    checkpoint.write_manifest(folder, {"format": 1, "step": 1, "parameters": {"x": [1]}, "files": files})
    with pytest.raises(CheckpointError, match="safetensors"):
        next(checkpoint.load_weights(checkpoint.newest(tmp_path)))
    assert not canary.exists()


def test_the_forward_passes_of_a_step_take_as_long_as_its_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two recorded passes of 20 and 40 milliseconds, and four micro batches in a step."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    begun: Any = SimpleNamespace(elapsed_time=lambda milliseconds: milliseconds)
    engine: Any = SimpleNamespace(
        _forwards=[(begun, 20.0), (begun, 40.0)], deepspeed=SimpleNamespace(gradient_accumulation_steps=lambda: 4)
    )
    assert Engine.forward_seconds(engine) == pytest.approx(0.12)
    engine._forwards = []
    assert Engine.forward_seconds(engine) is None


def test_no_guard_is_asked_about_a_step_that_is_not_finite() -> None:
    """DeepSpeed keeps the norm of the step before where a gradient overflows."""
    optimizer = SimpleNamespace(_global_grad_norm=1.5, overflow=False)
    deepspeed = SimpleNamespace(optimizer=optimizer, step=lambda: None, get_global_grad_norm=lambda: 1.5)
    engine: Any = SimpleNamespace(
        replicated=False, reduction=None, deepspeed=deepspeed, optimizer=SimpleNamespace(refuses=None)
    )
    asked: list[tuple[float, float]] = []

    def refuses(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return True

    assert Engine._update(engine, refuses, False, torch.tensor(12.0), 4) == (1.5, True, True)
    assert asked == [(3.0, 1.5)]
    optimizer.overflow = True
    assert Engine._update(engine, refuses, False, torch.tensor(12.0), 4) == (1.5, False, False)
    assert len(asked) == 1
