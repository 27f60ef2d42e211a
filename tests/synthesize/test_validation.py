"""Synthetic rows held against reality: the plants are found, what is like reality passes, and what fails is not accepted."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sartor
from sartor.core.errors import ConfigError, GateError, SourceError
from sartor.core.parquet_io import read_drops, read_examples
from sartor.core.records import Example, Message, Origin
from sartor.synthesize.validate import citation_check, diversity, outcome_shift, two_sample_tests, validation
from sartor.synthesize.validate import samples as samples_module
from sartor.synthesize.validate.permutation_tests import StatisticResult, corrected_results, finding_of, permuted
from sartor.synthesize.validate.samples import SampleSpace, ValidationSamples, pooled
from sartor.synthesize.validate.types import ValidateOptions, ValidationLimits
from sartor.synthesize.validate.validation import Validated, validate_rows

QUICK = ValidateOptions(encoder="tfidf", permutations=499)
THINGS = {
    "kitchen": ("oven", "fridge", "kettle", "toaster", "sink", "mixer"),
    "garden": ("hose", "mower", "hedge", "pond", "shed", "lawn"),
    "office": ("printer", "desk", "laptop", "phone", "screen", "chair"),
    "garage": ("car", "bike", "ladder", "drill", "tyre", "trailer"),
}
ASKED = (
    "where do I find the {thing} of the {place} on {day}",
    "who mended the {place} {thing} last {day}",
    "is the {thing} in the {place} broken since {day}",
    "please order a new {thing} for our {place} by {day}",
    "the {place} {thing} makes a noise every {day}, why",
)
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "christmas", "easter")


def example(asked: str, replied: str, group: str = "", **fields: object) -> Example:
    origin = Origin("rows.jsonl", f"rows.jsonl:{group or asked[:8]}")
    return Example((Message.of("user", asked), Message.of("assistant", replied)), (origin,), group=group, **fields)  # type: ignore[arg-type]


def talk(count: int, seed: int, places: tuple[str, ...] = tuple(THINGS)) -> list[Example]:
    rng = random.Random(seed)
    found: dict[str, Example] = {}
    while len(found) < count:
        place = rng.choice(places)
        said = {"thing": rng.choice(THINGS[place]), "place": place, "day": rng.choice(DAYS)}
        asked = f"{rng.choice(ASKED).format(**said)} ({rng.choice(DAYS)}, {rng.randrange(1000)})"
        found[asked] = example(asked, json.dumps({"topic": place}), asked)
    return list(found.values())


def applications(count: int, seed: int, *, turned: float = 0.0) -> list[Example]:
    """Applications; with `turned` that part of what women would get is declined."""
    rng = random.Random(seed)
    found = []
    for place in range(count):
        name, they, is_woman = rng.choice(
            (("Emily", "She", True), ("Sarah", "She", True), ("Greg", "He", False), ("Todd", "He", False))
        )
        granted = rng.random() < 0.6 and not (is_woman and rng.random() < turned)
        asked = f"{name} asks for {rng.randrange(1000)} euros. {they} earns {rng.randrange(1000, 5000)} a month."
        found.append(example(asked, json.dumps({"decision": "approve" if granted else "decline"}), f"{seed}-{place}"))
    return found


def run(
    synthetic: list[Example], real: list[Example], seeds: list[Example], options: ValidateOptions = QUICK
) -> Validated:
    return validate_rows(ValidationSamples(synthetic, real, seeds), options)


def test_rows_like_reality_pass_and_every_test_says_why() -> None:
    found = run(talk(100, 1), talk(100, 2), talk(60, 3))
    assert found.passed and found.accepted > 80
    for test in found.tests:
        assert test.detail
        assert (test.p_corrected is None) == (test.verdict == "not tested")


def _collapsed() -> list[Example]:
    return talk(100, 1, ("kitchen",))


def _copied() -> list[Example]:
    seeds = talk(60, 3)
    again = [
        example(f"{row.messages[0].text.upper()}!", row.reply, f"copy {place}") for place, row in enumerate(seeds[:20])
    ]
    return [*talk(80, 1), *again]


def _drifted() -> list[Example]:
    return [*talk(70, 1, ("garage",)), *talk(30, 4)]


def _repeated() -> list[Example]:
    few = talk(5, 1)
    return [
        example(f"{row.messages[0].text} {word}", row.reply, f"{word}{place}")
        for word in DAYS * 2
        for place, row in enumerate(few)
    ]


@pytest.mark.parametrize(
    ("plant", "tests"),
    [
        (_collapsed, {"coverage", "vendi", "label", "topic"}),
        (_copied, {"copies_of_seeds"}),
        (_drifted, {"topic", "label"}),
        (_repeated, {"repeated", "distinct", "vendi"}),
    ],
)
def test_a_plant_is_found_by_the_tests_that_are_meant_for_it(
    plant: Callable[[], list[Example]], tests: set[str]
) -> None:
    found = run(plant(), talk(100, 2), talk(60, 3))
    failed = {test.name for test in found.failed}
    assert tests <= failed
    assert found.accepted == 0
    assert all(test.rows for test in found.failed if test.name in tests - {"distinct", "vendi"})


def test_outcome_shift_by_group_is_found() -> None:
    """Even outcomes pass; more declines in all groups alike are a shift of labels only."""
    real, seeds = applications(150, 2), applications(60, 3)
    shifted = run(applications(150, 1, turned=0.8), real, seeds)
    (found,) = [test for test in shifted.tests if test.name == "group_outcome"]
    assert found.verdict == "fail" and "male" in found.detail
    assert found.effect > 0.25
    even = run(applications(150, 5), real, seeds)
    assert "group_outcome" not in {test.name for test in even.failed}
    # everybody is declined more often: that is no shift between groups, though the labels drift
    rng = random.Random(0)
    colder = [
        example(row.messages[0].text, json.dumps({"decision": "decline"}), row.group) if rng.random() < 0.5 else row
        for row in applications(150, 6)
    ]
    failed = {test.name for test in run(colder, real, seeds).failed}
    assert "label" in failed and "group_outcome" not in failed


def test_free_text_outcomes_are_known_by_what_the_replies_say() -> None:
    said = {
        "approve": ("You get the loan.", "The loan is granted to you now."),
        "decline": ("No loan, we are sorry.", "We must refuse it."),
    }

    def spoken(rows: list[Example]) -> list[Example]:
        rng = random.Random(0)
        turned = [(row, rng.choice(said[json.loads(row.reply)["decision"]])) for row in rows]
        return [example(row.messages[0].text, reply, row.group) for row, reply in turned]

    found = run(spoken(applications(200, 1, turned=0.9)), spoken(applications(200, 2)), spoken(applications(60, 3)))
    assert "group_outcome" in {test.name for test in found.failed}


def test_decisions_unite_different_wordings() -> None:
    """None are returned if too few replies decide or if only one decision occurs."""
    said = [
        "We can grant it.",
        "Approved.",
        "You are eligible.",
        "We cannot grant it.",
        "It wasn't approved.",
        "We regret: no.",
    ] * 4
    assert outcome_shift.decisions(said) == (["favourable"] * 3 + ["unfavourable"] * 3) * 4
    assert outcome_shift.decisions([*said, *["The oven is hot."] * 12]) == []  # of too few is known what they decide
    assert outcome_shift.decisions(said[:3] * 8) == []


def test_near_copies_of_held_out_rows_are_named_row_by_row() -> None:
    real = talk(100, 2)
    leaked = [example(f" {row.messages[0].text}!", row.reply, f"leak {place}") for place, row in enumerate(real[:15])]
    found = run([*talk(85, 1), *leaked], real, talk(60, 3))
    assert "copies_of_held_out" in {test.name for test in found.failed}
    named = {flaw.id for flaw in found.flaws if flaw.reason == "copy_of_held_out"}
    assert {row.id for row in leaked} <= named


def test_row_unlike_the_real_rows_is_named_as_outside() -> None:
    """At most two ordinary rows are named with it."""
    made = talk(60, 1)
    made[7] = example("zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich", "ja", "far")
    found = run(made, talk(150, 2), [])
    outside = {flaw.index for flaw in found.flaws if flaw.reason == "outside"}
    assert 7 in outside and len(outside) <= 3


def test_more_rows_than_are_compared_are_drawn_by_whole_units() -> None:
    rows = [dataclasses.replace(row, group=f"g{place // 10}") for place, row in enumerate(talk(200, 1))]
    pool = pooled(ValidationSamples(rows, talk(120, 2), []), 100, 0)
    assert pool.sampled and len(pool.synthetic) == 100
    assert set(np.unique(pool.units[: len(pool.synthetic)], return_counts=True)[1]) == {10}


def test_permutations_move_whole_units_and_keep_the_size() -> None:
    rows = [dataclasses.replace(row, group=f"g{place // 5}") for place, row in enumerate(talk(100, 1))]
    pool = pooled(ValidationSamples(rows, talk(60, 2), []), 1000, 0)
    members = permuted(pool, 50, 0)
    assert (members[0] == pool.is_synthetic).all()
    for draw in members:
        assert abs(draw.sum() - 100) <= 5
        for unit in np.unique(pool.units):
            assert len(set(draw[pool.units == unit])) == 1


def test_p_values_are_corrected_jointly_and_small_effects_pass() -> None:
    """Equal tests cost nothing, independent ones what Holm takes; effects below the limit pass."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(3, 1000))
    draws[:, 0] = (3.5, 2.2, 0)

    def findings(values: np.ndarray, effect: float = 1.0) -> list[StatisticResult]:
        return [finding_of("x", one, 0.1, "said", effect=effect) for one in values]

    def corrected(tests: list[StatisticResult]) -> list[float | None]:
        return [test.p_corrected for test in corrected_results(tests, 0.05)]

    alone = [test.p for test in findings(draws)]
    # three that say the same cost nothing; three that know nothing of one another cost what Holm takes
    assert corrected(findings(draws[[0, 0, 0]])) == [alone[0]] * 3
    assert corrected(findings(draws)) == pytest.approx([3 * alone[0], 2 * alone[1], alone[2]], rel=0.25)  # type: ignore[operator]
    # one without permutations has its part of alpha, and takes it from the others
    span = StatisticResult("span", 0.5, 0.5, 0.05, 0.01, "said")
    assert corrected([*findings(draws[[0, 0]]), span]) == pytest.approx([1.5 * alone[0], 1.5 * alone[0], 0.03])  # type: ignore[operator]
    assert [test.verdict for test in corrected_results([*findings(draws[:1]), *findings(draws[:1], 0.05)], 0.05)] == [
        "fail",
        "pass",
    ]


