"""Parser of SPDX licence expressions.

An expression is converted to its alternatives: each is a set of licences that apply together (AND), and one
alternative may be chosen (OR). `checked` is strict, for licences that a person writes now. `alternatives` accepts
anything, for licences in manifests and model cards.
"""

from __future__ import annotations

import difflib
import itertools
import re
from functools import cache
from typing import Any

from sartor.core.errors import ConfigError

UNKNOWN = "NOASSERTION"  # SPDX's word for a licence that is not stated
NOBODY = "NONE"  # SPDX's word for the absence of a licence
OWN = "LicenseRef-own"  # meaning of `own`: rows that belong to the user
_REF = re.compile(r"(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+$")
# An expression is one line of a recipe. More alternatives than these are a mistake, or an attack on the code that
# expands them.
MOST_CHARACTERS, MOST_ALTERNATIVES = 1000, 64

Alternatives = tuple[frozenset[str], ...]


def checked(expression: str) -> str:
    """Return the expression in SPDX spelling (`mit or gpl-2.0+` becomes `MIT OR GPL-2.0-or-later`).

    Raises ConfigError for an invalid expression, naming the closest known id.
    """
    if expression.strip().lower() == "own":
        return OWN
    if expression.strip().upper() in ("", UNKNOWN, NOBODY):
        return expression.strip().upper() or UNKNOWN
    if len(expression) > MOST_CHARACTERS:
        raise ConfigError(
            f"the licence has {len(expression):,} characters, above {MOST_CHARACTERS:,}",
            "give a short expression, as CC-BY-4.0",
        )
    tree = _parse(expression)
    if tree is None:
        raise ConfigError(
            f"the licence {expression[:60]!r} is no SPDX expression",
            "give one, as MIT AND (CC-BY-4.0 OR CC0-1.0)",
        )
    for symbol in tree.symbols:
        for part in symbol.decompose():
            if part.key not in (UNKNOWN, NOBODY, *categories()) and not _REF.match(part.key):
                raise _unknown(part.key)
        _check_with(symbol)
    if _alternatives(tree) is None:
        raise ConfigError(
            f"the licence {expression[:60]!r} has more than {MOST_ALTERNATIVES} alternatives",
            "give those alternatives alone that you use, as MIT OR Apache-2.0",
        )
    return str(tree)


def _check_with(symbol: Any) -> None:
    exception = getattr(symbol, "exception_symbol", None)
    if exception is None and symbol.is_exception:
        raise ConfigError(
            f"{symbol.key} is an exception to a licence, no licence", f"give GPL-2.0-only WITH {symbol.key}"
        )
    if exception is not None and not (exception.is_exception and not symbol.license_symbol.is_exception):
        raise ConfigError(
            f"in {str(symbol)!r} the word after WITH is no exception", f"give {symbol.license_symbol.key}"
        )


def _unknown(key: str) -> ConfigError:
    lowered = {name.lower(): name for name in categories() if "exception" not in name}
    matches = difflib.get_close_matches(key.lower().replace(" ", "-"), lowered, n=1, cutoff=0.7)
    suggestion = lowered[matches[0]] if matches else ""
    text = f"; {suggestion!r} was probably meant" if suggestion else ""
    licence_ref = "LicenseRef-" + _slug(key)
    listed = f"{suggestion}; or " if suggestion else ""
    return ConfigError(
        f"{key!r} is no licence that SPDX lists{text}",
        f"give {listed}own, for rows that are yours; or {licence_ref}, for terms of another",
    )


@cache
def _licensing() -> Any:
    # The import takes 20 ms, so it is not at module level: `sartor --help` needs no licence. LicenseRef ids are
    # user-defined; the index has aliases of that form (LicenseRef-Apache), which could match another user's licence.
    import license_expression as spdx

    symbols = []
    for entry in spdx.get_license_index():
        key, others = entry.get("spdx_license_key") or "", entry.get("other_spdx_license_keys", [])
        if key and not key.startswith("LicenseRef-"):
            aliases = tuple(alias for alias in others if not alias.startswith("LicenseRef-"))
            symbols.append((spdx.LicenseSymbol(key, aliases, is_exception=entry["is_exception"]), entry["category"]))
    return spdx.Licensing([symbol for symbol, _ in symbols]), {symbol.key: category for symbol, category in symbols}


def categories() -> dict[str, str]:
    """Return {SPDX id: category in ScanCode's index} of all licences and exceptions."""
    result: dict[str, str] = _licensing()[1]
    return result


def _parse(expression: str) -> Any:
    """Return the tree of an expression, or None if it does not parse."""
    licensing = _licensing()[0]
    try:
        return licensing.parse(expression)
    except RecursionError:  # deeply nested brackets
        return None
    except Exception:  # the library raises four unrelated types, and a plain Exception for some input
        return None


@cache
def alternatives(expression: str) -> Alternatives:
    """Return the sets of licences of which one may be chosen.

    An expression that does not parse becomes one licence of unknown terms.
    """
    tree = _parse(expression) if expression and len(expression) <= MOST_CHARACTERS else None
    branches = _alternatives(tree) if tree is not None else None
    return branches or (frozenset({_as_ref(expression or UNKNOWN)}),)


def _alternatives(tree: Any) -> Alternatives | None:
    """Return the alternatives of a tree, or None if there are more than MOST_ALTERNATIVES."""
    if tree.isliteral:
        return (frozenset({_as_ref(str(tree))}),)
    parts = [_alternatives(part) for part in tree.args]
    if any(part is None for part in parts):
        return None
    operands = [part for part in parts if part is not None]
    if " OR " in tree.operator:
        branches = list(itertools.chain.from_iterable(operands))
    else:
        branches = [frozenset()]
        for part in operands:
            branches = [branch | extra for branch, extra in itertools.product(branches, part)]
            if len(branches) > MOST_ALTERNATIVES:
                return None
    unique = dict.fromkeys(branches)
    smallest = []
    for branch in unique:
        if not any(other < branch for other in unique):
            smallest.append(branch)
    return tuple(smallest) if len(smallest) <= MOST_ALTERNATIVES else None


def _as_ref(licence: str) -> str:
    """Return the SPDX form of an unlisted name: `llama3` of a model card becomes LicenseRef-llama3."""
    base = without_exception(licence)
    if base in (UNKNOWN, NOBODY) or base in categories() or _REF.match(base):
        return licence
    return f"LicenseRef-{_slug(licence)}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:60] or "unnamed"


def without_exception(licence: str) -> str:
    """Return the licence without its exception: `GPL-2.0-only WITH Classpath-exception-2.0` becomes `GPL-2.0-only`."""
    return licence.split(" WITH ")[0]
