"""Probes of the options of curation: steps on a few rows, whole curations of a few rows, `sartor dedup`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image, ImageFilter

import sartor
from dedup_rows import edited, texts
from media_files import scene, tone
from option_probes import Observer, Probe, Workspace, beside_default, probes_of, with_marks
from rows import example, row, step_of
from sample_data import write_jsonl
from sartor.core.artifacts import open_artifact
from sartor.core.errors import GuardError
from sartor.core.licences import compliance
from sartor.core.parquet_io import read_drops, read_examples
from sartor.core.records import Drop, Example, Feedback, FeedbackAuthor, Message, Origin, Part
from sartor.curate.sources import chunk_reader, planner
from sartor.curate.sources.types import Columns, InboxTerms, SourceOptions
from sartor.curate.step import StepInput, StepResult
from sartor.curate.steps.answer_quality import ChatQuality
from sartor.curate.steps.contamination import Contamination
from sartor.curate.steps.domain import Domain
from sartor.curate.steps.group_bias import Bias, Counterfactuals
from sartor.curate.steps.image_duplicates import ImageDuplicates
from sartor.curate.steps.label_errors import SuspiciousLabels
from sartor.curate.steps.media_augmentation import AugmentAudio, AugmentImages
from sartor.curate.steps.media_filters import Audio, Images
from sartor.curate.steps.personal_data import PersonalData
from sartor.curate.steps.semantic_duplicates import SemanticDuplicates
from sartor.curate.steps.text_duplicates import NearDuplicates
from sartor.curate.steps.text_filters import LanguageFilter, Repetition


def removals_of(result: StepResult) -> Any:
    """What a set step decided, without its facts: those repeat some of its options."""
    return (
        [(removal.row, removal.reason, removal.kept_row, removal.score) for removal in result.removals],
        {name: table.to_pylist() for name, table in result.evidence.items()},
        repr(result.then),
    )


SOURCES = ("rows.jsonl", "a.jsonl", "b.jsonl")


def decided_in(step: Any, rows: Sequence[Example], folder: Path) -> StepResult:
    """Run a set step on rows with the columns that the pipeline adds, by the name of each row's source."""
    table = step.sketch(rows, folder)
    columns = {
        "id": [each.id for each in rows],
        "locator": [str(index) for index in range(len(rows))],
        "source": [SOURCES.index(each.origins[0].source) for each in rows],
    }
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    result: StepResult = step.decide(
        StepInput(table, list(SOURCES), lambda numbers: [rows[number] for number in numbers], folder)
    )
    return result


def _rows_observer(cls: type, /, *examples: Example, **base: Any) -> Observer:
    """Observe what a step of one row makes of each row."""

    def observe(values: Any, workspace: Workspace) -> Any:
        apply = step_of(cls, **{**base, **values}).open(workspace.path)
        return [apply(each) for each in examples]

    return observe


def _set_observer(
    cls: type, examples: Sequence[Example] | Callable[[], Sequence[Example]], /, **base: Any
) -> Observer:
    """Observe what a step of all rows decides; what a guard refuses is seen as the rows that it counts."""

    def observe(values: Any, workspace: Workspace) -> Any:
        rows = examples() if callable(examples) else examples
        try:
            return removals_of(decided_in(step_of(cls, **{**base, **values}), rows, workspace.path))
        except GuardError as error:
            return error.problem

    return observe


# --- text

ENGLISH = "You can pick the parcel up at the counter between nine and five, from Monday to Friday."
GERMAN = "Sie können das Paket von Montag bis Freitag zwischen neun und siebzehn Uhr am Schalter abholen."
LANGUAGE_ROWS = (row("?", ENGLISH), row("?", GERMAN), row(GERMAN, ENGLISH), row("?", "Ja gut, das Paket"))
HALF_SAID = " ".join(f"The red car number {index} stops there." for index in range(12))
LONG, *_OTHERS = texts(5, 120)
LONG_WORDS = LONG.split()


def _edited(index: int) -> str:
    return edited(LONG, 0.06, random.Random(index))


NEAR = (
    *(example("q", _edited(index), index, source="a.jsonl") for index in range(12)),
    *(example("q", text, 12 + index, source="b.jsonl") for index, text in enumerate(_OTHERS)),
)
PART = (example("q", LONG, 0), example("q", " ".join(LONG_WORDS[:70]), 1))

