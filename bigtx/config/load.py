"""The one loader: schema defaults <- YAML files in the order given <- key=value arguments. Nothing else."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from bigtx.config.convert import Converter, needs_quotes
from bigtx.config.nodes import (
    COMMAND_LINE,
    DOTLIST,
    Node,
    Problem,
    ProblemError,
    from_values,
    merge,
    read_argument,
    read_yaml,
)
from bigtx.config.runs import CONFIG, is_run, read_values, run_dir_of
from bigtx.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from bigtx.config.settings import find, leaves, members, similar_keys
from bigtx.config.shape import learning_rate_for
from bigtx.config.shipped import find_config, shipped_configs
from bigtx.config.validate import validate
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.files import NOT_A_FILE, no_file
from bigtx.utils.log import say
from bigtx.utils.secrets import scrub_text
from bigtx.utils.shell import setting

T = TypeVar("T")

BASE = "base"
PRINT_CONFIG = {"--print-config": "print the resolved configuration and end"}
FLAGS = PRINT_CONFIG | {"--dry-run": "build everything, do one step and end"}
LOCAL_RANK = ("--local_rank", "--local-rank")
"""What launchers add to every rank's command line; the environment says the same."""


def load(schema: type[T], args: Sequence[str], *, check: bool = True) -> T:
    """The configuration that a command line asks for.

    Args:
        schema: a dataclass of `schema.py`.
        args: YAML paths (a user's own or a recipe's name) and key=value items, mixed.
        check: whether settings must fit each other and the files that they name must exist.

    Raises:
        ConfigError: lists every problem.
    """
    return _load(schema, args, check=check)[0]


def _load(schema: type[T], args: Sequence[str], *, check: bool) -> tuple[T, list[Path]]:
    """As `load`, with the files that were read."""
    tree, files, problems, whole = _merged_tree(schema, args)
    converter = Converter(schema)
    values = converter.convert(tree)
    problems += converter.problems
    config = _construct(schema, values)
    if check and whole:
        # A section with a problem would give followers: its missing values are defaults here.
        broken = {problem.key.partition(".")[0] for problem in problems}
        for problem in validate(config):
            if not broken & {key.partition(".")[0] for key in (problem.key, *problem.related)}:
                problems.append(dataclasses.replace(problem, where=converter.origins.get(problem.key, "")))
    raise_problems(problems)
    if isinstance(config, RunConfig) and config.optimizer.learning_rate is None:
        config.optimizer.learning_rate = learning_rate_for(config.model)
    return config, files


