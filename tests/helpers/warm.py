"""Commands of the docs and the examples in a process that has imported its libraries before.

A `sartor` that tunes imports torch, transformers and peft for seven seconds; pages and examples start hundreds. So the tests
put a folder first in PATH whose `sartor` and `python` are small: each asks one server, which has imported everything, to fork,
and hands it its arguments, folder, environment and open files, also those that `pass_fds` left open. What runs in the fork is
the real command, and what it starts by `sys.executable` starts as always. A command whose environment has another value of what
libraries read while they are imported starts as always, too. The workers of a `sartor serve` that is such a fork are forks as
well, and so is each `flwr-clientapp`, of which Flower starts one for every message.

    with warm.commands(folder) as variables: subprocess.run(["bash", "-c", "sartor --help"], env={**os.environ, **variables})

The server keeps no state between commands: a fork sees what was imported, and nothing that another fork did. Linux only (pidfd).
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

# what libraries read while they are imported
READ_AT_IMPORT = (
    "HF_",
    "TRANSFORMERS_",
    "TORCH",
    "PYTORCH",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "POLARS_",
    "PYTHON",
    "LD_",
    "CUDA",
)
# peft sets the first in any process that imports it, so a test that does would leave all later commands cold; of the second
# a fork does as it says
NOT_COMPARED = ("TORCHINDUCTOR_CACHE_DIR", "PYTHONUNBUFFERED")
OFFLINE = {"HF_HUB_OFFLINE": "1"}
ADDRESS = "s"  # the server's socket, in the folder of the programs
FLOWER_CLIENT = "flwr-clientapp"
MOST_FILES = 32  # that a command is handed: its own three, and what its parent left open for it
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Flower's apps and alembic's scripts are run by those, and `__main__` is a command: to import one is to run it.
# `harness_tasks` needs lm_eval, which it imports where tasks are asked for
NEVER = ("flower", "migrations", "__main__", "harness_tasks")
CLIENT = '''#!{python} -ISE
"""Ask the server of tests/helpers/warm.py for a fork, and be its stand-in: its signals, its end."""
import array, json, os, signal, socket, sys

real, address, known = {real!r}, {address!r}, {known!r}
here = {{name: value for name, value in os.environ.items() if name.startswith({prefixes!r}) and name not in {left_out!r}}}
takes = not {name!r}.startswith("python") or (len(sys.argv) > 1 and (sys.argv[1] in ("-c", "-m") or not sys.argv[1].startswith("-")))
line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
try:
    if here != known or not takes:
        raise OSError
    line.connect(address)
except OSError:
    os.execv(real, [real, *sys.argv[1:]])
def is_handed_on(number):
    try:
        return number > 2 and os.get_inheritable(number)
    except OSError:
        return False
files = [0, 1, 2, *filter(is_handed_on, map(int, os.listdir("/proc/self/fd")))]
said = json.dumps([{name!r}, real, sys.argv[1:], os.getcwd(), dict(os.environ), os.umask(0o22), files]).encode()
os.umask(json.loads(said)[5])
line.sendmsg([len(said).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
line.sendall(said)
for number in {signals!r}:
    signal.signal(number, lambda number, _: line.sendall(bytes([number])))
code = int(line.recv(16) or b"-9")
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
'''


@contextmanager
def commands(folder: Path) -> Iterator[dict[str, str]]:
    """Variables under which `sartor` and `python` are forks of a server that has imported everything. It ends with the block."""
    environment = _write_clients(folder)
    server = subprocess.Popen(
        [sys.executable, __file__, str(folder / ADDRESS)], env={**os.environ, **OFFLINE}, stdin=subprocess.PIPE
    )
    with server:
        while not (folder / ADDRESS).exists() and server.poll() is None:
            time.sleep(0.05)
        assert (folder / ADDRESS).exists(), "the server of tests/helpers/warm.py ended"
        yield environment


def shared_commands(folder: Path) -> dict[str, str]:
    """The variables of `commands`, of one server for all workers of a run: it ends with the process that began them."""
    with FileLock(folder.with_suffix(".lock")):
        if (folder / ADDRESS).exists():
            return _variables(folder)
        environment = _write_clients(folder)
        command = [sys.executable, __file__, str(folder / ADDRESS), str(os.getppid())]
        pid = os.spawnve(os.P_NOWAIT, sys.executable, command, {**os.environ, **OFFLINE})
        while not (folder / ADDRESS).exists():
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, "the server of tests/helpers/warm.py ended"
            time.sleep(0.05)
        return environment


def _variables(folder: Path) -> dict[str, str]:
    return {**OFFLINE, "PATH": f"{folder}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}


def _write_clients(folder: Path) -> dict[str, str]:
    """Write the small programs into a new folder, and return the variables under which they are found."""
    folder.mkdir(parents=True)
    real = Path(sysconfig.get_path("scripts"))
    inside = {**os.environ, **OFFLINE}
    known = {
        name: value for name, value in inside.items() if name.startswith(READ_AT_IMPORT) and name not in NOT_COMPARED
    }
    for name in ("sartor", "python", "python3", FLOWER_CLIENT):
        fields = {
            "python": sys.executable,
            "real": str(real / name),
            "address": str(folder / ADDRESS),
            "known": known,
        }
        text = CLIENT.format(
            **fields,
            prefixes=READ_AT_IMPORT,
            left_out=NOT_COMPARED,
            name=name,
            signals=[int(one) for one in FORWARDED],
        )
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return _variables(folder)


def serve(address: Path, parent: int | None = None) -> None:
    """Fork for everybody who asks, until stdin is closed; or, if it is given, until the process `parent` is gone."""
    end: Any = sys.stdin if parent is None else os.pidfd_open(parent)
    # the command of a worker is made when serving is imported
    own, sys.executable = sys.executable, str(address.with_name("python"))
    _import_all()
    keep_products()
    sys.executable = own
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(end, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is end:
                return
            if key.fileobj is listener:
                line = listener.accept()[0]
                if (pid := _forked(line, (listener, waiting))) is not None:
                    asked = (line, os.pidfd_open(pid), pid)
                    waiting.register(line, selectors.EVENT_READ, asked)
                    waiting.register(asked[1], selectors.EVENT_READ, asked)
            elif waiting.get_map().get(key.fd) is not key:  # the fork's end, in the same turn, closed its line
                continue
            elif key.fileobj is key.data[0]:
                _hear(waiting, *key.data)
            else:
                _end(waiting, *key.data)


def keep_products() -> None:
    """Let oneDNN keep the code of 16,384 products in this process and its forks, unless the environment has a limit.

    It keeps 1,024, and compiles that of others anew. Tiny bases have more, in bf16 for each length of a batch, and tests go
    through the same ones again and again. The limit is read at the first product; programs that are started have the usual one.
    """
    import torch

    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    if name in os.environ:
        return
    os.environ[name] = "16384"
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    del os.environ[name]


def _import_all() -> None:
    import sartor

    for module in pkgutil.walk_packages(sartor.__path__, "sartor."):
        if not any(part in module.name for part in NEVER):
            importlib.import_module(module.name)


def _forked(line: socket.socket, ours: tuple[Any, ...]) -> int | None:
    """The process of one command; None where whoever asked is gone."""
    try:
        head, files, _, _ = socket.recv_fds(line, 8, MOST_FILES)
        said = b""
        while len(said) < int.from_bytes(head, "big"):
            if not (more := line.recv(1 << 20)):
                raise ConnectionError  # whoever asked was killed in the middle
            said += more
    except OSError:
        line.close()
        return None
    *command, numbers = json.loads(said)
    if command[0] == FLOWER_CLIENT:
        importlib.import_module("flwr.supernode.cli")  # for this one and all later ones
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        return pid
    for one in (*ours, line):
        one.close()
    # first out of the way: a file may have come by a number that is another's
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, 3 + max(*files, *numbers)) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    _run(*command)
    return None


def _run(name: str, real: str, arguments: list[str], folder: str, environment: dict[str, str], umask: int) -> None:
    """Be the command, as the interpreter would be, and never come back."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.umask(umask)
    if "PYTHONUNBUFFERED" in environment:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    code = 1
    try:
        _command(name, real, arguments)()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


