"""What composed bases see and hear: the textile line beside models that only read or only look, spoken commands end to
end beside a cascade, and what keeping a tower's features saves.

    python benchmarks/multimodal.py [--parts textile solar speech cached] [--work DIR] [--json]
    python benchmarks/multimodal.py --small --json    # random towers, a few made-up pictures: shows that it runs

textile: macro-F1 of the action over the held-out pictures, for the model that gets picture and note, for those that
get one of them, for the first with the pictures shuffled, and for a logistic regression on the same tower's features
(told the rest of the protocol; fitted with the changed copies of the pictures and without); differences with
intervals. solar: the same with photographs of solar cells (CC-BY-NC-SA: for benchmarks alone), no note and two
classes. speech: exact match of the JSON for
held-out command templates. cached: seconds of an epoch with the features computed over seconds with them read from
disk, pairs in one process. What stands in --work is not made again. A part that was not asked for, or cannot be run
here, is named under
`absent`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import smallest
import torch
import yaml
from results import print_result
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from spoken_rows import PIPER, VOICES
from spoken_rows import write as write_spoken

import sartor
from sartor.core import assets, parquet_io
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.records import Example
from sartor.evaluate.metrics import MetricSet, ModelOutputs
from sartor.evaluate.scorers import spoken, word_errors
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.media.audio import read_sound
from sartor.models import adapters
from sartor.models.base import machine_facts, open_base
from sartor.models.composed_model import TowerFeatureCache, compose_base, open_towers
from sartor.models.losses import transformers_backend
from sartor.models.tensor_files import TensorCache
from sartor.models.towers import open_tower
from sartor.models.towers.audio_towers import open_speech_to_text
from sartor.models.tuned_model import open_tuned

HERE = Path(__file__).parent
TEXTILE = HERE.parent / "examples/media/textile"
SOLAR = "Say whether the solar cell has a defect. Answer with JSON: defect."
PARTS = ("textile", "solar", "speech", "cached")
MOST_MEDIA = 24
WHISPER, LITE = "whisper-tiny-en", "efficientnet-lite0"
SPOKEN_RECIPE = {
    "base": {"text": "starter", "audio": WHISPER},
    "method": {"kind": "lora", "rank": 32, "alpha": 64},
    "align": {"fraction": 0.05, "learning_rate": 1e-3},
    "budget": {"epochs": 3},
    "optimizer": {"learning_rate": 1e-3, "batch_tokens": 768},
}
HEARD_RECIPE = {
    "base": "starter",
    "method": {"kind": "lora", "rank": 16, "alpha": 32},
    "budget": {"epochs": 2},
    "optimizer": {"learning_rate": 2e-3, "batch_tokens": 256},
}
Reply = Sequence[str]


@dataclass
class Size:
    """How much is measured. tower: of pictures; recipe: what is changed in each recipe."""

    tower: str = LITE
    reply_tokens: int = 96
    pairs: int = 5
    recipe: dict[str, Any] = field(default_factory=dict)


size = Size()
SMALL_ASSETS = (WHISPER, "textile", "solar-cells", "home-intents")
# five pictures of each kind are learnt from: as many as the probe has folds
SMALL_PICTURES, SMALL_COMMANDS, SMALL_RECIPE = 7, 8, {"budget": {"updates": 2}, "evaluations": 0}


def once(made: Path, make: Callable[[Path], object]) -> Path:
    """`made`, made if it is not there."""
    if not made.exists():
        print(f"multimodal: {made.name}", file=sys.stderr)
        make(made)
    return made


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def dataset(folder: Path, name: str, licence: str, steps: Sequence[Any] = ()) -> Path:
    """The Dataset of folder/train.jsonl and folder/eval.jsonl."""
    sources: list[dict[str, Any]] = [
        {"path": str(folder / f"{split}.jsonl"), "licence": licence, "use": ["commercial"], "split": split}
        for split in ("train", "eval")
    ]
    if (folder / "general.jsonl").exists():
        sources.append(
            {**sources[0], "path": str(folder / "general.jsonl"), "licence": "Apache-2.0", "rehearsal": True}
        )
    return once(folder / name, lambda out: sartor.curate({"sources": sources, "steps": list(steps)}, out))


def tuned(folder: Path, recipe: dict[str, Any], data: Path) -> Path:
    """The adapter of a recipe, beside its Dataset."""
    whole = {**recipe, "data": {"path": str(data), "max_length_tokens": 512}, **size.recipe}
    return once(folder / f"{data.name}-adapter", lambda out: sartor.tune(whole, out, resume=True, show=False))


def media_of(example: Example) -> list[Any]:
    return [part for message in example.messages for part in message.content if part.kind != "text"]


def shuffled(examples: Sequence[Example]) -> list[Example]:
    """Each row with the media of the next."""
    made = []
    for example, other in zip(examples, [*examples[1:], *examples[:1]], strict=True):
        media = iter(media_of(other))
        turns = [
            replace(turn, content=tuple(part if part.kind == "text" else next(media) for part in turn.content))
            for turn in example.messages
        ]
        made.append(replace(example, messages=tuple(turns)))
    return made


def held_out(data: Path) -> list[Example]:
    """The rows that a Dataset holds out, in an order that their own content does not decide."""
    found = sorted(parquet_io.read_examples(open_artifact(data, "dataset"), "eval"), key=lambda row: row.group)
    random.Random(0).shuffle(found)
    return found


def answers(adapter: Artifact, examples: Sequence[Example], folder: Path) -> Reply:
    """What an adapter says to each row, greedily."""
    base, model = open_tuned(adapter)
    prompts = [base.chat.prompt_ids(row.prompt, row.tools, folder) for row in examples]
    made = generate(model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(size.reply_tokens))
    return [base.chat.decode(one.ids) for one in made]


def by_label(examples: Sequence[Example], field: str) -> Callable[[Reply, Reply], dict[str, float]]:
    """(one side's replies, another's) -> macro-F1 of both and of their difference."""
    references = [row.reply for row in examples]
    labels = [str(json.loads(reply)[field]) for reply in references]
    measures = MetricSet(references, [row.group for row in examples], field, labels)

    def compared(one: Reply, other: Reply) -> dict[str, float]:
        return asdict(measures.compared(ModelOutputs(one), ModelOutputs(other))["macro_f1"])

    return compared


# ----------------------------------------------------------------------------------------------------------------
# textile


def textile_rows(work: Path, limit: int) -> Path:
    """The rows of examples/media/textile."""
    command = [smallest.python(), TEXTILE / "rows.py"]
    return once(work / "textile", lambda out: subprocess.run([*command, out, "--limit", str(limit)], check=True))


def textile_recipe() -> dict[str, Any]:
    """Its tuning recipe."""
    found: dict[str, Any] = yaml.safe_load((TEXTILE / "tune.yaml").read_text(encoding="utf-8"))
    found["base"]["image"] = size.tower
    return found


def textile_steps() -> list[Any]:
    """Its curation steps: they add changed copies of the pictures that are learnt from."""
    found: list[Any] = yaml.safe_load((TEXTILE / "curate.yaml").read_text(encoding="utf-8"))["steps"]
    return found


def textile(work: Path, limit: int) -> dict[str, Any]:
    """See the module."""
    folder, recipe = textile_rows(work, limit), textile_recipe()
    began = time.monotonic()
    said: dict[str, Reply] = {}
    for side in ("both", "image_only", "text_only"):
        own = once(work / f"textile-{side}", lambda out, side=side: one_side(folder, out, side))
        data = dataset(own, "data", "MIT", textile_steps())
        own_recipe = {**recipe, **({"base": "starter"} if side == "text_only" else {})}
        adapter = open_artifact(tuned(own, own_recipe, data), "adapter")
        examples = held_out(data)
        said[side] = answers(adapter, examples, data)
        if side == "both":
            compared, asked = by_label(examples, "action"), examples
            seconds = time.monotonic() - began
            said["shuffled"] = answers(adapter, shuffled(examples), data)
    said["linear_probe"] = probe(work / "textile-both" / "data", asked)
    said["linear_probe_without_copies"] = probe(work / "textile-both" / "data", asked, is_copied=False)
    found = {name: compared(replies, said["both"]) for name, replies in said.items()}
    return {
        **{name: round(one["base"], 4) for name, one in found.items()},
        "both_over": {
            name: {key: round(one[key], 4) for key in ("difference", "low", "high")} for name, one in found.items()
        },
        "rows": len(asked),
        "data_to_replies_s": round(seconds, 1),
    }


def solar(work: Path, limit: int) -> dict[str, Any]:
    """See the module."""
    folder = once(work / "solar", lambda out: solar_rows(out, limit))
    data = dataset(folder, "data", "CC-BY-NC-SA-4.0", textile_steps())
    adapter = open_artifact(tuned(folder, textile_recipe(), data), "adapter")
    examples = held_out(data)
    said = {"model": answers(adapter, examples, data), "shuffled": answers(adapter, shuffled(examples), data)}
    said["linear_probe"] = [json.dumps({"defect": found}) for found in probed(data, examples)]
    compared = by_label(examples, "defect")
    found = {name: compared(replies, said["model"]) for name, replies in said.items()}
    return {**{name: round(one["base"], 4) for name, one in found.items()}, "rows": len(examples)}


def solar_rows(out: Path, limit: int) -> None:
    """The cells that its experts are sure of, as many with a defect as without, at most `limit` of each."""
    folder = assets.install("solar-cells") / "elpv_dataset/data"
    found = [line.split() for line in (folder / "labels.csv").read_text(encoding="utf-8").splitlines()]
    (out / "images").mkdir(parents=True)
    written: dict[str, list[str]] = {"train": [], "eval": []}
    for said, kind in (("1.0", "yes"), ("0.0", "no")):
        names = [name for name, chance, _ in found if chance == said]
        for place, name in enumerate(random.Random(0).sample(names, min(limit, len(names)))):
            shutil.copyfile(folder / name, out / name)
            turns = [
                {"role": "system", "content": SOLAR},
                {"role": "user", "content": [{"type": "image", "image": name}]},
                {"role": "assistant", "content": json.dumps({"defect": kind})},
            ]
            written["train" if place % 5 else "eval"].append(json.dumps({"messages": turns, "group": name}) + "\n")
    for split, rows_of in written.items():
        (out / f"{split}.jsonl").write_text("".join(rows_of), encoding="utf-8")


def one_side(folder: Path, out: Path, side: str) -> None:
    """The rows with both parts, the picture alone, or the note alone."""
    out.mkdir()
    shutil.copytree(folder / "images", out / "images", copy_function=os.link)
    kept = {"both": ("image", "text"), "image_only": ("image",), "text_only": ("text",)}[side]
    shutil.copyfile(folder / "general.jsonl", out / "general.jsonl")
    for split in ("train", "eval"):
        written = lines(folder / f"{split}.jsonl")
        for row in written:
            row["messages"][1]["content"] = [part for part in row["messages"][1]["content"] if part["type"] in kept]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")


def probed(data: Path, asked: Sequence[Example], *, is_copied: bool = True) -> Sequence[str]:
    """Logistic regression on the mean features of each picture -> the defect. is_copied: also of the changed
    copies.
    """
    tower = open_tower(size.tower, "image")
    found = [row for row in parquet_io.read_examples(open_artifact(data, "dataset"), "train") if media_of(row)]
    train = [row for row in found if is_copied or "augment_images" not in row.steps]

    def pooled(examples: Sequence[Example]) -> Any:
        pictures = [(data / media_of(row)[0].media).read_bytes() for row in examples]
        return np.stack([tower.features(picture).float().mean(0).numpy() for picture in pictures])

    model = make_pipeline(
        StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 0, 5), max_iter=2000, random_state=0)
    )
    model.fit(pooled(train), [json.loads(row.reply)["defect"] for row in train])
    return [str(defect) for defect in model.predict(pooled(asked))]


def probe(data: Path, asked: Sequence[Example], *, is_copied: bool = True) -> Reply:
    """What follows from the probe's defect and a note that is read without a fault."""
    spec = importlib.util.spec_from_file_location("textile_rows", TEXTILE / "rows.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table, replies = module.protocols(), []
    for row, defect in zip(asked, probed(data, asked, is_copied=is_copied), strict=True):
        note = row.prompt[-1].text.lower()
        zone, seen = (
            next(name for name, phrases in words.items() if any(phrase.lower() in note for phrase in phrases))
            for words in (module.ZONES, module.SEEN)
        )
        severity, action = table[defect, zone, seen]
        replies.append(json.dumps({"defect": defect, "severity": severity, "action": action}))
    return replies


# -----------------------------------------------------------------------------------------------------------------
# speech


def spoken_rows(work: Path, commands: int, voices: int) -> Path:
    """The rows of spoken_rows.py; with one voice it is espeak-ng's alone."""
    return once(work / "spoken", lambda out: write_spoken(out, commands, voices, PIPER if voices > 1 else VOICES[0]))


def speech(work: Path, commands: int, voices: int) -> dict[str, Any]:
    """See the module."""
    folder = spoken_rows(work, commands, voices)
    data = dataset(folder, "data", "Apache-2.0")
    adapter = open_artifact(tuned(folder, SPOKEN_RECIPE, data), "adapter")
    examples = held_out(data)
    groups, references = [row.group for row in examples], [row.reply for row in examples]
    end_to_end = answers(adapter, examples, data)
    blind = answers(adapter, shuffled(examples), data)
    heard, wer = cascade(folder, examples, data)
    over = paired(blind, end_to_end, references, groups)
    return {
        "exact_match": {"end_to_end": exact(end_to_end, references), "cascade": exact(heard, references)},
        "shuffled": exact(blind, references),
        "end_to_end_over_shuffled": over,
        "wer": wer,
        "rows": len(examples),
        "tuning_minutes": round(adapter.manifest["run"]["wall_s"] / 60, 1),
    }


def exact(replies: Reply, references: Reply) -> float:
    return round(statistics.mean(said.strip() == wanted for said, wanted in zip(replies, references, strict=True)), 4)


def paired(one: Reply, other: Reply, references: Reply, groups: Sequence[str]) -> dict[str, float]:
    """The difference in exact match, with its interval."""
    found = MetricSet(references, groups).compared(ModelOutputs(one), ModelOutputs(other))["exact_match"]
    return {"estimate": round(found.difference, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def cascade(folder: Path, examples: Sequence[Example], data: Path) -> tuple[Reply, float]:
    """Whisper writes down what is said; a text model tuned on commands and on such transcripts answers. And the
    WER.
    """
    listener = open_speech_to_text(WHISPER)

    def transcripts(clips: Sequence[Path]) -> list[str]:
        return [spoken(text) for text in listener.transcribe([read_sound(clip, listener.rate) for clip in clips])]

    def write(out: Path) -> None:
        found = lines(folder / "train.jsonl")
        texts = [row for row in found if isinstance(row["messages"][1]["content"], str)]
        # one recording of each command, as it is heard
        first = {
            row["group"]: row
            for row in found
            if not isinstance(row["messages"][1]["content"], str) and row["messages"][2]["content"].startswith("{")
        }
        heard = transcripts([folder / row["messages"][1]["content"][0]["audio"] for row in first.values()])
        for row, text in zip(first.values(), heard, strict=True):
            row["messages"][1]["content"] = text
        out.mkdir()
        for row in texts:
            row["messages"][1]["content"] = spoken(row["messages"][1]["content"])
        (out / "train.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*texts, *first.values()]), encoding="utf-8"
        )
        (out / "eval.jsonl").write_text((folder / "words.jsonl").read_text(encoding="utf-8"), encoding="utf-8")

    own = once(folder.with_name("heard"), write)
    adapter = open_artifact(tuned(own, HEARD_RECIPE, dataset(own, "data", "Apache-2.0")), "adapter")
    heard = transcripts([data / media_of(row)[0].media for row in examples])
    asked = [
        replace(row, messages=(row.messages[0], type(row.messages[1]).of("user", text), row.messages[2]))
        for row, text in zip(examples, heard, strict=True)
    ]
    words = {
        row["messages"][2]["content"] + row["group"]: row["messages"][1]["content"]
        for row in lines(folder / "words.jsonl")
    }
    errors = [word_errors(text, words[row.reply + row.group]) for row, text in zip(examples, heard, strict=True)]
    wer = sum(wrong for wrong, _ in errors) / sum(count for _, count in errors)
    return answers(adapter, asked, data), round(wer, 4)


# -----------------------------------------------------------------------------------------------------------------
# cached


def cached(work: Path) -> dict[str, Any]:
    """See the module."""
    textile = once(work / "textile-both", lambda out: one_side(textile_rows(work, MOST_MEDIA), out, "both"))
    return {
        "image": epochs("image", size.tower, dataset(textile, "data", "MIT")),
        "audio": epochs("audio", WHISPER, dataset(spoken_rows(work, MOST_MEDIA, 1), "data", "Apache-2.0")),
    }


def epochs(kind: str, tower: str, data: Path) -> dict[str, Any]:
    """Losses and gradients of rows with media, as in tuning, with features that the tower computes and that are
    read.
    """
    found = [row for row in parquet_io.read_examples(open_artifact(data, "dataset"), "train") if media_of(row)][
        :MOST_MEDIA
    ]
    base = open_base("starter")
    base = compose_base(base, open_towers({kind: tower}, base.device, lambda line: None), shelf=None)
    encoded, media = [base.chat.encode(row, data) for row in found], base.media
    model = adapters.inject_lora(base.model, rank=16, alpha=32, dropout=0.0, targets="all-linear", seed=0)
    adapters.train_projectors(model)
    path = transformers_backend.choose_loss_backend(model, encoded, base.device)
    with tempfile.TemporaryDirectory() as folder:
        ways = {"computed": None, "read": TensorCache(Path(folder), 1 << 32)}
        features = {
            name: TowerFeatureCache(media.features.towers, shelf, held_bytes=0) for name, shelf in ways.items()
        }
        for each in features.values():
            keys = [each.key(media_of(row)[0], data) for row in found]

        def seconds(name: str) -> float:
            media.features = features[name]
            began = time.perf_counter()
            for start in range(0, len(encoded), 8):
                path.losses(encoded[start : start + 8])[0].mean().backward()
            return time.perf_counter() - began

        seconds("read")
        pairs = [(seconds("computed"), seconds("read")) for _ in range(size.pairs)]
        return {
            "ratio": round(statistics.median(slow / quick for slow, quick in pairs), 2),
            "equal": all(torch.equal(features["computed"].of(key), features["read"].of(key)) for key in keys),
            "ms_a_row": {
                "computed": round(1e3 * statistics.median(slow for slow, _ in pairs) / len(found), 1),
                "read": round(1e3 * statistics.median(quick for _, quick in pairs) / len(found), 1),
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    smallest.add_argument(parser, has_work=True)
    parser.add_argument("--work", type=Path, default=Path("multimodal-work"))
    parser.add_argument("--limit", type=int, default=500, help="textile pictures of each kind")
    parser.add_argument("--commands", type=int, default=1300)
    parser.add_argument("--voices", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args()
    if options.small:
        options.limit, options.commands, options.voices = SMALL_PICTURES, SMALL_COMMANDS, 1
    with smallest.home(options.small, *SMALL_ASSETS), tempfile.TemporaryDirectory() as folder:
        if options.small:
            size.tower = str(smallest.write_image_tower(Path(folder) / "clip"))
            size.reply_tokens, size.pairs, size.recipe = 8, 1, SMALL_RECIPE
        found = measure(options, Path(folder) if options.small else options.work)
    print_result(found, indent=None if options.json else 1)


def absent(parts: Sequence[str]) -> dict[str, str]:
    """Why a part is not measured."""
    found = {part: f"not asked for: --parts {part}" for part in PARTS if part not in parts}
    if shutil.which("espeak-ng") is None:
        found |= dict.fromkeys(("speech", "cached"), "the commands are spoken by espeak-ng: apt-get install espeak-ng")
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every part that was asked for, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    work, missing = folder.resolve(), absent(options.parts)
    options.parts = [part for part in options.parts if part not in missing]
    found: dict[str, Any] = {"machine": {**machine_facts(), "cores": os.cpu_count()}, "absent": missing}
    if "textile" in options.parts:
        found["textile"] = textile(work, options.limit)
    if "solar" in options.parts:
        found["solar"] = solar(work, options.limit)
    if "speech" in options.parts:
        found["speech"] = speech(work, options.commands, options.voices)
    if "cached" in options.parts:
        found["cached"] = cached(work)
        found["cached_ratio"] = {kind: one["ratio"] for kind, one in found["cached"].items()}
    return found


if __name__ == "__main__":
    main()
