"""Computed checks of a draft.

They give the same result for the same draft on every machine. A check judges only what it finds: a reply without an
equation has no wrong one, unless `least` requires some.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import regex

from sartor.core.errors import ConfigError
from sartor.serving.plan_options import Arithmetic, Citations, Json, PatternCheck
from sartor.serving.plans.step_messages import is_json, read_json, schema_errors

Computed = Json | PatternCheck | Arithmetic | Citations
MOST_FINDINGS = 8
# Seconds for one regular expression on one draft; a longer search is a finding
SEARCH_S = 0.5
_DEEPEST = 40
_SIDE = r"[-+]?[\d(][\d\s.,+\-*/x×÷()]*"
_EQUATION = re.compile(rf"{_SIDE}(?:=\s*{_SIDE})+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGNS = str.maketrans({"x": "*", "×": "*", "÷": "/"})
_OPERATIONS: Mapping[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda x, y: x + y,
    ast.Sub: lambda x, y: x - y,
    ast.Mult: lambda x, y: x * y,
    ast.Div: lambda x, y: x / y,
}


def run_check(check: Computed, draft: str, request_text: str) -> list[str]:
    """Return a check's findings in a draft, at most MOST_FINDINGS sentences.

    request_text: the client's text.
    """
    if isinstance(check, Json):
        findings = schema_errors(read_json(draft), check.schema or {})
    elif isinstance(check, PatternCheck):
        findings = _by_pattern(check, draft)
    elif isinstance(check, Arithmetic):
        findings = _by_arithmetic(check, draft)
    else:
        findings = _by_citations(check, draft, request_text)
    return findings[:MOST_FINDINGS]


def _by_pattern(check: PatternCheck, draft: str) -> list[str]:
    try:
        holds = regex.search(check.pattern, draft, timeout=SEARCH_S) is not None
    except TimeoutError:
        return [f"the pattern {check.pattern!r} was searched for longer than {SEARCH_S:g} s"]
    if holds == check.holds:
        return []
    return [f"it must {'' if check.holds else 'not '}hold {check.pattern!r}"]


def _by_arithmetic(check: Arithmetic, draft: str) -> list[str]:
    problems = []
    for match in _EQUATION.finditer(draft):
        problem = _wrong_in(match[0])
        if problem is not None:
            problems.append(problem)
    findings = [problem for problem in problems if problem]
    if len(problems) < check.least:
        findings.append(f"it holds {len(problems)} equations; at least {check.least}")
    return findings


def _wrong_in(equation: str) -> str | None:
    """Return the error of an equation, "" if it is right, None if it cannot be computed.

    A date or a part number cannot be computed.
    """
    sides = [side.strip().rstrip(".,+-*/x×÷(") for side in equation.split("=")]
    values = [_value(side) for side in sides]
    has_operator = any(sign in side[1:] for side in sides for sign in "+-*/x×÷")
    if any(value is None for value in values) or not has_operator:
        return None
    first = values[0]
    assert first is not None
    for side, value in zip(sides[1:], values[1:], strict=True):
        assert value is not None
        # a side with d decimals may be rounded: |first - value| <= 0.5 * 10^-d; one without decimals must be exact
        if abs(first - value) > Fraction(1, 2 * 10 ** _decimals(side)) or (first != value and not _decimals(side)):
            computed = str(first.numerator) if first.denominator == 1 else f"{float(first):.10g}"
            return f"{sides[0]} is {computed}, not {side}"
    return ""


def _decimals(side: str) -> int:
    return len(side.rpartition(".")[2]) if re.fullmatch(r"-?[\d,]+\.\d+", side) else 0


def _value(side: str) -> Fraction | None:
    text = _THOUSANDS.sub("", side).translate(_SIGNS)
    try:
        return _computed(ast.parse(text, mode="eval").body, 0)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _computed(node: ast.AST, depth: int) -> Fraction:
    """Return the exact value of an expression of numbers, signs, brackets and the four operations.

    Raises ValueError for anything else.
    """
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _computed(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_computed(node.left, depth + 1), _computed(node.right, depth + 1))
    raise ValueError("no arithmetic")


def _by_citations(check: Citations, draft: str, request_text: str) -> list[str]:
    sources = _plain("\n".join(_text(source) for source in check.sources) if check.sources else request_text)
    sources_name = "the sources" if check.sources else "the request"
    try:
        citations = _in_fields(draft, check.fields) if check.fields else _in_text(draft, check.pattern)
    except ValueError as error:
        return [str(error)]
    findings = []
    for citation in citations:
        # whole words: `hall` is not in `shall`
        if not re.search(rf"(?<!\w){re.escape(_plain(citation))}(?!\w)", sources):
            findings.append(f"{citation[:200]!r} is not in {sources_name}")
    if len(citations) < check.least:
        findings.append(f"it cites {len(citations)} times; at least {check.least}")
    return findings


def _in_fields(draft: str, fields: Sequence[str]) -> list[str]:
    value = read_json(draft)
    if not isinstance(value, dict) or not is_json(value):
        raise ValueError("it is no JSON object")
    texts = []
    for name in fields:
        texts += [str(item) for item in _values(value.get(name))]
    return [text for text in texts if text.strip()]


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _values(item)
    elif value is not None and not isinstance(value, dict):
        yield value


def _in_text(draft: str, pattern: str) -> list[str]:
    try:
        matches = list(regex.finditer(pattern, draft, timeout=SEARCH_S))
    except TimeoutError:
        raise ValueError(f"the pattern {pattern!r} was searched for longer than {SEARCH_S:g} s") from None
    citations = []
    for match in matches:
        citation = next(filter(None, match.groups()), match[0])
        if citation.strip():
            citations.append(citation)
    return citations


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


@functools.lru_cache(maxsize=64)
def _text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{source} cannot be read to cite from: {error}",
            f"ls -l {source}; of another encoding: iconv -f CP1252 -t UTF-8 {source} > SOURCE.txt",
        ) from None
