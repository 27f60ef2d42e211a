"""How near the default rate, batch and budget come to the best of a grid, on sets that the rules were not chosen on.

    python benchmarks/defaults.py --data ../shared/data --work DIR [--sets snips textile] [--minutes 60] [--json]
    python benchmarks/defaults.py --defaults-only --json    # the defaults alone: a run a set; the others go on from it
    python benchmarks/defaults.py --small --json            # made-up rows, a tiny base: shows that everything runs

Each set is tuned at 12 points (rate {1, 2, 5, 10}e-4 x batch {256, 1,024, 4,096}) with one seed, and as the defaults
would have it; every run of a set has the epochs and the rehearsal of the defaults, so that rate and batch alone
differ. The best point and the defaults are then tuned with three other seeds: the best was chosen on none of them. A
point at which the defaults are is not tuned a second time.

All runs make one evaluation, at the end, so that the last weights are kept: what is compared is rate, batch, budget
and rehearsal. Of the documents alone, few of which are soon learnt by heart, each run keeps the best of four
evaluations, as the defaults do, by the loss of other pages than those that are scored. The measure is the exact match
of greedy replies on up to 200 held-out rows; of construction-faq and the documents, whose texts are long, the loss of
those rows. A finished run stands in --work, by the code and the options but --sets and --defaults-only. A call that
runs out of --minutes ends with exit code 75 and names its `unfinished` sets; the next one goes on. banking77 and
construction-faq are those that the rules were chosen on (docs/decisions/028-defaults.md).

sets {name: {default, best, fraction, seeds}}   means over the seeds; fraction: default over best, of losses best over
                                                default; not measured where both are 0 (`absent` names the sets);
                                                seeds: {default: [...], best: [...]}
                also `measure`, `settings` (what `auto` came to), `grid` (the value of each point), `rows`
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import parts
import smallest
from results import print_result

import sartor
from sartor.core import assets, parquet_io
from sartor.core.artifacts import open_artifact
from sartor.core.records import Example
from sartor.demo.home_intents import rows as home_rows
from sartor.evaluate.audit.forgetting_probes import measure_probes
from sartor.evaluate.paired_measurement import measure_models
from sartor.evaluate.predictions import HeldOut, ModelOutputs
from sartor.models.base import machine_facts
from sartor.models.tuned_model import open_tuned

ROOT = Path(__file__).resolve().parent.parent
RATES, BATCHES = (1e-4, 2e-4, 5e-4, 1e-3), (256, 1024, 4096)
GRID = tuple((rate, batch) for rate in RATES for batch in BATCHES)
FEW_POINTS = ((2e-4, 256), (2e-4, 4096), (1e-3, 256), (1e-3, 4096))
SEEDS = (1, 2, 3)
HELD_OUT = 200
PICTURE_TOKENS = 12
DOCUMENT_CHARACTERS = 800
SMALL_ASSETS = ("home-intents", "construction-faq", "textile")
SMALL_SETS = ("banking77", "textile", "documents")
LARGE = "banking77_5000"
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a call measures. data: folder of the public sets. tower: of pictures. has_probes: forgetting too."""

    data: Path
    work: Path
    rows: int = 1000
    held_out: int = HELD_OUT
    seeds: tuple[int, ...] = SEEDS
    points: tuple[tuple[float, int], ...] = GRID
    few_points: tuple[tuple[float, int], ...] = FEW_POINTS
    large_rows: int = 5000
    tower: str = "efficientnet-lite0"
    recipe: dict[str, Any] = field(default_factory=dict)
    deadline: float = float("inf")
    has_defaults_only: bool = False
    has_probes: bool = False


@dataclass(frozen=True)
class TrainingSet:
    """(training rows, held-out rows), how many tokens a reply has at most (0: the loss is the measure), and the
    grid. is_document: rows without a question.
    """

    read: Callable[[Options], tuple[list[Row], list[Row]]]
    licence: str
    reply_tokens: int = 0
    is_picture: bool = False
    is_large: bool = False
    is_document: bool = False


class OutOfTimeError(Exception):
    """The minutes of this call are over; what is finished stands in --work."""


def chat_row(prompt: Any, reply: str, group: str = "") -> Row:
    """A row of one question and its reply."""
    row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}
    return row | ({"group": group} if group else {})


