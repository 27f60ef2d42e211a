"""Tables as spreadsheets write them: other column names, code pages, semicolons, quoted line breaks, duplicate headers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import sartor
from sartor.core.config import load
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, MalformedRow
from sartor.curate.sources import encodings, row_readers
from sartor.curate.sources.planner import plan_reading, read_all
from sartor.curate.sources.types import Columns, SourceOptions

LINES = {
    "de": ("Wie öffne ich ein Konto?", "Gehen Sie zur nächsten Filiale, bitte."),
    "fr": ("Comment ouvrir un compte ?", "Allez à l'agence la plus proche, s'il vous plaît."),
    "sv": ("Hur öppnar jag ett konto?", "Gå till närmaste kontor, även på söndagar."),
    "da": ("Hvornår åbner afdelingen?", "Nej, De må ikke køre bil det første døgn."),
    "cs": ("Jak si otevřu účet?", "Zajděte prosím na nejbližší pobočku."),
    "pl": ("Jak założyć konto?", "Proszę przyjść do najbliższego oddziału."),
    "ru": ("Как открыть счёт?", "Приходите в отделение банка."),
    "ja": ("口座を開くにはどうすればよいですか", "お近くの支店にお越しください。"),
}
CODE_PAGES = [
    *[("de", page) for page in ("cp1252", "iso-8859-15", "cp850", "mac-roman", "utf-16", "utf-8-sig")],
    *[("fr", page) for page in ("cp1252", "cp850", "mac-roman")],
    *[("sv", page) for page in ("cp1252", "cp850")],
    *[("da", page) for page in ("cp1252", "cp850", "mac-roman")],
    *[("cs", page) for page in ("cp1250", "iso-8859-2")],
    *[("pl", page) for page in ("cp1250", "iso-8859-2")],
    *[("ru", page) for page in ("cp1251", "koi8-r", "cp866", "utf-16")],
    *[("ja", page) for page in ("shift-jis", "euc-jp", "utf-16")],
]
FIELDS = Columns(prompt="Frage", completion="Antwort")


def table(rows: list[tuple[str, ...]], header: tuple[str, ...] = ("Frage", "Antwort"), delimiter: str = ";") -> str:
    """A CSV file as a spreadsheet writes it."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    writer.writerows([header, *rows])
    return text.getvalue()


def examples(file: Path, **options: Any) -> list[Example | Drop]:
    return list(read_all(SourceOptions(path=str(file), **options), 1 << 20, file.parent / "media"))


@pytest.mark.parametrize(("language", "code_page"), CODE_PAGES)
def test_code_page_is_found(language: str, code_page: str, tmp_path: Path) -> None:
    """Every row is read as it was written, and the plan names the code page."""
    prompt, answer = LINES[language]
    rows = [(f"{prompt} {number}", f"{answer}\n{number}") for number in range(20)]
    file = tmp_path / "rows.csv"
    file.write_bytes(table(rows).encode(code_page))
    source = SourceOptions(path=str(file), fields=FIELDS)
    (facts,) = plan_reading([source], 1 << 20).files
    assert facts.encoding == "" if code_page == "utf-8-sig" else facts.encoding not in ("", "utf-8")
    found = examples(file, fields=FIELDS)
    assert [(row.messages[0].text, row.messages[1].text) for row in found if isinstance(row, Example)] == rows


@pytest.mark.parametrize(
    ("text", "code_page"),
    [
        ("What\u2019s parcel {0}?;It\u2019s \u201cbig\u201d \u2013 and heavy.", "cp1252"),
        ("What\u2019s parcel {0}?;It\u2019s \u201cbig\u201d.", "mac-roman"),
        ("What does parcel {0} cost?;It costs \u00a3{0}.", "cp1252"),
        ("What does parcel {0} cost?;It costs \u00a3{0}.", "cp850"),
        ("Preis {0} \u20ac;ja", "cp1252"),
        ("Wie \u00f6ffne ich {0}?;So {0}.", "cp1252"),
    ],
)
def test_few_characters_that_are_not_ascii(text: str, code_page: str, tmp_path: Path) -> None:
    """English with curly quotes, prices, a single umlaut: signs alone decide, or the language of the words around."""
    file = tmp_path / "rows.csv"
    file.write_bytes(
        "".join(["Frage;Antwort\n", *(text.format(number) + "\n" for number in range(20))]).encode(code_page)
    )
    found = examples(file, fields=FIELDS)
    assert isinstance(found[0], Example)
    assert f"{found[0].messages[0].text};{found[0].messages[1].text}" == text.format(0)


