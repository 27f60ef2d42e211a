"""The person's queue: what is found becomes one item, what people decide is kept beside each other, and a Dataset is made of it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

import sartor
from postgres_server import postgres
from rows import row
from sartor.core import database, signing
from sartor.core.errors import ArtifactError, BusyError, ConfigError, ConflictError, SignatureError, SourceError
from sartor.core.parquet_io import example_row, read_drops, read_examples
from sartor.core.records import Example
from sartor.curate.dataset_writer import kept_by_file
from sartor.curate.review import review_file, review_store
from sartor.curate.review.review_items import item_of
from sartor.curate.review.review_store import Queue

MAIL = "write to bob@example.com"
QUESTIONS = [
    f"{verb} the {thing}?" for verb in ("Where is", "Who has", "May I buy") for thing in ("key", "lamp", "map", "cup")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of two sources, one of which an image step or the like might have copied."""
    folder = tmp_path_factory.mktemp("review")
    with (folder / "rows.jsonl").open("w") as stream:
        for number, question in enumerate(QUESTIONS):
            reply = MAIL if number == 0 else f"answer {number}"
            stream.write(json.dumps({"prompt": question, "completion": reply}) + "\n")
    recipe = {
        "sources": [{"path": str(folder / "rows.jsonl"), "licence": "CC-BY-4.0"}],
        "split": {"eval_fraction": 0.25},
        "workers": 1,
    }
    sartor.curate(recipe, folder / "data")
    return folder / "data"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SYNCHRONOUS", "off")
    monkeypatch.delenv(review_store.VARIABLE, raising=False)


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def rows_in(dataset: Path) -> dict[str, Example]:
    return {example.prompt[-1].text: example for example in read_examples(sartor.open(dataset))}


def found(dataset: Path, number: int, **more: Any) -> dict[str, Any]:
    """A finding about the row of a question."""
    example = rows_in(dataset)[QUESTIONS[number]].id
    return {
        "kind": "validation",
        "example": example,
        "reason": "near_copy",
        "evidence": {"likeness": 0.9},
        "origin": "test",
        **more,
    }


def add(dataset: Path, *said: Mapping[str, Any]) -> list[str]:
    """Put findings into the queue; returns the ids of their items."""
    sartor.review_add(dataset, said)
    return [item_of(one, content_digest=review_file.content_of(sartor.open(dataset))).id for one in said]


def decide(dataset: Path, item: str, verdict: str, by: str = "Ada", **options: Any) -> dict[str, Any]:
    return dict(sartor.review_decide(dataset, [item], sartor.Opinion(verdict, by, **options))["decisions"][0])


def test_findings_file_survives_concurrent_writers(data: Path) -> None:
    """Each writer waits for the others and replaces only its own findings; an unknown kind is refused."""

    def write(origin: str) -> None:
        for number in range(4):
            review_file.renew(data, origin, [found(data, number)])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, [f"check {number}" for number in range(8)]))
    written = [json.loads(line) for line in (data / review_file.FILE).read_text().splitlines()]
    assert sorted(line["origin"] for line in written) == [f"check {number}" for number in range(8)]
    assert {line["example"] for line in written} == {found(data, 3)["example"]}
    with pytest.raises(SourceError, match="kind"):
        review_file.renew(data, "check 0", [{"kind": "nonsense"}])
    assert len((data / review_file.FILE).read_text().splitlines()) == 8


def test_equal_findings_are_one_item_and_reading_adds_no_file(data: Path) -> None:
    """A finding with another reason or about another row is an item of its own."""
    assert sartor.open_items(data) == 0 and not (data.parent / review_store.FILE).exists()
    sartor.review_list(data)
    assert not (data.parent / review_store.FILE).exists()
    one = found(data, 1)
    assert sartor.review_add(data, [one, one])["new"] == 1
    again = sartor.review_add(data, [{**one, "detail": "the same, in other words", "evidence": {"likeness": 0.8}}])
    assert again["new"] == 0 and sartor.open_items(data) == 1
    add(data, found(data, 1, reason="off_topic"), found(data, 2))
    assert sartor.open_items(data) == 3
    assert sartor.review_list(data, kind="label")["listed"] == 0 and sartor.review_list(data, most=2)["more"] == 1


