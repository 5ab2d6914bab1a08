"""The one loader: schema defaults <- YAML files in the order given <- KEY=VALUE arguments."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import yaml

from bigtx.config.convert import Converter, needs_quotes
from bigtx.config.nodes import (
    COMMAND_LINE,
    Node,
    Problem,
    ProblemError,
    from_values,
    merge,
    raise_problems,
    read_argument,
)
from bigtx.config.runs import CONFIG, gives_config, read_values, run_dir_of
from bigtx.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from bigtx.config.settings import find, leaves, members
from bigtx.config.shape import learning_rate_for
from bigtx.config.tree import merged_tree, read_file_and_bases
from bigtx.utils.arguments import JSON_HELP, take
from bigtx.utils.errors import ConfigError
from bigtx.utils.log import say
from bigtx.utils.terminal import columns, wrapped

T = TypeVar("T")

PRINT_CONFIG = {"--print-config": "print the resolved configuration and exit"}
RANKS = "--ranks"
FLAGS = PRINT_CONFIG | {
    "--dry-run": "build everything, do one step and exit",
    RANKS: "how many ranks to start (one for each GPU), e.g. --ranks 2",
}
JSON = {"--json": JSON_HELP}
LOCAL_RANK = ("--local_rank", "--local-rank")
"""Options that launchers add to every rank's command line; the environment holds the same."""

Rules = Callable[[T], Iterable[Problem]]
"""Rules of a configuration in addition to its own."""


@runtime_checkable
class Checked(Protocol):
    """A configuration with rules between its settings."""

    def problems(self) -> Iterator[Problem]:
        """Yield every problem between the settings, and every file that they name and that does not exist."""


def load(schema: type[T], args: Sequence[str], *, check: bool = True) -> T:
    """Return the configuration that a command line asks for.

    Args:
        schema: a dataclass of `bigtx.config.schema`.
        args: YAML paths (a user's own or a recipe's name) and key=value items, mixed.
        check: whether to check that settings fit each other and that the files that they name exist.

    Raises:
        ConfigError: there are problems; the message lists all of them.
    """
    return _load(schema, args, check=check)[0]


def _load(
    schema: type[T], args: Sequence[str], *, check: bool, flags: Collection[str] = FLAGS, rules: Rules[T] | None = None
) -> tuple[T, list[Path]]:
    """Load a config as `load` does, and return it with the files that were read."""
    (tree, files, problems, whole), converter = merged_tree(schema, args, flags), Converter(schema)
    config = _construct(schema, converter.convert(tree))
    problems += converter.problems
    if check and whole and isinstance(config, Checked):
        # A section with a problem would cause further problems: its missing values are defaults here.
        broken = {problem.key.partition(".")[0] for problem in problems}
        if "base" in broken:
            broken.add("model")  # A fine-tuning has the model of its base.
        for problem in itertools.chain(config.problems(), rules(config) if rules else ()):
            if not broken & {key.partition(".")[0] for key in (problem.key, *problem.related)}:
                problems.append(dataclasses.replace(problem, where=converter.origins.get(problem.key, "")))
    if problems:
        _refuse_other_recipe(schema, files)
    raise_problems(problems)
    if isinstance(config, RunConfig) and config.optimizer.learning_rate is None:
        config.optimizer.learning_rate = learning_rate_for(config.model)
    return config, files


def _refuse_other_recipe(schema: type, files: Iterable[Path]) -> None:
    """Refuse a recipe, or its copy, that another command takes.

    Raises:
        ConfigError: one of the files is such a recipe.
    """
    takes: dict[str, type] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    for file in files:
        folder = file.absolute().parent
        if folder.parent.name == "configs" and takes.get(folder.name, schema) is not schema:
            recipe = f"{folder.name}/{file.name}"
            raise ConfigError(f"{recipe} is a recipe of another command; did you mean bigtx {folder.name} {recipe}?")


