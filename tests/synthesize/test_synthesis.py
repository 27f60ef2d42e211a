"""Ways to make rows: what each makes and drops, that a row stays marked, that held-out rows show nothing, that seeds decide."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest

import sartor
from media_files import png
from sample_data import write_jsonl
from sartor.core.errors import ConfigError, SourceError
from sartor.core.records import Drop, Example, Message, Origin
from sartor.curate.steps import text_duplicates
from sartor.synthesize.generator import GeneratedRow
from sartor.synthesize.generators import AnyAskingWay, AnyCopyingWay, AnyMakingWay
from sartor.synthesize.generators.local_generators import Counterfactual, SlotSubstitution
from sartor.synthesize.generators.prompted_generators import Questions, Scenarios, find_span, pieces
from sartor.synthesize.teacher import TeacherAnswer, TeacherQuestion

DOCUMENT = """Delivery to Berlin takes two days and costs 4 euros.

Parcels over 30 kg are carried by a haulier, who calls before. Returns are free for 14 days after the parcel has come."""
SEEDS = [
    ("What does delivery to Rome cost for parcel one?", "It costs 7 euros to Rome."),
    (
        "She asks when her parcel to Oslo comes, and if she must sign.",
        "Tell her that it comes on Friday and she signs.",
    ),
    ("Emily Walsh, 28, wants a loan.", '{"decision":"grant"}'),
]
SLOTS = {"room": ["hall", "attic", "den"], "state": ["on", "off"]}
LIGHTS = {"prompts": ["turn {state} the {room} light"], "reply": '{"room":"{room}","on":"{state}"}', "slots": SLOTS}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}
GRID = {
    "personas": ["a baker", "a nurse"],
    "intents": ["to return a parcel"],
    "edge_cases": ["no receipt", "late"],
    "turns": 2,
}
# an entry for each member of the unions: to be listed is to be tested
WAYS: dict[str, Any] = {
    "vary": {"per_row": 2},
    "extend": {},
    "harder": {},
    "persona": {},
    "questions": {"per_document": 3},
    "scenarios": GRID,
    "preference": {},
    "schema": {"schema": SCHEMA, "task": "Count.", "count": 4},
    "counterfactual": {},
    "templates": LIGHTS,
    "slot_substitution": {"slots": {"city": ["Rome", "Oslo", "Berlin"]}, "numbers": True},
    "augment_images": {"copies": 2},
    "augment_audio": {},
    "speech": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in SEEDS
    ]
    write_jsonl(tmp_path / "seeds.jsonl", rows)
    (tmp_path / "delivery.txt").write_text(DOCUMENT)
    return tmp_path


def made(folder: Path, *ways: Any, out: str = "out", teacher: Any = None, **recipe: Any) -> Any:
    sources = [{"path": str(folder / name), "licence": "MIT"} for name in ("seeds.jsonl", "delivery.txt")]
    said = {"sources": sources, "teacher": "fake", "ways": list(ways), "licence": "CC0-1.0", **recipe}
    return sartor.synthesize(said, folder / out, teacher=teacher)


def kinds(*unions: Any) -> list[str]:
    return [member.kind for union in unions for member in union.__args__]


class Says:
    """A teacher that answers from a list, then its last; notes what it was asked."""

    name, at_once = "says", 1

    def __init__(self, *answers: str | TeacherAnswer) -> None:
        self.answers, self.asked = list(answers), []

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        self.asked.append(question)
        said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return TeacherAnswer(said) if isinstance(said, str) else said


def test_every_way_of_the_unions_is_tested() -> None:
    assert set(kinds(AnyAskingWay, AnyMakingWay, AnyCopyingWay)) == set(WAYS)


@pytest.mark.parametrize("kind", [*kinds(AnyAskingWay), "counterfactual", "slot_substitution", "templates"])
def test_a_way_accounts_for_all_and_marks_every_row(folder: Path, kind: str) -> None:
    result = made(folder, {kind: WAYS[kind]})
    rows, counts = list(result.examples()), result.dataset.manifest["synthetic"]["ways"][kind]
    assert rows and counts["made"] == len(rows) == result.made
    assert counts.get("dropped", 0) == sum(result.dropped.values())
    evidence = {
        row["id"]: row for row in pq.read_table(result.dataset.path / "evidence/synthetic.parquet").to_pylist()
    }
    seeds = {seed.id for seed in sartor_seeds(folder)}
    asks = kind in kinds(AnyAskingWay)
    card = (result.dataset.path / "card.md").read_text()
    assert f"{len(rows)} synthetic rows of" in card and "do not add up" not in card
    assert not list(folder.glob("out.synthesizing"))
    for row in rows:
        origin = row.origins[0]
        said = json.loads(origin.made_by)
        assert row.is_synthetic and row.split == "train" and row.group and origin.step == f"synthesize:{kind}"
        assert said["way"] == kind and bool(said["teacher"]) == bool(said["prompt"]) == asks
        assert set(origin.parents) <= seeds and evidence[row.id]["prompt"] == said["prompt"]
    assert (
        (made(folder, {kind: WAYS[kind]}, out="again").dataset.manifest["digest"]) == result.dataset.manifest["digest"]
    )
    if asks:
        other = made(folder, {kind: WAYS[kind]}, out="other", seed=1)
        assert [row.id for row in other.examples()] != [row.id for row in rows], "another seed, other rows"


def sartor_seeds(folder: Path) -> list[Example]:
    sources = [{"path": str(folder / name)} for name in ("seeds.jsonl", "delivery.txt")]
    dataset = sartor.curate(
        {"sources": sources, "split": {"eval_fraction": 0}}, folder / "plain", replace=True
    ).dataset
    return list(sartor.read_examples(dataset))


def test_a_synthetic_row_stays_marked_and_is_never_held_out(folder: Path) -> None:
    first = made(folder, "vary", {"counterfactual": {}}, {"templates": LIGHTS})
    ids = {row.id for row in first.examples()}
    # a row that people wrote equals a synthetic one: it has both origins, and may be held out
    write_jsonl(
        folder / "real.jsonl", [{"prompt": "turn on the hall light", "completion": '{"room":"hall","on":"on"}'}]
    )
    examples = str(first.dataset.path / "examples")
    sources = [{"path": examples}, {"path": str(folder / "seeds.jsonl")}, {"path": str(folder / "real.jsonl")}]
    steps = ["exact_duplicates", "near_duplicates"]
    for seed in range(4):
        recipe = {"sources": sources, "steps": steps, "split": {"eval_fraction": 0.5}, "seed": seed}
        again = sartor.curate(recipe, folder / f"again-{seed}").dataset
        rows = list(sartor.read_examples(again))
        assert any(row.split == "eval" for row in rows)
        assert not any(row.is_synthetic and row.split == "eval" for row in rows)
        marked = {row.id for row in rows if any(origin.made_by for origin in row.origins)}
        assert marked == {row.id for row in rows if row.id in ids}
        held_out = {row.group for row in rows if row.split == "eval"}
        assert not held_out & {row.group for row in rows if row.is_synthetic}, (
            "what was made of a held-out row is not learnt"
        )
        both = [row for row in rows if row.id in ids and not row.is_synthetic]
        assert [row.reply for row in both] == ['{"room":"hall","on":"on"}']
    third = sartor.curate({"sources": [{"path": str(folder / "again-0" / "examples")}]}, folder / "third").dataset
    assert ids & {row.id for row in sartor.read_examples(third) if row.origins[0].made_by}


def test_of_duplicates_the_row_that_people_wrote_stays() -> None:
    written = Example((Message.of("user", "a"), Message.of("assistant", "b")), (Origin("a", "a:1"),))
    longer = Example(
        (Message.of("user", "a"), Message.of("assistant", "b" * 999)),
        (Origin("a", "a:2", date="2026-01-01", made_by="{}"),),
    )
    for rule in get_args(text_duplicates.Keep):
        first, second = text_duplicates.ranks([written, longer], rule, "both")
        assert first > second, rule


def test_a_synthetic_row_of_a_held_out_source_is_a_drop(folder: Path) -> None:
    first = made(folder, {"templates": LIGHTS})
    sources = [{"path": str(first.dataset.path / "examples"), "split": "eval"}, {"path": str(folder / "seeds.jsonl")}]
    curated = sartor.curate({"sources": sources}, folder / "curated")
    assert curated.dropped["synthetic_held_out"] == 6


def test_the_held_out_rows_of_a_dataset_are_no_seeds(folder: Path) -> None:
    sources = [{"path": str(folder / "seeds.jsonl"), "licence": "MIT"}]
    real = sartor.curate({"sources": sources, "split": {"eval_fraction": 0.34}}, folder / "real").dataset
    held_out = {row.id for row in sartor.read_examples(real, "eval")}
    result = sartor.synthesize(
        {"sources": [{"path": str(real.path)}], "teacher": "fake", "ways": ["vary"]}, folder / "out"
    )
    said = result.dataset.manifest["synthetic"]["seeds"]
    assert (len(held_out), said["held_out"], said["used"]) == (1, 1, 2)
    assert not held_out & {parent for row in result.examples() for origin in row.origins for parent in origin.parents}
    assert result.dataset.manifest["parents"][0]["id"] == real.id and result.dataset.licence == "MIT"


def test_licences_are_those_of_seeds_and_of_the_teachers_word(folder: Path) -> None:
    teacher = {"kind": "fake", "licence": "LicenseRef-teacher"}
    result = made(folder, "vary", {"templates": LIGHTS}, teacher=None)
    assert result.dataset.licence == "CC0-1.0 AND MIT"
    said = {"sources": [{"path": str(folder / "seeds.jsonl"), "licence": "MIT"}], "teacher": teacher, "ways": ["vary"]}
    assert sartor.synthesize(said, folder / "b").dataset.licence == "LicenseRef-teacher AND MIT"


def test_an_answer_of_no_use_is_a_drop_with_its_digest(folder: Path) -> None:
    good = '{"question": "How long to Berlin?", "answer": "two days", "span": "%s"}'
    answers = [
        good % "takes two\\n days",  # other white space
        good % "takes three days",
        good % "two",
        "I cannot do that.",
        "still words",
        '{"question": 5}',
        good.replace("How long", "How far") % "costs 4 euros",  # repaired
        TeacherAnswer("", "refused"),
        TeacherAnswer('{"question": "How', "length"),
        '{"question": " ", "answer": "x", "span": "Delivery to Berlin"}',
    ]
    teacher = Says(*answers)
    result = made(folder, {"questions": {"per_document": 9}}, teacher=teacher)
    assert result.dropped == {
        "span_not_found": 1,
        "span_too_short": 1,
        "no_json": 1,
        "teacher_refused": 1,
        "answer_cut": 1,
        "empty_answer": 2,
    }
    drops: list[Drop] = list(sartor.read_drops(result.dataset))
    assert all(re.search(r"\(answer [0-9a-f]{16} to questions ", drop.detail) and drop.source for drop in drops)
    assert not any(drop.text for drop in drops)  # an answer may name people
    rows = pq.read_table(result.dataset.path / "evidence/synthetic.parquet").to_pylist()
    assert [DOCUMENT[row["span_start"] : row["span_end"]] for row in rows] == ["takes two days", "costs 4 euros"]
    assert (
        "It cannot be used: at $.question: 5 is not" in teacher.asked[6].last
        or "'answer' is a required" in teacher.asked[6].last
    )
    assert result.dataset.manifest["synthetic"]["ways"]["questions"]["skipped:no_document"] == 3


def test_json_is_found_among_words_and_held_to_its_schema(folder: Path) -> None:
    way = {"schema": {"schema": SCHEMA, "task": "Count.", "count": 4}}
    right = '{"question": "three apples", "reply": {"n": 3}}'
    answers = [
        f"Here it is: ```json\n{right}\n```",
        right.replace("3", "0"),
        right.replace("3", '"x"'),
        right.replace("3", "4"),
        right.replace("apples", "pears"),
    ]
    result = made(folder, way, teacher=Says(*answers))
    # the second is not repaired, the third (asked after it) is
    assert [row.reply for row in result.examples()] == ['{"n":3}', '{"n":4}', '{"n":3}']
    assert result.dropped == {"schema_mismatch": 1}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "sausage"}, "no JSON Schema"),
        ("absent.json", "cannot be read"),
        ({"$ref": "http://example.org/x"}, "which is not in it"),
        (3, "no mapping"),
    ],
)
def test_a_schema_that_cannot_be_is_refused(folder: Path, schema: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        made(
            folder,
            {"schema": {"schema": schema, "task": "x", "count": 1}},
            teacher=Says('{"question": "x", "reply": {}}'),
        )


def test_rows_that_are_there_already_are_drops(folder: Path) -> None:
    other = {
        "prompts": ["turn {state} the {room} light", "turn {state} the {room} light"],
        **{k: LIGHTS[k] for k in ("reply", "slots")},
    }
    result = made(folder, {"templates": other})
    assert (result.made, result.dropped) == (6, {"exact_duplicate": 6})


def test_templates_fill_slots_alone_and_draw_by_the_seed(folder: Path) -> None:
    rows = list(made(folder, {"templates": {**LIGHTS, "count": 4}}).examples())
    assert len(rows) == 4 and len({row.group for row in rows}) == 1
    for row in rows:
        room, state = json.loads(row.reply).values()
        assert row.messages[0].text == f"turn {state} the {room} light"
    with pytest.raises(ConfigError, match="which the prompt 'turn it on' does not"):
        made(folder, {"templates": {**LIGHTS, "prompts": ["turn it on"]}})


def test_a_counterfactual_swaps_the_whole_row_one_way(folder: Path) -> None:
    way = {"counterfactual": {"kinds": ["pronouns"], "to": ["he"]}}
    result = made(folder, way)
    assert [[message.text for message in row.messages] for row in result.examples()] == [
        [
            "He asks when his parcel to Oslo comes, and if he must sign.",
            "Tell him that it comes on Friday and he signs.",
        ]
    ]
    skipped = result.dataset.manifest["synthetic"]["ways"]["counterfactual"]
    assert skipped == {"made": 1, "skipped:no_group_named": 3}


def substituted(asked: str, said: str, **way: Any) -> list[tuple[str, str]]:
    row = Example((Message.of("user", asked), Message.of("assistant", said)), (Origin("people", "1"),))
    made = SlotSubstitution(**{"slots": {}, "numbers": True, "per_row": 50, **way}).make([row], 0, Path())
    return [(one.row.messages[0].text, one.row.reply) for one in made if isinstance(one, GeneratedRow)]


ROOMS = {"room": ["room", "living room", "hall"], "device": ["fan", "lamp"]}


def test_a_value_gives_way_in_question_and_reply_alike() -> None:
    pairs = substituted("fan in the living room to 40", '{"device":"fan","room":"living room","to":40}', slots=ROOMS)
    assert len(pairs) == len(set(pairs)) == 50
    for asked, said in pairs:
        reply = json.loads(said)
        assert asked == f"{reply['device']} in the {reply['room']} to {reply['to']}"
        assert reply["device"] in ROOMS["device"] and reply["room"] in ROOMS["room"] and 10 <= reply["to"] <= 99
    assert {json.loads(said)["room"] for _, said in pairs} == set(ROOMS["room"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("hall lamp", '{"device":"lamp"}'),  # "hall" is not in the reply: it stays
        ("the lamp, I say the lamp", '{"device":"lamp"}'),  # which of the two?
        ("lamps down by 10", '{"devices":"lamps","by":-10}'),  # part of a word; another number
        ("to 3.5 or 1,000", '{"to":[3.5,1000],"or":"1,000"}'),  # no whole numbers
        ("take it to both", '{"to":"both"}'),  # a value of two lists
    ],
)
def test_a_value_that_is_not_surely_the_same_stays(asked: str, said: str) -> None:
    slots = {**ROOMS, "who": ["both", "none"], "how": ["both", "fast"]}
    expected = [("hall fan", '{"device":"fan"}')] if asked.startswith("hall") else []
    assert substituted(asked, said, slots=slots) == expected


def test_two_values_never_become_one() -> None:
    pairs = substituted("from 3 to 4", '{"from":3,"to":4}')
    assert {json.loads(said)["from"] == json.loads(said)["to"] for _, said in pairs} == {False}


def test_nothing_made_says_what_the_ways_skipped(folder: Path) -> None:
    with pytest.raises(SourceError, match="no_value_in_both 3"):
        made(folder, {"slot_substitution": {"slots": {"city": ["Paris", "Bern"]}}})


def test_pictures_are_augmented_as_by_curate(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "red").mkdir(parents=True)
    (tmp_path / "pictures" / "red" / "a.png").write_bytes(png())
    said = {
        "sources": [{"path": str(tmp_path / "pictures"), "captions": "folder", "licence": "MIT"}],
        "ways": [{"augment_images": {"copies": 2}}],
    }
    result = sartor.synthesize(said, tmp_path / "out")
    rows = list(result.examples())
    assert len(rows) == 2 and all(row.is_synthetic and row.reply == "red" for row in rows)
    names = {part.media for row in rows for part in row.messages[0].content if part.media}
    assert {file.name for file in (tmp_path / "out" / "media").iterdir()} == {Path(name).name for name in names}


@pytest.mark.services
def test_questions_are_spoken_by_the_local_voice(folder: Path) -> None:
    rows = list(made(folder, {"speech": {"speeds": [0.9, 1.2], "rows": 2}}).examples())
    assert len(rows) >= 2
    for row in rows:
        (part,) = row.messages[0].content
        assert part.kind == "audio" and (folder / "out" / part.media).is_file()


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ({"ways": []}, "names no way"),
        ({"ways": ["vary"]}, "makes rows of rows, and there is no source"),
        ({"ways": [{"scenarios": GRID}]}, "asks a teacher, and the recipe names none"),
        ({"ways": ["varied"]}, "vary"),
        ({"ways": [{"templates": LIGHTS}], "temperature": 3}, "temperature is 3"),
        ({"ways": [{"scenarios": GRID}], "teacher": {"kind": "local", "at_once": 0}}, "at_once is 0"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path: Path, recipe: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        sartor.synthesize(recipe, tmp_path / "out")


def test_no_row_at_all_is_an_error_with_the_reasons(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"no row was made \(no_json 3"):
        made(folder, "vary", teacher=Says("no"))


def test_a_taken_output_is_refused_and_resume_takes_only_its_own(folder: Path) -> None:
    first = made(folder, {"templates": LIGHTS})
    with pytest.raises(ConfigError, match="exists"):
        made(folder, {"templates": LIGHTS})
    said = {"ways": [{"templates": LIGHTS}], "seed": 5}
    with pytest.raises(ConfigError, match="another recipe"):
        sartor.synthesize(said, first.dataset.path, resume=True)
    same = json.loads(json.dumps(first.dataset.manifest["recipe"]))
    assert sartor.synthesize(same, first.dataset.path, resume=True).found
    write_jsonl(folder / "seeds.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ConfigError, match="sources that have changed"):
        sartor.synthesize(same, first.dataset.path, resume=True)


def test_pieces_cover_the_text_and_find_span_ignores_spacing() -> None:
    """Pieces end with a sentence and stay within the limit."""
    text = "One two three. Four five six. " * 40
    cut = pieces(text, 200)
    assert "".join(text[a:b] for a, b in cut) == text and all(b - a <= 200 for a, b in cut)
    assert all(text[a:b].rstrip().endswith(".") for a, b in cut)
    assert find_span("two  three.\nFour", text) == (4, 19)
    assert find_span("", text) is None and find_span("two (three", text) is None


def test_a_wrong_option_is_the_one_that_is_mended() -> None:
    grid = {"personas": ("a",), "intents": ("b",)}
    for make, options, name in (
        (Counterfactual, {"kinds": ()}, "kinds"),
        (Counterfactual, {"rows": -1}, "rows"),
        (Questions, {"per_document": 0}, "per_document"),
        (Questions, {"rows": -1}, "rows"),
        (Questions, {"least_span_chars": 0}, "least_span_chars"),
        (Scenarios, {**grid, "per_cell": 0}, "per_cell"),
        (Scenarios, {**grid, "turns": 0}, "turns"),
    ):
        with pytest.raises(ConfigError) as refused:
            make(**options)  # type: ignore[arg-type]
        assert refused.value.remedy.startswith(f"{name}: ")
