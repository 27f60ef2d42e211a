"""SPDX expressions are read exactly; what forbids a use, what contradicts and what is owed is said by name."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import sartor
from sartor.core.errors import ConfigError
from sartor.core.licences import compliance, licence_families, spdx
from sartor.core.licences.compliance import USES

PLAIN = [
    "MIT",
    "Apache-2.0",
    "CC0-1.0",
    "CC-BY-4.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-4.0",
    "CC-BY-ND-4.0",
    "GPL-3.0-only",
    "LicenseRef-house",
]
LEAF = st.sampled_from([*PLAIN, "GPL-2.0-only WITH Classpath-exception-2.0", "NOASSERTION"])
TREE = st.recursive(
    LEAF.map(lambda leaf: (leaf, [{leaf}])),
    lambda inner: st.tuples(st.sampled_from(["AND", "OR"]), inner, inner).map(lambda t: _join(*t)),
    max_leaves=6,
)


def _join(
    operator: str, one: tuple[str, list[set[str]]], other: tuple[str, list[set[str]]]
) -> tuple[str, list[set[str]]]:
    """An expression with every bracket written, and the sets of licences of which one may be chosen, by definition."""
    ways = one[1] + other[1] if operator == "OR" else [a | b for a, b in itertools.product(one[1], other[1])]
    return f"({one[0]}) {operator} ({other[0]})", ways


def source(name: str, licence: str = "MIT", **terms: Any) -> dict[str, Any]:
    return {"source": name, "path": name, "licence": licence, **terms}


def said(*sources: dict[str, Any], use: str = "commercial", today: str = "2027-01-01") -> str:
    return "; ".join(map(str, compliance.objections(sources, use, today)))


@given(TREE)
def test_alternatives_are_those_of_and_and_or_with_brackets(tree: tuple[str, list[set[str]]]) -> None:
    expression, ways = tree
    smallest = {frozenset(way) for way in ways if not any(other < way for other in ways)}
    assert set(spdx.alternatives(expression)) == smallest
    assert set(spdx.alternatives(spdx.checked(expression))) == smallest


@given(TREE, st.sampled_from(USES))
def test_compound_licence_permits_iff_an_alternative_does(tree: tuple[str, list[set[str]]], use: str) -> None:
    """OR permits what any branch permits, AND permits what all of its parts permit."""
    expression, ways = tree
    permits = any(not compliance.objections([source("f", part) for part in way], use) for way in ways)
    assert permits == (not compliance.objections([source("f", expression)], use))


@given(TREE, TREE)
def test_rank_of_and_is_at_most_min_and_of_or_equals_max(one: Any, other: Any) -> None:
    """AND is as strict as its strictest part or stricter; OR is as free as its freest branch."""
    low, high = sorted(compliance.rank(tree[0]) for tree in (one, other))
    assert compliance.rank(f"({one[0]}) AND ({other[0]})") <= low
    assert compliance.rank(f"({one[0]}) OR ({other[0]})") == high


@given(st.lists(TREE, max_size=5), st.randoms())
def test_combined_licence_has_no_or_and_ignores_order(trees: Any, random: Any) -> None:
    """It contains an alternative of each source licence; combining it again changes nothing."""
    expressions = [tree[0] for tree in trees]
    whole = compliance.combine(expressions)
    random.shuffle(expressions)
    assert compliance.combine(expressions) == whole == compliance.combine([whole])
    assert " OR " not in whole
    assert all(any(way <= set(whole.split(" AND ")) for way in tree[1]) for tree in trees)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    assert compliance.combine([text])
    try:
        assert spdx.checked(spdx.checked(text)) == spdx.checked(text)
    except ConfigError as error:
        assert error.problem and error.remedy


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ("mit or gpl-2.0+", "MIT OR GPL-2.0-or-later"),
        ("GPL-3.0", "GPL-3.0-only"),
        ("", "NOASSERTION"),
        ("LicenseRef-Apache", "LicenseRef-Apache"),
        ("apache-2.0 with llvm-exception", "Apache-2.0 WITH LLVM-exception"),
        ("MIT AND NOASSERTION", "MIT AND NOASSERTION"),
    ],
)
def test_a_licence_has_one_spelling(written: str, spelled: str) -> None:
    assert spdx.checked(written) == spelled


@pytest.mark.parametrize(
    ("written", "problem", "remedy"),
    [
        ("CC BY 4.0", "'CC-BY-4.0' was probably meant", "give CC-BY-4.0"),
        ("cc-by-sa4", "'CC-BY-SA-4.0' was probably meant", ""),
        ("llama3", "no licence that SPDX lists", "LicenseRef-llama3"),
        ("MIT AND", "no SPDX expression", ""),
        ("MIT " * 400, "above 1,000", ""),
        ("GPL-3.0-only WITH MIT", "no exception", "give GPL-3.0-only"),
        ("LLVM-exception", "no licence", "WITH"),
        (
            " AND ".join(f"(GPL-{n}.0-only OR {name})" for n in (2, 3) for name in ("MIT", "ISC", "0BSD", "Zlib")),
            "more than 64",
            "",
        ),
    ],
)
def test_what_is_no_licence_is_refused_when_the_recipe_is_read(
    tmp_path: Path, written: str, problem: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=r"sources\[0\]") as caught:
        sartor.load_curate_recipe({"sources": [{"path": "f", "licence": written}]})
    assert problem in caught.value.problem and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("terms", "problem", "remedy"),
    [
        ({"consent": "withdrawed"}, "consent is 'withdrawed'", "withdrawn"),
        ({"use": ["commercal"]}, "use.0. is 'commercal'", "commercial"),
        ({"expires": "31.12.2027"}, "must be a day", "expires: 20"),
        ({"expire": "2027-12-31"}, "'expires' was probably meant", "expires"),
    ],
)
def test_an_unknown_word_of_terms_names_the_one_meant(terms: dict[str, Any], problem: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        sartor.load_curate_recipe({"sources": [{"path": "f", **terms}]})
    assert remedy in caught.value.remedy


def test_a_day_in_a_recipe_stays_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("sources: [{path: f, licence: mit, expires: 2027-12-31}]")
    (read,) = sartor.load_curate_recipe(tmp_path / "c.yaml").sources
    assert (read.expires, read.licence) == ("2027-12-31", "MIT")


@pytest.mark.parametrize(
    ("licence", "forbidden"),
    [
        ("MIT", ""),
        ("CC-BY-4.0", ""),
        ("GPL-3.0-only", ""),
        ("CC-BY-NC-4.0", "commercial internal"),
        ("CC-BY-NC-SA-3.0-IGO", "commercial internal"),
        ("CC-BY-ND-4.0", "commercial non-commercial research"),
        ("CC-BY-ND-3.0", "commercial non-commercial research internal"),
        ("CC-BY-NC-ND-4.0", "commercial non-commercial research internal"),
        ("NOASSERTION", "commercial non-commercial research internal"),
        ("NONE", "commercial non-commercial research internal"),
        ("LicenseRef-house", "commercial non-commercial research internal"),
        ("Elastic-2.0", "commercial non-commercial research internal"),
        ("MIT OR CC-BY-NC-4.0", ""),
        ("MIT AND CC-BY-NC-4.0", "commercial internal"),
        ("CC-BY-ND-3.0 OR (MIT AND CC-BY-NC-4.0)", "commercial internal"),
        ("PolyForm-Noncommercial-1.0.0", "commercial internal"),
    ],
)
def test_each_use_is_forbidden_by_what_forbids_it(licence: str, forbidden: str) -> None:
    assert [use for use in USES if compliance.objections([source("f", licence)], use)] == forbidden.split()
    assert compliance.permitted([source("f", licence)]) == [use for use in USES if use not in forbidden.split()]


@pytest.mark.parametrize(
    ("declared", "permitted"),
    [
        (["commercial"], USES),
        (["non-commercial"], ("non-commercial", "research")),
        (["research"], ("research",)),
        (["internal"], ("internal",)),
        (["internal", "research"], ("research", "internal")),
        ([], USES),
    ],
)
def test_a_declared_use_covers_what_asks_for_less(declared: list[str], permitted: tuple[str, ...]) -> None:
    assert tuple(compliance.permitted([source("f", use=declared)])) == permitted
    if declared:  # terms of one's own are what is declared of them
        assert tuple(compliance.permitted([source("f", "LicenseRef-house", use=declared)])) == permitted


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ({"consent": "withdrawn"}, "withdrawn"),
        ({"consent": "pending"}, "pending"),
        ({"expires": "2026-12-31"}, "after 2026-12-31; today is 2027-01-01"),
    ],
)
def test_expired_terms_and_missing_consent_forbid_every_use(terms: dict[str, str], why: str, use: str) -> None:
    assert f"rows.jsonl {'needs a consent' if 'consent' in terms else 'may not be used'}" in said(
        source("rows.jsonl", **terms), use=use
    )
    assert why in said(source("rows.jsonl", **terms), use=use)
    assert not said(source("rows.jsonl", expires="2027-01-01", consent="given"), use=use), "the last day still counts"


def test_terms_of_an_older_manifest_have_their_defaults() -> None:
    assert compliance.terms_of(
        {"source": "f", "licence": "MIT", "use": ["research"], "sha256": "0" * 64}
    ) == compliance.LicenceTerms("f", licence="MIT", use=("research",))
    assert compliance.terms_of({}).licence == "NOASSERTION"


CONFLICTS = [
    (
        "CC-BY-SA-4.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-NC-SA-4.0 of b.jsonl and CC-BY-SA-4.0 of a.jsonl each demand that a derived work carries its own terms",
    ),
    ("CC-BY-SA-4.0", "CC-BY-NC-4.0", "no stricter ones"),
    ("GPL-2.0-only", "GPL-3.0-only", "each demand"),
    ("GPL-2.0-only", "Apache-2.0", "patent terms"),
    ("CC-BY-SA-3.0", "GPL-3.0-only", "each demand"),
    ("ODbL-1.0", "CC-BY-SA-4.0", "each demand"),
    ("CC-BY-SA-1.0", "CC-BY-SA-4.0", "each demand"),
    ("MIT OR ODbL-1.0", "CC-BY-SA-4.0", ""),
    ("CC-BY-SA-3.0", "CC-BY-SA-4.0", ""),
    ("CC-BY-SA-2.0-UK", "CC-BY-SA-3.0-DE", ""),
    ("CC-BY-SA-4.0", "GPL-3.0-or-later", ""),
    ("GPL-2.0-or-later", "AGPL-3.0-only", ""),
    ("GPL-3.0-only", "Apache-2.0", ""),
    ("MPL-2.0", "CC-BY-SA-4.0", ""),
    ("CC-BY-4.0", "CC-BY-NC-SA-4.0", ""),
    ("GPL-2.0-only WITH Classpath-exception-2.0", "GPL-2.0-only", ""),
    ("ODbL-1.0 OR CC-BY-SA-4.0", "CC-BY-SA-4.0", ""),
]


@pytest.mark.parametrize(("one", "other", "sentence"), CONFLICTS)
def test_a_contradiction_of_licences_names_both_sources(one: str, other: str, sentence: str) -> None:
    for pair in (
        [source("a.jsonl", one), source("b.jsonl", other)],
        [source("b.jsonl", other), source("a.jsonl", one)],
    ):
        found = compliance.conflicts(pair)
        assert len(found) == bool(sentence)
        assert not sentence or (sentence in found[0] and "a.jsonl" in found[0] and "b.jsonl" in found[0])
        assert compliance.permitted(pair) == (
            ["internal"] if sentence and "NC" not in other else [] if sentence else compliance.permitted(pair)
        )


def test_of_an_or_the_branch_is_chosen_that_contradicts_nothing() -> None:
    assert compliance.combine(["CC-BY-SA-4.0", "ODbL-1.0 OR CC-BY-SA-4.0"]) == "CC-BY-SA-4.0"
    assert compliance.combine(["ODbL-1.0 OR CC-BY-SA-4.0"]) == "ODbL-1.0"


def test_added_share_alike_term_conflicts_like_a_licence() -> None:
    """A source with share_alike=True conflicts with CC-BY-SA and non-commercial sources."""
    own = source("own.jsonl", "LicenseRef-house", share_alike=True)
    assert compliance.conflicts([own, source("b", "CC-BY-SA-4.0")]) == [
        "CC-BY-SA-4.0 of b and LicenseRef-house of own.jsonl each demand that a derived work carries its own terms"
    ]
    assert compliance.conflicts([own, source("b", "MIT"), source("c", "LicenseRef-house", share_alike=True)]) == []
    assert (
        "CC-BY-SA-4.0 of b demands"
        in compliance.conflicts([source("b", "CC-BY-SA-4.0"), source("c", non_commercial=True)])[0]
    )
    assert "LicenseRef-house of own.jsonl demands" in compliance.conflicts([own, source("c", "CC-BY-NC-4.0")])[0]
    assert compliance.conflicts([{**own, "non_commercial": True}]) == []


def test_obligations_are_listed_by_licence_with_the_sources() -> None:
    files = [source(f"{name}.jsonl", "CC-BY-4.0") for name in "abcde"]
    owed = compliance.obligations(
        [
            *files,
            source("s", "CC-BY-SA-4.0", expires="2028-01-01"),
            source("net", "AGPL-3.0-only"),
            source("z", "CC0-1.0"),
        ]
    )
    assert (
        "CC-BY-4.0 of a.jsonl, b.jsonl, c.jsonl and 2 more: credit the authors, name the licence, say what was changed"
        in owed
    )
    assert "CC-BY-SA-4.0 of s: hand a derived work out under these same terms only" in owed
    assert any("network" in line and "net" in line for line in owed)
    assert "terms of s: no use after 2028-01-01" in owed
    assert not any("CC0" in line for line in owed)


def test_more_permissive_licences_rank_higher() -> None:
    order = [
        "CC0-1.0",
        "MIT",
        "Apache-2.0",
        "CC-BY-4.0",
        "MPL-2.0",
        "CC-BY-SA-4.0",
        "GPL-3.0-only",
        "AGPL-3.0-only",
        "CC-BY-NC-4.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-ND-4.0",
        "CC-BY-NC-ND-3.0",
        "LicenseRef-house",
        "NOASSERTION",
    ]
    ranks = [compliance.rank(licence) for licence in order]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) == len(ranks)


def test_licence_families_are_reachable_and_name_known_ids() -> None:
    """Each family but those of LicenseRef- has an SPDX id; each has a reason and a rank from 0 to 1."""
    ids = [name for name in spdx.categories() if "exception" not in name]
    reached = {licence_families.family_of(name, spdx.categories().get(name, "")) for name in [*ids, "NOASSERTION"]}
    # those of models have no id of SPDX's: test_model_licences.py
    assert {family for family in licence_families.FAMILIES if not family.pattern.startswith("LicenseRef-")} <= reached
    named = {name for key, (others, _) in licence_families._ACCEPTS.items() for name in (key, *others)} | set().union(
        *licence_families.CLASHES
    )
    assert named <= set(ids)
    assert all(family.reason and 0 <= family.rank <= 1 for family in licence_families.FAMILIES)


def test_help_needs_no_list_of_licences() -> None:
    code = "import sys, sartor.cli, sartor.curate.recipe; sys.exit('license_expression' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.sampled_from([name for name in PLAIN if name != "LicenseRef-house"]), st.sampled_from(PLAIN))
def test_a_further_source_never_permits_more(one: str, other: str) -> None:
    assume(one != other)
    assert set(compliance.permitted([source("a", one), source("b", other)])) <= set(
        compliance.permitted([source("a", one)])
    )
