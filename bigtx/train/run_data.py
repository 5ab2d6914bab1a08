"""What a run reads, opened before the engine is built: prepared corpora, or shards from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bigtx.config.schema import PretrainConfig
from bigtx.data.corpus.splits import TOKENIZER, load_tokenizer
from bigtx.data.storage.cache import Cache
from bigtx.data.storage.places import as_place
from bigtx.data.stream import foreign
from bigtx.data.stream.foreign_loader import ForeignLoader
from bigtx.data.stream.loader import TrainLoader
from bigtx.data.stream.sources import check_sources, epochs
from bigtx.engine.ranks import Ranks
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.units import format_count


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        tokenizer_place: where the tokenizer came from.
        identity: digests of the data by source; others mean other data.
        description: for the log.
        loader_type: what makes batches of it.
    """

    tokenizer: Tokenizer
    tokenizer_place: str
    identity: dict[str, str]
    description: str
    loader_type: type[TrainLoader] | type[ForeignLoader]


def open_run_data(config: PretrainConfig, total_steps: int, ranks: Ranks) -> RunData:
    """Open and check what `config.data` names.

    Raises:
        DataError: a corpus is missing or damaged, too small, or does not fit the others; a foreign shard is refused.
    """
    return _open_foreign(config, ranks) if config.data.foreign.paths else _open_sources(config, total_steps)


def _open_sources(config: PretrainConfig, total_steps: int) -> RunData:
    length, num_sequences = config.train.sequence_length, total_steps * config.train.global_batch_size
    sources = check_sources(config.data, sequence_length=length, num_sequences=num_sequences)
    place = as_place(sources[0].config.path, Cache(config.data.cache_dir, config.data.cache_size))
    read = epochs(config.data, sources, sequence_length=length, num_sequences=num_sequences)
    parts = [
        f"{source.name} {format_count(source.manifest.num_tokens)} tokens, {count:.3g} epochs"
        for source, count in zip(sources, read, strict=True)
    ]
    return RunData(
        tokenizer=load_tokenizer(place, sources[0].manifest.tokenizer_fingerprint),
        tokenizer_place=str(place / TOKENIZER),
        # A block table holds every block's checksum, so its hash stands for all the tokens and their order.
        identity={source.name: source.manifest.blocks_sha256 for source in sources},
        description="; ".join(parts),
        loader_type=TrainLoader,
    )


def _open_foreign(config: PretrainConfig, ranks: Ranks) -> RunData:
    settings = config.data.foreign
    digest: Any = ranks.from_first(ranks.on_first(lambda: foreign.check_shards(settings, ranks.world_size)))
    workers = foreign.num_workers(settings, ranks.world_size)
    return RunData(
        tokenizer=Tokenizer.load(settings.tokenizer),
        tokenizer_place=settings.tokenizer,
        identity={"foreign": digest},
        description=(
            f"{len(foreign.expand(settings.paths)):,} shards from elsewhere, tokenized on the fly by {workers} "
            f"process{'es' * (workers > 1)} of each rank"
        ),
        loader_type=ForeignLoader,
    )
