"""Metrics are those of the libraries that everybody uses; a class that no reference has is wrong; intervals hold groups together."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from typing import Any

import jiwer
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from sartor.core.errors import ArtifactError, ConfigError
from sartor.evaluate import bootstrap
from sartor.evaluate.metrics import MetricSet, ModelOutputs
from sartor.evaluate.reply_labels import label_of, span_of
from sartor.evaluate.scorers import f1, rouge_l, spoken, word_errors

CLASSES = ["stop", "mend", "go"]


def as_json(labels: list[str]) -> list[str]:
    return [json.dumps({"action": label, "note": number}) for number, label in enumerate(labels)]


def drawn(count: int, seed: int) -> list[str]:
    return random.Random(seed).choices(CLASSES, k=count)


def test_macro_f1_and_accuracy_are_those_of_scikit_learn() -> None:
    wanted, before, after = drawn(60, 0), drawn(60, 1), drawn(60, 2)
    after[:20] = wanted[:20]
    after[3], after[30] = "another", "another"
    replies = as_json(after)
    replies[5] = "no JSON"
    after[5] = "unreadable"
    found = MetricSet(as_json(wanted), [str(n // 2) for n in range(60)], "action").compared(
        ModelOutputs(as_json(before)), ModelOutputs(replies)
    )
    for side, said in (("base", before), ("tuned", after)):
        macro = f1_score(wanted, said, labels=sorted(CLASSES), average="macro")
        assert getattr(found["macro_f1"], side) == pytest.approx(macro)
        assert getattr(found["accuracy"], side) == pytest.approx(accuracy_score(wanted, said))
    assert set(found) == {"exact_match", "f1", "rouge_l", "accuracy", "macro_f1"}


def test_macro_f1_is_judged_on_sets_of_whole_groups() -> None:
    """Row by row: macro-F1 of every set of groups; where the test does not reject, none but a few of them lie beyond."""
    wanted, before, after = drawn(24, 3), drawn(24, 4), drawn(24, 3)
    groups = [str(n % 8) for n in range(24)]
    found = MetricSet(as_json(wanted), groups, "action").compare(
        "macro_f1", ModelOutputs(as_json(before)), ModelOutputs(as_json(after))
    )
    differences = []
    for chosen in itertools.product((False, True), repeat=8):
        rows = [row for row in range(24) if chosen[int(groups[row])]]
        if rows:
            right = [wanted[row] for row in rows]
            sides = [
                f1_score(
                    right, [said[row] for row in rows], labels=sorted(set(right)), average="macro", zero_division=0
                )
                for said in (before, after)
            ]
            differences.append(sides[1] - sides[0])
    ordered = sorted(differences)
    # the handicap of a group that was not seen moves the ends outwards, and never past the flips that are as extreme
    assert found.low <= ordered[5] and found.high >= ordered[-6]
    assert found.verdict() == "better" and found.difference == pytest.approx(differences[-1])


def test_macro_f1_of_a_majority_class_model_is_small() -> None:
    """With 90 rows of one class and 10 of another, accuracy is 0.9 and macro F1 is 0.47."""
    wanted = ["go"] * 90 + ["stop"] * 10
    measures = MetricSet(as_json(wanted), [str(n) for n in range(100)], "action")
    found = measures.compared(ModelOutputs(as_json(["go"] * 100)), ModelOutputs(as_json(wanted)))
    assert found["accuracy"].base == 0.9
    assert found["macro_f1"].base == pytest.approx(0.5 * 18 / 19)
    assert found["macro_f1"].low > 0.4


def test_calibration_error_is_gap_of_confidence_to_accuracy() -> None:
    """At accuracy 0.6, confidence 0.95 has an error of 0.35 and confidence 0.6 has none."""
    wanted = ["go"] * 100
    said = as_json(["go"] * 60 + ["stop"] * 40)
    measures = MetricSet(as_json(wanted), [str(n) for n in range(100)], "action")
    sure = ModelOutputs(said, confidence=[0.95] * 100)
    fair = ModelOutputs(said, confidence=[0.6] * 100)
    found = measures.compared(sure, fair)["ece"]
    assert (found.base, found.tuned) == pytest.approx((0.35, 0.0))
    assert found.verdict(higher_is_better=False) == "better"
    mixed = ModelOutputs(said, confidence=[1.0] * 60 + [0.01] * 40)
    assert measures.compared(sure, mixed)["ece"].tuned == pytest.approx(0.004)


def test_word_error_rate_is_that_of_jiwer_over_all_transcripts() -> None:
    references = ["the sky is blue", "stop", "mend the edge by hand now", "not a transcript"]
    replies = ["the sky blue", "stop it now", "mend a edge by hand", "?"]
    measures = MetricSet(references, list("abcd"), transcripts=[0, 1, 2])
    found = measures.compared(ModelOutputs(replies), ModelOutputs(references))["wer"]
    assert found.base == pytest.approx(jiwer.wer(references[:3], replies[:3]))
    assert found.tuned == 0
    assert measures.by_row(ModelOutputs(replies))["wer"] == [0.25, 2.0, pytest.approx(1 / 3), None]


@pytest.mark.parametrize("seed", range(5))
def test_word_errors_are_those_of_jiwer(seed: int) -> None:
    draw = random.Random(seed)
    said, wanted = (" ".join(draw.choices("abcdef", k=draw.randint(1, 12))) for _ in range(2))
    counted = jiwer.process_words(wanted, said)
    assert word_errors(said, wanted) == (
        counted.substitutions + counted.deletions + counted.insertions,
        len(wanted.split()),
    )


def test_words_keep_their_marks_and_accents_their_letters() -> None:
    assert word_errors("की", "कि") == (1, 1) and rouge_l("की", "कि") == 0.0
    assert word_errors("हिन्दी भाषा", "हिन्दी भाषा") == (0, 2)
    decomposed = unicodedata.normalize("NFD", "café olé")
    assert f1(decomposed, "café olé") == 1.0 and word_errors(decomposed, "café olé") == (0, 2)


def test_characters_are_the_words_of_scripts_without_spaces() -> None:
    assert word_errors("你好吗", "你好吧") == (1, 3)
    assert f1("今日は晴れです", "今日は雨です") == pytest.approx(10 / 13)
    assert f1("แมวดำ", "แมวขาว") > 0
    assert word_errors("안녕 하세요", "안녕 하세요") == (0, 2), "Korean has spaces"


@pytest.mark.parametrize(
    ("reply", "reference"),
    [("„Ja“", "ja"), ("¿Dónde?", "dónde"), ("你好。", "你好"), ("don’t", "don't"), ("नमस्ते।", "नमस्ते")],
)
def test_f1_drops_punctuation_of_every_script(reply: str, reference: str) -> None:
    assert f1(reply, reference) == 1.0


def test_label_with_half_a_surrogate_pair_can_be_written() -> None:
    """JSON may escape one; rows.parquet holds UTF-8 alone."""
    label = label_of('{"a": "\\ud83d x"}', "a")
    assert label == "? x" and label.encode()


def test_reasoning_before_an_answer_is_not_scored() -> None:
    measures = MetricSet(["yes", "no"], ["a", "b"], labels=["yes", "no"], field=".")
    thought = ModelOutputs(["<think>\nno?\n</think>\n\nyes", "<think>\n\n</think>\n\nyes"])
    scores = measures.by_row(thought)
    assert scores["exact_match"] == [1.0, 0.0] == scores["accuracy"] and scores["f1"] == [1.0, 0.0]
    opened = ModelOutputs(["no?</think>yes", "yes</think>no"], is_opened=True)
    assert measures.by_row(opened)["exact_match"] == [1.0, 1.0]
    assert ModelOutputs(["<think> never ended", "a</think>b"]).answers == ["<think> never ended", "a</think>b"]


def test_what_is_heard_has_no_case_and_no_punctuation() -> None:
    assert spoken("  Don't -- STOP, Zoë! ") == "dont stop zoë"
    assert word_errors("Stop the line.", "stop the line") == (0, 3)
    assert word_errors("well", "") == (1, 0)


@pytest.mark.parametrize(
    ("reply", "reference", "score"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman police killed", "police killed the gunman", 0.5),
        ("", "", 1),
        ("", "a", 0),
        ("A, b!", "a b", 1),
    ],
)
def test_rouge_l(reply: str, reference: str, score: float) -> None:
    assert rouge_l(reply, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reply", "field", "label"),
    [
        ('{"a": "x"}', "a", "x"),
        ('{"a": {"b": true}}', "a.b", "true"),
        ('{"a.b": 1, "a": {"b": 2}}', "a.b", "1"),
        ("x", "a", None),
        ('["a"]', "a", None),
        ('{"b": 1}', "a", None),
        ("[" * 9999, "a", None),
        (" yes\n", ".", "yes"),
        ('{"a": null}', "a", "null"),
        ('{"a.b": {"c": "z"}}', "a.b.c", "z"),
    ],
)
def test_labels(reply: str, field: str, label: str | None) -> None:
    assert label_of(reply, field) == label


@pytest.mark.parametrize(
    ("reply", "field", "value"),
    [
        ('{"b": "x", "a": "x"}', "a", "x"),
        ('{ "c" : {"a": 1}, "a" :  {"b": [1, "}"], "c": "ö\\"y"}}', "a.c", 'ö\\"y'),
        ('{"a": 1.5}', "a", "1.5"),
        ('{"a": 1, "a": 22}', "a", "22"),
        ('{"a": ""}', "a", '""'),
        ("  stop \n", ".", "stop"),
        ('{"a.b": {"c": "z"}}', "a.b.c", "z"),
    ],
)
def test_where_a_label_stands(reply: str, field: str, value: str) -> None:
    start, end = span_of(reply, field)
    assert reply[start:end] == value
    if field == "a":
        assert reply[:start].rstrip(' "').endswith(":"), "it is the field's own value, not one like it before"


def test_label_metrics_skip_rows_without_label() -> None:
    """Such a row has accuracy None; a subset without labels has no accuracy."""
    references = [*as_json(["go", "stop"]), "how are you"]
    measures = MetricSet(references, list("abc"), "action")
    found = measures.compared(ModelOutputs(["?"] * 3), ModelOutputs(references))
    assert (found["accuracy"].tuned, found["accuracy"].base) == (1.0, 0.0)
    assert measures.by_row(ModelOutputs(references))["accuracy"] == [1.0, 1.0, None]
    few = measures.of([2, 0])
    assert few.references == [references[2], references[0]] and few.labelled == [1]
    assert measures.of([2]).names == ["exact_match", "f1", "rouge_l"]


@pytest.mark.parametrize(
    ("given", "name", "said"),
    [
        ({"field": "colour"}, "", "no reference has the field 'colour'"),
        ({}, "macro_f1", "no macro_f1 of these rows; it needs --label"),
        ({}, "wer", "no wer of these rows; it needs recordings"),
        ({}, "bleu", "no bleu of these rows"),
    ],
)
def test_what_cannot_be_measured_is_named(given: dict[str, Any], name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MetricSet(as_json(["go"]), ["a"], **given).check(name)


def test_means_are_as_they_were_before_statistics_of_sums() -> None:
    """`paired` written out: sums of the groups of every set, those of a set less half of the handicap."""
    rng = np.random.default_rng(5)
    base, tuned, weights = rng.random(30), rng.random(30), rng.integers(1, 9, 30).astype(float)
    groups = [str(n // 3) for n in range(30)]
    found = bootstrap.paired_bootstrap(list(base), list(tuned), groups, list(weights))
    _, member = np.unique(groups, return_inverse=True)
    mass, gain = np.bincount(member, weights), np.bincount(member, weights * (tuned - base))
    chosen = np.array(list(itertools.product((0.0, 1.0), repeat=10))[1:])
    values, mean = chosen @ gain / (chosen @ mass), gain.sum() / mass.sum()
    each = mean + 10 * (gain - mean * mass) / mass.sum()
    ends = []
    for sign in (1, -1):
        handicap = (2.25 + 12 / 10) * (np.median(sign * each) - (sign * each).min())
        # the empty set counts as one of the 25 of 1,024 that may be as extreme
        ends.append(sign * np.sort(sign * values - handicap / (2 * chosen.sum(1)))[24])
    assert (found.low, found.high) == pytest.approx(tuple(np.clip(ends, -1, 1)), abs=1e-6)


def test_macro_f1_that_falls_is_never_told_as_a_gain() -> None:
    """Each group alone gains, the whole falls: what single groups say bounds a mean, and nothing else."""
    wanted: list[str] = []
    before, after, groups = wanted.copy(), wanted.copy(), wanted.copy()
    for place in range(40):
        rows = (["b", *["a"] * 51], ["b", "?", *["a"] * 50], ["b", *["a"] * 51])
        if place % 2 == 0:
            rows = (["a", "z", "z", "z"], ["?", "z", "z", "z"], ["a", "z", "b", "b"])
        for column, told in zip((wanted, before, after), rows, strict=True):
            column.extend(told)
        groups += [str(place)] * len(rows[0])
    fallen = MetricSet(wanted, groups, ".").compare("macro_f1", ModelOutputs(before), ModelOutputs(after))
    assert fallen.low <= fallen.difference <= fallen.high
    assert fallen.difference < -0.3 and fallen.verdict() == "worse"


def test_an_estimate_is_in_its_interval_whatever_the_statistic() -> None:
    source = random.Random(2)
    for count in (7, 13, 20, 40):
        wanted = [source.choice("abc") for _ in range(2 * count)]
        before, after = ([source.choice([right, right, *"abc?"]) for right in wanted] for _ in range(2))
        sides = [ModelOutputs(replies, confidence=[source.random() for _ in wanted]) for replies in (before, after)]
        for name, found in MetricSet(wanted, [str(n // 2) for n in range(2 * count)], ".").compared(*sides).items():
            assert found.low <= found.difference <= found.high, (name, count)
    for score in (0.1, 0.3, 0.7):
        equal = bootstrap.paired_bootstrap(
            [0.0] * 39, [score] * 39, [str(n // 3) for n in range(39)], is_bounded=False
        )
        assert equal.low <= equal.difference <= equal.high, "ends that are rounded otherwise leave nothing out"


def test_span_of_an_absent_field_is_an_error() -> None:
    """A field without a matching key, or below a value that is no object, has no span."""
    for reply, field in (('{"a": 1}', "b"), ('{"a": 1}', "b.c"), ('{"a": 1}', "a.b"), ("[1]", "a"), ("word", "a")):
        with pytest.raises(ArtifactError, match="no field"):
            span_of(reply, field)
