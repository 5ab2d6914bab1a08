"""Write a set of small generated chats for configs/finetune/chat-set.yaml and chat-set-dpo.yaml, and score answers.

    python tools/recipes/chat_set.py make runs/chat-set             always writes the same set
    bigtx predict runs/chat input=runs/chat-set/test.jsonl output=answers.jsonl
    python tools/recipes/chat_set.py score answers.jsonl

The system prompt of a chat asks for one of three forms, and the answers must have exactly this form. Questions are
about numbers, lists of words, the days of the week and the months; a chat has one to three of them, and some ask
about the previous answer. A question about numbers or words in the held-out chats is in no other chat.

    train.jsonl, test.jsonl              {"messages": [...], "kind", "form", "expected"}
    pairs.jsonl, pairs-test.jsonl        {"prompt": [...], "chosen", "rejected", "fault"}

A rejected answer is a right one in another form, a wrong one, or one with additional text around it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
# fmt: off
WORDS = (
    "apple", "bread", "chair", "cloud", "dance", "eagle", "field", "glass", "grape", "green", "heart", "honey",
    "house", "light", "lemon", "money", "music", "night", "ocean", "onion", "paper", "piano", "plant", "queen",
    "river", "robin", "salad", "sheep", "snake", "stone", "sugar", "table", "tiger", "tower", "train", "water",
    "wheel", "woman",
)
# fmt: on
FORMS: dict[str, tuple[str, Callable[[str], str]]] = {
    "sentence": ("Answer in one sentence.", lambda answer: f"The answer is {answer}."),
    "brackets": ("Answer in square brackets.", lambda answer: f"[{answer}]"),
    "json": ("Answer in JSON.", lambda answer: json.dumps({"answer": answer})),
}
"""By name: the text of the system prompt, and the function that puts an answer into the form."""
PATTERNS = {
    "sentence": re.compile(r"The answer is ([^.\[\]{}]+)\."),
    "brackets": re.compile(r"\[([^.\[\]{}]+)\]"),
    "json": re.compile(r'\{"answer": "([^"]+)"\}'),
}
CHATTER = ("Sure! {}", "{} I hope this helps!", "Well, let me think. {}", "{} Anything else?")
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: of question.
        text: as a user asks it.
        answer: the right one.
        wrong: another answer of its sort.
        is_open: whether there are so many of its kind that held-out ones can be new.
        follow_up: a question about the answer, and the answer to that.
    """

    kind: str
    text: str
    answer: str
    wrong: str
    is_open: bool = True
    follow_up: tuple[str, str] | None = None

    @property
    def is_held_out(self) -> bool:
        """Return whether it may be asked only in held-out chats."""
        return self.is_open and hashlib.sha256(self.text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def larger(generator: random.Random) -> Question:
    """Ask for the larger or smaller of two numbers."""
    first, second = generator.sample(range(10, 100), 2)
    which, pick = generator.choice((("larger", max), ("smaller", min)))
    answer = pick(first, second)
    return Question("compare", f"Which is {which}, {first} or {second}?", str(answer), str(first + second - answer))


def after(generator: random.Random) -> Question:
    """Ask for the number before or after one."""
    number, step = generator.randrange(100, 1000), generator.choice((-1, 1))
    word, again = ("after", "And the one after that?") if step > 0 else ("before", "And the one before that?")
    return Question(
        "count on",
        f"Which number comes {word} {number}?",
        str(number + step),
        str(number - step),
        follow_up=(again, str(number + 2 * step)),
    )


def word_of(generator: random.Random) -> Question:
    """Ask for the first, second or last word of a list."""
    words = generator.sample(WORDS, generator.randrange(3, 6))
    name, place = generator.choice((("first", 0), ("second", 1), ("last", -1)))
    wrong = generator.choice([word for word in words if word != words[place]])
    return Question("pick a word", f"Which word is the {name} of: {' '.join(words)}?", words[place], wrong)


def number_of(generator: random.Random) -> Question:
    """Ask how many words a list has."""
    count = generator.randrange(2, 8)
    words = generator.sample(WORDS, count)
    wrong = str(count + generator.choice((-1, 1)))
    return Question("count words", f"How many words are in: {' '.join(words)}?", str(count), wrong)


def reversed_list(generator: random.Random) -> Question:
    """Ask for a list of words in reverse order."""
    words = generator.sample(WORDS, generator.randrange(2, 5))
    wrong = words[:]
    while wrong in (words[::-1], words):
        wrong = generator.sample(WORDS, len(words)) if len(words) == 2 else generator.sample(words, len(words))
    return Question("reverse", f"Write backwards: {' '.join(words)}", " ".join(words[::-1]), " ".join(wrong))


def cycle(names: Sequence[str], what: str) -> Callable[[random.Random], Question]:
    """Ask for the day or month before or after one."""

    def ask(generator: random.Random) -> Question:
        place, step = generator.randrange(len(names)), generator.choice((-1, 1))
        word = "after" if step > 0 else "before"
        answers = [names[(place + number * step) % len(names)] for number in (1, 2)]
        wrong = generator.choice([name for name in names if name != answers[0]])
        text = f"Which {what} comes {word} {names[place]}?"
        return Question(what, text, answers[0], wrong, False, (f"And the one {word} that?", answers[1]))

    return ask


KINDS = (larger, after, word_of, number_of, reversed_list, cycle(DAYS, "day"), cycle(MONTHS, "month"))


def ask(generator: random.Random, *, held_out: bool) -> Question:
    """Draw a question; open ones are held out or not, as requested."""
    kind = generator.choice(KINDS)  # Drawn first, so that kinds are equally frequent in all parts.
    while True:
        question = kind(generator)
        if not question.is_open or question.is_held_out == held_out:
            return question


def chat(generator: random.Random, *, held_out: bool) -> dict[str, Any]:
    """Draw a record of `messages`: a system prompt, one to three questions, and their answers."""
    form = generator.choice(list(FORMS))
    system, shape = FORMS[form]
    messages = [{"role": "system", "content": system}]
    for _ in range(generator.choice((1, 1, 2, 3))):
        question = ask(generator, held_out=held_out)
        kind, answer = question.kind, question.answer
        messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": shape(answer)}]
        if question.follow_up and generator.random() < 0.3:
            text, answer = question.follow_up
            kind = f"{question.kind}, again"
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": shape(answer)}]
    return {"messages": messages, "kind": kind, "form": form, "expected": answer}


def pair(generator: random.Random, *, held_out: bool) -> dict[str, Any]:
    """Draw a record of `prompt`, `chosen` and `rejected`."""
    form = generator.choice(list(FORMS))
    system, shape = FORMS[form]
    question = ask(generator, held_out=held_out)
    chosen = shape(question.answer)
    fault = generator.choice(("form", "wrong", "chatter"))
    if fault == "form":
        other = generator.choice([name for name in FORMS if name != form])
        rejected = FORMS[other][1](question.answer)
    elif fault == "wrong":
        rejected = shape(question.wrong)
    else:
        rejected = generator.choice(CHATTER).format(chosen)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question.text}]
    return {"prompt": messages, "chosen": chosen, "rejected": rejected, "kind": question.kind, "fault": fault}


