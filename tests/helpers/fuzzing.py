"""Fuzzing of the parsers of outside input: mutations of valid inputs, and what every parser owes whoever wrote the input.

A parser either parses or raises a SartorError with a remedy; it takes bounded memory and time. An input that broke
that rule is kept in tests/attacks/cases/PARSER, and is tried by every run.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sartor.core.errors import SartorError

CASES = Path(__file__).resolve().parents[1] / "attacks" / "cases"
EXAMPLES_VARIABLE = "SARTOR_FUZZ_EXAMPLES"
EXAMPLES = 1_000
MEMORY_BYTES = 64 << 20
CPU_S = 5.0  # of one input; inputs are some kilobytes, and a loaded machine is slower
HANG_S = 60

Form = Literal["bytes", "text", "json"]


@dataclass(frozen=True)
class Parser:
    """A parser of outside input.

    parse: reads one input; the folder is a test's own.
    seeds: valid inputs; they are mutated.
    form: what the mutations know of the input.
    memory_bytes: bound on the peak of Python's memory for one input.
    is_native: whether libraries allocate beside Python, so that a child with RLIMIT_AS reads the inputs once more.
    """

    name: str
    parse: Callable[[bytes, Path], object]
    seeds: Callable[[], Sequence[bytes]]
    form: Form = "bytes"
    memory_bytes: int = MEMORY_BYTES
    is_native: bool = False
    words: Sequence[bytes] = ()
    read: list[bytes] = field(default_factory=list, compare=False, repr=False)


def examples() -> int:
    """Return the number of inputs of each parser."""
    return int(os.environ.get(EXAMPLES_VARIABLE, EXAMPLES))


def fuzz(parser: Parser, folder: Path) -> None:
    """Read mutated inputs; derandomised, so that every run reads the same. Raises what breaks the rule."""
    parser.read.clear()
    warm_up(parser, folder)

    @settings(
        max_examples=examples(),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # shrinking takes minutes of a slow parser; `make fuzz` has them
        phases=(Phase.generate, Phase.shrink) if examples() > EXAMPLES else (Phase.generate,),
    )
    @given(inputs(parser))
    def run(content: bytes) -> None:
        parser.read.append(content)
        try:
            check(parser, content, folder)
        except BaseException as error:
            file = folder.parent / f"find-{parser.name}"
            file.write_bytes(content)
            error.add_note(f"keep it: cp {file} {CASES / parser.name}/WHAT-IT-IS")
            raise

    run()
    if parser.is_native:
        replay_limited(parser, folder)


def warm_up(parser: Parser, folder: Path) -> None:
    """Read the seeds: what is imported and started at first use is no part of a bound."""
    for seed in parser.seeds():
        attempt(parser, seed, folder)


def check(parser: Parser, content: bytes, folder: Path) -> None:
    """Read one input. Raises AssertionError, or the parser's own exception, if the rule is broken."""
    tracemalloc.start(1)
    started = time.process_time()
    try:
        with no_longer_than(HANG_S):
            attempt(parser, content, folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    took_s = time.process_time() - started
    assert took_s <= CPU_S, f"{len(content):,} bytes took {took_s:.1f} s of a processor"
    assert peak <= parser.memory_bytes, f"{len(content):,} bytes took {peak:,} bytes of memory"


def attempt(parser: Parser, content: bytes, folder: Path) -> SartorError | None:
    """Read one input and return its refusal, which has a problem and a remedy; None if it was parsed."""
    try:
        parser.parse(content, folder)
    except SartorError as error:
        assert error.problem.strip() and error.remedy.strip(), repr(error)
        return error
    return None


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that hangs."""

    def ring(number: int, frame: types.FrameType | None) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_REPLAY = """
import sys, warnings
sys.path[:0] = {paths!r}
import fuzzing, fuzz_parsers
fuzzing.replay(fuzz_parsers.PARSERS[{name!r}], {file!r}, {folder!r})
"""


def replay_limited(parser: Parser, folder: Path) -> None:
    """Let a child read all inputs again; its address space may grow by twice the bound and no more."""
    file = folder / "inputs.bin"
    file.write_bytes(b"".join(struct.pack("<I", len(content)) + content for content in parser.read))
    code = _REPLAY.format(
        paths=[path for path in sys.path if path], name=parser.name, file=str(file), folder=str(folder)
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"


def replay(parser: Parser, file: str, folder: str) -> None:
    """Read the inputs of a file under a limit on the address space. Runs in the child."""
    import resource

    warm_up(parser, Path(folder))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * parser.memory_bytes,) * 2)
    data, position = Path(file).read_bytes(), 0
    while position < len(data):
        length = struct.unpack_from("<I", data, position)[0]
        attempt(parser, data[position + 4 : position + 4 + length], Path(folder))
        position += 4 + length


def cases(parser: str) -> list[Path]:
    """Return the kept inputs of a parser."""
    return sorted((CASES / parser).glob("*")) if (CASES / parser).is_dir() else []


# What is drawn is a text of bytes that says which seed, and what is done to it: hypothesis is then as fast as the parsers,
# and shrinks towards the first seed and fewer changes.


class Program:
    """Numbers that were drawn, one after another; zeros at the end."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 0

    def below(self, limit: int) -> int:
        """Return the next number, from 0 to below a limit."""
        width = 1 if limit <= 256 else 3
        taken = self._content[self._position : self._position + width]
        self._position += width
        return int.from_bytes(taken, "big") * limit >> 8 * width if taken else 0

    def rest(self) -> bytes:
        """Return the bytes that were not read."""
        return self._content[self._position :]


_PROGRAM_BYTES = 40


_NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    64,
    127,
    128,
    255,
    256,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 64) - 1,
]
_NUMBER_FORMS = ["<B", "<H", ">H", "<I", ">I", "<Q", ">Q"]
_JUNK = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",  # a surrogate
    b"\xef\xbb\xbf",
    "\u202e".encode(),
    "🐈‍⬛".encode(),
    "\u2028".encode(),
    "ﬀ＜ｔ＞".encode(),
    b"\r",
    b"\n",
    b'"',
    b"'",
    b"\\",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 40,
    b"9" * 400,
    b"9" * 5000,
    b"[" * 300,
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b"A" * 70_000,
    b"../../../../etc/passwd",
    b"%s%n{0.__class__}",
    b"<|im_end|>",
]


