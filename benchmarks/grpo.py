"""What rewards of a verifier are worth: an undertuned adapter of home commands before and after grpo.

    python benchmarks/grpo.py --json [--work grpo-work] [--minutes 60]

An adapter is tuned by sft on a part of the home commands, for too few updates. From there grpo goes on with a verifier
that is a JSON Schema of the commands: one object for each intent, with its slots and their types. The verifier sees no
reference reply, and the rows' own replies are not learnt. Both adapters answer the held-out rows greedily. `valid` is
the fraction of replies that the verifier passes; `fields` is the mean fraction of fields that are those of the
reference, which no run was rewarded for. Differences are paired by wording, over the seeds. A part of the training
rows is held out of both runs, and the verifier is checked by their replies.

Two useless verifiers, a pattern that every reply has and a schema that every object obeys, must be refused.

valid, fields {before, after, estimate, low, high}
equal_groups {fraction}    of the groups of all runs, those that taught nothing
auc {estimate, low}        of the verifier, on right and edited replies
useless {NAME: {refused, problem}}; useless_refused: the fraction of them
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import defaults
import distil
import parts
import smallest
from results import print_result

import sartor
from sartor.core.errors import ConfigError
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.inference.verifiers.json_fields import JsonFieldsVerifier
from sartor.inference.verifiers.json_schema import JsonSchemaVerifier, json_value
from sartor.inference.verifiers.submission import Submission
from sartor.models import adapters
from sartor.models.base import machine_facts, open_base

BASE = "starter"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
USELESS: dict[str, dict[str, Any]] = {
    "pattern": {"kind": "regex", "pattern": "."},
    "schema": {"kind": "json_schema", "schema": {"type": "object"}},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of a call. updates: of grpo.

    sft_updates: of the undertuned adapter. After 24 no reply is valid, so that no group teaches anything.
    """

    rows: int = 300
    held_out: int = 150
    sft_updates: int = 48
    updates: int = 60
    seeds: tuple[int, ...] = (0, 1)
    sft_rate: float = 5e-4
    rate: float = 2e-4
    sft_batch_tokens: int = 512
    batch_tokens: int = 256
    group_size: int = 8
    max_reply_tokens: int = 48


def schema_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON Schema of the commands: for each intent the slots that its rows have, and the types of their values."""
    slots: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        command = json_value(distil.reply_of(row))
        slots.setdefault(command.pop("intent"), []).append(command)
    forms = []
    for intent, commands in slots.items():
        types: dict[str, set[str]] = {}
        for name, value in (item for command in commands for item in command.items()):
            types.setdefault(name, set()).add(TYPES[type(value)])
        properties = {name: {"type": sorted(kinds)} for name, kinds in sorted(types.items())}
        required = sorted(name for name in types if all(name in command for command in commands))
        forms.append(
            {
                "type": "object",
                "properties": {"intent": {"const": intent}, **properties},
                "required": ["intent", *required],
                "additionalProperties": False,
            }
        )
    return {"anyOf": forms}


def tuned(out: Path, data: str, size: Size, **parts_of_recipe: Any) -> dict[str, Any]:
    """Tune unless an earlier call has, and return the run's facts."""
    recipe: dict[str, Any] = {
        "base": BASE,
        "data": {"path": data, "eval_fraction": 0.15, "rehearsal": "none"},
        "evaluations": 0,
        "weights": "last",
        **parts_of_recipe,
    }
    return dict(sartor.tune(recipe, out, show=False, resume=True).as_json())


def replies(adapter: Path, rows: Sequence[Row], size: Size) -> list[str]:
    """Greedy replies to the rows' prompts."""
    base = open_base(BASE)
    model = adapters.open_adapter(base.model, adapter)
    prompts = [base.chat.prompt_ids(distil.example(row).prompt) for row in rows]
    sampling = Sampling(size.max_reply_tokens)
    found = generate(model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=sampling)
    return [base.chat.decode(reply.ids) for reply in found]


