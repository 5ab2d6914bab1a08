"""The settings of a schema: the marks of their fields, and the properties of each key.

A field that people write as text (a count, a size, a duration, a share of a run) keeps one plain type in the dataclass
(int or str), so OmegaConf can hold it; its mark says how the loader reads the text, and how far the value may change on
resume.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bigtx.utils.units import COUNTS, DURATIONS, SIZES, Unit, parse_count, parse_size

Change = Literal["free", "by_name", "never"]
"""The changes that resume allows: any change; a change named in `allow_changes`; no change at all."""

_hints = functools.cache(typing.get_type_hints)
LARGEST = {int: 2**63 - 1, float: 1e38}
"""The largest number of each type where a field has no smaller maximum: about what int64 and fp32 hold."""


def field(
    default: Any = dataclasses.MISSING,
    *,
    kind: str = "",
    change: Change | Literal[""] = "",
    minimum: float | None = None,
    maximum: float | None = None,
    units: Sequence[Unit] = ("steps", "tokens", "seconds", "fraction"),
    factory: Any = dataclasses.MISSING,
) -> Any:
    """Return a schema field with properties that the type cannot express.

    Args:
        kind: "count" (`10B`, `64k` into an int), "size" (`512 MiB` into bytes), "duration" (`500 steps`,
            `2B tokens`, `30 min`, kept as text), "path" (a file or folder, or a list of them: another spelling of the
            same place is not a change), or "" for the plain type.
        change: how far resume lets the value change; "" means as its section says.
        minimum, maximum: inclusive bounds of a number, or of each number in a list or mapping. Every number has a
            minimum; where it has no maximum, `LARGEST` holds.
        units: those in which a duration may be given.
    """
    metadata = {"kind": kind, "change": change, "minimum": minimum, "maximum": maximum, "units": units}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(factory: Any, *, change: Change) -> Any:
    """Return a nested section; `change` is the default for the fields inside."""
    return field(factory=factory, change=change)


NAME = "NAME"
"""The placeholder in a key for a name that the user chooses: `data.sources.NAME.path`."""

_LENGTHS = "block_size seq_len seq_length max_seq_len max_seq_length max_length"
OTHER_NAMES = {
    "optimizer.learning_rate": "lr",
    "train.global_batch_size": "batch_size train_batch_size",
    "train.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu",
    "train.sequence_length": _LENGTHS,
    "data.max_length": _LENGTHS,
    "train.max_steps": "max_iters train_iters steps",
    "train.max_tokens": "num_train_epochs",
    "train.epochs": "num_train_epochs",
    "train.gradient_clipping": "max_grad_norm grad_clip",
    "train.checkpoint_every": "save_steps save_interval",
    "train.log_every": "logging_steps log_interval",
    "validation.every": "eval_steps eval_interval",
    "schedule.name": "lr_scheduler_type lr_decay_style",
    "schedule.warmup": "warmup_steps lr_warmup_steps",
    "engine.precision": "bf16 fp16",
    "engine.zero_stage": "stage",
    "engine.activation_checkpointing": "gradient_checkpointing checkpoint_activations",
    "model.hidden_size": "d_model dim n_embd",
    "model.num_layers": "n_layer n_layers num_hidden_layers",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.num_kv_heads": "num_key_value_heads n_query_groups",
    "model.mlp_size": "intermediate_size",
    "model.max_sequence_length": "max_position_embeddings",
    "run_dir": "output output_dir out_dir",
    "output": "output_dir out_dir run_dir",
}
"""The names that other frameworks have for settings, if they are too different for a comparison of letters. A name may
mean a setting of each schema.
"""


@dataclass(frozen=True)
class Setting:
    """One key of a schema.

    Attributes:
        key: dotted, from the top.
        type: the annotation without Optional.
        optional: whether null is a valid value.
        kind, minimum, units: as in `field`.
        maximum: as in `field`, or the maximum of the type.
        change: the changes that resume allows, inherited from the section if the field has none.
        doc: the docstring below the field in the schema.
    """

    key: str
    type: Any
    optional: bool
    default: Any
    kind: str
    minimum: float | None
    maximum: float | None
    units: Sequence[Unit]
    change: Change
    doc: str

    @property
    def name(self) -> str:
        """Return the last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def about(self) -> str:
        """Return what it means; for a section the docstring of its class."""
        return paragraphs(self.section.__doc__ or "") if self.section else self.doc

    def members(self) -> dict[str, Setting]:
        """Return the settings of a section, or of an entry that the user names; none for other settings."""
        inner = self.section or self.named_section
        prefix = f"{self.key}." if self.section else f"{self.key}.{NAME}."
        return members(inner, prefix, self.change) if inner else {}

    @property
    def section(self) -> type | None:
        """Return the dataclass of a nested section."""
        return self.type if dataclasses.is_dataclass(self.type) else None

    @property
    def named_section(self) -> type | None:
        """Return the dataclass of the entries, where users name the entries: dict[str, Section]."""
        arguments = typing.get_args(self.type)
        if typing.get_origin(self.type) is dict and dataclasses.is_dataclass(arguments[1]):
            return typing.cast(type, arguments[1])
        return None

    @property
    def number(self) -> type | None:
        """Return int or float for a number and for a list or mapping of numbers; None for other types."""
        return _number_in(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the values of a Literal; empty for other types."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()


def members(schema: type, prefix: str = "", change: Change = "never") -> dict[str, Setting]:
    """Return the direct fields of a dataclass, by name.

    Args:
        prefix: the prefix of their keys, with its dot.
        change: the mark of the section.
    """
    hints, docs = _hints(schema), documentation(schema)
    found = {}
    for field in dataclasses.fields(schema):
        annotation, optional = _without_none(hints[field.name])
        marks = field.metadata
        found[field.name] = Setting(
            key=prefix + field.name,
            type=annotation,
            optional=optional,
            default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
            kind=marks.get("kind", ""),
            minimum=marks.get("minimum"),
            maximum=_largest(annotation) if marks.get("maximum") is None else marks["maximum"],
            units=marks.get("units", ()),
            change=marks.get("change") or change,
            doc=docs.get(field.name, ""),
        )
    return found


def leaves(schema: type) -> Iterator[Setting]:
    """Yield every setting of a schema in its order; entries that the user names have `NAME` in their keys."""
    return _leaves(members(schema))


def _leaves(settings: Mapping[str, Setting]) -> Iterator[Setting]:
    for setting in settings.values():
        if not setting.section:
            yield setting
        yield from _leaves(setting.members())


def walk(schema: type, values: Any, prefix: str = "", change: Change = "never") -> Iterator[tuple[Setting, Any]]:
    """Yield every setting of nested values with the mapping that may hold its value, by its name.

    Args:
        values: nested dicts; a section that is missing counts as empty.

    Raises:
        TypeError: a section is not a dict.
    """
    values = _mapping(values)
    for name, setting in members(schema, prefix, change).items():
        if setting.section:
            yield from walk(setting.section, values.get(name), f"{setting.key}.", setting.change)
        elif setting.named_section:
            for entry, inner in _mapping(values.get(name)).items():
                yield from walk(setting.named_section, inner, f"{setting.key}.{entry}.", setting.change)
        else:
            yield setting, values


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise TypeError(f"{value!r} is not a mapping")
    return value or {}


def find(schema: type, key: str) -> Setting | None:
    """Return the setting of a key as a user writes it (`data.sources.wiki.path`), or the setting of a section."""
    setting, known, names = None, members(schema), key.split(".")
    while names:
        setting = known.get(names.pop(0))
        if setting is None:
            return None
        inner = setting.named_section or (float if setting.type == dict[str, float] else None)
        if names and inner:
            setting = dataclasses.replace(setting, key=f"{setting.key}.{names.pop(0)}", type=inner)
        known = setting.members() if setting.section else {}
    return setting


def similar_keys(schema: type, key: str) -> list[str]:
    """Return the keys that the user may have meant: the same name elsewhere, another framework's name, a few other
    letters.
    """
    known = _known_keys(schema)
    section, _, name = key.rpartition(".")
    found = same_name_keys(schema, key, limit=len(known))
    in_section = {member.rpartition(".")[2]: member for member in known if member.rpartition(".")[0] == section}
    found += [in_section[match] for match in difflib.get_close_matches(name, in_section, 3, 0.7)]
    if not found:
        last_names = [candidate.rpartition(".")[2] for candidate in known]
        for match in difflib.get_close_matches(name, dict.fromkeys(last_names), 3, 0.75):
            found += [candidate for candidate, last in zip(known, last_names, strict=True) if last == match]
    if not found:
        found = difflib.get_close_matches(key, known, 3, 0.75)
    return list(dict.fromkeys(found))[:3]


def same_name_keys(schema: type, key: str, *, limit: int = 3) -> list[str]:
    """Return the keys of the same name in other sections, or of the name that another framework has for it."""
    name = key.rpartition(".")[2]
    known = _known_keys(schema)
    found = [candidate for candidate in known if candidate.rpartition(".")[2] == name and candidate != key]
    found += [candidate for candidate in known if name.lower() in OTHER_NAMES.get(candidate, "").split()]
    return list(dict.fromkeys(found))[:limit]


@functools.cache
def _known_keys(schema: type) -> tuple[str, ...]:
    """Return every setting, and every section."""
    known = [setting.key for setting in leaves(schema)]
    return (*known, *dict.fromkeys(prefix for name in known for prefix in _parents(name)))


def describe_type(setting: Setting) -> str:
    """Return a description of the values that a setting accepts."""
    if setting.section:
        return "a section"
    if setting.named_section:
        return "entries by name, each a section"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if setting.choices:
        text = "one of " + ", ".join(setting.choices)
    elif setting.kind in ("count", "size", "duration"):
        text = f"a {setting.kind} ({', '.join(examples(setting))})"
    elif typing.get_origin(setting.type) is list:
        numbers = f"a list of {'whole ' * (setting.number is int)}numbers: {example_list(setting)}"
        text = numbers if setting.number else "a text, or a list of them: [a, b]"
    else:
        text = "numbers by name" if setting.type == dict[str, float] else plain.get(setting.type, "keys and values")
    if setting.minimum is not None:
        text += f", at least {show_number(setting.minimum)}"
    if setting.maximum is not None and setting.maximum not in LARGEST.values():
        text += f", at most {show_number(setting.maximum)}"
    return text + (", or null" if setting.optional else "")


def examples(setting: Setting) -> list[str]:
    """Return values that a setting of a number, a count, a size or a duration accepts, as people write them."""
    if setting.kind == "duration":
        return [DURATIONS[unit] for unit in setting.units]
    read: Callable[[str], float]
    texts, read = {
        "count": (COUNTS, parse_count),
        "size": (SIZES, parse_size),
        "": (("8",), float) if setting.type is int else (("0.5", "3e-4"), float),
    }[setting.kind]
    least = -math.inf if setting.minimum is None else setting.minimum
    most = math.inf if setting.maximum is None else setting.maximum
    other = setting.default if isinstance(setting.default, int | float) else least
    return [text for text in texts if least <= read(text) <= most] or [show_number(other)]


def example_list(setting: Setting) -> list[float]:
    """Return a list that a setting of numbers accepts."""
    return list(setting.default or [0.2, 0.1])


def show_number(number: float) -> str:
    """Return a number for a message: a whole one in all its digits, and another one so that it is read back."""
    short = f"{number:g}"
    return str(number) if isinstance(number, int) or float(short) != number else short


def paragraphs(docstring: str) -> str:
    """Return a docstring with each paragraph on one line, for a reader that divides the lines again."""
    return "\n".join(" ".join(part.split()) for part in docstring.split("\n\n")).strip()


@functools.cache
def documentation(schema: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, by field name, including inherited fields."""
    inherited = [documentation(parent) for parent in schema.__bases__ if dataclasses.is_dataclass(parent)]
    docs = {name: doc for parent in inherited for name, doc in parent.items()}
    tree = _syntax_tree(sys.modules[schema.__module__])
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == schema.__name__)
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[statement.target.id] = paragraphs(value.value)
    return docs


@functools.cache
def _syntax_tree(module: types.ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def _without_none(annotation: Any) -> tuple[Any, bool]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and type(None) in arguments:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return inner, True
    return annotation, False


def _number_in(annotation: Any) -> type | None:
    inner = typing.get_args(annotation)[-1] if typing.get_origin(annotation) in (list, dict) else annotation
    return inner if inner in (int, float) else None


def _largest(annotation: Any) -> float | None:
    number = _number_in(annotation)
    return LARGEST[number] if number else None


def _parents(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)) if parts[length - 1] != NAME)
