"""The tree of a command line: files over the files that they build on, settings over files; advice for options.

No option takes a value: settings are written KEY=VALUE.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bigtx.config.nodes import (
    COMMAND_LINE,
    Node,
    Problem,
    ProblemError,
    from_values,
    merge,
    raise_problems,
    read_argument,
    read_yaml,
)
from bigtx.config.runs import (
    CONFIG,
    LISTED,
    find_config,
    is_run,
    read_values,
    runs_near,
    similar_configs,
    with_moved_paths,
)
from bigtx.config.schema import FinetuneConfig, RunConfig
from bigtx.config.settings import find, same_name_keys, similar_keys
from bigtx.utils.arguments import ASSIGNMENT, is_option, may_be_value
from bigtx.utils.errors import CheckpointError
from bigtx.utils.files import NOT_A_FILE, no_file
from bigtx.utils.secrets import is_secret_key, scrub_text
from bigtx.utils.shell import at_home, command, setting

BASE = "base"
_SHORT = {"o": "output"}
_ELSEWHERE = {
    "config": "name the file alone, without an option",
    **dict.fromkeys(("resume", "resume_from_checkpoint"), "to resume a run, name its folder alone, without an option"),
    **dict.fromkeys(("devices", "gpus", "nproc", "nproc_per_node", "num_gpus"), "did you mean --ranks N?"),
}
"""Options of other programs, too far from our names for a comparison of letters."""
_CLOSING = {"[": "]", "{": "}"}


class Merged(NamedTuple):
    """What a command line says, before the schema reads it.

    Attributes:
        tree: the merged tree.
        files: the files that were read.
        problems: the problems of reading.
        whole: whether all files could be read and no option was written in place of a setting: otherwise missing
            settings cannot be reported.
    """

    tree: Node
    files: list[Path]
    problems: list[Problem]
    whole: bool


def merged_tree(schema: type, args: Sequence[str], flags: Collection[str]) -> Merged:
    """Return the merged tree of a command line.

    Args:
        args: files and KEY=VALUE items, mixed.
        flags: the switches that the program knows, for the advice about others.
    """
    args, problems = _undivided(args)
    files: list[Path] = []
    whole = not problems
    tree = Node({}, "defaults")
    for wants_files in (True, False):
        for argument, value in _with_values(schema, args):
            is_file = not ASSIGNMENT.fullmatch(argument) and not is_option(argument)
            if is_file is not wants_files:
                continue
            try:
                if is_option(argument):
                    raise ProblemError(_refusal(schema, argument, value, flags))
                if is_file:
                    path = _find(schema, argument)
                    known = len(problems)
                    layer = _of_run(schema, _read_file(path, problems, (), files), path)
                    whole &= not any(problem.key == BASE for problem in problems[known:])
                else:
                    layer = read_argument(argument)
                tree = merge(tree, layer)
            except ProblemError as error:
                problems.append(error.problem)
                whole &= not is_file and not is_option(argument)
    if whole and issubclass(schema, FinetuneConfig):
        tree = _over_base_model(tree, problems)
    return Merged(tree, files, problems, whole)


def _of_run(schema: type, tree: Node, path: Path) -> Node:
    """Return a file's tree; the config.yaml of a run means the folder that it is in, even if the run was moved, and
    drops the changes that were allowed before.
    """
    assert isinstance(tree.content, dict)
    folder, saved = path.parent, tree.content.get("run_dir")
    if path.name != CONFIG or saved is None or not isinstance(saved.content, str) or not is_run(folder):
        return tree
    now: dict[str, Any] = {}
    if not os.path.isdir(saved.content) or not folder.samefile(saved.content):
        now = with_moved_paths(schema, read_values(folder), Path(saved.content), folder.absolute())
        now["run_dir"] = str(folder)
    return merge(tree, from_values(now | {"allow_changes": []}, str(path)))


def _over_base_model(tree: Node, problems: list[Problem]) -> Node:
    """Return a fine-tuning's tree merged over the entries from its base: the model, and the pooling of a classifier. If
    the base is missing, the run's own config has them.
    """
    assert isinstance(tree.content, dict)
    base, run_dir = tree.content.get("base"), tree.content.get("run_dir")
    if base is None or base.is_null or not isinstance(base.content, str):
        return tree
    source = at_home(base.content)
    if not os.path.isdir(source) and run_dir and isinstance(run_dir.content, str):
        if not os.path.isfile(Path(run_dir.content) / CONFIG):
            problems.append(Problem("base", source, "no such folder; name a run or one of its checkpoints", base.where))
            return tree
        source = run_dir.content
    try:
        values = read_values(source)
    except CheckpointError as error:
        problems.append(Problem("base", base.content, str(error), base.where))
        return tree
    model = dict(values.get("model", {}))
    model.pop("lora", None)  # Adapters belong to one training: those of the base are merged into its weights.
    known: dict[str, Any] = {"model": model}
    task = tree.content.get("task")
    if values.get("task") == "classify" and (task is None or task.content == "classify"):
        known["classify"] = {"pooling": values.get("classify", {}).get("pooling", "auto")}
    return merge(from_values(known, f"base {source}"), tree)


def _find(schema: type, name: str) -> Path:
    """Return the YAML file that an argument means; a run's folder means its config.yaml."""
    if path := find_config(name):
        return path
    if issubclass(schema, RunConfig) and is_run(Path(name)) and os.path.isfile(Path(name) / CONFIG):
        return _config_of_run(schema, Path(name))
    if kind := no_file(name):
        raise ProblemError(Problem("", "", f"{name!r} is {kind}, {NOT_A_FILE}: every rank reads it", COMMAND_LINE))
    if runs := runs_near(Path(name)) if issubclass(schema, RunConfig) else []:
        what = f"{name!r} is not a run; did you mean {' or '.join(map(str, runs))}?"
        raise ProblemError(Problem("", "", what, COMMAND_LINE))
    if os.path.isdir(name):
        keys = ("input.paths", "data.train", "data.sources.mine.path")
        key = next((key for key in keys if find(schema, key)), "run_dir")
        what = f"{name!r} is a folder, not a YAML file; did you mean {setting(key, name)}?"
        raise ProblemError(Problem("", "", what, COMMAND_LINE))
    similar = similar_configs(name)
    is_recipe = any(Path(recipe).stem == name for recipe in similar)
    if "=" not in name and find(schema, name) and not is_recipe:
        raise ProblemError(Problem("", "", f"{name!r} is a setting; write {name}=VALUE, without spaces", COMMAND_LINE))
    hint = f"; did you mean {' or '.join(similar)}?" if similar else LISTED
    raise ProblemError(Problem("", "", f"no file {name!r}, here or among the recipes{hint}", COMMAND_LINE))


