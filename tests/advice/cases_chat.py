"""Messages of `bigtx chat`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from advice.desk import Attempt, Cases, Desk, Outcome

CASES = Cases()
CHAT = "bigtx chat {} max_new_tokens=20"


def talk(desk: Desk, *lines: str, run: str = "chats") -> Attempt:
    """A chat through a pipe; words are the last message, in place of the last line."""
    desk.take(run)

    def attempt(words: Sequence[str]) -> Outcome:
        said = [*lines[:-1], " ".join(words) or lines[-1]]
        with open(desk.write("stdin", "".join(line + "\n" for line in said)), encoding="utf-8") as stdin:
            desk.patch.setattr(sys, "stdin", stdin)
            return desk.run(CHAT.format(run))

    return attempt


@CASES.case(
    " and was not trained on chats. ",
    r"chats\. (bigtx finetune \S+ \S+ \S+ \S+) trains",
    r"; (bigtx generate decoder prompt='\.\.\.') continues",
    fill={"CHATS": "records", "NEW": "runs/new", "'...'": "red max_new_tokens=2"},
)
def a_chat_with_a_pretrained_run(desk: Desk) -> Attempt:
    desk.lines("records.jsonl", {"messages": []})
    refused = talk(desk, "red apple", run="decoder")([])
    assert refused.refused
    return lambda words: Outcome(False, refused.text)


@CASES.case(
    " answers single prompts, not chats of several turns",
    r"; (bigtx generate answers prompt='\.\.\.') gives",
    fill={"'...'": "red max_new_tokens=2"},
)
def a_chat_with_a_run_of_single_answers(desk: Desk) -> Attempt:
    refused = talk(desk, "red apple", run="answers")([])
    assert refused.refused
    return lambda words: Outcome(False, refused.text)


@CASES.case("/save needs the name of a file of JSON lines", r": (/save NAME\.jsonl)$", fill={"NAME": "kept"})
def a_chat_saved_without_a_name(desk: Desk) -> Attempt:
    attempt = talk(desk, "red apple", "/save")

    def save(words: Sequence[str]) -> Outcome:
        done = attempt(words)
        assert not words or "red apple" in (desk.folder / "kept.jsonl").read_text()
        return done

    return save


@CASES.case("there is no command ", r"; (/help) shows", r"with //: (//\w+)$")
def an_unknown_command_of_a_chat(desk: Desk) -> Attempt:
    return talk(desk, "/apple")
