"""Small Datasets, one or more of each verb that writes Datasets, and what is recorded of them in `tests/curate/golden/`.

    PYTHONPATH=src python tests/helpers/dataset_cases.py     # records all of them anew

Each case is a function that writes a Dataset below the working directory and returns its path. Paths in recipes are relative,
times are fixed, media are constants, so that the same code writes the same bytes on every machine with the same pyarrow.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import sartor
from sample_data import write_jsonl
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.parquet_io import ROWS_PER_GROUP, example_row, read_examples, write_examples
from sartor.core.records import Example, Feedback, FeedbackAuthor, Message, Origin, digest
from sartor.curate.dataset_writer import write_dataset_from
from sartor.curate.review.review_items import Decision, item_of
from sartor.synthesize.teacher import TeacherAnswer, TeacherQuestion
from sartor.synthesize.validate.permutation_tests import StatisticResult
from sartor.synthesize.validate.validation import RejectedRow, Validated, write_accepted

GOLDEN = Path(__file__).parents[1] / "curate" / "golden"
PYARROW = GOLDEN / "pyarrow.txt"
# the packages that a manifest names; what they are called here does not change with a new version of them
VERSIONS = {"sartor": "0.0.0", "pyarrow": "0.0.0"}
# of an artefact's manifest, what depends on the time at which it was written, or on where it lies
UNSTABLE, UNSTABLE_OF_A_PARENT = ("created", "id"), ("id", "path")

# one pixel each, red and blue
RED, BLUE = (
    base64.b64decode(text)
    for text in (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC",
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYPgPAAEDAQAIicLsAAAAAElFTkSuQmCC",
    )
)
TEXT = (
    "Close the valve behind the pump, wait until the gauge shows nothing, open the lid with the wide spanner, take the old filter "
    "out and clean the seat. Put the new one in with its arrow pointing away from you, close the lid by hand, then a quarter turn "
    "with the spanner. Open the valve slowly and look for drops under the lid. Write the day and your name on the card beside it."
)
MAIL = " Or write to anna.berg@example.com about it."
ANSWERS = json.dumps({"question": "What is the price of that?"})


class FixedTeacher:
    """A teacher that says the same to every question."""

    name, at_once = "fixed", 1

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        return TeacherAnswer(ANSWERS, "stop", 5, 7)


def talk(prompt: str, reply: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": reply, **more}


def edited(every: int) -> str:
    """TEXT with another word in place of each word of this distance."""
    return " ".join(f"word{index}" if index % every == 0 else word for index, word in enumerate(TEXT.split(), 1))


def image_row(prompt: str, name: str, reply: str) -> dict[str, Any]:
    content = [{"type": "text", "text": prompt}, {"type": "image", "image": name}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]}


def example(prompt: str, reply: str, origin: Origin, **fields: Any) -> Example:
    return Example((Message.of("user", prompt), Message.of("assistant", reply)), (origin,), split="train", **fields)


def curate_all() -> Path:
    """Two licences, media, personal data, every kind of Drop, rows set aside, copies, a declared split."""
    Path("red.png").write_bytes(RED)
    Path("blue.png").write_bytes(BLUE)
    rows = [
        *(
            talk(f"{name} asks for {number}00 euros.", "That is granted.")
            for number, name in enumerate(("Emily", "Greg", "Todd", "Sarah"), 1)
        ),
        talk("What does the card cost?", "Four euros a month.", group="cards"),
        talk("What does the card cost?", "Four euros a month.", group="cards"),
        talk("Whom do I ask?", MAIL),
        talk("How is the filter changed?", TEXT),
        talk("How is the filter changed?", edited(30) + MAIL),
        talk("Where is it?", "Here."),
        {"prompt": "", "completion": ""},
    ]
    write_jsonl(Path("rows.jsonl"), rows)
    pictures = [
        image_row("What is it?", "red.png", "A red dot, and nothing else."),
        image_row("What is it?", "blue.png", "No."),
    ]
    write_jsonl(Path("pictures.jsonl"), pictures)
    with Path("rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("{broken\n")
    held_out = [
        talk("What does the card cost?", "Ask at the counter, please.", group="cards"),
        talk("Is it open?", "Until nine."),
    ]
    write_jsonl(Path("held.jsonl"), held_out)
    write_jsonl(Path("chat.jsonl"), [talk(f"Hello {number}", f"Good day to you, {number}.") for number in range(3)])
    sources = [
        {"path": "rows.jsonl", "licence": "CC-BY-SA-4.0", "expires": "2999-12-31", "consent": "given"},
        {"path": "held.jsonl", "licence": "CC-BY-NC-4.0", "split": "eval", "use": ["research"]},
        {"path": "chat.jsonl", "licence": "MIT", "rehearsal": True},
        {"path": "pictures.jsonl", "split": "train"},
    ]
    steps = ["exact_duplicates", "near_duplicates", "personal_data", {"length": {"min_words": 2}}, "counterfactuals"]
    recipe = {"sources": sources, "steps": steps, "split": {"eval_fraction": 0.2}, "seed": 3, "workers": 1}
    return sartor.curate(recipe, "data").dataset.path


def curate_inbox() -> Path:
    """What people said of a served team, as a source."""
    Path("inbox").mkdir()
    lines = []
    for number in range(6):
        more: dict[str, Any] = (
            {"correction": f"better {number}"} if number < 3 else {"rating": (-1.0, 1.0)[number % 2]}
        )
        question = ({"role": "user", "content": f"question {number}"},)
        feedback = Feedback(
            receipt=f"r{number}",
            agent="faq@1.0",
            messages=question,
            reply=f"answer {number}",
            date="2026-11-26T10:00:00Z",
            by=FeedbackAuthor("k1", "", "given" if number != 5 else "refused"),
            **more,
        )
        lines.append(feedback.as_json())
    write_jsonl(Path("inbox/feedback-2026-11-26.jsonl"), lines)
    return sartor.curate(
        {"sources": [{"path": "inbox:inbox", "licence": "CC0-1.0"}], "workers": 1}, "data"
    ).dataset.path


def bias(kind: str) -> Path:
    """Applications of which men's are granted more often, evened in one of the ways."""
    rows = []
    for number in range(60):
        name, pronoun = (("Emily", "She"), ("Greg", "He"), ("Sarah", "She"), ("Todd", "He"))[number % 4]
        decision = "approve" if (number // 4) % 4 < (1 if pronoun == "She" else 3) else "decline"
        asked = f"{name} asks for {number * 100} euros. {pronoun} works as a cook."
        rows.append(talk(asked, json.dumps({"decision": decision}), group=f"g{number}"))
    write_jsonl(Path("rows.jsonl"), rows)
    sources = [{"path": "rows.jsonl", "licence": "CC0-1.0"}]
    data = sartor.curate({"sources": sources, "split": {"eval_fraction": 0.2}, "workers": 1}, "data").dataset.path

    def generate(cell: tuple[str, str], count: int, given: Any) -> Iterator[Example]:
        name, pronoun = ("Emily", "She") if cell[0] == "female" else ("Greg", "He")
        for number in range(count):
            asked = f"{name} asks for {number} dollars. {pronoun} works as a baker."
            yield example(asked, json.dumps({"decision": cell[1]}), Origin("made", f"made:{number}", "CC-BY-4.0"))

    more = {"generate": generate} if kind == "generate" else {}
    written = sartor.bias(data, group=["sex"], mitigate=kind, out="evened", **more).written
    assert written is not None
    return written.path


def derived() -> Path:
    """Rows of a curated and of a synthetic Dataset, one of them with the origins of both."""
    curated = curate_all()
    made = synthesize()
    first, *others = read_examples(sartor.open(curated), "train")
    added = [row for row in read_examples(sartor.open(made))]
    equal = Example(first.messages, (Origin("elsewhere.csv", "elsewhere.csv:4", "Apache-2.0"),), first.group, "train")
    drop = sartor.Drop(
        "too_much", "rows.jsonl", "rows.jsonl:1", "of this there is enough", step="join", id=others[0].id
    )
    parents = [sartor.open(curated), sartor.open(made)]
    rows = [first, equal, *others[1:], *added]
    return write_dataset_from("joined", parents, rows, [drop], step={"join": {"added": len(added)}}).path


def derived_of_whole_row_groups() -> Path:
    """As many rows as fill a row group, of which the digest has always counted an empty one behind it."""
    rows = [talk(f"Question {number}?", f"Answer {number}.") for number in range(ROWS_PER_GROUP)]
    write_jsonl(Path("rows.jsonl"), rows)
    data = sartor.curate({"sources": [{"path": "rows.jsonl", "licence": "MIT"}], "workers": 1}, "data").dataset
    return write_dataset_from("same", [data], read_examples(data), step={"same": {}}).path


def accepted() -> Path:
    """The rows that `validate` accepts; of a flawed one the Drop."""
    made = synthesize()
    rows = list(read_examples(sartor.open(made)))
    flaws = [
        RejectedRow(0, rows[0].id, "copy_of_seed", "equal words"),
        RejectedRow(0, rows[0].id, "outside", "far away"),
    ]
    tests = [
        StatisticResult("mmd", 0.01, 0.002, 0.2, 0.4, "as far apart as chance has it", p_corrected=1.0, verdict="pass")
    ]
    found = Validated(made, Path("real"), {"synthetic": len(rows)}, tests, flaws, {"diversity": {"vendi": 1.5}})
    return write_accepted(Path("accepted"), made, rows, found, replace=False)


def rethreshold(threshold: float) -> Path:
    """Near-duplicates at another threshold: rows come back through later steps, or more of them go."""
    rows = [
        talk("How is the filter changed?", TEXT),
        talk("How is the filter changed?", edited(30) + MAIL),
        talk("How is the filter changed?", edited(12) + MAIL),
        talk("How is the filter changed?", edited(20)),
        talk("Who has the key?", "The one who had it last."),
        talk("Who has the key?", "The one who had it last."),
        talk("Is it open?", "Yes."),
    ]
    write_jsonl(Path("rows.jsonl"), rows)
    Path("red.png").write_bytes(RED)
    write_jsonl(Path("pictures.jsonl"), [image_row("What is it?", "red.png", "A red dot, and nothing else.")])
    sources = [{"path": "rows.jsonl", "licence": "CC-BY-4.0"}, {"path": "pictures.jsonl", "licence": "CC-BY-SA-4.0"}]
    near = {"keep": "first", "contained": 0}
    steps = ["exact_duplicates", {"near_duplicates": near}, "personal_data", {"length": {"min_words": 2}}]
    old = sartor.curate({"sources": sources, "steps": steps, "workers": 1}, "data").dataset
    return sartor.rethreshold(old.path, "again", threshold=threshold).dataset.path


def review() -> Path:
    """Rows rejected, edited, masked, joined and left open, in a Dataset that holds copies, drops, evidence and media."""
    old = sartor.open(curate_all())
    rows = {row.prompt[-1].text: row for row in read_examples(old)}
    new = example("Is it new?", "Yes, made up.", Origin("made", "made:1", "CC0-1.0", (), "synthesize:vary"))
    unwanted = example("Is it bad?", "It is.", Origin("made", "made:2", "CC0-1.0", (), "synthesize:vary"))
    about = {"kind": "validation", "reason": "near_copy", "origin": "test"}
    asked, mail = rows["Emily asks for 100 euros."].id, rows["Whom do I ask?"].id
    findings = [
        {**about, "example": asked},
        {**about, "example": rows["Hello 1"].id, "suggestion": {"reply": "Good evening."}},
        {**about, "example": rows["Hello 2"].id},
        {**about, "example": rows["Greg asks for 200 euros."].id},
        {"kind": "personal", "reason": "personal_data", "example": mail, "origin": "test"},
        {"kind": "synthetic", "reason": "uncertain", "row": example_row(new)},
        {"kind": "synthetic", "reason": "uncertain", "row": example_row(unwanted)},
        {"kind": "bias", "slice": "group=women", "reason": "lower_rate", "evidence": {"gap": 0.2}},
    ]
    verdicts = ["reject", "edit", "accept", "", "reject", "accept", "reject", ""]
    return reviewed(old, findings, verdicts, {1: {"reply": "Good evening."}})


def review_of_synthetic() -> Path:
    """A row of a synthetic Dataset rejected: what its manifest says of teacher and ways stays."""
    old = sartor.open(synthesize())
    first = next(iter(read_examples(old)))
    return reviewed(old, [{"kind": "validation", "reason": "off_topic", "example": first.id}], ["reject"], {})


def review_of_foreign() -> Path:
    """A Dataset whose manifest has no sources, counts or steps, and a key of another program."""
    rows = [
        example(f"Question {number}?", f"Answer {number}.", Origin("a.csv", f"a.csv:{number}", "MIT"))
        for number in range(3)
    ]

    def fill(folder: Path) -> dict[str, Any]:
        write_examples(folder / "examples" / "part-00000.parquet", rows)
        return {"licence": "MIT", "note": "of another program"}

    old = write_artifact(Path("foreign").absolute(), "dataset", fill)
    return reviewed(old, [{"kind": "validation", "reason": "off_topic", "example": rows[0].id}], ["reject"], {})


def reviewed(
    old: Artifact,
    findings: Sequence[Mapping[str, Any]],
    verdicts: Sequence[str],
    changes: Mapping[int, Mapping[str, Any]],
) -> Path:
    """The Dataset in which these findings are decided; an empty verdict leaves one open."""
    # of a fixed Dataset: the id of an item of a slice would else depend on what pyarrow writes
    findings = [{**finding, "of": "a Dataset"} for finding in findings]
    decisions = [
        Decision(
            item_of(finding).id, verdict, "Ada", f"2026-11-26T10:00:00.00000{number}Z", "seen", changes.get(number, {})
        )
        for number, (finding, verdict) in enumerate(zip(findings, verdicts, strict=True))
        if verdict
    ]
    write_jsonl(Path("review.jsonl"), [*findings, *(decision.as_json() for decision in decisions)])
    sartor.review_import(old.path, Path("review.jsonl"))
    return Path(sartor.review_apply(old.path, "reviewed")["dataset"])


def synthesize() -> Path:
    """Rows made of seeds with and without a teacher, and rows made of nothing; an equal one and a held-out seed."""
    seeds = [
        talk("What does delivery to Rome cost?", "It costs 7 euros to Rome."),
        talk("What does delivery to Oslo cost?", "It costs 9 euros to Oslo."),
        talk("Is it open?", "Until nine."),
    ]
    write_jsonl(Path("seeds.jsonl"), seeds)
    lights = {
        "prompts": ["turn {state} the {room} light"],
        "reply": '{"room":"{room}","on":"{state}"}',
        "slots": {"room": ["hall", "attic"], "state": ["on", "off"]},
    }
    recipe = {
        "sources": [{"path": "seeds.jsonl", "licence": "CC-BY-4.0"}],
        "teacher": {"kind": "fake", "licence": "LicenseRef-teacher"},
        "ways": [
            {"vary": {"per_row": 2}},
            {"slot_substitution": {"slots": {"city": ["Rome", "Oslo", "Bern"]}}},
            {"templates": lights},
        ],
        "licence": "CC0-1.0",
    }
    return sartor.synthesize(recipe, "made", teacher=FixedTeacher()).dataset.path


def synthesize_from_dataset() -> Path:
    """Rows made of the training rows of two Datasets, which become parents."""
    write_jsonl(Path("rows.jsonl"), [talk("Is the oven on?", "It is on."), talk("Is the lamp on?", "It is off.")])
    write_jsonl(Path("held.jsonl"), [talk("Is the door open?", "It is open.")])
    sources = [{"path": "rows.jsonl", "licence": "MIT"}, {"path": "held.jsonl", "licence": "CC0-1.0", "split": "eval"}]
    sartor.curate({"sources": sources, "split": {"eval_fraction": 0}, "workers": 1}, "first")
    write_jsonl(Path("others.jsonl"), [talk("Is the heater on?", "It is on.")])
    sartor.curate({"sources": [{"path": "others.jsonl"}], "split": {"eval_fraction": 0}, "workers": 1}, "second")
    ways = [{"slot_substitution": {"slots": {"state": ["on", "off"]}}}]
    return sartor.synthesize({"sources": [{"path": "first"}, {"path": "second"}], "ways": ways}, "made").dataset.path


CASES: dict[str, Callable[[], Path]] = {
    "curate": curate_all,
    "curate_inbox": curate_inbox,
    "derived": derived,
    "derived_of_whole_row_groups": derived_of_whole_row_groups,
    "accepted": accepted,
    "rethreshold_lower": lambda: rethreshold(0.5),
    "rethreshold_higher": lambda: rethreshold(0.95),
    "review": review,
    "review_of_synthetic": review_of_synthetic,
    "review_of_foreign": review_of_foreign,
    "synthesize": synthesize,
    "synthesize_from_dataset": synthesize_from_dataset,
    **{
        f"bias_{kind}": lambda kind=kind: bias(kind)
        for kind in ("reweight", "counterfactual", "substitute", "drop", "generate")
    },
}


@contextmanager
def fixed_versions() -> Iterator[None]:
    """Manifests say VERSIONS, whatever is installed."""
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: VERSIONS.get(name) or real(name)
    try:
        yield
    finally:
        importlib.metadata.version = real


def record_of(dataset: Path) -> dict[str, Any]:
    """What is recorded of a Dataset: its manifest but for times and paths, and the digest of the rows of each Parquet file."""
    manifest: dict[str, Any] = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))
    for key in UNSTABLE:
        manifest.pop(key)
    for parent in manifest["parents"]:
        for key in UNSTABLE_OF_A_PARENT:
            parent.pop(key)
    names = [name for name in manifest["files"] if name.endswith(".parquet")]
    return {"manifest": manifest, "rows": {name: rows_digest(dataset / name) for name in names}}


