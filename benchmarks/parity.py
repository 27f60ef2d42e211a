"""How alike the GGUF forms of several Releases answer, refused by no limit: what the limits of `sartor export` are set from.

Of each form: what each Release reached, the least of them, and how far chance alone moves that (a receipt's
`agreement_deviation`). `limit` is what `export` holds it against; `margin`, how many such deviations lie between.

    python benchmarks/parity.py RELEASE RELEASE RELEASE --key KEYS --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sartor.evaluate.release import verify
from sartor.export import forms, measure, prompts, reference
from sartor.export.measure import LEAST_AGREEMENT, Figures
from sartor.models import adapters
from sartor.models.base import machine, open_base

KINDS = "f16,bf16,q8_0,q5_1,q5_0,q4_1,q4_0"


def measured(path: Path, key: Path | None, kinds: Sequence[str]) -> dict[str, Figures]:
    """Form -> the figures of one Release."""
    release = verify(path, key=key).release
    said = release.manifest["base"]
    base = open_base(said["name"], licence=said["licence"], bits=32)
    work = forms.Work(release, base, adapters.open_adapter(base.model, release.path), (), kinds, True, note)
    work.traces = reference.trace(base, work.model, prompts.choose(release, base.chat))
    with tempfile.TemporaryDirectory() as folder:
        return {found.form: found for found in forms.write_gguf(work, Path(folder)).figures.values()}


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
            "margin": round(over / chance, 1) if chance else None,
        }
    return said


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", type=Path, nargs="+")
    parser.add_argument("--key", type=Path, help="the public key that signed them, where this machine does not trust it")
    parser.add_argument("--kinds", default=KINDS, help=f"types of the merged file, of {KINDS}")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args()
    measure.check = lambda figures, name: None  # what is below a limit is to be seen too
    releases = {}
    for path in options.releases:
        note(f"{path.name} ...")
        releases[path.name] = measured(path, options.key, options.kinds.split(","))
        note(json.dumps(summary({path.name: releases[path.name]})))
    first = {name: next(iter(found.values())) for name, found in releases.items()}
    said = {
        "positions": {name: found.positions for name, found in first.items()},
        "forms": summary(releases),
        "machine": machine(),
    }
    print(json.dumps(said) if options.json else json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
