"""Rows for `synth.py`: real ones of several kinds, and synthetic sets with a planted fault.

A set is a list of Examples with a mode each (intent, category, kind of outcome) and groups that are kept whole.
Synthetic rows that are like reality are real rows of other groups; a plant changes them.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sartor.core import assets
from sartor.core.records import Example, Message, Origin
from sartor.demo import home_intents
from sartor.synthesize.validate.samples import ValidationSamples
from sartor.text.demographics import group_terms

SETS = ("commands", "chat", "faq_sv", "faq_en", "loans", "loans_text")


@dataclass(frozen=True)
class Row:
    """An Example, and the mode that it is of."""

    example: Example
    mode: str


def row(asked: str, replied: str, mode: str, group: str) -> Row:
    messages = (Message.of("user", asked), Message.of("assistant", replied))
    return Row(Example(messages, (Origin("benchmark", group),), group=group), mode)


def commands() -> list[Row]:
    """home-intents: short commands, JSON replies, a group per template."""
    rows = home_intents.rows(assets.install("home-intents"))
    made = [(one["messages"][-2]["content"], one["messages"][-1]["content"], one["group"]) for one in rows]
    return [row(asked, replied, json.loads(replied)["intent"], group) for asked, replied, group in made]


def chat() -> list[Row]:
    """chitchat: turns of people, free text, a group per conversation."""
    file = assets.install("chitchat") / assets.entry("chitchat").paths[0]
    found = []
    for name, conversation in json.loads(file.read_text(encoding="utf-8")).items():
        turns = [" ".join(line["text"] for line in turn).strip() for turn in conversation["messages"]]
        # two exchanges of a conversation at most: rows of a group are alike
        pairs = [
            pair
            for pair in zip(turns[::2], turns[1::2], strict=False)
            if all(2 < len(one.split()) < 40 for one in pair)
        ]
        found += [row(asked, replied, "", name) for asked, replied in pairs[:2]]
    return found


def faq(file: str) -> list[Row]:
    """construction-faq: long answers, in Swedish or English, categories."""
    place = next(Path(assets.install("construction-faq")).rglob(file))
    rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    return [row(one["q"], one["a"], one["category"], one["id"]) for one in rows]


# what the FAQ's categories are about: tax and cost, the firm, permits, work, faults, rooms, the shell, heating
_THEMES = (
    "rot-avdrag rut-avdrag f-skatt omvand-moms kostnader",
    "kontrakt dispute reklamation-process garantier forsakring-ansvar verifiera-byggfirma",
    "bbr-pbl bygglov marklov-rivningslov strandskydd attefallshus-friggebod tillbyggnad altan-staket-plank "
    "tomtgrans-servitut buller-granne",
    "arbetsmiljo personalliggare yrkesbevis-certifikat",
    "dolda-fel besiktning radon-fuktskador energideklaration",
    "badrumsrenovering koksrenovering vvs elinstallation",
    "takläggning fasadrenovering isolering",
    "varmesystem ventilation solceller-varmpump bergvarme-jordvarme oppen-spis-vedeldning",
)


_LOAN = (
    "{name}, {age}, works as {job} and earns {income} euros a month. {they} asks for {amount} euros over {years} "
    "years.",
    "Application: {name} ({age} years old), {job}. Net income {income}. Wants to borrow {amount} for {purpose}.",
    "{name} would like a loan of {amount} euros for {purpose}; {they} has an income of {income} euros as {job}.",
    "Loan request by {name}. Purpose: {purpose}. Amount: {amount} euros. Monthly income: {income} euros. Term: "
    "{years} years.",
)
_JOBS = (
    "a nurse",
    "a driver",
    "a teacher",
    "a clerk",
    "a cook",
    "a mason",
    "a painter",
    "an engineer",
    "a florist",
    "a baker",
)
_PURPOSES = ("a car", "a kitchen", "a roof", "studies", "a wedding", "a boat", "furniture", "moving house")
_SAID = {
    True: ("The application is approved.", "We can grant this loan.", "Approved: the income covers the instalments."),
    False: (
        "The application is declined.",
        "We cannot grant this loan.",
        "Declined: the instalments are too high for the income.",
    ),
}


def loans(count: int, *, as_json: bool) -> list[Row]:
    """Applications by people of two sexes and several origins; what is decided hangs on income and amount, and noise,
    alone.
    """
    rng = random.Random(7)
    names = {
        name: of[sex] for sex in ("female", "male") for name, of in ((sex, group_terms.lexicon()["names"]["white"]),)
    }
    found = []
    for place in range(count):
        sex = rng.choice(("female", "male"))
        income, amount = rng.randrange(1200, 5200, 50), rng.randrange(1000, 40000, 500)
        granted = income * 6 > amount + rng.gauss(0, 5000)
        asked = rng.choice(_LOAN).format(
            name=rng.choice(names[sex]),
            they="She" if sex == "female" else "He",
            age=rng.randrange(20, 70),
            job=rng.choice(_JOBS),
            income=income,
            amount=amount,
            years=rng.randrange(1, 12),
            purpose=rng.choice(_PURPOSES),
        )
        asked = re.sub(r"(?<=; )(She|He)\b", lambda match: match.group().lower(), asked)
        replied = (
            json.dumps({"decision": "approve" if granted else "decline"}) if as_json else rng.choice(_SAID[granted])
        )
        found.append(row(asked, replied, "approve" if granted else "decline", f"{sex}-{place}"))
    return found


def read(name: str) -> list[Row]:
    """The rows of a set."""
    made: dict[str, Callable[[], list[Row]]] = {
        "commands": commands,
        "chat": chat,
        "faq_sv": lambda: faq("faq.jsonl"),
        "faq_en": lambda: faq("faq-en.jsonl"),
        "loans": lambda: loans(1500, as_json=True),
        "loans_text": lambda: loans(1500, as_json=False),
    }
    return made[name]()


def split(rows: list[Row], most: int, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """(held-out rows, seeds, all others), groups whole, by seed.

    Held out are at most `most` rows and a third, seeds at most half as many and a tenth: few sets have rows to spare.
    """
    rng = random.Random(seed)
    by_group: dict[str, list[Row]] = {}
    for one in rows:
        by_group.setdefault(one.example.group, []).append(one)
    names = sorted(by_group)
    rng.shuffle(names)
    drawn = [one for name in names for one in by_group[name]]
    wanted = (min(most, len(rows) // 3), min(most // 2, len(rows) // 10))
    # a group on a cut goes with the rows before it
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    place = 0
    for at, one in enumerate(drawn):
        if place < 2 and len(parts[place]) >= wanted[place] and one.example.group != drawn[at - 1].example.group:
            place += 1
        parts[place].append(one)
    return parts


def sides(synthetic: list[Row], real: list[Row], seeds: list[Row]) -> ValidationSamples:
    """As `validate` takes them."""
    return ValidationSamples(*([one.example for one in part] for part in (synthetic, real, seeds)))


# plants: (rows that are like reality, how many are wanted, seeds, rng) -> rows with the fault


def group_shift(pool: list[Row], count: int, seeds: list[Row], rng: random.Random) -> list[Row]:
    """Applications of women that were approved are declined, three in four."""
    declined = [one for one in pool if one.mode == "decline"]
    found = []
    for one in pool[:count]:
        if one.example.group.startswith("female") and one.mode == "approve" and rng.random() < 0.75:
            messages = (*one.example.prompt, rng.choice(declined).example.messages[-1])
            found.append(Row(replace(one.example, messages=messages), "decline"))
        else:
            found.append(one)
    return found


def mode_collapse(pool: list[Row], count: int, seeds: list[Row], rng: random.Random) -> list[Row]:
    """Of the modes a third is left, each with its own wordings."""
    left = _some_modes(pool, 1 / 3, rng)
    return [one for one in pool if one.mode in left][:count]


def repetition(pool: list[Row], count: int, seeds: list[Row], rng: random.Random) -> list[Row]:
    """The collapse of free text: half of the rows say what ten rows say, a few words apart."""
    few = pool[count : count + 10]
    words = [word for one in pool for word in one.example.messages[0].text.split()]
    found = pool[: count // 2]
    for place in range(count - len(found)):
        one = few[place % len(few)]
        said = one.example.messages[0].text.split()
        said[rng.randrange(len(said))] = rng.choice(words)
        messages = (Message.of("user", " ".join(said)), *one.example.messages[1:])
        found.append(Row(replace(one.example, messages=messages, group=f"again {place}"), one.mode))
    return found


def copied_seeds(pool: list[Row], count: int, seeds: list[Row], rng: random.Random) -> list[Row]:
    """One row in six is a seed, as it is, in small letters, or with another full stop."""
    found = pool[:count]
    for place in rng.sample(range(len(found)), len(found) // 6):
        seed = rng.choice(seeds)
        asked = seed.example.messages[0].text
        changed = rng.choice((asked.lower(), f"{asked.rstrip('.?!')}!", f" {asked}", asked))
        messages = (Message.of("user", changed), *seed.example.messages[1:])
        found[place] = Row(replace(seed.example, messages=messages, group=f"copy {place}"), seed.mode)
    return found


def topic_drift(pool: list[Row], count: int, seeds: list[Row], rng: random.Random) -> list[Row]:
    """Half of the rows are of a fifth of the modes; the others are as they were."""
    return _drifted(pool, count, _some_modes(pool, 1 / 5, rng), 1 / 2)


def theme_drift(pool: list[Row], count: int, seeds: list[Row], rng: random.Random) -> list[Row]:
    """Three rows in four are of themes that a fifth of the real rows are of, give or take a twentieth.

    Of the FAQ's rows there are not enough for less: half of the rows in a fifth of its 39 categories is a shift that
    even a test which is told the categories misses (docs/development/log.md).
    """
    theme = {mode: number for number, modes in enumerate(_THEMES) for mode in modes.split()}
    sizes = Counter(theme[one.mode] for one in pool)
    some = [few for size in (1, 2, 3) for few in itertools.combinations(range(len(_THEMES)), size)]
    fitting = [few for few in some if 0.15 <= sum(sizes[number] for number in few) / len(pool) <= 0.25]
    few = rng.choice(fitting)
    return _drifted(pool, count, {mode for mode in theme if theme[mode] in few}, 3 / 4)


def _drifted(pool: list[Row], count: int, grown: set[str], part: float) -> list[Row]:
    """Rows of which `part` are of the grown modes: `count`, or as many as there are grown rows for."""
    few, others = ([one for one in pool if (one.mode in grown) == is_grown] for is_grown in (True, False))
    count = min(count, int(len(few) / part))
    kept = few[: int(count * part)]
    return kept + others[: count - len(kept)]


def _some_modes(pool: list[Row], part: float, rng: random.Random) -> set[str]:
    modes = sorted({one.mode for one in pool})
    return set(rng.sample(modes, max(1, round(part * len(modes)))))


# plant -> for each set how it is planted, and the tests of which one has to find it
_TEXTS = ("commands", "faq_sv", "faq_en")
PLANTS: dict[str, tuple[dict[str, Callable[..., list[Row]]], frozenset[str]]] = {
    "group_shift": ({"loans": group_shift, "loans_text": group_shift}, frozenset({"group_outcome"})),
    "mode_collapse": (
        {"chat": repetition, **dict.fromkeys(_TEXTS, mode_collapse)},
        frozenset({"coverage", "distinct", "vendi", "repeated", "topic", "label"}),
    ),
    "copied_seeds": (dict.fromkeys(("chat", "loans", *_TEXTS), copied_seeds), frozenset({"copies_of_seeds"})),
    "topic_drift": (
        {"commands": topic_drift, "faq_sv": theme_drift, "faq_en": theme_drift},
        frozenset({"topic", "label"}),
    ),
}