@pytest.mark.parametrize("raw", ["Gr\u00f6\u00dfe;ja".encode("cp1252"), bytes(range(128, 256)), b"\xe4\xf6;x"])
def test_nothing_is_read_where_the_code_page_is_unsure(raw: bytes, tmp_path: Path) -> None:
    """Not even the rows in ASCII: those with umlauts would be missing. The remedy can be typed and reads all of them."""
    file = tmp_path / "rows.csv"
    file.write_bytes(b"Frage;Antwort\r\nhow;so\r\n" + raw + b"\r\n")
    (drop,) = examples(file, fields=FIELDS)
    assert isinstance(drop, Drop) and drop.reason == "unknown_encoding"
    assert "encoding: cp" in drop.detail
    found = examples(file, fields=FIELDS, encoding="latin-1")
    assert isinstance(found[0], Example) and found[0].messages[0].text == "how"
    if raw[:1] != b"\x80":
        assert isinstance(found[1], Example) and found[1].messages[0].text == raw.decode("latin-1").split(";")[0]


def test_a_broken_row_of_a_utf8_file_is_dropped_alone(tmp_path: Path) -> None:
    rows = table([(f"Wie öffne ich {number}?", "so") for number in range(30)]).encode()
    file = tmp_path / "rows.csv"
    file.write_bytes(rows + b"kaputt \xff;so\r\n")
    found = examples(file, fields=FIELDS)
    assert [type(row) for row in found] == [Example] * 30 + [Drop]
    assert isinstance(found[-1], Drop) and found[-1].reason == "not_utf8"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows.md", "rows.tsv"])
def test_every_text_format_is_read_by_its_code_page(name: str, tmp_path: Path) -> None:
    texts = {
        "rows.jsonl": '{"question": "Wie öffne ich ein Konto?", "answer": "Gehen Sie zur nächsten Filiale."}\n' * 3,
        "rows.json": '[{"question": "Wie öffne ich ein Konto?", "answer": "Gehen Sie zur nächsten Filiale."}]',
        "rows.txt": "Wie öffne ich ein Konto? Gehen Sie zur nächsten Filiale.",
        "rows.md": "# Wie öffne ich ein Konto?\n\nGehen Sie zur nächsten Filiale.\n",
        "rows.tsv": "question\tanswer\nWie öffne ich ein Konto?\tGehen Sie zur nächsten Filiale.\n",
    }
    file = tmp_path / name
    file.write_bytes(texts[name].encode("cp1252"))
    found = examples(file)
    assert found and all(isinstance(row, Example) for row in found), found
    assert "nächsten Filiale" in found[0].messages[-1].text  # type: ignore[union-attr]


def test_large_file_in_a_code_page_is_read_whole(tmp_path: Path) -> None:
    """Its first umlaut stands behind the first megabyte; it is one piece, however many rows it has."""
    rows = [(f"question {number}", "x" * 400) for number in range(24_000)] + [LINES["de"]] * 20
    file = tmp_path / "rows.csv"
    file.write_bytes(table(rows).encode("cp1252"))
    plan = plan_reading([SourceOptions(path=str(file), fields=FIELDS)], 1 << 20)
    assert plan.files[0].encoding == "cp1252" and plan.files[0].bytes > 9_000_000
    found = examples(file, fields=FIELDS)
    assert len(found) == len(rows)
    assert isinstance(found[-1], Example) and found[-1].messages[0].text == LINES["de"][0]


def test_character_that_the_code_page_lacks_drops_its_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(table([LINES["de"]]).encode("cp1252") + b"kaputt \x81;so\r\n")
    found = examples(file, fields=FIELDS, encoding="cp1252")
    assert isinstance(found[0], Example)
    assert isinstance(found[1], Drop) and found[1].reason == "not_utf8"


def test_declared_code_page_leaves_unicode_files_of_a_folder_as_they_are(tmp_path: Path) -> None:
    """One of a folder's files is in a code page, as an older program exported it."""
    folder = tmp_path / "exports"
    folder.mkdir()
    for name, code_page in (("a.csv", "utf-8"), ("b.csv", "cp1252"), ("c.csv", "utf-8-sig"), ("d.csv", "utf-16")):
        (folder / name).write_bytes(table([(f"Wie öffne ich {name}?", "Mühelos.")]).encode(code_page))
    found = examples(folder, fields=FIELDS, encoding="cp1252")
    texts = [row.messages[0].text for row in found if isinstance(row, Example)]
    assert texts == [f"Wie öffne ich {name}?" for name in ("a.csv", "b.csv", "c.csv", "d.csv")]
    plan = plan_reading([SourceOptions(path=str(folder), fields=FIELDS, encoding="cp1252")], 1 << 20)
    assert [file.encoding for file in plan.files] == ["", "cp1252", "", "utf-16"]


