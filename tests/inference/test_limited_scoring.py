"""Code from outside in a limited child: right and wrong results, and code that hangs, prints, kills, writes or calls out."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import BudgetError, ConfigError, MissingError
from sartor.core.resource_limits import JobResult, ResourceUsage
from sartor.inference.verifiers import limited_scoring
from sartor.inference.verifiers.entry_point import EntryPointVerifier
from sartor.inference.verifiers.submission import Submission
from sartor.inference.verifiers.unit_tests import UnitTestsVerifier

REFERENCE = "def double(x):\n    return 2 * x\nassert double(1) == 2\nassert double(-3) == -6\n"
REPLIES = {
    "def double(x):\n    return x + x": 1.0,
    "```python\ndef double(x):\n    return x * 2\n```": 1.0,
    "def double(x):\n    return x + 1": 0.5,
    "def double(x): return 'no'": 0.0,
    "def double(x:": 0.0,
    "import os; os._exit(0)": 0.0,
    # a process that the code forks and that ends by itself says nothing of the reply
    "import os, sys\nif not os.fork(): sys.exit(0)\nos.wait()\ndef double(x): return 2 * x": 1.0,
    "import os\nforked = os.fork()\nif forked: os.wait()\ndef double(x): return 2 * x if forked else 0": 1.0,
    "import sys; sys.exit(0)": 0.0,
    "while True: pass": 0.0,
    "print('x' * (1 << 30))": 0.0,
    "x = bytearray(1 << 33)": 0.0,
    "import socket\nsocket.create_connection(('127.0.0.1', 1), 1)\ndef double(x): return 2 * x": 0.0,
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef double(x): return 2 * x": 0.0,
    "def double(x): return 2 * x": 1.0,
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that sartor runs in, with functions of a user."""
    monkeypatch.chdir(tmp_path)
    source = """
    import os, socket, time

    def equal(reply, reference, prompt):
        print("a line")
        return reply == reference and prompt[-1]["content"] == "q"

    def hangs(reply, reference, prompt):
        while reply == "b":
            pass
        return 1

    def prints(reply, reference, prompt):
        while reply == "b":
            print("x" * 100_000, flush=True)
        return 1

    def fails(reply, reference, prompt):
        return 1 / (reply != "b")

    def large(reply, reference, prompt):
        return 2.0

    def rounded(reply, reference, prompt):
        return {"a": 1.0000000000000002, "b": -2.2e-16, "c": 0.5}[reply]

    def says(reply, reference, prompt):
        print("x" * 100_000)
        return 1

    def leaves(reply, reference, prompt):
        os._exit(0)

    def writes(reply, reference, prompt):
        try:
            open(reply, "w")
        except OSError:
            return 0
        return 1

    def connects(reply, reference, prompt, host="192.0.2.1"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            try:
                opened.connect((host, 9))
            except OSError:
                return 0
        return 1

    def reaches_loopback(reply, reference, prompt):
        return connects(reply, reference, prompt, "127.0.0.1")
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(source))
    return tmp_path


def rewards(function: str, *replies: str, **options: Any) -> list[float]:
    items = [Submission(f"row-{reply}", reply, "a", ({"role": "user", "content": "q"},)) for reply in replies]
    return EntryPointVerifier(f"mine:{function}", **options).rewards(items)


def test_unit_tests_reward_right_code_and_survive_hostile_code() -> None:
    """Replies that hang, print a gigabyte, take memory, end the process, kill its parent or connect get nothing."""
    items = [Submission("r", reply, REFERENCE) for reply in REPLIES]
    found = UnitTestsVerifier(time_s=1.0).rewards(items)
    assert dict(zip(REPLIES, found, strict=True)) == REPLIES
    assert UnitTestsVerifier().right_reply(items[0]) == "def double(x):\n    return 2 * x"


CLASS = "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n"


@pytest.mark.parametrize(
    "reply",
    [
        CLASS,
        f"from __future__ import annotations\n{CLASS}",
        f"```Python\r\n{CLASS}```",
        f"```python3\n{CLASS}```\nIt prints\n```text\nPoint(x=1)\n```\nand no more.",
        f"First:\n```bash\npip install nothing\n```\n```py\n{CLASS}```",
    ],
)
def test_right_code_in_any_dress_has_the_full_reward(reply: str) -> None:
    reference = f"{CLASS}assert Point(1).x == 1\nassert Point.__name__ == 'Point'"
    assert UnitTestsVerifier(time_s=5.0).rewards([Submission("r", reply, reference)]) == [1.0]


def test_annotations_are_those_that_the_reply_wrote() -> None:
    reply = "def f(a: int) -> int:\n    return a\n"
    rows = [Submission("r", reply, f"{reply}assert f.__annotations__ == {{'a': int, 'return': int}}")]
    assert UnitTestsVerifier(time_s=5.0).rewards(rows) == [1.0]


def test_the_limit_of_output_is_that_of_one_reply(module: Path) -> None:
    """40 replies for each of which 100 KB are printed: 4 MB in all."""
    assert rewards("says", *["a"] * 40) == [1.0] * 40


def test_function_is_called_with_reply_reference_and_prompt(module: Path) -> None:
    assert rewards("equal", "a", "b", "a") == [1.0, 0.0, 1.0]


def test_rounding_beyond_the_limits_is_cut(module: Path) -> None:
    assert rewards("rounded", "a", "b", "c") == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("function", "error", "problem"),
    [
        ("hangs", BudgetError, r"mine:hangs\) took more than 0.5 s for the reply to row row-b and was killed"),
        ("prints", BudgetError, r"mine:prints\) wrote more than 1 MB at the reply to row row-b and was killed"),
        ("fails", ConfigError, r"raised ZeroDivisionError: .* for the reply to row row-b"),
        ("large", ConfigError, r"returned 2.0 for the reply to row row-a"),
        ("leaves", BudgetError, r"ended without a reward at the reply to row row-a"),
        ("absent", ConfigError, r"cannot be imported: AttributeError"),
    ],
)
def test_function_that_fails_is_named_with_the_row(
    module: Path, function: str, error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem) as caught:
        rewards(function, "a", "b", time_s=0.5)
    assert getattr(caught.value, "remedy", "")


def test_module_that_is_not_there_is_named(module: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere:x\) cannot be imported: ModuleNotFoundError") as caught:
        EntryPointVerifier("nowhere:x").rewards([Submission("r", "a")])
    assert "folder that holds the module" in caught.value.remedy


def test_function_reaches_no_network_unless_allowed(module: Path) -> None:
    assert rewards("connects", "a") == [0.0]
    assert rewards("reaches_loopback", "a") == [0.0]
    assert rewards("reaches_loopback", "a", network="allowed") == [1.0]


def test_function_changes_no_file_outside_its_folder(module: Path) -> None:
    """By Landlock, which this machine's kernel has."""
    (module / "kept").write_text("kept")
    assert rewards("writes", "scratch", str(module / "kept"), str(module / "new"), "/dev/null") == [1.0, 0.0, 0.0, 1.0]
    assert (module / "kept").read_text() == "kept" and not (module / "new").exists()


