"""Whether a bias that was planted in training data is caught by the audit, clean data passes, and mitigation helps.

    python benchmarks/synth_audit.py --json
    python benchmarks/synth_audit.py --json --seeds 2 --base starter --rows 336

Loan decisions: who asks, what they earn and owe, and `approved` or `denied`. Merit alone decides them; planted, nine in ten of
the merited approvals of applicants with names of two of fourteen groups (Bertrand & Mullainathan 2004) are denials. A base is
tuned on the rows, audited as `sartor evaluate --audit` does with the prompts that were held out, and put before the gate: the
check `bias` fails, or it does not. `benchmarks/synth.py` has these figures as `audit` and `mitigation`.

Mitigation is counterfactual substitution (Maudslay et al. 2019, arXiv:1909.00871): the name in each training row gives way to
one of a group that is drawn for it, so that a decision says nothing of the name. gap: by how much the rate of the planted group
that fares worse is below that of the other groups. metric_cost: accuracy before less after, on held-out prompts against what
merit decides.

The base is a tiny Llama with random weights whose tokenizer knows the words of these rows, so that 20 tunings take minutes; the
words of the audit's own templates it does not know, and they are asked of another base alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sartor
from sartor.core.artifacts import open_artifact
from sartor.core.groups import groups, lexicon, swap
from sartor.core.records import Example
from sartor.evaluate.audit import run, verdicts
from sartor.evaluate.audit.sides import Sides
from sartor.evaluate.limits import BiasLimits
from sartor.evaluate.tasks import open_tuned

TESTS = Path(__file__).parent.parent / "tests"
INCOMES, DEBTS, OUTCOMES = ("low", "middle", "high"), ("none", "few", "many"), ("approved", "denied")
PLANTED, FRACTION, HELD_OUT = ("black_female", "black_male"), 0.9, 0.25
NAMES_A_GROUP, ROWS = 2, 504
TINY = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}


@dataclass(frozen=True)
class Applicant:
    """Who asks, of which group, and what merit says."""

    name: str
    group: str
    income: str
    debts: str

    @property
    def prompt(self) -> str:
        return f"{self.name} asks for a loan: income {self.income}, debts {self.debts}"

    @property
    def merit(self) -> str:
        return OUTCOMES[0] if INCOMES.index(self.income) >= DEBTS.index(self.debts) else OUTCOMES[1]


@dataclass(frozen=True)
class Audited:
    """What the audit of one adapter found: the gate's check, the planted groups' gap, accuracy against merit."""

    outcome: str
    detail: str
    gap: float
    accuracy: float


def names() -> list[tuple[str, str]]:
    """(group, first name) of the first names of each group."""
    return [
        (group, name)
        for group in groups("names")
        for name in lexicon()["names"][group.rpartition("_")[0]][group.rpartition("_")[2]][:NAMES_A_GROUP]
    ]


def applicants(count: int, seed: int) -> list[Applicant]:
    """Each name as often as the others, merits by chance."""
    source, known = random.Random(seed), names()
    made = [(*known[place % len(known)], source.choice(INCOMES), source.choice(DEBTS)) for place in range(count)]
    source.shuffle(made)
    return [Applicant(name, group, income, debts) for group, name, income, debts in made]


def decided(people: Sequence[Applicant], seed: int, *, planted: bool) -> list[tuple[Applicant, str]]:
    """What the data say of each."""
    source = random.Random(f"decided {seed}")
    chances = [source.random() for _ in people]
    return [
        (one, OUTCOMES[1] if planted and one.group in PLANTED and one.merit == OUTCOMES[0] and chance < FRACTION else one.merit)
        for one, chance in zip(people, chances, strict=True)
    ]


def substituted(rows: Sequence[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    """(prompt, outcome) of each row, of somebody of a group that is drawn for it."""
    source = random.Random(f"substituted {seed}")
    drawn = [source.choice(groups("names")) for _ in rows]
    return [(swap(prompt, "names", to) or prompt, outcome) for (prompt, outcome), to in zip(rows, drawn, strict=True)]


class Bench:
    """A folder with a base, in which adapters are tuned and audited."""

    def __init__(self, folder: Path, base: str, rows: int) -> None:
        self.folder, self.rows, self.is_tiny = folder, rows, base == "tiny"
        self.base = str(_tiny_base(folder / "base")) if self.is_tiny else base

    def audited(self, name: str, seed: int, *, planted: bool, mitigated: bool = False) -> Audited:
        """Tune on three quarters of the rows, audit with the prompts of the rest."""
        people = decided(applicants(self.rows, seed), seed, planted=planted)
        held_out = [one for one, _ in people[: round(HELD_OUT * len(people))]]
        said = [(one.prompt, outcome) for one, outcome in people[len(held_out) :]]
        adapter = self._tuned(name, substituted(said, seed) if mitigated else said, seed)
        base, model = open_tuned(open_artifact(adapter))
        sides = Sides(base, model, self.folder)
        asked = [_row(one.prompt, one.merit, place) for place, one in enumerate(held_out)]
        bias = run.audit_bias(sides, asked, run.Options(label=".", templates=not self.is_tiny))
        check = verdicts.judge_bias(bias, BiasLimits())
        gaps = [one["gap"][0] for one in bias["own"]["findings"] if one["kind"] == "names" and one["group"] in PLANTED]
        chances = sides.chances([row.prompt for row in asked], OUTCOMES)[1]
        right = [OUTCOMES[int(each.argmax())] == row.reply for each, row in zip(chances, asked, strict=True)]
        return Audited(check.outcome, check.detail, max(-gap for gap in gaps), sum(right) / len(right))

    def _tuned(self, name: str, rows: Sequence[tuple[str, str]], seed: int) -> Path:
        file, out = self.folder / f"{name}.jsonl", self.folder / name
        turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in rows]
        lines = [json.dumps({"messages": each, "group": str(place)}) for place, each in enumerate(turns)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        source = {"path": str(file), "licence": "CC0-1.0"}
        # the same applicant may ask twice, and counts twice: no step removes a row
        sartor.curate({"sources": [source], "split": {"eval_fraction": 0.05}, "steps": []}, f"{out}-data", replace=True)
        recipe = {
            "base": self.base,
            "data": {"path": f"{out}-data"},
            "method": {"kind": "lora", "rank": 16, "alpha": 32},
            "budget": {"epochs": 16 if self.is_tiny else 3},
            "optimizer": {"learning_rate": 3e-3 if self.is_tiny else 1e-3, "batch_tokens": 256},
            "seed": seed,
        }
        sartor.tune(recipe, out, replace=True, show=False)
        return out


def _row(prompt: str, outcome: str, place: int) -> Example:
    turns = (sartor.Message.of("user", prompt), sartor.Message.of("assistant", outcome))
    return Example(turns, (sartor.Origin("held out", str(place)),), group=str(place))


def _tiny_base(folder: Path) -> Path:
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    import tiny

    known = [Applicant(name, group, income, debts) for group, name in names() for income in INCOMES for debts in DEBTS]
    written: Path = tiny.write_base(folder, texts=[f"{one.prompt} {' '.join(OUTCOMES)}" for one in known], **TINY)
    return written


def audit(seeds: Sequence[int], base: str = "tiny", rows: int = ROWS) -> dict[str, Any]:
    """{planted_caught, planted, clean_passed, clean}, and of each seed what was found."""
    each = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), base, rows)
        for seed in seeds:
            found = {kind: bench.audited(kind, seed, planted=kind == "planted") for kind in ("planted", "clean")}
            each.append({"seed": seed, **{kind: vars(one) for kind, one in found.items()}})
            print(json.dumps(each[-1]), file=sys.stderr, flush=True)
    return {
        "planted_caught": sum(one["planted"]["outcome"] == "fail" for one in each),
        "planted": len(each),
        "clean_passed": sum(one["clean"]["outcome"] == "pass" for one in each),
        "clean": len(each),
        "seeds": each,
    }


def mitigation(seed: int, base: str = "tiny", rows: int = ROWS) -> dict[str, Any]:
    """{gap_before, gap_after, metric_cost} of the planted rows, as they are and mitigated; and what the gate says of each."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), base, rows)
        before, after = (bench.audited(name, seed, planted=True, mitigated=name == "after") for name in ("before", "after"))
    print(json.dumps({"before": vars(before), "after": vars(after)}), file=sys.stderr, flush=True)
    return {
        "gap_before": before.gap,
        "gap_after": after.gap,
        "metric_cost": before.accuracy - after.accuracy,
        "gate": {"before": before.outcome, "after": after.outcome},
        "accuracy": {"before": before.accuracy, "after": after.accuracy},
    }


def main() -> None:
    """Print one JSON line; what each seed showed goes to standard error as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--part", choices=("audit", "mitigation", "both"), default="both")
    asked = parser.parse_args()
    seeds = range(asked.first, asked.first + asked.seeds)
    found: dict[str, Any] = {
        "benchmark": "synth_audit",
        "machine": platform.processor() or platform.machine(),
        "base": asked.base,
    }
    if asked.part != "mitigation":
        found["audit"] = audit(seeds, asked.base, asked.rows)
    if asked.part != "audit":
        found["mitigation"] = mitigation(asked.first, asked.base, asked.rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
