"""Fix of trace.py: one case a set. Wrongly labelled rows are dropped by `sartor fix`, and put back.

Some rows of a command have the label of another; a released version gives a command like theirs the wrong label. The
fixed version has to pass the regression case, and its metric on held-out rows to stay within its interval. The same
rows are then put back into the fixed Dataset, and that version has to fail the case.

Both effects of the rows on the bad reply's loss are given: `left_out` by a retrain with the weight 0 (divisor, order
and seed unchanged), `removed` by the fix, which really removes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import defaults
import numpy as np
import parts
import trace_sources
from trace_lds import Retrains
from trace_setup import Row, Size, chat_row, notice, recipe_of, row_indices, set_rows, texts_of, tune_traced

import sartor
from sartor.core import assets
from sartor.core.artifacts import kind_of, open_artifact
from sartor.core.parquet_io import read_examples
from sartor.demo import home_intents
from sartor.evaluate.case_measurement import measure_cases
from sartor.evaluate.regression_cases import RegressionCase, now
from sartor.learn.fix import FixOptions, fix

# wordings of the command that is asked; the first are trained on with the wrong label
WORDINGS = ("{}", "please {}", "{} please", "now {}")
ASKED = "{} now please"
REASON = "the label is wrong"
BY = "benchmark"


@dataclass(frozen=True)
class FixSet:
    """Rows of a case: those with the wrong label, the others, and held-out ones.

    case: the command that is asked, with the right reply. bad_reply: its reply with the wrong label.
    """

    bad: list[Row]
    others: list[Row]
    held_out: list[Row]
    case: Row
    bad_reply: str


def labelled_set(options: defaults.Options, size: Size) -> FixSet:
    """Return the case of snips, whose replies are labels."""
    held_rows = max(8, size.rows // 2)
    options = replace(options, rows=size.rows + 1, held_out=held_rows)
    train, held_out = set_rows("snips", options, size.rows + 1, held_rows)
    command, reply = texts_of(train[0])
    bad_reply = next(label for label in sorted({texts_of(row)[1] for row in train}) if label != reply)
    bad = [chat_row(wording.format(command), bad_reply) for wording in WORDINGS]
    return FixSet(bad, train[1:], held_out, chat_row(ASKED.format(command), reply), bad_reply)


def command_set(size: Size) -> FixSet:
    """Return the case of home-intents, whose replies are JSON with a label and slots."""
    rows = home_intents.rows(assets.install("home-intents"), per_intent=max(4, size.rows // 16))
    command, reply = texts_of(rows[0])
    intents = sorted({json.loads(texts_of(row)[1])["intent"] for row in rows})
    own = json.loads(reply)["intent"]
    bad_reply = trace_sources.relabelled(reply, next(name for name in intents if name != own))
    bad = [chat_row(wording.format(command), bad_reply) for wording in WORDINGS]
    more = [chat_row(*texts_of(row)) for row in rows[1:]]
    held_out = more[size.rows : size.rows + max(8, size.rows // 2)] or more[-4:]
    others = [row for row in more[: size.rows] if row not in held_out]
    return FixSet(bad, others, held_out, chat_row(ASKED.format(command), reply), bad_reply)


def measure(options: defaults.Options, size: Size, folder: Path, *, waived: Sequence[str]) -> dict[str, Any]:
    """Return by set what the versions say to the case, the metric and both effects. waived: checks of the gate."""
    sets = {"home-intents": command_set(size), "snips": labelled_set(options, size)}
    return {name: _measure(name, rows, size, folder / f"fix-{name}", waived) for name, rows in sets.items()}


def _measure(name: str, rows: FixSet, size: Size, folder: Path, waived: Sequence[str]) -> dict[str, Any]:
    label = f"fix, {name}"
    recipe = recipe_of(rows.others, epochs=4, rate=1e-3, batch_rows=size.batch_rows) | size.recipe
    sources = {"commands": rows.others, "wrong": rows.bad}
    traced = tune_traced(folder, sources, recipe, held_out=rows.held_out)
    command, right = texts_of(rows.case)
    case = RegressionCase(
        prompt=traced.query(command, right).prompt,
        bad_reply=rows.bad_reply,
        corrected_reply=right,
        why=REASON,
        by=BY,
        date=now(),
    )
    fixed = parts.run(f"{label}: fixed version", lambda: _fixed(folder, rows, traced, waived))
    put_back = {
        "commands": [_row_of(example) for example in read_examples(open_artifact(fixed["dataset"]), "train")],
        "wrong": rows.bad,
    }
    returned = tune_traced(folder / "put-back", put_back, recipe, held_out=rows.held_out)
    measured = {
        "before": parts.run(f"{label}: case before", lambda: _measured(traced.artifact.path, case)),
        "fixed": parts.run(f"{label}: case after", lambda: _measured(Path(fixed["adapter"]), case)),
        "put_back": parts.run(f"{label}: case, rows put back", lambda: _measured(returned.artifact.path, case)),
    }
    weights = np.ones(len(traced.rows))
    weights[[row_indices(traced)[texts_of(row)] for row in rows.bad]] = 0
    retrains = Retrains(label, traced, [traced.query(command, rows.bad_reply)])
    left_out = float((retrains.losses("without the rows", weights) - retrains.losses("with all rows"))[0])
    metric = fixed["metric"]
    return {
        **measured,
        "fails_before": bool(measured["before"]["fails"]),
        "passes_fixed": not measured["fixed"]["fails"],
        "fails_when_put_back": bool(measured["put_back"]["fails"]),
        "metric": metric,
        "metric_stays": metric["low"] <= 0 <= metric["high"],
        "effects": {
            "left_out": left_out,
            "removed": measured["fixed"]["bad_nats"] - measured["before"]["bad_nats"],
        },
        "rows": len(traced.rows),
        "dropped": len(rows.bad),
        "waived": list(waived),
    }


def _row_of(example: sartor.Example) -> Row:
    return {"messages": [{"role": message.role, "content": message.text} for message in example.messages]}


def _measured(adapter: Path, case: RegressionCase) -> dict[str, Any]:
    (result,) = measure_cases(open_artifact(adapter), [case], notice)
    return result.as_json()


def _fixed(folder: Path, rows: FixSet, traced: Any, waived: Sequence[str]) -> dict[str, Any]:
    """Release the version with the wrong rows, and fix it; return the command's JSON."""
    keys, release = folder / "keys", folder / "release"
    if not keys.is_dir():
        sartor.keygen(keys)
    if kind_of(folder / "report") != "report":
        sartor.evaluate(traced.artifact.path, out=folder / "report", notice=notice)
    if kind_of(release) != "release":
        waivers = [sartor.Waiver(check, BY, "a benchmark") for check in waived if check != "cases"]
        made = {"name": "fixed", "version": "1.0", "key": keys, "report": folder / "report", "waivers": waivers}
        sartor.release(traced.artifact.path, **made, out=release)
    command, right = texts_of(rows.case)
    ids = [traced.rows[row_indices(traced)[texts_of(row)]].example.id for row in rows.bad]
    options = FixOptions(
        by=BY, reason=REASON, prompt=command, reply=rows.bad_reply, corrected=right, waive=tuple(waived)
    )
    return fix(release, ids, options, out=folder / "fixed", key=keys, notice=notice).as_json()
