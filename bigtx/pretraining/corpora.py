"""The inputs of pretraining: prepared corpora or foreign shards, and the text for validation.

This module imports no torch, so that a wrong path is reported before the ranks are started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigtx.config.runs import has_steps
from bigtx.config.schema import PretrainConfig, SourceConfig
from bigtx.config.shape import total_steps
from bigtx.data.corpus.blocks import TOKENIZER, load_tokenizer
from bigtx.data.corpus.manifest import Manifest, has_split
from bigtx.data.storage.places import Cache, Place, as_place
from bigtx.data.stream.order import check_sources, epochs
from bigtx.engine.checkpoint import preferred
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train.run_folder import check_teacher
from bigtx.utils.errors import ConfigError
from bigtx.utils.files import is_url
from bigtx.utils.units import format_count

if TYPE_CHECKING:
    from bigtx.data.stream.foreign_loader import ForeignLoader
    from bigtx.data.stream.loader import TrainLoader

Once = Callable[[Callable[[], str]], str]
"""A function that calls another one in a single rank, and returns the result in all ranks."""


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        tokenizer_place: where the tokenizer came from.
        identity: digests by source, which identify the data.
        description: a description for the log.
        is_foreign: whether the data are foreign shards.
    """

    tokenizer: Tokenizer
    tokenizer_place: str
    identity: dict[str, str]
    description: str
    is_foreign: bool = False

    def loader_type(self) -> type[TrainLoader] | type[ForeignLoader]:
        """Return the class that makes batches of the data."""
        if self.is_foreign:
            from bigtx.data.stream.foreign_loader import ForeignLoader

            return ForeignLoader
        from bigtx.data.stream.loader import TrainLoader

        return TrainLoader


def open_run_data(config: PretrainConfig, total_steps: int, num_ranks: int, once: Once) -> RunData:
    """Open and check the data that `config.data` names.

    Args:
        once: calls the check of foreign shards in one rank.

    Raises:
        DataError: a corpus is missing or damaged, too small, or does not fit the others; a foreign shard is refused.
    """
    return _open_foreign(config, num_ranks, once) if config.data.foreign.paths else _open_sources(config, total_steps)


def _open_sources(config: PretrainConfig, total_steps: int) -> RunData:
    length, num_sequences = config.train.sequence_length, total_steps * config.train.global_batch_size
    sources = check_sources(config.data, sequence_length=length, num_sequences=num_sequences)
    place = as_place(sources[0].config.path, Cache(config.data.cache_dir, config.data.cache_size))
    read = epochs(config.data, sources, sequence_length=length, num_sequences=num_sequences)
    parts = [
        f"{source.name}: {format_count(source.manifest.num_tokens)} tokens, {count:.3g} epochs"
        for source, count in zip(sources, read, strict=True)
    ]
    return RunData(
        tokenizer=load_tokenizer(place, sources[0].manifest.tokenizer_fingerprint),
        tokenizer_place=str(place / TOKENIZER),
        # A block table holds every block's checksum, so its hash identifies all the tokens and their order.
        identity={source.name: source.manifest.blocks_sha256 for source in sources},
        description="; ".join(parts),
    )


def _open_foreign(config: PretrainConfig, num_ranks: int, once: Once) -> RunData:
    from bigtx.data.stream import foreign

    settings = config.data.foreign
    digest = once(lambda: foreign.check_shards(settings, num_ranks))
    workers = foreign.num_workers(settings, num_ranks)
    return RunData(
        tokenizer=Tokenizer.load(settings.tokenizer),
        tokenizer_place=settings.tokenizer,
        identity={"foreign": digest},
        description=(
            f"{len(foreign.expand(settings.paths)):,} foreign shards, tokenized on the fly by {workers} "
            f"process{'es' * (workers > 1)} of each rank"
        ),
        is_foreign=True,
    )


def validation_sources(config: PretrainConfig) -> dict[str, SourceConfig]:
    """Return the corpora for validation: the named ones, or those of the training data with held-out documents.

    Raises:
        ConfigError: a named corpus has no held-out documents.
    """
    if config.validation.max_sequences == 0:
        return {}
    named = config.validation.sources
    for name, source in named.items():
        if not has_split(place_of(config, source), "validation"):
            raise ConfigError(
                f"validation.sources.{name}.path={source.path!r} has no validation split; "
                "prepare it with validation_fraction above 0, or name another corpus"
            )
    return named or {
        name: source
        for name, source in config.data.sources.items()
        if has_split(place_of(config, source), "validation")
    }


def check_held_out(config: PretrainConfig, fingerprint: str) -> None:
    """Refuse held-out text that cannot measure the model.

    Args:
        fingerprint: the fingerprint of the run's tokenizer.

    Raises:
        ConfigError: a named corpus has no held-out documents, or has another tokenizer.
        DataError: a corpus is damaged.
    """
    for name, source in validation_sources(config).items():
        refuse_other_tokenizer(name, Manifest.load(place_of(config, source) / "validation"), fingerprint)


def refuse_other_tokenizer(name: str, manifest: Manifest, fingerprint: str) -> None:
    """Refuse a corpus of another tokenizer.

    Args:
        name: the name of the corpus in `validation.sources`, or in `data.sources`.
        fingerprint: the fingerprint of the run's tokenizer.

    Raises:
        ConfigError: the corpus has another tokenizer.
    """
    if manifest.tokenizer_fingerprint != fingerprint:
        raise ConfigError(
            f"validation.sources.{name}: {manifest.folder} was prepared with another tokenizer than the training "
            "data; prepare it again with the run's tokenizer"
        )


def place_of(config: PretrainConfig, source: SourceConfig) -> Place:
    """Return where a corpus is; a remote one is read through the cache."""
    return as_place(source.path, Cache(config.data.cache_dir, config.data.cache_size))


def check_inputs(config: PretrainConfig, num_ranks: int) -> None:
    """Open the data as the ranks will, and find the runs that the config names, before any rank is started.

    Raises:
        BigtxError: the ranks would refuse an input for a reason that is known without the model.
    """
    check_teacher(config)
    if config.init_from and not has_steps(Path(config.run_dir)):
        preferred(config.init_from)
    if any(map(is_url, _places(config))):
        return  # The ranks read remote data.
    data = open_run_data(config, total_steps(config), num_ranks, once=lambda get: get())
    with_vocabulary(config, data)
    check_held_out(config, data.tokenizer.fingerprint)


def _places(config: PretrainConfig) -> list[str]:
    """Return the places of all data that the run reads."""
    sources = [*config.data.sources.values(), *config.validation.sources.values()]
    return [*config.data.foreign.paths, *(source.path for source in sources)]


def with_vocabulary(config: PretrainConfig, data: RunData) -> PretrainConfig:
    """Return the config with the size of the vocabulary.

    Raises:
        ConfigError: the configured size is too small for the tokenizer.
    """
    given, needed = config.model.vocab_size, data.tokenizer.vocab_size
    if given is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=needed))
    if given < needed:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the tokenizer's {needed} ids in {data.tokenizer_place}; write "
            "model.vocab_size=null to use the tokenizer's"
        )
    return config


def length_setting(config: PretrainConfig) -> str:
    """Return the setting that determines the length of pretraining."""
    return "train.max_steps" if config.train.max_steps is not None else "train.max_tokens"
