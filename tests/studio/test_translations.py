"""Texts: each key in both languages with the same fields, each used key there, and no text in a template itself."""

from __future__ import annotations

import ast
import re
import string
from pathlib import Path

import pytest

from sartor.studio import translations
from sartor.studio.translations import LANGUAGES, load_strings, preferred_language

STUDIO = Path(translations.__file__).parent
TEMPLATES = sorted((STUDIO / "templates").glob("*.j2"))
KEY = re.compile(r"""\bt\(\s*["']([\w.]+)["']\s*[,)]""")
# what is the same in every language, or no word
SAME = {"Sartor Studio", "English", "Deutsch", "id", "GB", "s", "sartor studio user add NAME --role ROLE"}


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_each_text_is_there_in_both_languages_with_the_same_fields() -> None:
    for key, texts in load_strings().items():
        assert set(texts) == set(LANGUAGES), key
        assert fields(texts["en"]) == fields(texts["de"]), key
        assert all(text.strip() for text in texts.values()), key


def test_each_used_key_exists() -> None:
    used = {key for file in TEMPLATES for key in KEY.findall(file.read_text(encoding="utf-8"))}
    for file in STUDIO.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.fullmatch(r"(nav|home|time)\.\w+", node.value)
            ):
                used.add(node.value)
    assert used - set(load_strings()) == set() and len(used) > 100


def test_each_key_is_used() -> None:
    content = "\n".join(file.read_text(encoding="utf-8") for file in (*TEMPLATES, *STUDIO.rglob("*.py")))
    unused = []
    for key in load_strings():
        section = key.partition(".")[0]
        is_named = key in content
        # composed: t("state." ~ ...), f"home.{...}", has_text("gate." ~ ...)
        is_composed = f'"{section}." ~' in content or f"'{section}.' ~" in content or f'f"{section}.{{' in content
        if not is_named and not is_composed:
            unused.append(key)
    assert unused == []


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.name)
def test_no_template_has_a_text_of_its_own(file: Path) -> None:
    text = re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", "\0", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = [part.strip(" \n·→…:%.,()") for part in re.split(r"<[^>]*>|\0", text)]
    found = {word for word in words if re.search(r"[A-Za-z]{2,}|^[a-z]$", word)}
    assert found - SAME == set()
    spoken = re.findall(r'\b(?:title|placeholder|aria-label|alt)="([^"\0]+)"', text)
    assert [value for value in spoken if value not in SAME and value != "own"] == []


@pytest.mark.parametrize(
    ("cookie", "header", "language"),
    [
        ("", "", "en"),
        ("de", "en", "de"),
        ("fr", "de-AT,de;q=0.9,en;q=0.8", "de"),
        ("", "en;q=0.5, de;q=0.9", "de"),
        ("", "fr, en;q=0.1, de;q=0.05", "en"),
        ("", "de;q=x,,;q=", "en"),
        ("<script>", "fr", "en"),
    ],
)
def test_language_is_the_setting_or_the_first_accepted(cookie: str, header: str, language: str) -> None:
    assert preferred_language(cookie, header) == language
