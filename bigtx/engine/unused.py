"""Parts of DeepSpeed that bigtx never uses and that would cost each run seconds at its start, or memory."""

from __future__ import annotations

import deepspeed
from deepspeed.runtime import compiler


def leave_out_unused() -> None:
    """Keep DeepSpeed from preparing what no run uses; call it before DeepSpeed starts its process groups."""
    _compile_no_optimizer()
    _build_no_operators()


def _compile_no_optimizer() -> None:
    """Import DeepSpeed's Muon as plain functions.

    Every ZeRO engine imports it, to see whether it was given one, and three of its functions are compiled where they
    are defined. That imports all of torch's compiler. Ours is another optimizer; see optimizers.py.
    """
    compile_before = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_before


def _build_no_operators() -> None:
    """Have DeepSpeed find no operator of its own that can be built.

    It would try a compiler for each of them, for the sake of one: an all-reduce by shared memory, which serves only
    its inference, takes a compiler at the first start, and leaves 67 MB in /dev/shm for each rank of each run, until a
    machine has no memory left. Operators that a setting asks for, such as those of offloading, do not look here.
    """
    deepspeed.ops.__compatible_ops__ = {}
