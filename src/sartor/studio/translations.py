"""Texts of the pages, German beside English, from strings.toml; German descriptions of options."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

LANGUAGES = ("en", "de")
STRINGS = Path(__file__).parent / "strings.toml"


@functools.cache
def load_strings() -> Mapping[str, Mapping[str, str]]:
    """Return {key: {language: text}}; a key is SECTION.NAME."""
    sections = tomllib.loads(STRINGS.read_text(encoding="utf-8"))
    return {f"{section}.{name}": texts for section, names in sections.items() for name, texts in names.items()}


def translator(language: str) -> Callable[..., str]:
    """Return the function that gives a text of a key in a language, with its {fields} filled in."""
    strings = load_strings()

    def translate(key: str, **fields: object) -> str:
        return strings[key][language].format(**fields)

    return translate


def has_text(key: str) -> bool:
    """Return whether there is a text for a key."""
    return key in load_strings()


@functools.cache
def option_texts(language: str) -> Mapping[str, str]:
    """Return {English description of an option, as its JSON Schema has it: text in a language}; {} for English."""
    if language == LANGUAGES[0]:
        return {}
    return tomllib.loads((STRINGS.parent / f"option_texts_{language}.toml").read_text(encoding="utf-8"))


def preferred_language(cookie: str, accept_language: str) -> str:
    """Return the language of a visitor: their setting, else the first of Accept-Language that there is."""
    if cookie in LANGUAGES:
        return cookie
    wishes: list[tuple[float, int, str]] = []
    for index, part in enumerate(accept_language[:200].split(",")):
        name, _, quality = part.strip().partition(";q=")
        language = name.strip().lower().partition("-")[0]
        try:
            weight = float(quality or 1)
        except ValueError:
            continue
        if language in LANGUAGES:
            wishes.append((-weight, index, language))
    return min(wishes)[2] if wishes else LANGUAGES[0]
