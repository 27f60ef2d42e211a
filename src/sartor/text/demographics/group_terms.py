"""Search and replacement of terms that name demographic groups.

    mentions("Emily is 28.", "age")                    -> a Mention of `young`
    swap("Emily said her car is hers.", "pronouns", "he") -> "Brad said his car is his." (see `swap` for which name)

The lexicon is `groups.toml`, which states the source of each list. English only. A term counts if the words around it
show that it is about a person: `a German applicant`, not `German lessons`.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sartor.core.errors import ConfigError
from sartor.text.demographics import pronouns
from sartor.text.demographics.pronouns import cased, with_articles

Kind = Literal["names", "pronouns", "age", "nationality", "disability"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SEXES = {"female": "she", "male": "he"}
ADULT, OLDER, YEARS_APART = 18, 40, 32
_BE = r"(?:is|am|are|was|were|be|been|being|'s|’s|'m|’m|'re|’re)"
_VERY = r"(?:(?:very|quite|too|rather|also|originally|legally) )?"
_AFTER_NOUN = r"(?=\s*(?:[.,;:!?)]|$)|\s+(?:who|with|from|and|or|is|was|has|had|in|of|by|living|applying|applied)\b)"


@dataclass(frozen=True)
class Mention:
    """Term of a group in a text.

    text: equals `text[start:end]` of the searched text.
    form: grammatical form, which `swap` needs.
    index: position of a name in its group's list.
    """

    group: str
    start: int
    end: int
    text: str
    form: str = ""
    index: int = 0


@functools.cache
def lexicon() -> dict[str, Any]:
    """Return the tables of groups.toml."""
    return tomllib.loads((Path(__file__).parent / "groups.toml").read_text(encoding="utf-8"))


@functools.cache
def groups(kind: Kind) -> tuple[str, ...]:
    """Return the groups of a kind, which `swap` accepts as `to`.

    A group of names is an origin and a sex (`black_female`).
    """
    _check_kind(kind)
    if kind == "names":
        return tuple(f"{origin}_{sex}" for origin in lexicon()["names"] for sex in SEXES)
    fixed = {"pronouns": pronouns.GROUPS, "age": ("young", "older")}
    return fixed[kind] if kind in fixed else tuple(lexicon()[kind])


def mentions(text: str, kind: Kind) -> list[Mention]:
    """Return the terms of a kind in a text, in order and without overlaps.

    Raises ConfigError for an unknown kind.
    """
    _check_kind(kind)
    candidates = sorted(_FINDERS[kind](text), key=lambda mention: (mention.start, -mention.end))
    separate: list[Mention] = []
    for mention in candidates:
        if not separate or mention.start >= separate[-1].end:
            separate.append(mention)
    return separate


def swap(text: str, kind: Kind, to: str) -> str | None:
    """Return the text with its person moved to another group; pronouns, verbs, articles and capitals are adapted.

    None if there is no term of the kind, or if all are of that group already.
    None also if grammar or meaning cannot be kept: a text about a `he` and a `she`, a plural `they`, "she's" that may
    be "is" or "has".
    First names change with pronouns (to a name of the same origin), and pronouns with first names of the other sex.
    The result is deterministic. Raises ConfigError for an unknown kind or group.
    """
    if to not in groups(kind):
        raise ConfigError(f"{to!r} is no group of {kind}", f"one of {', '.join(groups(kind))}")
    changed = _SWAPS[kind](text, to)
    return None if changed is None or changed == text else changed


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"there is no kind of group {kind!r}", f"one of {', '.join(KINDS)}")


def _edited(text: str, edits: dict[tuple[int, int], str]) -> str:
    """Return the text with spans replaced, and with the articles before them adapted."""
    places, out, at = [], "", 0
    for (start, end), new in sorted(edits.items()):
        out += text[at:start]
        places.append(len(out))
        out, at = out + new, end
    return with_articles(out + text[at:], places)


def _any(words: list[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


@functools.cache
def _person() -> str:
    return rf"(?:{_any(lexicon()['person']['nouns'])})"


# names


@functools.cache
def _name_tables() -> tuple[re.Pattern[str], dict[str, tuple[str, int]], dict[str, tuple[str, int]]]:
    first, last = {}, {}
    for origin, lists in lexicon()["names"].items():
        for sex in SEXES:
            first.update({name: (f"{origin}_{sex}", index) for index, name in enumerate(lists[sex])})
        last.update({name: (origin, index) for index, name in enumerate(lists["surnames"])})
    return re.compile(rf"\b({_any(list(first))})(?: ({_any(list(last))}))?\b(?!-)"), first, last


def _names(text: str) -> Iterator[Mention]:
    """Yield first names with an optional surname, and each such surname wherever it occurs (Mr Walsh)."""
    pattern, first, last = _name_tables()
    of_surname: dict[str, str] = {}
    for match in pattern.finditer(text):
        group, index = first[match[1]]
        yield Mention(group, start=match.start(1), end=match.end(1), text=match[1], form="first", index=index)
        if match[2]:
            of_surname.setdefault(match[2], group)
    if not of_surname:
        return
    for surname_match in re.finditer(rf"\b(?:{_any(list(of_surname))})\b(?!-)", text):
        yield Mention(
            of_surname[surname_match[0]],
            start=surname_match.start(),
            end=surname_match.end(),
            text=surname_match[0],
            form="last",
            index=last[surname_match[0]][1],
        )


def _renamed(text: str, target: Callable[[str], str]) -> str:
    """Return the text with names of other groups than `target(group)` replaced.

    A name becomes the one at its index in the other list, or the next one that is not in the text. Equal names get
    equal replacements.
    """
    used_names = {mention.text for mention in mentions(text, "names")}
    names: dict[tuple[str, str], str] = {}
    edits = {}
    for mention in mentions(text, "names"):
        origin, _, sex = target(mention.group).partition("_")
        # a surname shows only the origin
        if target(mention.group) == mention.group or (
            mention.form == "last" and mention.group.startswith(f"{origin}_")
        ):
            continue
        table = lexicon()["names"][origin]["surnames" if mention.form == "last" else sex]
        if (mention.form, mention.text) not in names:
            rotated = [table[(mention.index + turn) % len(table)] for turn in range(len(table))]
            names[mention.form, mention.text] = next((name for name in rotated if name not in used_names), rotated[0])
            used_names.add(names[mention.form, mention.text])
        edits[mention.start, mention.end] = names[mention.form, mention.text]
    return _edited(text, edits)


def _swap_names(text: str, to: str) -> str | None:
    name_mentions = mentions(text, "names")
    if all(mention.group == to for mention in name_mentions):
        return None
    sex = to.rpartition("_")[2]
    renamed = _renamed(text, lambda group: to)
    if any(not mention.group.endswith(f"_{sex}") for mention in name_mentions) and {
        mention.group for mention in mentions(text, "pronouns")
    }:
        return pronouns.swap(renamed, SEXES[sex], lexicon()["gendered"])
    return renamed


# pronouns


def _pronouns(text: str) -> Iterator[Mention]:
    for group, start, end in pronouns.find(text, lexicon()["gendered"]):
        yield Mention(group, start, end, text[start:end])


def _swap_pronouns(text: str, to: str) -> str | None:
    changed = pronouns.swap(text, to, lexicon()["gendered"])
    if changed is None or to == "they":
        return changed
    sex, other = ("male", "female") if to == "he" else ("female", "male")
    return _renamed(changed, lambda group: group.replace(f"_{other}", f"_{sex}"))


# age


@functools.cache
def _age_pattern() -> re.Pattern[str]:
    """Return the pattern of ages, one group per form: numbers, words before a person, words after "to be", decades."""
    words = lexicon()["age"]
    adjectives = _any([*words["young"], *words["older"]])
    decades = _any([*words["decades_young"], *words["decades_older"]])
    return re.compile(
        rf"(?<![\d.,])(\d\d)(?=[- ]years?[- ]old\b)|\b(?:aged|age of|age:?) (\d\d)\b(?![.,]?\d)"
        rf"|\b(?:I am|I'm|[Ss]?[Hh]e is|[Ss]?[Hh]e was|[Ss]?[Hh]e's|[Tt]hey are|[Tt]hey're) "
        rf"(\d\d)(?=[.;,!?]?(?:\s|$)(?! ?%))"
        rf"|\b[A-Z][a-z]+, (\d\d),|(?<![\w-])({adjectives})(?= {_person()}\b)"
        rf"|{_BE} {_VERY}({adjectives})\b(?! than\b| enough\b| (?!and\b|or\b|but\b)[a-z])"
        rf"|\b(?:her|his|their|my|your) (?:early |mid[- ]?|late )?({decades})\b"
    )


def _ages(text: str) -> Iterator[Mention]:
    words = lexicon()["age"]
    for match in _age_pattern().finditer(text):
        start, end = match.span(match.lastindex or 0)
        term = text[start:end]
        if not term.isdigit():
            group = "young" if term in (*words["young"], *words["decades_young"]) else "older"
            yield Mention(group, start=start, end=end, text=term, form="decade" if match.lastindex == 7 else "word")
        elif int(term) >= ADULT:  # ages of children are left alone
            yield Mention("young" if int(term) < OLDER else "older", start=start, end=end, text=term, form="number")


def _swap_age(text: str, to: str) -> str | None:
    words, edits = lexicon()["age"], {}
    for mention in mentions(text, "age"):
        if mention.group == to:
            continue
        if mention.form == "number":
            years = int(mention.text)
            new = str(years + YEARS_APART if to == "older" else min(max(years - YEARS_APART, ADULT), OLDER - 1))
        elif mention.form == "decade":
            new = words[f"decades_{to}"][words[f"decades_{mention.group}"].index(mention.text)]
        else:
            new = cased(words[to][0], mention.text)
        edits[mention.start, mention.end] = new
    return _edited(text, edits) if edits else None


# nationality


@functools.cache
def _nationality() -> tuple[re.Pattern[str], dict[str, list[tuple[str, str]]]]:
    """Return the pattern, with one group per form, and word -> its readings (group, form)."""
    words: dict[str, list[tuple[str, str]]] = {}
    for group, (adjective, noun, *countries) in lexicon()["nationality"].items():
        for word, form in [(adjective, "adjective"), (noun, "noun"), *((country, "country") for country in countries)]:
            words.setdefault(word, []).append((group, form))
    words_of: dict[str, list[str]] = {form: [] for form in _FORMS}
    for word, readings in words.items():
        for form in {form for _, form in readings}:
            words_of[form].append(word)
    of = {form: _any(form_words) for form, form_words in words_of.items()}
    return re.compile(
        rf"\b({of['adjective']})(?= {_person()}\b| (?:national|citizen|passport|origin|descent|nationality)\b)"
        rf"|{_BE} {_VERY}({of['adjective']})\b(?=\s*(?:[.,;:!?)]|$)|\s+(?:and|or|but|by|who)\b)"
        rf"|\b(?:[Aa]n?|[Tt]he|[Aa]nother|[Ee]very|[Tt]his|[Tt]hat) ({of['noun']}){_AFTER_NOUN}"
        rf"|\b(?:from|born in|citizens? of|nationals? of|grew up in|lived in|raised in|native of) "
        rf"({of['country']})\b(?!-)"
    ), words


_FORMS = ("adjective", "noun", "country")
_FORM_OF_GROUP = {1: "adjective", 2: "adjective", 3: "noun", 4: "country"}


def _nationalities(text: str) -> Iterator[Mention]:
    pattern, words = _nationality()
    for match in pattern.finditer(text):
        form = _FORM_OF_GROUP[match.lastindex or 0]
        start, end = match.span(match.lastindex or 0)
        group = next(group for group, of in words[text[start:end]] if of == form)
        yield Mention(group, start=start, end=end, text=text[start:end], form=form)


def _swap_nationality(text: str, to: str) -> str | None:
    new = dict(zip(_FORMS, lexicon()["nationality"][to], strict=False))
    return _edited(
        text,
        {
            (mention.start, mention.end): new[mention.form]
            for mention in mentions(text, "nationality")
            if mention.group != to
        },
    )


# disability


@functools.cache
def _disability_pattern() -> re.Pattern[str]:
    """Return the pattern of disabilities, one group per form.

    The forms are: before a noun, after "to be", a verb with a wheelchair, `with` and its noun, `in a wheelchair`.
    """
    lists = lexicon()["disability"]
    before_words: list[str] = []
    after_words: list[str] = []
    for word_before, single, plural in lists.values():
        before_words.append(word_before)
        after_words += [single, plural]
    before, after = _any(before_words), _any(after_words)
    return re.compile(
        rf"\b({before})(?= {_person()}\b)|{_BE} (?:also |legally |fully )?({after})\b(?! to\b)"
        rf"|\b((?:uses?|used) a wheelchair)\b"
        r"|(?<=[a-z]) (with(?:out)? a disability|with(?:out)? disabilities)\b"
        rf"|{_BE} (in a wheelchair)\b|(?<=[a-z]) (in a wheelchair)\b"
    )


_ARE = re.compile(r"(?:\bare|\bwere|'re|’re) (?:also |legally |fully )?$")
_MANY = re.compile(r"(?:s|people|men|women|children) $")


def _disabilities(text: str) -> Iterator[Mention]:
    forms = {1: "before", 2: "after", 3: "verb", 4: "with", 5: "after", 6: "with"}
    for match in _disability_pattern().finditer(text):
        form = forms[match.lastindex or 0]
        start, end = match.span(match.lastindex or 0)
        term = text[start:end]
        if "wheelchair" in term:
            group = "wheelchair"
        elif form == "with":
            group = "none" if term.startswith("without") else "disabled"
        else:
            group = next(group for group, words in lexicon()["disability"].items() if term in words)
        yield Mention(group, start=start, end=end, text=term, form=form)


def _swap_disability(text: str, to: str) -> str | None:
    before, single, plural = lexicon()["disability"][to]
    edits = {}
    for mention in mentions(text, "disability"):
        if mention.group == to:
            continue
        ahead = text[: mention.start]
        if mention.form == "before":
            new = before
        elif mention.form == "after":
            new = plural if _ARE.search(ahead) else single
        elif mention.form == "with":
            new = f"who are {plural}" if _MANY.search(ahead) else f"who is {single}"
        else:
            verb = mention.text.split()[0]
            copula = {"uses": "is", "used": "was"}.get(verb) or ("am" if re.search(r"\bI $", ahead) else "are")
            new = f"{copula} {plural if copula == 'are' else single}"
        edits[mention.start, mention.end] = new
    return _edited(text, edits) if edits else None


_FINDERS: dict[Kind, Callable[[str], Iterator[Mention]]] = {
    "names": _names,
    "pronouns": _pronouns,
    "age": _ages,
    "nationality": _nationalities,
    "disability": _disabilities,
}
_SWAPS: dict[Kind, Callable[[str, str], str | None]] = {
    "names": _swap_names,
    "pronouns": _swap_pronouns,
    "age": _swap_age,
    "nationality": _swap_nationality,
    "disability": _swap_disability,
}
