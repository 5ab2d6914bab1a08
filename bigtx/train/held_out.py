"""Which corpora a run validates on. Imports no torch, so that a wrong path is said at once."""

from __future__ import annotations

from bigtx.config.schema import PretrainConfig, SourceConfig
from bigtx.data.corpus.manifest import Manifest, has_split
from bigtx.data.storage.cache import Cache
from bigtx.data.storage.places import Place, as_place
from bigtx.utils.errors import ConfigError


def validation_sources(config: PretrainConfig) -> dict[str, SourceConfig]:
    """The corpora to validate on: those named, or those of the training data that hold some documents out.

    Raises:
        ConfigError: a corpus that was named holds none out.
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
    """Refuse held-out text that the model cannot be measured on.

    Args:
        fingerprint: of the tokenizer.

    Raises:
        ConfigError: a corpus that was named holds none out, or has another tokenizer.
        DataError: it is damaged.
    """
    for name, source in validation_sources(config).items():
        refuse_other_tokenizer(name, Manifest.load(place_of(config, source) / "validation"), fingerprint)


def refuse_other_tokenizer(name: str, manifest: Manifest, fingerprint: str) -> None:
    """Refuse a corpus of another tokenizer.

    Args:
        name: of the corpus in `validation.sources`, or in `data.sources`.
        fingerprint: of the tokenizer.

    Raises:
        ConfigError: it is of another one.
    """
    if manifest.tokenizer_fingerprint != fingerprint:
        raise ConfigError(
            f"validation.sources.{name}: {manifest.folder} was prepared with another tokenizer than the training "
            "data; prepare it again with the run's tokenizer"
        )


def place_of(config: PretrainConfig, source: SourceConfig) -> Place:
    """Where a corpus is, read through the cache if it is remote."""
    return as_place(source.path, Cache(config.data.cache_dir, config.data.cache_size))