def _config_of_run(schema: type, folder: Path) -> Path:
    is_finetuned = "task" in read_values(folder)
    if is_finetuned is not issubclass(schema, FinetuneConfig):
        kind, other = ("fine-tuned", "finetune") if is_finetuned else ("pretrained", "pretrain")
        what = f"{str(folder)!r} is a {kind} run; to resume it: {command('bigtx', other, folder)}"
        if not is_finetuned:
            what += f"; to fine-tune it: {setting('base', str(folder))}"
        raise ProblemError(Problem("", "", what, COMMAND_LINE))
    return folder / CONFIG


def read_file_and_bases(path: Path) -> tuple[Node, list[Path]]:
    """Return a file's tree merged over the files that it builds on, and all of these files.

    Raises:
        ConfigError: there are problems; the message lists them.
    """
    problems: list[Problem] = []
    visited: list[Path] = []
    tree = Node({}, str(path))
    try:
        tree = _read_file(path, problems, (), visited)
    except ProblemError as error:
        problems.append(error.problem)
    raise_problems(problems)
    return tree, visited


def _read_file(path: Path, problems: list[Problem], above: tuple[Path, ...], visited: list[Path]) -> Node:
    """Return a file's tree merged over the files that its `base:` names.

    Args:
        above: the files whose `base:` lines led to this one.
        visited: every file that is read is appended.
    """
    if path.resolve() in [file.resolve() for file in above]:
        circle = " -> ".join(str(file) for file in (*above, path))
        raise ProblemError(Problem(BASE, "", f"is circular: {circle}", str(above[-1])))
    visited.append(path)
    tree = read_yaml(path, problems)
    assert isinstance(tree.content, dict)
    own = {key: node for key, node in tree.content.items() if key != BASE}
    below = Node({}, str(path))
    base = tree.content.get(BASE)
    if base is not None and _is_run(base, path):
        own[BASE], base = base, None
    for node in _base_names(base):
        assert isinstance(node.content, str)
        file = path.parent / node.content
        if not os.path.isfile(file):
            what = f"no file {file}; base: is relative to its own file"
            problems.append(Problem(BASE, node.content, what, node.where))
        else:
            below = merge(below, _read_file(file, problems, (*above, path), visited))
    return merge(below, Node(own, tree.where))