def drawn(rows: list[Row], count: int) -> list[Row]:
    """Up to `count` rows, the same in every call."""
    return random.Random(0).sample(rows, min(count, len(rows)))


def banking77(options: Options) -> tuple[list[Row], list[Row]]:
    return _banking(options, options.rows)


def banking77_large(options: Options) -> tuple[list[Row], list[Row]]:
    return _banking(options, options.large_rows)


def _banking(options: Options, count: int) -> tuple[list[Row], list[Row]]:
    sides = []
    for split, size in (("train", count), ("test", options.held_out)):
        with (options.data / "banking77" / f"{split}.csv").open(encoding="utf-8", newline="") as stream:
            sides.append(drawn([chat_row(line["text"], line["category"]) for line in csv.DictReader(stream)], size))
    return sides[0], sides[1]


def _json_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def snips(options: Options) -> tuple[list[Row], list[Row]]:
    train, test = (_json_lines(options.data / "snips" / f"{split}.jsonl") for split in ("train", "test"))
    sides = ([chat_row(row["text"], row["intent"]) for row in side] for side in (train, test))
    return drawn(next(sides), options.rows), drawn(next(sides), options.held_out)


def restaurant8k(options: Options) -> tuple[list[Row], list[Row]]:
    """The reply is a JSON object of the slots, in the order of their names."""
    sides = []
    for split, count in (("train", options.rows), ("test", options.held_out)):
        rows = _json_lines(options.data / "restaurant8k" / f"{split}.jsonl")
        sides.append(drawn([chat_row(row["text"], json.dumps(_slots(row["slots"]))) for row in rows], count))
    return sides[0], sides[1]


def _slots(slots: Any) -> dict[str, str]:
    return dict(sorted(slots.items() if isinstance(slots, dict) else slots))


def construction_faq(options: Options) -> tuple[list[Row], list[Row]]:
    file = next(Path(assets.install("construction-faq")).rglob("faq-en.jsonl"))
    return _cut([chat_row(row["q"], row["a"]) for row in _json_lines(file)], options)


def home_intents(options: Options) -> tuple[list[Row], list[Row]]:
    return _cut(home_rows(assets.install("home-intents")), options)


