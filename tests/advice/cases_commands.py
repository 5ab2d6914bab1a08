"""Messages about command lines: options, switches, words, and what is no command."""

from __future__ import annotations

from collections.abc import Sequence

from advice.desk import Attempt, Cases, Desk, Outcome

CASES = Cases()


def line(start: str, wrong: str, desk: Desk) -> Attempt:
    """A command line with a corpus and a decoder in the folder; words are written in place of what is wrong."""
    desk.take("corpus", "decoder")
    return lambda words: desk.run(f"{start} {' '.join(words) or wrong}")


@CASES.case(" takes no value; write ", r"write (--json)$")
def a_switch_with_a_value(desk: Desk) -> Attempt:
    return line("bigtx data stats corpus", "--json=yes", desk)


@CASES.case(" is a switch and takes no value; write ", r"write (--json)$")
def a_switch_as_an_option(desk: Desk) -> Attempt:
    return line("bigtx data stats corpus", "json=yes", desk)


@CASES.case(" has no value; write ", r"write (samples=N)$", fill={"N": "1"})
def an_option_without_a_value(desk: Desk) -> Attempt:
    return line("bigtx data inspect corpus", "--samples", desk)


@CASES.case(" has no value; write ", r"write (samples=N),", fill={"N": "1"})
def an_option_as_a_word(desk: Desk) -> Attempt:
    return line("bigtx data inspect corpus", "samples", desk)


@CASES.case("; a path with = in it is written ", r"written (\./PATH)$", fill={"PATH": "qqqqqqqq=new"})
def a_path_like_an_option(desk: Desk) -> Attempt:
    return line("bigtx configs copy pretrain/small.yaml", "qqqqqqqq=new", desk)


@CASES.case(": the newest checkpoint is always kept; write ", r"write (prune=1) or more$")
def to_keep_no_checkpoint(desk: Desk) -> Attempt:
    return line("bigtx checkpoints decoder", "prune=0", desk)


@CASES.case(
    " missing; write ",
    r"(prompt=TEXT) or",
    r"or (prompts_file=FILE) is",
    fill={"TEXT": "red", "FILE": "prompts.txt"},
)
def an_option_that_is_missing(desk: Desk) -> Attempt:
    desk.write("prompts.txt", "red\n")
    return line("bigtx generate decoder max_new_tokens=2", "", desk)


@CASES.case("no command 'data qqqqqqqq'; ", r"`(bigtx data)`")
def an_unknown_command_of_a_group(desk: Desk) -> Attempt:
    return desk.once("bigtx data qqqqqqqq")


@CASES.case(
    " is a file of settings, not a command; write ",
    r"write (bigtx pretrain .*)$",
)
def a_recipe_as_a_command(desk: Desk) -> Attempt:
    desk.take("corpus")
    return desk.once("bigtx pretrain/small.yaml data.sources.a.path=corpus run_dir=runs/new")


@CASES.case(
    " is a file of settings, not a command; write ",
    r"write (bigtx pretrain FILE model/decoder-1m.yaml)$",
    fill={"FILE": "pretrain/small.yaml data.sources.a.path=corpus run_dir=runs/new"},
)
def a_recipe_of_a_model_as_a_command(desk: Desk) -> Attempt:
    desk.take("corpus")
    return desk.once("bigtx model/decoder-1m.yaml")


@CASES.case(": write numbers of GPUs, e.g. ", r"(gpus=8) or", r"or (gpus=1,8,64)$")
def a_plan_for_some_gpus(desk: Desk) -> Attempt:
    return line("bigtx configs plan pretrain/gpt-1.3b.yaml", "gpus=some", desk)


@CASES.case(" is not known; write ", r"write (gpu=H100)$")
def a_plan_for_an_unknown_gpu(desk: Desk) -> Attempt:
    return line("bigtx configs plan pretrain/gpt-1.3b.yaml", "gpu=Abacus", desk)


@CASES.case(" depends on the memory of a GPU, which the plan does not know; write ", r"write (engine\.\S+)$")
def a_plan_for_a_choice_by_memory(desk: Desk) -> Attempt:
    def attempt(words: Sequence[str]) -> Outcome:
        choice = words[0].partition("=")[2] if words else "auto"
        settings = "model: {num_layers: 2}\ntrain: {max_steps: 10, global_batch_size: 8}\n"
        desk.write("own.yaml", f"{settings}engine: {{activation_checkpointing: {choice}}}\n")
        return desk.run("bigtx configs plan own.yaml gpus=1 vocab_size=50304")

    return attempt


@CASES.case(" does not say how many ids its tokenizer has; write ", r"write (vocab_size=50304),")
def a_plan_without_a_vocabulary(desk: Desk) -> Attempt:
    desk.write("own.yaml", "model: {num_layers: 2}\ntrain: {max_steps: 10, global_batch_size: 8}\n")
    return line("bigtx configs plan own.yaml gpus=1", "", desk)
