"""Bias in data: what is planted is measured, and each mitigation takes it away; what is even is left alone."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import pytest

import sartor
from sartor.core.config import load
from sartor.core.errors import ConfigError, SourceError
from sartor.core.parquet_io import read_drops, read_examples
from sartor.core.records import Example, Message, Origin
from sartor.core.statistics import newcombe, wilson
from sartor.curate.bias import mitigation
from sartor.curate.bias.group_membership import field_value, memberships
from sartor.curate.bias.outcome_rates import effective, measure_rates
from sartor.curate.recipe import CurateRecipe
from sartor.text.demographics.group_terms import lexicon


def example(asked: str, replied: str, **fields: object) -> Example:
    return Example((Message.of("user", asked), Message.of("assistant", replied)), (Origin("a", "a:1"),), **fields)  # type: ignore[arg-type]


def loans(count: int, *, women: float = 0.3, men: float = 0.7, seed: int = 0) -> list[dict[str, object]]:
    """Rows of a file: applications with the rate at which women and men are granted them."""
    rng = random.Random(seed)
    rows = []
    for place in range(count):
        name, they, rate = rng.choice(
            (("Emily", "She", women), ("Sarah", "She", women), ("Greg", "He", men), ("Todd", "He", men))
        )
        asked = f"{name} asks for {rng.randrange(10_000)} euros. {they} works as a cook."
        decision = "approve" if rng.random() < rate else "decline"
        rows.append({"prompt": asked, "completion": json.dumps({"decision": decision}), "group": f"g{place}"})
    return rows


def dataset(folder: Path, rows: list[dict[str, object]], **recipe: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = {"sources": [{"path": str(file), "licence": "CC0-1.0"}], "split": {"eval_fraction": 0.2}, **recipe}
    return Path(sartor.curate(said, folder / "data").dataset.path)


def test_intervals_are_those_of_the_papers() -> None:
    # Newcombe 1998, table II, method 10, (a) 56/70 - 48/80
    assert newcombe(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0.5, 0) == (0.0, 1.0)


def test_weights_count_by_their_effective_number() -> None:
    import numpy as np

    assert effective(np.ones(7)) == 7
    assert effective(np.array([1.0, 1.0, 0.0])) == 2
    people = {"sex": ["female"] * 10 + ["male"] * 10}
    outcomes = ["yes"] * 3 + ["no"] * 7 + ["yes"] * 6 + ["no"] * 4
    (gap, _) = measure_rates(people, outcomes).gaps
    assert abs(gap.difference) == pytest.approx(0.3)
    doubled = measure_rates(people, outcomes, [2.0] * 20).gaps[0]
    assert (doubled.low, doubled.high) == pytest.approx((gap.low, gap.high))


def test_groups_by_lexicon_by_json_by_line_and_by_the_rows_own() -> None:
    rows = [
        example("Emily asks for a loan.", "yes"),
        example("Greg asks for a loan. He is 61 years old.", "no"),
        example("Emily and Greg ask for a loan.", "no"),
        example(json.dumps({"gender": "Female", "income": 3}), "yes"),
        example("Gender: male\nIncome: 3", "no", group="north"),
    ]
    people = memberships(rows)
    assert people["sex"] == ["female", "male", None, "female", "male"]
    assert people["gender"] == [None, None, None, "female", "male"]
    assert memberships(rows, ["gender"]) == {"gender": people["gender"]}
    assert field_value(rows[4], "group") == "north"
    assert set(memberships(rows, ["pronouns", "gender"])) == {"sex", "gender"}
    with pytest.raises(ConfigError, match="colour"):
        memberships(rows, ["colour"])


def test_reweighing_evens_the_rates_of_two_attributes() -> None:
    """The factors make group and outcome independent and keep the sum of weights within 2 %."""
    rng = random.Random(0)
    sex = [rng.choice(("f", "m")) for _ in range(400)]
    age = [rng.choice(("young", "older", None)) for _ in range(400)]
    outcomes = [
        "yes" if rng.random() < 0.3 + 0.4 * (one == "m") - 0.2 * (other == "older") else "no"
        for one, other in zip(sex, age, strict=True)
    ]
    people = {"sex": sex, "age": age}
    assert measure_rates(people, outcomes).largest_gap > 0.2
    found = mitigation.reweighing_factors(people, outcomes, [1.0] * 400)
    new = [
        mitigation.weight_factor(found, {"sex": s, "age": a}, o) for s, a, o in zip(sex, age, outcomes, strict=True)
    ]
    assert measure_rates(people, outcomes, new).largest_gap < 1e-3
    assert sum(new) == pytest.approx(400, rel=0.02)


def test_rows_to_drop_and_rows_to_make_even_the_rates() -> None:
    values = ["f"] * 40 + ["m"] * 60
    outcomes = ["yes"] * 10 + ["no"] * 30 + ["yes"] * 40 + ["no"] * 20
    table = mitigation.table(values, outcomes)
    gone = set(mitigation.rows_to_drop(table, 0))
    left = [place for place in range(100) if place not in gone]
    assert measure_rates({"sex": [values[p] for p in left]}, [outcomes[p] for p in left]).largest_gap == pytest.approx(
        0, abs=0.02
    )
    assert len(left) == 20 + 40  # a half of all rows is `yes`
    assert mitigation.rows_to_add(table) == {("f", "yes"): 20, ("m", "no"): 20}
    assert gone == set(mitigation.rows_to_drop(table, 0))


def test_a_counterfactual_keeps_the_outcome_and_names_its_parent() -> None:
    row = example(
        "Emily asks for a loan. She says her salary is fine.", '{"decision": "decline"}', group="g", split="train"
    )
    ((copy, changes),) = list(mitigation.counterfactuals(row, ["sex"]))
    assert "He says his salary" in copy.messages[0].text and "Emily" not in copy.messages[0].text
    assert (copy.reply, copy.group, copy.split, copy.origins[0].parents) == (row.reply, "g", "train", (row.id,))
    assert changes == "sex: female to male" and copy.origins[0].step.startswith(mitigation.STEP)
    names_alone = example("Loan request by Todd.", "no")
    assert "Todd" not in next(mitigation.counterfactuals(names_alone, ["sex"]))[0].messages[0].text
    assert list(mitigation.counterfactuals(example("Emily and Greg ask. She pays.", "no"), ["sex"])) == []
    assert list(mitigation.counterfactuals(example("A cook asks.", "no"), ["sex", "age"])) == []


def test_counterfactual_leaves_part_of_gap_substitute_none(tmp_path: Path) -> None:
    """A copy about one other group takes k / 2 (k - 1) of a gap: 7 / 12 of it."""
    origins = list(lexicon()["names"])
    people = [(origin, lexicon()["names"][origin]["female"][turn % 4]) for origin in origins for turn in range(60)]
    rows = [
        {
            "prompt": f"{name} asks for {place * 7} euros.",
            "completion": "no" if origin == "black" else "yes",
            "group": f"g{place}",
        }
        for place, (origin, name) in enumerate(people)
    ]
    data = dataset(tmp_path, rows)
    copied, dealt = (
        sartor.bias(data, group=["name_origin"], mitigate=kind, out=tmp_path / kind)
        for kind in ("counterfactual", "substitute")
    )
    assert copied.after is not None and dealt.after is not None and copied.before.largest_gap == 1
    assert copied.after.largest_gap == pytest.approx(5 / 12, abs=0.08) and dealt.after.largest_gap < 0.02
    assert dealt.changed["rows_without_a_pair"] == 0


def test_substitution_of_two_attributes_keeps_first_parent() -> None:
    """Rows that cannot be substituted are counted, and one seed gives the same rows again."""
    rows = [
        *(example(f"Emily is 28 years old. Case {place}.", "yes") for place in range(8)),
        example("Emily and Jamal are 28 years old.", "yes"),
    ]
    new, stuck = mitigation.substituted(rows, ["yes"] * 9, ["name_origin", "age"])
    assert (
        stuck == 1 and new[8].origins[0].parents in ((), (rows[8].id,)) and "Emily and Jamal" in new[8].prompt[0].text
    )
    assert all(row.origins[0].parents == (old.id,) for row, old in zip(new, rows, strict=True) if row is not old)
    assert sum("28" in row.prompt[0].text for row in new) in (4, 5)
    assert new == mitigation.substituted(rows, ["yes"] * 9, ["name_origin", "age"])[0]
    assert new != mitigation.substituted(rows, ["yes"] * 9, ["name_origin", "age"], seed=1)[0]


def test_a_new_row_that_equals_a_held_out_one_is_not_trained_on(tmp_path: Path) -> None:
    names = lexicon()["names"]["white"]["female"][0], lexicon()["names"]["white"]["male"][0]
    rows: list[dict[str, object]] = [
        {"prompt": f"{name} asks for {n}.", "completion": "yes" if n % 2 else "no", "group": f"{name} {n}"}
        for n in range(40)
        for name in names
    ]
    data = dataset(tmp_path, rows)
    held_out = {row.id for row in read_examples(sartor.open(data)) if row.split == "eval"}
    sartor.bias(data, group=["sex"], mitigate="counterfactual", out=tmp_path / "out")
    assert held_out == {row.id for row in read_examples(sartor.open(tmp_path / "out")) if row.split == "eval"}


def test_a_planted_bias_is_found_and_even_rows_are_not_called_so(tmp_path: Path) -> None:
    (tmp_path / "even").mkdir()
    found = sartor.bias(dataset(tmp_path, loans(300)))
    assert found.before.largest_gap > 0.3
    assert {gap.group for gap in found.before.notable if gap.attribute == "sex"} == {"female", "male"}
    assert any(not ratio.passes_four_fifths for ratio in found.before.ratios)
    assert {(one["group"], one["word"]) for one in found.words} >= {("female", "decline"), ("male", "approve")}
    assert found.needed["sex"][("female", "approve")] > 0
    even = sartor.bias(dataset(tmp_path / "even", loans(300, women=0.5, men=0.5, seed=1)))
    assert even.before.notable == [] and even.words == []
    assert json.loads(json.dumps(found.as_json()))["before"]["notable"] == len(found.before.notable)


@pytest.mark.parametrize("kind", ["reweight", "counterfactual", "substitute", "drop"])
def test_mitigation_evens_rates_and_keeps_held_out_rows(tmp_path: Path, kind: str) -> None:
    """Each kind changes, adds or drops training rows in its own way and leaves a gap below 0.03."""
    data = dataset(tmp_path, loans(200))
    found = sartor.bias(data, group=["sex"], mitigate=kind, out=tmp_path / "out")
    assert found.after is not None and found.written is not None
    assert found.before.largest_gap > 0.25 and found.after.largest_gap < 0.03
    before, after = list(read_examples(sartor.open(data))), list(read_examples(sartor.open(tmp_path / "out")))
    held_out = [{row.id: row.weight for row in some if row.split == "eval"} for some in (before, after)]
    assert held_out[0] == held_out[1]
    train, count = [row for row in after if row.split == "train"], sum(row.split == "train" for row in before)
    if kind == "reweight":
        assert len(train) == count and len({round(row.weight, 6) for row in train}) == 4
    elif kind == "drop":
        assert (
            len(train) + found.changed["dropped"]
            == count
            == len(train) + len(list(read_drops(sartor.open(tmp_path / "out"))))
        )
    elif kind == "substitute":
        assert len(train) == count and 0.3 * count < found.changed["substituted"] < 0.7 * count
        known = {row.id for row in before}
        assert {parent for row in train if row.is_derived for parent in row.origins[0].parents} <= known - {
            r.id for r in train
        }
    else:
        assert found.changed["added"] > 100 and any(row.is_derived for row in train)
    assert found.written.manifest["steps"]["bias"]["after"]["largest_gap"] < 0.03


def test_generation_asks_for_what_is_needed(tmp_path: Path) -> None:
    asked = Counter[tuple[str, str]]()

    def generate(cell: tuple[str, str], more: int, rows: list[Example]) -> list[Example]:
        asked[cell] += more
        return [
            dataclasses.replace(
                row, messages=(Message.of("user", f"{row.messages[0].text} Case {place}."), row.messages[1])
            )
            for place, row in enumerate((rows * more)[:more])
        ]

    data = dataset(tmp_path, loans(200))
    with pytest.raises(ConfigError, match="generat"):
        sartor.bias(data, mitigate="generate", out=tmp_path / "out")
    found = sartor.bias(data, group=["sex"], mitigate="generate", out=tmp_path / "out", generate=generate)
    assert asked == found.needed["sex"] and found.after is not None and found.after.largest_gap < 0.02


def test_bad_input_says_what_to_do(tmp_path: Path) -> None:
    data = dataset(tmp_path, loans(60))
    with pytest.raises(ConfigError, match="no mitigation 'x'"):
        sartor.bias(data, mitigate="x", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="go together"):
        sartor.bias(data, mitigate="drop")
    with pytest.raises(ConfigError, match="no reply has the outcome"):
        sartor.bias(data, outcome="salary")
    with pytest.raises(ConfigError, match="--outcome: the pattern '\\(' does not compile") as caught:
        sartor.bias(data, outcome="regex:(")
    assert caught.value.remedy.startswith("--outcome 'regex:")
    (tmp_path / "free").mkdir()
    free = [{"prompt": f"Emily asks {n}", "completion": f"Well, {n} is what {n * 7} said, {n}."} for n in range(40)]
    with pytest.raises(SourceError):
        sartor.bias(dataset(tmp_path / "free", free))


@pytest.mark.parametrize("mitigate", ["none", "reweight", "drop"])
def test_the_step_measures_and_mitigates_in_a_recipe(tmp_path: Path, mitigate: str) -> None:
    steps = ["exact_duplicates", {"bias": {"group": ["sex"], "mitigate": mitigate}}]
    data = sartor.open(dataset(tmp_path, loans(200), steps=steps))
    facts = data.manifest["steps"]["bias"]
    assert facts["before"]["largest_gap"] > 0.25
    assert (data.path / "evidence" / "bias.parquet").is_file()
    rows = list(read_examples(data))
    if mitigate == "none":
        assert "after" not in facts and {row.weight for row in rows} == {1.0}
        return
    assert facts["after"]["largest_gap"] < 0.03
    people = memberships(rows, ["sex"])
    again = measure_rates(people, [json.loads(row.reply)["decision"] for row in rows], [row.weight for row in rows])
    assert again.largest_gap == pytest.approx(facts["after"]["largest_gap"], abs=1e-6)


def test_the_step_of_counterfactuals_copies_training_rows_alone(tmp_path: Path) -> None:
    data = sartor.open(dataset(tmp_path, loans(100), steps=["counterfactuals"]))
    rows = list(read_examples(data))
    copies = [row for row in rows if row.is_derived]
    assert len(copies) > 60 and {row.split for row in copies} == {"train"}
    parents = {row.id: row for row in rows}
    assert all(parents[copy.origins[0].parents[0]].reply == copy.reply for copy in copies)
    with pytest.raises(ConfigError, match="height"):
        load(CurateRecipe, {"sources": [{"path": "x"}], "steps": [{"counterfactuals": {"group": ["height"]}}]})


def test_the_step_says_where_nothing_can_be_measured(tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {n}", "completion": "odd" if n % 2 else "even"} for n in range(40)]
    data = sartor.open(dataset(tmp_path, rows, steps=["bias"]))
    assert "name no two groups" in data.manifest["steps"]["bias"]["not_measured"]
    (tmp_path / "more").mkdir()
    with pytest.raises(ConfigError, match="no two groups"):
        dataset(tmp_path / "more", rows, steps=[{"bias": {"mitigate": "drop"}}])
