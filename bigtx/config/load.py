"""The one loader: schema defaults <- YAML files in the order given <- key=value arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from bigtx.config.convert import Converter, needs_quotes
from bigtx.config.nodes import (
    COMMAND_LINE,
    Node,
    Problem,
    ProblemError,
    from_values,
    merge,
    read_argument,
    read_yaml,
)
from bigtx.config.options import FLAGS, RANKS, refusal, undivided, with_values
from bigtx.config.paths import with_moved_paths
from bigtx.config.runs import CONFIG, gives_config, is_run, read_values, run_dir_of
from bigtx.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from bigtx.config.settings import find, leaves, members
from bigtx.config.shape import learning_rate_for
from bigtx.config.shipped import LISTED, find_config, similar_configs
from bigtx.config.validate import validate
from bigtx.utils.arguments import ASSIGNMENT, is_option, take
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.files import NOT_A_FILE, no_file
from bigtx.utils.log import say
from bigtx.utils.shell import command, setting
from bigtx.utils.terminal import columns, wrapped

T = TypeVar("T")

BASE = "base"
LOCAL_RANK = ("--local_rank", "--local-rank")
"""Options that launchers add to every rank's command line; the environment holds the same."""


def load(schema: type[T], args: Sequence[str], *, check: bool = True) -> T:
    """Return the configuration that a command line asks for.

    Args:
        schema: a dataclass of `schema.py`.
        args: YAML paths (a user's own or a recipe's name) and key=value items, mixed.
        check: whether to check that settings fit each other and that the files that they name exist.

    Raises:
        ConfigError: there are problems; the message lists all of them.
    """
    return _load(schema, args, check=check)[0]


def _load(schema: type[T], args: Sequence[str], *, check: bool) -> tuple[T, list[Path]]:
    """Load a config as `load` does, and return it with the files that were read."""
    tree, files, problems, whole = _merged_tree(schema, args)
    converter = Converter(schema)
    values = converter.convert(tree)
    problems += converter.problems
    config = _construct(schema, values)
    if check and whole:
        # A section with a problem would cause further problems: its missing values are defaults here.
        broken = {problem.key.partition(".")[0] for problem in problems}
        for problem in validate(config):
            if not broken & {key.partition(".")[0] for key in (problem.key, *problem.related)}:
                problems.append(dataclasses.replace(problem, where=converter.origins.get(problem.key, "")))
    raise_problems(problems)
    if isinstance(config, RunConfig) and config.optimizer.learning_rate is None:
        config.optimizer.learning_rate = learning_rate_for(config.model)
    return config, files


def from_dict(schema: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Return a configuration from plain values, e.g. of a saved config.

    Raises:
        ConfigError: the schema does not allow a value; the message lists all such values.
    """
    converter = Converter(schema)
    config = _construct(schema, converter.convert(from_values(values, where)))
    raise_problems(converter.problems)
    return config


def load_run_config(folder: Path | str) -> RunConfig:
    """Return the config of a run of any kind, or of the run of a checkpoint.

    Raises:
        CheckpointError: it is not a run.
        ConfigError: the config has entries that this version of bigtx does not know.
    """
    values = read_values(folder)
    schema = FinetuneConfig if "task" in values else PretrainConfig
    return from_dict(schema, values, where=str(run_dir_of(folder) / CONFIG))


def with_settings(config: T, arguments: Sequence[str], *, sections: Sequence[str], also: Sequence[str] = ()) -> T:
    """Return a run's configuration with settings that may change freely, as KEY=VALUE of a command.

    Args:
        sections: the sections that the command reads.
        also: settings, or sections of them, that may change for the command, though not within the run.

    Raises:
        ConfigError: there are problems; the message lists all of them.
    """
    schema, problems = type(config), list[Problem]()
    tree = from_values(to_dict(config), "")
    free = [
        own.key
        for own in leaves(schema)
        if (own.change == "free" and own.key.startswith(_dotted(sections)))
        or own.key in also
        or own.key.startswith(_dotted(also))
    ]
    for argument in arguments:
        key = argument.partition("=")[0]
        if key not in free:
            what = f"cannot be set here; the settings that can are {', '.join(free) or 'none'}"
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
    """Return a configuration as nested dicts and lists of plain values, every setting included."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return a configuration as a YAML file that `load` reads back as the same."""
    return yaml_of(to_dict(config))


def yaml_of(values: dict[str, Any]) -> str:
    """Return the values of a configuration (`to_dict`) as a YAML file that `load` reads back as the same."""
    # Non-ASCII text is escaped: YAML reads some characters (U+0085, U+2028) as line ends and would return a space.
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)


def resolved_files(path: Path) -> str:
    """Return the settings of a file and the files that it builds on, as the YAML of one file, without defaults.

    Raises:
        ConfigError: one of them cannot be read.
    """
    return yaml.dump(_read_sound(path)[0], Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)


