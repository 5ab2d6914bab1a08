"""What a run reads, opened before the engine is built: prepared corpora, or shards from elsewhere.

Imports no torch, so that a wrong path is said before the ranks are started.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigtx.config.schema import PretrainConfig
from bigtx.data.corpus.splits import TOKENIZER, load_tokenizer
from bigtx.data.storage.cache import Cache
from bigtx.data.storage.places import as_place
from bigtx.data.stream import foreign
from bigtx.data.stream.sources import check_sources, epochs
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.units import format_count

if TYPE_CHECKING:
    from bigtx.data.stream.foreign_loader import ForeignLoader
    from bigtx.data.stream.loader import TrainLoader

Once = Callable[[Callable[[], str]], str]
"""Calls a function in one rank, and gives its result to all."""


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        tokenizer_place: where the tokenizer came from.
        identity: digests of the data by source; others mean other data.
        description: for the log.
        is_foreign: whether it is shards from elsewhere.
    """

    tokenizer: Tokenizer
    tokenizer_place: str
    identity: dict[str, str]
    description: str
    is_foreign: bool = False

    def loader_type(self) -> type[TrainLoader] | type[ForeignLoader]:
        """What makes batches of it."""
        if self.is_foreign:
            from bigtx.data.stream.foreign_loader import ForeignLoader

            return ForeignLoader
        from bigtx.data.stream.loader import TrainLoader

        return TrainLoader


def open_run_data(config: PretrainConfig, total_steps: int, num_ranks: int, once: Once) -> RunData:
    """Open and check what `config.data` names.

    Args:
        once: how the shards are looked at, if they are from elsewhere.

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
        # A block table holds every block's checksum, so its hash stands for all the tokens and their order.
        identity={source.name: source.manifest.blocks_sha256 for source in sources},
        description="; ".join(parts),
    )


def _open_foreign(config: PretrainConfig, num_ranks: int, once: Once) -> RunData:
    settings = config.data.foreign
    digest = once(lambda: foreign.check_shards(settings, num_ranks))
    workers = foreign.num_workers(settings, num_ranks)
    return RunData(
        tokenizer=Tokenizer.load(settings.tokenizer),
        tokenizer_place=settings.tokenizer,
        identity={"foreign": digest},
        description=(
            f"{len(foreign.expand(settings.paths)):,} shards from elsewhere, tokenized on the fly by {workers} "
            f"process{'es' * (workers > 1)} of each rank"
        ),
        is_foreign=True,
    )