def make(folder: Path, *, chats: int, pairs: int, tests: int, seed: int) -> None:
    """Write the set."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = (
        ("train.jsonl", chat, chats, False),
        ("test.jsonl", chat, tests, True),
        ("pairs.jsonl", pair, pairs, False),
        ("pairs-test.jsonl", pair, tests, True),
    )
    for name, record, count, held_out in plan:
        generator = random.Random(f"{seed}/{name}")
        with open(folder / name, "w", encoding="utf-8") as file:
            for _ in range(count):
                print(json.dumps(record(generator, held_out=held_out)), file=file)
        print(f"{folder / name}: {count:,} records")


def scored(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute the shares of answers with the right form, of right answers, and of right answers by kind.

    Args:
        records: those of `test.jsonl`, each with a `prediction` that has the `response`.
    """
    formed, right, total = 0, Counter[str](), Counter[str]()
    for record in records:
        match = PATTERNS[record["form"]].fullmatch(record["prediction"]["response"].strip())
        formed += match is not None
        total[record["kind"]] += 1
        right[record["kind"]] += match is not None and match[1] == record["expected"]
    by_kind = {f"right, {kind}": right[kind] / count for kind, count in sorted(total.items())}
    return {"well-formed": formed / len(records), "right": right.total() / len(records)} | by_kind


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Small chats in strict forms: write the set, or score answers.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the set into a folder")
    making.add_argument("folder", type=Path)
    making.add_argument("--chats", type=int, default=6000)
    making.add_argument("--pairs", type=int, default=2000)
    making.add_argument("--tests", type=int, default=400, help="held-out chats, and as many held-out pairs")
    making.add_argument("--seed", type=int, default=1)
    scoring = commands.add_parser("score", help="count the answers that have the right form, and those that are right")
    scoring.add_argument("answers", type=Path, help="the output of `bigtx predict` for test.jsonl")
    options = parser.parse_args(argv)
    if options.command == "make":
        make(options.folder, chats=options.chats, pairs=options.pairs, tests=options.tests, seed=options.seed)
        return 0
    for name, share in scored(list(read_lines(options.answers))).items():
        print(f"{name:<24}{share:7.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