class _Dumper(yaml.SafeDumper):
    """A YAML writer that quotes the texts that `load` would refuse without quotes."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "'" if needs_quotes(text) else None),
)


def _represent(dumper: yaml.SafeDumper, node: Node) -> yaml.Node:
    """Return a piece as it was written: a scalar without quotes gets none."""
    if isinstance(node.content, dict):
        return dumper.represent_mapping("tag:yaml.org,2002:map", node.content)
    if isinstance(node.content, list):
        return dumper.represent_sequence("tag:yaml.org,2002:seq", node.content)
    if node.plain:
        return dumper.represent_scalar(dumper.resolve(yaml.ScalarNode, node.content, (True, False)), node.content)
    return dumper.represent_scalar("tag:yaml.org,2002:str", node.content, "'")


_Dumper.add_representer(Node, _represent)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise an error if there are problems.

    Raises:
        ConfigError: there are problems; the message lists them.
    """
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        raise ConfigError(f"{len(lines)} problems in the configuration:" + "".join(f"\n  {line}" for line in lines))


def base_files(path: Path) -> list[Path]:
    """Return a file and all files that it builds on by `base:` lines, as resolved paths.

    Raises:
        ConfigError: one of them cannot be read.
    """
    return list(dict.fromkeys(file.resolve() for file in _read_sound(path)[1]))


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """A command line that was read.

    Attributes:
        flags: the switches that were given.
        files: the files that were named, and the files that they build on.
        num_ranks: the number of ranks to start; None for the default.
    """

    config: T
    flags: frozenset[str]
    files: list[Path]
    num_ranks: int | None = None

    @property
    def dry_run(self) -> bool:
        """Return whether to do one step only and keep nothing."""
        return "--dry-run" in self.flags

    @property
    def json(self) -> bool:
        """Return whether to print the result as JSON."""
        return "--json" in self.flags


def parse_command_line(
    schema: type[T],
    argv: Sequence[str],
    *,
    program: str,
    flags: Mapping[str, str] = FLAGS,
    others: Mapping[str, str] | None = None,
    example: str = "",
    check: bool = True,
) -> Parsed[T]:
    """Read the command line of an entry point; `--help` and `--print-config` are handled here, by rank 0 only.

    Args:
        argv: the words after the program's name.
        program: the command as a user writes it, for the help.
        flags: the switches that the program knows, with explanations.
        others: the options that the program reads from its command line itself, for the help.
        example: the settings of a typical command, for the help.
        check: as for `load`.

    Raises:
        ConfigError: there are problems; the message lists all of them.
        SystemExit: after `--help` and `--print-config`.
    """
    arguments: list[str] = []
    given: set[str] = set()
    num_ranks, argv = take_ranks(argv) if RANKS in flags else (None, argv)
    rest = iter(argv)
    for argument in rest:
        if argument in ("-h", "--help"):
            say(_help(schema, program, flags, others or {}, example))
            raise SystemExit(0)
        if argument in LOCAL_RANK:
            next(rest, None)
        elif argument in flags:
            given.add(argument)
        elif argument.partition("=")[0] not in LOCAL_RANK:
            arguments.append(argument)
    config, files = _load(schema, arguments, check=check)
    if "--print-config" in given:
        say(to_yaml(config).rstrip("\n"))
        raise SystemExit(0)
    if isinstance(config, RunConfig) and gives_config(Path(config.run_dir), files):
        config.allow_changes += _keys_by_name(schema, arguments)
    return Parsed(config, frozenset(given), files, num_ranks)


def _keys_by_name(schema: type, arguments: Sequence[str]) -> list[str]:
    """Return the settings of KEY=VALUE arguments that may change if they are named; after a run's own config they
    are.
    """
    keys = (argument.partition("=")[0] for argument in arguments)
    return [key for key in keys if (setting := find(schema, key)) and setting.change == "by_name"]


