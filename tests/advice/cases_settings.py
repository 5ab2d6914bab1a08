"""Messages of settings, data and teachers that do not fit: each is given again in another way."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from advice.cases_again import Step, again_in, take
from advice.cases_config import FINETUNE, PRETRAIN
from advice.cases_copies import FIFTH, prepared
from advice.cases_data import PREPARE
from advice.desk import Cases, Desk, Outcome, call

from bigtx.config.load import load
from bigtx.config.runs import shipped_folder
from bigtx.config.schema import DataConfig, FinetuneConfig, OptimizerConfig, PretrainConfig, SourceConfig
from bigtx.config.schema.training import RhythmConfig
from bigtx.data.stream.mixture import Mixture, Phase
from bigtx.data.stream.order import check_sources
from bigtx.engine.trainable import frozen_parameters
from bigtx.pretraining.corpora import check_held_out, validation_sources
from bigtx.train.run_folder import check_settings
from bigtx.train.start import refuse_short_fork
from bigtx.train.state import RunState

CASES = Cases()
again = functools.partial(again_in, CASES)


def given(*settings: str, schema: Any = PretrainConfig, check: Callable[[Any], object] | None = None) -> Step:
    """Settings that are read, and checked further."""
    if check is None:
        return lambda desk: call(load, schema, settings)
    return lambda desk: call(lambda: check(load(schema, settings, check=False)) and "")


again(
    "a_misspelled_setting_to_explain",
    "no setting ",
    r"did you mean (\S+)\?",
    "bigtx configs explain train.max_stepz",
    "bigtx configs explain {}",
)
again(
    "a_section_of_another_task",
    "without task=sft",
    r"without (task=sft)",
    given(*FINETUNE, "task=translate", "base=decoder", "sft.packing=true", schema=FinetuneConfig),
    given(*FINETUNE, "task=sft", "base=decoder", "sft.packing=true", schema=FinetuneConfig),
    before=lambda desk: (desk.take("tokenizer", "decoder"), desk.write("texts/a.txt", "a")),
)
again(
    "a_corpus_without_a_training_split",
    "the corpus has no train split",
    "name another one",
    given(*PRETRAIN),
    given("data.sources.a.path=other", *PRETRAIN[1:]),
    before=lambda desk: (desk.take("corpus"), shutil.copytree("corpus", "other"), shutil.rmtree("corpus/train")),
)
again(
    "a_tokenizer_as_a_corpus",
    ", not a prepared corpus; ",
    "name a folder written by `bigtx data prepare`",
    given("data.sources.a.path=tokenizer", *PRETRAIN[1:]),
    given(*PRETRAIN),
    before=take("tokenizer", "corpus"),
)


def divided(num_ranks: int, size: int) -> Step:
    def divide(desk: Desk) -> Outcome:
        said = [problem.what for problem in RhythmConfig(global_batch_size=size).division_problems(num_ranks)]
        return Outcome(bool(said), "; ".join(said))

    return divide


again(
    "a_batch_that_is_not_divided",
    "cannot be divided over 3 ranks",
    r"(255 or 258) can",
    divided(3, 256),
    divided(3, 255),
)
again(
    "a_batch_of_other_ranks",
    "cannot be divided over 3 ranks",
    "use another number of ranks",
    divided(3, 256),
    divided(2, 256),
)


def frozen(**settings: Any) -> Step:
    config = PretrainConfig(optimizer=OptimizerConfig(**settings))
    return lambda desk: call(lambda: frozen_parameters(config, ["embedding.weight", "head.weight"]) and "")


again(
    "nothing_left_to_train",
    " matches every parameter that would be trained",
    "leave one out",
    frozen(freeze=["embedding.*", "head.*"]),
    frozen(freeze=["embedding.*"]),
)
again(
    "a_misspelled_parameter",
    " matches no parameter of the model",
    r"did you mean (embedding\.weight)",
    frozen(freeze=["embeding.weight"]),
    frozen(freeze=["embedding.weight"]),
)
again(
    "a_fork_with_another_model",
    "a fork continues that run",
    "start a new run from that one's weights",
    given(*PRETRAIN, "fork_from=decoder", check=check_settings),
    given(*PRETRAIN, "init_from=decoder", check=check_settings),
    before=take("decoder", "corpus"),
)
again(
    "windows_that_are_over",
    " can no longer be skipped or read",
    "Change only later sequences",
    lambda desk: call(RunState(sequences=10).pass_over, ["1-5"]),
    lambda desk: call(RunState(sequences=10).pass_over, ["20-30"]),
)


def fork(total_steps: int) -> Step:
    found: Any = SimpleNamespace(origin={"checkpoint": FIFTH, "step": 5})
    return lambda desk: call(refuse_short_fork, found, total_steps, ["train.max_steps"])


again(
    "a_fork_without_a_step",
    ", and this run would end at step 5",
    r"write a larger (train\.max_steps)",
    fork(5),
    fork(9),
)

# Data.


def sources(length: int = 16, sequences: int | None = None, **paths: str) -> Step:
    data = DataConfig(sources={name: SourceConfig(path=path, max_epochs=2) for name, path in paths.items()})
    return lambda desk: call(lambda: check_sources(data, sequence_length=length, num_sequences=sequences) and "")


def other_corpus(desk: Desk) -> None:
    """A corpus of another tokenizer beside one of the run's."""
    desk.take("corpus", "other_tokenizer")
    prepared(desk)
    line = PREPARE.replace("=texts", f"={desk.shelf.folder / 'texts'}") + " validation_fraction=0.2"
    desk.done(line.replace("=tokenizer", "=other_tokenizer"))


