"""warm.py: a fork of the server is the command that it stands for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm
from server_process import serve_command

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server of its own: that of the session has another environment if an earlier test changed this process's."""
    with warm.commands(tmp_path_factory.mktemp("own-warm") / "bin") as environment:
        yield environment


def run(commands: dict[str, str], *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **commands, **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, input="said\n")


def test_warm_fork_has_arguments_streams_and_exit_code(commands: dict[str, str], tmp_path: Path) -> None:
    """It runs as __main__ with torch loaded; errors and unknown commands end as in a new process."""
    done = run(
        commands, "python", "-c", "import sys; print(sys.argv, input(), 'torch' in sys.modules, __name__)", "a b"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "['-c', 'a b'] said True __main__\n", "")
    (tmp_path / "x.py").write_text("import sys; sys.exit('no ' + __file__)")
    done = run(commands, "python", str(tmp_path / "x.py"))
    assert (done.returncode, done.stderr) == (1, f"no {tmp_path / 'x.py'}\n")
    done = run(commands, "sartor", "frobnicate")
    assert done.returncode == 2 and 'Unknown command "frobnicate"' in done.stderr
    done = run(commands, "python", "-c", "raise ValueError(3)")
    assert done.returncode == 1 and done.stderr.endswith("ValueError: 3\n")


def test_warm_fork_needs_the_same_import_time_environment(commands: dict[str, str]) -> None:
    """With another OMP_NUM_THREADS a new process runs; other variables are passed to the fork."""
    code = "import os, sys; print('torch' in sys.modules, os.environ.get('OMP_NUM_THREADS'), os.environ.get('OWN'))"
    assert run(commands, "python", "-c", code, OWN="x").stdout == f"True {os.environ['OMP_NUM_THREADS']} x\n"
    assert run(commands, "python", "-c", code, OMP_NUM_THREADS="7").stdout == "False 7 None\n"


def test_a_command_stays_warm_after_peft_is_imported(commands: dict[str, str]) -> None:
    code = "import sys; print('torch' in sys.modules)"
    assert run(commands, "python", "-c", code, TORCHINDUCTOR_CACHE_DIR="/tmp/another").stdout == "True\n"


def test_a_file_that_is_left_open_has_its_number(commands: dict[str, str]) -> None:
    environment, (ours, theirs) = {**os.environ, **commands}, os.pipe()
    code = f"import os, sys; os.write({theirs}, b'torch' if 'torch' in sys.modules else b'cold')"
    subprocess.run(["python", "-c", code], env=environment, pass_fds=[theirs], check=True)
    os.close(theirs)
    assert os.read(ours, 9) == b"torch"
    os.close(ours)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_it_is_one_to_the_fork(commands: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'x').write(str(os.getpid())); print(flush=True); time.sleep(60)"
    environment = {**os.environ, **commands}
    process = subprocess.Popen(["python", "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=300)  # until the fork, too, has let go of it
    assert process.returncode == -number
    for _ in range(2000):
        if not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the fork is still there")


def test_workers_of_a_server_are_forks_as_well(commands: dict[str, str]) -> None:
    """Also of a `sartor serve` that is no fork, if it is started by the helper's command."""
    shim = str(Path(commands["PATH"].split(os.pathsep)[0]) / "python")
    code = "from sartor.serving.workers.supervisor import WORKER; print(WORKER[0])"
    assert run(commands, "python", "-c", code).stdout == f"{shim}\n"
    assert serve_command(commands)[-6] == shim


def test_flower_starts_its_clients_as_forks(commands: dict[str, str]) -> None:
    done = run(commands, "flwr-clientapp", "--no-such-option")
    assert done.returncode == 2 and "--runtime-api-address" in done.stderr
    assert (Path(commands["PATH"].split(os.pathsep)[0]) / "flwr-clientapp").exists()
