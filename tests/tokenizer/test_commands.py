from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import forks
import pytest
from doors import as_json

from bigtx.commands.tokenizer import import_command, inspect_command, train_command
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sysconfig.get_path("stdlib")
SOURCES = [f"input.paths=[{LIBRARY}/email]", "input.text_suffixes=[.py]", "input.exclude=[test]"]


def bigtx(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forks.run(
        [sys.executable, "-m", "bigtx", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_train_inspect_and_import_as_a_user_calls_them(tmp_path: Path) -> None:
    done = bigtx("tokenizer", "train", *SOURCES, "vocab_size=1k", "output=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "bytes per token" in done.stdout
    assert "is restored exactly" in done.stdout
    assert "CHANGED" not in done.stdout
    assert "Next: bigtx data prepare 'input.paths=[" in done.stdout
    tokenizer = Tokenizer.load(tmp_path / "mine")
    assert tokenizer.vocab_size == 1000

    shown = bigtx(
        "tokenizer", "inspect", "mine", "--text", "import os▁", "--file", f"{LIBRARY}/email/utils.py", cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    assert tokenizer.fingerprint in shown.stdout
    assert "100 sentinels 5..104" in shown.stdout
    assert "[▁: 3 bytes]" in shown.stdout
    assert str(tokenizer.encode("import os▁")) in shown.stdout
    assert "every text is restored exactly" in shown.stdout

    brought = bigtx("tokenizer", "import", "mine/tokenizer.model", "-o", "other", cwd=tmp_path)
    assert brought.returncode == 0, brought.stderr
    assert Tokenizer.load(tmp_path / "other").fingerprint == tokenizer.fingerprint

    again = bigtx("tokenizer", "train", *SOURCES, "vocab_size=1k", "output=mine", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "trained already with these settings and this input; there is nothing to do" in again.stdout
    assert tokenizer.fingerprint[:12] in again.stdout and "Next: bigtx data prepare" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["vocab_size=500k"], ConfigError, "set vocab_size="),
        (["vocab_size=100"], ConfigError, "vocab_size"),
        (["chat_roles=[User]"], ConfigError, "chat_roles"),
        (["input.paths=[gone]"], ConfigError, "gone"),
        (["input.text_suffixes=[.nothing]"], DataError, "No text in"),
        (["input.exclude=['*']"], DataError, "No text in"),
    ],
)
def test_mistakes_end_in_a_paragraph(
    tmp_path: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train_command([*SOURCES, f"output={tmp_path / 'new'}", "vocab_size=1k", *arguments])
    assert not (tmp_path / "new").exists()


def test_a_folder_and_an_output_that_cannot_be_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"did you mean input\.paths="):
        train_command([str(tmp_path), f"output={tmp_path / 'new'}"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made: .*/file is a file"):
        train_command([*SOURCES, f"output={tmp_path / 'file' / 'new'}", "vocab_size=1k"])
    # As in a corpus, whose recipe a tokenizer's would replace.
    (tmp_path / "recipe.json").write_text("precious")
    for command in (
        lambda: train_command([*SOURCES, f"output={tmp_path}", "vocab_size=1k"]),
        lambda: import_command([str(tmp_path / "any.model"), "-o", str(tmp_path)]),
    ):
        with pytest.raises(ConfigError, match="is not an empty folder"):
            command()
    assert (tmp_path / "recipe.json").read_text() == "precious"
    assert "Reading" not in capsys.readouterr().out


def test_print_config_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_command([*SOURCES, "output=new", "--print-config"])
    assert "vocab_size: 16384" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_command(["--help"])
    shown = capsys.readouterr().out
    assert "vocab_size" in shown and "e.g. bigtx tokenizer train" in shown


def test_a_tokenizer_made_otherwise_is_not_written_over(
    tmp_path: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join(f"{hex(i * 7919)} words to learn from {i}" for i in range(2000)))
    given = [f"input.paths={tmp_path}/a.txt", f"output={tmp_path / 'new'}", "vocab_size=512"]
    train_command(given)
    before = (tmp_path / "new" / "bigtx_tokenizer.json").read_bytes()
    capsys.readouterr()
    train_command([*given, "input.max_rejects=0.5", f"input.paths={tmp_path}/./a.txt"])
    assert "nothing to do" in capsys.readouterr().out
    for changed, named in (
        (["vocab_size=513"], r"vocab_size was 512 and is now 513\."),
        (["method=unigram", "seed=4"], "method was 'bpe' and is now 'unigram'; seed was 1 and is now 4"),
        ([f"input.paths={tmp_path}/b.txt"], r"input\.paths was .*a\.txt.* and is now .*b\.txt"),
    ):
        with pytest.raises(ConfigError, match=named):
            train_command([*given, *changed])
    with (tmp_path / "a.txt").open("a") as file:
        file.write("more")
    with pytest.raises(ConfigError, match="the input files have been changed"):
        train_command(given)
    assert (tmp_path / "new" / "bigtx_tokenizer.json").read_bytes() == before

    bpe.save(tmp_path / "imported")
    with pytest.raises(ConfigError, match=r"imported has a tokenizer already\. Corpora"):
        train_command([*given, f"output={tmp_path / 'imported'}"])


def test_passed_over_files_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.rst", "c.rst", "README"):
        (tmp_path / name).write_text("\n".join(f"{hex(i * 7919)} words to learn from {i}" for i in range(2000)))
    train_command([f"input.paths={tmp_path}", f"output={tmp_path / 'new'}", "vocab_size=512", "input.max_rejects=0"])
    shown = capsys.readouterr().out
    assert "Reading 1 file," in shown
    assert "Skipped, by their suffix: 2 .rst, 1 without a suffix" in shown


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no documents"):
        train_command([f"input.paths=[{tmp_path}]", f"output={tmp_path / 'new'}"])


def test_broken_input_is_counted_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": f"{hex(i * 7919)} words to learn from {i}"}) for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken"]))
    train_command([f"input.paths=[{tmp_path}/a.jsonl]", f"output={tmp_path / 'new'}", "vocab_size=512"])
    assert "2,000 documents" in (out := capsys.readouterr().out)
    assert "1 that cannot be read" in out
    with pytest.raises(DataError, match=r"a\.jsonl, line 2001: not JSON"):
        train_command([f"input.paths=[{tmp_path}/a.jsonl]", f"output={tmp_path / 'other'}", "input.max_rejects=0"])


def test_import_finds_what_a_folder_holds(tmp_path: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    bpe.save(tmp_path / "from")
    import_command([str(tmp_path / "from"), "-o", str(tmp_path / "to")])
    assert "loses" not in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "to").fingerprint == bpe.fingerprint
    with pytest.raises(ConfigError, match="already"):
        import_command([str(tmp_path / "from"), "-o", str(tmp_path / "to")])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no sentencepiece"):
        import_command([str(tmp_path / "nothing"), "-o", str(tmp_path / "new")])
    with pytest.raises(DataError, match="does not exist"):
        import_command([str(tmp_path / "gone"), "-o", str(tmp_path / "new")])


def test_inspect_refuses_what_it_cannot_read(tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match="No tokenizer in"):
        inspect_command([str(tmp_path)])
    bpe.save(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        inspect_command([str(tmp_path), "--file", str(tmp_path / "latin")])
    with pytest.raises(DataError, match="gone cannot be read"):
        inspect_command([str(tmp_path), "--file", str(tmp_path / "gone")])
    inspect_command([str(tmp_path)])


def test_json_stands_alone(tmp_path: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    new = [*SOURCES, f"output={tmp_path / 'new'}", "vocab_size=1k"]
    trained, again = as_json(capsys, train_command, new), as_json(capsys, train_command, new)
    assert (trained["vocab_size"], trained["reused"], again["reused"]) == (1000, False, True)
    assert trained["measured"]["texts_unchanged"] == trained["measured"]["texts"] > 0
    assert trained["fingerprint"] == again["fingerprint"]
    bpe.save(tmp_path / "from")
    brought = as_json(capsys, import_command, [f"path={tmp_path / 'from'}", f"output={tmp_path / 'to'}"])
    assert (brought["fingerprint"], brought["loses_something_of"]) == (bpe.fingerprint, [])
    (tmp_path / "a.txt").write_text("Füße")
    words = [str(tmp_path / "to"), "text=two words", "text=Füße", f"file={tmp_path / 'a.txt'}"]
    shown = as_json(capsys, inspect_command, words)
    assert [text["ids"] for text in shown["texts"]] == [bpe.encode("two words"), bpe.encode("Füße")]
    assert [text["unchanged"] for text in shown["texts"]] == [True, True]
    assert [file["bytes"] for file in shown["files"]] == [6]


def test_what_is_no_tokenizer_is_named(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").touch()
    bpe.save(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"it is a prepared corpus, whose tokenizer is .*/tokenizer; name that"):
        inspect_command([str(tmp_path)])


def test_control_c_ends_the_training_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"{i * 7919 % 1000003:x}" for i in range(1_500_000)))
    process = forks.start(
        [
            sys.executable,
            "-m",
            "bigtx",
            "tokenizer",
            "train",
            f"input.paths=[{tmp_path}]",
            "output=new",
            "method=unigram",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout
    while not (line := process.stdout.readline()).startswith("Learning"):
        assert line
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors == ""
    assert not (tmp_path / "new").exists()
