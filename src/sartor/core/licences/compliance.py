"""Combination of licences, with objections, conflicts and obligations.

`spdx.py` parses expressions into alternatives, `licence_families.py` states what licences permit, and a source may add
terms of its own. All functions here read the `sources` of a manifest.
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
# A declared use covers less demanding uses. Internal use in a company is commercial, so only `commercial` covers it.
_COVERS: dict[str, tuple[str, ...]] = {
    "commercial": USES,
    "non-commercial": ("non-commercial", "research"),
    "research": ("research",),
    "internal": ("internal",),
}
_COMMERCIAL = ("commercial", "internal")


@dataclass(frozen=True)
class LicenceTerms:
    """Terms that a source states: its licence, and its owner's additions.

    expires: last day of use, ISO date.
    """

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
    """Reason why one source does not permit a use; `str()` is the sentence.

    path: file of the source; empty if unknown.
    """

    source: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source} {self.reason}"


def terms_of(source: Mapping[str, Any]) -> LicenceTerms:
    """Return the terms in an entry of a manifest's `sources`; keys missing in older manifests get their defaults."""
    values = {field.name: source[field.name] for field in fields(LicenceTerms) if source.get(field.name) is not None}
    values["licence"] = values.get("licence") or UNKNOWN
    values["use"] = tuple(values.get("use", ()))
    return LicenceTerms(**values)


def _family(licence: str) -> LicenceFamily:
    base = without_exception(licence)
    return family_of(base, categories().get(base, ""))


def rank(expression: str) -> float:
    """Return how much an expression permits, from 1 (everything) to 0 (nothing).

    It is the maximum over the OR alternatives of the minimum over their AND parts.
    """
    result = 0.0
    for branch in alternatives(expression):
        result = max(result, min(_family(licence).rank for licence in branch))
    return result


def combine(licences: Iterable[str]) -> str:
    """Return the SPDX expression for a work made from all of these: their conjunction, sorted, each OR decided.

    Of each OR the alternative without conflicts with the others is preferred, then the one that permits most.

    >>> combine(["MIT OR CC-BY-NC-4.0", "CC-BY-4.0", "MIT"])
    'CC-BY-4.0 AND MIT'
    """
    chosen = _choose(licence or UNKNOWN for licence in licences)
    return " AND ".join(sorted(frozenset().union(*chosen.values()))) or UNKNOWN


def _choose(expressions: Iterable[str]) -> dict[str, frozenset[str]]:
    """Choose an alternative of each expression, minimising conflicts, then restrictions.

    The choice is joint while there are at most 8 * MOST_ALTERNATIVES combinations; otherwise each expression is
    decided by its own rank.
    """
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
    """Return the sources of which a row was kept, and the base as one more source if there is one."""
    sources = [source for source in manifest.get("sources", []) if source.get("kept", 1)]
    base = manifest.get("base")
    if not base:
        return sources
    return [*sources, {"source": base_source(base), "licence": base["licence"], "use": base.get("use", ())}]


_BASE = "base "


def base_source(base: Mapping[str, Any]) -> str:
    """Return the name of a base among the sources."""
    return f"{_BASE}{base['name']}"


