"""`bigtx configs list | show | copy | plan | explain`: the recipes that come with bigtx, and what settings mean."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtx.config.load import base_files, load, resolved_files
from bigtx.config.runs import LISTED, find_config, shipped_configs, shipped_folder, similar_configs
from bigtx.config.schema import (
    FinetuneConfig,
    ModelConfig,
    PrepareConfig,
    PretrainConfig,
    RunConfig,
    TokenizerTrainConfig,
)
from bigtx.config.settings import Setting, describe_type, find, members, paragraphs, similar_keys
from bigtx.model.plan import MFU, plan_lines, plan_run
from bigtx.model.size import count_parameters
from bigtx.utils import shell
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import ConfigError, writes
from bigtx.utils.hardware import peak_flops
from bigtx.utils.log import say, say_json, say_result
from bigtx.utils.shell import command
from bigtx.utils.terminal import wrapped
from bigtx.utils.units import format_count

SCHEMAS: dict[str, type] = {
    "bigtx pretrain": PretrainConfig,
    "bigtx finetune": FinetuneConfig,
    "bigtx tokenizer train": TokenizerTrainConfig,
    "bigtx data prepare": PrepareConfig,
}
KINDS: dict[str, tuple[type, ...]] = {
    "data": (TokenizerTrainConfig, PrepareConfig),
    "model": (PretrainConfig,),
    "pretrain": (PretrainConfig,),
    "finetune": (FinetuneConfig,),
}
"""The recipes' folders in the order of use, and the schemas of the files in each."""
CHANGES = {
    "free": "may change when a run is resumed",
    "by_name": "may change when a run is resumed, if allow_changes names it",
    "never": "cannot change within a run",
}
USUAL_GPUS = (1, 8, 64)
"""Numbers of GPUs that `bigtx configs plan` compares, without those that cannot share the batch."""
_SIZE = re.compile(r"# parameters: [\d,]+ with a vocabulary of (?P<vocabulary>[\d,]+)")


@dataclass(frozen=True)
class Recipe:
    """A file of settings that comes with bigtx.

    Attributes:
        about: its purpose, in a few words.
        vocabulary: the vocabulary size with which `parameters` is counted; the true one depends on the data.
        parameters: the number of parameters of its model; None if the model comes from a base.
    """

    name: str
    about: str
    vocabulary: int | None
    parameters: int | None


def list_command(argv: Sequence[str]) -> None:
    """Print the recipes by kind and size, with the purpose of each."""
    as_json = Arguments("configs list", "The recipes that come with bigtx.").parse_args(argv).json
    recipes = sorted(map(_recipe, shipped_configs()), key=_kind_and_size)
    if as_json:
        say_json([dataclasses.asdict(recipe) for recipe in recipes])
        return
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        size = format_count(recipe.parameters) if recipe.parameters else ""
        say(f"{recipe.name:<{width}}  {size:>5}  {recipe.about}".rstrip())
    say()
    say(
        wrapped("The size is in parameters, with the vocabulary that the file names. No size: the model is the base's.")
    )
    say("Use one by its name, or copy it to change it: bigtx configs copy NAME")


def show_command(argv: Sequence[str]) -> None:
    """Print a recipe's YAML; with --resolved, including the settings of the files that it builds on.

    Raises:
        ConfigError: there is no such recipe or file.
    """
    parser = Arguments("configs show", "Print a recipe, or a file of your own.", json="")
    parser.add_argument("name", metavar="NAME", help="a recipe of `bigtx configs list`, or a file")
    parser.add_argument("--resolved", action="store_true", help="with the settings of the files that it builds on")
    options = parser.parse_args(argv)
    path = _found(options.name)
    text = resolved_files(path) if options.resolved else path.read_text(encoding="utf-8")
    say(text.rstrip("\n"))