_BYTE_CHANGES = ("flip", "set", "cut", "delete", "repeat", "insert", "number")


def _mutated(content: bytes, program: Program, words: Sequence[bytes]) -> bytes:
    kind, size = _BYTE_CHANGES[program.below(len(_BYTE_CHANGES))], len(content)
    position, first, second = program.below(size + 1), program.below(256), program.below(256)
    if kind == "flip" and position < size:
        return content[:position] + bytes([content[position] ^ (1 << first % 8)]) + content[position + 1 :]
    if kind == "set" and position < size:
        return content[:position] + bytes([first]) + content[position + 1 :]
    if kind == "cut":
        return content[:position]
    if kind == "delete":
        return content[:position] + content[position + 1 + first :]
    if kind == "repeat":
        piece = content[position : position + 1 + first]
        return content[:position] + piece * (1 + second % 9) + content[position:]
    if kind == "number":
        form = _NUMBER_FORMS[second % len(_NUMBER_FORMS)]
        width = struct.calcsize(form)
        number = struct.pack(form, _NUMBERS[first % len(_NUMBERS)] & ((1 << 8 * width) - 1))
        return content[:position] + number + content[position + width :]
    junk = [*words, *_JUNK]
    return content[:position] + junk[first % len(junk)] + content[position:]


# texts that stand in the JSON unquoted
_RAW = {
    "@raw-deep@": "[" * 5_000 + "]" * 5_000,
    "@raw-deeper@": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "@raw-digits@": "9" * 5_000,
    "@raw-large@": "1e999",
    "@raw-small@": "-1e-999",
    "@raw-float@": "1" * 400 + ".5",
    "@raw-surrogate@": '"\\ud800"',
}
_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    -0.0,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    2**64,
    10**30,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "a",
    "\0",
    "\x1b[2J",
    "\u202e",
    "🐈‍⬛",
    "x" * 300,
    "x" * 70_000,
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "con",
    "0" * 64,
    "1e5",
    "NaN",
    "9999-99-99",
    "10000-01-01T00:00:00Z",
    "data:image/png;base64,AAAA",
    "http://127.0.0.1/",
    "(a+)+$",
    "[",
    "{",
    [],
    {},
    [[]],
    [None],
    [0, 0, 0],
    [-1, 1 << 62],
    {"": {}},
    {"a": None},
    [{}] * 300,
    ["a"] * 5_000,
    {str(number): number for number in range(2_000)},
    *_RAW,
]