def name_objection(sources: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return why a derived work may not be published under a name; empty if it may."""
    demanding = set()
    for terms in map(terms_of, sources):
        for licence in _choose([terms.licence])[terms.licence]:
            if "llama-name" in _family(licence).duties:
                demanding.add(f"{licence} of {terms.source}")
    if not demanding or name.lower().startswith("llama"):
        return ""
    return f"{_names(sorted(demanding))} demands a name that begins with 'Llama', and {name!r} does not"


def objections(sources: Sequence[Mapping[str, Any]], use: str = "commercial", today: str = "") -> list[Objection]:
    """Return the reasons why these sources do not permit a use; empty if they do.

    today: ISO date; by default the clock's.
    """
    today = today or datetime.datetime.now(datetime.UTC).date().isoformat()
    findings = []
    all_terms = [terms_of(source) for source in sources]
    bases = set()  # licence families of the tuned model
    for terms in all_terms:
        if terms.source.startswith(_BASE):
            licences = frozenset().union(*alternatives(terms.licence))
            bases |= {_family(licence).name for licence in licences}
    for terms in all_terms:
        reasons_by_branch = []
        for branch in sorted(alternatives(terms.licence), key=_preference):
            reasons: list[str] = []
            for licence in sorted(branch):
                reasons += _objections_to(licence, use, terms, bases)
            reasons_by_branch.append(reasons)
        reasons = min(reasons_by_branch, key=len) + _objections_of(terms, use, today)
        findings += [Objection(terms.source, terms.path, reason) for reason in reasons]
    return list(dict.fromkeys(findings))


def redistribution_objections(sources: Sequence[Mapping[str, Any]], today: str = "") -> list[Objection]:
    """Return the reasons why rows of these sources may not be handed on to anybody; empty if they may.

    What nobody may use for research, the least demanding use outside of a firm, is not handed on. Neither are rows
    under terms that Sartor does not know, whatever `use` is declared: a use is no right to hand on.
    """
    findings = objections(sources, "research", today)
    for terms in map(terms_of, sources):
        unknown = min(
            (
                [licence for licence in sorted(branch) if _family(licence) is UNKNOWN_TERMS]
                for branch in alternatives(terms.licence)
            ),
            key=len,
        )
        if unknown and not any(objection.source == terms.source for objection in findings):
            reason = f"is {unknown[0]}, whose terms Sartor does not know: they may not permit to hand rows on"
            findings.append(Objection(terms.source, terms.path, reason))
    return list(dict.fromkeys(findings))


def _objections_to(licence: str, use: str, terms: LicenceTerms, bases: Collection[str] = ()) -> list[str]:
    """Return the objections of one licence to a use.

    bases: licence families of the tuned model: a model's outputs may improve models of its own family.
    """
    family = _family(licence)
    if family is NOTHING:
        return ["states no licence" if licence == UNKNOWN else "is licensed to nobody (NONE)"]
    if family is UNKNOWN_TERMS:
        # only the owner's declaration is available; _objections_of compares `use` with it
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
    """Return the objections of the owner's own terms, independent of the licence."""
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
    """Return the uses that neither a licence nor a conflict between licences forbids."""
    clash = bool(conflicts(sources))
    return [use for use in USES if not objections(sources, use) and not (clash and use != "internal")]


def conflicts(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on pairs of sources that no licence of a derived work can satisfy together."""
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
    """Return the conflicts caused by terms that an owner adds; `_clashes` finds those of two licences."""
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
                if not family.demands_own_terms:
                    owner_demanded.add(licence)
                # own terms that are both share-alike and non-commercial do not contradict each other
                if family.commercial and (family.demands_own_terms or not terms.non_commercial):
                    free.add(licence)
    labels = {licence: f"{licence} of {_names(names)}" for licence, names in (demands | limits).items()}
    pairs = itertools.combinations(sorted(demands), 2)
    demanding_pairs = [
        (first, second)
        for first, second in pairs
        if {first, second} & owner_demanded and not _common_target([first, second])
    ]
    strict = []
    for licence, limit in itertools.product(sorted(free), sorted(limits)):
        if licence in owner_demanded or limit == "the terms":
            strict.append((licence, limit))
    return [_EACH.format(a=labels[first], b=labels[second]) for first, second in demanding_pairs] + [
        _LIMITS.format(a=labels[licence], b=labels[limit]) for licence, limit in strict
    ]


_EACH = "{a} and {b} each demand that a derived work carries its own terms"
_LIMITS = (
    "{a} demands that a derived work carries its terms and no stricter ones, against {b}, which forbid commercial use"
)


@cache
def _clashes(licences: frozenset[str]) -> list[tuple[str, str, str]]:
    """Return (licence, licence, sentence) of each pair that one derived work cannot satisfy."""
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
    """Return whether one licence satisfies all of these share-alike ones."""
    bases = [without_exception(licence) for licence in licences]
    candidates = {target for base in bases for target in targets(base)}
    return any(all(accepts(licence, target) for licence in bases) for target in candidates)


def duties_by_licence(sources: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Obligation, ...]]:
    """Return the duties of each licence under which these sources are used."""
    all_terms = [terms_of(source) for source in sources]
    chosen = _choose(terms.licence for terms in all_terms)
    licences = sorted(frozenset().union(*(chosen[terms.licence] for terms in all_terms)))
    return {licence: _family(licence).duties for licence in licences}


def obligations(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the duties of a person who distributes the derived work, by licence and source."""
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
    """Return the first three sources and the number of the others, for a sentence."""
    unique = list(dict.fromkeys(sources))
    suffix = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return ", ".join(unique[:3]) + suffix
