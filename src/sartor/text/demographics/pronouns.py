"""Replacement of pronouns, with the verb agreement that they need.

Only a text about one person is changed: in a text about a `he` and a `she`, both would become the same.

It uses rules and short word lists, no model. If they cannot decide, the result is None and never a guess.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

WORDS = {
    name: frozenset(words.split())
    for name, words in tomllib.loads((Path(__file__).parent / "grammar.toml").read_text(encoding="utf-8")).items()
}
_FUNCTION = WORDS["function"]
LY_ADJECTIVES = WORDS["ly_adjectives"]
_GIVES = WORDS["gives"]
_GIVEN = WORDS["given"]
_LETS = WORDS["lets"]
_KEEPS = _LETS | WORDS["keeps"]
_INFINITIVES = WORDS["infinitives"]
ADVERBS = WORDS["adverbs"]
_IRREGULAR = {
    "is": "are",
    "was": "were",
    "has": "have",
    "does": "do",
    "goes": "go",
    "isn't": "aren't",
    "wasn't": "weren't",
    "hasn't": "haven't",
    "doesn't": "don't",
    "isn’t": "aren’t",
    "wasn’t": "weren’t",
    "hasn’t": "haven’t",
    "doesn’t": "don’t",
    "dies": "die",
    "lies": "lie",
    "ties": "tie",
    "focuses": "focus",
    "discusses": "discuss",
    "quizzes": "quiz",
}
_SINGULAR = {plural: single for single, plural in _IRREGULAR.items()}
_FIXED = WORDS["fixed"]
_BEFORE_NOUNS = WORDS["before_nouns"]
_IS_ADJECTIVE = WORDS["is_adjective"]
_HAS = WORDS["has"]
_AN_NUMBER = re.compile(r"(?:8\d*|11|18)(?!\d)")
_ARTICLE = re.compile(r"\b(an?) $", re.IGNORECASE)
_A_VOWEL = re.compile(r"(?:uni|use|usu|eu|one\b|ukr)", re.IGNORECASE)


def cased(word: str, like: str) -> str:
    """Return `word` with the capitals of `like`: all capitals, a first capital, or unchanged."""
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def article(word: str) -> str:
    """Return `a` or `an`, as it stands before a word or number."""
    if word[:1].isdigit():
        return "an" if _AN_NUMBER.match(word) else "a"
    return "an" if word[:1].lower() in "aeiou" and word[:1] and not _A_VOWEL.match(word) else "a"


def with_articles(text: str, positions: list[int]) -> str:
    """Return the text with each `a` or `an` right before one of the word offsets adapted to that word."""
    for position in sorted(positions, reverse=True):
        before = _ARTICLE.search(text, max(0, position - 3), position)
        if before and before[1] != "AN":
            text = text[: before.start(1)] + cased(article(text[position:]), before[1]) + text[before.end(1) :]
    return text


def is_function(word: str) -> bool:
    """Return whether a word (lower case) cannot begin a possessed noun phrase.

    Such words are prepositions, articles, verbs like `is`, and `yesterday`.
    """
    return word in _FUNCTION


def is_determiner(before: str, after: str, *, possessive: bool) -> bool:
    """Return whether a `her` (with `possessive`, a `his`) belongs to the following noun: `her car`, not `saw her`.

    before, after: adjacent words in lower case; empty at a full stop, comma or end.
    """
    if not after or is_function(after) or (after.endswith("ly") and after not in LY_ADJECTIVES):
        return False
    if possessive:
        return not (before == "of" and after in _FIXED - _BEFORE_NOUNS)  # a friend of his drove it
    if before in _GIVES and after in _GIVEN:
        return False
    if before in _LETS and after in _INFINITIVES:
        return False
    return not (before in _KEEPS and after.endswith("ing"))


def plural_verb(word: str) -> str:
    """Return the verb form after `they`: works -> work, is -> are, tries -> try; other words unchanged."""
    low = word.lower()
    if low in ADVERBS or not low.endswith("s") and low not in _IRREGULAR or low.endswith(("ss", "'s", "’s")):
        return word
    if low in _IRREGULAR:
        return cased(_IRREGULAR[low], word)
    if low.endswith("ies") and len(low) > 4:
        return word[:-3] + "y"
    return word[:-2] if low.endswith(("sses", "shes", "ches", "xes", "zzes", "oes")) else word[:-1]


def singular_verb(word: str) -> str:
    """Return the verb form after `he`: work -> works, are -> is, try -> tries; past forms and modals unchanged."""
    low = word.lower()
    if low in _SINGULAR:
        return cased(_SINGULAR[low], word)
    if low in ADVERBS or low in _FIXED or low in _FUNCTION or not low.isalpha() or low.endswith(("ed", "ly")):
        return word
    if low.endswith("y") and low[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if low.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")


def plural_contraction(after: str) -> str | None:
    """Return the contraction for `they` instead of the `'s` of `she's`: `re` or `ve`; None if it could be both.

    after: the word behind it.
    """
    if after in _HAS:
        return "ve"
    if after in ADVERBS:  # she's always late, she's always paid
        return None
    return None if after.endswith("ed") and after not in _IS_ADJECTIVE else "re"


GROUPS = ("he", "she", "they")
# the order of the forms below
_ROLES = ("subject", "object", "determiner", "possessive", "reflexive")
_FORMS = {
    "he": ("he", "him", "his", "his", "himself"),
    "she": ("she", "her", "her", "hers", "herself"),
    "they": ("they", "them", "their", "theirs", "themself"),
}
_ALL = {form: group for group, forms in _FORMS.items() for form in forms} | {"themselves": "they"}
_PRONOUN = re.compile(
    rf"(?<![\w'’-])({'|'.join(sorted(_ALL, key=len, reverse=True))})(?:['’](s|re|ve|ll|d))?(?![\w'’-])", re.I
)
_EITHER = {
    "subject": r"he or she|she or he|s/he|\(s\)he|he/she|she/he",
    "object": r"him or her|him/her|her or him",
    "determiner": r"his or her|his/her|her or his|her/his",
    "possessive": r"his or hers|his/hers",
    "reflexive": r"himself or herself|himself/herself|herself or himself",
}
_EITHER_PATTERN = re.compile(
    "|".join(rf"(?P<{role}>(?<!\w)(?:{words})(?!\w))" for role, words in reversed(_EITHER.items())), re.IGNORECASE
)
_WORD = re.compile(r"[A-Za-z]+(?:['’][a-z]+)?")
_NEXT = re.compile(r" ([A-Za-z]+(?:['’-][A-Za-z]+)*)")
_BEFORE = re.compile(r"([A-Za-z]+(?:['’][a-z]+)?) $")
_CLAUSE = (
    r"(?:^|[.,;:!?\"“(\n]\s*|\b(?:where|how|what|who|whom|why|when|which|and|but|or|not|so|nor|neither|only|then) )"
)
_INVERTED = re.compile(
    rf"{_CLAUSE}((?:is|was|has|does|are|were|have|do|isn|wasn|hasn|doesn|aren|weren|haven|don)(?:['’]t|n['’]t)?) $",
    re.IGNORECASE,
)
_AND_VERB = re.compile(
    r"\s*,? (?:and|or|but|then|and then)((?: [a-z]+ly| also| often| never| always| still| now| then)*) "
    r"([a-z]+(?:['’]t)?)\b"
)
_CLAUSE_END = re.compile(r"[.!?;\n]")
_VERBS_ALONE = WORDS["verbs_alone"]
# a noun behind this is about another person than the one whose pronouns change: her son, has a sister
_OF_SOMEBODY = re.compile(
    r"(?:\b(?:my|your|his|her|their|our|whose|(?:has|have|had|having) (?:an?|one|no|\w+))|['’]s)(?: [a-z]+)? $", re.I
)
_ONE_PERSON = re.compile(
    r"\b(?:an?|the|this|that|every|each|any|one|our|my|your) (?:[a-z-]+ "
    r"){0,3}(?:person|applicant|candidate|employee|worker"
    r"|colleague|customer|client|patient|student|teacher|nurse|doctor|engineer|manager|lawyer|driver|tenant|citizen|borrower|user|parent"
    r"|individual|friend|neighbou?r|professional|graduate|developer|accountant|adult|spouse|sibling|child)\b(?!')",
    re.IGNORECASE,
)
Gendered = Mapping[str, Sequence[Sequence[str]]]


def find(text: str, gendered: Gendered) -> Iterator[tuple[str, int, int]]:
    """Yield (group, start, end) of pronouns, nouns and titles for a person, in no order.

    `they` counts only if it is about one person. `he or she` has no group, and neither has a word for somebody's
    partner (husband).
    """
    text = _EITHER_PATTERN.sub(lambda match: "_" * len(match[0]), text)
    is_about_one = re.search(r"\bthemself\b", text, re.IGNORECASE) or _ONE_PERSON.search(text)
    for match in _PRONOUN.finditer(text):
        group = _ALL[match[1].lower()]
        if group != "they" or is_about_one:
            yield group, match.start(1), match.end(1)
    for match in _nouns(_key(gendered), False).finditer(text):
        if not _OF_SOMEBODY.search(text, *_ahead(match.start())):
            yield _noun_group(match[0], gendered), match.start(), match.end()


def swap(text: str, to: str, gendered: Gendered) -> str | None:
    """Return the text with the pronouns of `to`; None if there is nothing to change or it cannot be done correctly."""
    groups = {group for group, _, _ in find(text, gendered)}
    sources = groups - {to}
    has_either = bool(_EITHER_PATTERN.search(text))
    if len(groups) > 1 or (not sources and not has_either) or (has_either and groups):
        return None
    whole = _EITHER_PATTERN.sub(lambda match: cased(_form(to, match.lastgroup or ""), match[0]), text)
    if has_either:
        # the verbs still agree with he or she; the text had no other pronouns of `to`
        return _agreed(whole, plural_verb, to) if to == "they" else whole
    (was,) = sources
    swapped = _swap_forms(text, was, to)
    return swapped and _with_nouns(swapped, was, to, gendered)


def _ahead(position: int) -> tuple[int, int]:
    """Return the range in which to search for the words right before a position; texts may be long."""
    return max(0, position - 60), position


def _form(group: str, role: str) -> str:
    return _FORMS[group][_ROLES.index(role)]


def _role(text: str, start: int, end: int, word: str) -> str:
    """Return the grammatical role of a pronoun."""
    following = _NEXT.match(text, end)
    before, after = _BEFORE.search(text, *_ahead(start)), following[1].lower() if following else ""
    ahead = before[1].lower() if before else ""
    if following and after in LY_ADJECTIVES:  # met her early in May, but in her early career
        behind = _NEXT.match(text, following.end())
        after = after if behind and not is_function(behind[1].lower()) else ""
    if word == "her":
        return "determiner" if is_determiner(ahead, after, possessive=False) else "object"
    if word == "his":
        return "determiner" if is_determiner(ahead, after, possessive=True) else "possessive"
    if word == "themselves":
        return "reflexive"
    return _ROLES[_FORMS[_ALL[word]].index(word)]


def _swap_forms(text: str, was: str, to: str) -> str | None:
    """Return the text with every pronoun of `was` in the form of `to`, and verbs agreeing.

    None if a form is ambiguous.
    """
    agree: Callable[[str], str] | None = None  # between he and she, verbs keep their form
    if to == "they":
        agree = plural_verb
    elif was == "they":
        agree = singular_verb
    out, at = "", 0
    for match in _PRONOUN.finditer(text):
        if at > match.start() or _ALL[match[1].lower()] != was:
            continue
        role = _role(text, match.start(1), match.end(1), match[1].lower())
        short = _contraction(text, match, was, to) if match[2] else ""
        if short is None:
            return None
        head = text[at : match.start()]
        if role == "subject" and agree and not short:
            head = _inverted(out + head, agree, len(out))[len(out) :]
        out += head + cased(_form(to, role), match[1]) + short
        at = match.end()
        if role == "subject" and agree:
            tail, at = _verbs(text, at, agree, bool(short) or head != text[match.start() - len(head) : match.start()])
            out += tail
    return out + text[at:]


def _contraction(text: str, match: re.Match[str], was: str, to: str) -> str | None:
    mark, short = match[0][len(match[1])], match[2].lower()
    if to == "they" and short == "s":
        following = _NEXT.match(text, match.end())
        if match[1].lower() not in ("he", "she"):
            return None
        new = plural_contraction(following[1].lower() if following else "")
        return mark + new if new else None
    if was == "they":
        short = {"re": "s", "ve": "s"}.get(short, short)
    return mark + short


def _inverted(head: str, agree: Callable[[str], str], after: int = 0) -> str:
    """Return the text before a subject with a preceding verb agreeing: `Is she ...`.

    after: position from which that verb may begin.
    """
    match = _INVERTED.search(head, *_ahead(len(head)))
    if not match or match.start(1) < after:
        return head
    return head[: match.start(1)] + agree(match[1]) + head[match.end(1) :]


def _verbs(text: str, at: int, agree: Callable[[str], str], has_verb: bool) -> tuple[str, int]:
    """Return the text behind a subject with its verbs agreeing, and the position where it ends.

    at: position behind the subject. The text ends at the last verb of the subject.
    """
    out = ""
    if not has_verb:
        match = _NEXT.match(text, at)
        while match and (match[1].lower() in ADVERBS | {"who"} or match[1].endswith("ly")):
            out, at = out + match[0], match.end()
            match = _NEXT.match(text, at)
        if not match:
            return out, at
        out, at = out + " " + agree(match[1]), match.end()
        while match := _AND_VERB.match(text, at):
            # a conjunction right behind a verb, without an object between, is followed by a verb as well
            out += text[at : match.start(2)] + agree(match[2])
            at = match.end()
    if agree is plural_verb:
        clause_end = _CLAUSE_END.search(text, at)
        end = clause_end.start() if clause_end else len(text)
        for match in _AND_VERB.finditer(text, at, end):
            if match[2] in _VERBS_ALONE:
                out, at = out + text[at : match.start(2)] + agree(match[2]), match.end()
    return out, at


def _agreed(text: str, agree: Callable[[str], str], to: str) -> str:
    """Return the text with agreeing verbs behind the subjects, if all pronouns are of `to` already."""
    out, at = "", 0
    for match in _PRONOUN.finditer(text):
        if match.start() >= at and match[1].lower() == _form(to, "subject") and not match[2]:
            head = _inverted(out + text[at : match.start()], agree)
            tail, end = _verbs(text, match.end(), agree, head != out + text[at : match.start()])
            out, at = head + match[0] + tail, end
    return out + text[at:]


@functools.cache
def _nouns(gendered: tuple[tuple[str, ...], ...], with_partners: bool) -> re.Pattern[str]:
    words: set[str] = set()
    for row in gendered if with_partners else gendered[:-2]:
        words.update(row[:2])
    alternatives = "|".join(sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{alternatives})(?![\w-])", re.IGNORECASE)


def _key(gendered: Gendered) -> tuple[tuple[str, ...], ...]:
    """Return the rows of the tables, partners last."""
    rows = [*gendered["nouns"], *gendered["titles"], *gendered["partners"]]
    return tuple(tuple(row) for row in rows)


def _noun_group(word: str, gendered: Gendered) -> str:
    row = next(row for row in _key(gendered) if word.lower() in (row[0].lower(), row[1].lower()))
    return "he" if word.lower() == row[0].lower() else "she"


def _with_nouns(text: str, was: str, to: str, gendered: Gendered) -> str:
    """Return the text with the nouns and titles of `was` as those of `to`.

    Words for partners change to the other sex, or with `they` to the neutral word.
    """
    partners = {word for row in gendered["partners"] for word in row[:2]}
    out, at, positions = "", 0, []
    for match in _nouns(_key(gendered), True).finditer(text):
        word = match[0].lower()
        row = next(row for row in _key(gendered) if word in (row[0].lower(), row[1].lower()))
        if word in partners:
            if to == "they":
                new = row[2]
            elif was == "they":
                new = word
            else:
                new = row[1] if word == row[0] else row[0]
        elif _noun_group(word, gendered) == was and not _OF_SOMEBODY.search(text, *_ahead(match.start())):
            new = row[GROUPS.index(to)]
        else:
            continue
        out += text[at : match.start()]
        positions.append(len(out))
        out, at = out + cased(new, match[0]), match.end()
    return with_articles(out + text[at:], positions)
