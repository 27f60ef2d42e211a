"""What distillation is worth: a student of a tenth of the prompts beside its teacher and beside sft, and mending.

    python benchmarks/distil.py --json [--data ../shared/data] [--work distil-work] [--sets snips] [--minutes 60]
    python benchmarks/distil.py --mending-only --json    # without the students; --students-only: without mending
    python benchmarks/distil.py --small --json    # made-up rows, a tiny base: shows that everything runs

The teacher is an adapter that sft made of all training rows of a set (banking77: the rows of its first ten intents).
On a tenth of those rows four students are tuned from the untouched base with the same updates, rate and batch: by sft
of the rows' replies, by distil of the same replies, by distil with half of the replies sampled, and by distil of the
rows' replies with a loss_temperature of 4, which was chosen by training rows that neither the teacher nor a student
had. All are asked the held-out rows greedily; the measure is exact match. Figures are means over the seeds.

Mending: the teacher of the first set, tuned without rehearsal, is distilled from its untouched base on small talk, of
which a quarter is kept apart to measure forgetting: nats a token over the base. `mended` sees small talk alone until
the forgetting is gone; `beside_rows` learns the set's own rows by sft in half of the tokens. Beside them stands an
adapter that was tuned on the set with the same small talk as rehearsal.

sets {name: {teacher, sft, distil, on_policy, softened}}    exact match
     fraction {distil, on_policy, softened}                 of the teacher's
     over_sft {distil, on_policy, softened: {estimate, low, high}}    paired by prompt
mending {before, mended, beside_rows, rehearsal: {exact_match, forgetting, low, high}}
        kept {mended, beside_rows}: the fraction of the match `before`; updates: of their runs
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import defaults
import parts
import smallest
from results import print_result

import sartor
from sartor.core.records import Example, Message
from sartor.evaluate import bootstrap
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models import adapters
from sartor.models.base import machine_facts, open_base
from sartor.models.losses.loss_backend import WISH

ROOT = Path(__file__).resolve().parent.parent
TALK = ROOT / "src" / "sartor" / "small_talk.jsonl"
BASE = "starter"
INTENTS = 10
OWN_ROWS = 0.5  # of the tokens of a mending that learns the set's rows beside the small talk
STUDENTS: dict[str, dict[str, Any]] = {
    "distil": {},
    "on_policy": {"on_policy": 0.5, "max_reply_tokens": 24},
    "softened": {"loss_temperature": 4.0},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of a call. rows: of the teacher. fraction: of them that a student has. updates: of every run."""

    data: Path
    rows: int = 500
    held_out: int = 200
    fraction: float = 0.1
    talk: int = 200
    updates: int = 120
    seeds: tuple[int, ...] = (0, 1)
    rate: float = 5e-4
    batch_tokens: int = 512


def banking77(size: Size) -> tuple[list[Row], list[Row]]:
    """Rows of the first intents alone."""
    train, test = defaults.banking77(defaults.Options(size.data, Path(), rows=1 << 20, held_out=1 << 20))
    intents = sorted({reply_of(row) for row in train})[:INTENTS]
    sides = [[row for row in side if reply_of(row) in intents] for side in (train, test)]
    return defaults.drawn(sides[0], size.rows), defaults.drawn(sides[1], size.held_out)


def snips(size: Size) -> tuple[list[Row], list[Row]]:
    return defaults.snips(defaults.Options(size.data, Path(), rows=size.rows, held_out=size.held_out))


SETS = {"banking77": banking77, "snips": snips}


def reply_of(row: Row) -> str:
    return str(row["messages"][-1]["content"])


def example(row: Row) -> Example:
    return Example(tuple(Message.of(turn["role"], turn["content"]) for turn in row["messages"]), ())


def curated(folder: Path, name: str, rows: Sequence[Row]) -> str:
    """The directory of a Dataset of rows, none of them held out."""
    out = folder / name
    if not out.is_dir():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        source = {"path": str(folder / f"{name}.jsonl"), "licence": "CC0-1.0"}
        sartor.curate({"sources": [source], "steps": [], "split": {"eval_fraction": 0.0}}, out)
    return str(out)


def tuned(out: Path, size: Size, seed: int, data: Any, **parts_of_recipe: Any) -> dict[str, Any]:
    """Tune unless an earlier call has, and return the run's facts."""
    recipe: dict[str, Any] = {
        "base": BASE,
        "data": {"path": data, "eval_fraction": 0.0, "rehearsal": "none"} if isinstance(data, str) else data,
        "optimizer": {"learning_rate": size.rate, "batch_tokens": size.batch_tokens},
        "budget": {"updates": size.updates},
        "evaluations": 0,
        "weights": "last",
        "seed": seed,
        **parts_of_recipe,
    }
    return dict(sartor.tune(recipe, out, show=False, resume=True).as_json())


def matches(adapter: Path, rows: Sequence[Row]) -> list[float]:
    """1.0 for each row whose greedy reply is its own."""
    base = open_base(BASE)
    model = adapters.open_adapter(base.model, adapter)
    prompts = [base.chat.prompt_ids(example(row).prompt) for row in rows]
    longest = max(len(base.chat.tokenizer(reply_of(row))["input_ids"]) for row in rows) + 2
    replies = generate(model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(longest))
    return [
        float(base.chat.decode(reply.ids).strip() == reply_of(row).strip())
        for reply, row in zip(replies, rows, strict=True)
    ]


def nats(adapter: Path | None, rows: Sequence[Row]) -> list[float]:
    """Mean loss of each row's reply, nats a token."""
    base = open_base(BASE)
    model = adapters.open_adapter(base.model, adapter) if adapter else base.model
    encoded = [base.chat.encode(example(row)) for row in rows]
    backend, losses = base.path(model, encoded, WISH), list[float]()
    for row in encoded:
        losses.append(float(backend.losses([row])[0].mean()))
    return losses


