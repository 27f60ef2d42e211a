"""Combines licences; reports objections, conflicts and obligations.

`spdx.py` reads expressions into alternatives; what licences permit stands in `licence_families.py`; a source may state
further terms of its own. Everything here reads the `sources` of a manifest.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

from sartor.core.licences.licence_families import (
    CLASHES,
    DUTIES,
    NOTHING,
    UNKNOWN_TERMS,
    LicenceFamily,
    Obligation,
    accepts,
    family_of,
    targets,
)
from sartor.core.licences.spdx import MOST_ALTERNATIVES, UNKNOWN, alternatives, categories, without_exception

Use = Literal["commercial", "non-commercial", "research", "internal"]
Consent = Literal["", "given", "pending", "withdrawn", "not-needed"]
USES: tuple[Use, ...] = get_args(Use)
# A use that a source is declared for covers what asks for less. Work inside a firm is commercial, so only that covers
# it.
_COVERS: dict[str, tuple[str, ...]] = {
    "commercial": USES,
    "non-commercial": ("non-commercial", "research"),
    "research": ("research",),
    "internal": ("internal",),
}
_COMMERCIAL = ("commercial", "internal")


@dataclass(frozen=True)
class LicenceTerms:
    """What a source states of itself: its licence, and what its owner adds. `expires` is the last day of use, ISO."""

    source: str = "?"
    path: str = ""
    licence: str = UNKNOWN
    use: tuple[str, ...] = ()
    share_alike: bool = False
    non_commercial: bool = False
    expires: str = ""
    consent: str = ""


@dataclass(frozen=True)
class Objection:
    """Why one source does not permit a use: `str()` is the sentence. `path` is the file of the source, where one is
    known.
    """

    source: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source} {self.reason}"


def terms_of(source: Mapping[str, Any]) -> LicenceTerms:
    """The terms in an entry of a manifest's `sources`. What an older manifest lacks has its default."""
    values = {field.name: source[field.name] for field in fields(LicenceTerms) if source.get(field.name) is not None}
    return LicenceTerms(**{**values, "licence": values.get("licence") or UNKNOWN, "use": tuple(values.get("use", ()))})


def _family(licence: str) -> LicenceFamily:
    base = without_exception(licence)
    return family_of(base, categories().get(base, ""))


def rank(expression: str) -> float:
    """How much an expression permits, 1 (everything) to 0 (nothing): of AND the strictest part, of OR the best
    branch.
    """
    return max(min(_family(licence).rank for licence in item) for item in alternatives(expression))


def combine(licences: Iterable[str]) -> str:
    """The SPDX expression that holds for a thing made from all of these: their conjunction, sorted, each OR decided.

    Of an OR the branch is taken that permits most, and before that the one that contradicts nothing else.

    >>> combine(["MIT OR CC-BY-NC-4.0", "CC-BY-4.0", "MIT"])
    'CC-BY-4.0 AND MIT'
    """
    chosen = _choose(licence or UNKNOWN for licence in licences)
    return " AND ".join(sorted(frozenset().union(*chosen.values()))) or UNKNOWN


def _choose(expressions: Iterable[str]) -> dict[str, frozenset[str]]:
    """Each expression's alternative, chosen together while there are few ways to; else each by its own rank."""
    choices = {
        expression: sorted(alternatives(expression), key=_preference) for expression in sorted(set(expressions))
    }
    combinations = 1
    for branches in choices.values():
        combinations *= len(branches)
    if combinations > MOST_ALTERNATIVES * 8:
        return {expression: branches[0] for expression, branches in choices.items()}

    def cost(combination: tuple[frozenset[str], ...]) -> tuple[int, tuple[float, ...]]:
        licences = frozenset().union(*combination)
        return len(_clashes(licences)), tuple(sorted(_family(licence).rank * -1 for licence in licences))[::-1]

    best = min(itertools.product(*choices.values()), key=cost, default=())
    return dict(zip(choices, best, strict=True))


def _preference(branch: frozenset[str]) -> tuple[float, int, list[str]]:
    return -min(_family(licence).rank for licence in branch), len(branch), sorted(branch)


