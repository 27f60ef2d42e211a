"""Commands that hold synthetic rows against reality, and outcomes against groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import sartor
from sartor.cli.app import REPLACE, Flags, app, notice
from sartor.core.errors import ConfigError


@app.command
def validate(
    synthetic: Path,
    *flags: Flags,
    reality: Path,
    seeds: Path | None = None,
    options: Path | None = None,
    out: Path | None = None,
    prove: Path | None = None,
    replace: REPLACE = False,
) -> Any:
    """Synthetic rows against reality that their generator never saw. Options can be given as flags (--limits.topic 0.2).

    The verdict is an answer: the command lists what failed and exits 0. With --out or --prove a set that fails is refused, 5.

    Args:
        synthetic: a Dataset, or a file of rows
        reality: a Dataset, of which the held-out rows are taken, or a file of rows
        seeds: what the generator was given; by default the training rows of --reality
        options: YAML file of options
        out: a new Dataset of the rows that were accepted
        prove: recipe of a tuning that is done with and without the accepted rows, below OUT-proof
        replace: replace what stands there
    """
    if prove is not None and out is None:
        raise ConfigError("--prove tunes on the accepted rows, so they need a place", "--out DIR")
    chosen = sartor.load_validate_options(options or {}, flags)
    found = sartor.validate(synthetic, reality, seeds=seeds, options=chosen, out=out, replace=replace)
    if prove is None or out is None:
        return found
    proof = sartor.prove(out, reality, prove, out.with_name(f"{out.name}-proof"), replace=replace, notice=notice)
    return {**found.as_json(), "proof": proof.as_json()}


@app.command
def bias(
    dataset: Path,
    *,
    group: tuple[str, ...] = (),
    outcome: str = "auto",
    mitigate: Literal["", "reweight", "counterfactual", "substitute", "drop"] = "",
    out: Path | None = None,
    seed: int = 0,
    replace: REPLACE = False,
) -> Any:
    """How outcomes fall on groups of people in a Dataset; with --mitigate, a Dataset in which they fall evenly.

    Args:
        dataset: the Dataset; its training rows are looked at
        group: lexicon, sex, name_origin, age, nationality, disability, or a field of JSON or of `Name: value` lines
        outcome: auto, reply, json:KEY (or KEY), regex:PATTERN
        mitigate: reweight (weights), counterfactual (each row again about another group), substitute (each row about a group
            that is dealt to it) or drop (the fewest rows)
        out: directory of the new Dataset
        seed: of what is drawn
        replace: replace what stands at --out
    """
    return sartor.bias(dataset, group=group, outcome=outcome, mitigate=mitigate, out=out, seed=seed, replace=replace)