def _command(name: str, real: str, arguments: list[str]) -> Callable[[], object]:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if name == "sartor":
        from sartor.cli import main as sartor_main

        sys.argv = [real, *arguments]
        return lambda: sys.exit(sartor_main())
    if name == FLOWER_CLIENT:
        from flwr.supernode.cli import flwr_clientapp

        sys.argv = [real, *arguments]
        return flwr_clientapp
    what, *more = arguments
    if what == "-c":
        sys.argv, sys.path[0] = ["-c", *more[1:]], ""
        return lambda: exec(compile(more[0], "<string>", "exec"), main.__dict__)
    if what == "-m":
        sys.argv, sys.path[0] = ["-m", *more[1:]], os.getcwd()
        return lambda: runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    sys.argv, sys.path[0] = [what, *more], str(Path(what).parent.absolute())
    return lambda: runpy.run_path(what, run_name="__main__")


def _hear(waiting: selectors.BaseSelector, line: socket.socket, process: int, pid: int) -> None:
    """A signal for the fork; or its stand-in was killed, and so is it."""
    try:
        said = line.recv(1)
    except OSError:
        said = b""
    with suppress(ProcessLookupError):
        os.kill(pid, said[0] if said else signal.SIGKILL)
    if not said:
        waiting.unregister(line)


def _end(waiting: selectors.BaseSelector, line: socket.socket, process: int, pid: int) -> None:
    """Say how it ended."""
    status = os.waitpid(pid, 0)[1]
    waiting.unregister(process)
    os.close(process)
    if line in waiting.get_map():
        waiting.unregister(line)
    with suppress(OSError):  # whoever asked is gone
        line.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    line.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), *map(int, sys.argv[2:]))
