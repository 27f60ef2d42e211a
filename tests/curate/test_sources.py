"""Sources: documents, dates, tables, SQL queries and assets become rows with a place and a licence; no secret is written."""

from __future__ import annotations

import datetime
import json
import sqlite3
import traceback
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sartor
from sample_data import write_jsonl
from sartor.core import assets
from sartor.core.errors import ConfigError, HubError, SourceError
from sartor.curate.sources import row_formats, sql
from sartor.curate.sources.planner import plan_reading
from sartor.curate.sources.types import Columns, SourceOptions
from sourcing import Rows, pdf


def test_a_folder_of_documents_is_one_row_a_file_and_one_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("plain text")
    (folder / "deep" / "b.md").write_text("---\ntitle: x\n---\n# Head\n\nbody\n")
    (folder / "c.html").write_text("<title>Name</title><p>one<p>two")
    (folder / "manual.pdf").write_bytes(pdf("first page", "second page", "third"))
    rows = Rows(tmp_path / "media", SourceOptions(str(folder), licence="CC0-1.0"))
    found = {row.origins[0].locator: row.reply for row in rows.kept}
    assert found == {
        "a.txt:1": "plain text",
        "c.html:1": "Name\n\none\n\ntwo",
        "deep/b.md:1": "# Head\n\nbody\n",
        "manual.pdf:1": "first page",
        "manual.pdf:2": "second page",
        "manual.pdf:3": "third",
    }
    assert {row.group for row in rows.kept if "pdf" in row.origins[0].locator} == {"manual.pdf"}
    assert {row.origins[0].licence for row in rows.kept} == {"CC0-1.0"}
    assert rows.notes == {("deep/b.md", "front matter taken off"): 1}
    assert {file.path: file.form for file in rows.plan.files} == dict.fromkeys(
        ("a.txt", "c.html", "deep/b.md", "manual.pdf"), "text"
    )