def test_of_sets_with_nothing_wrong_at_most_alpha_fail_any_test() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        shared = rng.normal(size=200)  # what makes tests alike
        values = [0.8 * shared + rng.normal(size=200) for _ in range(5)]
        tests = corrected_results([finding_of("x", one, 0.0, "said", effect=1.0) for one in values], 0.2)
        alarms += any(test.verdict == "fail" for test in tests)
    assert 0.15 < alarms / 400 < 0.25


def test_p_is_the_rank_among_the_permutations() -> None:
    assert finding_of("x", np.array([5.0, *range(9)]), 0.1, "said").p == pytest.approx(0.5)
    assert finding_of("x", np.array([9.0, *range(9)]), 0.1, "said").p == pytest.approx(0.1)


def test_mmd_and_auc_are_what_their_definitions_say() -> None:
    rng = np.random.default_rng(0)
    pool = pooled(ValidationSamples(talk(30, 1), talk(20, 2), []), 1000, 0)
    vectors = rng.normal(size=(50, 5)).astype(np.float32)
    space = SampleSpace(pool, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 0)
    members = permuted(pool, 199, 0)
    kernel, own = space.kernel.astype(float), pool.is_synthetic
    inner = [kernel[np.ix_(side, side)][~np.eye(side.sum(), dtype=bool)].mean() for side in (own, ~own)]
    spread_of_all = 1 - kernel[~np.eye(50, dtype=bool)].mean()
    wanted = (sum(inner) - 2 * kernel[np.ix_(own, ~own)].mean()) / spread_of_all
    assert two_sample_tests.mmd_test(space, members, ValidationLimits()).statistic == pytest.approx(wanted, abs=1e-5)
    scores, labels = np.array([[0.9, 0.2, 0.5, 0.7]], np.float32), np.array([[1, 0, 0, 1]], np.float32)
    assert two_sample_tests._auc(scores, labels)[0] == 1
    assert two_sample_tests._auc(-scores, labels)[0] == 0


