"""Import of a Hugging Face folder as a run folder, which generation, fine-tuning and `init_from` open like any other
run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bigtx.config.load import to_yaml
from bigtx.config.schema import ClassifyConfig, FinetuneConfig, PretrainConfig
from bigtx.config.schema.model import ModelConfig
from bigtx.engine.write_weights import PART_BYTES, save_weights
from bigtx.interop.classes import pooling_of, read_classes, refuse_ambiguous_end
from bigtx.interop.families import by_model_type
from bigtx.interop.family import Family, Link, check_links, cut, foreign_shapes, padded
from bigtx.interop.read import CONFIG, ForeignWeights, read_config, read_end_ids, refuse_differences
from bigtx.model.initial import initial_value
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import CheckpointError, ConfigError, DataError
from bigtx.utils.files import new_folder, refuse_filled, write_atomic

OBJECTIVES: dict[str, Literal["causal", "masked", "span_corruption"]] = {
    "decoder": "causal",
    "encoder": "masked",
    "encoder_decoder": "span_corruption",
}
"""The usual objective of a model of each shape."""


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        model_type: the family.
        config: the config of the model.
        tokenizer: the tokenizer of the run.
        match: the use of the foreign tensors.
        num_files: safetensors files that contain them.
        checkpoint: the folder of the checkpoint.
    """

    model_type: str
    config: ModelConfig
    tokenizer: Tokenizer
    match: Match
    num_files: int
    checkpoint: Path


def import_model(
    source: Path, run_dir: Path, *, tokenizer_folder: Path | None = None, part_bytes: int = PART_BYTES
) -> Imported:
    """Read a Hugging Face model and write it as a run with one checkpoint, at step 0.

    Weights are in memory one link at a time.

    Args:
        source: a local folder with config.json, safetensors and a tokenizer.
        run_dir: the folder to create.
        tokenizer_folder: the folder of the tokenizer, if it is not in `source`.
        part_bytes: the approximate size of the files of the checkpoint.

    Raises:
        ConfigError: bigtx cannot express the model or its head, or run_dir is in use.
        CheckpointError: the weights are incomplete or do not fit config.json.
        DataError: there is no tokenizer, or it does not fit.
        LaunchError: run_dir cannot be written.
    """
    refuse_filled(run_dir)
    values = read_config(source)
    try:
        family = by_model_type(values["model_type"])
        classify = read_classes(family, values)
        config = family.read_config(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if classify is not None and family.classifier is not None:
        config = replace(config, num_classes=len(classify.classes), class_head=family.classifier.head)
    weights = ForeignWeights(source)
    spelled = _spellings(family, weights)
    config = family.settled(config, spelled)
    run = _run_config(run_dir, config, classify)
    if problems := [str(problem) for problem in run.problems() if problem.key.startswith("model.")]:
        raise ConfigError(f"{source / CONFIG} describes a model that bigtx cannot build: {'; '.join(problems)}")
    tokenizer = _tokenizer_of(tokenizer_folder or source, source, values, config)
    advice = "name its tokenizer without that token at the end of texts: tokenizer=FOLDER"
    refuse_ambiguous_end(pooling_of(run), tokenizer, values.get("pad_token_id"), advice=advice)
    match = _match(family, config, weights, spelled)
    facts = {
        "step": 0,
        "tokenizer": tokenizer.fingerprint,
        "data": None,
        "imported": {"from": source.resolve().name, "model_type": family.model_type, "untrained": match.untrained},
    }
    sizes = parameter_shapes(config)
    shapes = {name: sizes[name] for link in match.links for name in link.names}
    with new_folder(run_dir) as folder:
        write_atomic(folder / "config.yaml", to_yaml(run))
        tokenizer.save(folder / "tokenizer")
        tensors = _converted(match.links, match.keys, weights, config)
        made = save_weights(folder, facts, shapes, tensors, part_bytes=part_bytes)
    weights.close()
    place = run_dir / made.relative_to(folder)
    return Imported(family.model_type, config, tokenizer, match, weights.num_files, place)


def _run_config(run_dir: Path, model: ModelConfig, classify: ClassifyConfig | None) -> PretrainConfig | FinetuneConfig:
    """Return a config that continues the training of the model, once it has data."""
    if classify is not None:
        return FinetuneConfig(run_dir=str(run_dir), task="classify", model=model, classify=classify)
    run = PretrainConfig(run_dir=str(run_dir), model=model)
    run.objective.name = OBJECTIVES[model.shape]
    run.train.sequence_length = min(run.train.sequence_length, model.max_sequence_length)
    return run


def _tokenizer_of(folder: Path, source: Path, values: dict[str, Any], config: ModelConfig) -> Tokenizer:
    """Return the tokenizer in a folder, with the end ids of the model's files.

    Raises:
        DataError: the tokenizer is missing, or it has ids without rows in the model.
    """
    from bigtx.interop.tokenizer import import_tokenizer

    try:
        tokenizer = import_tokenizer(folder)
    except DataError as error:
        advice = "A run needs its tokenizer; if it is in another folder, name it: tokenizer=FOLDER"
        raise DataError(f"{error} {advice}") from None
    assert config.vocab_size is not None
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} ids, more than the {config.vocab_size:,} rows "
            f"of the model by {source / CONFIG}; name the model's own: tokenizer=FOLDER"
        )
    ends = [i for i in read_end_ids(source, values) if 0 <= i < tokenizer.vocab_size]
    ends = ends if tokenizer.end_id in ends else [tokenizer.end_id, *ends]
    return tokenizer.changed(ends=ends) if len(ends) > 1 else tokenizer