def measured(adapter: Path, rows: Sequence[Row], schema: dict[str, Any], size: Size) -> dict[str, list[float]]:
    """Rewards of greedy replies by the schema, and their fractions of right fields."""
    submissions = [
        Submission(str(index), reply, distil.reply_of(row))
        for index, (row, reply) in enumerate(zip(rows, replies(adapter, rows, size), strict=True))
    ]
    return {
        "valid": JsonSchemaVerifier(schema).rewards(submissions),
        "fields": JsonFieldsVerifier().rewards(submissions),
    }


def measure_useless(data: str, size: Size, folder: Path) -> dict[str, dict[str, Any]]:
    """Whether each useless verifier is refused, and how."""
    found = {}
    for name, verifier in USELESS.items():
        objective = {"kind": "grpo", "verifier": verifier, "max_reply_tokens": size.max_reply_tokens}
        problem = ""
        try:
            tuned(folder / f"useless-{name}", data, size, objective=objective, budget={"updates": 1})
        except ConfigError as error:
            problem = error.problem
        found[name] = {"refused": bool(problem), "problem": problem}
    return found


def measure(size: Size, data_folder: Path, folder: Path) -> dict[str, Any]:
    """The whole result but the machine."""
    options = defaults.Options(data_folder, Path(), rows=size.rows, held_out=size.held_out)
    train, test = defaults.home_intents(options)
    schema, data = schema_of([*train, *test]), distil.curated(folder, "home", train)
    sides: dict[str, dict[str, list[float]]] = {side: {"valid": [], "fields": []} for side in ("before", "after")}
    runs = []
    for seed in size.seeds:
        before, after = folder / f"sft-{seed}", folder / f"grpo-{seed}"

        def tune_before(seed: int = seed, before: Path = before) -> dict[str, list[float]]:
            optimizer = {"learning_rate": size.sft_rate, "batch_tokens": size.sft_batch_tokens}
            budget = {"updates": size.sft_updates}
            tuned(before, data, size, seed=seed, optimizer=optimizer, budget=budget)
            return measured(before, test, schema, size)

        def tune_after(seed: int = seed, before: Path = before, after: Path = after) -> dict[str, Any]:
            run = tuned(
                after,
                data,
                size,
                seed=seed,
                objective={
                    "kind": "grpo",
                    "verifier": {"kind": "json_schema", "schema": schema},
                    "group_size": size.group_size,
                    "max_reply_tokens": size.max_reply_tokens,
                },
                method={"start": str(before)},
                optimizer={"learning_rate": size.rate, "batch_tokens": size.batch_tokens},
                budget={"updates": size.updates},
            )
            return {**measured(after, test, schema, size), "run": run["verifier"]}

        for side, compute in (("before", tune_before), ("after", tune_after)):
            found = parts.run(f"{side} grpo, seed {seed}", compute)
            runs += [found["run"]] if "run" in found else []
            for metric, values in sides[side].items():
                values += found[metric]
    groups = [row["group"] for row in test] * len(size.seeds)
    result: dict[str, Any] = {}
    for metric in ("valid", "fields"):
        first, second = sides["before"][metric], sides["after"][metric]
        result[metric] = {
            "before": fmean(first),
            "after": fmean(second),
            **distil.compared(first, second, groups),
        }
    total = sum(run["groups"] for run in runs)
    useless = parts.run("useless verifiers", lambda: measure_useless(data, size, folder))
    return {
        **result,
        "equal_groups": {"fraction": sum(run["equal_groups"] for run in runs) / max(total, 1)},
        "auc": {"estimate": runs[0]["auc"], "low": runs[0]["low"]},
        "useless": useless,
        "useless_refused": fmean(float(each["refused"]) for each in useless.values()),
        "rows": {"train": len(train), "held_out": len(test)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, smallest.home(options.small, "home-intents"):
        size = Size()
        if options.small:
            size = Size(rows=30, held_out=6, sft_updates=2, updates=2, seeds=(0,), group_size=2, max_reply_tokens=8)
        found = measure(size, Path(temporary), parts.work_folder(Path(temporary)))
    print_result({**found, "machine": machine_facts(), "wall_s": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
