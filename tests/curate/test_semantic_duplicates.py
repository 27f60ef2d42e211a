"""`semantic_duplicates`: rows that say the same go, rows that only look near stay, every pair is evidence."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rows import example, gather
from sartor.core.errors import ConfigError, GuardError
from sartor.core.records import Example
from sartor.curate.step import StepResult
from sartor.curate.steps.semantic_duplicates import EVIDENCE, SemanticDuplicates
from sartor.text import encoders

PLACES = ("kitchen", "garage", "attic", "office", "cellar", "porch", "nursery", "hallway", "garden", "bathroom")
SAME = [
    ("How do I reset my password?", "Open the settings page and choose a new password there."),
    ("how can I reset my password", "Open the settings page and choose a new password there!"),
]


def decide(rows: list[tuple[str, str]] | list[Example], **options: object) -> StepResult:
    step = SemanticDuplicates(**{"encoder": "tfidf", "max_fraction": 1.0, "max_source_fraction": 1.0, **options})  # type: ignore[arg-type]
    examples = [row if isinstance(row, Example) else example(*row, place) for place, row in enumerate(rows)]
    return step.decide(gather(step, examples))


def pad(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows among forty others, unlike each other."""
    rng = random.Random(0)
    letters = "bcdfghklmnprst"
    strange = ["".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(3)) for _ in range(400)]
    others = [(" ".join(strange[8 * n : 8 * n + 4]), " ".join(strange[8 * n + 4 : 8 * n + 8])) for n in range(40)]
    return [*rows, *others]


def test_paraphrase_is_removed_and_its_pair_is_evidence() -> None:
    """The longer row stays."""
    verdicts = decide(pad(SAME))
    assert [(removal.row, removal.kept_row, removal.reason) for removal in verdicts.removals] == [
        (1, 0, "semantic_duplicate")
    ]
    assert verdicts.set_aside and verdicts.removals[0].method and 0.4 <= (verdicts.removals[0].score or 0) <= 1
    (pair,) = verdicts.evidence[EVIDENCE].to_pylist()
    ids = [example(*row, place).id for place, row in enumerate(SAME)]
    assert [pair["a"], pair["b"]] == ids and pair["words"] == 1.0


@pytest.mark.parametrize(
    "pair",
    [
        [("turn on the kitchen light", "{}"), ("turn off the kitchen light", "{}")],
        [("we open at 9 h on mondays", "ok"), ("we open at 10 h on mondays", "ok")],
        [("it is allowed to park here", "ok"), ("it is not allowed to park here", "ok")],
    ],
)
def test_near_texts_that_mean_other_things_stay(pair: list[tuple[str, str]]) -> None:
    verdicts = decide(pad(pair), threshold=0.3, field="prompt")
    assert verdicts.removals == [] and sum(verdicts.facts["refused_by_words"].values()) >= 1


def test_a_hundred_wordings_of_one_template_lose_no_row() -> None:
    rows = [
        (f"turn {way} the {place} {thing}", "done")
        for way in ("on", "off")
        for place in PLACES
        for thing in ("light", "fan", "heater")
    ]
    verdicts = decide(rows, field="prompt", threshold=0.1)
    assert verdicts.removals == [] and verdicts.facts["near_by_vectors"] > 100


def test_similar_prompts_with_different_replies_stay() -> None:
    """With field: prompt one of the two rows is removed."""
    rows = pad(
        [
            (SAME[0][0], "Write to the help desk."),
            (SAME[1][0], "You cannot, accounts are closed for good after three tries."),
        ]
    )
    assert decide(rows).removals == []
    assert len(decide(rows, field="prompt").removals) == 1


def test_json_replies_are_equal_or_not() -> None:
    rows = [
        ("turn the hall light on", '{"intent":"HassTurnOn"}'),
        ("turn on the hall light", '{"intent":"HassTurnOnn"}'),
    ]
    assert decide(pad(rows)).removals == []
    assert len(decide(pad([rows[0], (rows[1][0], rows[0][1])])).removals) == 1


@pytest.mark.parametrize(("field", "gone"), [("prompt", 1), ("reply", 0), ("both", 0), ("all", 0)])
def test_the_field_says_what_is_compared(field: str, gone: int) -> None:
    rows = pad(
        [
            ("when does the shop open on sundays", "at noon"),
            ("when is the shop opening on sundays", "never, we are closed then"),
        ]
    )
    assert len(decide(rows, field=field, threshold=0.4).removals) == gone


