"""The phases of the check, in their order, and the speed that is wanted."""

from __future__ import annotations

from dataclasses import dataclass

WANTED_MFU = {"decoder-125m": 0.45, "decoder-350m": 0.52, "decoder-1.3b": 0.57, "decoder-7b": 0.55}
"""The share of the peak that training should reach on one H200 with rows of 2,048 tokens, by the size of the model."""

SECONDS = 480.0
"""The time for everything: a machine may be there for ten minutes only."""
DRY_SECONDS = 3600.0
"""The time for everything in a dry run, whose processors may be busy."""

SMALLEST = "decoder-1m"
"""The model of a dry run."""


@dataclass(frozen=True)
class Phase:
    """One phase of the check.

    Attributes:
        name: the word that `--only` takes.
        what: what it measures.
        seconds: the most time of one of its processes.
        module: the module of this package with its function, which has the phase's name.
        needs: a phase that must run first, because this one reads what it wrote.
    """

    name: str
    what: str
    seconds: float
    module: str
    needs: str | None = None

    def cases(self, is_dry: bool) -> tuple[str, ...]:
        """Return the names of its processes: a model that does not fit must not stop the others."""
        if self.name != "training":
            return ("",)
        return (SMALLEST,) if is_dry else tuple(WANTED_MFU)


TESTS = "tests"
"""The phase that is not a module of this package: pytest on tests/gpu."""

PHASES = (
    Phase("environment", "versions, the speed of a product of matrices and of a copy", 60, "environment"),
    Phase("kernels", "which kernel computes attention, the time and the error of each", 60, "kernels"),
    Phase(
        "training",
        "tokens per second, MFU and memory of each model, and where the time of a step goes",
        120,
        "training",
    ),
    Phase("loss", "head and loss, compiled and not, against their three products", 60, "loss"),
    Phase("synchronizations", "the places in a step that wait for the GPU, at each ZeRO stage", 75, "synchronizations"),
    Phase("flex", "attention within documents, and the programs that many lengths need", 75, "flex"),
    Phase("stages", "ZeRO 0 to 3, Muon, and blocks that are not compiled", 90, "training"),
    Phase(
        "save", "a checkpoint in the background: how long training stalls, and when it is durable", 75, "checkpoints"
    ),
    Phase("resume", "verifying and reading that checkpoint in another process", 60, "checkpoints", needs="save"),
    Phase(TESTS, "the tests of tests/gpu", 300, ""),
)
LEAST_SECONDS = 20.0
"""With less time left, a process is not started."""