def test_findings_in_review_jsonl_are_open_items(data: Path) -> None:
    """They count before the queue is first opened; a finding about an unknown row does not."""
    (data / "review.jsonl").write_text(
        json.dumps(found(data, 3)) + "\n\n" + json.dumps({**found(data, 3), "example": "0" * 32}) + "\n"
    )
    assert sartor.open_items(data) == 1, "a row that is not here is no item of this Dataset"
    item = sartor.review_list(data)["items"][0]["id"]
    assert decide(data, item[:6], "accept")["state"] == "decided"
    assert sartor.open_items(data) == 0


def test_conflicting_decisions_stay_open_until_settled(data: Path) -> None:
    """Both decisions are kept, others review without seeing them, and a reviewer may change a decision."""
    (item,) = add(data, found(data, 1))
    assert decide(data, item, "accept")["state"] == "decided"
    assert decide(data, item, "accept")["new"] is False
    assert sartor.open_items(data, reviewers=2) == 1
    with pytest.raises(ConflictError, match="nothing to settle.*Ada"):
        decide(data, item, "reject", "Cy", settles=True)
    assert decide(data, item, "reject", "Ben", reason="a copy")["state"] == "conflict"
    assert sartor.review_counts(data) == {"open": 1, "conflicts": 1, "accepted": 0, "edited": 0, "rejected": 0}
    blind = sartor.review_list(data, by="Cy")["items"]
    assert [one["id"] for one in blind] == [item] and "by" not in blind[0] and "state" not in blind[0]
    assert sartor.review_list(data, by="Ben")["items"] == []
    assert decide(data, item, "accept", "Ben")["state"] == "decided", "one of them may come round"
    decide(data, item, "reject", "Ben")
    settled = decide(data, item, "reject", "Cy", settles=True, reason="seen both")
    assert (settled["state"], settled["holds"]) == ("decided", "reject")
    shown = sartor.review_show(data, item)
    assert [(one["by"], one["verdict"]) for one in shown["decisions"]] == [
        ("Ada", "accept"),
        ("Ben", "reject"),
        ("Ben", "accept"),
        ("Ben", "reject"),
        ("Cy", "reject"),
    ]
    assert sartor.open_items(data, reviewers=2) == 0


def test_two_edits_agree_when_they_say_the_same(data: Path) -> None:
    (item,) = add(data, found(data, 1, suggestion={"reply": "on the hook"}))
    assert decide(data, item, "edit")["state"] == "decided"
    assert decide(data, item, "edit", "Ben", change={"reply": "on the hook"})["state"] == "decided"
    assert decide(data, item, "edit", "Ben", change={"reply": "elsewhere"})["state"] == "conflict"


def test_what_an_item_cannot_have_decided_about_it_is_refused(data: Path) -> None:
    other = rows_in(data)[QUESTIONS[2]].id
    plain, both, part = add(
        data,
        found(data, 1),
        {**found(data, 1), "examples": [rows_in(data)[QUESTIONS[1]].id, other]},
        {"kind": "bias", "slice": "group=women", "reason": "lower_rate", "evidence": {"gap": 0.2}},
    )
    refused = [
        (plain, "edit", {}, "suggests no change"),
        (plain, "edit", {"change": {"colour": "red"}}, "an edit says colour"),
        (plain, "edit", {"change": {"reply": "answer 1"}}, "leaves row"),
        (plain, "edit", {"change": {"reply": " "}}, "empty turn"),
        (plain, "edit", {"change": {"turns": {"7": "x"}}}, "no turn '7'"),
        (plain, "edit", {"change": {"weight": -1}}, "weight is -1"),
        (plain, "edit", {"change": {"label": "json:intent", "value": "x"}}, "no label json:intent"),
        (both, "edit", {"change": {"reply": "x"}}, "about 2 rows"),
        (part, "reject", {}, "names no row"),
        ("ffff", "accept", {}, "no item 'ffff'"),
    ]
    for item, verdict, options, words in refused:
        with pytest.raises((ConfigError, SourceError), match=words) as caught:
            decide(data, item, verdict, **options)
        assert caught.value.remedy
    for by in ("", " ", "a\nb", "x" * 201):
        with pytest.raises(ConfigError):
            sartor.Opinion("accept", by)
    with pytest.raises(ConfigError, match="no verdict 'maybe'"):
        sartor.Opinion("maybe", "Ada")
    assert sartor.review_counts(data)["open"] == 3


