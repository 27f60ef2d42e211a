"""Tune and the forecasts of New: forms, errors beside fields, commands, live figures, runs compared."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sartor
from page_markup import Tags
from sartor.core.artifacts import Artifact, write_artifact
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.tuning_form import default_values, recipe_fields
from studio_artefacts import dataset_of
from studio_site import Site

INTERVAL = {"estimate": 100.0, "low": 80.0, "high": 130.0}
PLAN = {
    "time_s": INTERVAL,
    "evaluation_s": None,
    "peak_memory_bytes": {"estimate": 2e9, "low": 1.9e9, "high": 2.2e9},
    "updates": 120,
    "tokens": 34567,
    "trainable": 1000,
    "settings": {"optimizer.learning_rate": {"value": 0.001, "reason": "of the width"}},
    "warnings": [{"problem": "few <rows>", "remedy": "add rows"}],
    "refusals": [{"problem": "too long", "remedy": "data.max_length_tokens: 4096"}],
}
# stands for `sartor`: a plan of its own for `plan` and `tailor --plan`, an echo for the others
COMMAND = f"""
import json, sys
plan = json.loads({json.dumps(json.dumps(PLAN))})
if sys.argv[1] == "plan":
    print(json.dumps(plan))
elif "--plan" in sys.argv:
    print(json.dumps({{"kept": 1234, "dropped": {{}}, "budget": {{}}, "plan": plan}}))
else:
    print(json.dumps({{"ran": sys.argv[1:]}}))
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    made.log_in()
    made.app.studio.jobs = JobControl(tmp_path / "work" / ".studio" / "jobs", (sys.executable, "-c", COMMAND))
    yield made
    made.close()


