"""A tutor's own version for each learner against the shared one, and what is left of a learner who is forgotten.

    python benchmarks/learn_personal.py --json [--work DIR]
    python benchmarks/learn_personal.py --json --small    # a tiny base and few records: shows that it runs

The tutor of examples/team (twelve learners' records together, the starter, 3 epochs) and three learners who are not
among them, 140 records each. `sartor personal tune` learns from three quarters; exact match of greedy replies on the
last quarter, by exercise and slip, is compared in pairs with the shared tutor's: `gain`, over all three, interval by
bootstrap over learners' exercises. Then each is forgotten, and every file below the team's state is searched for a
word that stood in every record of
that learner alone: `deleted_found`. What stands in DIR is not made again. `benchmarks/learn.py` has both from here.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import smallest
import torch
from results import print_result

import sartor
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.parquet_io import read_examples
from sartor.core.records import Example
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.evaluate.predictions import HeldOut, replies, reply_limit
from sartor.evaluate.scorers import exact_match
from sartor.models.tuned_model import open_tuned

TEAM = Path(__file__).parent.parent / "examples" / "team"
LEARNERS = ("ana", "bo", "cem")
# nats a token; another learner's records ask for other hints: that a version is bad at those is its purpose
MOST_ELSEWHERE = 5.0
OPTIONS = {"rank": 4, "epochs": 6.0, "learning_rate": 2e-3}


@dataclass
class Size:
    """Learners, records of each and of all together, and what the recipe of the tutor is changed by."""

    learners: tuple[str, ...] = LEARNERS
    records: int = 1_000_000
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    flags: tuple[str, ...] = ()
    most_elsewhere: float = MOST_ELSEWHERE


size = Size()
# with six held-out rows the interval of a loss is wider than the real size's limit
SMALL = Size(
    LEARNERS[:1],
    48,
    {**OPTIONS, "epochs": 1.0},
    ("--budget", '{"updates": 2}', "--evaluations", "0"),
    most_elsewhere=50.0,
)


def notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def tutor(folder: Path) -> Path:
    """The team's file, its tutor released."""
    sys.path.insert(0, str(TEAM))
    import learners

    for place in ("rows", "data"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    if not (folder / "rows/tutor.jsonl").exists():
        learners.write(folder / "rows/tutor.jsonl", learners.together()[: size.records])
    for name in size.learners:
        rows = learners.of(name)[: size.records]
        learners.write(folder / f"rows/{name}.jsonl", [_marked(row, name) for row in rows])
    if not (folder / "data/tutor").exists():
        source = {"path": str(folder / "rows/tutor.jsonl"), "licence": "CC0-1.0"}
        sartor.curate({"sources": [source], "steps": [], "split": {"eval_fraction": 0.12}}, folder / "data/tutor")
    if not (folder / "adapter").exists():
        flags = ["--data.path", str(folder / "data/tutor"), *size.flags]
        sartor.tune(sartor.load_recipe(TEAM / "tutor/tune.yaml", flags), folder / "adapter", show=False, notice=notice)
    if not (folder / "tutor-1.0").exists():
        sartor.evaluate(folder / "adapter", scorer="f1", most_rows=50, notice=notice)
        sartor.keygen(folder / "keys", trust=True)
        why = [
            sartor.Waiver(check, "benchmark", "the shared tutor cannot know whom it speaks to")
            for check in ("gain", "forgetting")
        ]
        sartor.release(
            folder / "adapter", name="tutor", version="1.0", key=folder / "keys", waivers=why, out=folder / "tutor-1.0"
        )
    team = folder / "team.yaml"
    team.write_text(
        json.dumps({"base": "starter", "personal": {"most_elsewhere": size.most_elsewhere}}), encoding="utf-8"
    )  # JSON is YAML
    sartor.add_agent(team, folder / "tutor-1.0")
    return team


def _marked(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The word that is looked for stands in what is no part of the exercise."""
    return {**row, "group": f"{row['group']} {canary(name)}"}


def canary(name: str) -> str:
    """A word that nobody else's rows have."""
    return f"canary-{name}-7f3a9"


def scores(adapter: Artifact, rows: Sequence[Example], folder: Path) -> list[float]:
    """Exact match of each row."""
    base, model = open_tuned(adapter)
    with torch.no_grad():
        said = replies(base, model, HeldOut(list(rows), folder), reply_limit(base, rows))
    return [exact_match(base.chat.decode(one.ids), row.reply) for one, row in zip(said, rows, strict=True)]


def found_in(state: Path, word: str) -> list[str]:
    """Files that hold the word; of a Parquet file, whose pages are compressed, what it says."""
    files = [file for file in sorted(state.rglob("*")) if file.is_file()]
    return [
        str(file)
        for file in files
        if word.encode() in file.read_bytes() or (file.suffix == ".parquet" and word in _told(file))
    ]


def _told(file: Path) -> str:
    return str(pq.read_table(file).to_pylist())


def measured(folder: Path) -> dict[str, Any]:
    """Gain and what is left, by learner and over all."""
    team = tutor(folder)
    state = folder / ".team"
    before: list[float] = []
    after: list[float] = []
    groups: list[str] = []
    learners: dict[str, Any] = {}
    for name in size.learners:
        made = sartor.tune_personal(
            team,
            sartor.PersonalOptions("tutor", name, str(folder / f"rows/{name}.jsonl"), **size.options),
            notice=notice,
        )
        own = open_artifact(made["adapter"])
        rows = list(read_examples(open_artifact(own.path.parent / "rows"), "eval"))
        sides = scores(open_artifact(folder / "tutor-1.0"), rows, folder), scores(own, rows, folder)
        seen = len(found_in(state, canary(name)))
        one = paired_bootstrap(*sides, [row.group for row in rows])
        learners[name] = {"shared": one.base, "own": one.tuned, "low": one.low, "high": one.high, "rows": len(rows)}
        learners[name] |= {"gate": made["gate"], "files_with_word_before": seen, "wall_s": made["wall_s"]}
        notice(json.dumps({name: learners[name]}))
        before, after = before + sides[0], after + sides[1]
        groups += [f"{name} {row.group}" for row in rows]
    left = []
    for name in size.learners:
        gone = sartor.forget_personal(team, name, by="benchmark")
        left += [*found_in(state, canary(name)), *gone["searched"]["found"]]
    all_ = paired_bootstrap(before, after, groups)
    return {
        "personal": {"gain": {"estimate": all_.difference, "low": all_.low, "high": all_.high}, "learners": learners},
        "deleted_found": len(left),
        "left": left,
    }


def measure(is_small: bool = False) -> dict[str, Any]:
    """In a folder of its own."""
    if is_small:
        vars(size).update(vars(SMALL))
    with tempfile.TemporaryDirectory() as folder:
        return measured(Path(folder))


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="(always: the last line is one JSON object)")
    smallest.add_argument(parser, has_work=True)
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    with smallest.home(asked.small, "chitchat"):
        found = measured(asked.work.absolute()) if asked.work else measure(asked.small)
    print_result({"benchmark": "learn_personal", "machine": platform.processor() or platform.machine(), **found})


if __name__ == "__main__":
    main()
