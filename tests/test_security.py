"""What docs/security.md promises: no code of others is executed, no secret is written, and no file is open to all."""

from __future__ import annotations

import ast
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
from doors import ROOT, TINY, bigtx, environment, free_port

SECRET = "correct-horse-battery/staple"
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.hub.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "tarfile.extractall",
    "shutil.unpack_archive",
    "joblib.load",
}
"""Calls that run code that a file holds, or write files where an archive wants them."""
OF_OWN_EXPORT = "peft.PeftModel.from_pretrained"
"""It has no such option; bigtx calls it for a folder that it has just written."""
SAFE_LOADERS = ("yaml.BaseLoader", "SavedLoader")
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "zipfile", "xml"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call of a module and its dotted name, with numpy's usual short name written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield f"numpy.{name[3:]}" if name.startswith("np.") else name, node


def faults(source: str) -> list[str]:
    """Return the calls and imports of a module that could execute what it reads."""
    tree, found = ast.parse(source), []
    for name, call in calls(tree):
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        last = name.rpartition(".")[2]
        if name == "yaml.load" and words.get("Loader") in SAFE_LOADERS:
            continue
        if name in FORBIDDEN or last in ("extractall", "full_load", "unsafe_load"):
            found.append(name)
        if name == "numpy.load" and words.get("allow_pickle") != "False":
            found.append(name)
        if (
            last == "from_pretrained"
            and name != OF_OWN_EXPORT
            and (words.get("trust_remote_code") != "False" or words.get("local_files_only") != "True")
        ):
            found.append(name)
        if words.get("trust_remote_code", "False") != "False" or words.get("shell", "False") != "False":
            found.append(name)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.partition(".")[0] in MODULES]
    return found


def test_nothing_of_a_file_is_executed() -> None:
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "bigtx").rglob("*.py")}
    assert len(files) > 100
    found = {name: wrong for name, source in files.items() if (wrong := faults(source))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x')",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "import numpy as np; np.load('x')",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', local_files_only=True, trust_remote_code=True)",
        "AutoModel.from_pretrained('x')",
        "archive.extractall('x')",
        "subprocess.run('x', shell=True)",
        "from pickle import loads",
        "import xml.etree",
        "eval('1')",
    ],
)
def test_the_search_finds_what_it_searches(source: str) -> None:
    assert faults(source)


def files_with(secret: str, folder: Path) -> list[str]:
    """Return the files below a folder that hold a secret."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_runs_files_hold_no_secret_and_obey_the_umask(corpus: Path, tmp_path: Path) -> None:
    """A secret of the environment, with W&B's files; another user of the machine can read and write nothing."""
    run_dir = tmp_path / "run"
    words = [*TINY, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", "train.max_steps=2", "track.wandb=offline"]
    command = [sys.executable, "-m", "bigtx", "pretrain", *words, "--ranks", "1"]
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": "0" * 39 + "7", "MY_DEPLOY_KEY": "another-secret-of-mine"}
    script = 'umask 077; exec "$@"'
    done = forks.run(
        ["bash", "-c", script, "bash", *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**secrets),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for secret in secrets.values():
        assert files_with(secret, run_dir) == [] and secret not in done.stdout + done.stderr
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in run_dir.rglob("*") if not path.is_symlink()}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_a_secret_on_the_command_line_reaches_no_file(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*TINY, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", f"track.tags=[hf_{'a1B2' * 9}]"]
    done = bigtx("pretrain", *words, "train.max_steps=2", "--ranks", "1")
    assert done.returncode == 2 and "looks like a secret" in done.stderr
    assert "a1B2" not in done.stdout + done.stderr and not run_dir.exists()


def test_a_rank_of_deepspeed_refuses_a_secret_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    """The launcher's own lines show its command line; bigtx's lines and files do not."""
    run_dir = tmp_path / "run"
    words = [*TINY, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", f"api_key={SECRET}", "train.max_steps=2"]
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, str(ROOT / "bigtx" / "pretrain.py"), "--local_rank=0", *words]
    done = forks.run(command, capture_output=True, text=True, timeout=300, env=environment(**rank))
    assert done.returncode == 2 and "looks like a secret" in done.stderr
    assert SECRET not in done.stdout + done.stderr and not run_dir.exists()


@pytest.mark.parametrize("words", [["--print-config"], ["--dry-run"]])
def test_a_config_never_takes_a_value_of_the_environment(tmp_path: Path, words: list[str]) -> None:
    """OmegaConf would replace it, and the run would write it into its folder."""
    (tmp_path / "a.yaml").write_text("run_dir: ${oc.env:HF_TOKEN}\ntrack: {project: '${oc.env:HF_TOKEN}'}\n")
    done = bigtx("pretrain", str(tmp_path / "a.yaml"), *words, HF_TOKEN=SECRET)
    assert done.returncode == 2 and "never replaces" in done.stderr
    assert SECRET not in done.stdout + done.stderr
