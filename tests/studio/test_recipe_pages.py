"""The recipe editor, asked as a browser asks it: form, YAML, errors, preview, start, and what it may read."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sartor
from page_markup import HOSTILE, Tags
from sartor.core import config
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.recipe_form import recipe_yaml
from studio_artefacts import dataset_of
from studio_site import Site

INPUT = re.compile(
    r"<(input|select|textarea)\b([^>]*)>(.*?)(?=<(?:input|select|textarea|button|fieldset|h2)\b|$)", re.S
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    made.log_in()
    made.app.studio.jobs = JobControl(tmp_path / "work" / ".studio" / "jobs", (sys.executable, "-c", "pass"))
    (made.folder / "faq.csv").write_text("prompt,completion\nWhen?,Today.\nWhere?,Here.\n<b>Who?</b>,Ada.\n")
    yield made
    made.close()


def fields_of(page: str) -> dict[str, str]:
    """Fields of the first form with a recipe, as a browser would send them."""
    form = page[page.index("id=recipe") : page.index("</form>", page.index("id=recipe"))]
    fields: dict[str, str] = {}
    for tag, attributes, content in INPUT.findall(form):
        name = re.search(r'\bname="?([^\s">]+)', attributes)
        is_unticked = "type=checkbox" in attributes and not attributes.endswith(" checked")
        if not name or name[1] == "do" or is_unticked:
            continue
        if tag == "select":
            chosen = re.search(r'<option(?: value="([^"]*)")? selected>([^<]*)', content)
            first = re.search(r'<option value="([^"]*)"', content)
            fields[name[1]] = (chosen[1] or chosen[2]) if chosen else first[1] if first else ""
        elif tag == "textarea":
            fields[name[1]] = content.partition("</textarea>")[0]
        else:
            value = re.search(r'\bvalue="([^"]*)"', attributes)
            fields[name[1]] = value[1] if value else ""
    return {name: html.unescape(value) for name, value in fields.items()}


def send(site: Site, page: str, do: str, **changes: str | list[str]) -> Any:
    fields = {**fields_of(page), **changes, "do": do}
    fields.pop("csrf", None)
    return site.post("/recipe", from_page="/recipe", **fields)


def test_file_s_rows_are_shown_as_they_would_be_learnt_from(site: Site) -> None:
    page = site.page("/recipe?file=faq.csv")
    assert "aria-invalid" not in page and 'said learnt" dir=auto>Today.' in page
    assert "not applied here, since they need all rows: exact_duplicates" in page


def test_several_boxes_of_an_option_are_a_list(site: Site) -> None:
    uses = ["commercial", "internal"]
    page = send(site, site.page("/recipe?file=faq.csv"), "check", **{"sources[0].use": uses}).text
    boxes = re.findall(r'name="sources\[0\].use" value="([^"]*)"( checked)?', page)
    assert [value for value, is_ticked in boxes if is_ticked] == uses and len(boxes) > len(uses)
    assert "use:\n  - commercial\n  - internal\n" in html.unescape(page)


def test_steps_are_added_moved_and_removed(site: Site) -> None:
    page = send(site, site.page("/recipe?file=faq.csv"), "add:steps", new_step="markup").text
    assert re.findall(r"<legend>\d\. ([a-z ]+)</legend>", page) == ["exact duplicates", "markup"]
    page = send(site, page, "up:steps[1]").text
    assert re.findall(r"<legend>\d\. ([a-z ]+)</legend>", page) == ["markup", "exact duplicates"]
    checked = send(site, page, "check").text
    assert "Who?" in checked and "&lt;b&gt;" not in checked[checked.index("First rows") :].partition("<details")[0]
    page = send(site, page, "remove:steps[0]").text
    assert re.findall(r"<legend>\d\. ([a-z ]+)</legend>", page) == ["exact duplicates"]
    page = send(site, page, "add:sources").text
    assert page.count("<legend>Source ") == 2 and fields_of(page)["sources[0].path"] == "faq.csv"
    assert send(site, page, "remove:sources[9]").status_code == 400
    assert send(site, page, "burn:seed").status_code == 200  # as a check


def test_error_stands_beside_its_field(site: Site) -> None:
    page = send(site, site.page("/recipe?file=faq.csv"), "start", seed="many", name="faq").text
    assert re.search(
        r'id="seed" name="seed" value="many"[^>]*aria-describedby="seed-help seed-error" aria-invalid=true', page
    )
    assert re.search(r'id="seed-error"><span dir=auto>seed is &#x27;many&#x27;; it must be a whole number', page)
    assert "Wrong options: 1" in page and site.app.studio.jobs.files.ids() == [] and not (site.folder / "faq").exists()


def test_recipe_becomes_a_file_and_a_job(site: Site) -> None:
    page = send(site, site.page("/recipe?file=faq.csv"), "add:steps", new_step="repair_text").text
    answer = send(site, page, "start", name="faq", **{"sources[0].licence": "own", "split.eval_fraction": "0.5"})
    assert answer.status_code == 303, answer.text
    written = config.read_yaml(site.folder / "faq" / "curate.yaml")
    assert written == {
        "sources": [{"path": "faq.csv", "licence": "own"}],
        "steps": [{"kind": "exact_duplicates"}, {"kind": "repair_text"}],
        "split": {"eval_fraction": 0.5},
    }
    (job,) = site.app.studio.jobs.files.statuses()
    folder = site.folder.resolve() / "faq"
    assert job.job.arguments == ("curate", str(folder / "curate.yaml"), "--out", str(folder / "data"), "--json")
    assert job.job.cwd == str(site.folder.resolve()) and job.job.by == "ada"


@pytest.mark.parametrize("name", ["", "../x", "X", "taken", "faq.csv"])
def test_wrong_name_is_refused_and_the_form_is_kept(site: Site, name: str) -> None:
    (site.folder / "taken").mkdir()
    answer = send(site, site.page("/recipe?file=faq.csv"), "start", name=name, seed="5")
    assert answer.status_code == 200 and fields_of(answer.text)["seed"] == "5"
    assert "field-error" in answer.text and site.app.studio.jobs.files.ids() == []


def test_yaml_and_form_say_the_same(site: Site) -> None:
    text = "sources:\n- {path: faq.csv, licence: own}\nsteps:\n- length: {min_words: 1}\n"
    answer = site.post("/recipe", from_page="/recipe", yaml=text, do="yaml")
    assert fields_of(answer.text)["steps[0].min_words"] == "1" and "said learnt" in answer.text
    broken = site.post("/recipe", from_page="/recipe", yaml="sources: [\n<script>", do="yaml").text
    assert "is not YAML" in broken and "&lt;script&gt;" in broken and "the recipe line 2" in broken


OUTSIDE = (
    "/etc/passwd", "../outside.csv", "~/x.csv", "*/../../etc/passwd", "a/../../outside.csv", "link.csv", "links/*.csv",
    "sql:sqlite:////etc/x.db#select 1", "inbox:/etc", ".studio/accounts.sqlite", "..", "/etc/*",
    "a\\..\\..\\outside.csv",
)  # fmt: skip


@pytest.mark.parametrize("option", ["sources", "steps"])
def test_recipe_reads_only_below_the_folder(site: Site, option: str) -> None:
    outside = site.folder.parent / "outside.csv"
    outside.write_text("prompt,completion\nsecret,secret\n")
    (site.folder / "link.csv").symlink_to(outside)
    (site.folder / "links").symlink_to(site.folder.parent)
    for path in OUTSIDE:
        source, against = (path, "faq.csv") if option == "sources" else ("faq.csv", path)
        recipe = {
            "sources": [{"path": source, "licence": "own"}],
            "steps": [{"kind": "contamination", "against": [against]}],
        }
        page = site.post("/recipe", from_page="/recipe", yaml=recipe_yaml(recipe), do="yaml").text
        assert "not below this folder" in page and "secret" not in page and "root:" not in page, path
        started = send(site, page, "start", name="x")
        assert started.status_code == 200 and site.app.studio.jobs.files.ids() == [], path


def test_hub_is_not_asked_for_a_preview(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the studio asks no other host")

    monkeypatch.setattr("sartor.studio.pages.recipe_pages.sartor.preview_recipe", refuse)
    page = site.post(
        "/recipe", from_page="/recipe", yaml="sources: [{path: 'hub:org/rows', licence: MIT}]", do="yaml"
    ).text
    assert "Check the recipe to see its first rows" in page and "aria-invalid" not in page


def test_recipe_of_a_dataset_is_shown_without_its_defaults(site: Site) -> None:
    (site.folder / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "question {number}", "completion": "answer {number}"}}\n' for number in range(30))
    )
    source = {"path": str(site.folder / "rows.jsonl"), "licence": "CC-BY-4.0", "use": ["research"]}
    steps = [{"length": {"min_words": 2}}, "exact_duplicates", {"rules": [{"match": "x y z"}]}]
    recipe = {"sources": [source], "steps": steps, "split": {"eval_fraction": 0.3}}
    sartor.curate(recipe, site.folder / "data")
    page = site.page("/recipe?dataset=data")
    shown = html.unescape(re.search(r"class=code[^>]*>(.*?)</textarea>", page, re.S)[1])
    stated = config.parse_yaml(shown, "x")
    assert sartor.load_curate_recipe(stated) == sartor.load_curate_recipe(recipe)
    assert set(stated["sources"][0]) == {"path", "licence", "use"} and "seed" not in stated
    dataset_of(site.folder / "other", 10)
    assert "was not made by a recipe" in site.client.get("/recipe?dataset=other").text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_recipe_stays_text(site: Site, text: str) -> None:
    plain = text.encode("utf-8", "replace").decode()
    recipe = {
        "sources": [{"path": "faq.csv", "licence": plain, "system": plain}],
        "steps": [{"kind": plain}],
        plain: 1,
    }
    page = Tags(site.post("/recipe", from_page="/recipe", yaml=recipe_yaml(recipe), do="yaml").text)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
    assert page.acting({"style", "srcdoc"}) == set() and not [tag for tag, _ in page.tags if tag == "img"]


def test_every_control_of_the_form_has_a_name(site: Site) -> None:
    page = send(site, site.page("/recipe?file=faq.csv"), "add:steps", new_step="personal_data").text
    tags = Tags(page).tags
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    ids = [attributes["id"] for _, attributes in tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    form = page[page.index("id=recipe") :]
    for tag, attributes, _ in INPUT.findall(form):
        control = re.search(r'\bid="([^"]+)"', attributes)
        is_wrapped = any(part in attributes for part in ("name=new_step", "name=name", "name=yaml", "type=checkbox"))
        assert "type=hidden" in attributes or is_wrapped or (control and control[1] in labelled), (tag, attributes)
