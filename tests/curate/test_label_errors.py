"""`suspicious_labels`: planted flips stand at the head of the queue, clean data raises few alarms, odd data is no case."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rows import example, gather
from sartor.core import assets
from sartor.core.errors import AssetError, ConfigError, GuardError
from sartor.core.records import Example
from sartor.curate.labels import class_labels, confident_learning
from sartor.curate.labels.confident_learning import confident_learning as judge
from sartor.curate.labels.label_ranking import without_frame
from sartor.curate.step import StepInput, StepResult
from sartor.curate.steps.label_errors import EVIDENCE, SuspiciousLabels
from sartor.text import encoders

THINGS = {
    "LightOn": ("light", "lamp", "chandelier", "spotlight"),
    "CoverOpen": ("blind", "curtain", "shutter", "garage door"),
    "Music": ("song", "album", "playlist", "radio"),
    "Timer": ("timer", "countdown", "alarm", "stopwatch"),
    "Weather": ("weather", "forecast", "rain", "temperature outside"),
    "Vacuum": ("vacuum", "robot", "hoover", "sweeper"),
    "Lock": ("lock", "deadbolt", "safe", "padlock"),
    "List": ("shopping list", "groceries", "errands", "chores"),
}
ROOMS = ("kitchen", "bedroom", "attic", "hall", "office", "nursery", "cellar", "porch")
ASKING = ("please see to", "take care of", "I need", "handle", "go for", "do something about", "check", "what about")


def commands(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, intent) rows with different prompts."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        intent = rng.choice(sorted(THINGS))
        text = f"{rng.choice(ASKING)} the {rng.choice(THINGS[intent])} in the {rng.choice(ROOMS)} {rng.choice(['now', 'today', 'soon', 'at once', 'later'])}"
        found[text] = intent
    return list(found.items())


def flipped(labels: list[str], fraction: float = 0.1, seed: int = 1) -> tuple[list[str], set[int]]:
    """The labels with a part of them set to a random other one, and the rows of those."""
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(labels)), round(fraction * len(labels))))
    others = sorted(set(labels))
    return [
        rng.choice([o for o in others if o != label]) if row in wrong else label for row, label in enumerate(labels)
    ], wrong


def decide(rows: list[tuple[str, str]] | list[Example], **options: Any) -> StepResult:
    step = SuspiciousLabels(**{"encoder": "tfidf", "queue_fraction": 1.0, **options})
    return step.decide(
        gather(step, [row if isinstance(row, Example) else example(*row, place) for place, row in enumerate(rows)])
    )


def queue(verdicts: StepResult) -> list[int]:
    """Row numbers, most suspicious first."""
    return [int(locator.partition(":")[2]) - 1 for locator in verdicts.evidence[EVIDENCE]["locator"].to_pylist()]


def recall(verdicts: StepResult, wrong: set[int], share: float = 0.12) -> float:
    head = queue(verdicts)[: round(share * len(queue(verdicts)))]
    return len(wrong.intersection(head)) / len(wrong)


@pytest.mark.parametrize("form", ["json", "bare"])
@pytest.mark.parametrize("seed", [0, 1])
def test_flipped_labels_stand_at_the_head_of_the_queue(form: str, seed: int) -> None:
    rows = commands(600, seed)
    labels, wrong = flipped([intent for _, intent in rows], seed=seed)
    said = [json.dumps({"intent": label, "room": "x"}) if form == "json" else label for label in labels]
    verdicts = decide(list(zip([prompt for prompt, _ in rows], said, strict=True)))
    assert recall(verdicts, wrong) >= 0.95
    assert verdicts.facts["label"] == ("json:intent" if form == "json" else "reply") and verdicts.facts["labels"] == 8
    assert 0.6 * len(wrong) <= verdicts.facts["estimated_errors"] <= 1.4 * len(wrong)
    assert verdicts.removals == []


def test_a_row_of_the_queue_says_what_speaks_against_it() -> None:
    rows = commands(300)
    labels, wrong = flipped([intent for _, intent in rows])
    verdicts = decide(list(zip([prompt for prompt, _ in rows], labels, strict=True)))
    table = verdicts.evidence[EVIDENCE].to_pylist()
    assert [row["rank"] for row in table] == list(range(1, 301))
    assert [row["score"] for row in table] == sorted(row["score"] for row in table)
    right = [row for row in table[:30] if row["suggested"] == dict(rows)[row["prompt"]]]
    assert len(right) >= 25
    for row in table[:30]:
        assert row["kind"] == "label" and row["given"] != row["suggested"] and row["given"] in THINGS
        assert len(row["evidence"]) == 3 and all(
            near["label"] in THINGS and near["id"] != row["id"] for near in row["evidence"]
        )


def test_clean_labels_raise_few_alarms() -> None:
    facts = decide(commands(600)).facts
    assert facts["estimated_errors"] <= 6 and facts["suspicious"] <= 6


def test_two_runs_are_equal() -> None:
    rows = commands(200)
    one, other = decide(rows), decide(rows)
    assert one.evidence[EVIDENCE].equals(other.evidence[EVIDENCE]) and one.facts == other.facts


@pytest.mark.parametrize("rare", [0.5, 0.05])
def test_two_labels_also_where_one_is_rare(rare: float) -> None:
    rng = random.Random(0)
    rows = [
        (prompt, "yes" if intent in ("LightOn", "Lock", "Music", "List") else "no")
        for prompt, intent in commands(1200)
    ]
    yes = [row for row in rows if row[1] == "yes"][: round(500 * rare)]
    rows = [*yes, *[row for row in rows if row[1] == "no"][: 500 - len(yes)]]
    rng.shuffle(rows)
    labels, wrong = flipped([label for _, label in rows])
    assert recall(decide(list(zip([prompt for prompt, _ in rows], labels, strict=True))), wrong) >= 0.9


def test_flips_from_one_label_to_one_other_are_found() -> None:
    rows = commands(800)
    lights = [row for row, (_, intent) in enumerate(rows) if intent == "LightOn"]
    wrong = set(lights[: len(lights) // 5])
    labels = ["CoverOpen" if row in wrong else intent for row, (_, intent) in enumerate(rows)]
    assert recall(decide(list(zip([prompt for prompt, _ in rows], labels, strict=True))), wrong) >= 0.9


def test_prompts_in_several_scripts() -> None:
    colours = {
        "red": "rouge красный 红色",
        "blue": "bleu синий 蓝色",
        "green": "vert зелёный 绿色",
        "black": "noir чёрный 黑色",
    }
    rng = random.Random(0)
    asking = ("show me {}", "montre-moi {}", "покажи {}", "给我看{}", "मुझे {} दिखाओ")
    rows = []
    for number in range(400):
        colour = rng.choice(sorted(colours))
        rows.append((f"{rng.choice(asking).format(rng.choice(colours[colour].split()))} {number}", colour))
    labels, wrong = flipped([label for _, label in rows])
    assert recall(decide(list(zip([prompt for prompt, _ in rows], labels, strict=True))), wrong) >= 0.9


def test_three_rows_per_label_are_judged_and_said_to_be_few() -> None:
    rng = random.Random(0)
    strange = ["".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(30)]
    rows = [(f"{asked} the {word} again", f"about {word}") for word in strange for asked in ("show", "tell", "give")]
    labels, wrong = flipped([label for _, label in rows])
    verdicts = decide(list(zip([prompt for prompt, _ in rows], labels, strict=True)))
    assert recall(verdicts, wrong, 0.2) >= 0.75
    assert verdicts.facts["labels_of_few_rows"] >= 25 and "loose" in verdicts.facts["label_errors_are"]


def test_the_same_prompts_bear_witness_of_each_other() -> None:
    """Nothing else is like them, so what a fold learns says nothing."""
    strange = [("zxqv wkrp", "yes", 9), ("mnbt hjgf", "no", 9), ("plok ijuh", "yes", 9)]
    rows = [(prompt, label) for prompt, label, times in strange for _ in range(times)]
    rows[4], rows[13] = (rows[4][0], "no"), (rows[13][0], "yes")
    verdicts = decide(rows)
    assert set(queue(verdicts)[:2]) == {4, 13} and verdicts.facts["prompts_with_several_labels"] == 2


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([("a", "yes"), ("b", "no")], "2 rows"),
        ([(f"question {number}", "yes") for number in range(30)], "1 different labels"),
        ([("the same", "yes" if number % 2 else "no") for number in range(30)], "1 different prompts"),
    ],
)
def test_too_little_to_go_by_judges_nothing_and_says_why(rows: list[tuple[str, str]], why: str) -> None:
    verdicts = decide(rows, label="reply")
    assert why in verdicts.facts["not_judged_because"]
    assert verdicts.facts["estimated_errors"] == 0 and verdicts.facts["not_judged"] == len(rows)
    assert verdicts.evidence[EVIDENCE].num_rows == len(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [("only", "one")],
        [("", "a document")] * 12,
        [("", "yes"), ("", "no")] * 10,
        [("?!", "yes"), ("...", "no")] * 10,
        [("\U0001f600" * 300, "yes"), ("x" * 30_000, "no")] * 10,
    ],
)
def test_empty_and_strange_rows_are_no_case(rows: list[tuple[str, str]]) -> None:
    verdicts = decide(rows)
    assert verdicts.evidence[EVIDENCE].num_rows == len(rows) and verdicts.removals == []


def test_label_of_a_single_row_is_high_in_the_queue() -> None:
    """The confidence in the other labels ranks it among the first 15."""
    rows = commands(300)
    rows[17] = (rows[17][0], "LightOnn")
    assert 17 in queue(decide(rows))[:15]


def test_queue_holds_its_fraction_and_all_suspicious_rows() -> None:
    """With queue_fraction 0.5 it holds half of the rows, with 0 exactly the suspicious ones."""
    rows = commands(300)
    labels, _ = flipped([intent for _, intent in rows])
    rows = list(zip([prompt for prompt, _ in rows], labels, strict=True))
    assert decide(rows, queue_fraction=0.5).evidence[EVIDENCE].num_rows == 150
    none = decide(rows, queue_fraction=0.0)
    assert none.evidence[EVIDENCE].num_rows == none.facts["suspicious"] == none.facts["queue"] > 10


def test_drop_removes_suspicious_rows_up_to_max_fraction() -> None:
    """At least 80 % of the removed rows are planted errors; beyond the limit GuardError is raised."""
    rows = commands(300)
    labels, wrong = flipped([intent for _, intent in rows])
    rows = list(zip([prompt for prompt, _ in rows], labels, strict=True))
    gone = decide(rows, action="drop", max_fraction=0.2).removals
    assert len(wrong & {removal.row for removal in gone}) >= 0.8 * len(gone) > 0
    assert all(
        removal.reason == "suspicious_label" and removal.score is not None and "labelled" in removal.detail
        for removal in gone
    )
    with pytest.raises(GuardError, match=r"of 300 labels look wrong.*0\.02"):
        decide(rows, action="drop", max_fraction=0.02)


def test_a_system_message_that_changes_the_task_counts() -> None:
    rng = random.Random(0)
    rows = []
    for number in range(400):
        mood, language = rng.choice(["good", "bad"]), rng.choice(["en", "de"])
        text = f"{'the film is' if language == 'en' else 'der Film ist'} {mood} {number}"
        asked = number % 2 == 0
        rows.append((text, mood if asked else language, "Say the mood." if asked else "Say the language."))
    labels, wrong = flipped([label for _, label, _ in rows])
    examples = [
        example(prompt, label, place, system=system)
        for place, ((prompt, _, system), label) in enumerate(zip(rows, labels, strict=True))
    ]
    assert recall(decide(examples), wrong) >= 0.8


def test_without_frame_cuts_shared_words_at_both_ends() -> None:
    """Only whole words are cut; equal prompts and a list of few prompts stay as they are."""
    bare = [f"kit{word}" for word in ("chen", "ten", "e", "chenette", "s", "box", "net", "bag", "", "fox")]
    assert without_frame([f"Classify this: {text}\nAnswer:" for text in bare]) == bare
    assert without_frame(["the same"] * 12) == ["the same"] * 12
    assert without_frame([""] * 12) == [""] * 12
    assert without_frame(["a b", "a c"]) == ["a b", "a c"]


ANSWERS = {
    "How long is the warranty on the boiler?": ("The warranty is 24 months.", "The warranty is 12 months."),
    "Is parking in the yard allowed at night?": (
        "Yes, parking there is allowed.",
        "No, parking there is not allowed.",
    ),
    "Who signs the inspection report for the lift?": (
        "The safety officer signs it.",
        "Any passer-by may put a name on the sheet of paper.",
    ),
}


def test_contradicting_replies_to_similar_prompts_rank_first() -> None:
    """In free text the queue begins with them and suggests the reply of the majority."""
    rows = []
    for number, (prompt, (right, other)) in enumerate(ANSWERS.items()):
        rows += [
            (prompt, right),
            (prompt.lower().removesuffix("?"), right),
            (f"Please, {prompt}", right),
            (f"Tell me: {prompt}", other),
        ]
        rows.append(
            (
                f"Something else entirely, number {'abcdef'[number]} of many: {' '.join(prompt.split()[::-2])}",
                f"Quite another story, {prompt}",
            )
        )
    verdicts = decide(rows)
    assert verdicts.facts["label"] == "text"
    assert set(queue(verdicts)[:3]) == {3, 8, 13}
    top = verdicts.evidence[EVIDENCE].to_pylist()[0]
    assert top["kind"] == "reply" and top["suggested"] in {right for right, _ in ANSWERS.values()} and top["evidence"]
    assert verdicts.facts["estimated_errors"] == 3 and verdicts.facts["suspicious"] == 3


def test_replies_that_agree_in_other_words_contradict_nobody() -> None:
    rows = [
        ("when is the shop open", "The shop is open from 9 to 17."),
        ("when is the shop open?", "From 9 to 17."),
        ("When's the shop open", "the shop is open from 9 to 17"),
    ]
    verdicts = decide(rows, label="text")
    assert verdicts.facts["suspicious"] == 0 and verdicts.facts["free_text_compared"] == 3


def test_rows_without_label_are_judged_by_their_replies() -> None:
    """Labelled rows of the same data are still judged by their labels."""
    labels, wrong = flipped([intent for _, intent in commands(200)])
    rows = [(prompt, json.dumps({"intent": label})) for (prompt, _), label in zip(commands(200), labels, strict=True)]
    rows += [
        ("how tall is the tower", "It is 30 metres tall, says the owner."),
        ("how tall is the tower?", "It is 45 metres tall, says the owner."),
    ]
    verdicts = decide(rows)
    assert (verdicts.facts["labelled"], verdicts.facts["free_text"], verdicts.facts["contradicting_replies"]) == (
        200,
        2,
        1,
    )
    assert len(wrong.intersection(queue(verdicts)[:26])) >= 18 and {200, 201} <= set(queue(verdicts)[:40])


@pytest.mark.parametrize(
    ("replies", "chosen"),
    [
        (['{"intent":"A","x":1}', '{"intent":"B","x":2}'] * 9, "json:intent"),
        (['```json\n{"call":{"name":"on"}}\n```', '{"call":{"name":"off"}}'] * 9, "json:call.name"),
        (['{"sure":true,"category":"a"}', '{"sure":false,"category":"b"}'] * 9, "json:category"),
        (["Yes.", "no", "yes", "No!"] * 9, "reply"),
        (
            ["yes"] * 6 + ["no"] * 6 + [f"It was in the year {number}, as far as I know." for number in range(9)],
            "reply",
        ),
        ([f"Answer number {number}" for number in range(30)], "text"),
        ([json.dumps({"id": number}) for number in range(30)], "text"),
        (["{broken"] * 9 + ['{"intent": '] * 9, "reply"),
        (["[1, 2]", "3", "null"], "text"),
        ([], "text"),
    ],
)
def test_what_the_label_is_is_found(replies: list[str], chosen: str) -> None:
    found = class_labels.find(replies)
    assert found.form == chosen and len(found.labels) == len(replies) and found.explanation


def test_a_label_may_be_a_field_or_a_pattern_of_the_recipe() -> None:
    assert class_labels.find(['{"a":{"b":1}}', "x", '{"a":2}'], "json:a.b").labels == ["1", None, None]
    assert class_labels.find(["Category: Red.", "category: blue", "none"], r"regex:(?i)category: (\w+)").labels == [
        "red",
        "blue",
        None,
    ]
    assert class_labels.find(["Yes", "yes."], "reply").labels == ["yes", "yes"]
    assert (
        decide(
            [(f"q {n}", f"Category: {'Red' if n % 2 else 'Blue'}, and so on {n}") for n in range(30)],
            label=r"regex:Category: (\w+)",
        ).facts["labels"]
        == 2
    )


@pytest.mark.parametrize(
    "options",
    [
        {"label": "json:"},
        {"label": "regex:("},
        {"label": "field"},
        {"queue_fraction": 1.5},
        {"max_fraction": -0.1},
        {"likeness": 2.0},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        SuspiciousLabels(**options)


def test_assign_folds_keeps_groups_whole_and_folds_even() -> None:
    """Rows with one prompt are in one fold."""
    labels = np.array([row % 4 for row in range(400)])
    groups = np.arange(400) // 2
    dealt = confident_learning.assign_folds(labels, groups, 0)
    assert (dealt[::2] == dealt[1::2]).all()
    assert np.bincount(dealt).tolist() == [80] * 5


@pytest.mark.parametrize("ceilings", [{"SPARSE_WORK": 0}, {"SPARSE_WORK": 0, "DENSE_WORK": 2500}, {"DENSE_WORK": 100}])
def test_what_saves_time_on_large_data_finds_the_flips_too(
    monkeypatch: pytest.MonkeyPatch, ceilings: dict[str, int]
) -> None:
    for name, ceiling in ceilings.items():
        monkeypatch.setattr(confident_learning, name, ceiling)
    rows = commands(600)
    labels, wrong = flipped([intent for _, intent in rows])
    assert recall(decide(list(zip([prompt for prompt, _ in rows], labels, strict=True))), wrong) >= 0.9


def test_judging_is_of_any_numbering_of_the_labels() -> None:
    rows = commands(200)
    prompts = [prompt for prompt, _ in rows]
    names = sorted(THINGS)
    labels = np.array([names.index(intent) for _, intent in rows])
    vectors_ = np.eye(200, dtype=np.float32)
    turned = judge(prompts, vectors_, len(names) - 1 - labels).quality
    assert np.corrcoef(judge(prompts, vectors_, labels).quality, turned)[0, 1] > 0.8


def test_without_the_asset_auto_takes_tfidf_and_says_why() -> None:
    facts = decide(commands(60), encoder="auto").facts
    assert facts["encoder"] == "tfidf" and "assets install minilm" in facts["encoder_because"]
    with pytest.raises(AssetError, match="assets install minilm"):
        decide(commands(60), encoder="minilm")


def test_a_long_prompt_is_cut_and_counted() -> None:
    rows = [*commands(60), ("word " * 10_000, "Music")]
    assert decide(rows).facts["prompts_cut"] == 1


def test_texts_reads_a_column_by_row_slice_and_whole() -> None:
    step = SuspiciousLabels()
    gathered: StepInput = gather(step, [example(f"prompt {row}", "x", row) for row in range(2500)], batch=999)
    texts = encoders.Texts(gathered.table["prompt"])
    assert len(texts) == 2500 and texts[2400] == "prompt 2400" and list(texts)[1500] == "prompt 1500"
    assert (
        texts[998:1001] == ["prompt 998", "prompt 999", "prompt 1000"]
        and texts[10:4:-2] == []
        and texts[:3][-1] == "prompt 2"
    )


BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.mark.circle
@pytest.mark.parametrize("encoder", ["tfidf", "minilm"])
@pytest.mark.parametrize(("how", "language"), [("equal", "en"), ("natural", "en"), ("demo", "en"), ("natural", "de")])
def test_flips_in_home_intents(encoder: str, how: str, language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is 0.8; the margin is for other seeds and wordings than these."""
    pytest.importorskip("hassil")
    for name in ("home-intents", "minilm"):
        if not assets.entry(name).is_installed:
            pytest.skip(f"sartor assets install {name}")
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("labels", None)
    import labels as benchmark

    rows = benchmark.sample(2000, language, how, 7)
    replies = [dict(reply) for _, reply in rows]
    wrong = benchmark.flip(replies, 0.1, 8)
    said = [(prompt, json.dumps(reply)) for (prompt, _), reply in zip(rows, replies, strict=True)]
    measured = benchmark.measure(SuspiciousLabels(encoder=encoder, queue_fraction=1.0), said, wrong)
    assert measured["recall_at_12%"] >= 0.92 and measured["label"] == "json:intent"