def from_dict(schema: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """A configuration from plain values, e.g. of a saved config.

    Raises:
        ConfigError: lists every value that the schema does not allow.
    """
    converter = Converter(schema)
    config = _construct(schema, converter.convert(from_values(values, where)))
    raise_problems(converter.problems)
    return config


def load_run_config(folder: Path | str) -> RunConfig:
    """The config of a run of any kind, or of the run of a checkpoint.

    Raises:
        CheckpointError: it is no run.
        ConfigError: the config holds what this bigtx does not know.
    """
    values = read_values(folder)
    schema = FinetuneConfig if "task" in values else PretrainConfig
    return from_dict(schema, values, where=str(run_dir_of(folder) / CONFIG))


def with_settings(config: T, arguments: Sequence[str], *, sections: Sequence[str]) -> T:
    """A run's configuration with settings that may change freely, as KEY=VALUE of a command.

    Args:
        sections: those that the command reads.

    Raises:
        ConfigError: lists every problem.
    """
    schema, problems = type(config), list[Problem]()
    tree = from_values(to_dict(config), "")
    for argument in arguments:
        key = argument.partition("=")[0]
        setting = find(schema, key)
        if setting is None or setting.section or setting.change != "free" or key.partition(".")[0] not in sections:
            free = [own.key for own in leaves(schema) if own.change == "free" and own.key.startswith(_dotted(sections))]
            what = f"cannot be set here; what can is {', '.join(free) or 'nothing'}"
            problems.append(Problem(key, "", what, COMMAND_LINE))
            continue
        try:
            tree = merge(tree, read_argument(argument))
        except ProblemError as error:
            problems.append(error.problem)
    converter = Converter(schema)
    values = converter.convert(tree)
    raise_problems([*problems, *converter.problems])
    return _construct(schema, values)


def _dotted(sections: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{section}." for section in sections)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts and lists of plain values, every setting included."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A configuration as a YAML file that `load` reads back as the same."""
    # All but ASCII is escaped: YAML takes some characters (U+0085, U+2028) for line ends and would give back a space.
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Puts texts into quotes that `load` would refuse without them."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "'" if needs_quotes(text) else None),
)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Do nothing without problems.

    Raises:
        ConfigError: lists them.
    """
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        raise ConfigError(f"{len(lines)} problems in the configuration:" + "".join(f"\n  {line}" for line in lines))


def base_files(path: Path) -> list[Path]:
    """A file and all files that `base:` lines lead to from it, resolved.

    Raises:
        ConfigError: one of them cannot be read.
    """
    problems: list[Problem] = []
    visited: list[Path] = []
    try:
        _read_file(path, problems, (), visited)
    except ProblemError as error:
        problems.append(error.problem)
    raise_problems(problems)
    return list(dict.fromkeys(file.resolve() for file in visited))


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """A command line that was understood.

    Attributes:
        files: those that were named, and those that they build on.
    """

    config: T
    print_config: bool
    dry_run: bool
    files: list[Path]


def parse_command_line(
    schema: type[T],
    argv: Sequence[str],
    *,
    program: str,
    flags: Mapping[str, str] = FLAGS,
    example: str = "",
    check: bool = True,
) -> Parsed[T]:
    """Read the command line of an entry point; `--help` is answered here.

    Args:
        argv: without the program's name.
        program: the command as a user writes it, for the help.
        flags: what the program knows of --print-config and --dry-run, explained; others are for the help alone.
        example: settings of a typical command, for the help.
        check: as for `load`.

    Raises:
        ConfigError: lists every problem.
        SystemExit: after `--help`.
    """
    arguments: list[str] = []
    given: set[str] = set()
    rest = iter(argv)
    for argument in rest:
        if argument in ("-h", "--help"):
            say(_help(schema, program, flags, example))
            raise SystemExit(0)
        if argument in LOCAL_RANK:
            next(rest, None)
        elif argument in flags:
            given.add(argument)
        elif argument.partition("=")[0] not in LOCAL_RANK:
            arguments.append(argument)
    config, files = _load(schema, arguments, check=check)
    return Parsed(config, "--print-config" in given, "--dry-run" in given, files)


def _merged_tree(schema: type, args: Sequence[str]) -> tuple[Node, list[Path], list[Problem], bool]:
    """What was written, the files that were read, the problems of reading, and whether all files could be read: of what
    is not there nobody can say that it is missing."""
    problems: list[Problem] = []
    files: list[Path] = []
    whole = True
    tree = Node({}, "defaults")
    for wants_files in (True, False):
        for argument in _without_values_of_options(args):
            is_file = not DOTLIST.fullmatch(argument) and not argument.startswith("-")
            if is_file is not wants_files:
                continue
            try:
                if is_file:
                    path = _find(schema, argument)
                    known = len(problems)
                    layer = _in_place(_read_file(path, problems, (), files), path)
                    whole &= not any(problem.key == BASE for problem in problems[known:])
                else:
                    _refuse_option(schema, argument)
                    layer = read_argument(argument)
                tree = merge(tree, layer)
            except ProblemError as error:
                problems.append(error.problem)
                whole &= not is_file
    if whole and issubclass(schema, FinetuneConfig):
        tree = _over_base_model(tree, problems)
    return tree, files, problems, whole


def _without_values_of_options(args: Sequence[str]) -> Iterator[str]:
    """The arguments without what follows an option (`--api-key X`): no setting is written so, the option is refused,
    and its value may be a secret, which no message is to repeat."""
    after_option = False
    for argument in args:
        is_setting = DOTLIST.fullmatch(argument) is not None
        if not after_option or is_setting or argument.startswith("-") or Path(argument).is_file():
            yield argument
        after_option = argument.startswith("-") and "=" not in argument


def _in_place(tree: Node, path: Path) -> Node:
    """A file's tree; the config.yaml of a run's folder means that folder, wherever the run was before."""
    assert isinstance(tree.content, dict)
    folder, saved = path.parent, tree.content.get("run_dir")
    if path.name != CONFIG or saved is None or not isinstance(saved.content, str) or not is_run(folder):
        return tree
    if Path(saved.content).is_dir() and folder.samefile(saved.content):
        return tree
    return merge(tree, from_values({"run_dir": str(folder)}, str(path)))


def _over_base_model(tree: Node, problems: list[Problem]) -> Node:
    """A fine-tuning's tree laid over the model of its base; of a base that is gone the run itself knows the model."""
    assert isinstance(tree.content, dict)
    base, run_dir = tree.content.get("base"), tree.content.get("run_dir")
    if base is None or base.is_null or not isinstance(base.content, str):
        return tree
    source = base.content
    if not Path(source).is_dir() and run_dir and isinstance(run_dir.content, str):
        if not (Path(run_dir.content) / CONFIG).is_file():
            problems.append(Problem("base", source, "no such folder; name a run or one of its checkpoints", base.where))
            return tree
        source = run_dir.content
    try:
        model = dict(read_values(source).get("model", {}))
    except CheckpointError as error:
        problems.append(Problem("base", base.content, str(error), base.where))
        return tree
    model.pop("lora", None)  # Adapters are a training's own: those of the base are merged into its weights.
    return merge(from_values({"model": model}, f"base {source}"), tree)


def _find(schema: type, name: str) -> Path:
    path = find_config(name)
    if kind := no_file(name):
        raise ProblemError(Problem("", "", f"{name!r} is {kind}, {NOT_A_FILE}: every rank reads it", COMMAND_LINE))
    if path is None and Path(name).is_dir():
        keys = ("input.paths", "data.train", "data.sources.mine.path")
        key = next((key for key in keys if find(schema, key)), "run_dir")
        what = f"{name!r} is a folder, not a YAML file; did you mean {setting(key, name)}?"
        raise ProblemError(Problem("", "", what, COMMAND_LINE))
    if path is None and "=" not in name and find(schema, name):
        raise ProblemError(Problem("", "", f"{name!r} is a setting; write {name}=VALUE, without spaces", COMMAND_LINE))
    if path is None:
        similar = difflib.get_close_matches(name, shipped_configs(), 3, 0.5)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else "; `bigtx configs list` shows the recipes"
        raise ProblemError(Problem("", "", f"no file {name!r}, here or among the recipes{hint}", COMMAND_LINE))
    return path


def _read_file(path: Path, problems: list[Problem], above: tuple[Path, ...], visited: list[Path]) -> Node:
    """A file laid over the files that its `base:` names.

    Args:
        above: the files whose `base:` led here.
        visited: grows by every file that is read.
    """
    if path.resolve() in [file.resolve() for file in above]:
        circle = " -> ".join(str(file) for file in (*above, path))
        raise ProblemError(Problem(BASE, "", f"goes in a circle: {circle}", str(above[-1])))
    visited.append(path)
    tree = read_yaml(path, problems)
    assert isinstance(tree.content, dict)
    own = {key: node for key, node in tree.content.items() if key != BASE}
    below = Node({}, str(path))
    base = tree.content.get(BASE)
    if base is not None and _is_run(base, path.parent):
        own[BASE], base = base, None
    for node in _base_names(base):
        assert isinstance(node.content, str)
        file = path.parent / node.content
        if not file.is_file():
            problems.append(
                Problem(BASE, node.content, f"no file {file}; base: is relative to the file it stands in", node.where)
            )
            continue
        below = merge(below, _read_file(file, problems, (*above, path), visited))
    return merge(below, Node(own, tree.where))


def _is_run(base: Node, folder: Path) -> bool:
    """Whether `base:` names not files to build on but a fine-tuning's run to start from, as in a run's config.yaml."""
    if base.is_null:
        return True
    name = base.content
    return isinstance(name, str) and not (folder / name).is_file() and Path(name).is_dir()


def _base_names(base: Node | None) -> list[Node]:
    if base is None:
        return []
    nodes = base.content if isinstance(base.content, list) else [base]
    for node in nodes:
        if not isinstance(node.content, str) or node.is_null:
            raise ProblemError(Problem(BASE, node.text, "names a file or a list of files", node.where))
    return nodes


def _refuse_option(schema: type, argument: str) -> None:
    if not argument.startswith("-"):
        return
    name, sign, value = argument.lstrip("-").partition("=")
    key, option = name.replace("-", "_"), argument.partition("=")[0]
    if find(schema, key):
        value = scrub_text(value) if sign else "VALUE"
        what = f"no such option; settings have no dashes before them, write {setting(key, value)}"
    else:
        similar = difflib.get_close_matches(option, FLAGS, 1, 0.8)
        similar += [f"{name}=..." for name in similar_keys(schema, key)] if key else []
        what = f"no such option{f'; did you mean {similar[0]}?' if similar else '; see --help'}"
    raise ProblemError(Problem(option, "", what, COMMAND_LINE))


def _construct(schema: type[T], values: dict[str, Any]) -> T:
    # Slow to import, and used by nothing before.
    from omegaconf import OmegaConf

    config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(values))
    built = OmegaConf.to_object(config)
    assert isinstance(built, schema)
    return built


def _help(schema: type, program: str, flags: Mapping[str, str], example: str) -> str:
    settings = members(schema).values()
    width = max(len(setting.key) for setting in settings) + 2
    lines = [
        f"usage: {program} [FILE.yaml ...] [KEY=VALUE ...] {' '.join(f'[{flag}]' for flag in flags)}",
        "",
        (schema.__doc__ or "").strip(),
        "",
        "Files build on the defaults in the order given, KEY=VALUE on the files. A file may be a recipe of",
        "`bigtx configs list`. `bigtx configs explain KEY` says what a setting means.",
        "",
        *([f"  e.g. {program} {example}", ""] if example else []),
        *(f"  {flag:<16}{explained}" for flag, explained in flags.items()),
        "",
        "Settings and sections:",
        *(f"  {setting.key:<{width}}{_summary(setting.section, setting.doc)}" for setting in settings),
    ]
    return "\n".join(lines)


def _summary(section: type | None, doc: str) -> str:
    text = (section.__doc__ or "").strip() if section else doc
    return text.splitlines()[0] if text else ""
