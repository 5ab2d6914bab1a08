"""`bigtx configs list | copy | explain`: the recipes that come with bigtx, and what each setting means."""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from bigtx.config.load import base_files, load
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, RunConfig, TokenizerTrainConfig
from bigtx.config.settings import Setting, describe_type, find, members, similar_keys
from bigtx.config.shipped import shipped_configs, shipped_folder
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import ConfigError
from bigtx.utils.shell import command

SCHEMAS: dict[str, type] = {
    "pretraining (bigtx/pretrain.py)": PretrainConfig,
    "fine-tuning (bigtx-finetune)": FinetuneConfig,
    "bigtx tokenizer train": TokenizerTrainConfig,
    "bigtx data prepare": PrepareConfig,
}
CHANGES = {
    "free": "may change when a run is resumed",
    "by_name": "may change when a run is resumed, if allow_changes names it",
    "never": "cannot change within a run",
}


def list_command(argv: Sequence[str]) -> int:
    """Print the recipes, each with the first line of its comment."""
    parser = Arguments(prog="bigtx configs list", description="The recipes that come with bigtx.")
    parser.parse_args(argv)
    names = shipped_configs()
    width = max(map(len, names), default=0) + 2
    for name in names:
        print(f"{name:<{width}}{_headline(shipped_folder() / name)}".rstrip())
    print("\nUse one by its name, or copy it to change it: bigtx configs copy NAME")
    return 0


def copy_command(argv: Sequence[str]) -> int:
    """Copy a recipe and the files it builds on, so that its `base:` lines still hold.

    Raises:
        ConfigError: no such recipe, or another file stands in the way.
    """
    parser = Arguments(prog="bigtx configs copy", description="Copy a recipe and the files that it builds on.")
    parser.add_argument("name", help="a recipe of `bigtx configs list`")
    parser.add_argument("folder", nargs="?", default="configs", help="where to (default: configs)")
    options = parser.parse_args(argv)
    recipe, root = options.name.removeprefix("configs/"), shipped_folder().resolve()
    if recipe not in shipped_configs():
        raise ConfigError(f"no recipe {options.name!r}{_did_you_mean(recipe)}")
    copies = {path: Path(options.folder) / path.relative_to(root) for path in base_files(root / recipe)}
    for source, target in copies.items():
        if target.exists() and (target.samefile(source) or target.read_bytes() != source.read_bytes()):
            what = "is the recipe itself" if target.samefile(source) else "is there already, with other content"
            raise ConfigError(
                f"{target} {what}; name another folder: {command('bigtx', 'configs', 'copy', recipe)} FOLDER"
            )
    for source, target in copies.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror}; name another folder") from error
        print(f"wrote {target}")
    copy = command(Path(options.folder) / recipe)
    if recipe.startswith("finetune/"):
        config = load(FinetuneConfig, [str(root / recipe)], check=False)
        given = " base=RUN" * (config.base is None and config.tokenizer is None)
        given += " data.train=FILES" * (not config.data.train)
        print(f"\nEdit it, then run: bigtx-finetune {copy}{given} run_dir=runs/mine")
    if recipe.startswith("pretrain/"):
        has_data = load(PretrainConfig, [str(root / recipe)], check=False).data.sources
        given = "" if has_data else "data.sources.mine.path=CORPUS "
        print(f"\nEdit it, then run: deepspeed --module bigtx.pretrain {copy} {given}run_dir=runs/mine")
        if given:
            print("CORPUS is the output folder of a `bigtx data prepare`.")
    return 0


def _did_you_mean(name: str) -> str:
    # By the file's name alone: most people type only that.
    recipes = shipped_configs()
    similar = difflib.get_close_matches(Path(name).name, {Path(recipe).name for recipe in recipes}, 3, 0.75)
    best = [recipe for recipe in recipes if Path(recipe).name in similar[:1]]
    return f"; did you mean {' or '.join(best)}?" if best else "; `bigtx configs list` shows them"


def explain_command(argv: Sequence[str]) -> int:
    """Print what a setting or a section means.

    Raises:
        ConfigError: no schema has the key.
    """
    parser = Arguments(prog="bigtx configs explain", description="What a setting means, its type and its default.")
    parser.add_argument("key", nargs="?", help="a setting or a section, e.g. train.max_steps or model; all if left out")
    key = parser.parse_args(argv).key
    found = 0
    for title, schema in SCHEMAS.items():
        setting = find(schema, key) if key else None
        if key and setting is None:
            continue
        found += 1
        print(f"{'' if found == 1 else chr(10)}{title}")
        if setting is None or setting.section:
            section = schema if setting is None else setting.section
            assert section is not None
            print(textwrap.indent(_section_text(section, setting), "  "))
        else:
            print(textwrap.indent(_setting_text(setting, schema), "  "))
    if not found:
        similar = [name for schema in SCHEMAS.values() for name in similar_keys(schema, key)]
        hint = (
            f"; did you mean {' or '.join(dict.fromkeys(similar))}?"
            if similar
            else "; `bigtx configs explain` shows all"
        )
        raise ConfigError(f"no setting {key!r}{hint}")
    return 0


def _headline(path: Path) -> str:
    match = re.match(r"#\s*(.*)", path.read_text(encoding="utf-8"))
    return match[1] if match else ""


def _section_text(section: type, setting: Setting | None) -> str:
    prefix, change = (f"{setting.key}.", setting.change) if setting else ("", "never")
    lines = [(section.__doc__ or "").strip(), ""]
    for member in members(section, prefix, change).values():
        if member.section:
            lines.append(f"{member.key}: {(member.section.__doc__ or '').strip()}")
        else:
            lines.append(f"{member.key}={_show(member.default)}: {member.doc}")
    return "\n".join(lines)


def _setting_text(setting: Setting, schema: type) -> str:
    lines = [f"{setting.key}={_show(setting.default)}", setting.doc, f"Write {describe_type(setting)}."]
    if setting.named_section:
        lines += [
            f"  {member.key}: {member.doc}"
            for member in members(setting.named_section, f"{setting.key}.NAME.").values()
        ]
    if issubclass(schema, RunConfig):
        lines.append(f"It {CHANGES[setting.change]}.")
    return "\n".join(lines)


def _show(default: object) -> str:
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)