def test_topics_of_both_sides_show_a_drift_that_chance_does_not() -> None:
    rng = np.random.default_rng(0)
    pool = pooled(ValidationSamples(talk(100, 1), talk(100, 2), []), 1000, 0)
    centres = rng.normal(size=(8, 30))
    kinds = {
        "same": np.arange(200) % 8,
        "drifted": np.where(np.arange(200) < 70, np.arange(200) % 2, np.arange(200) % 8),
    }
    p = {}
    for name, kind in kinds.items():
        vectors = (centres[kind] + 0.7 * rng.normal(size=(200, 30))).astype(np.float32)
        space = SampleSpace(pool, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 0)
        assert [int(topic.max()) + 1 for topic in space.topics] == [8] * 3 + [16] * 3
        found = two_sample_tests.topics(space, permuted(pool, 199, 0), ValidationLimits())
        p[name] = found.p
    assert p["drifted"] == pytest.approx(1 / 200) and p["same"] > 0.1
    assert found.effect > 0.3


def test_diversity_scores_of_known_sets() -> None:
    same, apart_ = np.tile([[1.0, 0.0]], (4, 1)).astype(np.float32), np.eye(4, dtype=np.float32)
    assert diversity.vendi_score(same) == pytest.approx(1)
    assert diversity.vendi_score(apart_) == pytest.approx(4)
    assert diversity.self_bleu([["a", "b", "c", "d"]] * 3) == pytest.approx(1)
    assert diversity.self_bleu([["a", "b", "c", "d"], ["e", "f", "g", "h"]]) == 0