def test_apply_makes_drops_and_children_and_carries_what_is_open(data: Path, tmp_path: Path) -> None:
    before = rows_in(data)
    items = add(
        data,
        found(data, 1),
        found(data, 2, suggestion={"reply": "on the wall"}),
        found(data, 3),
        found(data, 4, kind="label"),
        found(data, 5),
    )
    decide(data, items[0], "reject", reason="a copy of row 7")
    decide(data, items[1], "edit")
    decide(data, items[2], "accept")
    decide(data, items[4], "accept")
    decide(data, items[4], "reject", "Ben")
    said = sartor.review_apply(data, tmp_path / "new")
    assert {
        name: said[name] for name in ("accepted", "edited", "rejected", "rows_changed", "rows_dropped", "open", "kept")
    } == {
        "accepted": 1,
        "edited": 1,
        "rejected": 1,
        "rows_changed": 1,
        "rows_dropped": 1,
        "open": 2,
        "kept": 11,
    }
    after, made = rows_in(tmp_path / "new"), sartor.open(tmp_path / "new")
    assert QUESTIONS[1] not in after and list(after) == [question for question in before if question != QUESTIONS[1]]
    edited, old = after[QUESTIONS[2]], before[QUESTIONS[2]]
    assert edited.reply == "on the wall" and edited.steps[-1] == "review"
    assert [origin.parents for origin in edited.origins] == [(old.id,)] and edited.origins[0].locator == old.origins[
        0
    ].locator
    (drop,) = read_drops(made)
    assert (drop.reason, drop.step, drop.id) == ("review", "review", before[QUESTIONS[1]].id)
    assert "rejected by Ada at 20" in drop.detail and "a copy of row 7" in drop.detail and "answer 1" in drop.text
    counts = made.manifest["counts"]
    assert counts["read"] + counts["made"] == counts["kept"] + sum(counts["dropped"].values())
    assert made.manifest["sources"][0]["kept"] == 11 and made.licence == "CC-BY-4.0", (
        "an edited row is still its source's"
    )
    assert made.manifest["parents"][0]["id"] == sartor.open(data).id
    assert "review.jsonl" not in made.manifest["files"], "later findings and decisions are added to it"
    assert len(review_file.read_review_file(tmp_path / "new" / "evidence" / "review.jsonl").decisions) == 3
    assert sartor.inspect(tmp_path / "new", example=edited.id)["ancestors"][0]["id"] == old.id
    assert sartor.open_items(tmp_path / "new") == 2 and sartor.review_counts(tmp_path / "new")["accepted"] == 1
    assert sartor.review_counts(tmp_path / "new")["conflicts"] == 1
    with pytest.raises(ConfigError, match="exists"):
        sartor.review_apply(data, tmp_path / "new")


def test_apply_again_changes_nothing_more_and_the_record_grows(data: Path, tmp_path: Path) -> None:
    fresh = row("Is it new?", "yes, made up", split="train")
    one, two, three = add(
        data,
        found(data, 1),
        {"kind": "synthetic", "reason": "uncertain", "row": example_row(fresh)},
        {"kind": "synthetic", "reason": "uncertain", "row": example_row(row("Bad?", "bad"))},
    )
    decide(data, one, "reject")
    decide(data, two, "accept")
    decide(data, three, "reject")
    first = sartor.review_apply(data, tmp_path / "one")
    assert first["rows_added"] == 1 and first["kept"] == 12
    (added,) = [example for example in rows_in(tmp_path / "one").values() if example.id == fresh.id]
    assert added.split == "train" and added.group
    second = sartor.review_apply(tmp_path / "one", tmp_path / "two")
    assert second["kept"] == 12 and (second["rows_added"], second["rows_dropped"], second["rows_changed"]) == (0, 0, 0)
    assert {drop.reason for drop in read_drops(sartor.open(tmp_path / "two"))} == {"review"}
    assert len(list(read_drops(sartor.open(tmp_path / "two")))) == 2
    lines = review_file.read_review_file(tmp_path / "two" / "review.jsonl")
    assert len(lines.decisions) == 3 and set(lines.items) == {one, two, three}


def test_a_weight_is_given_once(data: Path, tmp_path: Path) -> None:
    """An edit of the weight leaves the row's id, by which later reviews know other edits as done."""
    (item,) = add(data, found(data, 1))
    decide(data, item, "edit", change={"weight": 0.5})
    first = sartor.review_apply(data, tmp_path / "one")
    second = sartor.review_apply(tmp_path / "one", tmp_path / "two")
    assert (first["rows_changed"], second["rows_changed"]) == (1, 0) and first["kept"] == second["kept"]
    assert sorted(one.weight for one in rows_in(tmp_path / "two").values())[:2] == [0.5, 1.0]


