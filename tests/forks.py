"""Start commands of bigtx in forks of a process that has imported torch, DeepSpeed, W&B and most of bigtx.

Such a command is a process of its own, with its own arguments, environment, files, signals and exit status, but it
needs no seconds for imports. What could change the imported packages or the interpreter starts a new interpreter
instead: other variables such as PYTHONPATH or LD_PRELOAD, and other programs. Trials of mutants import bigtx in each
fork.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import gc
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "deepspeed",
    "omegaconf",
    "sentencepiece",
    "yaml",
    "wandb",
)
"""What the process imports before it forks. ZeRO 3 and deterministic kernels import torch._dynamo."""
PARTS = ("bigtx.api", "bigtx.cli", "bigtx.launch.supervisor", "bigtx.pretraining.run", "bigtx.finetuning.run")
"""Parts of bigtx that it imports too. Python would warn about modules that commands name, such as bigtx.pretrain."""
SENSITIVE = ("PYTHON", "LD_", "OMP_", "MKL_", "KMP_", "TORCH", "DS_", "CUDA", "LANG", "LC_", "TZ")
"""Beginnings of names of variables that the interpreter or the imported packages read when they start."""
LARGEST_REQUEST = 1 << 18
RECORDING = "BIGTX_MUTANTS_LINES"
"""The variable by which tools/mutants records the lines that run."""
PADDING = "-" * 8192
"""An argument of the process, whose place in memory holds the command lines of the forks."""


def start(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    on_terminal: bool = False,
    **options: Any,
) -> subprocess.Popen[Any]:
    """Start a command.

    Args:
        command: the program and its arguments.
        env: its environment.
        on_terminal: whether its standard input becomes the terminal that controls its new session.
        options: as for `subprocess.Popen`.
    """
    variables = dict(os.environ if env is None else env)
    if _is_of_bigtx(command) and not options.get("pass_fds"):
        server = _server()
        if server.fits(variables):
            return _Fork(list(command), env=variables, server=server, on_terminal=on_terminal, **options)
    if on_terminal:
        options["preexec_fn"] = _take_terminal
    return subprocess.Popen(command, env=variables, **options)


def run(
    command: Sequence[str],
    *,
    capture_output: bool = False,
    input: str | None = None,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end, as `subprocess.run` does."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with start(command, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _is_of_bigtx(command: Sequence[str]) -> bool:
    if len(command) < 2 or command[0] != sys.executable:
        return False
    if command[1] == "-m":
        return command[2].partition(".")[0] == "bigtx"
    return command[1].endswith(".py") and ROOT in Path(command[1]).parents


class _Server:
    """The process that forks, as its client sees it.

    Attributes:
        variables: the environment in which it was started.
    """

    def __init__(self, variables: dict[str, str], control: socket.socket) -> None:
        self.variables = variables
        self.paths = variables.get("PYTHONPATH", "").split(os.pathsep)
        self._control = control

    @classmethod
    def start(cls) -> Self:
        """Start the process in a new interpreter."""
        variables, control, theirs = _prepare()
        parts = () if RECORDING in os.environ else PARTS  # Else the lines that run at an import were not recorded.
        with theirs:
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *parts, PADDING],
                env=variables,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        return cls(variables, control)

    def fits(self, variables: Mapping[str, str]) -> bool:
        """Return whether a new interpreter with these variables would import the same packages in the same way."""
        paths = variables.get("PYTHONPATH", "").split(os.pathsep)
        if "COVERAGE_PROCESS_START" in variables or not {*paths} <= {str(ROOT), "", *self.paths}:
            return False
        names = {name for name in (*self.variables, *variables) if name.startswith(SENSITIVE)}
        return all(self.variables.get(name) == variables.get(name) for name in names - {"PYTHONPATH"})

    def ask(self, request: dict[str, Any], descriptors: Sequence[int]) -> tuple[int, socket.socket]:
        """Have a fork made. Returns its process id and the socket on which its status will arrive."""
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            given = array.array("i", [*descriptors, theirs.fileno()])
            self._control.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
        answer = status.recv(32)
        if not answer:
            raise RuntimeError("the process that forks has ended")
        return int(answer), status


_servers: dict[int, _Server] = {}


def _server() -> _Server:
    """Return the server of this process."""
    if os.getpid() not in _servers:
        _servers[os.getpid()] = _Server.start()
    return _servers[os.getpid()]


def fork_server() -> None:
    """Make the server of this process by a fork, where this process has imported the packages and not bigtx.

    The command line of this process must end with `PADDING`. Returns in this process only: the other one and its forks
    end here, some with SystemExit, which the caller must not catch.
    """
    variables, control, theirs = _prepare()
    if os.fork():
        theirs.close()
        _servers[os.getpid()] = _Server(variables, control)
        return
    control.close()
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    _serve_and_execute(theirs)


def _prepare() -> tuple[dict[str, str], socket.socket, socket.socket]:
    """Return the environment of a server, and both ends of the socket for its requests."""
    variables = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    variables.pop(RECORDING, None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for each in (ours, theirs):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_REQUEST)
    return variables, ours, theirs


class _Fork(subprocess.Popen[Any]):
    """A process that the server forked. It is no child of this one, so its status comes over a socket."""

    def __init__(self, command: Sequence[str], *, server: _Server, on_terminal: bool, **options: Any) -> None:
        self._server, self._on_terminal = server, on_terminal
        self._status: socket.socket
        super().__init__(command, **options)

    def _execute_child(self, *values: Any, **named: Any) -> None:
        bound = inspect.signature(subprocess.Popen._execute_child).bind(self, *values, **named)  # type: ignore[attr-defined]
        given = bound.arguments
        assert not given["shell"] and given["preexec_fn"] is None
        pipes = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        request = {
            "command": [os.fspath(word) for word in given["args"]],
            "variables": given["env"],
            "folder": os.fspath(given["cwd"] or os.getcwd()),
            "new_session": given["start_new_session"],
            "on_terminal": self._on_terminal,
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        }
        try:
            descriptors = [own if pipe == -1 else pipe for own, pipe in enumerate(pipes)]
            self.pid, self._status = self._server.ask(request, descriptors)
            self._child_created = True
        finally:
            ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
            self._close_pipe_fds(*(given[name] for name in ends))  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        try:
            answer = self._status.recv(32, socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0)
        except BlockingIOError:
            return 0, 0
        self._status.close()
        return self.pid, int(answer) if answer else signal.SIGKILL

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None and (found := self._try_wait(os.WNOHANG))[0]:
                    self._handle_exitstatus(found[1])  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for each request until the client is gone. Returns the request in each fork, and None at the end."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    statuses: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, reading], [], [])
        if reading in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(reading, 4096)
            _reap(statuses)
        if control not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, LARGEST_REQUEST, 4)
        if not message:
            for pid in statuses:
                os.kill(pid, signal.SIGKILL)
            return None
        request = json.loads(message)
        status = socket.socket(fileno=descriptors[3])
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become(request, descriptors[:3], status)
            for each in (control, *statuses.values()):
                each.detach()  # `_become` has closed it: closing it again later would close another file.
            return request
        statuses[pid] = status
        for descriptor in descriptors[:3]:
            os.close(descriptor)


def _reap(statuses: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            with statuses.pop(found[0]) as status, contextlib.suppress(OSError):
                status.send(str(found[1]).encode())


def _become(request: dict[str, Any], descriptors: Sequence[int], status: socket.socket) -> None:
    """Turn this fork into what a new interpreter would be."""
    if request["new_session"]:
        os.setsid()
    for own, descriptor in enumerate(descriptors):
        os.dup2(descriptor, own)
    if request["on_terminal"]:
        _take_terminal()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    _show(request["command"])
    status.send(str(os.getpid()).encode())
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    status.detach()
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 - open to the end of the process
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    tempfile.tempdir = None
    if RECORDING in os.environ:
        import hook  # Of tools/mutants, which records the lines that each process of a test runs.

        hook.install()


def _show(command: Sequence[str]) -> None:
    """Have /proc and ps show the command line of this fork."""
    import ctypes

    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    text = b"\0".join(map(os.fsencode, command)) + b"\0"
    if len(text) > end - begin:
        return
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, text, len(text))
    set_memory, set_end = 35, 9  # PR_SET_MM and PR_SET_MM_ARG_END; without the right to it, empty words follow.
    ctypes.CDLL(None).prctl(set_memory, set_end, *map(ctypes.c_ulong, (begin + len(text), 0, 0)))


def _serve_and_execute(control: socket.socket) -> NoReturn:
    """Fork on request; in the forks, run their commands."""
    gc.freeze()  # The forks' collections need not look at these objects, nor copy their pages.
    request = serve(control)
    if request:
        try:
            execute(request["command"], request["variables"])
        except SystemExit as end:
            if end.code is not None and not isinstance(end.code, int):
                raise
            _end(end.code or 0)
        _end(0)
    sys.exit(0)


def _end(status: int) -> NoReturn:
    """End this fork as an interpreter ends, but let the kernel free its objects: Python would copy each of their pages
    to do so, which takes as long as a short training."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(status)  # Python explains it, and has a status for it.
    os._exit(status & 0xFF)


def execute(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run the program as Python's command line does; it ends with SystemExit."""
    sys.orig_argv = list(command)
    sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    if command[1] == "-m":
        sys.argv = ["-m", *command[3:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command[1:])
        sys.path.insert(0, str(Path(command[1]).resolve().parent))
        runpy.run_path(command[1], run_name="__main__")


def _read_schemas() -> None:
    """Have OmegaConf read the schemas of the trainings, which it keeps."""
    from bigtx.config.load import load
    from bigtx.config.schema import FinetuneConfig, PretrainConfig

    for schema in (PretrainConfig, FinetuneConfig):
        load(schema, [], check=False)


def main() -> None:
    """Import the packages and the parts of bigtx that are given, then fork on request."""
    sys.path[0] = str(ROOT)  # Instead of the tests' folder.
    parts = sys.argv[2:-1]
    for name in (*PACKAGES, *parts):
        with contextlib.suppress(ImportError):
            __import__(name)
    if parts:
        with contextlib.suppress(ImportError):
            _read_schemas()
    sys.path.pop(0)
    _serve_and_execute(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