def rows_digest(file: Path) -> str:
    """sha256 of the rows and columns of a Parquet file, whichever version of pyarrow wrote it."""
    table = pq.read_table(file)
    return digest([[name, str(table.schema.field(name).type)] for name in table.column_names] + table.to_pylist())


def without_parquet_bytes(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what the version of pyarrow decides: the bytes of Parquet files, and the digest over all files."""
    manifest = {name: value for name, value in record["manifest"].items() if name != "digest"}
    files = {name: None if name.endswith(".parquet") else facts for name, facts in manifest["files"].items()}
    return {**record, "manifest": {**manifest, "files": files}}


def as_text(record: Mapping[str, Any]) -> str:
    """The text of a record, keys in their order."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Record every case anew."""
    GOLDEN.mkdir(exist_ok=True)
    PYARROW.write_text(pa.__version__ + "\n")
    for name, write in CASES.items():
        with tempfile.TemporaryDirectory() as folder, fixed_versions():
            os.environ["SARTOR_HOME"] = f"{folder}/sartor-home"
            os.chdir(folder)
            text = as_text(record_of(write()))
            os.chdir(GOLDEN)
        (GOLDEN / f"{name}.json").write_text(text, encoding="utf-8")
        print(name, len(text))


if __name__ == "__main__":
    main()