@pytest.mark.parametrize(("keep", "kept"), [("first", 0), ("longest", 1), ("newest", 2)])
def test_the_rule_says_which_row_stays(keep: str, kept: int) -> None:
    asked = ["reset my password", "please, how do I reset my password?", "how can I reset my password"]
    dates = ["2024-01-01", "", "2025-01-01"]
    rows = [
        example(prompt, "Open the settings page and look there.", place, date=dates[place])
        for place, prompt in enumerate(asked)
    ]
    rows += [example(*row, place) for place, row in enumerate(pad([]), 3)]
    assert {removal.kept_row for removal in decide(rows, keep=keep, threshold=0.3).removals} == {kept}


def test_a_row_goes_only_for_one_that_it_was_held_against() -> None:
    rng = random.Random(3)
    vocabulary = [
        f"{a}{b}"
        for a in ("brick", "timber", "glass", "copper", "slate")
        for b in ("wall", "roof", "floor", "stair", "gate")
    ]
    base = rng.sample(vocabulary, 24)
    chain = [" ".join(base[: 24 - n]) for n in range(6)]
    verdicts = decide([(text, "fine") for text in chain], field="prompt", threshold=0.2, keep="first")
    pairs = {frozenset((row["locator_a"], row["locator_b"])) for row in verdicts.evidence[EVIDENCE].to_pylist()}
    assert verdicts.removals and pairs
    for removal in verdicts.removals:
        assert frozenset((f"rows.jsonl:{removal.row + 1}", f"rows.jsonl:{removal.kept_row + 1}")) in pairs


def test_a_removal_of_nearly_a_whole_source_stops_and_asks() -> None:
    words = ("reset", "password", "account")
    rows = [
        (
            f"{'please ' * (n % 5)}how {'do' if n % 2 else 'can'} I {' '.join(words)}{'?' * n}",
            "Open the settings page now.",
        )
        for n in range(30)
    ]
    with pytest.raises(GuardError, match=r"rows\.jsonl"):
        decide(rows, threshold=0.1, max_source_fraction=0.5)
    assert len(decide(rows, threshold=0.1, max_source_fraction=0.5, allow=("rows.jsonl",)).removals) >= 27


@pytest.mark.parametrize(
    "rows", [[], [("a question", "an answer")], [("", "a document")], [("", ""), ("", "")], [("?", "!")] * 2]
)
def test_few_and_empty_rows_are_no_case(rows: list[tuple[str, str]]) -> None:
    verdicts = decide(rows)
    assert len(verdicts.removals) in (0, 1) and verdicts.evidence[EVIDENCE].num_rows == len(verdicts.removals)
    assert verdicts.facts["encoder_because"]


def test_text_too_long_to_compare_stays_and_is_counted() -> None:
    long = "brick timber glass " * 2000
    verdicts = decide(pad([(long + "one", "yes"), (long + "two", "yes")]), field="prompt")
    assert verdicts.removals == [] and verdicts.facts["too_long_to_compare"] == 2


def test_two_runs_are_equal() -> None:
    rows = pad(
        [
            (f"how do I {verb} my {thing}{mark}", "Open the settings page.")
            for verb in ("reset", "change")
            for thing in ("name", "code")
            for mark in "?! "
        ]
    )
    one, other = decide(rows), decide(rows)
    assert (
        one.removals == other.removals
        and one.evidence[EVIDENCE].equals(other.evidence[EVIDENCE])
        and one.facts == other.facts
    )


@pytest.mark.parametrize(
    "options", [{"threshold": 1.2}, {"agreement": -1.0}, {"neighbours": 0}, {"max_fraction": 7.0}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        SemanticDuplicates(**options)  # type: ignore[arg-type]


def test_an_unknown_encoder_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        decide(pad(SAME), encoder="nosuch")


def near_ones(rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    half = rng.standard_normal((rows // 2, 24))
    vectors = np.vstack([half, half + 0.1 * rng.standard_normal(half.shape)]).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_graph_finds_what_exact_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = near_ones(600)
    exact = {(a, b): score for a, b, score in encoders.NearPairs(vectors, 0.9, 5)}
    monkeypatch.setattr(encoders, "EXACT_ROWS", 10)
    graph = {(a, b): score for a, b, score in encoders.NearPairs(vectors, 0.9, 5)}
    assert len(exact) >= 300 and len(exact.keys() & graph.keys()) >= 0.99 * len(exact)
    assert all(abs(graph[pair] - exact[pair]) < 1e-5 for pair in exact.keys() & graph.keys())


def test_rows_with_more_near_ones_than_are_looked_at_are_counted() -> None:
    near = encoders.NearPairs(np.ones((6, 2), np.float32) / np.sqrt(np.float32(2)), 0.9, 3)
    assert len(list(near)) >= 9 and near.crowded == 6
    empty = encoders.NearPairs(np.zeros((6, 2), np.float32), -1.0, 3)
    assert list(empty) == []
