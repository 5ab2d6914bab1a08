"""Messages about runs, their checkpoints, their records and their teachers; what they advise is done."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from advice.cases_again import Step, again_in, run_folder, take
from advice.cases_copies import FIFTH, SIXTH, chosen, copied_in, cut, edit, flip_end, two_checkpoints, weights
from advice.cases_data import PREPARE
from advice.cases_data import texts as write_texts
from advice.cases_training import ALONE, MODEL, PRETRAIN, pretrain
from advice.desk import Attempt, Cases, Desk, Outcome, call, written
from safetensors.torch import load_file, save_file

from bigtx.config.load import load
from bigtx.config.schema import FinetuneConfig, PretrainConfig
from bigtx.engine.checkpoint import Checkpoint, MergedCheckpoint, list_checkpoints, load_weights, newest, read_manifest
from bigtx.finetuning import run as finetuning
from bigtx.model.size import parameter_shapes
from bigtx.pretraining import make_objective
from bigtx.pretraining.run import _refuse_other_model, is_finished
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train import start
from bigtx.train.context import RunContext
from bigtx.utils.files import sha256_file

CASES = Cases()
again = functools.partial(again_in, CASES)
copied = functools.partial(copied_in, CASES)

# Checkpoints.


def with_ranges(change: Callable[[dict[str, Any], str], object]) -> Callable[[Path], None]:
    """Let a manifest say which file has which range, and change a tensor of the file."""

    def damage(folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        tensors, shapes = load_file(file), read_manifest(folder)["parameters"]
        change(tensors, next(iter(tensors)))
        save_file(tensors, file)
        ranges = {name: {"kinds": ["master"], "files": [[0, 1, math.prod(shape)]]} for name, shape in shapes.items()}
        edit(str(folder), ranges=ranges, files={file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)}})

    return damage


def shorten(tensors: dict[str, Any], key: str) -> None:
    tensors[key] = tensors[key][:-1].clone()


for name, shown, change in (
    ("a_range_that_is_missing", " does not have the range ", lambda tensors, key: tensors.pop(key)),
    ("a_range_of_another_length", ", which manifest.json says; ", shorten),
):
    again(
        name,
        shown,
        "=use another checkpoint of the run",
        weights(SIXTH),
        weights(FIFTH),
        before=two_checkpoints(with_ranges(change)),
    )


def adapted(desk: Desk) -> Outcome:
    """All checkpoints of a run share the frozen weights, so no message names another checkpoint."""
    said = call(lambda: list(load_weights(list_checkpoints("adapters")[0])) and "")
    assert "another checkpoint" not in said.text
    return said


FROZEN = Path("adapters/frozen")
for name, damage in (
    ("frozen_weights_cut_short", lambda desk: cut(FROZEN)),
    ("a_flipped_bit_of_frozen_weights", lambda desk: flip_end(FROZEN)),
    ("a_manifest_of_frozen_weights", lambda desk: edit(str(FROZEN), parameters=3)),
):
    copied(name, "the other weights are damaged: ", "restore", "adapters", damage, adapted)
copied(
    "frozen_weights_to_export",
    "the other weights are damaged: ",
    "adapters/frozen from a copy",
    "adapters",
    lambda desk: flip_end(FROZEN),
    "bigtx export adapters output=new --no-verify",
)
for name, damage in (
    ("frozen_weights_to_resume", lambda desk: flip_end(FROZEN)),
    ("frozen_weights_cut_short_to_resume", lambda desk: cut(FROZEN)),
):
    copied(
        name, "every checkpoint of its run needs it", "restore it from a copy", "adapters", damage, chosen("adapters")
    )


def base_again(desk: Desk) -> Outcome:
    """A resumed run asks its base again, because what the base said is missing."""
    config = load(FinetuneConfig, ["run_dir=runs/new"], check=False)
    context = RunContext(config)
    context.ranks = ALONE
    base = {"checkpoint": FIFTH, "manifest_sha256": Checkpoint(Path(f"copies/{FIFTH}")).manifest_sha256}
    inputs: Any = SimpleNamespace(config=config)
    with desk.patch.context() as patch, written():
        patch.setattr(finetuning, "set_first_weights", lambda *given, **options: None)
        return call(lambda: finetuning._return_to_base(context, inputs, inputs, base))


for name, shown, damage in (
    ("a_base_that_is_another", " is not the base that base.json names", lambda desk: edit(FIFTH, wandb_run_id="a")),
    ("a_base_that_is_gone", ", the base that base.json names, is gone or damaged", lambda desk: shutil.rmtree(FIFTH)),
):
    copied(name, shown, "restore one of them", "decoder", damage, base_again)


# Starts.


def resume(*given: str, check: bool = True) -> Outcome:
    """What is said until the model is built."""

    def begin() -> None:
        config = load(PretrainConfig, given, check=check)
        context = RunContext(config)
        context.ranks = ALONE
        with context.resources:
            is_finished(config, start.open_folder(context, config, {"data": {}}))

    with written() as text:
        said = call(begin)
        return Outcome(said.refused, text() + said.text)


def saved(desk: Desk, **facts: Any) -> None:
    """A run that has made all its steps, the last of them the fifth."""
    desk.take("decoder", "corpus")
    path = Path("decoder/config.yaml")
    path.write_text(path.read_text().replace("max_steps: null", "max_steps: 5"))
    edit(FIFTH, state={"tokens": 0, "step": 5}, **facts)


OWN, ELSEWHERE = ["decoder/config.yaml", "run_dir=decoder"], ["decoder/config.yaml", "run_dir=runs/new"]


@CASES.case("the run is finished: ", r"To train longer: (.*);", fill={"=N": "=9"})
@CASES.case("the run is finished: ", r"(name another run_dir)", fill={"name another run_dir": ELSEWHERE[1]})
def a_finished_run(desk: Desk) -> Attempt:
    saved(desk)
    return lambda words: resume(OWN[0], *(words if ELSEWHERE[1] in words else [OWN[1], *words]))


again(
    "a_run_whose_last_steps_were_skipped",
    ": the last steps of the run were all skipped",
    "=start over in another run_dir, e.g. with a lower optimizer.learning_rate",
    lambda desk: resume(*OWN),
    lambda desk: resume(*ELSEWHERE, "optimizer.learning_rate=1e-5"),
    before=lambda desk: saved(desk, suspect=True),
)


def without_checkpoints(desk: Desk) -> None:
    saved(desk, num_updates=5)
    shutil.copytree("decoder", "empty")
    shutil.rmtree("empty/checkpoints")


FORK = [*ELSEWHERE, "train.max_steps=9"]
for name, shown, is_checked in (
    ("a_fork_of_a_run_without_a_checkpoint", ": the run has saved no checkpoint", True),
    ("a_fork_of_a_run_that_lost_its_checkpoints", ": the run has no checkpoint", False),
):
    again(
        name,
        shown,
        "name a run that has saved one",
        functools.partial(lambda check, desk: resume(*FORK, "fork_from=empty", check=check), is_checked),
        lambda desk: resume(*FORK, "fork_from=decoder"),
        before=without_checkpoints,
    )


def begun(tokenizer: str, *given: str) -> Step:
    """What is said of the weights of the decoder as the first ones of another run."""

    def begin(desk: Desk) -> Outcome:
        config = load(PretrainConfig, [*given, *PRETRAIN, "init_from=decoder", "model.vocab_size=420"])
        engine: Any = SimpleNamespace(shapes=lambda: parameter_shapes(config.model))
        data: Any = SimpleNamespace(data=SimpleNamespace(tokenizer=Tokenizer.load(tokenizer)))
        return call(lambda: _refuse_other_model(MergedCheckpoint(newest("decoder")), engine, data, "decoder"))

    return begin


def with_its_model(desk: Desk) -> None:
    """Copy the model section of a run's config.yaml into another one."""
    section = {"model": yaml.safe_load(Path("decoder/config.yaml").read_text())["model"]}
    desk.write("own.yaml", yaml.safe_dump(section))


