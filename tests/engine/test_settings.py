"""What the engine's settings do: precision, averages of the weights, offload, recomputation, compilation.

Starting processes takes longer than these engines do, so each test file starts them once for many scenarios.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.ranks import check_parity, run_ranks

from bigtx.config.schema import EngineConfig, FinetuneConfig, PretrainConfig
from bigtx.engine.engine import compiles

pytestmark = pytest.mark.dist

RECOMPUTATIONS = ("none", "selective", "full")


def overflowing(stage: int) -> dict[str, Any]:
    """fp16 whose loss scale begins too high and is tried higher every three steps: overflows come again and again."""
    scale = {"initial_scale_power": 20, "loss_scale_window": 3}
    return {"stage": stage, "precision": "fp16", "deepspeed": {"fp16": scale}}


def fp16_scenarios(folder: Path, stages: tuple[int, ...]) -> dict[str, Any]:
    scenarios: dict[str, Any] = {}
    for stage in stages:
        case, run = overflowing(stage), str(folder / f"fp16-{stage}")
        scenarios[f"save {stage}"] = ["save", {"case": case, "folder": run, "before": 8, "after": 6}]
        others = [case, {"stage": stage, "precision": "bf16"}]
        scenarios[f"resume {stage}"] = ["resume", {"cases": others, "folders": [run] * 2, "before": 8, "after": 6}]
        # The scale doubles before the second step: its gradient must be divided by the scale that it was made with.
        growing = {"fp16": {"initial_scale_power": 8, "loss_scale_window": 1}}
        cases = [
            {"stage": stage, "precision": "fp16", "clipping": 0.0, "deepspeed": growing},
            {"stage": stage, "precision": "fp32", "clipping": 0.0},
        ]
        scenarios[f"growth {stage}"] = ["train", {"cases": cases, "steps": 3}]
    return scenarios


def check_fp16(answers: dict[str, Any], stage: int) -> None:
    saved, (resumed, as_bf16) = answers[f"save {stage}"], answers[f"resume {stage}"]
    assert saved["losses"][0] > saved["losses"][-1]
    assert True in saved["skipped"][-2:], "no overflow shortly before the save: the test tests nothing"
    assert True in saved["skipped_later"] and False in saved["skipped_later"]
    assert resumed["equal"]
    assert resumed["later"] == saved["later"]
    assert resumed["skipped_later"] == saved["skipped_later"]
    first, expected = float.fromhex(as_bf16["later"][0]), float.fromhex(saved["later"][0])
    assert as_bf16["equal"] and abs(first - expected) < 5e-3
    assert not any(as_bf16["skipped_later"])
    growing, plain = answers[f"growth {stage}"]
    assert growing["scale"]["cur_scale"] == 2**10
    assert growing["mean_gradient"] == pytest.approx(plain["mean_gradient"], rel=0.01)


def recomputing(stages: tuple[int, ...], dropouts: tuple[float, ...], **fields: Any) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "dropout": dropout, "recompute": recompute, "accumulation": 2, **fields}
        for stage, dropout, recompute in itertools.product(stages, dropouts, RECOMPUTATIONS)
    ]


def check_recomputation(answers: list[dict[str, Any]]) -> None:
    count = len(RECOMPUTATIONS)
    for keep, *recompute in (answers[start : start + count] for start in range(0, len(answers), count)):
        for answer in recompute:
            assert answer["losses"] == pytest.approx(keep["losses"], abs=1e-6)
            assert answer["mean_gradient"] == pytest.approx(keep["mean_gradient"], rel=1e-5)


def averaging(*cases: tuple[int, str]) -> list[Any]:
    fields = [{"stage": stage, "optimizer": optimizer, "ema": 0.8} for stage, optimizer in cases]
    return ["average", {"cases": fields, "steps": 4}]


def offloading(*cases: tuple[int, str, str]) -> list[Any]:
    """(stage, precision, optimizer); the parameters too at stage 3."""
    fields = [
        {
            "stage": stage,
            "precision": precision,
            "optimizer": optimizer,
            "accumulation": 2,
            "offload": True,
            "offload_parameters": stage == 3,
        }
        for stage, precision, optimizer in cases
    ]
    return ["parity", {"cases": fields, "steps": 8}]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the quick tests look at."""
    folder = tmp_path_factory.mktemp("settings")
    offloaded = {"stage": 3, "offload": True, "offload_parameters": True}
    scenarios = {
        "start": ["start_within", {"mebibytes": 150}],
        **fp16_scenarios(folder, (1,)),
        "average": averaging((0, "adamw"), (3, "muon")),
        "evaluate": ["evaluate", {"cases": [{"stage": stage, "dropout": 0.2, "accumulation": 2} for stage in (0, 3)]}],
        "seeds": ["train", {"cases": [{"stage": 1, "dropout": 0.2, "seed": seed} for seed in (1, 1, 2)], "steps": 1}],
        "recompute": ["train", {"cases": recomputing((1, 3), (0.2,)), "steps": 2}],
        "offload": offloading((1, "fp32", "muon"), (3, "bf16", "adamw")),
        "save offloaded": ["save", {"case": offloaded, "folder": str(folder / "off"), "before": 2, "after": 3}],
        "resume offloaded": [
            "resume",
            {"cases": [offloaded, {"stage": 2}], "folders": [str(folder / "off")] * 2, "before": 2, "after": 3},
        ],
    }
    return run_ranks(folder, 2, "several", scenarios=scenarios)