def compared(first: Sequence[float], second: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """The interval of second minus first."""
    found = bootstrap.paired_bootstrap(first, second, groups)
    return {"estimate": found.difference, "low": found.low, "high": found.high}


def measure_set(name: str, size: Size, folder: Path) -> dict[str, Any]:
    """The teacher and its students on one set."""
    train, test = SETS[name](size)
    few = random.Random(0).sample(train, max(int(len(train) * size.fraction), 2))
    data = {"all": curated(folder, f"{name}-all", train), "few": curated(folder, f"{name}-few", few)}
    scores: dict[str, list[float]] = {side: [] for side in ("teacher", "sft", *STUDENTS)}
    for seed in size.seeds:
        teacher = folder / f"{name}-teacher-{seed}"

        def run(side: str, source: str, objective: dict[str, Any], out: Path, seed: int = seed) -> list[float]:
            def compute() -> list[float]:
                tuned(out, size, seed, data[source], objective=objective)
                return matches(out, test)

            return list(parts.run(f"{name} {side}, seed {seed}", compute))

        scores["teacher"] += run("teacher", "all", {"kind": "sft"}, teacher)
        scores["sft"] += run("sft", "few", {"kind": "sft"}, folder / f"{name}-sft-{seed}")
        for side, options in STUDENTS.items():
            objective = {"kind": "distil", "teacher": str(teacher), **options}
            scores[side] += run(side, "few", objective, folder / f"{name}-{side}-{seed}")
    means = {side: fmean(values) for side, values in scores.items()}
    groups = [row["messages"][0]["content"] for row in test] * len(size.seeds)
    return {
        **means,
        "fraction": {side: over(means[side], means["teacher"]) for side in STUDENTS},
        "over_sft": {side: compared(scores["sft"], scores[side], groups) for side in STUDENTS},
        "rows": {"teacher": len(train), "students": len(few), "held_out": len(test)},
    }


def over(value: float, whole: float) -> float:
    return value / whole if whole else float(value >= whole)


def measure_mending(name: str, size: Size, folder: Path) -> dict[str, Any]:
    """The first set's teacher before and after mending, and one that was tuned with rehearsal."""
    train, test = SETS[name](size)
    talk = [json.loads(line) for line in TALK.read_text(encoding="utf-8").splitlines()][: size.talk]
    random.Random(0).shuffle(talk)
    apart = len(talk) // 4
    general = curated(folder, "talk", talk[apart:])
    before = folder / f"{name}-teacher-{size.seeds[0]}"
    rows = curated(folder, f"{name}-all", train)
    untouched = parts.run("nats of the base", lambda: nats(None, talk[:apart]))
    groups = [row["messages"][0]["content"] for row in talk[:apart]]

    def facts(adapter: Path) -> dict[str, Any]:
        lost = compared(untouched, nats(adapter, talk[:apart]), groups)
        return {
            "exact_match": fmean(matches(adapter, test)),
            "forgetting": lost["estimate"],
            "low": lost["low"],
            "high": lost["high"],
        }

    def mend(side: str, rehearsal: Any) -> dict[str, Any]:
        mended = folder / f"{name}-{side}"
        run = tuned(
            mended,
            size,
            0,
            {"path": general, "eval_fraction": 0.25, "rehearsal": rehearsal},
            objective={"kind": "distil", "teacher": "base", "stop_at_forgetting": 0.01},
            method={"start": str(before)},
            optimizer={"learning_rate": size.rate / 5, "batch_tokens": size.batch_tokens},
            evaluations=12,
        )
        return {**facts(mended), "updates": run["updates"]}

    def rehearse() -> dict[str, Any]:
        rehearsed = folder / f"{name}-rehearsed"
        tuned(rehearsed, size, 0, {"path": rows, "eval_fraction": 0.0, "rehearsal": {"path": general}})
        return facts(rehearsed)

    def begin() -> dict[str, Any]:
        tuned(before, size, size.seeds[0], rows, objective={"kind": "sft"})
        return facts(before)

    own_rows = {"path": rows, "fraction": OWN_ROWS}
    found = {
        "before": parts.run(f"{name} before mending", begin),
        "mended": parts.run(f"{name} mended", lambda: mend("mended", "none")),
        "beside_rows": parts.run(f"{name} mended beside its rows", lambda: mend("beside-rows", own_rows)),
        "rehearsal": parts.run(f"{name} with rehearsal", rehearse),
    }
    matches_before = found["before"]["exact_match"]
    kept = {side: over(found[side]["exact_match"], matches_before) for side in ("mended", "beside_rows")}
    return {**found, "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the public sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--mending-only", action="store_true", help="no students")
    parser.add_argument("--students-only", action="store_true", help="no mending")
    smallest.add_argument(parser, selections=("sets", "mending_only", "students_only"))
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, smallest.home(options.small):
        folder = parts.work_folder(Path(temporary))
        size = Size(options.data)
        if options.small:
            data = defaults.write_small_data(Path(temporary) / "data")
            size = Size(data, rows=12, held_out=4, fraction=0.5, talk=16, updates=2, seeds=(0,))
        asked = [] if options.mending_only else options.sets
        found: dict[str, Any] = {"sets": {name: measure_set(name, size, folder) for name in asked}}
        found["absent"] = {f"sets.{name}": f"not asked for: --sets {name}" for name in SETS if name not in asked}
        if options.students_only:
            found["absent"]["mending"] = "not asked for: --students-only"
        else:
            found["mending"] = measure_mending(options.sets[0], size, folder)
    print_result({**found, "machine": machine_facts(), "wall_s": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
