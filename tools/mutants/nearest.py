"""Find the test files for a file of bigtx by their imports, without running tests."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

STARTS_PROCESSES = {"doors", "finetunes", "terminals", "servers", "subprocess", "clusters", "ranks", "worker"}
"""Modules that test files import if they start other processes, which takes long."""
MOST_FILES = 6
"""The most test files for a mutant, because importing them takes time too."""
LEFT_OUT = ("tests/slurm/", "tests/gpu/", "tests/advice/", "tests/tools/")


def nearest_files(root: Path, path: str) -> list[str]:
    """Return the test files for a mutant, the nearest first.

    Files that start processes are used only if there are no others.

    Args:
        root: the root of the repository.
        path: the path of the mutated file, relative to the root.
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