def test_outside_is_calibrated_on_reality() -> None:
    rng = np.random.default_rng(0)
    real, same = (rng.normal(size=(300, 8)) + 3 for _ in range(2))
    unit = [(some / np.linalg.norm(some, axis=1, keepdims=True)).astype(np.float32) for some in (real, same)]
    assert len(two_sample_tests.out_of_distribution(unit[1], unit[0], np.arange(300), 0.01)) <= 9
    far = -unit[1][:3]
    assert set(two_sample_tests.out_of_distribution(np.vstack([unit[1][3:], far]), unit[0], np.arange(300), 0.01)) >= {
        297,
        298,
        299,
    }


SOURCE = "The bridge was opened in 1932. It is 503 metres long and carries eight lanes of traffic across the harbour."


@pytest.mark.parametrize(
    ("answer", "quote", "fault"),
    [
        ("It was opened in 1932.", "The bridge was opened in 1932.", ""),
        ("It was opened in 1932.", "the bridge was  opened in 1932", ""),
        ("It was opened in 1931.", "The bridge was opened in 1932.", "1931"),
        ("It was opened in 1932.", "The bridge was built in 1932.", "does not stand"),
        ("Penguins live happily near frozen southern oceans.", "The bridge was opened in 1932.", "telling words"),
        ("It was opened in 1932.", "", "empty"),
    ],
)
def test_an_answer_is_held_against_the_span_that_it_cites(answer: str, quote: str, fault: str) -> None:
    row = example(f"{SOURCE}\n\nWhen was the bridge opened?", json.dumps({"answer": answer, "quote": quote}))
    faults, citing = citation_check.faults([row], {}, {})
    assert citing == 1
    assert (fault in faults.get(0, "")) if fault else not faults


