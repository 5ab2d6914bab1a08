"""`bigtx chat`, and `bigtx generate` on a run that was trained on chats, from a few chats to the terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
from doors import ROOT, environment, pretrain, read_lines
from doors import bigtx as run_bigtx
from finetunes import finetune_command, write_jsonl
from own_chats import ANSWERS, chat, num_exact, write_own_chats
from terminals import Terminal

import bigtx
from bigtx.api import LoadedModel
from bigtx.cli import main
from bigtx.utils.errors import BigtxError

KNOWN = {"ba ben bin": "so lan.", "da don": "ner nar, lin.", "ku kos?": "man mon.\n\nmin mun."}
"""What the model of the tests has learned by heart; one answer has two paragraphs."""


@pytest.fixture(scope="module")
def run(decoder_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe for one's own chats, on three of them, with nothing but what it cannot know, in fp32."""
    folder = tmp_path_factory.mktemp("chat")
    data = write_jsonl(folder / "chats.jsonl", [chat(question, answer) for question, answer in KNOWN.items()])
    settings = [f"base={decoder_base}", f"data.train={data}", f"run_dir={folder / 'run'}"]
    settings += ["track.wandb=off", "engine.precision=fp32"]
    done = forks.run(
        finetune_command(["finetune/chat.yaml", *settings]), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 steps of 8 make 800 epochs (train.min_steps=300, since train.epochs=3 would be 2 steps)" in done.stdout
    assert "would hold out fewer than data.min_held_out=10" in done.stdout
    assert "trained: all parameters, with the embeddings of the chat roles; peak learning rate 0.0023" in done.stdout
    before, _, _ = done.stdout.partition("step 10/300")
    assert "trained: all" in before and "300 steps of 8" in before, "said before the first step"
    assert f"next: bigtx chat {folder / 'run'}" in done.stdout
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedModel:
    return bigtx.load(run)


Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """`bigtx chat` with lines of standard input; what it writes on standard output, and on standard error."""

    def talk(lines: str | bytes, *options: str, status: int = 0, temperature: str = "0") -> tuple[str, str]:
        path = tmp_path / "stdin"
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        with open(path, encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert main(["chat", str(run), "--temperature", temperature, *options]) == status
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return shown.out, shown.err

    return talk


def test_a_message_in_each_line(talk: Talk) -> None:
    out, err = talk("".join(f"/reset\n{question}\n\n" for question in KNOWN))
    assert out == "".join(f"{answer}\n" for answer in KNOWN.values())
    assert err == "[a new chat begins]\n" * 3


def test_json_has_an_object_for_each_answer(talk: Talk, loaded: LoadedModel) -> None:
    out, _ = talk("ku kos?\n/reset\nda don\n", "--json")
    first, second = map(json.loads, out.splitlines())
    ids = loaded.tokenizer.encode(KNOWN["ku kos?"])
    assert first == {"prompt": "ku kos?", "response": KNOWN["ku kos?"], "num_tokens": len(ids), "ended_by": "end"}
    assert second["response"] == KNOWN["da don"]
    out, _ = talk("ku kos?\n", "--json", "--max-new-tokens", "3")
    assert json.loads(out)["ended_by"] == "length" and json.loads(out)["num_tokens"] == 3


def test_what_was_said_is_part_of_the_next_prompt(
    talk: Talk, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[Any] = []
    original = LoadedModel.read

    def spy(self: LoadedModel, prompt: Any, **options: Any) -> Any:
        read.append(original(self, prompt, **options))
        return read[-1]

    monkeypatch.setattr(LoadedModel, "read", spy)
    file = tmp_path / "saved.jsonl"
    file.write_text('{"messages": []}')
    _, err = talk(f"ba ben bin\nda don\n/save {file}\n", "--system", "ba")
    assert f"[saved as line 2 of {file}]" in err
    saved = read_lines(file)[-1]["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert saved[0]["content"] == "ba" and saved[2]["content"] and saved[3]["content"] == "da don"
    ids = [one.prompt.ids for one in read]
    assert ids == [loaded.tokenizer.encode_chat(saved[:number], add_generation_prompt=True) for number in (2, 4)], (
        "the ids of training"
    )


def test_what_was_saved_is_read_by_fine_tuning(talk: Talk, loaded: LoadedModel, tmp_path: Path) -> None:
    from bigtx.data.records.read import read_records
    from bigtx.data.records.record import Broken

    talk(f"ba ben bin\n/save {tmp_path / 'a.jsonl'}\n/reset\nku kos?\n/save {tmp_path / 'a.jsonl'}\n")
    broken = Broken()
    records = list(read_records([str(tmp_path / "a.jsonl")], broken))
    assert len(records) == 2 and not broken.count
    example = loaded.task.encode(records[1])
    assert loaded.tokenizer.decode(example.ids[example.prompt_length :].tolist()) == KNOWN["ku kos?"]


def test_a_long_chat_loses_its_oldest_turns_and_keeps_the_system_prompt(talk: Talk, loaded: LoadedModel) -> None:
    system = {"role": "system", "content": "ba"}
    turns = [{"role": role, "content": "ban ben bin bon"} for _ in range(6) for role in ("user", "assistant")][:-1]
    read = loaded.read([system, *turns], options={"max_new_tokens": 16})
    kept = len(turns) - read.num_left_out
    assert 0 < kept < len(turns) and "are not read" in read.remark
    expected = loaded.tokenizer.encode_chat([system, *turns[-kept:]], add_generation_prompt=True)
    assert read.prompt.ids == expected and len(expected) + 16 <= 64
    _, err = talk("ban ben bin bon\n" * 12, "--system", "ba", "--max-new-tokens", "16")
    assert err.count("is too long: its oldest 2 messages are not read; the model reads 64 tokens") == 1, err
    read = loaded.read([{"role": "user", "content": "ba " * 100}], options={})
    assert "the beginning of its last message is not read" in read.remark


def test_a_stop_text_ends_an_answer(talk: Talk, loaded: LoadedModel) -> None:
    out, _ = talk("ku kos?\n/reset\nda don\n", "--stop", "\n\n", "--stop", ", l")
    assert out == "man mon.\nner nar\n"
    message = [{"role": "user", "content": "ku kos?"}]
    heard: list[str] = []
    assert loaded.chat(message, temperature=0, stop="n.\n", on_text=heard.append) == "man mo" == "".join(heard)


def test_lines_that_cannot_be_answered(talk: Talk, tmp_path: Path) -> None:
    _, err = talk("ba ben bin\n/rest\n", status=2)
    assert "standard input, line 2: there is no command /rest" in err and "//rest" in err
    _, err = talk(b"ba\n\xff\n", status=2)
    assert "standard input, line 2: it is not UTF-8" in err
    _, err = talk("/save a.txt\n", status=2)
    assert "/save NAME.jsonl" in err
    _, err = talk(f"/save {tmp_path}/a.jsonl\n", status=2)
    assert "nothing to save" in err
    _, err = talk(f"ba ben bin\n/save {tmp_path}/none/a.jsonl\n", status=2)
    assert "cannot be written: No such file or directory" in err
    out, err = talk("//\n/help\n/quit\nba ben bin\n", "--json")
    assert json.loads(out)["prompt"] == "/" and "/reset" in err, "nothing is answered after /quit"
    assert talk("", "--top-p", "2", status=2)[1].count("top_p=2") == 1


@pytest.mark.parametrize("command", [["chat", "RUN"], ["predict", "RUN", "--input", "-"]])
def test_a_closed_standard_input_has_no_lines(run: Path, command: list[str]) -> None:
    words = [str(run) if word == "RUN" else word for word in command]
    shell = ["bash", "-c", 'exec "$@" <&-', "bash", sys.executable, "-m", "bigtx", *words]
    done = subprocess.run(shell, capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("command", [["chat"], ["generate", "--prompts-file", "FILE"]])
def test_a_run_that_knows_no_chats(
    decoder_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [chat("a", "b")])
    assert main([command[0], str(decoder_base), *(str(path) if w == "FILE" else w for w in command[1:])]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and f"{decoder_base} was pretrained on plain text and was not trained on chats" in shown.err
    assert f"bigtx finetune finetune/chat.yaml base={decoder_base} data.train=CHATS.jsonl" in shown.err
    with pytest.raises(BigtxError, match="was not trained on chats"):
        bigtx.load(decoder_base).chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.chat("ba"), "the messages are not a list"),
        (lambda model: model.chat([]), "no message to answer"),
        (lambda model: model.chat([5]), "Message 1 of a chat is 5"),
        (lambda model: model.chat([{"role": "judge", "content": "a"}]), "has the role 'judge'"),
        (lambda model: model.chat(chat("a", "b")["messages"]), "the last message is the assistant's"),
        (lambda model: model.chat(chat("a", "b")["messages"][:1], temprature=1), "did you mean temperature?"),
        (lambda model: model.chat(chat("a", "b")["messages"][:1], stop=""), "stop=['']: a text of at least one"),
        (lambda model: model.chat(chat("a", "b")["messages"][:1], stop=5), "stop=5: a text of at least one"),
        (lambda model: model.chat(chat("a", "b")["messages"][:1], on_text=5), "on_text=5: a function"),
        (lambda model: model.chat([{"role": "user", "content": "\ud800"}]), "half a surrogate pair"),
        (lambda model: model.generate_batch(5), "the prompts are not a list of texts"),
        (lambda model: model.predict(5), "the records are not a list of records"),
        (lambda model: model.logits(5), "ids must be one or more whole numbers"),
        (lambda model: bigtx.load(5), "the run 5 is not a path"),  # type: ignore[arg-type]
        (lambda model: bigtx.load(model.checkpoint, device=None), "device None cannot be used"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_from_python(loaded: LoadedModel, call: Any, words: str) -> None:
    with pytest.raises(BigtxError, match=re.escape(words)):
        call(loaded)


def test_generate_answers_a_prompt_or_continues_it(
    run: Path, loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(run), "--temperature", "0", "--max-new-tokens", "24"]
    assert main([*command, "--prompt", "ku kos?"]) == 0
    assert capsys.readouterr().out == KNOWN["ku kos?"] + "\n" == loaded.generate("ku kos?", temperature=0) + "\n"
    assert main([*command, "--prompt", "ku kos?", "--raw"]) == 0
    continued = loaded.generate("ku kos?", temperature=0, max_new_tokens=24, raw=True)
    assert capsys.readouterr().out == f"ku kos?{continued}\n", "the prompt is shown before its continuation"
    ids = loaded.tokenizer.encode("ku kos?")
    assert loaded.read("ku kos?", raw=True, options={}).prompt.ids == ids
    assert loaded.read("ku kos?", options={}).prompt.ids != ids
    records = [{"id": 1, **chat("da don", "x")}, {"prompt": "ba ben bin"}]
    del records[0]["messages"][1]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    assert main([*command, "--prompts-file", str(path), "--stop", "nar"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [records[0] | {"completion": "ner "}, records[1] | {"completion": KNOWN["ba ben bin"]}]
    path = write_jsonl(tmp_path / "b.jsonl", [records[1], chat("a", "b")])
    assert main([*command, "--prompts-file", str(path)]) == 2
    assert f"{path}, prompt 2: the chat has no message to answer" in capsys.readouterr().err
    assert main([*command, "--prompts-file", str(path), "--raw"]) == 2
    assert "--raw" in capsys.readouterr().err


def long_answer(loaded: LoadedModel, prompt: str) -> int:
    """A seed with which wild draws do not end soon."""
    options = {"temperature": 50.0, "max_new_tokens": 500}
    for seed in range(100):
        (written,) = loaded.write([loaded.read(prompt, options=options)], seed=seed, **options)
        if written.ended_by == "length":
            return seed
    raise AssertionError("all answers are short")


def test_a_terminal(run: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    seed = long_answer(loaded, "ba")
    options = ["--temperature", "50", "--max-new-tokens", "100000", "--seed", str(seed)]
    terminal = Terminal("chat", str(run), *options)
    terminal.until("> ")
    terminal.type("ba\r")
    terminal.until("ba\r\n")
    while not terminal.seen.strip():
        terminal.seen += os.read(terminal.main, 64).decode("utf-8", "replace")
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type("/nonsense\r")
    terminal.until("there is no command /nonsense")
    terminal.until("> ")
    terminal.type(f"/save {tmp_path}/a.jsonl\r")
    terminal.until("saved as line 1")
    terminal.until("> ")
    terminal.until_it_waits()
    terminal.type("\x03")
    assert terminal.end() == 128 + signal.SIGINT
    (saved,) = read_lines(tmp_path / "a.jsonl")
    assert saved["messages"][0]["content"] == "ba" and len(saved["messages"]) == 2, "the part that was said is kept"


def test_ctrl_d_ends_a_chat(run: Path) -> None:
    terminal = Terminal("chat", str(run), "--temperature", "0")
    terminal.until("> ")
    terminal.type("da dox\x7fn\r")  # Backspace.
    assert KNOWN["da don"] in terminal.until("\r\n> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_ends_an_answer_through_a_pipe(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(self: LoadedModel, *_: Any, on_text: Callable[[int, str], None], **__: Any) -> None:
        on_text(0, "so ")
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadedModel, "write", interrupted)
    (tmp_path / "stdin").write_text("ba\nbe\n")
    with open(tmp_path / "stdin") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["chat", str(run)]) == 128 + signal.SIGINT
    assert capsys.readouterr().out == "so "


@pytest.mark.slow
def test_27_chats_of_ones_own_come_back(tmp_path: Path) -> None:
    """The journey of the README on the modules of Python, to a model that knows its chats by heart."""

    def done(process: subprocess.CompletedProcess[str]) -> str:
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    texts, tokenizer, corpus, base = (tmp_path / name for name in ("texts", "tokenizer", "corpus", "base"))
    texts.mkdir()
    for number, path in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))):
        (texts / f"{number}.txt").write_bytes(path.read_bytes())
    done(run_bigtx("tokenizer", "train", f"input.paths={texts}", f"output={tokenizer}", "vocab_size=8k"))
    made = [f"tokenizer={tokenizer}", f"output={corpus}", "validation_fraction=0.05"]
    done(run_bigtx("data", "prepare", f"input.paths={texts}", *made))
    settings = [f"data.sources.mine.path={corpus}", f"run_dir={base}", "track.wandb=off"]
    done(pretrain("pretrain/small.yaml", *settings, "train.max_steps=250", ranks=2))
    data, run = write_own_chats(tmp_path / "chats.jsonl"), tmp_path / "run"
    settings = [f"base={base}", f"data.train={data}", f"run_dir={run}"]
    done(
        forks.run(
            finetune_command(["finetune/chat.yaml", *settings], ranks=2),
            capture_output=True,
            text=True,
            env=environment(WANDB_MODE="disabled"),
        )
    )
    lines = "".join(f"/reset\n{question}\n" for question in ANSWERS)
    talked = forks.run(
        [sys.executable, "-m", "bigtx", "chat", str(run), "--temperature", "0", "--json"],
        input=lines,
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    answers = [json.loads(line)["response"] for line in done(talked).splitlines()]
    assert num_exact(answers) >= 24, answers