def test_edited_row_joins_its_group_or_drops_as_duplicate(data: Path, tmp_path: Path) -> None:
    """An edited question equal to a held-out one moves its row there; an equal row is an exact_duplicate."""
    rows = rows_in(data)
    held_out = next(one for one in rows.values() if one.split == "eval")
    learnt = [one for one in rows.values() if one.split == "train"]
    items = add(
        data,
        {**found(data, 1), "example": learnt[0].id},
        {**found(data, 1), "example": learnt[1].id},
    )
    decide(data, items[0], "edit", change={"prompt": held_out.prompt[-1].text})
    decide(data, items[1], "edit", change={"prompt": learnt[2].prompt[-1].text, "reply": learnt[2].reply})
    said = sartor.review_apply(data, tmp_path / "new")
    made = sartor.open(tmp_path / "new")
    groups: dict[str, set[str]] = {}
    for example in read_examples(made):
        groups.setdefault(example.group, set()).add(example.split)
    assert all(len(splits) == 1 for splits in groups.values()), "a group that straddles the split would leak"
    moved = [example for example in read_examples(made) if example.reply == learnt[0].reply]
    assert [one.split for one in moved] == ["eval"]
    assert said["rows_equal_to_others"] == 1
    (drop,) = read_drops(made)
    assert (drop.reason, drop.kept) == ("exact_duplicate", learnt[2].id)


def test_derived_row_is_dropped_with_its_rejected_parent(data: Path, tmp_path: Path) -> None:
    """With keep_derived it stays."""
    parent = rows_in(data)[QUESTIONS[1]]
    child = row("Where might the lamp be?", "answer 1")
    child = Example(
        child.messages,
        (sartor.Origin("rows.jsonl", "rows.jsonl:2", parents=(parent.id,), step="vary"),),
        split="train",
    )
    (item,) = add(data, {"kind": "synthetic", "reason": "made", "row": example_row(child)})
    decide(data, item, "accept")
    sartor.review_apply(data, tmp_path / "more")
    assert sartor.open(tmp_path / "more").manifest["counts"]["made"] == 1
    (wrong,) = add(tmp_path / "more", {**found(data, 1), "reason": "wrong"})
    decide(tmp_path / "more", wrong, "reject")
    said = sartor.review_apply(tmp_path / "more", tmp_path / "less")
    assert (said["rows_dropped"], said["rows_dropped_with_their_parent"], said["kept"]) == (1, 1, 11)
    detail = {drop.id: drop.detail for drop in read_drops(sartor.open(tmp_path / "less"))}[child.id]
    assert f"made of row {parent.id}, which was rejected" in detail
    assert sartor.review_apply(tmp_path / "more", tmp_path / "kept", keep_derived=True)["kept"] == 12


def test_an_edited_synthetic_row_keeps_its_mark(data: Path, tmp_path: Path) -> None:
    child = row("Where might the lamp be?", "here")
    child = Example(child.messages, (sartor.Origin("made", "made:1", parents=("0" * 32,), step="vary"),))
    (item,) = add(data, {"kind": "synthetic", "reason": "made", "row": example_row(child)})
    decide(data, item, "edit", change={"reply": "there"})
    sartor.review_apply(data, tmp_path / "new")
    edited = rows_in(tmp_path / "new")["Where might the lamp be?"]
    assert (edited.origins[0].step, edited.origins[0].parents) == ("vary", (child.id,)) and edited.reply == "there"
    assert ("made", "made") not in kept_by_file(tmp_path / "new")


def test_edited_row_without_parents_stays_marked_synthetic(data: Path, tmp_path: Path) -> None:
    """The edited row names the original as its parent and is counted under the original source."""
    made = Example(
        row("Say hello.", "hello").messages,
        (sartor.Origin("synthesize:fill", "fill:1", "CC0-1.0", (), "synthesize:fill"),),
    )
    (item,) = add(data, {"kind": "synthetic", "reason": "made", "row": example_row(made)})
    decide(data, item, "edit", change={"reply": "good day"})
    sartor.review_apply(data, tmp_path / "new")
    (origin,) = rows_in(tmp_path / "new")["Say hello."].origins
    assert origin.step.startswith("synthesize:fill") and origin.parents == (made.id,)
    assert kept_by_file(tmp_path / "new")["synthesize:fill", "fill"] == 1