def test_spans_by_line_by_place_and_none() -> None:
    document = Example((Message.of("assistant", SOURCE),), (Origin("a", "a:1"),))
    by_place = example("How long is it?", "It is 503 metres long.")
    start = SOURCE.index("It is")
    cited = dataclasses.replace(by_place, origins=(Origin("t", "doc:1", parents=(document.id,)),))
    wrong = dataclasses.replace(cited, messages=example("How long is it?", "It is 530 metres long.").messages)
    line = example("How long is it?", 'It is 503 metres long.\nSource: "It is 503 metres long"')
    faults, citing = citation_check.faults(
        [cited, wrong, line], {document.id: document}, dict.fromkeys((cited.id, wrong.id), (start, start + 50))
    )
    assert (set(faults), citing) == ({1}, 3)


def _write(path: Path, rows: list[Example], split: float = 0.0) -> Path:
    lines = [
        json.dumps(
            {"messages": [{"role": turn.role, "content": turn.text} for turn in row.messages], "group": row.group}
        )
        for row in rows
    ]
    path.with_suffix(".jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = {
        "sources": [{"path": str(path.with_suffix(".jsonl")), "licence": "CC0-1.0"}],
        "split": {"eval_fraction": split},
    }
    return Path(sartor.curate(recipe, path).dataset.path)


def test_the_verb_writes_what_is_accepted_and_queues_the_rest(tmp_path: Path) -> None:
    real = _write(tmp_path / "real", talk(200, 2), 0.5)
    seed = next(iter(read_examples(sartor.open(real), "train")))
    made = [*talk(80, 1), example(f"{seed.messages[0].text}!!", seed.reply, "copied")]
    synthetic = _write(tmp_path / "synthetic", made)
    found = sartor.validate(synthetic, real, options=QUICK, out=tmp_path / "accepted")
    assert found.passed, found.table()
    dataset = sartor.open(tmp_path / "accepted")
    kept, drops = list(read_examples(dataset)), list(read_drops(dataset))
    assert len(kept) == found.accepted == 81 - len(drops)
    assert "copy_of_seed" in {drop.reason for drop in drops} and seed.id in next(
        d.detail for d in drops if d.reason == "copy_of_seed"
    )
    queue = [json.loads(line) for line in (synthetic / "review.jsonl").read_text().splitlines()]
    assert {line["examples"][0] for line in queue} == {drop.id for drop in drops}
    assert found.rows["left_out"] == {} and found.rows["seeds"] == 100
    sartor.open(synthetic)  # the queue is no part of what the manifest lists
    assert json.loads(json.dumps(found.as_json()))["tests"]["mmd"]["verdict"] == "pass"


def test_failed_set_is_not_written_and_lines_of_others_stay(tmp_path: Path) -> None:
    """A second run replaces only its own lines of review.jsonl; a damaged file is refused and unchanged."""
    real = _write(tmp_path / "real", talk(160, 2), 0.5)
    synthetic = _write(tmp_path / "synthetic", talk(80, 1, ("garage",)))
    with pytest.raises(GateError, match="coverage"):
        sartor.validate(synthetic, real, options=QUICK, out=tmp_path / "accepted")
    assert not (tmp_path / "accepted").exists()
    file = synthetic / "review.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["reason"] for line in lines if "slice" in line} >= {"coverage", "topic"}
    others = [
        {"what": "finding", "kind": "label", "examples": ["x"]},
        {"what": "decision", "item": "9a", "verdict": "accept"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in (*lines, *others)))
    sartor.validate(synthetic, real, options=QUICK)
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again == [*others, *lines]
    sartor.open(synthetic)  # nor is the lock of its writers part of the manifest
    file.write_text("not JSON\n")
    with pytest.raises(SourceError, match=r"review.jsonl:1 is no JSON"):
        sartor.validate(synthetic, real, options=QUICK)
    assert file.read_text() == "not JSON\n"


