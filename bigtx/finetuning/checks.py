"""The checks of fine-tuning before any rank is started, without torch: the base, its tokenizer, and the first records,
which need the fields of the task. The ranks read all records.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from bigtx.config.runs import has_steps, run_dir_of
from bigtx.config.schema import FinetuneConfig
from bigtx.config.schema.finetuning import FieldsConfig
from bigtx.data.records.read import PAIR, read_records
from bigtx.data.records.record import MAX_LISTED, BadRecordError, Broken, LeftOut, Record
from bigtx.engine.checkpoint import preferred
from bigtx.engine.trained import TOKENIZER, read_tokenizer
from bigtx.finetuning.tasks import FIELDS
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train.run_folder import check_teacher
from bigtx.utils.errors import ConfigError, DataError
from bigtx.utils.shell import setting

NUM_CHECKED = 100
"""Number of records that are checked for each path."""
SPLITS = ("train", "validation", "test")
ALLOWED = setting("allow_changes", ["data.leave_out"])
"""The setting with which a resumed run may leave out records."""


def check_inputs(config: FinetuneConfig, num_ranks: int) -> None:
    """Check the base, its tokenizer and the first records, before any rank is started. This does not import torch.

    Raises:
        BigtxError: the ranks would refuse an input for a reason that is known without the model.
    """
    run_dir = Path(config.run_dir)
    check_teacher(config)
    if config.base and not has_steps(run_dir):
        preferred(config.base)
    open_tokenizer(config, run_dir)
    check_records(config)


def open_tokenizer(config: FinetuneConfig, run_dir: Path) -> Tokenizer | None:
    """Return the tokenizer of the base, or the one that the config names; None if it is the teacher's.

    Raises:
        DataError, CheckpointError: the tokenizer cannot be used.
        ConfigError: the base has another tokenizer than the config names.
    """
    own, base = run_dir / TOKENIZER, config.base
    if base is None:
        return Tokenizer.load(config.tokenizer) if config.tokenizer else None
    if not (run_dir_of(base) / TOKENIZER).is_dir() and own.is_dir():
        return Tokenizer.load(own)  # The base is gone, but the run has copies of what it needs.
    tokenizer = read_tokenizer(base)
    if config.tokenizer and Tokenizer.load(config.tokenizer).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer={config.tokenizer}: the base {base} has another tokenizer, so the same ids would mean "
            "different texts; leave tokenizer out, or write tokenizer=null"
        )
    return tokenizer


def check_records(config: FinetuneConfig) -> None:
    """Refuse paths whose first records are not usable for the task.

    Raises:
        DataError: a path has no records, or none of its first records has the fields.
    """
    left_out = LeftOut(config.data.leave_out)
    for split in SPLITS:
        for path in getattr(config.data, split):
            if PAIR.search(path):
                continue  # A pair of text files always has both fields.
            broken = Broken(left_out)
            records = list(itertools.islice(read_records([path], broken, config.data.exclude), NUM_CHECKED))
            kept = [record for record in records if record.where not in left_out]
            if not records:
                broken.check(advice_about(broken, config))
                raise DataError(f"data.{split}: {path} holds no records; name another file or folder")
            reasons = [lacking(record, config.task, config.data.fields) for record in kept]
            if reasons and all(reasons):
                others = f"; the same is true of all of the first {len(kept)} records of data.{split}" * (len(kept) > 1)
                raise DataError(f"{kept[0].where}: {reasons[0]}{others}")


def advice_about(broken: Broken, config: FinetuneConfig) -> str:
    """Return advice about records that cannot be used."""
    resumed = f"(to resume a run, also {ALLOWED})"
    if broken.count > MAX_LISTED:
        return (
            "Or leave them out: name them, or the files and folders that hold them, in data.leave_out; then the next "
            f"ones are listed {resumed}"
        )
    names = [*config.data.leave_out, *(where for where, _ in broken.first)]
    return f"Or leave them out: {setting('data.leave_out', names)} {resumed}"


def lacking(record: Record, task: str, fields: FieldsConfig) -> BadRecordError | None:
    """Return why a record lacks the fields that a task needs; None if it has one of the sets of fields."""
    for names in FIELDS[task]:
        missing = [name for name in names if record.value(getattr(fields, name)) is None]
        if not missing:
            return None
    return record.missing(getattr(fields, missing[0]), setting=f"data.fields.{missing[0]}")