def test_different_edits_are_refused_and_a_reject_wins(data: Path, tmp_path: Path) -> None:
    """The error names both items; once the row is rejected it is dropped."""
    one, two, three = add(data, found(data, 1), found(data, 1, reason="other"), found(data, 1, reason="third"))
    decide(data, one, "edit", change={"reply": "x"})
    decide(data, two, "edit", change={"reply": "y"})
    with pytest.raises(ConflictError, match=f"{one} and {two}|{two} and {one}") as caught:
        sartor.review_apply(data, tmp_path / "new")
    assert caught.value.remedy.endswith(" --by NAME")
    decide(data, three, "reject")
    said = sartor.review_apply(data, tmp_path / "new")
    assert (said["rows_dropped"], said["rows_changed"]) == (1, 0)


def test_personal_data_found_is_written_nowhere(data: Path, tmp_path: Path) -> None:
    span = {"entity": "email", "place": "messages[1].content", "start": 9, "end": 24, "score": 0.9}
    said = found(
        data, 0, kind="personal", reason="personal_data", evidence={"spans": [span]}, suggestion={"mask": True}
    )
    for more in (
        {"detail": MAIL},
        {"evidence": {"spans": [{**span, "text": "bob@example.com"}]}},
        {"evidence": {"text": MAIL}},
        {"suggestion": {"reply": MAIL}},
        {"slice": MAIL},
    ):
        with pytest.raises(SourceError, match="only id, kind and span") as caught:
            sartor.review_add(data, [{**said, **more}])
        assert "bob@" not in str(caught.value)
    (item,) = add(data, said)
    shown = sartor.review_show(data, item)
    assert "bob@" not in json.dumps(shown) and "<EMAIL_1>" in json.dumps(shown)
    assert "bob@example.com" in json.dumps(sartor.review_show(data, item, reveal=True))
    decide(data, item, "reject", reason="that is bob@example.com, remove it")
    sartor.review_apply(data, tmp_path / "gone")
    decide(data, item, "edit", "Ben")
    decide(data, item, "edit", "Cy", settles=True)
    sartor.review_apply(data, tmp_path / "masked")
    assert rows_in(tmp_path / "masked")[QUESTIONS[0]].reply == "write to <EMAIL_1>"
    written = [
        file for folder in (tmp_path / "gone", tmp_path / "masked") for file in folder.rglob("*") if file.is_file()
    ]
    for file in [*written, *tmp_path.glob("review.sqlite*")]:
        assert b"bob@" not in file.read_bytes(), file
    (drop,) = read_drops(sartor.open(tmp_path / "gone"))
    assert drop.text == "" and drop.id == said["example"]
    for drops in (tmp_path / "gone", tmp_path / "masked"):
        assert "bob@" not in "".join(repr(vars(drop)) for drop in read_drops(sartor.open(drops)))


def test_decisions_are_signed_and_a_forged_one_is_refused(data: Path, tmp_path: Path) -> None:
    """They are signed if there is a key; unsigned ones stay open with signed=True, unknown keys are named."""
    (item,) = add(data, found(data, 1))
    key = signing.keygen(tmp_path / "ada", trust=True, purposes=("review",))
    decide(data, item, "accept", key=tmp_path / "ada")
    assert sartor.review_show(data, item)["decisions"][0]["signed_by"] == key["key_id"]
    (other,) = add(data, found(data, 2))
    decide(data, other, "accept")
    assert sartor.open_items(data) == 0 and sartor.open_items(data, signed=True) == 1
    sartor.review_export(data, tmp_path / "out.jsonl")
    text = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "forged.jsonl").write_text(text.replace('"by":"Ada"', '"by":"Eve"'))
    with pytest.raises(SignatureError, match="Eve"):
        sartor.review_import(data, tmp_path / "forged.jsonl")
    assert sartor.review_import(data, tmp_path / "out.jsonl") == {
        "findings": 2,
        "new": 0,
        "of_other_rows": 0,
        "decisions": 2,
        "new_decisions": 0,
        "signed": 1,
    }
    signing.keygen(Path(os.environ["SARTOR_HOME"]) / "keys" / "review", purposes=("review",))
    decide(data, other, "accept", "Ben")
    assert sartor.review_show(data, other)["decisions"][1]["signed_by"] == "an unknown key", (
        "a key that this machine does not trust"
    )
    with pytest.raises(ConfigError, match="exists"):
        sartor.review_export(data, tmp_path / "out.jsonl")