def documents(options: Options) -> tuple[list[Row], list[Row]]:
    """Sartor's own pages, in pieces of some paragraphs; whole pages are held out."""
    rows = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        piece = ""
        for paragraph in page.read_text(encoding="utf-8").split("\n\n"):
            piece = f"{piece}\n\n{paragraph}".strip()
            if len(piece) >= DOCUMENT_CHARACTERS:
                rows.append({"text": piece[: 3 * DOCUMENT_CHARACTERS], "group": page.name})
                piece = ""
    return _cut(rows, options, options.rows // 3)


def textile(options: Options) -> tuple[list[Row], list[Row]]:
    """Pictures of cloth: which kind of defect."""
    images = assets.install("textile") / "conformal_clip_data" / "data" / "textile_images" / "simulated"
    prompt = "Which defect has this cloth: none, local or global?"
    kinds = {"nominal": "none", "local": "local", "global": "global"}
    rows = []
    for folder, kind in kinds.items():
        for file in sorted((images / folder).glob("*.jpg")):
            content = [{"type": "image", "image": str(file)}, {"type": "text", "text": prompt}]
            rows.append(chat_row(content, kind, f"{folder}-{file.name}"))
    return _cut(rows, options, min(options.rows, 300))


def _cut(rows: list[Row], options: Options, count: int = 0) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows of a set that has no split of its own; no group is on both sides."""
    groups = sorted({_group(row) for row in rows})
    random.Random(0).shuffle(groups)
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(_group(row), []).append(row)
    held_out: list[Row] = []
    limit = min(options.held_out, len(rows) // 4)
    while groups and len(held_out) < limit:
        held_out += by_group[groups.pop()]
    return drawn([row for group in groups for row in by_group[group]], count or options.rows), held_out[
        : options.held_out
    ]


def _group(row: Row) -> str:
    return str(row.get("group") or row["messages"][-2]["content"])


SETS = {
    "banking77": TrainingSet(banking77, "CC-BY-4.0", 24),
    "construction-faq": TrainingSet(construction_faq, "CC-BY-4.0"),
    "snips": TrainingSet(snips, "CC0-1.0", 16),
    "restaurant8k": TrainingSet(restaurant8k, "CC-BY-4.0", 64),
    "home-intents": TrainingSet(home_intents, "Apache-2.0", 64),
    "textile": TrainingSet(textile, "MIT", PICTURE_TOKENS, is_picture=True),
    "documents": TrainingSet(documents, "Apache-2.0", is_document=True),
    LARGE: TrainingSet(banking77_large, "CC-BY-4.0", 24, is_large=True),
}


def measure(name: str, options: Options) -> dict[str, Any]:
    """The figures of one set. Raises OutOfTimeError where this call's minutes end before it is finished."""
    training_set, folder = SETS[name], options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(training_set, folder, options)
    default = runs.value("default", {}, 0)
    settings = json.loads((folder / "default-0.json").read_text(encoding="utf-8"))["settings"]
    measure_name = "exact_match" if training_set.reply_tokens else "loss"
    if options.has_defaults_only:
        return {"default": default, "measure": measure_name, "settings": settings, "rows": runs.counts()}
    # every point has the defaults' passes over the rows and their rehearsal
    shared = {"budget": settings["budget"]["value"], "rehearsal": settings["data.rehearsal"]["value"]}
    points = options.few_points if training_set.is_large else options.points
    chosen = (settings["optimizer.learning_rate"]["value"], settings["optimizer.batch_tokens"]["value"])
    grid = {}
    for rate, batch in points:
        point = f"{rate:g}-{batch}"
        if (rate, batch) == chosen:  # the very run of the defaults
            grid[point] = default
        else:
            grid[point] = runs.value(point, {**shared, "learning_rate": rate, "batch_tokens": batch}, 0)
    is_loss = not training_set.reply_tokens
    best = min(grid, key=grid.__getitem__) if is_loss else max(grid, key=grid.__getitem__)
    rate, batch = next(point for point in points if f"{point[0]:g}-{point[1]}" == best)
    seeds: dict[str, list[float]] = {"default": [], "best": []}
    for seed in options.seeds:
        seeds["default"].append(runs.value("default", {}, seed))
        if (rate, batch) == chosen:
            seeds["best"].append(seeds["default"][-1])
        else:
            seeds["best"].append(runs.value(best, {**shared, "learning_rate": rate, "batch_tokens": batch}, seed))
    means = {side: fmean(values) for side, values in seeds.items()}
    over, under = (means["best"], means["default"]) if is_loss else (means["default"], means["best"])
    # 0 over 0 says nothing of the defaults: such a set has no fraction
    fraction = {"fraction": over / under if under else 1.0} if over or under else {}
    return {
        **means,
        **fraction,
        "seeds": seeds,
        "measure": measure_name,
        "best_point": best,
        "settings": settings,
        "grid": {"default": default, **grid},
        "rows": runs.counts(),
    }


class Runs:
    """Runs of one set. A finished one stands in `folder` as NAME-SEED.json."""

    def __init__(self, training_set: TrainingSet, folder: Path, options: Options) -> None:
        self.training_set, self.folder, self.options = training_set, folder, options
        self.longest_s = 0.0

    def counts(self) -> dict[str, int]:
        """Rows that are tuned on and that are scored."""
        splits = dict(open_artifact(self._dataset(), "dataset").manifest["counts"]["splits"])
        return {**splits, "eval": len(self._scored())}

    def value(self, name: str, settings: dict[str, Any], seed: int) -> float:
        """The measure of one run."""
        return float(self.result(name, settings, seed)["value"])

    def result(self, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """The facts of one run. settings: learning_rate, batch_tokens, budget, rehearsal; others: the defaults."""
        file = self.folder / f"{name}-{seed}.json"
        if not file.is_file():
            # a run that would not end in time is not begun
            if time.monotonic() + self.longest_s > self.options.deadline:
                raise OutOfTimeError
            started = time.monotonic()
            result = self._run(settings, seed)
            seconds = time.monotonic() - started
            self.longest_s = max(self.longest_s, seconds)
            file.write_text(json.dumps({**result, "wall_s": round(seconds, 1)}), encoding="utf-8")
            print(
                f"defaults: {self.folder.name} {name} seed {seed}: {result['value']:.4g} in {seconds:.0f} s",
                file=sys.stderr,
            )
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def _dataset(self) -> Path:
        """The Dataset that is tuned on. Its held-out rows are those that are scored, but of documents other pages."""
        train, chosen_by, _ = self._rows()
        return self._curated("dataset", {"train": train, "eval": chosen_by})

    def _scored(self) -> list[Example]:
        dataset = self._dataset()
        if self.training_set.is_document:
            dataset = self._curated("scored", {"eval": self._rows()[2]})
        examples = parquet_io.read_examples(open_artifact(dataset, "dataset"), "eval")
        return list(examples)[: self.options.held_out]

    def _rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Rows that are tuned on, by which a run's weights are chosen, and that are scored."""
        if not self.training_set.is_document:
            train, held_out = self.training_set.read(self.options)
            return train, held_out, held_out
        count = self.options.held_out
        train, held_out = self.training_set.read(replace(self.options, held_out=count + count // 3 + 1))
        scored: list[Row] = []
        chosen_by: list[Row] = []
        for row in held_out:
            is_same_page = bool(scored) and not chosen_by and _group(row) == _group(scored[-1])
            (scored if len(scored) < count or is_same_page else chosen_by).append(row)
        return train, chosen_by, scored

    def _curated(self, name: str, splits: dict[str, list[Row]]) -> Path:
        out = self.folder / name
        if not out.exists():
            sources = []
            for split, rows in splits.items():
                if self.training_set.is_picture:
                    copy_pictures(rows, self.folder)
                file = self.folder / f"{name}-{split}.jsonl"
                file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
                sources.append({"path": str(file), "licence": self.training_set.licence, "split": split})
            sartor.curate({"sources": sources}, out)
        return out

    def _run(self, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """Tune and measure once."""
        recipe: dict[str, Any] = {
            "base": {"text": "starter", "image": self.options.tower} if self.training_set.is_picture else "starter",
            # a piece of a document is one row, also in the tokens of a small vocabulary
            "data": {
                "path": str(self._dataset()),
                "eval_rows": 64 if self.training_set.is_document else 8,
                "max_length_tokens": 4 * DOCUMENT_CHARACTERS,
            },
            "evaluations": 1,
            "seed": seed,
        }
        if self.training_set.is_document:
            recipe |= {"evaluations": 4, "weights": "best"}
        if "rehearsal" in settings:
            recipe["data"]["rehearsal"] = settings["rehearsal"]
        if "learning_rate" in settings:
            recipe["optimizer"] = {key: settings[key] for key in ("learning_rate", "batch_tokens")}
            recipe["budget"] = settings["budget"]
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            tuned = sartor.tune({**recipe, **self.options.recipe}, Path(temporary) / "adapter", show=False)
            manifest = tuned.adapter.manifest
            if not self.training_set.reply_tokens:
                value = self._loss(Path(temporary) / "adapter")
            else:
                value = self._exact_match(Path(temporary) / "adapter")
            probes = measure_probes(*open_tuned(tuned.adapter)) if self.options.has_probes else {}
        budget = {name: limit for name, limit in manifest["recipe"]["budget"].items() if limit is not None}
        named = {name: value for name, value in manifest["recipe"]["data"]["rehearsal"].items() if value is not None}
        rehearsal = {"value": named, "reason": "as the recipe has it"}
        chosen = {"budget": {"value": budget}, "data.rehearsal": rehearsal, **manifest["settings"]}
        run = manifest["run"]
        facts = {"value": value, "settings": chosen, "updates": run["updates"], "tune_s": run["wall_s"]}
        return facts | ({"forgetting": probes} if probes else {})

    def _exact_match(self, adapter: Path) -> float:
        """Fraction of the scored rows to which the greedy reply is the reference."""
        examples = self._scored()

        def is_wrong(index: int, reply: str) -> bool:
            """Whether the reply so far cannot become the reference."""
            return not examples[index].reply.strip().startswith(reply.strip())

        outputs = self._outputs(adapter, examples, is_wrong)
        return fmean(
            reply.strip() == example.reply.strip() for reply, example in zip(outputs.replies, examples, strict=True)
        )

    def _loss(self, adapter: Path) -> float:
        """Loss of the scored rows in nats a supervised token."""
        outputs = self._outputs(adapter, self._scored(), lambda index, reply: True)
        return sum(loss * count for loss, count in zip(outputs.loss, outputs.tokens, strict=True)) / sum(
            outputs.tokens
        )

    def _outputs(self, adapter: Path, examples: list[Example], is_decided: Callable[[int, str], bool]) -> ModelOutputs:
        base, model = open_tuned(open_artifact(adapter, "adapter"))
        held_out = HeldOut(examples, self._dataset())
        return measure_models(base, model, held_out, "", sides=(True,), is_decided=is_decided)[0]


def copy_pictures(rows: list[Row], folder: Path) -> None:
    """Copy the pictures of rows into `folder`, and name them by their new paths: a source's media lie below it."""
    for row in rows:
        picture = row["messages"][0]["content"][0]
        file = Path(picture["image"])
        picture["image"] = f"{file.parent.name}-{file.name}"
        shutil.copyfile(file, folder / picture["image"])


def write_small_data(folder: Path) -> Path:
    """Made-up files in the layout of the public sets."""
    for name in ("banking77", "snips", "restaurant8k"):
        (folder / name).mkdir(parents=True)
    for split, count in (("train", 12), ("test", 4)):
        texts = [f"{split} question number {index} of a caller" for index in range(count)]
        lines = [f"{text},answer_{index % 2}" for index, text in enumerate(texts)]
        (folder / "banking77" / f"{split}.csv").write_text("\n".join(["text,category", *lines]), encoding="utf-8")
        rows = [
            {"text": text, "intent": f"intent_{index % 2}", "slots": [["n", str(index)]]}
            for index, text in enumerate(texts)
        ]
        for name in ("snips", "restaurant8k"):
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def small_options(folder: Path) -> Options:
    """One point, one seed, one update a run."""
    return Options(
        data=write_small_data(folder / "data"),
        work=folder / "work",
        rows=12,
        held_out=4,
        seeds=(1,),
        points=GRID[-1:],
        few_points=FEW_POINTS[-1:],
        large_rows=12,
        tower=str(smallest.write_image_tower(folder / "clip")),
        recipe={"budget": {"updates": 1}},
    )


def measured(names: list[str], options: Options) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(name, figures or what is missing for lack of time) of each set."""
    for name in names:
        try:
            yield name, measure(name, options)
        except OutOfTimeError:
            finished = len(list((options.work / name).glob("*-*.json")))
            yield name, f"{finished} runs are finished; the minutes are over: call again with the same --work"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of banking77, snips, ..."
    )
    parser.add_argument(
        "--sets", nargs="+", choices=list(SETS), help="by default all; at the smallest size one of each kind"
    )
    parser.add_argument("--rows", type=int, default=1000, help="most training rows of a set, but for the one of 5,000")
    parser.add_argument("--defaults-only", action="store_true", help="one run a set, by the defaults, with seed 0")
    parser.add_argument(
        "--work", type=Path, default=Path("defaults-work"), help="finished runs; a second call goes on"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser, has_work=True, selections=("sets", "defaults_only"))
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    names = arguments.sets or list(SMALL_SETS if arguments.small else SETS)
    with smallest.home(arguments.small, *SMALL_ASSETS), tempfile.TemporaryDirectory() as folder:
        if arguments.small:
            options = small_options(Path(folder))
        else:
            options = Options(
                arguments.data,
                parts.work_folder(arguments.work),
                arguments.rows,
                deadline=deadline,
                has_defaults_only=arguments.defaults_only,
            )
        results = dict(measured(names, options))
    absent = {f"sets.{name}": f"not asked for: --sets {name}" for name in SETS if name not in names}
    late = {f"sets.{name}": result for name, result in results.items() if isinstance(result, str)}
    sets = {name: result for name, result in results.items() if isinstance(result, dict)}
    if of_nothing := [name for name, figures in sets.items() if "best" in figures and "fraction" not in figures]:
        absent["fraction"] = f"both values are 0: {', '.join(of_nothing)}"
    result = {"sets": sets, "absent": absent | late, "unfinished": list(late), "machine": machine_facts()}
    print_result(result, indent=None if arguments.json else 1)


if __name__ == "__main__":
    main()