def from_dict(schema: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Return a configuration from plain values, e.g. of a saved config.

    Raises:
        ConfigError: the schema does not allow a value; the message lists all such values.
    """
    return _converted(schema, from_values(values, where), [])


def load_run_config(folder: Path | str) -> RunConfig:
    """Return the config of a run of any kind, or of the run of a checkpoint.

    Raises:
        CheckpointError: it is not a run.
        ConfigError: the config has entries that this version of bigtx does not know, or no model can be built by it.
    """
    values, where = read_values(folder), str(run_dir_of(folder) / CONFIG)
    schema = FinetuneConfig if "task" in values else PretrainConfig
    config = from_dict(schema, values, where=where)
    raise_problems([dataclasses.replace(problem, where=where) for problem in config.model.head_problems()])
    return config


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
        if (own.change == "free" and own.key.startswith(_dotted(sections))) or f"{own.key}.".startswith(_dotted(also))
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
    return _converted(schema, tree, problems)


def _converted(schema: type[T], tree: Node, problems: list[Problem]) -> T:
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


def yaml_of(values: Any) -> str:
    """Return values of a configuration (`to_dict`, or a tree) as a YAML file that `load` reads back as the same."""
    # Non-ASCII text is escaped: YAML reads some characters (U+0085, U+2028) as line ends and would return a space.
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)


def resolved_files(path: Path) -> str:
    """Return the settings of a file and the files that it builds on, as the YAML of one file, without defaults.

    Raises:
        ConfigError: one of them cannot be read.
    """
    return yaml_of(read_file_and_bases(path)[0])


class _Dumper(yaml.SafeDumper):
    """A YAML writer that quotes the texts that `load` would refuse without quotes."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "'" if needs_quotes(text) else None),
)


def _represent(dumper: Any, node: Node) -> Any:
    """Return a piece as it was written: a scalar without quotes gets none."""
    if isinstance(node.content, dict):
        return dumper.represent_mapping("tag:yaml.org,2002:map", node.content)
    if isinstance(node.content, list):
        return dumper.represent_sequence("tag:yaml.org,2002:seq", node.content)
    if node.plain:
        return dumper.represent_scalar(dumper.resolve(yaml.ScalarNode, node.content, (True, False)), node.content)
    return dumper.represent_scalar("tag:yaml.org,2002:str", node.content, "'")


_Dumper.add_representer(Node, _represent)


def base_files(path: Path) -> list[Path]:
    """Return a file and all files that it builds on by `base:` lines, as resolved paths.

    Raises:
        ConfigError: one of them cannot be read.
    """
    return list(dict.fromkeys(file.resolve() for file in read_file_and_bases(path)[1]))


@functools.cache
def _defaults(schema: type) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.structured(schema)


def _construct(schema: type[T], values: dict[str, Any]) -> T:
    # OmegaConf is slow to import, and nothing needs it earlier.
    from omegaconf import OmegaConf

    plain: type = schema
    built = OmegaConf.to_object(OmegaConf.merge(_defaults(plain), OmegaConf.create(values)))
    assert isinstance(built, schema)
    return built


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
    rules: Rules[T] | None = None,
) -> Parsed[T]:
    """Read the command line of an entry point; `--help` and `--print-config` are handled here, by rank 0 only.

    Args:
        argv: the words after the program's name.
        program: the command as a user writes it, for the help.
        flags: the switches that the program knows, with explanations.
        others: the options that the program reads from its command line itself, for the help.
        example: the settings of a typical command, for the help.
        check: as for `load`.
        rules: yields the problems that the program finds by facts that bigtx.config does not know.

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
    config, files = _load(schema, arguments, check=check, flags=flags, rules=rules)
    if "--print-config" in given:
        say(to_yaml(config).rstrip("\n"))
        raise SystemExit(0)
    if isinstance(config, RunConfig) and gives_config(Path(config.run_dir), files):
        # After a run's own config, the settings that the command gives may change.
        settings = (find(schema, argument.partition("=")[0]) for argument in arguments)
        config.allow_changes += [setting.key for setting in settings if setting and setting.change == "by_name"]
    return Parsed(config, frozenset(given), files, num_ranks)


def take_ranks(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return how many ranks a command line asks for (None for the default), and its other words.

    Raises:
        ConfigError: it is not a number of ranks.
    """
    text, others = take(words, RANKS.lstrip("-"))
    if text is not None and (not text.isdecimal() or int(text) < 1):
        raise ConfigError(f"{RANKS} {text}: write how many ranks to start on this machine, e.g. {RANKS} 2")
    return None if text is None else int(text), others


def _help(schema: type, program: str, flags: Mapping[str, str], others: Mapping[str, str], example: str) -> str:
    about = (
        "Files build on the defaults in the order given, KEY=VALUE on the files. A file may be a recipe of "
        "`bigtx configs list`. `bigtx configs explain KEY` explains a setting."
    )
    settings = [(setting.key, setting.about.partition("\n")[0]) for setting in members(schema).values()]
    switches = " ".join(f"[{flag}]" for flag in flags)
    paragraphs = [
        wrapped(f"usage: {program} [FILE.yaml ...] [KEY=VALUE ...] {switches}", " " * 7, ""),
        wrapped((schema.__doc__ or "").strip()),
        wrapped(about),
        *([wrapped(f"e.g. {program} {example}", " " * 7, "  ")] if example else []),
        "\n".join(columns([*others.items(), *flags.items()])),
        "\n".join(["Settings and sections:", *columns(settings)]),
    ]
    return "\n\n".join(paragraphs)