def _is_run(base: Node, path: Path) -> bool:
    """Return whether a file's `base:` names a run to start a fine-tuning from, not files to build on. In a run's
    own config.yaml it always does, and that run may be missing.
    """
    if base.is_null or (path.name == CONFIG and is_run(path.parent)):
        return True
    name = base.content
    return isinstance(name, str) and not os.path.isfile(path.parent / name) and os.path.isdir(name)


def _base_names(base: Node | None) -> list[Node]:
    if base is None:
        return []
    nodes = base.content if isinstance(base.content, list) else [base]
    for node in nodes:
        if not isinstance(node.content, str) or node.is_null:
            raise ProblemError(Problem(BASE, node.text, "names a file or a list of files", node.where))
    return nodes


def _with_values(schema: type, words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each word, and with an option its value: that of `--steps=5`, or that of `--steps 5`, whose second word is
    left out.

    No option takes a value, so both are refused, and the value may be a secret: `--api-key X`.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not is_option(word):
            yield word, None
        elif "=" in word:
            option, _, value = word.partition("=")
            yield option, value
        else:
            is_word = bool(rest) and not (is_option(rest[0]) or ASSIGNMENT.fullmatch(rest[0]))
            is_value = is_word and (may_be_value(rest[0]) or bool(_keys(schema, word)))
            yield word, rest.pop(0) if is_value else None


def _undivided(words: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Return the words without the lists that a shell has divided at their spaces, and a problem for each of those."""
    rest, whole, problems = list(words), list[str](), list[Problem]()
    while rest:
        word = rest.pop(0)
        match = ASSIGNMENT.fullmatch(word)
        closing = _CLOSING.get(match["value"][:1]) if match else None
        end = next((place for place, other in enumerate(rest) if closing and other.endswith(closing)), None)
        if match is None or closing is None or word.endswith(closing) or end is None:
            whole.append(word)
            continue
        value = " ".join([match["value"], *rest[: end + 1]])
        del rest[: end + 1]
        meant = setting(match["key"], value if _may_be_shown(match["key"], value) else "[VALUE, VALUE]")
        problems.append(Problem(match["key"], "", f"has spaces, at which a shell divides it; quote it: {meant}"))
    return whole, problems


def _refusal(schema: type, option: str, value: str | None, flags: Collection[str]) -> Problem:
    """Return what to write in place of an option: a setting, with the value if it is certain which setting is meant.

    Args:
        option: the option with its dashes.
        value: its value, as in `_with_values`.
        flags: the switches that the program knows.
    """
    name = option.lstrip("-").replace("-", "_")
    if meant := _ELSEWHERE.get(name):
        return Problem(option, "", f"no such option; {meant}", COMMAND_LINE)
    name = _SHORT.get(name, name)
    if keys := _keys(schema, option):
        shown = value if value is not None and _may_be_shown(name, value) else "VALUE"
        return Problem(option, "", f"settings are written KEY=VALUE: {_either(setting(key, shown) for key in keys)}")
    if similar := difflib.get_close_matches(option, flags, 1, 0.8):
        return Problem(option, "", f"no such option; did you mean {similar[0]}?", COMMAND_LINE)
    keys = similar_keys(schema, name) if name else []
    meant = f"did you mean {_either(f'{key}=VALUE' for key in keys)}?" if keys else "--help shows all"
    return Problem(option, "", f"no such option; settings are written KEY=VALUE; {meant}", COMMAND_LINE)


def _keys(schema: type, option: str) -> list[str]:
    """Return the settings that an option may mean: for a section that begins with a path, that path."""
    name = option.lstrip("-").replace("-", "_")
    name = _SHORT.get(name, name)
    known = find(schema, name)
    if known is None:
        return same_name_keys(schema, name)
    first = next(iter(known.members().values()), known)
    if first.named_section:
        first = replace(next(iter(first.members().values())), key=f"{first.key}.mine.path")
    return [first.key if first.kind == "path" else name]


def _may_be_shown(name: str, value: str) -> bool:
    return not is_secret_key(name) and scrub_text(f"{name}={value}") == f"{name}={value}"


def _either(settings: Iterable[str]) -> str:
    return " or ".join(settings)
