"""Fine-tuning, from the check of the records to the results: `finetune` reads from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from bigtx.config.load import load_run_config
from bigtx.config.runs import run_dir_of
from bigtx.config.schema import FinetuneConfig, ModelConfig, RunConfig
from bigtx.config.schema.tasks import ANSWERING
from bigtx.engine.checkpoint import Checkpoint, preferred
from bigtx.engine.engine import Engine
from bigtx.engine.optimizers import Schedule
from bigtx.engine.trainable import is_trained, refuse_untrained
from bigtx.finetuning.base import BASE, other_classes, plan_transfer, read_base_facts
from bigtx.finetuning.inputs import Inputs, RecordLoader, length_setting, open_inputs
from bigtx.finetuning.measure import (
    REFERENCE,
    Measurement,
    make_reference,
    read_reference,
    reference_key,
    write_reference,
)
from bigtx.finetuning.records import write_table
from bigtx.finetuning.tasks.task import Examples
from bigtx.track.jsonl import plain
from bigtx.train import start
from bigtx.train.context import RunContext
from bigtx.train.execute import execute, open_meter, open_saver, open_tracker, with_teacher, write_description
from bigtx.train.guards import open_guards
from bigtx.train.loop import Run
from bigtx.train.start import Start
from bigtx.train.state import RunState
from bigtx.utils import log
from bigtx.utils.errors import BigtxError, CheckpointError, ConfigError, writes
from bigtx.utils.files import read_object, write_json
from bigtx.utils.shell import command, setting
from bigtx.utils.units import parse_duration

RESULTS = "results.json"
"""The file in the run folder with the measurements of the best checkpoint, written at the end of the run."""
TABLE = "embedding.weight"
"""The parameter with a row for each token."""

Splits = dict[str, Examples]


def finetune(context: RunContext[FinetuneConfig]) -> int:
    """Run the remaining steps of fine-tuning, and return the exit status.

    Raises:
        BigtxError: the ranks, the inputs, the run folder or the training fail.
    """
    ranks = context.join_ranks()
    inputs = open_inputs(context)
    config, task = inputs.config, inputs.task
    found = start.open_folder(context, config, inputs.facts)
    if is_finished(inputs, found, context.folder):
        context.status = "finished"
        return 0

    engine = start.build_engine(config, inputs.tokenizer)
    context.start_up.end("engine")
    log.say(describe_trained(config, is_all=not engine.frozen))
    weights = resume(context, inputs, engine, found) if found.checkpoint else begin(context, inputs, engine)
    state, base, splits = weights

    write_description(context, config, found, inputs.tokenizer, engine)
    open_here = functools.partial(open_loader, context, inputs, splits, state)
    loader = open_here()
    context.resources.callback(loader.close)
    steps, tokens = inputs.total_steps, round(config.train.global_batch_size * inputs.mean_tokens)
    tracker = open_tracker(
        context, config, found, state, total_steps=steps, better=task.better, job_type="finetune", base=base
    )
    measurement = Measurement(config, engine, ranks, task, splits["validation"])
    run = Run(
        config=config,
        run_dir=context.folder,
        ranks=ranks,
        engine=engine,
        task=with_teacher(task, inputs.teacher, config, engine),
        loader=loader,
        open_loader=open_here,
        schedule=Schedule(config.schedule, total_steps=steps, tokens_per_step=tokens),
        validation=measurement,
        tracker=tracker,
        meter=open_meter(config, ranks, found, inputs.flops_per_token()),
        saver=open_saver(context, config, engine),
        state=state,
        facts=inputs.facts | {"wandb_run_id": ranks.from_first(tracker.wandb_run_id)},
        validate_every=validate_every(config, steps),
        patience=config.validation.patience,
        guards=open_guards(config.guards, engine, ranks, found.checkpoint),
    )
    conclude = functools.partial(write_results, measurement=measurement, splits=splits, num_rows=len(inputs.rows))
    return execute(context, run, next_command=next_command(config, context.folder), conclude=conclude)


def is_finished(inputs: Inputs, found: Start, folder: Path) -> bool:
    """Return whether the run has ended and its best checkpoint was measured, and print so."""
    if found.checkpoint is None:
        return False
    config, state = inputs.config, found.checkpoint.manifest["state"]
    settings, patience = [length_setting(config, len(inputs.rows))], config.validation.patience
    start.refuse_short_fork(found, inputs.total_steps, settings)
    if read_object(folder / RESULTS).get("tokens") != state["tokens"]:
        return False  # The results are from an earlier end or damaged: the best checkpoint is measured again.
    if patience is not None and state["measured_since_best"] >= patience:
        settings.append("validation.patience")
    elif state["step"] < inputs.total_steps:
        return False
    start.say_finished(state["step"], settings, f"; its results are in {folder / RESULTS}")
    return True


def set_first_weights(
    context: RunContext[FinetuneConfig], inputs: Inputs, engine: Engine, base: str | None, *, keep_frozen: bool = True
) -> dict[str, Any]:
    """Set the initial weights: from the base, with the task's new parameters from the seed; or all from the seed.
    Return the facts for base.json.

    Args:
        base: a run or one of its checkpoints.
        keep_frozen: as for `start.set_first_weights`.
    """
    config, ranks = inputs.config, context.ranks
    initial = start.initial_weights(engine, config, inputs.teacher)
    if base is None:
        start.set_first_weights(context, engine, initial, keep_frozen=keep_frozen)
        return {}
    source = start.open_other_run(context, base)
    if source.manifest["tokenizer"] != inputs.tokenizer.fingerprint:
        raise ConfigError(f"base={base}: {source.path} was trained with another tokenizer than its run folder holds")
    shapes = engine.shapes()
    fresh = ranks.once(lambda: other_classes(config, base, shapes.keys() & source.shapes.keys()))
    transfer = plan_transfer(shapes, source.shapes, name=base, fresh=fresh)
    refuse_untrained(transfer.initialized, engine.frozen, config)
    start.set_first_weights(context, engine, transfer.read(source, initial), keep_frozen=keep_frozen)
    source.close()
    log.say(f"base: {source.path} (step {source.manifest['step']:,}): {transfer.describe()}")
    if warning := ranks.once(lambda: untrained_roles(config, base)):
        log.say(warning)
    return start.facts_of(source) | transfer.to_dict()


def describe_trained(config: FinetuneConfig, *, is_all: bool) -> str:
    """Return the learning rate, and that all parameters are trained, if they are."""
    rate = f"peak learning rate {config.optimizer.learning_rate:.3g}"
    roles = ", with the embeddings of the chat roles" if knows_chats(config) else ""
    return f"trained: all parameters{roles}; {rate}" if is_all else rate


def untrained_roles(config: FinetuneConfig, base: str) -> str:
    """Return the warning that the embeddings of chat roles are untrained and frozen, or "".

    Args:
        base: the run that the weights come from.
    """
    if not knows_chats(config) or is_trained(config, TABLE) or _knows_roles(base):
        return ""
    optimizer = config.optimizer
    if config.model.lora.rank and is_trained(config, TABLE, also=[TABLE]):
        key, names = "optimizer.train_also", [*optimizer.train_also, "embedding.*"]
    else:
        key, names = "optimizer.freeze", [name for name in optimizer.freeze if not fnmatchcase(TABLE, name)]
    return (
        f"warning: {base} was not trained on chats, so the embeddings of the chat roles are still random, and they "
        f"are frozen in this run: the model cannot distinguish the roles; write {setting(key, names)}"
    )


def knows_chats(config: RunConfig) -> bool:
    """Return whether a run trains on chats in the format with roles."""
    return isinstance(config, FinetuneConfig) and config.chat.format == "chat" and config.task in ANSWERING


def _knows_roles(base: str | None) -> bool:
    """Return whether a run, or one of its bases, has trained the embeddings of chat roles; True if it is unknown."""
    while base is not None:
        try:
            config = load_run_config(base)
        except BigtxError:
            return True
        if knows_chats(config) and is_trained(config, TABLE):
            return True
        base = config.base if isinstance(config, FinetuneConfig) else None
    return False


def begin(
    context: RunContext[FinetuneConfig], inputs: Inputs, engine: Engine
) -> tuple[RunState, dict[str, Any], Splits]:
    """Set the initial weights, and return the state, the facts for base.json, and the splits for training."""
    config = inputs.config
    context.state = state = start.first_state(config, owes_validation=config.validation.at_start)
    base = set_first_weights(context, inputs, engine, config.base)
    keep_inputs(context, inputs, base)
    splits = inputs.data.splits
    if inputs.task.needs_reference:
        splits = with_reference(context, inputs, engine, base, is_initial=True)
    return state, base, splits


def resume(
    context: RunContext[FinetuneConfig], inputs: Inputs, engine: Engine, found: Start
) -> tuple[RunState, dict[str, Any], Splits]:
    """Set the weights of the checkpoint, and return the same as `begin`."""
    context.state = state = start.saved_state(inputs.config, found)
    folder = run_dir_of(found.checkpoint.path) if found.origin and found.checkpoint else context.folder
    base = context.ranks.once(lambda: read_base_facts(folder))
    if found.origin:
        keep_inputs(context, inputs, base)
    splits = inputs.data.splits
    if inputs.task.needs_reference:  # First, because it may need the weights of the base.
        splits = with_reference(context, inputs, engine, base, is_initial=False)
    start.load_checkpoint(context, engine, found, state)
    forget_other_best(state, found, inputs)
    return state, base, splits


def keep_inputs(context: RunContext[FinetuneConfig], inputs: Inputs, base: dict[str, Any]) -> None:
    """Write the table of records and the facts of the base into the run folder."""
    if context.dry_run:
        return
    context.ranks.on_first(lambda: write_table(context.folder, inputs.data.table))
    if base:
        context.ranks.on_first(lambda: _write(context.folder / BASE, base))


def forget_other_best(state: RunState, found: Start, inputs: Inputs) -> None:
    """Forget the best value if it was measured with another metric or other records."""
    changed = {change["key"] for change in found.changed}
    if {"validation.metric", "validation.max_records"} & changed:
        state.forget_best()
    num_held_out = len(inputs.data.splits["validation"].records)
    if "data.leave_out" in changed and num_held_out < len(inputs.data.lengths("validation")):
        state.forget_best()


def with_reference(
    context: RunContext[FinetuneConfig], inputs: Inputs, engine: Engine, base: dict[str, Any], *, is_initial: bool
) -> Splits:
    """Return the splits with the reference of each example: from the run folder, or computed now by all ranks.

    Args:
        is_initial: whether the weights are those before the first step.
    """
    config, task, splits, ranks = inputs.config, inputs.task, inputs.data.splits, context.ranks
    left_out = inputs.facts.get("left_out")
    key = reference_key(
        records=[inputs.facts["data"], left_out] if left_out else inputs.facts["data"],
        tokenizer=inputs.tokenizer.fingerprint,
        base=base.get("manifest_sha256"),
        model=_settings_of_outputs(config.model),
        seed=config.seed,
        chat=[config.chat.format, config.chat.separator],
        length=[config.data.too_long, task.max_length],
    )
    found = ranks.once(lambda: read_reference(context.folder, key))
    if found is None:
        log.say("reference: computing the base's log-probabilities of the records, once for the whole run")
        if not is_initial:
            _return_to_base(context, inputs, engine, base)
        examples = {name: split.examples for name, split in splits.items()}
        made = make_reference(engine, ranks, task, examples, config.train.micro_batch_size)
        ranks.on_first(lambda: write_reference(context.folder, key, made))
        found = made
    referred = {
        name: list(map(task.with_reference, splits[name].examples, map(tuple, numbers.tolist())))
        for name, numbers in found.items()
    }
    return splits | {name: dataclasses.replace(splits[name], examples=made) for name, made in referred.items()}


def _return_to_base(context: RunContext[FinetuneConfig], inputs: Inputs, engine: Engine, base: dict[str, Any]) -> None:
    """Set the initial weights in a run that has made steps.

    Raises:
        CheckpointError: the base is gone or has changed.
    """
    place = base.get("checkpoint", inputs.config.base)
    if place is not None:
        problem = f"{place} is not the base that {BASE} names"
        try:
            source = start.open_other_run(context, place)
            source.close()
            is_same = source.manifest_sha256 == base.get("manifest_sha256")
        except CheckpointError:  # Its advice is for a base that can be replaced by another one.
            problem, is_same = f"{place}, the base that {BASE} names, is gone or damaged", False
        if not is_same:
            raise CheckpointError(
                f"{context.folder}: the file with the base's log-probabilities is missing ({REFERENCE}), and it cannot "
                f"be computed again, because {problem}; restore one of them, or start another run_dir"
            )
    set_first_weights(context, inputs, engine, place, keep_frozen=False)


def open_loader(context: RunContext[FinetuneConfig], inputs: Inputs, splits: Splits, state: RunState) -> RecordLoader:
    """Return the loader of batches, starting at the state's position in the data."""
    config, task = inputs.config, inputs.task
    rows = task.pack(splits["train"].examples) if task.needs_reference else inputs.rows
    # A record that replaces a left out one is sorted by the length of the latter, so that no other record moves.
    lengths = [row.length for row in rows] if config.sft.packing else inputs.data.lengths("train")
    return RecordLoader(
        np.array(lengths),
        lambda places, numbers: task.collate([rows[place] for place in places], numbers),
        start.division_of(config, context.ranks),
        seed=config.seed,
        start_sequence=state.sequences,
        prefetch_batches=config.data.prefetch_batches,
    )