def copy_command(argv: Sequence[str]) -> None:
    """Copy a recipe and the files that it builds on, so that its `base:` lines remain valid.

    Raises:
        ConfigError: there is no such recipe, or another file has the name of a copy.
    """
    parser = Arguments("configs copy", "Copy a recipe and the files that it builds on.", json="")
    parser.add_argument("name", metavar="NAME", help="a recipe of `bigtx configs list`")
    parser.add_argument(
        "output", metavar="FOLDER", nargs="?", default="configs", help="folder for the copies (configs)"
    )
    options = parser.parse_args(argv)
    recipe, root = options.name.removeprefix("configs/"), shipped_folder().resolve()
    if recipe not in shipped_configs():
        raise _no_recipe(options.name)
    copies = {path: Path(options.output) / path.relative_to(root) for path in base_files(root / recipe)}
    for source, target in copies.items():
        if target.exists() and (target.samefile(source) or target.read_bytes() != source.read_bytes()):
            what = "is the recipe itself" if target.samefile(source) else "exists already with other content"
            what = f"{target} {what}; name another folder: {command('bigtx', 'configs', 'copy', recipe)} output=FOLDER"
            raise ConfigError(what)
    for source, target in copies.items():
        with writes(target, "; name another folder"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        print(f"wrote {target}")
    copy = command(Path(options.output) / recipe)
    if recipe.startswith("finetune/"):
        config = load(FinetuneConfig, [str(root / recipe)], check=False)
        given = " base=RUN" * (config.base is None and config.tokenizer is None)
        given += " data.train=FILES" * (not config.data.train)
        print(f"\nEdit it, then run: bigtx finetune {copy}{given} run_dir=runs/mine")
    if recipe.startswith("pretrain/"):
        has_data = load(PretrainConfig, [str(root / recipe)], check=False).data.sources
        given = "" if has_data else "data.sources.mine.path=CORPUS "
        print(f"\nEdit it, then run: bigtx pretrain {copy} {given}run_dir=runs/mine")
        if given:
            print("CORPUS is the output folder of a `bigtx data prepare`.")


def plan_command(argv: Sequence[str]) -> None:
    """Print the memory, time and communication of pretraining on some numbers of GPUs.

    Raises:
        ConfigError: there is no such recipe or file, or the estimate does not cover it.
    """
    parser = Arguments(
        "configs plan",
        "Estimate pretraining from its config: memory of each GPU, micro batches, time and communication, "
        f"at {MFU:.0%} of the GPU's peak; see docs/sizes.md.",
    )
    parser.add_argument("name", metavar="NAME", help="a recipe of `bigtx configs list`, or a file")
    parser.add_argument("--gpus", metavar="N,N", help="numbers of GPUs (of 1, 8 and 64 those that divide the batch)")
    parser.add_argument("--gpu", metavar="NAME", default="H100", help="the name of the GPU (H100)")
    parser.add_argument("--vocab-size", metavar="N", type=int, help="number of ids of the tokenizer (that of the file)")
    options = parser.parse_args(argv)
    path = _found(options.name)
    if options.gpus and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.gpus):
        raise ConfigError(f"gpus={options.gpus}: write numbers of GPUs, e.g. gpus=8 or gpus=1,8,64")
    config = load(PretrainConfig, [str(path)], check=False)
    gpus = [int(number) for number in options.gpus.split(",")] if options.gpus else []
    gpus = gpus or [number for number in USUAL_GPUS if not any(config.train.division_problems(number))]
    size = options.vocab_size or config.model.vocab_size or _vocabulary(path)
    if size is None:
        raise ConfigError(f"{path} does not say how many ids its tokenizer has; write vocab_size=50304, for example")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    peak = peak_flops(options.gpu, config.engine.precision)
    if peak is None:
        raise ConfigError(f"gpu={options.gpu}: its peak in {config.engine.precision} is not known; write gpu=H100")
    plans = [plan_run(config, number, peak) for number in gpus]
    facts = [dataclasses.asdict(plan) for plan in plans]
    say_result(options.json, lambda: facts, lambda: plan_lines(config, plans, options.gpu))


def _found(name: str) -> Path:
    path = find_config(name)
    if path is None:
        raise _no_recipe(name)
    return path


def _no_recipe(name: str) -> ConfigError:
    similar = " or ".join(similar_configs(name))
    return ConfigError(f"no recipe {name!r}{f'; did you mean {similar}?' if similar else LISTED}")


