"""Which test files concern a file of bigtx, read from their imports: a first choice that needs no run of the tests."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

STARTS_PROCESSES = {"doors", "finetunes", "terminals", "servers", "subprocess", "clusters", "ranks", "worker"}
"""What test files import that start others, which takes long."""
MOST_FILES = 6
"""Importing test files takes time too."""
LEFT_OUT = ("tests/slurm/", "tests/gpu/", "tests/advice/", "tests/tools/")


def nearest_files(root: Path, path: str) -> list[str]:
    """Return the test files to try a mutant with, the nearest first; those that start processes where there are no others.

    Args:
        path: of the mutated file, from the root.
    """
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    package = module.rpartition(".")[0]
    folder = "tests/" + "/".join(package.split(".")[1:])
    found = []
    for file in sorted((root / "tests").rglob("test_*.py")):
        name = str(file.relative_to(root))
        imported = imports_of(file)
        if name.startswith(LEFT_OUT):
            continue
        if file.stem == f"test_{path.rsplit('/', 1)[-1].removesuffix('.py')}" and name.startswith(folder):
            rank = 0
        elif module in imported:
            rank = 1
        elif name.startswith(f"{folder}/") or any(each.startswith(package) for each in imported):
            rank = 2
        else:
            continue
        found.append((bool(imported & STARTS_PROCESSES), rank, name))
    quick = [name for is_slow, _, name in sorted(found) if not is_slow]
    return (quick if len(quick) > 1 else [name for *_, name in sorted(found)])[:MOST_FILES]


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Return the modules that a file imports, and their last names."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return frozenset(names | {name.rpartition(".")[2] for name in names})
