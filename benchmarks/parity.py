"""How alike the GGUF forms of several Releases answer, refused by no limit: what the limits of `sartor export` are set
from.

Of each form: what each Release reached, the least of them, and how far chance alone moves that (a receipt's
`agreement_deviation`). `limit` is what `export` holds it against; `margin`, how many such deviations lie between.

    python benchmarks/parity.py RELEASE RELEASE RELEASE --key KEYS --json
    python benchmarks/parity.py --small --json    # a Release of a tiny base that is made for this

`margin` is absent where chance moves nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import norms
import parts
import smallest
from results import print_result

import sartor
from sartor.core import records
from sartor.models import adapters
from sartor.models.base import machine_facts, open_base
from sartor.release.export import export_formats, parity
from sartor.release.export.parity import LEAST_AGREEMENT, Figures
from sartor.release.release import verify

KINDS = "f16,bf16,q8_0,q5_1,q5_0,q4_1,q4_0"
SMALL_KINDS = "f16,q8_0"


def measured(path: Path, key: Path | None, kinds: Sequence[str]) -> dict[str, Figures]:
    """Form -> the figures of one Release."""
    release = verify(path, key=key).release
    said = release.manifest["base"]
    base = open_base(said["name"], licence=said["licence"], bits=32)
    work = export_formats.ExportContext(
        release, base, adapters.open_adapter(base.model, release.path), (), kinds, True, note
    )
    work.traces = parity.trace(base, work.model, parity.choose(release, base.chat))
    with tempfile.TemporaryDirectory() as folder:
        return {found.form: found for found in export_formats.write_gguf(work, Path(folder)).figures.values()}


def as_json(figures: dict[str, Figures]) -> dict[str, dict[str, Any]]:
    """Figures by form as parts.py keeps them."""
    return {form: vars(values) for form, values in figures.items()}


def note(line: object) -> None:
    """Progress, to stderr."""
    print(line, file=sys.stderr, flush=True)


def summary(releases: dict[str, dict[str, Figures]]) -> dict[str, Any]:
    """Of each form what each Release reached, the least of it, and what chance does to that."""
    said = {}
    for form in next(iter(releases.values())):
        least = min((found[form] for found in releases.values()), key=lambda figures: figures.agreement)
        over, chance = least.agreement - LEAST_AGREEMENT[form], least.agreement_deviation
        said[form] = {
            "agreement": {name: round(found[form].agreement, 4) for name, found in releases.items()},
            "least": round(least.agreement, 4),
            "deviation": round(chance, 4),
            "limit": LEAST_AGREEMENT[form],
            **({"margin": round(over / chance, 1)} if chance else {}),
        }
    return said


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", type=Path, nargs="*")
    parser.add_argument(
        "--key", type=Path, help="the public key that signed them, where this machine does not trust it"
    )
    parser.add_argument("--kinds", default=KINDS, help=f"types of the merged file, of {KINDS}")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser)
    options = parser.parse_args()
    if not (options.releases or options.small):
        parser.error("RELEASE...: the Releases to measure")
    if importlib.util.find_spec("xllamacpp") is None:
        sys.exit("GGUF files are run by llama.cpp: pip install 'sartor[llamacpp]'")
    parity.check = lambda figures, name: None  # what is below a limit is to be seen too
    with smallest.home(options.small, "starter"), tempfile.TemporaryDirectory() as folder:
        if options.small:
            made_up(options, Path(folder))
        said = everything(options)
    print_result(said, indent=None if options.json else 1)


def made_up(options: argparse.Namespace, folder: Path) -> None:
    """Put a Release of the tiny base, its key and fewer kinds in place of what was asked for."""
    adapter = norms.tuned(folder)
    sartor.evaluate(adapter, out=folder / "report")
    sartor.keygen(folder / "keys")
    waivers = [sartor.Waiver(check, "benchmark", "two updates teach nothing") for check in ("gain", "forgetting")]
    made = {"name": "tiny", "version": "1.0", "key": folder / "keys", "report": folder / "report", "waivers": waivers}
    sartor.release(adapter, **made, out=folder / "release")
    options.releases, options.key, options.kinds = [folder / "release"], folder / "keys" / "sartor.pub", SMALL_KINDS


def everything(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each Release."""
    releases = {}
    for path in options.releases:
        note(f"{path.name} ...")
        digest = records.digest(verify(path, key=options.key).release.manifest)
        figures = parts.run(
            f"{path.name} {digest[:12]}",
            lambda path=path: as_json(measured(path, options.key, options.kinds.split(","))),
        )
        releases[path.name] = {form: Figures(**values) for form, values in figures.items()}
        note(json.dumps(summary({path.name: releases[path.name]})))
    first = {name: next(iter(found.values())) for name, found in releases.items()}
    return {
        "positions": {name: found.positions for name, found in first.items()},
        "forms": summary(releases),
        "machine": machine_facts(),
    }


if __name__ == "__main__":
    main()
