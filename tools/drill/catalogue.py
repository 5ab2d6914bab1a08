"""The list of faults, and the result of trying one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from drill.scene import Scene

Try = Callable[["Scene"], str]
"""A function that tries a fault and returns what was seen. It raises `Unexpected` or `NotPossible`."""


class Unexpected(Exception):
    """What happened is not what must happen."""


class NotPossible(Exception):
    """This machine cannot cause the fault, e.g. because the user may not mount file systems."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        number: the number in the specification.
        name: a short name for the command line.
        text: the fault in words.
        expected: what must happen.
        is_fast: whether CI tries it.
        has_matrix: whether `--matrix` tries it for each ZeRO stage and precision.
    """

    number: int
    name: str
    text: str
    expected: str
    act: Try
    is_fast: bool
    has_matrix: bool


FAULTS: dict[int, Fault] = {}
"""All faults, by their numbers."""


def fault(number: int, name: str, expected: str, *, fast: bool = False, matrix: bool = False) -> Callable[[Try], Try]:
    """Return a decorator that adds a function to `FAULTS`. The first line of its docstring is the fault in words."""

    def register(act: Try) -> Try:
        assert number not in FAULTS, number
        text = (act.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        FAULTS[number] = Fault(number, name, text, expected, act, fast, matrix)
        return act

    return register


@dataclass(frozen=True)
class Result:
    """What was seen.

    Attributes:
        variant: the ZeRO stage and the precision, if they were chosen; otherwise "".
        verdict: "not possible" where this machine cannot cause the fault.
        detected: seconds from the fault to the end of the last process; None where no process ended because of it.
        lost: the most steps that were repeated after a resume; None where no run was resumed.
        seconds: duration of the trial.
    """

    number: int
    name: str
    text: str
    expected: str
    variant: str
    verdict: Literal["as expected", "not as expected", "not possible"]
    seen: str
    detected: float | None
    lost: int | None
    seconds: float


def attempt(fault: Fault, scene: Scene) -> Result:
    """Try a fault, and end what it left running."""
    started = time.monotonic()
    verdict: Any = "as expected"
    try:
        with scene:
            seen = fault.act(scene)
    except NotPossible as error:
        verdict, seen = "not possible", str(error)
    except (Unexpected, AssertionError) as error:
        verdict, seen = "not as expected", str(error) or traceback.format_exc()
    except Exception:
        verdict, seen = "not as expected", traceback.format_exc()
    return Result(
        number=fault.number,
        name=fault.name,
        text=fault.text,
        expected=fault.expected,
        variant=scene.variant,
        verdict=verdict,
        seen=seen,
        detected=scene.detected,
        lost=scene.lost,
        seconds=round(time.monotonic() - started, 1),
    )