def _kind_and_size(recipe: Recipe) -> tuple[int, int, str]:
    folder = recipe.name.partition("/")[0]
    order = list(KINDS).index(folder) if folder in KINDS else len(KINDS)
    return order, recipe.parameters or 0, recipe.name


def _recipe(name: str) -> Recipe:
    path = shipped_folder() / name
    lines = path.read_text(encoding="utf-8").splitlines()
    vocabulary = _vocabulary(path)
    parameters = None
    if vocabulary is not None:
        model: ModelConfig = load(KINDS[name.partition("/")[0]][0], [str(path)], check=False).model
        parameters = count_parameters(dataclasses.replace(model, vocab_size=vocabulary)).total
    return Recipe(name, _about(lines[0] if lines else ""), vocabulary, parameters)


def _vocabulary(path: Path) -> int | None:
    """Return the vocabulary size in the first of a recipe's files that has one; else None."""
    sizes = [_SIZE.match(line) for file in base_files(path) for line in file.read_text(encoding="utf-8").splitlines()]
    return next((int(size["vocabulary"].replace(",", "")) for size in sizes if size), None)


def _about(line: str) -> str:
    """Return the purpose of a recipe from its first line: the words before the first sign that ends a clause."""
    text = re.sub(_SIZE.pattern + ": ", "", line).removeprefix("#").strip()
    return re.split(r"[:;]|\.$", text)[0]


def explain_command(argv: Sequence[str]) -> None:
    """Print the meaning of a setting or a section.

    Raises:
        ConfigError: no schema has the key.
    """
    parser = Arguments("configs explain", "The meaning of a setting, its type and its default.")
    parser.add_argument(
        "key", metavar="KEY", nargs="?", help="a setting or a section, e.g. train.max_steps or model (all)"
    )
    options = parser.parse_args(argv)
    found = {title: find(schema, options.key) if options.key else None for title, schema in SCHEMAS.items()}
    if options.key and not any(found.values()):
        similar = [name for schema in SCHEMAS.values() for name in similar_keys(schema, options.key)]
        either = " or ".join(dict.fromkeys(similar))
        hint = f"did you mean {either}?" if similar else "`bigtx configs explain` shows all"
        raise ConfigError(f"no setting {options.key!r}; {hint}")
    shown = {title: setting for title, setting in found.items() if setting is not None or not options.key}
    if options.json:
        facts = {title: [_facts(one) for one in _settings(SCHEMAS[title], setting)] for title, setting in shown.items()}
        say_json(facts)
        return
    for number, (title, setting) in enumerate(shown.items()):
        say(f"{chr(10) if number else ''}{title}")
        for line, indent in _lines(SCHEMAS[title], setting):
            say(wrapped(line, " " * indent, "  ").rstrip())


def _settings(schema: type, setting: Setting | None) -> list[Setting]:
    """Return a setting, or those of a section."""
    if setting is None:
        return list(members(schema).values())
    return list(setting.members().values()) if setting.section else [setting]


def _facts(setting: Setting) -> dict[str, Any]:
    return {
        "key": setting.key,
        "default": None if setting.section else setting.default,
        "type": describe_type(setting),
        "resume": setting.change,
        "meaning": setting.about,
    }


def _lines(schema: type, setting: Setting | None) -> Iterator[tuple[str, int]]:
    """Yield lines about a setting or a section, each with the indentation of its continuation lines."""
    if setting is None or setting.section:
        about = setting.about if setting else paragraphs(schema.__doc__ or "")
        yield from ((line.strip(), 2) for line in [*about.splitlines(), ""])
        for member in _settings(schema, setting):
            yield f"{member.key if member.section else _default(member)}: {member.about}", 6
        return
    yield _default(setting), 2
    yield setting.doc, 2
    yield f"Write {describe_type(setting)}.", 2
    yield from ((f"{member.key}: {member.doc}", 6) for member in setting.members().values())
    if issubclass(schema, RunConfig):
        yield f"It {CHANGES[setting.change]}.", 2


def _default(setting: Setting) -> str:
    return f"{setting.key}={shell.written(setting.default)}"