TEXT_PROBES = (
    *probes_of(
        "LanguageFilter",
        _set_observer(LanguageFilter, LANGUAGE_ROWS, allow=["en"]),
        {
            "allow": (["en"], ["de"]),
            "min_confidence": (0.6, 1.0),
            "min_letters": (25, 90),
            "unsure": ("keep", "drop"),
            "field": ("reply", "prompt"),
        },
    ),
    *probes_of(
        "Repetition", _rows_observer(Repetition, row("q", HALF_SAID)), {"scale": (1.0, 10.0), "min_words": (50, 500)}
    ),
    *probes_of(
        "NearDuplicates",
        _set_observer(NearDuplicates, NEAR, contained=0),
        {
            "max_source_fraction": (0.75, 1.0),
            "allow": ([], ["a.jsonl"]),
        },
    ),
    *probes_of(
        "NearDuplicates",
        _set_observer(NearDuplicates, NEAR, contained=0, max_source_fraction=1.0),
        {
            "max_fraction": (0.6, 0.9),
            "keep": ("longest", "first"),
            "threshold": (0.4, 0.95),
            "field": ("both", "prompt"),
        },
    ),
    *probes_of("NearDuplicates", _set_observer(NearDuplicates, PART), {"contained": (0.9, 0)}),
    *probes_of(
        "NearDuplicates",
        _set_observer(NearDuplicates, NEAR[:2], contained=0, threshold=0.3),
        {"unit": ("words", "characters")},
    ),
    *probes_of(
        "NearDuplicates", _set_observer(NearDuplicates, NEAR[:2], contained=0, threshold=0.3), {"size": (2, 3)}
    ),
    *probes_of("ChatQuality", _rows_observer(ChatQuality, row(ENGLISH, GERMAN)), {"language": (True, False)}),
    *probes_of(
        "FieldActions",
        lambda values, workspace: _rows_observer(
            PersonalData, row("q", "done", tools='[{"name": "send", "description": "mail bob@example.com"}]')
        )({"fields": values}, workspace),
        {"tools": ("keep", "drop")},
    ),
)

# --- duplicates by meaning, labels, contamination, domain


