"""Parses SPDX licence expressions.

An expression is turned into its alternatives: each is a set of licences that hold together (AND), and one alternative
may be chosen (OR). `checked` is for what a person writes now, and strict; `alternatives` is for what stands in
manifests and model cards, and takes anything.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Any

from sartor.core.errors import ConfigError

UNKNOWN = "NOASSERTION"  # SPDX's word for a licence that nobody stated
NOBODY = "NONE"  # and its word for one that was never given
OWN = "LicenseRef-own"  # what `own` stands for: rows that are yours
_REF = re.compile(r"(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+$")
# An expression is a line in a recipe. More ways to choose than these are a mistake, or an attack on whoever multiplies
# them.
MOST_CHARACTERS, MOST_ALTERNATIVES = 1000, 64

Alternatives = tuple[frozenset[str], ...]


def checked(expression: str) -> str:
    """The expression as SPDX spells it (`mit or gpl-2.0+` is `MIT OR GPL-2.0-or-later`).

    Raises ConfigError for what is no SPDX expression, naming the known id that is nearest.
    """
    if expression.strip().lower() == "own":
        return OWN
    if expression.strip().upper() in ("", UNKNOWN, NOBODY):
        return expression.strip().upper() or UNKNOWN
    if len(expression) > MOST_CHARACTERS:
        raise ConfigError(
            f"the licence has {len(expression):,} characters, above {MOST_CHARACTERS:,}", "licence: CC-BY-4.0"
        )
    tree = _parse(expression)
    if tree is None:
        raise ConfigError(
            f"the licence {expression[:60]!r} is no SPDX expression", "licence: MIT AND (CC-BY-4.0 OR CC0-1.0)"
        )
    for symbol in tree.symbols:
        for part in symbol.decompose():
            if part.key not in (UNKNOWN, NOBODY, *categories()) and not _REF.match(part.key):
                raise _unknown(part.key)
        _check_with(symbol)
    if _alternatives(tree) is None:
        raise ConfigError(
            f"the licence {expression[:60]!r} has more than {MOST_ALTERNATIVES} alternatives",
            "licence: MIT OR Apache-2.0, with those alternatives alone that you use",
        )
    return str(tree)


def _check_with(symbol: Any) -> None:
    exception = getattr(symbol, "exception_symbol", None)
    if exception is None and symbol.is_exception:
        raise ConfigError(
            f"{symbol.key} is an exception to a licence, no licence", f"licence: GPL-2.0-only WITH {symbol.key}"
        )
    if exception is not None and not (exception.is_exception and not symbol.license_symbol.is_exception):
        raise ConfigError(
            f"in {str(symbol)!r} the word after WITH is no exception", f"licence: {symbol.license_symbol.key}"
        )


def _unknown(key: str) -> ConfigError:
    lowered = {name.lower(): name for name in categories() if "exception" not in name}
    matches = difflib.get_close_matches(key.lower().replace(" ", "-"), lowered, n=1, cutoff=0.6)
    suggestion = lowered[matches[0]] if matches else ""
    text = f"; {suggestion!r} was probably meant" if suggestion else ""
    licence_ref = "LicenseRef-" + _slug(key)
    return ConfigError(
        f"{key!r} is no licence that SPDX lists{text}",
        f"licence: {suggestion or licence_ref}; {licence_ref} for terms of your own",
    )


@cache
def _licensing() -> Any:
    # 20 ms, so not at the head of the module: `sartor --help` needs no licence. LicenseRef ids belong to whoever
    # writes them; the index has aliases of that form (LicenseRef-Apache), which would answer for somebody else's
    # licence.
    import license_expression as spdx

    symbols = []
    for entry in spdx.get_license_index():
        key, others = entry.get("spdx_license_key") or "", entry.get("other_spdx_license_keys", [])
        if key and not key.startswith("LicenseRef-"):
            aliases = tuple(alias for alias in others if not alias.startswith("LicenseRef-"))
            symbols.append((spdx.LicenseSymbol(key, aliases, is_exception=entry["is_exception"]), entry["category"]))
    return spdx.Licensing([symbol for symbol, _ in symbols]), {symbol.key: category for symbol, category in symbols}


def categories() -> dict[str, str]:
    """The ids that SPDX lists, licences and exceptions, with the category in which ScanCode's index files each."""
    result: dict[str, str] = _licensing()[1]
    return result


def _parse(expression: str) -> Any:
    """The tree of an expression; None where it does not parse."""
    licensing = _licensing()[0]
    try:
        return licensing.parse(expression)
    except RecursionError:  # brackets in brackets
        return None
    except Exception:  # the library raises four unrelated kinds, and bare Exception for some input
        return None


@cache
def alternatives(expression: str) -> Alternatives:
    """The sets of licences of which one may be chosen. What does not parse is one licence of unknown terms."""
    tree = _parse(expression) if expression and len(expression) <= MOST_CHARACTERS else None
    branches = _alternatives(tree) if tree is not None else None
    return branches or (frozenset({_as_ref(expression or UNKNOWN)}),)


def _alternatives(tree: Any) -> Alternatives | None:
    """None where there are more than MOST_ALTERNATIVES."""
    if tree.isliteral:
        return (frozenset({_as_ref(str(tree))}),)
    parts = [_alternatives(part) for part in tree.args]
    if any(part is None for part in parts):
        return None
    operands = [part for part in parts if part is not None]
    if " OR " in tree.operator:
        branches = [item for part in operands for item in part]
    else:
        branches = [frozenset()]
        for part in operands:
            branches = [branch | extra for branch in branches for extra in part]
            if len(branches) > MOST_ALTERNATIVES:
                return None
    unique = dict.fromkeys(branches)
    smallest = tuple(branch for branch in unique if not any(extra < branch for extra in unique))
    return smallest if len(smallest) <= MOST_ALTERNATIVES else None


def _as_ref(licence: str) -> str:
    """A model card's `llama3` as SPDX would have it: LicenseRef-llama3."""
    base = without_exception(licence)
    if base in (UNKNOWN, NOBODY) or base in categories() or _REF.match(base):
        return licence
    return f"LicenseRef-{_slug(licence)}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:60] or "unnamed"


def without_exception(licence: str) -> str:
    """`GPL-2.0-only` of `GPL-2.0-only WITH Classpath-exception-2.0`."""
    return licence.split(" WITH ")[0]