def _payload(**payload: Any) -> Any:
    usage = ResourceUsage("nothing", 0, 0, 0.0, 0.0, 0, "")
    return lambda *arguments, **keywords: JobResult(payload or None, usage, ["the last line"])


@pytest.mark.parametrize(
    ("killed", "remedy"), [("memory", "less memory"), ("wall", "time_s 20"), ("", "by hand on these replies")]
)
def test_child_that_is_killed_names_what_helps(monkeypatch: pytest.MonkeyPatch, killed: Any, remedy: str) -> None:
    usage = ResourceUsage("nothing", 0, 0, 0.0, 0.0, 1, killed)
    monkeypatch.setattr(limited_scoring, "run_job", lambda *arguments: JobResult(None, usage, []))
    with pytest.raises(BudgetError, match="ended by") as caught:
        UnitTestsVerifier().rewards([Submission("r", "x", REFERENCE)])
    assert remedy in caught.value.remedy


def test_system_without_network_namespaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    detail = "unshare: EPERM, Operation not permitted"
    monkeypatch.setattr(limited_scoring, "run_job", _payload(rewards=[], fault="network", detail=detail))
    with pytest.raises(MissingError, match=r"without a network, which this system does not allow \(unshare: EPERM"):
        UnitTestsVerifier().rewards([Submission("r", "x", REFERENCE)])


def test_option_lets_code_run_where_no_namespace_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []

    def run_job(module: str, job: Any, limits: Any) -> Any:
        jobs.append(job)
        return _payload(rewards=[1.0], fault="none", detail="")()

    monkeypatch.setattr(limited_scoring, "run_job", run_job)
    assert UnitTestsVerifier(network="allowed").rewards([Submission("r", "x", REFERENCE)]) == [1.0]
    assert jobs[0]["allows_network"]


def test_child_that_is_killed_whole_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_scoring, "run_job", _payload())
    with pytest.raises(
        BudgetError, match="child process of the verifier unit_tests ended by exit code 0: the last line"
    ):
        UnitTestsVerifier().rewards([Submission("r", "x", REFERENCE)])


@pytest.mark.parametrize(
    "left",
    [
        "os.remove('output'); os.symlink('{victim}', 'output')",
        "os.remove('output'); os.mkdir('output')",
        "os.remove('output'); os.mkfifo('output')",
        "os.symlink('{victim}', 'other')",
    ],
)
def test_nothing_that_a_reply_leaves_behind_reaches_the_next(left: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    reference = "x = 1\nassert x == 1"
    code = f"import os\n{left.format(victim=victim)}\nx = 1"
    next_code = "print('overwritten')\nopen('other', 'w').write('overwritten')\nx = 1"
    rewards = UnitTestsVerifier(time_s=10).rewards(
        [Submission("ask", code, reference), *[Submission("ask", next_code, reference)] * 2]
    )
    assert rewards == [1.0, 1.0, 1.0] and victim.read_text() == "as it was"


@pytest.mark.parametrize("reward", ["1e9", "-1", "NaN", "null", "true", '"1"', "[]"])
def test_reward_that_is_none_is_0(reward: str) -> None:
    code = (
        'import os\nfor pipe in range(3, 30):\n  try: os.write(pipe, b\'{"reward": ' + reward + "}\\n')\n"
        "  except OSError: pass"
    )
    submissions = [Submission("ask", code, "x = 1\nassert x == 1"), Submission("ask", "x = 1", "x = 1\nassert x == 1")]
    assert UnitTestsVerifier(time_s=10).rewards(submissions) == [0.0, 1.0]
