"""Data: sources, duplicates, card and media of a Dataset. Nothing of a row acts, whatever it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from page_markup import HOSTILE, Tags
from sartor.core.artifacts import write_artifact
from sartor.core.parquet_io import write_drops, write_examples
from sartor.core.records import Drop, Example, Message, Origin
from sartor.studio import dataset_media
from sartor.studio.accounts import Role
from studio_artefacts import dataset_of, dataset_with, example
from studio_media import FILES, SVG, media_dataset, media_row
from studio_site import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    made.log_in(Role.VIEWER)
    yield made
    made.close()


def drop(number: int, kept: str, reason: str = "near_duplicate", text: str = "") -> Drop:
    return Drop(
        reason,
        "rows.jsonl",
        f"rows.jsonl:{number}",
        "like another",
        kept=kept,
        text=text or f"user: question {number}",
        score=0.7 + number / 1000,
        method="jaccard",
    )


def test_picture_and_recording_are_shown_with_a_name(site: Site) -> None:
    rows = [media_row("image", "media/picture.png"), media_row("audio", "media/sound.wav")]
    media_dataset(site.folder / "data", rows)
    tags = Tags(site.page("/data/data")).tags
    images = [attributes for tag, attributes in tags if tag == "img"]
    sounds = [attributes for tag, attributes in tags if tag == "audio"]
    assert [image["src"] for image in images] == ["/media/data?at=0&number=0"]
    assert [player["src"] for player in sounds] == ["/media/data?at=1&number=0"]
    assert "media/picture.png" in str(images[0]["alt"]) and "media/sound.wav" in str(sounds[0]["aria-label"])
    assert "<img" in site.page("/row/data?at=0")


def test_weight_and_reasoning_of_a_turn_are_shown(site: Site) -> None:
    row = example(1)
    reply = replace(row.messages[-1], weight=0.5, reasoning_content="since it is late")
    media_dataset(site.folder / "data", [row, replace(row, messages=(*row.prompt, reply))])
    plain, weighted = (Tags(site.page(f"/row/data?at={index}")).text for index in range(2))
    assert "weight 0.5" in weighted and "since it is late" in weighted and "since it is late" not in plain
    assert (plain.count("weight"), weighted.count("weight")) == (1, 2)  # the row's own weight is among its facts


@pytest.mark.parametrize(
    ("kind", "path", "media_type"),
    [("image", "media/picture.png", "image/png"), ("audio", "media/sound.wav", "audio/wav")],
)
def test_media_come_as_what_they_are_and_may_do_nothing(site: Site, kind: str, path: str, media_type: str) -> None:
    media_dataset(site.folder / "data", [media_row(kind, path)])
    answer = site.client.get("/media/data?at=0")
    assert answer.status_code == 200 and answer.content == FILES[path]
    headers = answer.headers
    assert headers["content-type"] == media_type and headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'; sandbox"
    assert headers["content-disposition"].startswith("inline") and headers["cross-origin-resource-policy"]
    part = site.client.get("/media/data?at=0", headers={"range": "bytes=0-3"})
    assert part.status_code == 206 and part.content == FILES[path][:4]


@pytest.mark.parametrize(
    ("kind", "path", "status"),
    [
        ("image", "media/drawing.svg", 400),
        ("image", "media/drawing.png", 400),
        ("image", "media/page.jpg", 400),
        ("image", "media/sound.wav", 400),
        ("audio", "media/picture.png", 400),
        ("image", "examples/0.parquet", 400),
        ("image", "../data/media/picture.png", 404),
        ("image", "/etc/passwd", 404),
        ("image", "media/none.png", 404),
        ("image", "", 404),
        ("image", "manifest.json", 404),
    ],
)
def test_only_pictures_and_recordings_of_rows_are_sent(site: Site, kind: str, path: str, status: int) -> None:
    media_dataset(site.folder / "data", [media_row(kind, path)])
    answer = site.client.get("/media/data?at=0")
    assert answer.status_code == status and answer.headers["content-type"].startswith("text/html")
    assert SVG.decode() not in answer.text and "root:" not in answer.text


@pytest.mark.parametrize("query", ["at=0&number=1", "at=0&number=-1", "at=1", "at=-1", "at=x", "", "at=0&number=x"])
def test_number_beyond_the_row_is_refused(site: Site, query: str) -> None:
    media_dataset(site.folder / "data", [media_row("image", "media/picture.png")])
    assert site.client.get(f"/media/data?{query}").status_code in (400, 404)


def test_changed_and_linked_files_are_refused(site: Site) -> None:
    dataset = media_dataset(site.folder / "data", [media_row("image", "media/picture.png")])
    file = dataset.path / "media/picture.png"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\0")
    assert site.client.get("/media/data?at=0").status_code == 422
    file.unlink()
    file.symlink_to("/etc/passwd")
    assert site.client.get("/media/data?at=0").status_code == 422
    file.unlink()
    assert site.client.get("/media/data?at=0").status_code == 422


def test_file_above_the_limit_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    media_dataset(site.folder / "data", [media_row("image", "media/picture.png")])
    monkeypatch.setitem(dataset_media.MAX_BYTES, "image", 50)
    answer = site.client.get("/media/data?at=0")
    assert answer.status_code == 400 and "at most 50 are shown" in answer.text


def test_rejected_reply_s_media_are_counted_behind_the_messages(site: Site) -> None:
    row = media_row("image", "media/picture.png")
    rejected = (Message("assistant", media_row("audio", "media/sound.wav").messages[0].content),)
    media_dataset(site.folder / "data", [Example(row.messages, row.origins, split="eval", rejected=rejected)])
    assert 'src="/media/data?at=0&amp;number=1"' in site.page("/row/data?at=0")
    assert site.client.get("/media/data?at=0&number=1").headers["content-type"] == "audio/wav"


def test_stranger_gets_no_media_and_no_card(site: Site) -> None:
    media_dataset(site.folder / "data", [media_row("image", "media/picture.png")])
    for path in ("/media/data?at=0", "/card/data", "/sources/data", "/duplicates/data", "/recipe", "/slices/data"):
        assert site.new_client().get(path).status_code == 303, path
    assert site.client.get("/recipe").status_code == 403


def test_groups_of_duplicates_come_largest_first_and_whole(site: Site) -> None:
    rows = [example(number) for number in range(40)]
    drops = [drop(number, rows[3].id) for number in range(100, 112)]
    drops += [drop(200, rows[5].id, "exact_duplicate"), drop(201, rows[5].id), drop(300, "gone" * 8)]
    dataset_with(site.folder / "data", rows, [*drops, Drop("too_long", "rows.jsonl", "rows.jsonl:1", text="LONG")])
    page = site.page("/duplicates/data")
    assert re.findall(r"(\d+) dropped for one row", page) == ["12", "2", "1"]
    assert "15 rows were dropped for another one, in 3 groups" in page and "LONG" not in page
    assert page.count("<article class=row>") == 8 + 2 + 1 and "and 4 further ones" in page
    assert "<mark>100</mark>" in page and "changed or dropped by a later step" in page
    only = site.page("/duplicates/data?reason=exact_duplicate")
    assert only.count("<article class=row>") == 1 and "question 200" in only.replace("<mark>", "").replace(
        "</mark>", ""
    )
    assert "No row was dropped" in site.page("/duplicates/data?reason=nothing")


def test_groups_of_duplicates_have_pages(site: Site) -> None:
    rows = [example(number) for number in range(25)]
    dataset_with(site.folder / "data", rows, [drop(100 + number, row.id) for number, row in enumerate(rows)])
    seen: list[str] = []
    path: str | None = "/duplicates/data"
    while path:
        page = site.page(path)
        seen += re.findall(r"rows\.jsonl:(\d+)", page)
        following = re.search(r'class=button href="([^"]+)"', page)
        path = following[1].replace("&amp;", "&") if following else None
    assert sorted(map(int, seen)) == list(range(100, 125))


def write_sourced(path: Path, text: str = "faq.csv") -> None:
    def fill(part: Path) -> dict[str, object]:
        write_examples(part / "examples/0.parquet", [example(1)])
        write_drops(
            part / "drops/0.parquet", [Drop(text[:60], text, f"{text}:2"), Drop("too_long", text, f"{text}:3")]
        )
        (part / "card.html").write_text(f"<html><script>alert(1)</script>{text}", encoding="utf-8", errors="replace")
        source = {
            "source": text,
            "path": text,
            "sha256": "ab" * 32,
            "licence": text,
            "form": text,
            "read": 3,
            "kept": 1,
        }
        return {
            "licence": text,
            "parents": [],
            "sources": [source],
            "obligations": [text],
            "licence_conflicts": [text],
            "steps": {"length": {"removed": 1, text: text}},
            "recipe": {"sources": [{"path": text, "licence": "MIT"}], "seed": 0},
            "counts": {
                "read": 3,
                "kept": 1,
                "made": 0,
                "dropped": {text[:60]: 1, "too_long": 1},
                "splits": {"train": 1},
            },
        }

    write_artifact(path, "dataset", fill)


def test_sources_show_digest_licence_and_reasons(site: Site) -> None:
    write_sourced(site.folder / "data")
    page = site.page("/sources/data")
    assert "3 rows read, 0 copies made, 1 kept." in page and "ab" * 8 in page
    assert 'href="/data/data?split=dropped&amp;reason=too_long"' in page and "sartor inspect" in page
    assert "/recipe" not in page  # a viewer changes none
    assert '<a href="/data" aria-current=page>' in page


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_facts_and_rows_stay_text(site: Site, text: str) -> None:
    plain = text.encode("utf-8", "replace").decode().replace("\0", " ")
    write_sourced(site.folder / "data", plain)
    row = Example(
        (Message.of("user", plain), Message.of("assistant", plain)), (Origin("a", plain[:200]),), split="train"
    )
    dataset_with(
        site.folder / "rows", [row], [Drop("near", "a", plain[:200], plain, kept=row.id, text=plain, method=plain)]
    )
    for path in ("/sources/data", "/duplicates/rows", "/data/rows", "/data/rows?split=dropped", "/row/rows?at=0"):
        page = Tags(site.page(path))
        assert {tag for tag, _ in page.tags}.isdisjoint({"iframe", "object", "embed"}), path
        assert len([tag for tag, _ in page.tags if tag == "script"]) == 2, path
        assert page.acting({"style", "srcdoc"}) == set(), path
        assert not [tag for tag, attributes in page.tags if tag == "img"], path


def test_card_is_sent_without_any_right_to_act(site: Site) -> None:
    write_sourced(site.folder / "data")
    answer = site.client.get("/card/data")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert policy.startswith("default-src 'none'") and policy.endswith("sandbox") and "script-src" not in policy
    card = site.folder / "data" / "card.html"
    card.write_text(card.read_text().replace("alert", "steal"))
    assert site.client.get("/card/data").status_code == 422
    dataset_of(site.folder / "other", 10)
    assert site.client.get("/card/other").status_code == 404


ROUTES = (
    "/media/",
    "/card/",
    "/sources/",
    "/duplicates/",
    "/slices/",
    "/agreement/",
    "/recipe?dataset=",
    "/recipe?file=",
)


OUTSIDE = ("../outside", "%2e%2e/outside", "..%2foutside", "/etc/passwd", "link", ".studio", "x%00")


@pytest.mark.parametrize("route", ROUTES)
def test_no_path_leads_out_of_the_folder(site: Site, route: str) -> None:
    media_dataset(site.folder.parent / "outside", [media_row("image", "media/picture.png", "secret")])
    (site.folder / "link").symlink_to(site.folder.parent / "outside")
    site.client = site.new_client()
    site.log_in(Role.OWNER, "owner")
    for name in OUTSIDE:
        answer = site.client.get(f"{route}{name}{'&' if '?' in route else '?'}at=0")
        assert answer.status_code in (307, 400, 404), (name, answer.text[:500])
        assert "secret" not in answer.text and "root:" not in answer.text, name


@pytest.mark.parametrize("role", [Role.VIEWER, Role.REVIEWER])
def test_recipes_are_for_owners(site: Site, role: Role) -> None:
    site.client = site.new_client()
    site.log_in(role, "other")
    for answer in (
        site.client.get("/recipe"),
        site.client.post("/recipe", data={"csrf": site.csrf("/"), "do": "check"}),
    ):
        assert answer.status_code == 403
    site.client = site.new_client()
    site.log_in(Role.OWNER, "owner")
    assert site.client.post("/recipe", data={"csrf": "0" * 64, "do": "start", "name": "x"}).status_code == 403
    assert not (site.folder / "x").exists()