def test_no_rank_ever_holds_a_sharded_model_whole(answers: dict[str, Any]) -> None:
    """Of two ranks each needs half of it, and one parameter more at a time."""
    assert answers["start"]["numel"] * 4 > 180 * 2**20
    assert "can't allocate memory" in answers["start"]["in one piece"]


def test_fp16_skips_overflows_and_resumes_exactly(answers: dict[str, Any]) -> None:
    check_fp16(answers, 1)


def test_the_average_of_the_weights_is_what_it_says(answers: dict[str, Any]) -> None:
    assert max(answers["average"]) < 1e-6


def test_validation_is_a_plain_forward_over_all_ranks_labels(answers: dict[str, Any]) -> None:
    """Rows have fewer and fewer labels, so that a rank's share is not half of all."""
    assert len(answers["evaluate"]) == 2
    for answer in answers["evaluate"]:
        assert answer["num_labels"] == 8 * 32 - 2 * sum(range(8))
        assert answer["loss_sum"] == pytest.approx(answer["expected"], rel=1e-6)


def test_what_is_dropped_follows_from_the_runs_seed(answers: dict[str, Any]) -> None:
    (one,), (again,), (other,) = (answer["losses"] for answer in answers["seeds"])
    assert one == again and abs(one - other) > 1e-4


def test_recomputation_changes_nothing(answers: dict[str, Any]) -> None:
    check_recomputation(answers["recompute"])


def test_offload_changes_nothing_and_is_saved(answers: dict[str, Any]) -> None:
    check_parity(answers["offload"], least_fall=0.2)
    same, elsewhere = answers["resume offloaded"]
    assert same["equal"] and elsewhere["equal"]
    assert same["later"] == answers["save offloaded"]["later"]


@pytest.mark.slow
def test_fp16_at_the_other_stages(tmp_path: Path) -> None:
    answers = run_ranks(tmp_path, 2, "several", scenarios=fp16_scenarios(tmp_path, (2, 3)))
    for stage in (2, 3):
        check_fp16(answers, stage)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_combination(tmp_path: Path, world_size: int) -> None:
    scenarios = {
        "average": averaging(*itertools.product((0, 1, 2, 3), ("adamw", "muon"))),
        "recompute": ["train", {"cases": recomputing((0, 1, 2, 3), (0.0, 0.2)), "steps": 4}],
        "recompute bf16": ["train", {"cases": recomputing((1, 3), (0.2,), precision="bf16"), "steps": 4}],
        "offload": offloading(*itertools.product((1, 2, 3), ("fp32", "bf16"), ("adamw", "muon"))),
    }
    answers = run_ranks(tmp_path, world_size, "several", scenarios=scenarios)
    assert max(answers["average"]) < 1e-6
    check_recomputation(answers["recompute"])
    check_recomputation(answers["recompute bf16"])
    check_parity(answers["offload"], least_fall=0.2)


@pytest.mark.parametrize("choice", ["auto", "true", "false"])
def test_auto_compiles_pretraining_on_a_gpu(choice: Any) -> None:
    found = {
        (kind, device): compiles(schema(engine=EngineConfig(compile=choice)), torch.device(device))
        for kind, schema in (("pretrain", PretrainConfig), ("finetune", FinetuneConfig))
        for device in ("cpu", "cuda")
    }
    expected = {"auto": {("pretrain", "cuda")}, "true": set(found), "false": set()}[choice]
    assert {case for case, is_compiled in found.items() if is_compiled} == expected


@pytest.mark.slow
def test_compiled_blocks_train_as_plain_ones(tmp_path: Path) -> None:
    stages = ((0, "none"), (1, "full"), (2, "selective"), (3, "none"), (3, "selective"))
    cases = [
        {"stage": stage, "recompute": recompute, "accumulation": 2, "compile": compiled}
        for (stage, recompute), compiled in itertools.product(stages, (False, True))
    ]
    scenarios: dict[str, Any] = {"train": ["train", {"cases": cases, "steps": 5}]}
    for stage in (1, 3):
        case, folder = {"stage": stage, "compile": True, "dropout": 0.1, "ema": 0.9}, str(tmp_path / str(stage))
        scenarios[f"save {stage}"] = ["save", {"case": case, "folder": folder, "before": 3, "after": 4}]
        scenarios[f"resume {stage}"] = ["resume", {"cases": [case], "folders": [folder], "before": 3, "after": 4}]
    answers = run_ranks(tmp_path, 2, "several", scenarios=scenarios)
    for plain, compiled in zip(answers["train"][::2], answers["train"][1::2], strict=True):
        assert compiled["losses"] == pytest.approx(plain["losses"], abs=2e-5)
        assert compiled["mean_gradient"] == pytest.approx(plain["mean_gradient"], rel=1e-3)
    for stage in (1, 3):
        (resumed,) = answers[f"resume {stage}"]
        assert resumed["equal"] and resumed["later"] == answers[f"save {stage}"]["later"]
