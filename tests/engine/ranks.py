"""Running a scenario of worker.py on real ranks, and how close to the plain loop it must come."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import forks
from doors import environment

STAGES, PRECISIONS, OPTIMIZERS = (0, 1, 2, 3), ("fp32", "bf16"), ("adamw", "muon")
START = Path(__file__).with_name("start.py")

# fp32: sums in another order, over ten steps of AdamW, whose first steps move by the sign of a gradient however small.
# bf16: one rounding is 2^-9 of a value; a weight that rounds the other way moves activations by that much, and AdamW
# turns a gradient near zero around: up to 2 * learning_rate (1e-3) a step for single weights. Muon moves by 0.02 /
# sqrt(64) a step in bf16 arithmetic. A wrong gradient (unscaled, unreduced, unclipped) shows as 1e-2 or more.
LOSS_TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}
WEIGHT_TOLERANCE = {("fp32", "adamw"): 2e-5, ("fp32", "muon"): 2e-5, ("bf16", "adamw"): 1e-2, ("bf16", "muon"): 2e-2}


def run_ranks(tmp_path: Path, world_size: int, scenario: str, *, gpus: bool = False, **parameters: Any) -> Any:
    """A scenario of worker.py on so many ranks, on the CPU unless it is to use this machine's GPUs."""
    out = tmp_path / f"{scenario}-{world_size}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(START), str(world_size), str(out), scenario, json.dumps(parameters)]
    done = forks.run(command, capture_output=True, text=True, env=environment(gpus=gpus), timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(out.read_text(encoding="utf-8"))


def check_parity(answers: list[dict[str, Any]], least_fall: float = 0.3, slack: float = 1.0) -> None:
    """`slack` is a factor on the tolerances in fp32."""
    for answer in answers:
        precision, optimizer = answer["precision"], answer["optimizer"]
        factor = slack if precision == "fp32" else 1.0
        assert answer["same_names"] and not answer["skipped"], answer
        assert answer["loss"] <= factor * LOSS_TOLERANCE[precision], answer
        assert answer["weights"] <= factor * WEIGHT_TOLERANCE[precision, optimizer], answer
        assert answer["fell"] > least_fall, answer


def cases(accumulations: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every stage, precision and optimizer."""
    return [
        {"stage": stage, "precision": precision, "accumulation": accumulation, "optimizer": optimizer}
        for stage, precision, accumulation, optimizer in itertools.product(
            STAGES, PRECISIONS, accumulations, OPTIMIZERS
        )
    ]


class Saved:
    """Checkpoints of engines of one precision, one of each stage and optimizer, and the losses that followed."""

    BEFORE, AFTER = 3, 4  # Steps before a checkpoint and after it.

    def __init__(
        self,
        tmp_path: Path,
        stages: tuple[int, ...],
        precision: str,
        optimizers: tuple[str, ...],
        *,
        world_size: int = 2,
        gpus: bool = False,
        shape: str = "decoder",
        **fields: Any,
    ) -> None:
        """Args: fields: more of each `Case`."""
        self.tmp_path, self.precision, self.world_size, self.gpus = tmp_path, precision, world_size, gpus
        self.shape, self.fields = shape, fields
        self.runs = {
            (stage, optimizer): {
                "case": self.case(stage, optimizer, world_size),
                "folder": str(tmp_path / f"{stage}-{precision}-{optimizer}"),
                "before": self.BEFORE,
                "after": self.AFTER,
            }
            for stage, optimizer in itertools.product(stages, optimizers)
        }
        scenarios = {f"{stage} {optimizer}": ["save", run] for (stage, optimizer), run in self.runs.items()}
        self.answers = run_ranks(tmp_path, world_size, "several", gpus=gpus, scenarios=scenarios)

    def case(self, stage: int, optimizer: str, world_size: int) -> dict[str, Any]:
        case = {"stage": stage, "precision": self.precision, "optimizer": optimizer, "shape": self.shape}
        return case | {"ema": 0.9, "deterministic": True} | self.fields

    def check_resumed(self, world_sizes: tuple[int, ...], targets: list[tuple[int, int, str]]) -> None:
        """targets: (from stage, to stage, optimizer)."""
        for world_size in world_sizes:
            answers = run_ranks(
                self.tmp_path,
                world_size,
                "resume",
                gpus=self.gpus,
                before=self.BEFORE,
                after=self.AFTER,
                cases=[self.case(target, optimizer, world_size) for _, target, optimizer in targets],
                folders=[self.runs[source, optimizer]["folder"] for source, _, optimizer in targets],
            )
            for target, answer in zip(targets, answers, strict=True):
                self._check(world_size, *target, answer)

    def _check(self, world_size: int, source: int, target: int, optimizer: str, answer: dict[str, Any]) -> None:
        label = (world_size, source, target, optimizer)
        assert answer["equal"], label
        expected = [float.fromhex(loss) for loss in self.answers[f"{source} {optimizer}"]["later"]]
        losses = [float.fromhex(loss) for loss in answer["later"]]
        assert {"ema", "momentum" if optimizer == "muon" else "exp_avg"} <= set(answer["kinds"]), label
        if world_size == self.world_size and source == target:
            assert losses == expected, label
            own = [[name for name in files if name.startswith("rank-")] for files in answer["files"]]
            # At stage 0 each rank holds all weights.
            each = [[f"rank-{rank:05d}.safetensors"] for rank in range(world_size)]
            assert source == 0 or own == each, label
            return
        # The first loss differs by the order of sums alone. Later ones by what AdamW and Newton-Schulz make of it.
        first, later = {"fp32": (1e-6, 2e-5), "bf16": (5e-3, 2e-2)}[self.precision]
        assert abs(losses[0] - expected[0]) <= first, (label, losses[0] - expected[0])
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= later, label