def again_with_the_tokenizer(desk: Desk) -> None:
    shutil.rmtree("new")
    desk.done(PREPARE.replace("=texts", f"={desk.shelf.folder / 'texts'}") + " validation_fraction=0.2")


again(
    "two_tokenizers_in_a_mixture",
    " was tokenized with another tokenizer",
    "Prepare it again",
    sources(a="corpus", b="new"),
    before=other_corpus,
    fix=again_with_the_tokenizer,
)
again(
    "too_many_epochs",
    "but max_epochs allows 2",
    "Train for fewer steps",
    sources(16, 10**7, a="corpus"),
    sources(16, 2, a="corpus"),
    before=take("corpus"),
)


def mixed(phases: int, num_sources: int) -> Step:
    weights = 10.0 ** np.random.default_rng(1).uniform(-5, 5, (4, 60))
    rows = [Phase(100 * number, row[:num_sources].tolist()) for number, row in enumerate(weights[:phases])]
    return lambda desk: call(lambda: Mixture(rows) and "")


again("phases_of_too_many_sources", " cannot be mixed exactly", "at most 16 sources", mixed(4, 60), mixed(4, 16))
again("too_many_phases_of_sources", " cannot be mixed exactly", "Use fewer phases", mixed(4, 60), mixed(1, 60))

# Validation.


def held_out(path: str, check: Callable[[Any], object]) -> Step:
    return given(*PRETRAIN, f"validation.sources.v.path={path}", check=check)


def own_tokenizer(config: PretrainConfig) -> None:
    from bigtx.data.corpus.manifest import Manifest

    check_held_out(config, Manifest.load(Path("corpus/train")).tokenizer_fingerprint)


again(
    "a_validation_corpus_without_its_split",
    " has no validation split",
    "name another corpus",
    held_out("bare", validation_sources),
    held_out("corpus", validation_sources),
    before=lambda desk: (desk.take("corpus"), shutil.copytree("corpus", "bare"), shutil.rmtree("bare/validation")),
)
again(
    "a_validation_corpus_of_another_tokenizer",
    " was prepared with another tokenizer than the training data",
    "prepare it again with the run's tokenizer",
    held_out("new", own_tokenizer),
    before=other_corpus,
    fix=again_with_the_tokenizer,
)


# Batch scripts.

RENDER = "bigtx slurm render"
JOB = "pretrain data.sources.a.path=corpus run_dir=new train.max_steps=2"
again(
    "a_script_of_no_job",
    " is not a job; write bigtx slurm render ",
    r"write bigtx slurm render (pretrain)",
    f"{RENDER} train",
    f"{RENDER} {JOB}",
    before=take("corpus"),
)
again(
    "parts_of_a_training",
    " takes no parts; ",
    "leave it out",
    f"{RENDER} {JOB} parts=2",
    f"{RENDER} {JOB}",
    before=take("corpus"),
)
again(
    "a_site_that_is_not_there",
    ": no such file; copy ",
    r"copy (\S+) and name the copy",
    f"{RENDER} {JOB} site=mine.sh",
    before=take("corpus"),
    fix=lambda desk: shutil.copy(shipped_folder() / "site" / "default.sh", "mine.sh"),
)
again(
    "a_sweep_without_a_file",
    "write a sweep as FILE RUNS",
    "FILE RUNS pretrain",
    f"{RENDER} sweep",
    f"{RENDER} sweep lines.txt runs {JOB}",
    before=lambda desk: (desk.take("corpus"), desk.write("lines.txt", "seed=1\n")),
)
again(
    "a_sweep_with_an_empty_line",
    ": each line has the settings of a run",
    "remove empty lines",
    f"{RENDER} sweep lines.txt runs {JOB}",
    before=lambda desk: (desk.take("corpus"), desk.write("lines.txt", "seed=1\n\nseed=2\n")),
    fix=lambda desk: desk.write("lines.txt", "seed=1\nseed=2\n"),
)