class Pairs(dict[str, Any]):
    """A mapping whose JSON names a key twice. extra: the second pairs."""

    def __init__(self, values: dict[str, Any], extra: list[tuple[str, Any]]) -> None:
        super().__init__(values)
        self.extra = extra

    def items(self) -> Any:
        return [*super().items(), *self.extra]


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every part of a JSON value, breadth first."""
    level = [value]
    while level:
        following = []
        for container in level:
            keys = list(container) if isinstance(container, dict) else range(len(container))
            for key in keys:
                yield container, key
                if isinstance(container[key], dict | list):
                    following.append(container[key])
        level = following


_JSON_CHANGES = ("value", "value", "value", "delete", "rename", "twice", "swap", "wrap", "add", "number")


def _mutated_json(whole: list[Any], program: Program) -> None:
    """Change the one value of a list in place."""
    kind = _JSON_CHANGES[program.below(len(_JSON_CHANGES))]
    nodes = list(_nodes(whole))
    where, which = program.below(len(nodes)), program.below(len(_VALUES))
    container, key = nodes[where]
    value = container[key]
    new = copy.deepcopy(_VALUES[which])
    if kind == "delete" and container is not whole:
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[str(new)[:400]] = container.pop(key)
    elif kind == "twice" and isinstance(value, dict) and value:
        first = next(iter(value))
        container[key] = Pairs(value, [(first, new)])
    elif kind == "swap":
        other, other_key = nodes[(where + which) % len(nodes)]
        container[key] = copy.deepcopy(other[other_key])
    elif kind == "wrap":
        container[key] = {"a": value} if which % 2 else [value]
    elif kind == "add" and isinstance(value, dict):
        value[str(new)[:400]] = new
    elif kind == "add" and isinstance(value, list):
        value.append(new)
    elif kind == "number" and isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = [value + 1, value - 1, -value, value * 2**40, 0.25][which % 5]
    else:
        container[key] = new


def json_text(value: Any, *, is_ascii: bool = True) -> bytes:
    """Return the JSON of a mutated value, unquoted texts and repeated keys included."""
    text = json.dumps(value, ensure_ascii=is_ascii)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _changed_bytes(parser: Parser, content: bytes, program: Program) -> bytes:
    for _ in range(1 + program.below(4)):
        content = _mutated(content, program, parser.words)
    return content


def _changed_json(parser: Parser, content: bytes, program: Program) -> bytes:
    whole = [json.loads(line) for line in content.splitlines()]
    is_ascii, has_bytes = program.below(2) == 0, program.below(10) == 9
    for _ in range(1 + program.below(3)):
        line = program.below(len(whole))
        one = [whole[line]]
        _mutated_json(one, program)
        whole[line] = one[0]
    content = b"\n".join(json_text(value, is_ascii=is_ascii) for value in whole)
    return _mutated(content, program, parser.words) if has_bytes else content


def _free(parser: Parser, content: bytes, program: Program) -> bytes:
    """Return an input that has the first bytes of a valid one, or none."""
    head = content[: (0, 4, 8, 16)[program.below(4)]]
    kind, words = program.below(4), [*parser.words, *_JUNK]
    if kind == 0:
        return head + program.rest()
    if kind == 1:
        letters = program.rest()
        return head + letters[len(letters) % 2 :].decode("utf-16-le", "replace").encode()
    if kind == 2:
        return head + b"".join(words[program.below(len(words))] for _ in range(1 + program.below(4)))
    return json_text(_VALUES[program.below(len(_VALUES))])


def made(parser: Parser, drawn: bytes) -> bytes:
    """Return the input that a drawn text stands for: mostly a seed with changes."""
    program = Program(drawn)
    seeds = parser.seeds()
    content, kind = seeds[program.below(len(seeds))], program.below(6)
    if kind == 5:
        return _free(parser, content, program)
    if parser.form == "json" and kind < 4:
        return _changed_json(parser, content, program)
    return _changed_bytes(parser, content, program)


def inputs(parser: Parser) -> st.SearchStrategy[bytes]:
    """Return the inputs of a parser."""
    drawn = st.binary(min_size=_PROGRAM_BYTES, max_size=_PROGRAM_BYTES)
    return drawn.map(lambda program: made(parser, program))