def known(desk: Desk) -> None:
    """The decoder, whose checkpoint knows its tokenizer."""
    desk.take("decoder", "corpus", "other_tokenizer", "tokenizer")
    edit(FIFTH, tokenizer=Tokenizer.load("tokenizer").fingerprint)
    write_texts(desk)


again(
    "first_weights_of_another_shape",
    "its model has other parameters than this config",
    "copy the model section of its config.yaml",
    begun("tokenizer", *MODEL[:2], "model.num_layers=1"),
    begun("tokenizer", "own.yaml"),
    before=known,
    fix=with_its_model,
)
again(
    "first_weights_of_another_tokenizer",
    ": its tokenizer is not the tokenizer of this run's data",
    "=prepare the data with that run's tokenizer folder",
    begun("other_tokenizer", "own.yaml"),
    begun("new/tokenizer", "own.yaml"),
    before=lambda desk: (known(desk), with_its_model(desk)),
    fix=lambda desk: desk.done(f"{PREPARE} tokenizer=decoder/tokenizer"),
)


def spans(*given: str) -> Step:
    """What is said of the spans of a row."""

    def make(desk: Desk) -> Outcome:
        settings = ["model.shape=encoder_decoder", "objective.name=span_corruption", *given]
        config = load(PretrainConfig, settings, check=False)
        tokenizer = Tokenizer.load(desk.shelf.tokenizer)
        return call(lambda: make_objective(config, tokenizer, purpose="train") and "")

    return make


