"""The data card: what it says is what the facts and files say, it is the same bytes every time, and no row becomes markup."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt

from page_markup import HOSTILE, Tags
from sartor.core import html as page
from sartor.core import parquet_io
from sartor.core.records import Drop, Example, Message, Origin, Part, count_values
from sartor.core.text_differences import TextPiece, differences
from sartor.curate import card
from sartor.curate.card import metadata as hub
from sartor.curate.card import render
from sartor.curate.card.blocks import (
    Block,
    ConversationBlock,
    Dropped,
    Folded,
    Headlines,
    Listing,
    Pictures,
    Plot,
    Prose,
    QuotedText,
    Section,
    Table,
)
from sartor.curate.card.card_data import gather, short_path

OURS = """html meta title style body h1 h2 h3 h4 p div b span bdi table tr th td figure figcaption svg g rect text line path pre
details summary mark i"""


def example(prompt: str, reply: str, **fields: Any) -> Example:
    origin = Origin(
        fields.pop("source", "faq.jsonl"), fields.pop("locator", "faq.jsonl:1"), fields.pop("licence", "MIT")
    )
    return Example(
        (Message.of("user", prompt), Message.of("assistant", reply)), (origin,), **{"split": "train", **fields}
    )


def kept_rows() -> list[Example]:
    return [
        example(
            f"how long does permit number {n} take in the city of {n % 7}",
            f"it takes {n} weeks and the office writes a letter to you",
            locator=f"faq.jsonl:{n}",
            source="faq.jsonl" if n % 3 else "crm.csv",
            group=str(n % 20),
            split="eval" if n % 20 in (3, 4) else "train",
            steps=("repair_text",) if n % 10 == 0 else (),
        )
        for n in range(100)
    ]


def drops_of(kept: Sequence[Example]) -> list[Drop]:
    survivor = kept[4]
    twin = "user: how long does permit number 4 take in the town of 4\nassistant: it takes 4 weeks and the office writes a letter to you"
    near = Drop(
        "near_duplicate",
        "crm.csv",
        "crm.csv:7",
        "0.91 alike",
        "near_duplicates",
        "ab" * 16,
        survivor.id,
        twin,
        0.91,
        "jaccard",
    )
    short = [
        Drop("too_short", "faq.jsonl", f"faq.jsonl:{n}", "1 word", "length", f"{n:032x}", "", "user: a")
        for n in range(200, 205)
    ]
    broken = Drop("not_json", "faq.jsonl", "faq.jsonl:300", "the line is not JSON", text="{broken")
    secret = Drop("personal_data", "faq.jsonl", "faq.jsonl:301", "IBAN_CODE in the prompt", "personal_data", "cd" * 16)
    return [near, *short, broken, secret]


def facts_of(kept: Sequence[Example], drops: Sequence[Drop]) -> dict[str, Any]:
    def source(name: str, licence: str) -> dict[str, Any]:
        count = sum(row.origins[0].source == name for row in kept)
        return {
            "source": name,
            "path": name,
            "sha256": "ab" * 32,
            "bytes": 9,
            "licence": licence,
            "use": ["commercial"],
            "form": "messages",
            "read": count + 1,
            "kept": count,
        }

    return {
        "recipe": {
            "sources": [{"path": "faq.jsonl"}],
            "steps": [
                {"kind": "repair_text"},
                {"kind": "personal_data"},
                {"kind": "length", "min_words": 3},
                {"kind": "near_duplicates", "threshold": 0.8},
            ],
            "seed": 0,
        },
        "sources": [source("faq.jsonl", "MIT"), source("crm.csv", "CC-BY-NC-4.0")],
        "licence": "CC-BY-NC-4.0 AND MIT",
        "licence_conflicts": ["crm.csv forbids commercial use."],
        "obligations": ["Keep the MIT notice."],
        "counts": {
            "read": len(kept) + len(drops),
            "kept": len(kept),
            "dropped": count_values(drop.reason for drop in drops),
            "splits": count_values(row.split for row in kept),
            "groups": {"train": 18, "eval": 2},
        },
        "steps": {
            "personal_data": {"entities": {"EMAIL_ADDRESS": 41, "IBAN_CODE": 1}},
            "near_duplicates": {"clusters": 1},
        },
        "versions": {"sartor": "0.1.0"},
    }


def dataset(
    folder: Path, kept: Sequence[Example], drops: Sequence[Drop], facts: dict[str, Any] | None = None, parts: int = 1
) -> Path:
    size = -(-len(kept) // parts) or 1
    for part in range(parts):
        parquet_io.write_examples(
            folder / "examples" / f"part-{part:05d}.parquet", kept[part * size : (part + 1) * size]
        )
    parquet_io.write_drops(folder / "drops" / "part-00000.parquet", drops)
    card.write(folder, facts_of(kept, drops) if facts is None else facts)
    return folder


def evidence(folder: Path, name: str, columns: dict[str, Any]) -> None:
    (folder / "evidence").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "evidence" / f"{name}.parquet")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    kept = kept_rows()
    first = [kept[n].id for n in range(12)]
    evidence(
        tmp_path, "near_duplicates", {"a": first, "b": first[::-1], "score": [0.9] * 12, "method": ["jaccard"] * 12}
    )
    queue = {
        "rank": range(1, 13),
        "id": first,
        "given": ["lamp"] * 12,
        "suggested": ["door"] * 12,
        "score": [0.1] * 12,
    }
    evidence(tmp_path, "suspicious_labels", {key: list(values) for key, values in queue.items()})
    return dataset(tmp_path, kept, drops_of(kept))


def outputs(folder: Path) -> dict[str, str]:
    files = [folder / "card.md", folder / "card.html", folder / "croissant.json", *sorted((folder / "card").glob("*"))]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_is_inert(folder: Path) -> None:
    """Both cards hold only markup of ours: no script, no address, no attribute that acts; plots are whole XML."""
    html = (folder / "card.html").read_text(encoding="utf-8")
    found = Tags(html)
    assert {tag for tag, _ in found.tags} <= set(OURS.split())
    assert found.acting({"href", "src", "style"}) == set()
    assert "default-src 'none'" in html
    for file in (folder / "card").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ET.parse(file).getroot().iter()}
        assert tags <= {"svg", "style", "g", "rect", "text", "line", "path"}
    tokens = MarkdownIt("commonmark").enable("table").parse(body_of(folder))
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    assert {token.type for token in flat} & {"html_block", "html_inline", "link_open"} == set()
    pictures = [str(token.attrs["src"]) for token in flat if token.type == "image"]
    assert all(re.fullmatch(r"card/[A-Za-z0-9-]+\.svg", name) and (folder / name).is_file() for name in pictures)
    outside = "".join(token.content for token in flat if token.type == "text")
    assert not re.search(r"www\.|://|@|:smile:|evil|\$|javascript", outside)


def body_of(folder: Path) -> str:
    return (folder / "card.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]


def test_the_numbers_of_the_card_are_those_of_the_facts(written: Path) -> None:
    facts, text = facts_of(kept_rows(), drops_of(kept_rows())), Tags((written / "card.html").read_text()).text
    for value in (
        "100 rows kept",
        "108",
        "faq.jsonl",
        "CC-BY-NC-4.0 AND MIT",
        "crm.csv forbids commercial use.",
        "Keep the MIT notice.",
    ):
        assert value in text
    assert "90 rows, 90.0 %, 18 groups" in text and "10 rows, 10.0 %, 2 groups" in text
    assert "EMAIL_ADDRESS 41" in text.replace("\n", " ") and "12 pairs (jaccard 12)" in text
    for reason, count in facts["counts"]["dropped"].items():
        assert re.search(rf"\| `{reason}` \| `\w+` \| {count} \|", body_of(written))
    assert "Counts differ" not in text


def test_what_the_facts_lack_is_counted_from_the_files(tmp_path: Path) -> None:
    kept = kept_rows()
    found = gather(dataset(tmp_path, kept, drops_of(kept), {}), {})
    assert (found.rows_kept, found.rows_read, found.splits) == (100, 108, {"train": 90, "eval": 10})
    assert found.dropped == {"too_short": 5, "near_duplicate": 1, "not_json": 1, "personal_data": 1}
    assert found.rows.changed == {"repair_text": 10}


def test_counts_that_differ_from_the_files_are_said(tmp_path: Path) -> None:
    kept, drops = kept_rows(), drops_of(kept_rows())
    facts = facts_of(kept, drops)
    facts["counts"]["kept"] = 99
    said = Tags((dataset(tmp_path, kept, drops, facts) / "card.html").read_text()).text
    assert "the manifest counts 99 rows kept; examples/ holds 100." in said and "do not add up" in said


def test_the_way_from_read_to_kept_follows_the_recipe(written: Path) -> None:
    found = gather(written, facts_of(kept_rows(), drops_of(kept_rows())))
    assert found.stages() == [
        ("rows in the sources", 108, 0),
        ("unusable", 107, 1),
        ("repair_text", 107, 0),
        ("personal_data", 106, 1),
        ("length", 101, 5),
        ("near_duplicates", 100, 1),
        ("kept", 100, 0),
    ]


def test_lengths_are_counted_in_words_by_split_and_side(tmp_path: Path) -> None:
    talk = Example(
        (
            Message.of("system", "be kind"),
            Message.of("user", "a b"),
            Message.of("assistant", "c"),
            Message.of("user", "d"),
            Message.of("assistant", " e  f\n g "),
        ),
        (Origin("a", "a:1"),),
        split="train",
    )
    text = Example((Message.of("assistant", "one two three"),), (Origin("a", "a:2"),), split="eval")
    found = gather(dataset(tmp_path, [talk, text], []), {}).rows
    assert found.words["train", "prompt"].tolist() == [0, 0, 0, 0, 0, 1]
    assert found.words["train", "reply"].tolist() == [0, 0, 0, 0, 1]
    assert found.words["eval", "reply"].tolist() == [0, 0, 0, 1]
    assert ("eval", "prompt") not in found.words and found.documents == 1
    assert (found.turns[1], found.turns[5]) == (1, 1)


def test_duplicate_is_shown_beside_the_kept_row(written: Path) -> None:
    """Differing words are marked; score and method stand beside the place of the kept row."""
    html, text = (written / "card.html").read_text(), body_of(written)
    assert "<mark>town</mark>" in html and "<mark>city</mark>" in html
    assert "[-town-]" in text and "{+city+}" in text and "stays: `faq.jsonl:4` · 0.910 `jaccard`" in text


def test_long_stretches_that_are_alike_are_left_out_and_counted() -> None:
    same = " ".join(f"w{n}" for n in range(100))
    one, other = differences(f"{same} a {same}", f"{same} b {same}")
    assert [piece.text for piece in one if piece.differs] == ["a"]
    assert [piece.text for piece in other if piece.differs] == ["b"]
    shown = sum(len(piece.text.split()) for piece in one)
    assert sum(piece.left_out for piece in one) + shown == 201 and shown < 60


def test_drops_without_an_id_are_chosen_by_lot_too(tmp_path: Path) -> None:
    drops = [Drop("not_json", "a.jsonl", f"a.jsonl:{n:04d}", text=str(n)) for n in range(400)]
    held = [drop.locator for drop in gather(dataset(tmp_path, kept_rows(), drops, {}), {}).drops.shown["not_json"]]
    assert len(set(held)) == 12 and max(held) > "a.jsonl:0200"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("chitchat/dataset.json", "chitchat"),
        ("faq.jsonl", "faq"),
        ("hub:ann/talks", "talks"),
        ("dir/*.jsonl", "dir"),
        ("sql:postgresql://u:p@h/d#SELECT 1", "sql"),
        ("/abs/x/crm.v2.csv", "crm.v2"),
        ("folder/", "folder"),
    ],
)
def test_a_dataset_is_called_by_its_sources(tmp_path: Path, source: str, name: str) -> None:
    assert gather(dataset(tmp_path, kept_rows()[:1], [], {}), {"sources": [{"source": source}]}).name == name


def test_a_drop_whose_text_was_not_written_shows_none(written: Path) -> None:
    assert "**dropped** `personal_data` · `faq.jsonl:301`" in body_of(written)
    assert "The step wrote no text of it." in body_of(written)


def test_the_head_of_the_queue_is_shown_in_order(written: Path) -> None:
    ranks = re.findall(r"^\| (\d+) \| `how long", body_of(written), re.MULTILINE)
    assert ranks == [str(n) for n in range(1, 11)]
    assert "12 rows are queued" in body_of(written)


def test_nothing_of_hostile_rows_becomes_markup(tmp_path: Path) -> None:
    kept = [
        example(
            f"{text} {n}", text, source=text[:300], locator=f"{text}:{n}"[:300], group=text[:50], licence=text[:100]
        )
        for n in range(3)
        for text in HOSTILE
    ]
    drops = [
        Drop(
            f"rule:{text[:200]}",
            text[:300],
            text[:300],
            text[:500],
            text[:80],
            f"{n:032x}",
            kept[n].id,
            text[:2000],
            0.5,
            text[:60],
        )
        for n, text in enumerate(HOSTILE)
    ]
    facts = facts_of(kept, drops)
    facts["sources"] = [
        {**facts["sources"][0], "source": text, "path": text, "licence": text, "terms": {text[:50]: text}}
        for text in HOSTILE
    ]
    facts |= {
        "licence": HOSTILE[1],
        "licence_conflicts": HOSTILE,
        "obligations": HOSTILE,
        "name": " ".join(HOSTILE[:6]),
    }
    facts["recipe"]["steps"] = [{"kind": text[:90], text[:90]: text} for text in HOSTILE]
    facts["steps"] = {
        text[:80]: {text[:80]: {text[:80]: 3, "b": 2}, "list": HOSTILE, "deep": {text[:80]: text}} for text in HOSTILE
    }
    facts["counts"]["splits"] = {text[:80]: 3 for text in HOSTILE}
    ids = [row.id for row in kept[:12]]
    evidence(
        tmp_path,
        "near_duplicates",
        {"a": ids, "b": ids, "score": [0.5] * 12, "method": [text[:90] for text in HOSTILE]},
    )
    evidence(tmp_path, "queue", {"rank": list(range(12)), "id": ids, "given": HOSTILE, "suggested": HOSTILE})
    dataset(tmp_path, kept, drops, facts)
    assert_is_inert(tmp_path)
    html = (tmp_path / "card.html").read_text(encoding="utf-8")
    assert "\u202e" not in html and "‹U+202E›" in html and "\x00" not in html and "␀" in html
    assert len(html) < 600_000, "a hundred thousand characters in one word are cut"
    head = yaml.safe_load(
        (tmp_path / "card.md").read_text(encoding="utf-8").split("\n---\n", 1)[0].removeprefix("---\n")
    )
    assert head["license"] == "other" and head["license_name"].startswith("</style>")


@pytest.mark.parametrize("text", HOSTILE)
def test_each_hostile_text_alone_as_a_label_stays_text(tmp_path: Path, text: str) -> None:
    label = text[:60]
    dataset(
        tmp_path, [example(f"{text[:5000]} {n}", label if n % 2 else "other") for n in range(8)], [], {"name": text}
    )
    assert_is_inert(tmp_path)
    json.loads((tmp_path / "croissant.json").read_text(encoding="utf-8"))


def blocks_of(text: str) -> list[Block]:
    """One block of each class or more, with `text` in every field that holds text."""
    quoted, piece = QuotedText(text), TextPiece(text)
    plot = Plot("plot", text, "<rect/>", 10, 20, note=text)
    return [
        Prose((text, quoted, QuotedText(text, prose=True))),
        Prose(text, "warn"),
        Headlines([(text, text)]),
        Table([text], [[quoted], [(text, quoted)]], names=True),
        Table([text] * 5, [[text] * 5], frozenset({1})),
        plot,
        Pictures([plot]),
        Listing(text),
        ConversationBlock([(text, text)], quoted),
        Dropped(quoted, quoted, quoted, [piece, TextPiece(text, differs=True)], quoted, [piece]),
        Folded(text, [Listing(text)]),
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_each_block(text: str) -> None:
    blocks = blocks_of(text)
    assert {type(block) for block in blocks} == set(get_args(Block))
    plain, hostile = (Tags(render.render_html(each, [Section(each, blocks_of(each))])) for each in ("word", text))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert hostile.acting({"href", "src", "style"}) == set()


@pytest.mark.parametrize("text", ["a|b", "`", "``x`", "\\", "ends with \\", " `a` ", "x\ny", "|", "``` ```` `"])
def test_a_code_span_in_a_table_cell_holds_exactly_its_text(text: str) -> None:
    table = f"| head | next |\n| --- | --- |\n| {render.code(text, '∣')} | after |\n"
    cells = [
        token.children for token in MarkdownIt("commonmark").enable("table").parse(table) if token.type == "inline"
    ][2:]
    assert [[(child.type, child.content) for child in cell or ()] for cell in cells] == [
        [("code_inline", " ".join(text.replace("|", "∣").split()))],
        [("text", "after")],
    ]


def test_card_is_byte_identical_in_another_process(written: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Folder, hash seed, time zone and locale change nothing, and no output names the folder."""
    other = tmp_path_factory.mktemp("elsewhere") / "deep" / "er"
    dataset(other, kept_rows(), drops_of(kept_rows()))
    for name in ("near_duplicates", "suspicious_labels"):
        (other / "evidence").mkdir(exist_ok=True)
        (other / "evidence" / f"{name}.parquet").write_bytes((written / "evidence" / f"{name}.parquet").read_bytes())
    (other / "facts.json").write_text(json.dumps(facts_of(kept_rows(), drops_of(kept_rows()))))
    code = "import json,sys,pathlib; from sartor.curate import card; f=pathlib.Path(sys.argv[1]); card.write(f, json.loads((f/'facts.json').read_text()))"
    subprocess.run(
        [sys.executable, "-c", code, str(other)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
    )
    assert outputs(written) == outputs(other)
    assert not any(
        str(other) in file.read_text(encoding="utf-8")
        for file in (other / "card.md", other / "card.html", other / "croissant.json")
    )


def test_the_card_does_not_depend_on_how_rows_lie_in_files(tmp_path: Path) -> None:
    kept, drops = kept_rows(), drops_of(kept_rows())
    one, other = (
        dataset(tmp_path / "one", kept, drops),
        dataset(tmp_path / "other", kept[::-1], drops[::-1], facts_of(kept, drops), parts=3),
    )
    for name in ("card.md", "card.html"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("count", [0, 1])
def test_a_dataset_of_hardly_a_row_has_a_card(tmp_path: Path, count: int) -> None:
    dataset(tmp_path, kept_rows()[:count], [], {})
    assert_is_inert(tmp_path)
    text = Tags((tmp_path / "card.html").read_text()).text
    assert f"{count} rows kept" in text and "Nothing was dropped." in text


def test_card_is_written_for_old_schema_and_absent_folders(tmp_path: Path) -> None:
    """The old rows lack the column of steps, and there are neither drops nor evidence."""
    parquet_io.write_examples(tmp_path / "examples" / "part-00000.parquet", kept_rows())
    table = pq.read_table(tmp_path / "examples" / "part-00000.parquet").drop_columns(["steps"])
    pq.write_table(table, tmp_path / "examples" / "part-00000.parquet")
    card.write(tmp_path, {})
    assert "100 rows kept" in Tags((tmp_path / "card.html").read_text()).text


def test_labels_are_found_in_json_replies_and_in_short_ones(tmp_path: Path) -> None:
    coded = [
        example(f"do {n}", json.dumps({"intent": "on" if n % 4 else "off", "name": f"lamp {n}"})) for n in range(40)
    ]
    assert gather(dataset(tmp_path / "json", coded, []), {}).labels() == ("intent", {"on": 30, "off": 10})
    short = [example(f"do {n}", "yes" if n % 4 else "no") for n in range(40)]
    assert gather(dataset(tmp_path / "short", short, []), {}).labels() == ("reply", {"yes": 30, "no": 10})
    assert gather(dataset(tmp_path / "free", kept_rows(), []), {}).labels() is None


def test_languages_come_from_the_text(tmp_path: Path) -> None:
    german = [
        example(
            f"Wie lange dauert die Baugenehmigung Nummer {n} in der Stadt?", "Das dauert in der Regel mehrere Wochen."
        )
        for n in range(30)
    ]
    dataset(tmp_path, [*german, *kept_rows()[:70]], [], {})
    head = yaml.safe_load((tmp_path / "card.md").read_text().split("\n---\n", 1)[0].removeprefix("---\n"))
    assert head["language"] == ["en", "de"]


def test_images_and_sounds_are_counted_and_bad_ones_named(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "media").mkdir()
    for side in (40, 300):
        image.new("RGB", (side, 20)).save(tmp_path / "media" / f"{side}.png")
    (tmp_path / "media" / "bad.png").write_bytes(b"no image")
    (tmp_path / "media" / "bad.wav").write_bytes(b"RIFF no sound")
    shown = Example(
        (
            Message("user", (Part("text", "what"), Part("image", media="media/40.png"))),
            Message.of("assistant", "a hall"),
        ),
        (Origin("a", "a:1"),),
        split="train",
    )
    dataset(tmp_path, [shown], [], {})
    text = Tags((tmp_path / "card.html").read_text()).text
    assert (
        "1 with an image" in text
        and "1 image files could not be read." in text
        and "1 audio files could not be read." in text
    )
    assert "[image media/40.png]" in text and "image-text-to-text" in (tmp_path / "card.md").read_text()


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("MIT", "mit"),
        ("CC-BY-4.0 AND MIT", ["cc-by-4.0", "mit"]),
        ("GPL-3.0-only AND GPL-3.0-or-later", "gpl-3.0"),
        ("NOASSERTION", "unknown"),
        ("LicenseRef-house", "other"),
        ("(MIT OR CC-BY-NC-4.0) AND MIT", "other"),
    ],
)
def test_the_hub_reads_the_licence(tmp_path: Path, expression: str, words: Any) -> None:
    found = gather(dataset(tmp_path, kept_rows()[:1], [], {}), {"licence": expression})
    assert hub.head(found)["license"] == words