def test_declared_utf16_without_its_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(table([("Wie öffne ich es?", "So.")]).encode("utf-16-le"))
    (row,) = examples(file, fields=FIELDS, encoding="utf-16-le")
    assert isinstance(row, Example) and row.messages[0].text == "Wie öffne ich es?"


def test_lines_that_end_in_cr_alone_are_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(table([("Wie?", "So."), ("Wann?", "Jetzt.")]).replace("\r\n", "\r").encode())
    found = examples(file, fields=FIELDS)
    assert [row.reply for row in found if isinstance(row, Example)] == ["So.", "Jetzt."]


def test_encoding_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="no encoding 'cp9999'"):
        SourceOptions(path="x.csv", encoding="cp9999")
    for name in ("hex", "rot13", "zlib", "idna", "undefined"):
        with pytest.raises(ConfigError, match="no encoding"):
            SourceOptions(path="x.csv", encoding=name)
    assert SourceOptions(path="x.csv", encoding="UTF8").encoding == encodings.UTF8
    assert SourceOptions(path="x.csv", encoding="EBCDIC-CP-US").encoding == "cp037"


def test_utf8_can_be_declared_for_a_file_with_broken_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"Frage;Antwort\r\nhow;so\r\nkaputt \xe4;so\r\n")
    found = examples(file, fields=FIELDS, encoding="utf-8")
    assert [type(row) for row in found] == [Example, Drop]