def test_a_rule_in_a_text_is_no_front_matter(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Words\n---\nmore\n---\n")
    (tmp_path / "b.md").write_text("---\nnever closed\n")
    (tmp_path / "c.txt").write_text("---\na: b\n---\nrest")
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.replies == ["Words\n---\nmore\n---\n", "---\nnever closed\n", "---\na: b\n---\nrest"]
    assert not rows.notes


HTML = """<!DOCTYPE html><html><head><title>The  shop</title><style>.x{color:red}</style>
<script>steal("cookies")</script></head><body onload="evil()">
<!-- a secret comment --><h1>Opening hours</h1><p>We open at <b>nine</b>,
and close at six.</p><noscript>turn on scripts</noscript><iframe srcdoc="<p>framed</p>">in frame</iframe>
<template><p>templated</p></template><svg><text>drawn</text></svg>
<p hidden>unseen one</p><div style="DISPLAY : none">unseen two<p>unseen three</p></div><input type="hidden" value="token">
<ul><li>bread</li><li>cake</li></ul><table><tr><td>Mon</td><td>9-18</td></tr></table><pre>a\n  b</pre>
<p>4 &lt; 5 &amp; &eacute;</p></body></html>"""


def test_html_gives_what_a_reader_sees_and_nothing_that_runs(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(HTML)
    (text,) = Rows(tmp_path / "media", tmp_path).replies
    assert text == (
        "The shop\n\nOpening hours\n\nWe open at nine, and close at six.\n\n- bread\n- cake\n\nMon\t9-18\n\na\n  b\n\n4 < 5 & é"
    )


def test_html_is_read_in_its_declared_charset(tmp_path: Path) -> None:
    """Without a charset it must be UTF-8, or is dropped as not_utf8; a page without text is no_text."""
    (tmp_path / "a.html").write_bytes('<meta charset="iso-8859-1"><p>caf\xe9'.encode("latin-1"))
    (tmp_path / "b.html").write_bytes(b"<p>caf\xe9")
    (tmp_path / "c.html").write_bytes(b"<html><script>x()</script></html>")
    rows = Rows(tmp_path / "media", tmp_path)
    assert (rows.replies, rows.reasons) == (["café"], {"not_utf8": 1, "no_text": 1})


def test_a_pdf_page_without_text_is_named_and_the_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("one", "", "three"))
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.places == ["a.pdf:1", "a.pdf:3"]
    assert [(drop.reason, drop.locator) for drop in rows.drops] == [("no_text", "a.pdf:2")]


@pytest.mark.parametrize(
    ("value", "iso"),
    [
        ("2024-03-05", "2024-03-05"),
        ("2024-03-05T10:20:30Z", "2024-03-05T10:20:30+00:00"),
        (1_700_000_000, "2023-11-14T22:13:20+00:00"),
        ("1700000000", "2023-11-14T22:13:20+00:00"),
        (1_700_000_000_000, "2023-11-14T22:13:20+00:00"),
        (1_700_000_000.5, "2023-11-14T22:13:20.500000+00:00"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        ("yesterday", ""),
        ("2024-13-45", ""),
        (True, ""),
        (12, ""),
        (float("inf"), ""),
        (10**400, ""),
        ([1], ""),
    ],
)
def test_a_date_is_iso_or_seconds_since_1970(value: object, iso: str) -> None:
    assert row_formats.iso_date(value) == iso


def test_row_date_goes_to_its_origin_or_is_the_sources_date(tmp_path: Path) -> None:
    """An invalid date of a row is counted; one of a source raises ConfigError."""
    made = [
        {"text": "a", "date": "2024-01-31"},
        {"text": "b", "created_at": 1_700_000_000},
        {"text": "c", "timestamp": "soon"},
        {"text": "d"},
    ]
    write_jsonl(tmp_path / "a.jsonl", made)
    rows = Rows(tmp_path / "media", SourceOptions(str(tmp_path / "a.jsonl"), date="2020-01-01"))
    assert [row.origins[0].date for row in rows.kept] == [
        "2024-01-31",
        "2023-11-14T22:13:20+00:00",
        "2020-01-01",
        "2020-01-01",
    ]
    assert rows.notes == {("a.jsonl", "`timestamp` is no date"): 1}
    with pytest.raises(ConfigError, match="ISO 8601"):
        SourceOptions("x", date="last week")


def test_a_parquet_date_is_read_as_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "created": [datetime.datetime(2024, 5, 6, 7, 8)]}), tmp_path / "a.parquet")
    (row,) = Rows(tmp_path / "media", tmp_path).kept
    assert row.origins[0].date == "2024-05-06T07:08:00"


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,answer\nq,first,second\n")
    (tmp_path / "b.csv").write_text(",question,answer,\n1,q,a,x\n")
    rows = Rows(tmp_path / "media", tmp_path)
    assert (rows.reasons, rows.replies) == ({"duplicate_columns": 1}, ["a"])
    assert "'answer'" in rows.drops[0].detail


def test_an_open_quote_says_how_many_lines_it_took(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\nq1,a1\n"open,2\n' + "q,a\n" * 10)
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.replies == ["a1"]
    assert (rows.drops[0].reason, rows.drops[0].locator) == ("bad_csv", "a.csv:3-13")
    assert "11 lines" in rows.drops[0].detail


def test_json_that_holds_two_lists_names_the_one_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}, {"text": "c"}]}))
    (tmp_path / "b.json").write_text(json.dumps({"id1": {"text": "x"}, "id2": {"text": "y"}}))
    rows = Rows(tmp_path / "media", tmp_path)
    assert (rows.replies, rows.reasons) == (["a", "x", "y"], {"unread_list": 1})
    assert "2 entries of 'test'" in rows.drops[0].detail


