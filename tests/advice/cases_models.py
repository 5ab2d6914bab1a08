"""Messages of the commands that use a model: generate, predict, evaluate, import and export."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from advice.desk import Attempt, Cases, Desk, Outcome, call

from bigtx.interop.tokenizer import import_tokenizer, load_tokenizer
from bigtx.interop.verify import require

CASES = Cases()
SHORT = {"text": "red apple", "label": "joy"}
LONG = {"text": "red apple tree " * 200, "label": "joy"}


# generate


@CASES.case("cannot be used: ", r"(device=auto)")
def a_device_that_is_not_here(desk: Desk) -> Attempt:
    desk.take("decoder")
    return desk.command("bigtx generate decoder prompt=red max_new_tokens=2 device=cuda:77")


@CASES.case("classes and cannot write texts; ", r"; (bigtx predict) ", value="classifier input=in.jsonl")
def a_prompt_for_a_classifier(desk: Desk) -> Attempt:
    desk.take("classifier")
    desk.lines("in.jsonl", SHORT)
    return desk.once("bigtx generate classifier prompt=red")


# predict and evaluate


def predict(desk: Desk, *records: dict[str, str], more: str = "") -> Attempt:
    desk.take("classifier")
    desk.lines("in.jsonl", *records)
    return desk.command(f"bigtx predict classifier input=in.jsonl {more}")


@CASES.case("(its fields: ", r"write ('[^']+')$")
def a_field_of_another_name(desk: Desk) -> Attempt:
    return predict(desk, {"Text": "red apple"})


@CASES.case(" are allowed (data.max_length); data.too_long=truncate cuts", r"(data\.too_long=truncate)")
def a_text_too_long_to_predict(desk: Desk) -> Attempt:
    desk.take("classifier")
    path = desk.folder / "classifier/config.yaml"
    path.write_text(path.read_text().replace("too_long: truncate", "too_long: refuse"))
    desk.lines("in.jsonl", LONG, SHORT)
    return desk.command("bigtx evaluate classifier data=in.jsonl wandb=off")


@CASES.case("cut to the length that the model reads: ", r"(too_long=refuse)")
def a_text_that_is_cut(desk: Desk) -> Attempt:
    attempt = predict(desk, LONG, SHORT)

    def run(words: Sequence[str]) -> Outcome:
        done = attempt(words)
        return Outcome(done.refused and "1 record could not be used" not in done.text, done.text)

    return run


@CASES.case(" that marks it as an output of bigtx predict; ", r"(output=FILE)", fill={"FILE": "other.jsonl"})
def something_else_in_the_output(desk: Desk) -> Attempt:
    desk.write("out.jsonl", "mine\n")
    return predict(desk, SHORT, more="output=out.jsonl")


@CASES.case("; write the same to continue it, or ", r"started with (\S+);")
@CASES.case("; write the same to continue it, or ", r"(output=FILE)", fill={"FILE": "other.jsonl"})
def an_output_begun_otherwise(desk: Desk) -> Attempt:
    attempt = predict(desk, SHORT, more="output=out.jsonl")
    assert not attempt(["too_long=refuse"]).refused
    return attempt


@CASES.case(" is not the prediction for ", r"(output=FILE)", fill={"FILE": "other.jsonl"})
def an_output_of_other_records(desk: Desk) -> Attempt:
    attempt = predict(desk, SHORT, more="output=out.jsonl")
    assert not attempt([]).refused
    desk.lines("in.jsonl", {"text": "green apple"})
    return attempt


@CASES.case(" was started with the checkpoint ", r"(output=FILE)", fill={"FILE": "other.jsonl"})
def an_output_of_another_checkpoint(desk: Desk) -> Attempt:
    attempt = predict(desk, SHORT, more="output=out.jsonl")
    assert not attempt([]).refused
    about = desk.folder / "out.jsonl.about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"manifest_sha256": "0"}))
    return attempt


@CASES.case("(or, for `bigtx predict`, pass it by", r"`(input=-)`")
def a_pipe_as_input(desk: Desk) -> Attempt:
    desk.take("classifier")
    os.mkfifo("pipe")
    desk.patch.setattr(sys, "stdin", open(desk.lines("in.jsonl", SHORT)))  # noqa: SIM115 - the command's to read
    return lambda words: desk.run(f"bigtx predict classifier {' '.join(words) or 'input=pipe'}")


@CASES.case("one of them says what to predict for", r"write (input=FILE) or", fill={"FILE": "in.jsonl"})
@CASES.case("one of them says what to predict for", r"or (text=TEXT):", fill={"TEXT": "red"})
def nothing_to_predict(desk: Desk) -> Attempt:
    desk.take("classifier")
    desk.lines("in.jsonl", SHORT)
    return desk.command("bigtx predict classifier")


def evaluate(desk: Desk, more: str, run: str = "classifier") -> Attempt:
    desk.take(run)
    desk.lines("in.jsonl", SHORT, {"text": "stone", "label": "woe"})
    return desk.command(f"bigtx evaluate {run} wandb=off {more}")


@CASES.case(": the output is a JSON file; write ", r"write (output=NAME.json)$", fill={"NAME": "other"})
def an_evaluation_of_another_suffix(desk: Desk) -> Attempt:
    return evaluate(desk, "data=in.jsonl output=out.txt")


@CASES.case(
    " cannot be written: ",
    r"write (output=FILE.json)",
    fill={"FILE": "other"},
)
def an_evaluation_that_cannot_be_written(desk: Desk) -> Attempt:
    desk.write("file", "")
    return evaluate(desk, "data=in.jsonl output=file/out.json")


@CASES.case(" exists and is not an evaluation; ", r"write (output=FILE.json)", fill={"FILE": "other"})
def something_else_for_an_evaluation(desk: Desk) -> Attempt:
    desk.write("out.json", "{}")
    return evaluate(desk, "data=in.jsonl output=out.json")


@CASES.case(" is another evaluation, of ", r"write (output=FILE.json)", fill={"FILE": "other"})
def another_evaluation(desk: Desk) -> Attempt:
    attempt = evaluate(desk, "output=out.json")
    assert not attempt(["data=in.jsonl"]).refused
    desk.lines("new.jsonl", SHORT)
    return lambda words: attempt(["data=new.jsonl", *words])


@CASES.case("measured on the run's own validation ", r"because no (data=FILE) is", fill={"FILE": "corpus"})
def an_evaluation_of_what_is_held_out(desk: Desk) -> Attempt:
    desk.take("corpus")
    return evaluate(desk, "", run="decoder")


@CASES.case(" records; name others: ", r": (data=FILE)$", fill={"FILE": "in.jsonl"})
def a_run_without_records(desk: Desk) -> Attempt:
    attempt = evaluate(desk, "")
    return lambda words: attempt(words or ["split=validation"])


@CASES.case("split=test: a pretrained run has no test split", r"is (split=validation)$")
def a_test_split_of_a_pretrained_run(desk: Desk) -> Attempt:
    return evaluate(desk, "split=test", run="decoder")


@CASES.case("none of the run's corpora has held-out text", r": (data=FOLDER)$", fill={"FOLDER": "corpus"})
def nothing_held_out(desk: Desk) -> Attempt:
    desk.take("corpus", "decoder")
    path = desk.folder / "decoder/config.yaml"
    path.write_text(path.read_text().replace(str(desk.shelf.corpus), "bare"))
    desk.done("cp -r corpus bare && rm -r bare/validation")

    def run(words: Sequence[str]) -> Outcome:
        return desk.run(" ".join(["bigtx evaluate decoder wandb=off", *(words or ["split=validation"])]))

    return run


@CASES.case(" continues texts; ", r": (bigtx generate \S+)", value="prompt=red")
def a_prediction_of_a_pretrained_run(desk: Desk) -> Attempt:
    desk.take("decoder")
    desk.lines("in.jsonl", SHORT)
    return desk.once("bigtx predict decoder input=in.jsonl")


# import and export


@CASES.case("Next: ", r"Next: (bigtx generate .*)$")
@CASES.case(
    "To train further: bigtx data prepare ",
    r": (bigtx data prepare .*)$",
    r"^  (\S+ .*pretrain .*)$",
    fill={"output=CORPUS": "output=made num_processes=1"},
)
def an_imported_model(desk: Desk) -> Attempt:
    desk.without("transformers")
    desk.take("foreign", "corpus")
    (desk.folder / "corpus").rename("CORPUS")
    for number in range(2):
        desk.write(f"TEXTS/{number}.txt", f"{number} red apple tree")
    return desk.command("bigtx import foreign output='my run'")


@CASES.case("A run needs its tokenizer", r": (tokenizer=FOLDER)$", fill={"FOLDER": "tokenizer"})
def a_model_without_a_tokenizer(desk: Desk) -> Attempt:
    desk.without("transformers")
    desk.take("foreign")
    desk.done("cp -r foreign tokenizer", "rm -f foreign/tokenizer* foreign/*.model")
    return desk.command("bigtx import foreign output=new")


@CASES.case("; name the model's own: ", r": (tokenizer=FOLDER)$", fill={"FOLDER": "foreign"})
def a_tokenizer_of_another_model(desk: Desk) -> Attempt:
    desk.without("transformers")
    desk.take("foreign")
    desk.take("other_foreign")
    return desk.command("bigtx import foreign output=new tokenizer=other_foreign")


@CASES.case("Weights are not downloaded by bigtx", r"`(hf download .*)`")
def a_model_that_is_not_here(desk: Desk) -> Attempt:
    desk.without("transformers")
    desk.take("foreign")
    desk.program(
        "hf", 'assert sys.argv[1::2] == ["download", "--local-dir"]', "shutil.copytree('foreign', sys.argv[4])"
    )
    return desk.command("bigtx import 'my models/a' output=new")


@CASES.case("base= is for to=peft", r"for (to=peft):")
def a_base_without_peft(desk: Desk) -> Attempt:
    desk.take("adapters", "foreign")
    return desk.command("bigtx export adapters output=new base=foreign --no-verify")


@CASES.case(
    "to=peft needs base=FOLDER",
    r"needs (base=FOLDER)",
    r"`(bigtx export .*?)`",
    fill={"FOLDER": "made", "BASE_RUN": "decoder --no-verify"},
)
def peft_without_a_base(desk: Desk) -> Attempt:
    desk.take("adapters", "decoder")

    def run(words: Sequence[str]) -> Outcome:
        base = ["base=made"] if (desk.folder / "made").is_dir() else []
        return desk.run(" ".join(["bigtx export adapters to=peft output=new --no-verify", *words, *base]))

    return run


@CASES.case("dtype= and license= are for to=hf", r"^ConfigError: (dtype=) ", fill={"dtype=": "dtype=fp32"})
def a_dtype_for_adapters(desk: Desk) -> Attempt:
    desk.take("adapters")
    return desk.command("bigtx export adapters to=peft output=new base=x dtype=bf16 --no-verify")


@CASES.case("(model.lora.rank is 0)", r"`(bigtx export .*?)`", fill={"FOLDER": "made --no-verify"})
def no_adapters(desk: Desk) -> Attempt:
    desk.take("decoder")
    return desk.once("bigtx export decoder to=peft output=new base=x --no-verify")


@CASES.case(
    "which the PEFT format leaves out",
    r"`(bigtx export .*?)`",
    fill={"FOLDER": "made --no-verify"},
)
def more_than_adapters(desk: Desk) -> Attempt:
    desk.take("mixed")
    return desk.once("bigtx export mixed to=peft output=new base=x --no-verify")


@CASES.case(": write a size above 0, e.g. ", r"e\.g\. (5GB)$")
def a_size_of_nothing(desk: Desk) -> Attempt:
    desk.take("decoder")
    return lambda words: desk.run(
        f"bigtx export decoder output=new --no-verify max_shard_size={' '.join(words) or '0GB'}"
    )


@CASES.case("an export is compared with ", r"(pip install \S+),", r"\((--no-verify)\)$")
def no_transformers(desk: Desk) -> Attempt:
    desk.take("decoder")
    desk.without("transformers")
    export = desk.command("bigtx export decoder output=new --no-verify")
    return lambda words: export([]) if words else call(require, "transformers", "huggingface")


@CASES.case("an export is compared with ", r"(pip install \S+),")
def no_peft(desk: Desk) -> Attempt:
    desk.without("peft")
    return lambda words: call(require, "peft", "peft")


@CASES.case("; write dtype=bf16 or ", r"write (dtype=bf16)", r"or (dtype=fp32)")
def weights_beyond_fp16(desk: Desk) -> Attempt:
    desk.take("loud")
    return desk.command("bigtx export loud output=new --no-verify dtype=fp16")


@CASES.case("needs transformers, which is not installed", r"(pip install \S+)$")
def no_transformers_for_a_tokenizer(desk: Desk) -> Attempt:
    desk.without("transformers")
    return lambda words: call(load_tokenizer, Path("x")) if "transformers" in desk.hidden else Outcome(False, "")


@CASES.case("Let transformers write its own version", r"(python -c .*?\)\S)( A run|$)", slow=True)
def a_tokenizer_that_transformers_reads_otherwise(desk: Desk) -> Attempt:
    desk.take("tokenizer")
    desk.write("tokenizer/config.json", '{"model_type": "llama"}')
    (desk.folder / "tokenizer").rename("it's mine")
    return lambda words: call(import_tokenizer, Path("it's mine"))


@CASES.case("With bigtx, after `bigtx import", r"`(bigtx import .*?)`", fill={"FOLDER": "foreign"})
def a_model_card(desk: Desk) -> Attempt:
    desk.without("transformers")
    desk.take("foreign")
    return lambda words: Outcome(False, (desk.folder / "foreign/README.md").read_text())


@CASES.case("another process writes ", r"(output=FILE)", fill={"FILE": "other.jsonl"})
def an_output_that_is_held(desk: Desk) -> Attempt:
    desk.write("out.jsonl", "")
    held = os.open("out.jsonl", os.O_RDWR)
    desk.patch.setattr(desk, "held", held, raising=False)
    fcntl.flock(held, fcntl.LOCK_EX)
    return predict(desk, SHORT, more="output=out.jsonl")


@CASES.case("; to measure on the present ones, ", r"(data=FILE)$", fill={"FILE": "in.jsonl"})
def records_that_have_changed(desk: Desk) -> Attempt:
    attempt = evaluate(desk, "")
    path = desk.folder / "classifier/config.yaml"
    config = path.read_text()
    path.write_text(
        config.replace("  train: []", "  train: [in.jsonl]").replace("  validation: []", "  validation: [in.jsonl]")
    )
    return lambda words: attempt(words or ["split=validation"])


@CASES.case("the W&B run in ", r"(wandb=off)$")
def no_folder_for_wandb(desk: Desk) -> Attempt:
    desk.write("out.wandb", "")
    return evaluate(desk, "data=in.jsonl output=out.json wandb=offline")