def validate_every(config: FinetuneConfig, num_steps: int) -> str:
    """Return how often the model is measured. A fraction of the run becomes a number of steps, rounded up, so that
    there are at most as many measurements as it means."""
    every = parse_duration(config.validation.every)
    if every.unit == "fraction":
        return f"{max(1, math.ceil(round(every.value * num_steps, 6)))} steps"
    return config.validation.every


def write_results(run: Run, *, measurement: Measurement, splits: Splits, num_rows: int) -> None:
    """Measure the best checkpoint on the validation records and, if the config says so, on the test records, and write
    results.json."""
    path = run.ranks.once(lambda: preferred(run.run_dir))
    best = Checkpoint(path)
    if best.manifest["step"] != run.state.step:
        run.engine.fill(best.read, states=False)
    best.close()
    results: dict[str, Any] = {
        "checkpoint": path.name,
        "step": best.manifest["step"],
        "total_steps": run.schedule.total_steps,
        "epochs": run.state.step * run.config.train.global_batch_size / num_rows,
        "tokens": run.state.tokens,
        "chosen_by": measurement.metric if splits["validation"].records else None,
    }
    for name, group in (("validation", "best"), ("test", "test")):
        split = splits[name]
        if not split.records or (name == "test" and not measurement.config.validation.test):
            continue
        metrics, predictions = measurement.measure(split)
        results[name] = {"records": len(split.records), **metrics, **measurement.task.tables(predictions)}
        # The best checkpoint's metrics have a group of their own, because they are not a point of the validation curve.
        run.tracker.log(run.state.step, run.state.tokens, {f"{group}/{key}": value for key, value in metrics.items()})
        shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        run.tracker.message(f"{name} at the best checkpoint ({path.name}): {shown}")
    run.ranks.on_first(lambda: _write(run.run_dir / RESULTS, results))


def _write(path: Path, value: dict[str, Any]) -> None:
    with writes(path):
        write_json(path, plain(value))


def next_command(config: FinetuneConfig, folder: Path) -> str:
    """Return the command to use the model: chat or predict."""
    if knows_chats(config):
        return command("bigtx", "chat", folder)
    return command("bigtx", "predict", folder, "input=FILE")


def _settings_of_outputs(model: ModelConfig) -> dict[str, Any]:
    """Return the settings of a model that affect its outputs without training, where they are not the defaults."""
    default = ModelConfig()
    experts = dataclasses.replace(
        model.experts, balance_loss=default.experts.balance_loss, router_z_loss=default.experts.router_z_loss
    )
    found = dataclasses.asdict(dataclasses.replace(model, experts=experts))
    defaults = dataclasses.asdict(default)
    without = ("dropout", "attention_dropout", "lora")  # New adapters change nothing.
    return {name: value for name, value in found.items() if value != defaults[name] and name not in without}
