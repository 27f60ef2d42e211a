"""Commands about data: what goes into a Dataset, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import sartor
from sartor.cli.app import REPLACE, Flags, app, notice
from sartor.core.errors import ConfigError


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
    """Sources -> Dataset: read, clean, de-duplicate, hold out. Options of the recipe can be given as flags.

    A run of the same recipe that was interrupted is gone on with.

    Args:
        recipe: YAML file, `sources:` alone is enough
        out: directory of the new Dataset
        on: local processes, or Ray Data (the cluster that RAY_ADDRESS names, else one on this machine)
        strict: stop at the first row that cannot be used
        resume: also take a finished Dataset of the same recipe and sources for an answer
        replace: replace the Dataset that stands there
    """
    loaded = sartor.load_curate_recipe(recipe, flags)
    return sartor.curate(loaded, out, on=on, strict=strict, resume=resume, replace=replace, notice=notice)


@app.command
def synthesize(recipe: Path, *flags: Flags, out: Path, resume: REPLACE = False, replace: REPLACE = False) -> Any:
    """Rows, documents or nothing -> a Dataset of synthetic rows, which nobody has validated yet.

    A run of the same recipe that was interrupted is gone on with: what the teacher answered is not asked again.

    Args:
        recipe: YAML file: `ways:`, and as they need them `sources:` and `teacher:`
        out: directory of the new Dataset
        resume: also take a finished Dataset of the same recipe and sources for an answer
        replace: replace the Dataset that stands there
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
    """Duplicates in any JSONL, CSV, TSV, JSON or Parquet files: exact, near and contained, every one verified.

    Writes DIR/kept (each file without its duplicates), DIR/dropped.parquet (every other row, whole, and the row that
    stays for it) and DIR/pairs.parquet (every verified pair, for `sartor rethreshold`).

    Args:
        files: the files; rows are numbered from 0 over all of them in this order
        out: directory of the result
        text_field: what is compared: field, a,b or a.b; by default `text`, the fields of a known form, or all fields joined
        threshold: Jaccard similarity from which rows are duplicates; 0 takes 0.65 for words, 0.45 for characters
        pairs: also list the duplicates as (a, b, score, method), in a .csv, .jsonl or .parquet file
        contained: share of the shorter row that must stand in the longer, 0 for never; by default 0.9 for words
        unit: words, characters or auto: what shingles are runs of
        size: length of a shingle; 0 takes 2 words or 3 characters
        keep: which of several stays: longest or first
        allow: a file of which all may go
        max_source_fraction: stop if one cluster would remove more of a file
        max_fraction: stop if more of all rows would be removed
        max_row_bytes: longer rows are put aside
        processes: worker processes; 0 decides by the size of the files
        replace: replace what stands at --out
    """
    said = {"contained": contained, "unit": unit, "size": size, "keep": keep, "allow": allow, "processes": processes}
    limits = {"max_source_fraction": max_source_fraction, "max_fraction": max_fraction, "max_row_bytes": max_row_bytes}
    compared = {"text_field": text_field, "threshold": threshold}
    return sartor.dedup(files, out, pairs=pairs, replace=replace, show=True, **compared, **said, **limits)


@app.command
def rethreshold(path: Path, *, threshold: float, out: Path, replace: REPLACE = False) -> Any:
    """What `sartor dedup` or a Dataset's `near_duplicates` found, at another threshold. Nothing is compared again.

    Args:
        path: what `sartor dedup` wrote, or a Dataset made with `near_duplicates`
        threshold: not below the `floor` that its JSON names
        out: directory of the new result
        replace: replace what stands at --out
    """
    return sartor.rethreshold(path, out, threshold=threshold, replace=replace, show=True)


@app.command
def inspect(path: Path, *, example: str = "") -> Any:
    """What an artefact is, its licence, and the walk back to its sources; one row of a Dataset; or a base and its markup.

    Args:
        path: the artefact; or a base (`starter`, a directory, a GGUF file): which tokens no text of a user can spell
        example: id of a row: its origins, what it was made from, the steps that changed it, its duplicates
    """
    return sartor.inspect(path, example=example)


@app.command
def revoke(dataset: Path, *, source: str = "", example: str = "") -> Any:
    """List what a source or an example reaches: rows, rows made from them, adapters, reports, releases. Changes nothing.

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
    return {"found": [{"kind": found.kind, "id": found.id, "path": str(found.path)} for found in sartor.index(directory)]}