@pytest.mark.parametrize("suffix", ["csv", "xlsx"])
def test_table_whose_first_rows_have_no_answer_is_read(tmp_path: Path, suffix: str) -> None:
    """Its columns are those of its header, not those of its first rows' filled cells."""
    rows: list[list[str | None]] = [
        ["Frage", "Antwort"],
        *([f"wo ist {n}", None if n < 60 else "da"] for n in range(80)),
    ]
    file = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        file.write_text("".join(";".join(cell or "" for cell in row) + "\n" for row in rows))
    else:
        workbook = openpyxl.Workbook()
        for row in rows:
            workbook.active.append(row)
        workbook.save(file)
    source = SourceOptions(str(file), fields=Columns(prompt="Frage", completion="Antwort"))
    found = Rows(tmp_path / "media", source)
    assert (len(found.kept), found.reasons) == (20, {"missing_field": 60})
    assert found.drops[0].detail == "the row has no completion"


def test_columns_of_an_empty_answer_are_no_unknown_form(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nhi,\nho,\n")
    assert Rows(tmp_path / "media", tmp_path).reasons == {"missing_field": 2}


def test_label_beside_a_text_is_not_passed_over_silently(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\nthe pump leaks,mechanics\nthe belt squeaks,mechanics\nno label here,\n")
    rows = Rows(tmp_path / "media", file)
    assert (len(rows.kept), rows.notes) == (3, {("a.csv", "unread label: label"): 2})
    assert not Rows(tmp_path / "media", SourceOptions(str(file), fields=Columns(text="text"))).notes
    made = sartor.curate({"sources": [str(file)], "split": {"eval_fraction": 0.0}}, tmp_path / "data")
    (warning,) = [warning for warning in made.warnings if warning.reason == "unread_label"]
    assert "2 rows are learnt as texts, and their column 'label' is not read" in warning.problem
    recipe = {"sources": [{"path": str(file), "fields": {"prompt": "text", "completion": "label"}}]}
    assert sartor.curate({**recipe, "split": {"eval_fraction": 0.0}}, tmp_path / "classes").kept == 2


@pytest.mark.parametrize("column", ["Label", "Diagnose", "KATEGORIE", "catégorie"])
def test_label_is_known_in_any_case_and_in_other_languages(column: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,{column}\nthe pump leaks,mechanics\n")
    assert Rows(tmp_path / "media", tmp_path).notes == {("a.csv", f"unread label: {column}"): 1}


def test_context_beside_a_question_is_not_passed_over_silently(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("question,answer,Context\nhow much?,two,a table of prices\nwhen?,today,\n")
    made = sartor.curate({"sources": [str(file)], "split": {"eval_fraction": 0.0}}, tmp_path / "data")
    (warning,) = [warning for warning in made.warnings if warning.reason == "unread_context"]
    assert "1 rows are learnt without their column 'Context'" in warning.problem
    assert warning.remedy.startswith("fields: {system: Context} at the source")
    rows = Rows(tmp_path / "media", SourceOptions(str(file), fields=Columns(system="Context")))
    assert rows.kept[0].messages[0].text == "a table of prices" and not rows.notes


@pytest.mark.parametrize(
    "history", [[["Who?", "Ann."], ["Where?", "Here."]], '[["Who?", "Ann."], ["Where?", "Here."]]']
)
def test_history_of_pairs_is_the_turns_before(history: object, tmp_path: Path) -> None:
    row = {"instruction": "When?", "input": "", "output": "Now.", "system": "Be brief.", "history": history}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    rows = Rows(tmp_path / "media", tmp_path)
    assert [turn.text for turn in rows.kept[0].messages] == [
        "Be brief.",
        "Who?",
        "Ann.",
        "Where?",
        "Here.",
        "When?",
        "Now.",
    ]
    assert not rows.notes


def test_header_in_another_code_page_than_stated_is_said(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("Störung;Abteilung\nPumpe;Mechanik\n".encode("cp1252"))
    rows = Rows(tmp_path / "media", SourceOptions(str(file), encoding="utf8"))
    assert rows.reasons == {"not_utf8": 1} and rows.drops[0].detail.startswith("the header is not UTF-8")


@pytest.mark.parametrize(("reply", "text"), [(4931, "4931"), (["Hydraulik", "Elektrik"], '["Hydraulik", "Elektrik"]')])
def test_answer_that_is_no_text_names_the_option_that_reads_it(tmp_path: Path, reply: object, text: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "how many", "completion": reply}])
    (drop,) = Rows(tmp_path / "media", tmp_path).drops
    assert drop.detail.endswith("fields: {completion: completion} reads it as text")
    source = SourceOptions(str(tmp_path), fields=Columns(completion="completion"))
    assert Rows(tmp_path / "media", source).replies == [text]


def test_two_speakers_become_user_and_assistant(tmp_path: Path) -> None:
    """The last speaker is the assistant; a conversation of three speakers is dropped."""
    said = [[{"sender": "u", "text": "hi"}, {"sender": "u", "text": "there"}], [{"sender": "v", "text": "hello"}]]
    three = [{"sender": name, "text": "hi"} for name in "uvw"]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": said}, {"messages": three}])
    rows = Rows(tmp_path / "media", tmp_path)
    assert [(message.role, message.text) for message in rows.kept[0].messages] == [
        ("user", "hi\nthere"),
        ("assistant", "hello"),
    ]
    assert rows.reasons == {"bad_field": 1}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    connection = sqlite3.connect(tmp_path / "shop.db")
    connection.execute("create table faq (q text, a text, asked text, n integer)")
    rows = [(f"question {n}", f"answer {n}", "2024-01-02", n) for n in range(2500)]
    connection.executemany("insert into faq values (?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return tmp_path / "shop.db"


def test_a_query_is_rows_with_numbers(tmp_path: Path, shop: Path) -> None:
    query = "SELECT q AS question, a AS answer, asked AS date FROM faq WHERE a LIKE 'answer %' AND '12:30' = '12:30' ORDER BY n"
    rows = Rows(tmp_path / "media", f"sql:sqlite:///{shop}#{query};")
    assert len(rows.kept) == 2500 and not rows.drops
    assert rows.kept[41].origins[0].locator == "query:42"
    assert rows.kept[0].origins[0].date == "2024-01-02"
    assert (rows.plan.files[0].form, len(rows.plan.chunks)) == ("question_answer", 1)


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM faq",
        "SELECT 1; DROP TABLE faq",
        "SELECT q INTO other FROM faq",
        "ATTACH DATABASE 'made.db' AS other",
        "VACUUM INTO 'made.db'",
        "PRAGMA writable_schema = 1",
        "WITH x AS (SELECT 1) DELETE FROM faq",
        "WITH x AS (SELECT 1) INSERT INTO faq SELECT 1, 2, 3, 4",
        "SELECT load_extension('evil')",
        "SELECT * FROM pragma_table_info('faq')",
        "/* SELECT */ UPDATE faq SET a = 'x'",
        "SELECT q AS question, a AS question FROM faq",
        "SELECT nothing FROM nowhere",
    ],
)
def test_query_that_is_not_read_only_is_refused(tmp_path: Path, shop: Path, query: str) -> None:
    """Invalid queries are refused as well; the database and its folder stay unchanged."""
    before, names = shop.read_bytes(), {file.name for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError):
        plan_reading([SourceOptions(f"sql:sqlite:///{shop}#{query}")], 1 << 20)
    assert shop.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == names


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no SQLite file"):
        plan_reading([SourceOptions(f"sql:sqlite:///{tmp_path}/none.db#SELECT 1 AS text")], 1 << 20)
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://reader:hunter2@host/shop",
        "postgresql://reader:${A}hunter2@host/shop",
        "postgresql://host/shop?password=hunter2",
        "postgresql://host/shop?sslpassword=hunter2",
        "mssql+pyodbc:///?odbc_connect=Driver%3Dx%3BPWD%3Dhunter2",
    ],
)
def test_a_password_in_a_url_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_reading([SourceOptions(f"sql:{url}#SELECT 1")], 1 << 20)
    assert "hunter2" not in f"{caught.value} {''.join(traceback.format_exception(caught.value))}"
    assert "${DB_PASSWORD}" in caught.value.remedy