def made_from(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What an artefact was made from: sources of which a row was kept, and the base, where there is one, as one
    more.
    """
    sources = [source for source in manifest.get("sources", []) if source.get("kept", 1)]
    base = manifest.get("base")
    if not base:
        return sources
    return [*sources, {"source": base_source(base), "licence": base["licence"], "use": base.get("use", ())}]


_BASE = "base "


def base_source(base: Mapping[str, Any]) -> str:
    """Return the name under which a base stands among the sources."""
    return f"{_BASE}{base['name']}"


def name_objection(sources: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return why a derived work may not go out under a name; empty where it may."""
    demanding = sorted(
        {
            f"{licence} of {terms.source}"
            for terms in map(terms_of, sources)
            for licence in _choose([terms.licence])[terms.licence]
            if "llama-name" in _family(licence).duties
        }
    )
    if not demanding or name.lower().startswith("llama"):
        return ""
    return f"{_names(demanding)} demands a name that begins with 'Llama', and {name!r} does not"


def objections(sources: Sequence[Mapping[str, Any]], use: str = "commercial", today: str = "") -> list[Objection]:
    """Why these sources do not permit a use; empty when they do. `today` (ISO) is the clock's unless given."""
    today = today or datetime.datetime.now(datetime.UTC).date().isoformat()
    findings = []
    bases = {
        _family(licence).name
        for terms in map(terms_of, sources)
        if terms.source.startswith(_BASE)
        for branch in alternatives(terms.licence)
        for licence in branch
    }
    for source in sources:
        terms = terms_of(source)
        branches = [
            [reason for licence in sorted(branch) for reason in _objections_to(licence, use, terms, bases)]
            for branch in sorted(alternatives(terms.licence), key=_preference)
        ]
        reasons = min(branches, key=len) + _objections_of(terms, use, today)
        findings += [Objection(terms.source, terms.path, reason) for reason in reasons]
    return list(dict.fromkeys(findings))


def _objections_to(licence: str, use: str, terms: LicenceTerms, bases: Collection[str] = ()) -> list[str]:
    """bases: families of the licences of what is tuned: a model's outputs may improve models of its own family."""
    family = _family(licence)
    if family is NOTHING:
        return ["states no licence" if licence == UNKNOWN else "is licensed to nobody (NONE)"]
    if family is UNKNOWN_TERMS:
        # the owner's declaration is all that there is to go by; _objections_of holds `use` against it
        return [] if terms.use else [f"is {licence}, whose terms Sartor does not know, and declares no `use`"]
    result = []
    if family.outputs == "no" and not terms.source.startswith(_BASE) and family.name not in bases:
        result.append(f"is {licence}: what such a model says may improve no other model")
    if family.condition and use in _COMMERCIAL and not any(use in _COVERS.get(declared, ()) for declared in terms.use):
        result.append(
            f"is {licence}: {family.condition}; whether that holds is for you to state by `use: [commercial]`"
        )
    if not family.commercial and use in _COMMERCIAL:
        result.append(
            f"is {licence}, which forbids commercial use"
            + (" (as work inside a firm is)" if use == "internal" else "")
        )
    if family.derived == "no" or (family.derived == "kept" and use != "internal"):
        result.append(
            f"is {licence}, which forbids derived works" + (" that are handed out" if family.derived == "kept" else "")
        )
    return result


def _objections_of(terms: LicenceTerms, use: str, today: str) -> list[str]:
    """What the owner's own terms forbid, whatever the licence says."""
    result = []
    if terms.use and not any(use in _COVERS.get(declared, ()) for declared in terms.use):
        result.append(f"is declared for {' and '.join(terms.use)} use")
    if terms.non_commercial and use in _COMMERCIAL:
        result.append("has terms of its own that forbid commercial use")
    if terms.expires and terms.expires < today:
        result.append(f"may not be used after {terms.expires}; today is {today}")
    if terms.consent in ("withdrawn", "pending"):
        state = "has been withdrawn" if terms.consent == "withdrawn" else "is pending"
        result.append(f"needs a consent that {state}")
    return result


def permitted(sources: Sequence[Mapping[str, Any]]) -> list[Use]:
    """The uses that neither a licence nor a contradiction between licences forbids."""
    clash = bool(conflicts(sources))
    return [use for use in USES if not objections(sources, use) and not (clash and use != "internal")]


def conflicts(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where no licence of a derived work could satisfy two of these sources at once, in sentences that name them."""
    all_terms = [terms_of(source) for source in sources]
    chosen = _choose(terms.licence for terms in all_terms)
    sources_of: dict[str, list[str]] = {}
    for terms in all_terms:
        for licence in chosen[terms.licence]:
            sources_of.setdefault(licence, []).append(terms.source)
    clashes = _clashes(frozenset(sources_of))
    sentences = [
        sentence.format(a=f"{first} of {_names(sources_of[first])}", b=f"{second} of {_names(sources_of[second])}")
        for first, second, sentence in clashes
    ]
    return sentences + _conflicts_of_terms(all_terms, chosen)


def _conflicts_of_terms(all_terms: Sequence[LicenceTerms], chosen: Mapping[str, frozenset[str]]) -> list[str]:
    """Contradictions that terms which an owner adds bring about; those of two licences are `_clashes`."""
    demands: dict[str, list[str]] = {}
    limits: dict[str, list[str]] = {}
    owner_demanded, free = set(), set()
    for terms in all_terms:
        if terms.non_commercial:
            limits.setdefault("the terms", []).append(terms.source)
        for licence in chosen[terms.licence]:
            family = _family(licence)
            if not family.commercial:
                limits.setdefault(licence, []).append(terms.source)
            if family.demands_own_terms or terms.share_alike:
                demands.setdefault(licence, []).append(terms.source)
                owner_demanded |= set() if family.demands_own_terms else {licence}
                # an owner whose own terms are share-alike and non-commercial at once does not contradict himself
                free |= (
                    {licence}
                    if family.commercial and (family.demands_own_terms or not terms.non_commercial)
                    else set()
                )
    labels = {licence: f"{licence} of {_names(names)}" for licence, names in (demands | limits).items()}
    pairs = itertools.combinations(sorted(demands), 2)
    demanding_pairs = [
        (first, second)
        for first, second in pairs
        if {first, second} & owner_demanded and not _common_target([first, second])
    ]
    strict = [
        (licence, limit)
        for licence in sorted(free)
        for limit in sorted(limits)
        if licence in owner_demanded or limit == "the terms"
    ]
    return [_EACH.format(a=labels[first], b=labels[second]) for first, second in demanding_pairs] + [
        _LIMITS.format(a=labels[licence], b=labels[limit]) for licence, limit in strict
    ]


_EACH = "{a} and {b} each demand that a derived work carries its own terms"
_LIMITS = (
    "{a} demands that a derived work carries its terms and no stricter ones, against {b}, which forbid commercial use"
)


@cache
def _clashes(licences: frozenset[str]) -> list[tuple[str, str, str]]:
    """Pairs of licences that one derived work cannot satisfy, each with its sentence."""
    result = []
    for first, second in itertools.combinations(sorted(licences), 2):
        pair = frozenset({without_exception(first), without_exception(second)})
        strict, limit = sorted((first, second), key=lambda licence: _family(licence).commercial, reverse=True)
        if pair in CLASHES:
            result.append((first, second, f"{{a}} and {{b}}: {CLASHES[pair]}"))
        elif _family(first).demands_own_terms and _family(second).demands_own_terms:
            if not _common_target([first, second]):
                result.append((first, second, _EACH))
        elif _family(strict).demands_own_terms and _family(strict).commercial and not _family(limit).commercial:
            result.append((strict, limit, _LIMITS))
    return result


def _common_target(licences: Sequence[str]) -> bool:
    """Whether one licence satisfies every one of these share-alike ones."""
    bases = [without_exception(licence) for licence in licences]
    return any(all(accepts(licence, target) for licence in bases) for base in bases for target in targets(base))


def duties_by_licence(sources: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Obligation, ...]]:
    """Each licence that these sources are used under, and its duties."""
    all_terms = [terms_of(source) for source in sources]
    chosen = _choose(terms.licence for terms in all_terms)
    licences = sorted({licence for terms in all_terms for licence in chosen[terms.licence]})
    return {licence: _family(licence).duties for licence in licences}


def obligations(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """What whoever hands the derived work out has to do, by licence and source."""
    all_terms = [terms_of(source) for source in sources]
    chosen = _choose(terms.licence for terms in all_terms)
    sources_by_duty: dict[tuple[str, str], list[str]] = {}
    for terms in all_terms:
        for licence in sorted(chosen[terms.licence]):
            duties = {*_family(licence).duties, *(("share-alike",) if terms.share_alike else ())}
            for duty, text in DUTIES.items():
                if duty in duties:
                    sources_by_duty.setdefault((licence, text), []).append(terms.source)
        if terms.expires:
            sources_by_duty.setdefault(("terms", f"no use after {terms.expires}"), []).append(terms.source)
    return [f"{licence} of {_names(names)}: {text}" for (licence, text), names in sorted(sources_by_duty.items())]


def _names(sources: Sequence[str]) -> str:
    """The sources that a sentence names: three of them, and how many more."""
    unique = list(dict.fromkeys(sources))
    suffix = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return ", ".join(unique[:3]) + suffix
