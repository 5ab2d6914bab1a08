"""Operators of our own, each of which torch.compile and selective checkpointing see as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that becomes an operator of torch, on every device.

    `torch.library.custom_op` does the same, but imports torch's compiler at the first call: more than a second at the
    start of every run. What this returns needs it only where something is compiled.

    Args:
        name: as `torch.ops` is to have it, e.g. bigtx::expert_products.

    Returns:
        Makes an operator of a function that changes none of its arguments and names their types and its result's; see
        `torch.library.register_fake` and `register_autograd` for what an operator needs besides.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", function)
        namespace, _, short = name.partition("::")
        return getattr(getattr(torch.ops, namespace), short).default

    return register
