"""Messages about what a fine-tuning trains and about its records; what they advise is done."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from advice.cases_again import TALK, Step, again_in
from advice.cases_training import FINETUNE, sft
from advice.desk import Attempt, Cases, Desk, Outcome, call, written
from advice.shelf import SHAPE

from bigtx.config.load import load
from bigtx.config.schema import FinetuneConfig
from bigtx.engine.checkpoint import Checkpoint, newest
from bigtx.engine.trainable import frozen_parameters, refuse_untrained
from bigtx.finetuning.base import plan_transfer
from bigtx.finetuning.checks import check_records
from bigtx.finetuning.records import open_task_data, read_table, write_table
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer

CASES = Cases()
again = functools.partial(again_in, CASES)
SHAPED = [f"model.{name}={value}" for name, value in SHAPE.items()]

# What is trained.


def untrained(*given: str) -> Step:
    """What is said of a table with new rows."""

    def begin(desk: Desk) -> Outcome:
        config = load(FinetuneConfig, ["task=sft", *SHAPED, *given], check=False)
        frozen = frozen_parameters(config, parameter_shapes(config.model))
        return call(lambda: refuse_untrained(["embedding.weight"], frozen, config))

    return begin


LORA, ALSO, FREEZE = "model.lora.rank=2", "optimizer.train_also=[embedding.*]", "optimizer.freeze=[embedding.*]"
OUT = "leave them out of optimizer.freeze"
for name, advice, wrong, right in (
    ("new_rows_beside_adapters", "name them in optimizer.train_also", [LORA], [LORA, ALSO]),
    ("new_rows_in_a_frozen_table", OUT, [FREEZE], []),
    ("frozen_rows_beside_adapters", f"{OUT} and name them in optimizer.train_also", [LORA, FREEZE], [LORA, ALSO]),
):
    again(name, f"; {advice}", advice, untrained(*wrong), untrained(*right))


def transferred(*given: str) -> Step:
    def plan(desk: Desk) -> Outcome:
        config = load(FinetuneConfig, [*FINETUNE, "base=decoder", *given])
        shapes = parameter_shapes(config.model)
        return call(lambda: plan_transfer(shapes, Checkpoint(newest("decoder")).shapes, name="decoder") and "")

    return plan


again(
    "a_base_of_another_shape",
    " does not fit the section model: ",
    "leave out the settings of model that change its shape",
    transferred("model.hidden_size=32"),
    transferred(),
    before=lambda desk: (desk.take("decoder"), desk.lines("records.jsonl", {"prompt": "a", "response": "b"})),
)


# Records.

PAIRS = [{"prompt": f"red {number}", "response": "apple tree"} for number in range(12)]
THIRD = 'data.leave_out=["in.jsonl, line 3"]'


def opened(*given: str) -> Step:
    """What is said of the records of a fine-tuning; it is resumed if there is a table of them."""

    def open_data(desk: Desk) -> Outcome:
        config = load(FinetuneConfig, ["task=sft", *SHAPED, "data.train=in.jsonl", *given], check=False)
        tokenizer = Tokenizer.load(desk.shelf.tokenizer)
        table = read_table(Path()) if Path("records.jsonl.gz").exists() else None
        with written():
            return call(lambda: open_task_data(config, tokenizer, table=table) and "")

    return open_data


def leave_out_what_is_listed(desk: Desk) -> Outcome:
    """Name what the message lists, then what the next one lists."""
    names: list[str] = []
    while (said := opened(f"data.leave_out={json.dumps(names)}")(desk)).refused:
        listed = re.findall(r"^  (in\.jsonl, line \d+): ", said.text, re.MULTILINE)
        assert listed and not set(listed) & set(names), said.text
        names += listed
    assert len(names) == 7
    return said


def unusable(desk: Desk) -> None:
    desk.lines("in.jsonl", *PAIRS, *[{"prompt": f"red {number}"} for number in range(7)])


def resumed(desk: Desk) -> None:
    """A run has started, and a record is gone since."""
    desk.lines("in.jsonl", *PAIRS)
    config = load(FinetuneConfig, ["task=sft", *SHAPED, "data.train=in.jsonl"], check=False)
    write_table(Path(), open_task_data(config, Tokenizer.load(desk.shelf.tokenizer)).table)
    desk.lines("in.jsonl", *PAIRS[:2], {}, *PAIRS[3:])


def checked(*given: str) -> Step:
    def check(desk: Desk) -> Outcome:
        settings = [*FINETUNE[::2], "base=decoder", "task=sft", *given]
        return call(lambda: check_records(load(FinetuneConfig, settings)))

    return check


again(
    "a_file_without_records",
    " holds no records; ",
    "name another file or folder",
    checked("data.train=empty.jsonl"),
    checked("data.train=in.jsonl"),
    before=lambda desk: (desk.take("decoder"), desk.write("empty.jsonl", "\n"), desk.lines("in.jsonl", *PAIRS)),
)


@CASES.case(" records cannot be used; repair or remove them:", r"Or leave them out: ('.*?') \(to resume")
def a_few_unusable_records(desk: Desk) -> Attempt:
    desk.lines("in.jsonl", *PAIRS, {}, {"prompt": "red"})
    return lambda words: opened(*words)(desk)


again(
    "many_unusable_records",
    "7 records cannot be used, the first 5 of them",
    "in data.leave_out; then the next ones are listed",
    opened(),
    leave_out_what_is_listed,
    before=unusable,
)
again(
    "many_unusable_records_in_a_file",
    "7 records cannot be used, the first 5 of them",
    "or the files and folders that hold them, in data.leave_out",
    opened("data.train=[in.jsonl,good.jsonl]"),
    opened("data.train=[in.jsonl,good.jsonl]", "data.leave_out=[in.jsonl]"),
    before=lambda desk: (unusable(desk), desk.lines("good.jsonl", *PAIRS)),
)
again(
    "a_record_that_is_gone",
    "A resumed run needs the records that it started with",
    "=add them to data.leave_out (with 'allow_changes=[data.leave_out]')",
    opened(),
    opened(THIRD, "allow_changes=[data.leave_out]"),
    before=resumed,
)
again(
    "a_record_that_is_restored",
    "A resumed run needs the records that it started with",
    "restore them",
    opened(),
    before=resumed,
    fix=lambda desk: desk.lines("in.jsonl", *PAIRS),
)
again(
    "all_records_left_out",
    "data.train gives no records to train on",
    "name fewer there",
    opened("data.leave_out=[in.jsonl]"),
    opened(THIRD),
    before=lambda desk: desk.lines("in.jsonl", *PAIRS),
)
again(
    "a_pair_of_empty_files",
    "data.train gives no records to train on",
    "other files",
    opened("data.train='x.{source,target}'", "task=translate"),
    opened("data.train='y.{source,target}'", "task=translate"),
    before=lambda desk: [
        desk.write(f"{name}.{side}", text)
        for name, text in (("x", ""), ("y", "a\nb\nc\n"))
        for side in ("source", "target")
    ],
)
again(
    "a_record_of_no_name",
    ", and there is no such record; ",
    "=write names as in messages: FILE, or 'FILE, line N'",
    opened('data.leave_out=["in.jsonl line 3"]'),
    opened(THIRD),
    before=lambda desk: desk.lines("in.jsonl", *PAIRS),
)


def encoded(record: dict[str, Any]) -> Step:
    return lambda desk: sft(Tokenizer.load(desk.shelf.tokenizer), "chat.format=plain", record=record)([])


again(
    "a_chat_in_plain_format",
    " is a chat, and the format is plain",
    "give a prompt and a response as texts",
    encoded({"messages": [*TALK, {"role": "assistant", "content": "apple"}]}),
    encoded(PAIRS[0]),
)