def tuned(path: Path, dataset: Artifact, rank: int, last: float) -> Artifact:
    """An Adapter with a recipe, a log and the facts of its run."""
    lines = []
    for update in range(1, 41):
        loss = 3 + (last - 3) * update / 40
        progress = {"fraction": update / 40, "left_s": 40.0 - update}
        line = {"wall_s": float(update), "update": update, "loss": loss, "learning_rate": 1e-3 * update / 40}
        lines.append({**line, "tokens": 100, "tokens_per_s": 99.0, "memory_bytes": 2 << 30, "progress": progress})
    lines.insert(5, {"wall_s": 5.0, "forecast": {"time_s": INTERVAL, "peak_memory_bytes": PLAN["peak_memory_bytes"]}})
    lines.append({"wall_s": 41.0, "update": 40, "eval_loss": last + 0.1})

    def fill(part: Path) -> dict[str, Any]:
        (part / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = {"updates": 40, "loss": {"first": 3.0, "last": last, "eval": last + 0.1}, "wall_s": 41.0}
        return {
            "licence": "MIT",
            "parents": [dataset.as_parent()],
            "sources": [],
            "base": {"name": "starter"},
            "recipe": {
                "base": {"name": "starter"},
                "method": {"kind": "lora", "rank": rank, "alpha": 32.0},
                "seed": 0,
            },
            "run": {**run, "peak_memory_bytes": 2 << 30, "forecast": lines[5]["forecast"]},
        }

    return write_artifact(path, "adapter", fill)


@pytest.fixture
def full(site: Site) -> Site:
    data = dataset_of(site.folder / "faq" / "data")
    tuned(site.folder / "faq" / "adapter", data, rank=8, last=1.0)
    tuned(site.folder / "wide" / "adapter", data, rank=64, last=0.5)
    return site


def form_of(site: Site, **changes: Any) -> dict[str, Any]:
    """What a browser sends of the form as it stands on the page, with changes."""
    return {**default_values(), "datasets": "faq/data", "name": "tuned", **changes}


def ended(site: Site, verb: str) -> Any:
    """Status of the newest job of a verb, once it has ended."""
    for _ in range(1000):
        found = [status for status in site.app.studio.jobs.files.statuses() if status.job.verb == verb]
        if found and found[0].state.is_over:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(found)


@pytest.mark.parametrize("language", ["en", "de"])
@pytest.mark.parametrize(
    "path", ["/tune", "/tune/new", "/tune/run/faq/adapter", "/tune/compare?run=faq/adapter&run=wide/adapter"]
)
def test_page_is_shown_with_every_control_named(full: Site, path: str, language: str) -> None:
    text = full.page(path, **{"accept-language": language})
    assert f'<html lang="{language}">' in text and len(text) < 150_000
    assert not Tags(text).acting({"style", "srcdoc"})
    ids = re.findall(r'\bid="?([^\s">]+)', text)
    assert len(ids) == len(set(ids))
    for match in re.finditer(r"<(input|select|textarea)\b[^>]*>", text):
        if "type=hidden" not in match[0]:
            before = text[: match.start()]
            assert before.rfind("<label") > before.rfind("</label>"), match[0]
        for name in re.findall(r'aria-describedby="([^"]*)"', match[0]):
            assert set(name.split()) <= set(ids), match[0]


@pytest.mark.parametrize("path", ["/tune", "/tune/new", "/tune/compare"])
def test_empty_folder_has_pages_that_say_how_to_begin(site: Site, path: str) -> None:
    assert "class=empty" in site.page(path)


def test_form_has_each_option_with_its_default(full: Site) -> None:
    text = full.page("/tune/new")
    for field in recipe_fields():
        assert f'name="{field.key}"' in text, field.key
    assert (
        text.index('name="method.rank@lora"') < text.index("All other options") < text.index('name="compute.cache_gb"')
    )
    assert 'value="faq/data" checked' in text and "default: cosine" in text and "auto or a number" in text


def test_wrong_form_comes_back_with_errors_beside_fields(full: Site) -> None:
    sent = form_of(full, **{"method.rank@lora": "0", "compute.cache_gb": "-1", "name": "faq", "base.name": "<b>"})
    answer = full.post("/tune/start", from_page="/tune/new", **sent)
    assert answer.status_code == 400 and full.app.studio.jobs.files.ids() == []
    text = answer.text
    assert re.search(r'name="method.rank@lora" value="0"[^>]* aria-invalid=true[^>]*fault-method.rank@lora', text)
    assert 'id="fault-compute.cache_gb"' in text and "<details open><summary>compute" in text
    assert "faq exists in this folder" in text and 'value="&lt;b&gt;"' in text
    answer = full.post("/tune/forecast", from_page="/tune/new", **form_of(full, datasets="../x"))
    assert answer.status_code == 400 and 'id="fault-datasets"' in answer.text


def test_forecast_stands_before_the_start(full: Site) -> None:
    answer = full.post("/tune/forecast", from_page="/tune/new", **form_of(full, **{"method.rank@lora": "8"}))
    assert answer.status_code == 303, answer.text
    location = answer.headers["location"]
    status = ended(full, "plan")
    recipe = sartor.load_recipe(Path(status.job.arguments[1]))
    assert recipe.method.rank == 8 and recipe.data.path == str(full.folder.resolve() / "faq/data")
    text = full.page(location)
    for part in ("100 s", "80 s", "2.00 GB", "34,567", "few &lt;rows&gt;", "too long", "max_length_tokens: 4096"):
        assert part in text, part
    assert "rank: 8" in text and "sartor tune" in text and 'value="8"' in text and "every 2s" not in text
    assert full.page(f"{location}/forecast").startswith("<div id=forecast")
    again = full.post("/tune/forecast", from_page="/tune/new", **form_of(full, **{"method.rank@lora": "8"}))
    assert again.headers["location"] == location and len(full.app.studio.jobs.files.ids()) == 1


def test_start_is_the_command_with_recipe_and_forecast(full: Site) -> None:
    sent = form_of(full, **{"method.rank@lora": "8"})
    full.post("/tune/forecast", from_page="/tune/new", **sent)
    ended(full, "plan")
    answer = full.post("/tune/start", from_page="/tune/new", **sent)
    assert answer.headers["location"] == "/tune/run/tuned/adapter"
    status = ended(full, "tune")
    out = full.folder.resolve() / "tuned"
    assert status.result["ran"] == ["tune", str(out / "tune.yaml"), "--out", str(out / "adapter"), "--json"]
    assert sartor.load_recipe(out / "tune.yaml").method.rank == 8
    assert json.loads((out / "forecast.json").read_text())["tokens"] == 34567
    assert "Its job, with the log" in full.page("/tune/run/tuned/adapter")


def test_several_datasets_are_tuned_one_by_one(full: Site) -> None:
    dataset_of(full.folder / "second")
    token = full.csrf("/tune/new")
    fields = {**form_of(full), "csrf": token, "datasets": ["faq/data", "second"]}
    answer = full.client.post("/tune/start", data=fields, headers={"origin": "http://127.0.0.1:8765"})
    assert answer.headers["location"] == "/tune", answer.text
    paths = {sartor.load_recipe(full.folder / f"tuned-{number}" / "tune.yaml").data.path for number in (1, 2)}
    assert paths == {str(full.folder.resolve() / "faq/data"), str(full.folder.resolve() / "second")}


def test_run_shows_forecast_beside_actual(full: Site) -> None:
    (full.folder / "faq" / "forecast.json").write_text(json.dumps({"schema": 1, **PLAN}))
    text = full.page("/tune/run/faq/adapter")
    assert text.count("100 s") == 2 and "41 s" in text and "2.15 GB" in text
    assert text.count("<polyline class=line") == 2 and "class=dot" in text and "Learning rate, at most 0.001" in text
    assert "rank" in text and 'action="/tune/stop"' not in text and 'action="/tune/resume"' not in text


def test_stopped_run_is_resumed(full: Site) -> None:
    full.app.studio.jobs = JobControl(
        full.folder / ".studio" / "jobs", (sys.executable, "-c", "import sys; sys.exit(143)")
    )
    full.post("/tune/start", from_page="/tune/new", **form_of(full))
    ended(full, "tune")
    text = full.page("/tune/run/tuned/adapter")
    assert 'action="/tune/resume"' in text and "stopped" in text
    assert full.post("/tune/resume", from_page="/tune", run="tuned/adapter").status_code == 303
    assert "--resume" in ended(full, "tune").job.arguments


def test_runs_are_compared(full: Site) -> None:
    text = full.page("/tune/compare?run=faq/adapter&run=wide/adapter&run=nothing&run=faq/adapter")
    assert text.count("<polyline") == 2 and "run1" in text and text.count('class="held') == 2
    assert "method.rank" in text and "<code>8</code>" in text and "<code>64</code>" in text
    assert "method.alpha" not in text and "4 other options are the same" in text
    assert "1.1000" in text and "0.6000" in text and "4,000 tokens" in text


def test_new_forecasts_without_blocking(site: Site) -> None:
    (site.folder / "rows.csv").write_text("prompt,completion\n" + "".join(f"q{n},a{n}\n" for n in range(9)))
    page = "/new?file=rows.csv"
    sent = {
        "file": "rows.csv",
        "name": "faq",
        "base": "starter",
        "licence": "own",
        "system": "Be brief.",
        "minutes": "3",
    }
    answer = site.post("/new/forecast", from_page=page, **sent)
    assert answer.status_code == 303, answer.text
    status = ended(site, "tailor")
    assert status.job.arguments[-2:] == ("--plan", "--json") and "--minutes=3" in status.job.arguments
    text = site.page(answer.headers["location"])
    assert "1,234 rows are kept" in text and "100 s" in text and 'value="own"' in text and "Be brief." in text
    assert not (site.folder / "faq").exists()


def test_new_asks_for_unknown_columns_in_place_of_errors(site: Site) -> None:
    (site.folder / "rows.csv").write_text("Frage;Antwort\n" + "".join(f"f{n};a{n}\n" for n in range(9)))
    text = site.page("/new?file=rows.csv")
    assert "does not know these columns" in text and "<code dir=auto>Frage</code>" in text
    assert "Rows that cannot be used" not in text and "role=alert" not in text
    assert "does not know" not in site.page("/new?file=rows.csv&prompt=Frage&completion=Antwort")


def test_new_asks_for_an_unknown_code_page(site: Site) -> None:
    (site.folder / "rows.csv").write_bytes("Frage;Antwort\nGröße;ja\n".encode("cp1252"))
    text = site.page("/new?file=rows.csv")
    assert "<select name=encoding>" in text and "<option>cp1252</option>" in text and "unknown encoding" in text
    assert "does not know these columns" not in text and "encoding UTF-8" not in text
    page = "/new?file=rows.csv&encoding=cp1252&prompt=Frage&completion=Antwort"
    assert "encoding cp1252" in site.page(page) and "Größe" in site.page(page)
    sent = {"file": "rows.csv", "prompt": "Frage", "completion": "Antwort", "encoding": "cp1252", "name": "faq"}
    assert site.post("/new/forecast", from_page=page, **sent).status_code == 303
    assert "--encoding=cp1252" in ended(site, "tailor").job.arguments


def test_home_renews_what_runs(site: Site) -> None:
    waiting = "import time; time.sleep(20)"
    site.app.studio.jobs = JobControl(site.folder / ".studio" / "jobs", (sys.executable, "-c", waiting))
    job = site.app.studio.jobs.start(["tune", "x"], title="a tuning", by="ada", cwd=site.folder)
    text = site.page("/")
    assert re.search(r'<section id=live[^>]*hx-get="/"[^>]*hx-trigger="every 3s"', text)
    site.app.studio.jobs.stop(job.id, by="ada")


def test_viewer_may_look_and_not_start(full: Site) -> None:
    full.client = full.new_client()
    full.log_in(Role.VIEWER, "eve")
    for path in ("/tune", "/tune/run/faq/adapter", "/tune/compare?run=faq/adapter"):
        actions = re.findall(r'<form[^>]*method=post action="([^"]+)"', full.page(path))
        assert set(actions) <= {"/logout", "/language"}, path
    full.page("/tune/new", status=403)
    assert full.post("/tune/start", from_page="/tune", **form_of(full)).status_code == 403


@pytest.mark.parametrize(
    "path",
    ["/tune/run/nothing", "/tune/run/../x", "/tune/draft/x", "/tune/draft/0123456789abcdef", "/tune/run/.studio/x"],
)
def test_unknown_tuning_is_explained(full: Site, path: str) -> None:
    answer = full.client.get(path)
    assert answer.status_code == 404 and "Try:" in answer.text
