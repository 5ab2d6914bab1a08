"""Resumes with something changed: the ranks, the ZeRO stage, the settings, the tokenizer."""

from __future__ import annotations

import signal

from drill.catalogue import fault
from drill.processes import HIT_AT
from drill.scene import Scene, Training, expect

TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}
"""The largest difference of a loss, in nats, from a run that was not disturbed. A sum over other ranks, or by another
stage, is rounded in another order, and the steps that follow amplify the difference."""


def _precision(run: Training) -> str:
    return run.settings.get("engine.precision", "bf16")


def _stop(run: Training) -> Training:
    """Train some steps, and ask the run to stop."""
    end = run.start().reach(HIT_AT).send("command", signal.SIGTERM).wait()
    expect(end.status == 75, end.tail())
    return run


@fault(24, "other-ranks", "the same sequences in the same order; losses within the tolerance", matrix=True)
def other_ranks(scene: Scene) -> str:
    """2 ranks to 4, 4 to 2, 2 to 1."""
    for before, after in ((2, 4), (4, 2), (2, 1)):
        run = _stop(scene.training(ranks=before))
        run.ranks = after
        run.resume()
        run.ranks = before
        run.check_nothing_lost(0, tolerance=TOLERANCE[_precision(run)])
    return f"the same sequences, losses within {TOLERANCE[_precision(run)]:g} nats"


@fault(25, "other-stage", "the same sequences in the same order; losses within the tolerance", matrix=True)
def other_stage(scene: Scene) -> str:
    """Another ZeRO stage at resume."""
    own = scene.settings().get("engine.zero_stage", "1")
    for stage in [stage for stage in "0123" if stage != own]:
        run = _stop(scene.training())
        run.settings["engine.zero_stage"] = stage
        run.resume()
        run.settings["engine.zero_stage"] = own
        run.check_nothing_lost(0, tolerance=TOLERANCE[_precision(run)])
    return f"the same sequences, losses within {TOLERANCE[_precision(run)]:g} nats"


@fault(26, "changed-config", "refused with the old and the new value, unless it is allowed by name")
def changed_config(scene: Scene) -> str:
    """The config changed or misspelled at resume."""
    run = scene.finished()
    for key, value, words in (
        ("optimizer.learning_rate", "5e-4", ["optimizer.learning_rate", "0.001", "0.0005"]),
        ("model.num_layers", "3", ["model.num_layers", "2 -> 3"]),
        ("train.global_batch_size", "16", ["train.global_batch_size", "8 -> 16"]),
        ("optimizer.lerning_rate", "1e-3", ["did you mean optimizer.learning_rate"]),
        ("seed", "7", ["seed"]),
    ):
        before = dict(run.settings)
        run.settings[key] = value
        run.run().refused(*words)
        run.settings = before
    run.settings |= {"train.max_steps": "32", "allow_changes": "[train.max_steps]"}
    run.resume()
    changes = [(event["key"], event["old"], event["new"]) for event in run.events("config_change")]
    expect(changes == [("train.max_steps", 30, 32)], f"the event of the change is {changes}")
    return "refused with both values; the allowed change is recorded"


@fault(27, "other-tokenizer", "refused before memory is allocated")
def other_tokenizer(scene: Scene) -> str:
    """Another tokenizer, and another vocabulary size."""
    run = scene.finished()
    other = _other_corpus(scene)
    run.settings |= {"data.sources.a.path": other, "allow_changes": "[data.sources.a.path]"}
    end = run.run().refused("with another tokenizer")
    expect("engine: ZeRO" not in end.out, "the model was built first")
    new = scene.training("model.vocab_size=300")
    end = new.run().refused("vocab_size")
    expect("engine: ZeRO" not in end.out, "the model was built first")
    return "both refused, before the model is built"


@fault(38, "replaced-tokenizer", "refused by the fingerprint, in generate, predict, evaluate, export and finetune")
def replaced_tokenizer(scene: Scene) -> str:
    """RUN/tokenizer replaced by another one."""
    import shutil

    run = scene.finished()
    other = _other_corpus(scene)
    shutil.rmtree(run.run_dir / "tokenizer")
    shutil.copytree(f"{other}/tokenizer", run.run_dir / "tokenizer")
    records = scene.folder / "records.jsonl"
    records.write_text('{"text": "ba", "label": "a"}\n{"text": "da", "label": "b"}\n' * 4)
    out, name = scene.folder / "out", str(run.run_dir)
    commands = (
        ["generate", name, "prompt=ba"],
        ["evaluate", name, "split=validation"],
        ["export", name, f"output={out}"],
        ["finetune", "task=classify", f"base={name}", f"data.train=[{records}]", f"run_dir={out}", "train.max_steps=1"],
    )
    for words in commands:
        scene.run(*words).refused("is not the tokenizer that")
    expect(not out.exists(), "something was written")
    return f"{len(commands)} of {len(commands)} commands refuse it"


def _other_corpus(scene: Scene) -> str:
    """Return a corpus of the same texts with another tokenizer."""
    texts, folder = scene.stage.folder / "texts", scene.folder / "other"
    own = [f"tokenizer={folder / 'tokenizer'}", f"output={folder / 'data'}", "num_processes=1"]
    inputs = [f'input.paths=["{texts}/0[0-4]*.txt"]']
    scene.run("tokenizer", "train", *inputs, f"output={folder / 'tokenizer'}", "vocab_size=512").succeeded()
    scene.run("data", "prepare", *inputs, *own, "block_tokens=4096", "validation_fraction=0.05").succeeded()
    return str(folder / "data")