def _strange(count: int) -> list[tuple[str, str]]:
    rng = random.Random(0)
    words = ["".join(rng.choice("bcdfghklmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(8 * count)]
    return [(" ".join(words[8 * n : 8 * n + 4]), " ".join(words[8 * n + 4 : 8 * n + 8])) for n in range(count)]


SAME_MEANING = (
    ("how can I reset my password", "Open the settings page and choose a new password there!"),
    ("How do I reset my password?", "Open the settings page and choose a new password there ..."),
    (
        "how could I quickly reset my old password now",
        "Open the settings page and choose a new password there, please.",
    ),
)
MEANT = tuple(example(*texts, index) for index, texts in enumerate((*SAME_MEANING, *_strange(30))))
MANY_ALIKE = tuple(
    example(*texts, index)
    for index, texts in enumerate([*([SAME_MEANING[0]] * 8), *([SAME_MEANING[1]] * 8), *_strange(8)])
)
FEW_WORDS = {
    "light": "lamp chandelier spotlight bulb",
    "music": "song album playlist radio",
    "timer": "alarm countdown stopwatch",
}


@cache
def labelled_rows() -> tuple[Example, ...]:
    """Forty commands of three intents, two of them with another's label."""
    rng = random.Random(0)
    rows: dict[str, str] = {}
    while len(rows) < 40:
        intent = rng.choice(sorted(FEW_WORDS))
        thing = rng.choice(FEW_WORDS[intent].split())
        text = f"{rng.choice(['handle', 'check', 'take care of'])} the {thing} in the {rng.choice(['kitchen', 'attic', 'hall', 'porch'])}"
        rows[text] = intent
    flipped = {**rows, list(rows)[3]: "music" if rows[list(rows)[3]] != "music" else "timer"}
    return tuple(
        example(text, json.dumps({"intent": intent, "sure": "yes" if index % 2 else "no"}), index)
        for index, (text, intent) in enumerate(flipped.items())
    )


FREE = tuple(
    example(*texts, index)
    for index, texts in enumerate(
        [
            ("How late is the shop open on Mondays?", "It is open until nine in the evening on that day of the week."),
            (
                "how late is your shop open on mondays then",
                "It is open until nine in the evening on that day of the week.",
            ),
            (
                "How late is your shop open on Mondays please?",
                "We do not sell any red shoes, and never will, so sorry.",
            ),
            *_strange(12),
        ]
    )
)
DOMAIN_WORDS = {
    "cooking": "oven butter flour bake onion simmer salt pan",
    "sailing": "mast rudder wind tack anchor jib deck knot",
}
DOMAIN_EXAMPLES = [
    {"text": " ".join(random.Random(f"{label}{index}").sample(words.split(), 4)), "label": label}
    for label, words in DOMAIN_WORDS.items()
    for index in range(10)
]
DOMAIN_ROWS = (
    row("how to bake onion", "salt and butter in the pan"),
    row("which anchor", "the mast and the rudder in the wind"),
    row("bake onion with salt", "tack the mast to the wind, and the jib"),
)


def _domain_of_words(values: Any, workspace: Workspace) -> Any:
    labelled = [dict(each) for each in DOMAIN_EXAMPLES]
    for each in labelled:
        each.update(values(each))
    return removals_of(decided_in(step_of(Domain, examples=labelled, keep=["cooking"]), DOMAIN_ROWS, workspace.path))


def _contamination(values: Any, workspace: Workspace) -> Any:
    item = " ".join(f"w{index}" for index in range(40))
    files = {
        name: str(write_jsonl(workspace.path / f"{name}.jsonl", [{"question": text, "answer": "yes"}]))
        for name, text in (("held", item), ("other", " ".join(f"v{index}" for index in range(40))))
    }
    options = {"against": ["held"], **values}
    options["against"] = [files[name] for name in options["against"]]
    half = " ".join(f"w{index}" for index in range(26))
    scattered = " ".join(f"w{index}" if index % 8 else "zz" for index in range(40))
    rows = [row(half, "no"), row(scattered, "no"), row(item, "yes")]
    return removals_of(decided_in(step_of(Contamination, **options), rows, workspace.path))


MEANING_PROBES = (
    *probes_of(
        "SemanticDuplicates",
        _set_observer(SemanticDuplicates, MEANT, encoder="tfidf", max_source_fraction=1.0),
        {
            "field": ("both", "all"),
            "threshold": (0.4, 0.99),
            "agreement": (0.9, 0.3),
            "keep": ("longest", "first"),
        },
    ),
    *probes_of(
        "SemanticDuplicates",
        _set_observer(SemanticDuplicates, MANY_ALIKE, encoder="tfidf", max_source_fraction=1.0, max_fraction=1.0),
        {"neighbours": (20, 1), "max_fraction": (0.5, 1.0), "max_source_fraction": (0.5, 1.0)},
    ),
    *probes_of(
        "SemanticDuplicates",
        _set_observer(SemanticDuplicates, MANY_ALIKE, encoder="tfidf", max_source_fraction=0.5),
        {"allow": ([], ["rows.jsonl"])},
    ),
    *probes_of(
        "SemanticDuplicates",
        _set_observer(SemanticDuplicates, MEANT),
        {"encoder": ("tfidf", "no-such-folder")},
        may_refuse=True,
    ),
    *beside_default(
        "SuspiciousLabels",
        _set_observer(SuspiciousLabels, labelled_rows, encoder="tfidf"),
        {"label": "json:sure", "queue_fraction": 0.75, "action": "drop", "seed": 1},
    ),
    *probes_of(
        "SuspiciousLabels",
        _set_observer(SuspiciousLabels, labelled_rows, encoder="tfidf", action="drop"),
        {"max_fraction": (0.1, 0.0)},
    ),
    *probes_of(
        "SuspiciousLabels",
        _set_observer(SuspiciousLabels, FREE, encoder="tfidf", label="text"),
        {"agreement": (0.9, 0.2)},
    ),
    *probes_of(
        "SuspiciousLabels",
        _set_observer(SuspiciousLabels, FREE, encoder="tfidf", label="text", agreement=0.2),
        {"likeness": (0.4, 0.99)},
    ),
    *probes_of(
        "SuspiciousLabels",
        _set_observer(SuspiciousLabels, labelled_rows),
        {"encoder": ("tfidf", "no-such-folder")},
        may_refuse=True,
    ),
    *probes_of(
        "Contamination", _contamination, {"against": (["held"], ["other"]), "ngram": (13, 5), "threshold": (0.5, 0.9)}
    ),
    *probes_of(
        "Domain",
        _set_observer(Domain, DOMAIN_ROWS, examples=DOMAIN_EXAMPLES, keep=["cooking"]),
        {
            "examples": (DOMAIN_EXAMPLES, [{**each, "text": f"{each['text']} salt"} for each in DOMAIN_EXAMPLES]),
            "keep": (["cooking"], ["sailing"]),
            "min_probability": (0.5, 0.02),
            "field": ("all", "prompt"),
        },
    ),
    Probe("Labelled.text", (lambda each: {}, lambda each: {"text": f"{each['text']} salt"}), _domain_of_words),
    Probe(
        "Labelled.label",
        (lambda each: {}, lambda each: {"label": {"cooking": "sailing", "sailing": "cooking"}[each["label"]]}),
        _domain_of_words,
    ),
)

# --- groups of people


def _loans() -> list[Example]:
    rng = random.Random(0)
    rows = []
    for index in range(60):
        name, pronoun, rate = rng.choice((("Emily", "She", 0.2), ("Greg", "He", 0.8)))
        decision = "approve" if rng.random() < rate else "decline"
        asked = f"{name} asks for {rng.randrange(10_000)} euros. {pronoun} works as a cook."
        reply = json.dumps({"decision": decision, "desk": rng.choice("ab")})
        message = (Message.of("user", asked), Message.of("assistant", reply))
        origin = Origin("rows.jsonl", f"rows.jsonl:{index + 1}")
        rows.append(Example(message, (origin,), group=f"g{index % 2}"))
    return rows


GROUP_PROBES = (
    *probes_of(
        "Bias",
        _set_observer(Bias, _loans, outcome="json:decision"),
        {"group": (["sex"], ["group"]), "outcome": ("json:decision", "json:desk"), "mitigate": ("none", "reweight")},
        may_refuse=True,
    ),
    *probes_of(
        "Bias", _set_observer(Bias, _loans, group=["sex"], outcome="json:decision", mitigate="drop"), {"seed": (0, 1)}
    ),
    *probes_of(
        "Counterfactuals",
        lambda values, workspace: [
            list(copies) for copies in _rows_observer(Counterfactuals, *_loans()[:3])(values, workspace)
        ],
        {"group": (["sex"], ["age"])},
    ),
)

# --- media


def _picture_file(file: Path, picture: Image.Image, **more: Any) -> str:
    picture.save(file, **more)
    return file.name


def media_row(kind: Any, name: str, reply: str = "a thing", question: str = "", source: str = "rows.jsonl") -> Example:
    """A row with one medium."""
    parts = (Part(kind, media=name), *([Part("text", question)] if question else []))
    return Example((Message("user", parts), Message.of("assistant", reply)), (Origin(source, f"{source}:1"),))


def _pictures(values: Any, workspace: Workspace) -> Any:
    names = [
        _picture_file(workspace.path / "plain.png", scene(0)),
        _picture_file(workspace.path / "wide.png", scene(1, 400, 60)),
        _picture_file(workspace.path / "blurred.png", scene(2).filter(ImageFilter.GaussianBlur(3))),
    ]
    return _rows_observer(Images, *(media_row("image", name) for name in names))(values, workspace)


def _recordings(values: Any, workspace: Workspace) -> Any:
    rng = np.random.default_rng(0)
    sounds = {"plain": tone(0.5), "clipped": np.clip(tone(0.5, 3.0), -1, 1), "soft": 0.003 * rng.standard_normal(8000)}
    for name, samples in sounds.items():
        soundfile.write(workspace.path / f"{name}.wav", samples, 16_000)
    rows = [media_row("audio", f"{name}.wav", "twenty characters, and then some") for name in sounds]
    rows.append(media_row("audio", "plain.wav", "a reply that is much too long for half a second " * 3, "What is it?"))
    return _rows_observer(Audio, *rows)(values, workspace)


def _like_pictures(values: Any, workspace: Workspace) -> Any:
    first = scene(0)
    names = [
        _picture_file(workspace.path / "a.png", first.resize((120, 100))),
        _picture_file(workspace.path / "b.jpg", first, quality=30),
        _picture_file(workspace.path / "c.png", scene(5)),
    ]
    rows = [
        media_row("image", names[0], "one", "What?"),
        media_row("image", names[1], "another", "What?"),
        media_row("image", names[0], "two", "Which?"),
        media_row("image", names[2], "one", "What?"),
    ]
    step = step_of(ImageDuplicates, **values)
    return removals_of(decided_in(step, rows, workspace.path))


def _many_pictures(values: Any, workspace: Workspace) -> Any:
    name = _picture_file(workspace.path / "same.png", scene(0))
    other = _picture_file(workspace.path / "other.png", scene(5))
    rows = [media_row("image", name, f"r{index}", "What?") for index in range(13)] + [
        media_row("image", other, "x", "What?")
    ]
    step = step_of(ImageDuplicates, **{"max_fraction": 0.95, "max_source_fraction": 1.0, **values})
    try:
        return removals_of(decided_in(step, rows, workspace.path))
    except GuardError as error:
        return error.problem


STILL: dict[str, Any] = {"rotation_degrees": 0, "crop": 1, "light": {"brightness": 0, "contrast": 0, "colour": 0}}
SILENT: dict[str, Any] = {"speed": 0, "gain_db": 0, "shift_s": 0}


def _copies(cls: type, kind: Any, name: str, base: dict[str, Any]) -> Observer:
    """Observe the content of the media that a step makes, by their names, which are digests."""

    def observe(values: Any, workspace: Workspace) -> Any:
        folder = workspace.folder()
        (folder / "media").mkdir()
        if kind == "image":
            _picture_file(folder / name, scene(0, 60, 40))
        else:
            soundfile.write(folder / name, tone(0.3), 16_000)
        copies = step_of(cls, **{**base, **values}).open(folder)(media_row(kind, name))
        return [copy.row.messages[0].content[0].media for copy in copies]

    return observe


def _light(values: Any, workspace: Workspace) -> Any:
    light = {"brightness": 0, "contrast": 0, "colour": 0, **values}
    return _copies(AugmentImages, "image", "a.png", {**STILL, "blur": 1})({"light": light}, workspace)


MEDIA_PROBES = (
    *probes_of("Images", _pictures, {"min_side": (32, 100), "max_aspect": (10.0, 2.0), "min_sharpness": (0.001, 0.9)}),
    *probes_of(
        "Audio",
        _recordings,
        {
            "min_rate": (8000, 44_100),
            "min_seconds": (0.1, 1.0),
            "max_seconds": (3600.0, 0.2),
            "silence_db": (-60.0, -20.0),
            "max_clipped": (0.01, 1.0),
            "max_chars_per_s": (35.0, 1.0),
            "min_chars_per_s": (0.0, 500.0),
            "transcripts": ("auto", "always"),
        },
    ),
    *probes_of(
        "ImageDuplicates",
        _like_pictures,
        {"threshold": (0.75, 1.0), "text": ("question", "any"), "keep": ("largest", "first")},
    ),
    *probes_of(
        "ImageDuplicates",
        _many_pictures,
        {"max_source_fraction": (0.5, 1.0), "max_fraction": (0.5, 0.95)},
    ),
    *probes_of(
        "ImageDuplicates",
        lambda values, workspace: _many_pictures({"max_source_fraction": 0.5, **values}, workspace),
        {"allow": ([], ["rows.jsonl"])},
    ),
    *probes_of(
        "AugmentImages",
        _copies(AugmentImages, "image", "a.jpg", {**STILL, "noise": 2}),
        {
            "copies": (2, 3),
            "flip": ([], ["horizontal", "vertical"]),
            "rotation_degrees": (0.0, 20.0),
            "crop": (1.0, 0.5),
            "light": (STILL["light"], {"brightness": 0.5}),
            "blur": (0.0, 20.0),
            "noise": (2.0, 30.0),
            "jpeg_quality": (0, 5),
            "seed": (0, 1),
        },
    ),
    *probes_of("Light", _light, {"brightness": (0, 0.5), "contrast": (0, 0.5), "colour": (0, 0.5)}),
    *probes_of(
        "AugmentAudio",
        _copies(AugmentAudio, "audio", "a.wav", {**SILENT, "gain_db": 1}),
        {
            "copies": (2, 3),
            "speed": (0.0, 0.3),
            "gain_db": (1.0, 20.0),
            "noise_db": (0.0, 10.0),
            "shift_s": (0.0, 0.5),
            "telephone": (0.0, 1.0),
            "time_mask_s": (0.0, 0.2),
            "seed": (0, 1),
        },
    ),
)

# --- whole curations


def curated(recipe: dict[str, Any], workspace: Workspace) -> Any:
    """Curate and return the rows of each split and the rows dropped."""
    out = workspace.folder() / "dataset"
    sartor.curate({"workers": 1, **recipe}, out)
    dataset = open_artifact(out)
    return (
        {
            split: [(each.id, each.weight, each.origins[0].date) for each in read_examples(dataset, split)]
            for split in ("train", "eval")
        },
        [(drop.reason, drop.locator) for drop in read_drops(dataset)],
    )


def _questions(count: int = 12, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {index % 6} of many", "completion": f"answer {index}", "group": f"g{index}", **more}
        for index in range(count)
    ]


def _curation(values: Any, workspace: Workspace) -> Any:
    """A curation of twelve rows of six questions."""
    file = write_jsonl(workspace.path / "rows.jsonl", _questions())
    write_jsonl(workspace.path / "other.jsonl", _questions(3))
    recipe = {"sources": [{"path": str(file)}], "split": {"eval_fraction": 0.3}, "steps": [], **values}
    for source in recipe["sources"]:
        source["path"] = str(workspace.path / source["path"])
    return curated(recipe, workspace)


def _split(values: Any, workspace: Workspace) -> Any:
    return _curation({"split": {"eval_fraction": 0.3, **values}}, workspace)


def _source(values: Any, workspace: Workspace) -> Any:
    return _curation({"sources": [{"path": "rows.jsonl", **values}]}, workspace)


def _permission(values: Any, workspace: Workspace) -> Any:
    """Which uses a Dataset's sources permit, and what they oblige to."""
    file = write_jsonl(workspace.path / "rows.jsonl", _questions(3))
    out = workspace.folder() / "dataset"
    source = {"path": str(file), "licence": "CC-BY-4.0", **values}
    sartor.curate({"sources": [source], "workers": 1, "steps": []}, out)
    manifest = open_artifact(out).manifest
    return compliance.permitted(manifest["sources"]), manifest["obligations"], manifest["licence"]


def _captions(values: Any, workspace: Workspace) -> Any:
    folder = workspace.path / "pictures" / "cat"
    folder.mkdir(parents=True, exist_ok=True)
    _picture_file(folder / "a.png", scene(0))
    (folder / "a.txt").write_text("a red box")
    return curated({"sources": [{"path": str(folder.parent), **values}], "steps": []}, workspace)


def _rehearsal(values: Any, workspace: Workspace) -> Any:
    """Ids and weights of rows of which half are rehearsal, some of them held out otherwise."""
    file = write_jsonl(
        workspace.path / "talk.jsonl", [{"prompt": f"hello {index}", "completion": "hi"} for index in range(12)]
    )
    return curated(
        {"sources": [{"path": str(file), **values}], "split": {"eval_fraction": 0.5}, "steps": []}, workspace
    )


def _copied_rehearsal(step: dict[str, Any], rows: Callable[[Path], list[dict[str, Any]]]) -> Observer:
    """The number of rows of a curation whose one source is rehearsal, and that ends with a step that copies."""

    def observe(values: Any, workspace: Workspace) -> Any:
        ((kind, options),) = step.items()
        file = write_jsonl(workspace.path / "rows.jsonl", rows(workspace.path))
        recipe = {"sources": [{"path": str(file), "rehearsal": True}], "steps": [{kind: {**options, **values}}]}
        return len(curated(recipe, workspace)[0]["train"])

    return observe


def _picture_rows(folder: Path) -> list[dict[str, Any]]:
    _picture_file(folder / "a.png", scene(0))
    soundfile.write(folder / "a.wav", tone(0.3), 16_000)
    parts = [[{"type": "image", "image": "a.png"}], [{"type": "audio", "audio": "a.wav"}]]
    return [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
        for content in parts
    ]


def _table(values: Any, workspace: Workspace) -> Any:
    """What becomes of a table whose columns have names of their own, in a code page of its own."""
    lines = [
        {
            **{
                name: f"{name} {index}"
                for name in ("Frage", "Antwort", "Besser", "Schlechter", "Ton", "Kunde", "Text")
            },
            **{
                "Note": -1 if index else 1,
                "Gewicht": 2,
                "Tag": "2024-01-01",
                "Verlauf": _said(index),
                "Fall": index // 2,
            },
            **{"Wer": "user" if index % 2 == 0 else "bot", "Umlaut": "Größe", "Rolle": "user"},
        }
        for index in range(4)
    ]
    file = workspace.folder() / "table.jsonl"
    file.write_bytes("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("cp1252"))
    fields = Columns(prompt="Umlaut", completion="Antwort")
    source = SourceOptions(str(file), **{"encoding": "cp1252", "fields": fields, **values})
    found = planner.read_all(source, 1 << 20, file.parent / "media")
    return [
        each.id if isinstance(each, Drop) else (each.id, each.group, each.rating, each.weight, each.origins[0].date)
        for each in found
    ]


def _said(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"u{index}"}, {"role": "assistant", "content": f"a{index}"}]


def _columns(values: Any, workspace: Workspace) -> Any:
    base = {"prompt": "Frage", "completion": "Antwort"}
    if "chosen" in values or "rejected" in values:
        base = {"prompt": "Frage", "chosen": "Besser", "rejected": "Schlechter"}
    if "messages" in values or "text" in values:
        base = {}
    if {"conversation", "role", "content"} & set(values):
        base = {"conversation": "Fall", "role": "Wer", "content": "Text"}
    return _table({"fields": Columns(**{**base, **values})}, workspace)


CURATION_PROBES = (
    *probes_of(
        "SourceOptions",
        _table,
        {
            "fields": (Columns(prompt="Frage", completion="Antwort"), Columns(prompt="Antwort", completion="Frage")),
            "system": ("", "Be brief."),
            "encoding": ("cp1252", "cp850"),
        },
    ),
    *probes_of(
        "Columns",
        _columns,
        {
            "prompt": ("Frage", "Kunde"),
            "completion": ("Antwort", "Kunde"),
            "system": ("", "Ton"),
            "chosen": ("Besser", "Kunde"),
            "rejected": ("Schlechter", "Kunde"),
            "messages": ("", "Verlauf"),
            "text": ("Text", "Kunde"),
            "conversation": ("Fall", "Kunde"),
            "role": ("Wer", "Rolle"),
            "content": ("Text", "Kunde"),
            "group": ("", "Kunde"),
            "rating": ("", "Note"),
            "weight": ("", "Gewicht"),
            "date": ("", "Tag"),
        },
        may_refuse=True,
    ),
    *probes_of("Split", _split, {"eval_fraction": (0.3, 0.6), "by": ("group", "prompt")}),
    *probes_of(
        "CurateRecipe",
        _curation,
        {
            "sources": ([{"path": "rows.jsonl"}], [{"path": "other.jsonl"}]),
            "steps": ([], [{"length": {"min_words": 3}}]),
            "split": ({"eval_fraction": 0.3}, {"eval_fraction": 0.6}),
            "seed": (0, 1),
            "max_row_bytes": (1000, 75),
        },
        may_refuse=True,
    ),
    *probes_of(
        "SourceOptions",
        _source,
        {"path": ("rows.jsonl", "other.jsonl"), "split": ("train", "eval"), "date": ("2024-01-01", "2025-01-01")},
    ),
    *probes_of("SourceOptions", _rehearsal, {"rehearsal": (False, True)}),
    *probes_of("SourceOptions", _captions, {"prompt": ("What?", "Which?"), "captions": ("beside", "folder")}),
    *probes_of(
        "SourceOptions",
        _permission,
        {
            "licence": ("CC-BY-4.0", "CC-BY-NC-4.0"),
            "use": ([], ["research"]),
            "share_alike": (False, True),
            "non_commercial": (False, True),
            "expires": ("", "2020-01-01"),
            "consent": ("given", "withdrawn"),
        },
    ),
    *probes_of(
        "Counterfactuals",
        _copied_rehearsal(
            {"counterfactuals": {}},
            lambda folder: [{"prompt": "Emily asks. She waits.", "completion": "She gets it."}],
        ),
        {"rehearsal": (False, True)},
    ),
    *probes_of(
        "AugmentImages", _copied_rehearsal({"augment_images": {}}, _picture_rows), {"rehearsal": (False, True)}
    ),
    *probes_of("AugmentAudio", _copied_rehearsal({"augment_audio": {}}, _picture_rows), {"rehearsal": (False, True)}),
)

# --- feedback


def _feedback(
    number: int, key: str, *, question: str = "", reply: str = "a", consent: str = "given", **more: Any
) -> Feedback:
    author = FeedbackAuthor(key, "", consent)
    messages = ({"role": "user", "content": question or f"q{number}"},)
    agent = more.pop("agent", "faq@1.0")
    return Feedback(
        date="2026-11-26T10:00:00Z",
        by=author,
        receipt=f"r{number}",
        agent=agent,
        messages=messages,
        reply=reply,
        **more,
    )


def _inbox_lines() -> list[Feedback]:
    """Five keys rate thirty replies; one contradicts the others on seven in ten, one rates many more."""
    lines = []
    for reply in range(30):
        for key in range(5):
            rating = (1.0 if reply % 3 else -1.0) * (-1 if key == 4 and reply % 10 < 7 else 1)
            lines.append(_feedback(5 * reply + key, f"k{key}", question=f"q{reply}", rating=rating))
    lines += [_feedback(1000 + index, "k0", question=f"p{index}", rating=1.0) for index in range(100)]
    lines += [_feedback(200, "k0", rating=1.0, agent="hr@1.0"), _feedback(201, "k1", rating=1.0, consent="assumed")]
    return lines


def _known_answers() -> list[dict[str, Any]]:
    """Answers by which the key that contradicts the others is right."""
    return [
        {"question": f"q{reply}", "answer": "no" if (reply % 3 > 0) == (reply % 10 < 7) else "a"}
        for reply in range(30)
    ]


def _inbox(values: Any, workspace: Workspace) -> Any:
    folder = workspace.folder() / "inbox"
    folder.mkdir()
    (folder / "feedback-2026-11-26.jsonl").write_text(
        "".join(json.dumps(line.as_json()) + "\n" for line in _inbox_lines())
    )
    if "known" in values and values["known"]:
        write_jsonl(folder.parent / "known.jsonl", _known_answers())
        values = {"known": str(folder.parent / "known.jsonl")}
    source = SourceOptions(f"inbox:{folder}", inbox=InboxTerms(**{"most_fraction": 1.0, **values}))
    (unit,) = planner.plan_reading([source], 1 << 20).chunks
    read = list(chunk_reader.read_chunk(unit, source, folder.parent / "media", False))
    return [each.id if isinstance(each, Example) else each.reason for each in read]


INBOX_PROBES = (
    *probes_of(
        "InboxTerms",
        _inbox,
        {
            "agent": ("", "hr"),
            "consent": ("assumed", "given"),
            "disagreement": (0.33, 0.9),
            "alpha": (0.01, 1e-9),
            "known": ("", "known.jsonl"),
        },
    ),
    *probes_of(
        "InboxTerms",
        lambda values, workspace: _inbox(
            {"most_rows": 5, "most_fraction": 0.01, "disagreement": 0.9, **values}, workspace
        ),
        {"most_rows": (5, 400), "most_fraction": (0.01, 1.0), "seed": (0, 1)},
    ),
    *probes_of(
        "SourceOptions",
        lambda values, workspace: _inbox(values["inbox"], workspace),
        {"inbox": ({"agent": ""}, {"agent": "hr"})},
    ),
)

# --- the command that needs no recipe


def _dedup(values: Any, workspace: Workspace) -> Any:
    folder = workspace.folder()
    rows = [{"text": _edited(index), "title": f"t{index}"} for index in range(12)]
    rows += [{"text": " ".join(LONG_WORDS[:70]), "title": "t0"}, {"text": _OTHERS[0], "title": "t0"}]
    files = [str(write_jsonl(folder / "a.jsonl", rows)), str(write_jsonl(folder / "b.jsonl", rows[:2]))]
    if "allow" in values:
        values = {**values, "allow": tuple(files[:1]) if values["allow"] else ()}
    options = {"max_source_fraction": 1.0, "max_fraction": 1.0, "processes": 1, **values}
    done = sartor.dedup(files, folder / "out", **options)
    kept = [file.read_text() for file in sorted((folder / "out").rglob("*.jsonl"))]
    return done.artifact.manifest["counts"], done.artifact.manifest["inputs"][0]["fields"], kept


DEDUP_PROBES = (
    *probes_of(
        "DedupOptions",
        _dedup,
        {
            "text_field": ("text", "title"),
            "threshold": (0.3, 0.99),
            "contained": (0.9, 0),
            "unit": ("words", "characters"),
            "size": (1, 9),
            "keep": ("longest", "first"),
            "max_source_fraction": (0.5, 1.0),
            "max_fraction": (0.2, 1.0),
            "max_row_bytes": (4000, 300),
        },
        may_refuse=True,
    ),
    *probes_of(
        "DedupOptions",
        lambda values, workspace: _dedup({"max_source_fraction": 0.5, **values}, workspace),
        {"allow": ((), ("a.jsonl",))},
        may_refuse=True,
    ),
)


PROBES: tuple[Probe, ...] = (
    *TEXT_PROBES,
    *MEANING_PROBES,
    *GROUP_PROBES,
    *MEDIA_PROBES,
    *with_marks(CURATION_PROBES, repeats=False),
    *with_marks(INBOX_PROBES, repeats=False),
    *with_marks(DEDUP_PROBES, repeats=False),
)