def take_ranks(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return how many ranks a command line asks for (None for the default), and its other words.

    Raises:
        ConfigError: it is not a number of ranks.
    """
    text, others = take(words, RANKS.lstrip("-"))
    if text is not None and (not text.isdecimal() or int(text) < 1):
        raise ConfigError(f"{RANKS} {text}: write how many ranks to start on this machine, e.g. {RANKS} 2")
    return None if text is None else int(text), others


def _merged_tree(schema: type, args: Sequence[str]) -> tuple[Node, list[Path], list[Problem], bool]:
    """Return the merged tree, the files that were read, the problems of reading, and whether all files could be read
    and no option was written in place of a setting: otherwise missing settings cannot be reported.
    """
    args, problems = undivided(args)
    files: list[Path] = []
    whole = not problems
    tree = Node({}, "defaults")
    for wants_files in (True, False):
        for argument, value in with_values(args):
            is_file = not ASSIGNMENT.fullmatch(argument) and not is_option(argument)
            if is_file is not wants_files:
                continue
            try:
                if is_option(argument):
                    raise ProblemError(refusal(schema, argument, value))
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
    return tree, files, problems, whole


def _of_run(schema: type, tree: Node, path: Path) -> Node:
    """Return a file's tree; the config.yaml of a run means the folder that it is in, even if the run was moved, and
    drops the changes that were allowed before.
    """
    assert isinstance(tree.content, dict)
    folder, saved = path.parent, tree.content.get("run_dir")
    if path.name != CONFIG or saved is None or not isinstance(saved.content, str) or not is_run(folder):
        return tree
    now: dict[str, Any] = {}
    if not Path(saved.content).is_dir() or not folder.samefile(saved.content):
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
    source = base.content
    if not Path(source).is_dir() and run_dir and isinstance(run_dir.content, str):
        if not (Path(run_dir.content) / CONFIG).is_file():
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
    path = find_config(name)
    if path is None and issubclass(schema, RunConfig) and is_run(Path(name)) and (Path(name) / CONFIG).is_file():
        return _config_of_run(schema, Path(name))
    if kind := no_file(name):
        raise ProblemError(Problem("", "", f"{name!r} is {kind}, {NOT_A_FILE}: every rank reads it", COMMAND_LINE))
    if path is None and Path(name).is_dir():
        keys = ("input.paths", "data.train", "data.sources.mine.path")
        key = next((key for key in keys if find(schema, key)), "run_dir")
        what = f"{name!r} is a folder, not a YAML file; did you mean {setting(key, name)}?"
        raise ProblemError(Problem("", "", what, COMMAND_LINE))
    similar = similar_configs(name) if path is None else []
    is_recipe = any(Path(recipe).stem == name for recipe in similar)
    if path is None and "=" not in name and find(schema, name) and not is_recipe:
        raise ProblemError(Problem("", "", f"{name!r} is a setting; write {name}=VALUE, without spaces", COMMAND_LINE))
    if path is None:
        hint = f"; did you mean {' or '.join(similar)}?" if similar else LISTED
        raise ProblemError(Problem("", "", f"no file {name!r}, here or among the recipes{hint}", COMMAND_LINE))
    return path


def _config_of_run(schema: type, folder: Path) -> Path:
    is_finetuned = "task" in read_values(folder)
    if is_finetuned is not issubclass(schema, FinetuneConfig):
        kind, other = ("fine-tuned", "finetune") if is_finetuned else ("pretrained", "pretrain")
        what = f"{str(folder)!r} is a {kind} run; to resume it: {command('bigtx', other, folder)}"
        if not is_finetuned:
            what += f"; to fine-tune it: {setting('base', str(folder))}"
        raise ProblemError(Problem("", "", what, COMMAND_LINE))
    return folder / CONFIG


def _read_sound(path: Path) -> tuple[Node, list[Path]]:
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
        if not file.is_file():
            problems.append(
                Problem(BASE, node.content, f"no file {file}; base: is relative to its own file", node.where)
            )
            continue
        below = merge(below, _read_file(file, problems, (*above, path), visited))
    return merge(below, Node(own, tree.where))


def _is_run(base: Node, path: Path) -> bool:
    """Return whether a file's `base:` names a run to start a fine-tuning from, not files to build on. In a run's
    own config.yaml it always does, and that run may be missing.
    """
    if base.is_null or (path.name == CONFIG and is_run(path.parent)):
        return True
    name = base.content
    return isinstance(name, str) and not (path.parent / name).is_file() and Path(name).is_dir()


def _base_names(base: Node | None) -> list[Node]:
    if base is None:
        return []
    nodes = base.content if isinstance(base.content, list) else [base]
    for node in nodes:
        if not isinstance(node.content, str) or node.is_null:
            raise ProblemError(Problem(BASE, node.text, "names a file or a list of files", node.where))
    return nodes


def _construct(schema: type[T], values: dict[str, Any]) -> T:
    # OmegaConf is slow to import, and nothing needs it earlier.
    from omegaconf import OmegaConf

    config = OmegaConf.merge(_defaults(schema), OmegaConf.create(values))  # type: ignore[arg-type] # A class can be hashed.
    built = OmegaConf.to_object(config)
    assert isinstance(built, schema)
    return built


@functools.cache
def _defaults(schema: type) -> Any:
    """Return a schema's defaults for OmegaConf, which takes long to make them and copies them when it merges."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(schema)


def _help(schema: type, program: str, flags: Mapping[str, str], others: Mapping[str, str], example: str) -> str:
    about = (
        "Files build on the defaults in the order given, KEY=VALUE on the files. A file may be a recipe of "
        "`bigtx configs list`. `bigtx configs explain KEY` explains a setting."
    )
    settings = [(setting.key, _summary(setting.section, setting.doc)) for setting in members(schema).values()]
    switches = " ".join(f"[{flag}]" for flag in flags)
    lines = [
        wrapped(f"usage: {program} [FILE.yaml ...] [KEY=VALUE ...] {switches}", " " * 7, ""),
        "",
        wrapped((schema.__doc__ or "").strip()),
        "",
        wrapped(about),
        "",
        *([wrapped(f"e.g. {program} {example}", " " * 7, "  "), ""] if example else []),
        *columns([*others.items(), *flags.items()]),
        "",
        "Settings and sections:",
        *columns(settings),
    ]
    return "\n".join(lines)


def _summary(section: type | None, doc: str) -> str:
    text = (section.__doc__ or "").strip() if section else doc
    return text.splitlines()[0] if text else ""