def test_failed_tests_name_options_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tests have the limit of another name; each option is named once."""
    names = ("vendi", "distinct", "repeated", "copies_of_seeds", "copies_of_held_out", "mmd")
    tests = [StatisticResult(name, 1.0, effect=1.0, limit=0.1, p=0.0, detail="", verdict="fail") for name in names]
    result = Validated(tmp_path, tmp_path, {"synthetic": 60}, tests=tests, flaws=[], facts={})
    monkeypatch.setattr(validation, "validate_rows", lambda *given: result)
    synthetic, real = (_write(tmp_path / name, talk(60, seed), 0.5) for seed, name in enumerate(("synthetic", "real")))
    with pytest.raises(GateError) as refused:
        sartor.validate(synthetic, real, options=QUICK, out=tmp_path / "accepted")
    assert re.findall(r"--limits\.(\w+)", refused.value.remedy) == ["diversity", "copies", "mmd"]
    assert {"diversity", "copies", "mmd"} <= vars(ValidationLimits()).keys()


def test_files_are_read_as_they_are_and_seen_rows_are_left_out(tmp_path: Path) -> None:
    real = talk(60, 2)
    for name, rows in (("real", real), ("synthetic", talk(60, 1)), ("seeds", real[:10])):
        _write(tmp_path / name, rows)
    found = sartor.validate(
        tmp_path / "synthetic.jsonl", tmp_path / "real.jsonl", seeds=tmp_path / "seeds.jsonl", options=QUICK
    )
    assert found.rows["left_out"] == {"seen_by_the_generator": 10} and found.rows["real"] == 50
    assert found.review is None


def test_bad_input_says_what_to_do(tmp_path: Path) -> None:
    _write(tmp_path / "few", talk(10, 1))
    _write(tmp_path / "real", talk(60, 2))
    with pytest.raises(SourceError, match="10 synthetic rows"):
        sartor.validate(tmp_path / "few", tmp_path / "real")
    with pytest.raises(SourceError, match="nothing at"):
        sartor.validate(tmp_path / "absent", tmp_path / "real")
    with pytest.raises(ConfigError, match="no Dataset") as refused:
        sartor.validate(tmp_path / "real.jsonl", tmp_path / "real", out=tmp_path / "out")
    assert refused.value.remedy.startswith(f"sartor init {tmp_path / 'real.jsonl'} ")
    with pytest.raises(ConfigError, match="permutations"):
        ValidateOptions(permutations=10)


def test_rows_of_few_units_are_not_tested() -> None:
    same = [dataclasses.replace(row, group=f"g{place % 4}") for place, row in enumerate(talk(60, 1))]
    found = run(same, talk(60, 2), [])
    assert found.passed and {test.verdict for test in found.tests} == {"not tested"}
    assert "4 units" in found.tests[0].detail


def test_the_same_seed_gives_the_same_verdicts() -> None:
    one, other = (run(talk(60, 1), talk(60, 2), []).as_json() for _ in range(2))
    assert {**one, "wall_s": 0} == {**other, "wall_s": 0}


def test_negative_limit_is_refused_and_a_huge_one_passes() -> None:
    """NaN is refused too; no effect is above the huge limit."""
    for limit in (-0.1, float("nan")):
        with pytest.raises(ConfigError, match="span is .*; it must be at least 0"):
            ValidationLimits(span=limit)
    found = citation_check.consistency({0: "it is not there"}, 1, ["row"], ValidationLimits(span=5.0))
    assert corrected_results([found], 0.05)[0].verdict == "pass"


def test_rows_of_the_test_split_are_held_out_too(tmp_path: Path) -> None:
    """A Dataset without `eval`, but with `test`, is compared by its test rows; its training rows are the seeds."""
    rows = [replace(row, split="test" if index % 2 else "train") for index, row in enumerate(talk(120, seed=1))]
    samples = open_samples_of(rows, tmp_path)
    assert samples.real and {row.split for row in samples.real} == {"test"}
    assert samples.seeds and {row.split for row in samples.seeds} == {"train"}


def open_samples_of(rows: list[Example], folder: Path) -> ValidationSamples:
    """Samples of a validation whose real side is a Dataset with these splits."""
    with pytest.MonkeyPatch.context() as patch:
        synthetic = [replace(row, split="train") for row in talk(120, seed=2)]
        sides = {folder / "synthetic": (synthetic, []), folder / "real": (rows, [])}
        patch.setattr(samples_module, "_rows_of", sides.__getitem__)
        return samples_module.open_samples(folder / "synthetic", folder / "real", None)