def test_a_review_elsewhere_comes_back_by_a_file(data: Path, tmp_path: Path) -> None:
    (item,) = add(data, found(data, 1))
    sartor.review_export(data, tmp_path / "out.jsonl")
    shutil.copytree(data, tmp_path / "there" / "data")
    sartor.review_import(tmp_path / "there" / "data", tmp_path / "out.jsonl")
    decide(tmp_path / "there" / "data", item, "reject", "Ben")
    sartor.review_export(tmp_path / "there" / "data", tmp_path / "back.jsonl")
    assert sartor.review_import(data, tmp_path / "back.jsonl")["new_decisions"] == 1
    assert sartor.review_counts(data)["rejected"] == 1
    alone = [line for line in (tmp_path / "back.jsonl").read_text().splitlines() if '"decision"' in line]
    (tmp_path / "alone.jsonl").write_text(alone[0].replace(item, "f" * 16) + "\n")
    with pytest.raises(ConfigError, match="no item of it"):
        sartor.review_import(data, tmp_path / "alone.jsonl")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        ('{"kind": "odd", "example": "a"}', "kind is 'odd'"),
        ('{"kind": "label"}', "neither rows nor a slice"),
        ('{"kind": "label", "examples": "a"}', "examples are a str"),
        ('{"kind": "label", "example": "a", "evidence": 3}', "evidence is a int"),
        ('{"what": "decision", "item": "a"}', "a decision's by"),
        ('{"what": "story"}', "'story'"),
        ('{"verdict": "perhaps", "item": "a", "by": "b", "at": "c"}', "verdict is 'perhaps'"),
        ('{"kind": "label", "example": "a", "schema": 9}', "schema 9"),
        ('{"kind": "label", "example": "\\ud800"}', "what no file can"),
        ('{"kind": "synthetic", "row": {"messages": 3}}', "no row of examples"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_its_place(data: Path, line: str, words: str) -> None:
    file = data.parent / "bad.jsonl"
    file.write_text("\n" + line + "\n")
    with pytest.raises(SourceError, match=words) as caught:
        sartor.review_import(data, file)
    assert "bad.jsonl:2" in caught.value.problem and caught.value.remedy


def test_edit_of_a_label_item_writes_the_suggested_label(tmp_path: Path) -> None:
    """A suspicious label is an item; the edit changes only that field of the JSON reply."""
    words = {"refund": ("money", "back", "return", "paid"), "delivery": ("parcel", "late", "courier", "door")}
    with (tmp_path / "rows.jsonl").open("w") as stream:
        for number in range(40):
            label = ("refund", "delivery")[number % 2]
            given = label if number != 6 else "delivery"
            asked = " ".join(words[label][(number // 2 + place) % 4] for place in range(3))
            stream.write(
                json.dumps({"prompt": f"{asked} {number}", "completion": json.dumps({"n": number, "intent": given})})
                + "\n"
            )
    steps = [{"suspicious_labels": {"encoder": "tfidf", "label": "json:intent"}}]
    sartor.curate(
        {"sources": [{"path": str(tmp_path / "rows.jsonl"), "licence": "CC0-1.0"}], "steps": steps, "workers": 1},
        tmp_path / "d",
    )
    (item,) = sartor.review_list(tmp_path / "d")["items"]
    assert item["kind"] == "label" and item["suggestion"] == {"label": "json:intent", "value": "refund"}
    decide(tmp_path / "d", item["id"], "edit")
    sartor.review_apply(tmp_path / "d", tmp_path / "new")
    replies = {example.id: json.loads(example.reply) for example in read_examples(sartor.open(tmp_path / "new"))}
    assert {"n": 6, "intent": "refund"} in replies.values() and len(replies) == 40
    assert sartor.open_items(tmp_path / "new") == 0


def test_quality_sample_counts_unreviewed_rows_as_bad(data: Path) -> None:
    """The bound holds once all drawn rows are accepted and fails after one rejection."""
    drawn = sartor.review_sample(data, error=0.3, confidence=0.8)
    assert (
        drawn["population"] == 12
        and drawn["waiting"] == drawn["size"]
        and drawn["upper"] == 1.0
        and not drawn["holds"]
    )
    assert sartor.open_items(data) == drawn["size"]
    for item in drawn["next"]:
        decide(data, item, "accept")
    good = sartor.review_sample(data, error=0.3, confidence=0.8)
    assert good["good"] == drawn["size"] and good["holds"] and good["upper"] <= 0.3
    assert sartor.open_items(data) == 0
    decide(data, drawn["next"][0], "reject")
    assert not sartor.review_sample(data, error=0.3, confidence=0.8)["holds"]
    assert sartor.review_sample(data, error=0.3, confidence=0.8, split="eval")["population"] == 3
    with pytest.raises(ConfigError, match="no row is in the split 'test'"):
        sartor.review_sample(data, split="test")


def test_concurrent_reviewers_lose_no_decision(data: Path) -> None:
    """Two processes decide the same twelve items."""
    items = add(data, *(found(data, number) for number in range(12)))
    children = []
    for by in ("Ada", "Ben"):
        child = os.fork()
        if not child:
            code = 1
            try:
                for item in items:
                    decide(data, item, "accept", by)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    (pair,) = sartor.review_agreement(data)["pairs"]
    assert (pair["items"], pair["agreed"], pair["reviewers"]) == (12, 12, ["Ada", "Ben"])


def test_a_kill_in_a_decision_leaves_the_queue_whole(data: Path) -> None:
    (item,) = add(data, found(data, 1))
    child = os.fork()
    if not child:
        try:
            queue = Queue.open(review_store.queue_url(data, ""))
            with queue.database.change() as connection:
                row = database.sealed(connection, {"key": "k", "item": item, "said": "{}"})
                connection.execute(insert(review_store.decisions).values(row))
                os.kill(os.getpid(), 9)
        finally:
            os._exit(1)  # an error must not go on as a second pytest
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert sartor.review_counts(data)["open"] == 1
    assert decide(data, item, "accept")["state"] == "decided"


def test_a_busy_queue_and_a_damaged_one_are_told(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = add(data, found(data, 1))
    file = data.parent / review_store.FILE
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(BusyError, match="review queue .* is locked"):
        decide(data, item, "accept")
    assert sartor.open_items(data) == 1, "who looks does not wait"
    other.execute("rollback")
    decide(data, item, "accept")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute("update review_decisions set said = '{}'")
    other.execute("update review_items set said = replace(said, 'near_copy', 'far_copy')")
    other.close()
    with pytest.raises(ArtifactError, match=f"item {item} does not match its checksum"):
        sartor.open_items(data)
    file.write_bytes(b"no database at all " * 99)
    with pytest.raises(ArtifactError, match="review queue .* damaged"):
        sartor.open_items(data)


def test_the_queue_lies_where_it_is_said_to(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sartor.review_add(data, [found(data, 1)], str(tmp_path / "other" / "q.sqlite"))
    assert (tmp_path / "other" / "q.sqlite").exists() and sartor.open_items(data) == 0
    monkeypatch.setenv(review_store.VARIABLE, str(tmp_path / "other" / "q.sqlite"))
    assert sartor.open_items(data) == 1
    with pytest.raises(ConfigError, match="neither SQLite nor Postgres") as caught:
        sartor.open_items(data, "mysql://host/db")
    assert caught.value.remedy.startswith("--queue ")


@pytest.mark.services
def test_postgres_keeps_a_queue_beside_a_registry(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.serving.registry.registry import Registry

    monkeypatch.setenv("DB_PASSWORD", "hunter:2/@%")
    with postgres() as url:
        Registry.open(url).close()
        said = [found(data, number) for number in range(3)]
        assert sartor.review_add(data, said, url)["new"] == 3 and sartor.review_add(data, said, url)["new"] == 0
        items = [one["id"] for one in sartor.review_list(data, url)["items"]]
        for by, verdict in (("Ada", "accept"), ("Ben", "reject")):
            sartor.review_decide(data, items, sartor.Opinion(verdict, by), url)
        assert sartor.review_counts(data, url)["conflicts"] == 3
        sartor.review_decide(data, items, sartor.Opinion("reject", "Cy", settles=True), url)
        assert sartor.review_sample(data, url, error=0.3)["waiting"] > 0
        assert sartor.review_apply(data, tmp_path / "new", url)["rows_dropped"] == 3
        opened = Queue.open(url)
        with pytest.raises(Exception, match="append-only"), opened.database.change() as connection:
            connection.execute(review_store.decisions.delete())
        opened.close()
        Registry.open(url).close()