def test_the_head_is_yaml_that_names_the_files(written: Path) -> None:
    head = yaml.safe_load((written / "card.md").read_text().split("\n---\n", 1)[0].removeprefix("---\n"))
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "examples/*.parquet"}]
    assert (
        head["license"] == ["cc-by-nc-4.0", "mit"]
        and head["language"] == ["en"]
        and head["size_categories"] == ["n<1K"]
    )


def test_an_absolute_path_is_no_part_of_the_card(tmp_path: Path) -> None:
    facts = facts_of(kept_rows(), drops_of(kept_rows()))
    moved = copy.deepcopy(facts["sources"][0]) | {"source": "/home/ann/work/secret/faq.jsonl", "path": "faq.jsonl"}
    facts["sources"] = [moved]
    facts["recipe"]["sources"] = [{"path": "/home/ann/work/secret/faq.jsonl"}]
    dataset(tmp_path, kept_rows(), drops_of(kept_rows()), facts)
    for name in ("card.md", "card.html", "croissant.json"):
        assert (
            "/home/ann" not in (tmp_path / name).read_text() and "…/secret/faq.jsonl" in (tmp_path / name).read_text()
        )
    assert short_path("data/a.csv") == "data/a.csv" and short_path("C:\\Users\\ann\\a.csv") == "…/ann/a.csv"