LONG_ROWS = "train.sequence_length=4096"
for name, advice, given in (
    ("too_long_rows_of_spans", "lower train.sequence_length", ["train.sequence_length=512"]),
    ("too_many_spans", "or objective.noise_density", [LONG_ROWS, "objective.noise_density=0.05"]),
    ("too_short_spans", "raise objective.mean_span_length", [LONG_ROWS, "objective.mean_span_length=10"]),
):
    again(name, " sentinels to mark them; ", advice, spans(LONG_ROWS), spans(*given))


def taught(*given: str) -> Step:
    return lambda desk: pretrain(*given)([])


def with_other_data(desk: Desk) -> None:
    desk.take("decoder", "other_tokenizer")
    write_texts(desk)
    desk.done(f"{PREPARE} tokenizer=other_tokenizer output=corpus")


def with_data_of_the_teacher(desk: Desk) -> None:
    shutil.rmtree("corpus")
    desk.done(f"{PREPARE} tokenizer=decoder/tokenizer output=corpus")


again(
    "a_teacher_with_another_tokenizer",
    "its tokenizer is not the student's",
    "=use data or a base with the teacher's tokenizer",
    taught("distill.teacher=decoder", "train.sequence_length=16"),
    before=with_other_data,
    fix=with_data_of_the_teacher,
)
again(
    "a_teacher_of_classes",
    "it predicts classes, which the student does not",
    "name a run with the same kind of output",
    taught("distill.teacher=classifier"),
    taught("distill.teacher=decoder"),
    before=take("decoder", "classifier", "corpus"),
)


# Folders that cannot be written.


def locked(*given: str) -> Step:
    """What is said to a user who may write only what the mode of a folder allows; root may write everything."""

    def attempt(desk: Desk) -> Outcome:
        with desk.as_user():
            return run_folder(*given)(desk)

    return attempt


def lock(*names: str) -> Callable[[Desk], object]:
    def do(desk: Desk) -> None:
        desk.take("corpus", "decoder")
        for name in names:
            Path(name).mkdir(exist_ok=True)
            Path(name).chmod(0o555)

    return do


LOCKED = "decoder/checkpoints"
again(
    "a_run_folder_that_is_read_only",
    " is read-only for you; ",
    "name another folder",
    locked("mine/new"),
    locked("yours/new"),
    before=lock("mine"),
)
again(
    "checkpoints_that_are_read_only",
    " cannot be written; ",
    "make it writable",
    locked("decoder"),
    before=lock(LOCKED),
    fix=lambda desk: Path(LOCKED).chmod(0o755),
)
again(
    "checkpoints_that_are_read_only_for_another_run",
    " cannot be written; ",
    "name another run_dir",
    locked("decoder"),
    locked("new"),
    before=lock(LOCKED),
)