def test_a_secret_of_the_environment_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "hunt:er@2/%")
    with pytest.raises((HubError, ConfigError)) as caught:
        plan_reading(
            [SourceOptions("sql:postgresql+nothing://reader:${DB_PASSWORD}@localhost:1/shop#SELECT 1")], 1 << 20
        )
    assert "hunt" not in str(caught.value)
    filled, secrets = sql._filled("postgresql://reader:${DB_PASSWORD}@localhost:1/shop")
    assert filled.password == "hunt:er@2/%"
    assert "hunt" not in sql._scrub('auth failed for "hunt:er@2/%" and hunt%3Aer%402%2F%25', secrets)
    monkeypatch.delenv("DB_PASSWORD")
    with pytest.raises(ConfigError, match="DB_PASSWORD.*not set"):
        plan_reading([SourceOptions("sql:sqlite:///${DB_PASSWORD}#SELECT 1")], 1 << 20)


def test_a_whole_url_may_stand_in_the_environment(tmp_path: Path, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP", f"sqlite:///{shop}")
    rows = Rows(tmp_path / "media", "sql:${SHOP}#SELECT q AS prompt, a AS completion FROM faq LIMIT 3")
    assert rows.replies == ["answer 0", "answer 1", "answer 2"]
    assert {row.origins[0].source for row in rows.kept} == {
        "sql:${SHOP}#SELECT q AS prompt, a AS completion FROM faq LIMIT 3"
    }


@pytest.mark.parametrize(
    "path", ["sql:sqlite:///x.db", "sql:#SELECT 1", "sql:nonsense#SELECT 1", "sql:sqlite://#SELECT 1"]
)
def test_a_source_of_sql_that_lacks_something_says_what(path: str) -> None:
    with pytest.raises(ConfigError):
        plan_reading([SourceOptions(path)], 1 << 20)


def test_a_value_too_long_is_a_drop(tmp_path: Path, shop: Path) -> None:
    query = "SELECT 'a' AS text UNION ALL SELECT printf('%.*c', 5000, 'x') UNION ALL SELECT 'b'"
    rows = Rows(tmp_path / "media", f"sql:sqlite:///{shop}#{query}", most=1000)
    assert (rows.replies, rows.reasons) == (["a", "b"], {"oversize_row": 1})


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An asset that is installed already."""
    entry = assets.entry("construction-faq")
    folder = entry.directory
    (folder / "inner").mkdir(parents=True)
    write_jsonl(folder / "inner" / "faq.jsonl", [{"question": "q", "answer": "a"}])
    return folder


def test_asset_rows_have_its_licence_unless_overridden(tmp_path: Path, asset: Path) -> None:
    """The licence in the recipe wins; the local path of the asset is in no locator."""
    for path in (
        "asset:construction-faq/inner/faq.jsonl",
        "asset:construction-faq/inner",
        "asset:construction-faq/inner/*.jsonl",
    ):
        rows = Rows(tmp_path / "media", SourceOptions(path))
        assert [row.origins[0].licence for row in rows.kept] == [assets.entry("construction-faq").licence]
        assert rows.plan.files[0].licence == "CC-BY-4.0"
        assert str(asset) not in rows.places[0]
    assert (
        Rows(tmp_path / "media", SourceOptions("asset:construction-faq", licence="MIT")).kept[0].origins[0].licence
        == "MIT"
    )


def test_unknown_asset_or_path_outside_it_is_refused(asset: Path) -> None:
    for path in ("asset:nothing/x", "asset:construction-faq/../../x", "asset:construction-faq/none.jsonl"):
        with pytest.raises(ConfigError):
            plan_reading([SourceOptions(path)], 1 << 20)


def test_strict_names_the_first_file_that_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(SourceError, match="a.zip:1: archive"):
        Rows(tmp_path / "media", tmp_path, strict=True)
