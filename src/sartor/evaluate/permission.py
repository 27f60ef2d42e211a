"""Whether the licences of an Adapter's sources and base permit a use; by name of source and row, with what would help."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.errors import ConfigError
from sartor.core.licences import compliance
from sartor.core.licences.compliance import USES, Objection
from sartor.core.lineage import ancestry, origin_index
from sartor.core.lineage.origin_index import Pair


def check_use(use: str) -> None:
    """Raise ConfigError for a use that there is not, naming the one meant."""
    if use not in USES:
        meant = difflib.get_close_matches(use, USES, n=1)
        raise ConfigError(f"there is no use {use!r}; there are {', '.join(USES)}", f"--use {meant[0] if meant else USES[0]}")


def refusals(adapter: Artifact, use: str) -> tuple[list[str], str]:
    """Why the Adapter may not be released for this use, in sentences, and what would help; nothing when it may.

    A row that a second source also holds, which permits the use, is no reason: the licence that permits is the one used.
    """
    sources = compliance.made_from(adapter.manifest)
    objections = compliance.objections(sources, use)
    dataset = ancestry.find_parent(adapter, "dataset") if objections else None
    of_source: dict[str, list[Objection]] = {}
    for objection in objections:
        of_source.setdefault(objection.source, []).append(objection)
    refused: dict[str, str] = {}
    blamed = {(objection.source, objection.path) for objection in objections}
    for name, found in of_source.items():
        count, rows = _rows(sources, dataset, blamed, {(objection.source, objection.path) for objection in found})
        if count != 0:
            refused[name] = f"{name} {' and '.join(dict.fromkeys(objection.why for objection in found))}{rows}"
    clashes = compliance.conflicts(sources) if use != "internal" else []
    if not (refused or clashes):
        return [], ""
    base = adapter.manifest.get("base")
    of_base = compliance.base_source(base) if base else ""
    return [*refused.values(), *clashes], _remedy(sources, dataset, list(refused), of_base)


def _rows(
    sources: Sequence[Mapping[str, Any]], dataset: Artifact | None, blamed: set[Pair], pairs: set[Pair]
) -> tuple[int | None, str]:
    """Return how many rows (None for the base, which has none), and these and the first of them as text.

    They are from the Dataset, or where it is gone from what the manifest counted.
    """
    if all(not path for _, path in pairs):  # the base
        return None, ""
    if dataset is None:
        count = sum(source["kept"] for source in sources if (source["source"], source.get("path", "")) in pairs)
        return count, f" ({count:,} rows)"
    found = origin_index.rows_only_from(dataset, blamed, pairs)
    more = f" and {found.count - len(found.first):,} more" if found.count > len(found.first) else ""
    first = ", ".join(f"{locator} is {row[:12]}" for row, locator in found.first)
    return found.count, f" ({found.count:,} rows{': ' if first else ''}{first}{more})"


def _remedy(sources: Sequence[Mapping[str, Any]], dataset: Artifact | None, refused: Sequence[str], of_base: str) -> str:
    """Uses that would pass, else what to leave out. of_base: the name of the base among the sources."""
    uses = compliance.permitted(sources)
    said = [f"--use {' or '.join(uses)} is permitted"] if uses else []
    named = [name for name in refused if name != of_base]
    if len(named) < len(refused):
        said.append("state the licence of the base (base.licence in the tuning recipe), or tune another")
    if named:
        where = dataset.path if dataset else "DATASET"
        said.append(f"leave out {', '.join(named[:3])} and curate and tune again (sartor revoke {where} --source {named[0]})")
    return "; ".join(said)