def test_croissant_is_valid_and_reads_the_rows(written: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlcroissant's own, from rdflib and pandas
        import mlcroissant

        found = mlcroissant.Dataset(jsonld=str(written / "croissant.json"))
        kept, gone = list(found.records("examples")), list(found.records("drops"))
    assert found.metadata.ctx.issues.errors == set()
    assert str(found.metadata.ctx.conforms_to) == "http://mlcommons.org/croissant/1.1" or found.metadata.ctx.is_v1_1()
    assert [row["examples/id"].decode() for row in kept] == [row.id for row in kept_rows()]
    assert kept[7]["examples/messages"][1]["examples/messages/text"].decode() == kept_rows()[7].reply
    assert len(gone) == 8 and gone[0]["drops/score"] == 0.91
    metadata = json.loads((written / "croissant.json").read_text())
    files = {
        item["contentUrl"]: item["sha256"] for item in metadata["distribution"] if item["@type"] == "cr:FileObject"
    }
    assert {name: hashlib.sha256((written / name).read_bytes()).hexdigest() for name in files} == files
    assert set(files) == {str(file.relative_to(written)) for file in written.rglob("*.parquet")}
    assert "EMAIL_ADDRESS 41" in metadata["rai:personalSensitiveInformation"].replace("entities.", "")
    assert metadata["license"] == ["https://spdx.org/licenses/CC-BY-NC-4.0.html", "https://spdx.org/licenses/MIT.html"]


def test_what_acts_unseen_is_made_visible() -> None:
    assert page.escape_control("a\u202eb\x00\r\nc\u2028d\ue000") == "a‹U+202E›b␀\nc\nd\ue000"
    assert page.escape("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert page.escape_control("a" + "\u0301" * 3000) == "a" + "\u0301" * 4 + "‹+2,996 marks›"
    assert page.escape_control("👩‍👩‍👧 नमस्ते שלום é") == "👩‍👩‍👧 नमस्ते שלום é"
