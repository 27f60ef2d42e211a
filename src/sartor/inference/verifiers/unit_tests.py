"""Verifier `unit_tests`."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sartor.core.config import option
from sartor.inference.verifiers.limited_child import ChildResult
from sartor.inference.verifiers.limited_scoring import Network, check_time, score_in_child
from sartor.inference.verifiers.submission import Submission

# a block of any language, with what its opening fence says
_FENCED = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = ("", "python", "py", "python3", "py3")


@dataclass(frozen=True)
class UnitTestsVerifier:
    """Fraction of asserts that hold after a reply's Python code, in a limited process without a network.

    The asserts are those at the top level of the reference reply's code; the rest of it is a right solution.
    """

    time_s: float = option(10.0, "seconds for one reply's code and asserts, after which it is killed and gets 0")
    network: Network = option(
        "none", "none: refused where the system cannot take it away; allowed: the code may use it"
    )
    kind: Literal["unit_tests"] = "unit_tests"

    def __post_init__(self) -> None:
        check_time(self.time_s)

    def missing(self, row: Submission) -> str:
        """Return that the reference is no Python code with asserts, if so."""
        return "" if asserts_of(row.reference)[1] else "Python code with asserts at its top level as its reply"

    def right_reply(self, row: Submission) -> str:
        """Return the reference's code without its asserts."""
        return asserts_of(row.reference)[0]

    def rewards(self, submissions: Sequence[Submission]) -> list[float]:
        """Return the fractions of asserts that hold. Raises what `score_in_child` raises."""
        return self._result(submissions).rewards

    def failure(self, submission: Submission) -> str:
        """Return why a reply has less than the full reward; empty if it has it. Raises as `rewards`."""
        return self._result([submission]).detail

    def _result(self, submissions: Sequence[Submission]) -> ChildResult:
        items = [
            {"code": code_of(each.reply), "tests": asserts_of(each.reference)[1] or ["assert False"]}
            for each in submissions
        ]
        return score_in_child(
            {"items": items}, submissions, name="unit_tests", time_s=self.time_s, network=self.network
        )


def code_of(text: str) -> str:
    r"""Return the fenced Python code of a text, joined; the whole text if none is fenced.

    >>> code_of("So:\n```bash\nls\n```\n```Python\nx = 1\n```\nDone.")
    'x = 1\n'
    """
    blocks = _FENCED.findall(text.replace("\r\n", "\n"))
    return "\n".join(code for tag, code in blocks if tag.strip().lower() in _PYTHON) or text


def asserts_of(text: str) -> tuple[str, list[str]]:
    r"""Return the code of a text without its top-level asserts, and the asserts; none if it is no Python.

    >>> asserts_of("x = 1\nassert x == 1")
    ('x = 1', ['assert x == 1'])
    """
    code = code_of(text)
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code, []
    tests = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assert)]
    tree.body = [node for node in tree.body if not isinstance(node, ast.Assert)]
    return ast.unparse(tree), tests