def test_named_columns_and_constant_system_prompt_are_read(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text(table([("Was?", "Das.", "7")], ("Frage", "Antwort", "Kunde")), encoding="utf-8")
    fields = Columns(prompt="Frage", completion="Antwort", group="Kunde")
    (row,) = examples(file, fields=fields, system="Du hilfst.")
    assert isinstance(row, Example)
    assert [(turn.role, turn.text) for turn in row.messages] == [
        ("system", "Du hilfst."),
        ("user", "Was?"),
        ("assistant", "Das."),
    ]
    assert row.group == "7"


def test_system_prompt_of_a_row_goes_before_the_constant_one(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text(
        table([("Was?", "Das.", "Kurz."), ("Wer?", "Er.", "")], ("Frage", "Antwort", "Ton")), encoding="utf-8"
    )
    found = examples(file, fields=Columns(prompt="Frage", completion="Antwort", system="Ton"), system="Lang.")
    assert [row.messages[0].text for row in found if isinstance(row, Example)] == ["Kurz.", "Lang."]


def test_number_in_a_named_column_is_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"utterance": "switch it on", "intent": 3}\n')
    (row,) = examples(file, fields=Columns(prompt="utterance", completion="intent"))
    assert isinstance(row, Example) and row.reply == "3"


def test_gap_among_numbers_is_no_answer(tmp_path: Path) -> None:
    """pandas writes NaN of it, which is no class to learn."""
    table_of_numbers = pa.table({"utterance": ["on", "off"], "intent": [3.0, float("nan")]})
    pq.write_table(table_of_numbers, tmp_path / "rows.parquet")
    row, drop = examples(tmp_path / "rows.parquet", fields=Columns(prompt="utterance", completion="intent"))
    assert isinstance(row, Example) and isinstance(drop, Drop) and drop.reason == "missing_field"


def test_column_that_is_not_there_names_the_closest(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text(table([("Was?", "Das.")]), encoding="utf-8")
    with pytest.raises(ConfigError, match="no column 'frage'; its columns are 'Frage', 'Antwort'") as caught:
        examples(file, fields=Columns(prompt="frage", completion="Antwort"))
    assert caught.value.remedy == "fields: {prompt: Frage} in a recipe; --fields prompt=Frage of `sartor tailor`"


def test_unknown_form_names_the_known_ones_and_the_option(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text(table([("Was?", "Das.")]), encoding="utf-8")
    (drop,) = examples(file)
    assert isinstance(drop, Drop) and drop.reason == "unknown_form"
    assert "question, answer" in drop.detail and "fields: {prompt: Frage, completion: Antwort}" in drop.detail


def test_columns_in_remedies_can_be_typed(tmp_path: Path) -> None:
    """Columns of any name are quoted for YAML and the shell, and those of sentences are taken."""
    file = tmp_path / "faq.csv"
    rows = [("1", "Wer hat auf?", "Der Laden."), ("2", "Wer hat heute zu?", "Die Bank.")]
    file.write_text(table(rows, ("No", "Frage: Text", "Antwort, kurz")), encoding="utf-8")
    drop = examples(file)[0]
    assert isinstance(drop, Drop)
    option = yaml.safe_load(drop.detail[drop.detail.index("fields: {") :])
    assert option == {"fields": {"prompt": "Frage: Text", "completion": "Antwort, kurz"}}
    with pytest.raises(ConfigError) as caught:
        examples(file, fields=Columns(prompt="Frag", completion="Antwort kurz"))
    assert caught.value.remedy == (
        "fields: {prompt: \"Frage: Text\"} in a recipe; --fields 'prompt=Frage: Text' of `sartor tailor`"
    )


def test_duplicate_header_harms_only_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text(table([("Was?", "Das.", "a", "b")], ("Frage", "Antwort", "Notiz", "Notiz")), encoding="utf-8")
    (row,) = examples(file, fields=FIELDS)
    assert isinstance(row, Example) and row.reply == "Das."
    file.write_text(table([("Was?", "Das.", "b")], ("Frage", "Antwort", "Frage")), encoding="utf-8")
    with pytest.raises(ConfigError, match="'Frage' more than once"):
        examples(file, fields=FIELDS)
    file.write_text(table([("Was?", "Das.", "b")], ("question", "answer", "question")), encoding="utf-8")
    (drop,) = examples(file)
    assert isinstance(drop, Drop) and drop.reason == "duplicate_columns"


def test_column_that_another_field_would_hide_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "old", "Frage": "new", "Antwort": "so"}\n')
    (drop,) = examples(file, fields=FIELDS)
    assert isinstance(drop, Drop) and drop.reason == "duplicate_columns"
    with pytest.raises(ConfigError, match="'Frage' is named for two fields"):
        Columns(prompt="Frage", completion="Frage")


def test_recipe_of_a_spreadsheet_makes_a_dataset(tmp_path: Path) -> None:
    """The recipe's own spelling, the manifest's facts, and another mapping makes another Dataset."""
    file = tmp_path / "faq.csv"
    file.write_bytes(
        table([(f"Wie öffne ich Konto {number}?", f"Über die App, Nummer {number}.") for number in range(40)]).encode(
            "cp1252"
        )
    )
    source = {"path": str(file), "licence": "CC-BY-4.0", "fields": {"prompt": "Frage", "completion": "Antwort"}}
    made = sartor.curate({"sources": [source]}, tmp_path / "data").dataset
    (facts,) = made.manifest["sources"]
    assert (facts["encoding"], facts["form"], facts["read"]) == ("cp1252", "prompt_completion", 40)
    assert load(SourceOptions, source).fields == FIELDS


def test_recoding_keeps_every_character(tmp_path: Path) -> None:
    text = "".join(chr(number) for number in range(32, 0x2000)) * 40
    with encodings.as_utf8(io.BytesIO(text.encode("utf-16")), "utf-16") as stream:
        assert stream.read().decode() == text


def test_code_page_that_was_found_is_told_and_stands_in_the_card(tmp_path: Path) -> None:
    rows = "".join(f"Wie öffne ich Konto {number}?;Über die App, für {number} Euro.\r\n" for number in range(20))
    (tmp_path / "faq.csv").write_bytes(("question;answer\r\n" + rows).encode("cp1252"))
    lines: list[str] = []
    made = sartor.curate({"sources": [str(tmp_path / "faq.csv")]}, tmp_path / "data", notice=lines.append)
    assert any("faq.csv is read as cp1252" in line for line in lines)
    assert (
        "cp1252" in (made.dataset.path / "card.html").read_text()
        and "code page" in (made.dataset.path / "card.html").read_text()
    )
    lines.clear()
    named = {"sources": [{"path": str(tmp_path / "faq.csv"), "encoding": "cp1252"}]}
    sartor.curate(named, tmp_path / "named", notice=lines.append)
    assert not any("is read as" in line for line in lines), "nobody asked to be told what was said"


def test_object_in_a_named_column_is_its_json(tmp_path: Path) -> None:
    """Slots of a booking are what the model is to say."""
    rows = [{"text": f"A table for {n}?", "slots": {"people": str(n), "place": "Café"}} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "fields": {"prompt": "text", "completion": "slots"}}
    made = sartor.curate({"sources": [source]}, tmp_path / "data")
    replies = {example.reply for example in sartor.read_examples(made.dataset)}
    assert made.kept == 12 and '{"people": "3", "place": "Café"}' in replies
    rows = [{"text": f"Play song {n}", "slots": [["song", str(n)]]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = sartor.curate({"sources": [source]}, tmp_path / "lists")
    assert '[["song", "3"]]' in {example.reply for example in sartor.read_examples(made.dataset)}


@pytest.mark.parametrize("text", ["中文字符，", "Привет, мир. ", "Größe und Übung. "])
@pytest.mark.parametrize("before", range(3))
def test_long_line_of_utf8_is_utf8(text: str, before: int) -> None:
    """JSON on one line: a character lies in two of the blocks that are looked at."""
    line = ("x" * before + text * (3_500_000 // len(text.encode()))).encode()
    assert encodings.detect_encoding(io.BytesIO(b'["' + line + b'"]')) == ""
    broken = b'["' + line[:2_000_000] + b"\xff" + line[2_000_000:] + b'"]\n' + ("ä\n" * 40).encode()
    assert encodings.detect_encoding(io.BytesIO(broken)) == "", "one broken byte is one broken block"


KOREAN = ("계좌를 개설하려면 어떻게 해야 하나요?", "가까운 지점을 방문해 주세요.")
CHINESE = ("我想知道如何办理银行卡的开户手续，需要什么材料？", "请携带身份证到最近的营业网点办理。")


@pytest.mark.parametrize(("pair", "code_page"), [(LINES["ja"], "cp932"), (KOREAN, "cp949"), (CHINESE, "gb18030")])
@pytest.mark.parametrize("before", range(4))
def test_no_character_of_the_sample_is_cut_in_two(pair: tuple[str, str], code_page: str, before: int) -> None:
    """Of a large file the first lines are looked at, up to the end of one."""
    rows = [(f"{'x' * before if number == 0 else ''}{number}{pair[0]}", pair[1]) for number in range(2500)]
    assert encodings.detect_encoding(io.BytesIO(table(rows).encode(code_page))) == code_page


@pytest.mark.parametrize("broken", [b"\n", b"\x00\xd8\n\x00"], ids=["odd-byte", "half-of-a-pair"])
def test_utf16_with_broken_bytes_loses_their_row_alone(broken: bytes, tmp_path: Path) -> None:
    """`echo >> rows.csv` puts one byte behind a file of two a character."""
    file = tmp_path / "rows.csv"
    file.write_bytes(table([LINES["de"], LINES["de"]]).encode("utf-16") + broken)
    found = examples(file, fields=FIELDS)
    assert [type(row) for row in found[:2]] == [Example, Example]
    assert all(isinstance(row, Drop) for row in found[2:])


def test_utf16_without_its_mark_is_said() -> None:
    with pytest.raises(MalformedRow) as caught:
        encodings.as_utf8(io.BytesIO("口座".encode("utf-16-le")), "utf-16")
    assert caught.value.reason == "unknown_encoding"


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (
            "Frage;Antwort (kurz, klar, ganz)\r\nWas?;Das, und mehr.\r\n",
            {"Frage": "Was?", "Antwort (kurz, klar, ganz)": "Das, und mehr."},
        ),
        ('"Frage\n(Kunde, Ort)";Antwort\r\nWas?;Das.\r\n', {"Frage\n(Kunde, Ort)": "Was?", "Antwort": "Das."}),
        ("\ufeffsep=;\r\nFrage;Antwort\r\nWas?;Das.\r\n", {"Frage": "Was?", "Antwort": "Das."}),
        ('prompt,completion\n"a;b","c;d"\n', {"prompt": "a;b", "completion": "c;d"}),
        (f'a;b\n"{"x, y " * 20_000}";z\n', {"a": "x, y " * 20_000, "b": "z"}),
    ],
    ids=["comma-in-the-header", "line-end-in-the-header", "stated", "comma", "long"],
)
def test_delimiter_is_the_one_that_the_rows_have(text: str, row: dict[str, str]) -> None:
    assert [found for _, found in row_readers.delimited(io.BytesIO(text.encode()), 1 << 20)] == [row]
