"""Turn off parts of DeepSpeed that bigtx does not use and that would cost each run seconds at its start, or memory."""

from __future__ import annotations

import deepspeed
from deepspeed.runtime import compiler


def leave_out_unused() -> None:
    """Keep DeepSpeed from preparing unused parts. Call this before DeepSpeed starts its process groups."""
    _compile_no_optimizer()
    _build_no_operators()


def _compile_no_optimizer() -> None:
    """Import DeepSpeed's Muon as plain functions.

    Every ZeRO engine imports it to check the type of its optimizer, and three of its functions are compiled where they
    are defined. That imports all of torch's compiler. bigtx has another Muon; see optimizers.py.
    """
    compile_before = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_before


def _build_no_operators() -> None:
    """Have DeepSpeed find no operators that can be built.

    It would try a compiler for each of them, although it uses only one: an all-reduce by shared memory for inference.
    That one needs a compiler at the first start, and leaves 67 MB in /dev/shm for each rank of each run, until the
    machine has no memory left. Operators that a setting asks for, such as those of offloading, are not affected.
    """
    deepspeed.ops.__compatible_ops__ = {}