def _spellings(family: Family, weights: ForeignWeights) -> dict[str, str]:
    """Return the files' spelling of each key."""
    spelled: dict[str, str] = {}
    for key in weights.shapes:
        name = family.rename(key)
        if name in spelled:
            raise CheckpointError(f"{weights.folder} has one tensor twice, as {spelled[name]} and as {key}")
        spelled[name] = key
    return spelled


class Match(NamedTuple):
    """The use of the tensors of a folder."""

    links: list[Link]
    keys: dict[str, str]
    """The files' spelling of each key that is read; those of an encoder's head are missing if it was saved without a
    head.
    """
    dropped: list[str]
    """Tensors that are not needed."""

    @property
    def untrained(self) -> list[str]:
        """Return the keys that no file has, of a head; the run has a new one."""
        return [key for link in self.links if not self.keys.keys() & link.keys for key in link.keys]


def _match(family: Family, config: ModelConfig, weights: ForeignWeights, spelled: dict[str, str]) -> Match:
    """Find the tensor of every key.

    Raises:
        CheckpointError: some tensors are missing, unknown or of another shape.
    """
    links = family.links(config)
    check_links(links, config)
    expected = foreign_shapes(links, config)
    patterns = [re.compile(pattern) for pattern in family.unused(config)]
    dropped = [
        key
        for name, key in spelled.items()
        if name not in expected and any(pattern.fullmatch(name) for pattern in patterns)
    ]
    found = {name: weights.shapes[key] for name, key in spelled.items() if key not in dropped}
    head = [key for link in links if all(name.startswith("head.") for name in link.names) for key in link.keys]
    if head and not found.keys() & head and config.num_classes is None:
        if config.shape == "encoder":
            expected = {name: shape for name, shape in expected.items() if name not in head}
        elif expected.keys() - head == found.keys():
            raise CheckpointError(
                f"{weights.folder} has a {family.model_type} without its head, which predicts tokens "
                f"({', '.join(head)} missing): import the whole model, as {family.architecture} saves it"
            )
    refuse_differences(weights.folder, expected, found)
    weights.check_kinds(spelled[name] for name in expected)
    if config.tie_embeddings and config.num_classes is None:
        _refuse_another_head(family, config, weights, spelled)
    return Match(links, {name: spelled[name] for name in expected}, dropped)


def _refuse_another_head(family: Family, config: ModelConfig, weights: ForeignWeights, spelled: dict[str, str]) -> None:
    """Refuse a head that differs from the embedding although config.json ties them: transformers would use it."""
    untied = family.links(replace(config, tie_embeddings=False))
    embedding, head = (
        spelled.get(next(link.keys[0] for link in untied if name in link.names))
        for name in ("embedding.weight", "head.weight")
    )
    if embedding and head and not torch.equal(weights.read(embedding), weights.read(head)):
        what = f"{weights.folder}: {CONFIG} ties the head to the embedding (tie_word_embeddings)"
        advice = "if the model has a separate head, write false there"
        raise CheckpointError(f"{what}, but {head} has other numbers than {embedding}; {advice}")


def _converted(
    links: list[Link], keys: dict[str, str], weights: ForeignWeights, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of bigtx, link by link; missing ones are new."""
    shapes = parameter_shapes(config)
    for link in links:
        if not keys.keys() & link.keys:
            for name in link.names:
                yield name, padded(cut(name, initial_value(name, shapes[name], config, seed=1), config), shapes[name])
            continue
        tensors = [weights.read(keys[key]) for key in link.keys]
        for tensor in tensors:
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{weights.folder}: {', '.join(link.keys)} has values that are not finite")
        for name, tensor in zip(link.names, link.to_bigtx(tensors), strict=True):
            yield name, padded(tensor, shapes[name])
