"""Scoreboard of every target that an issue states: docs/development/scoreboard.md, from results files alone.

    python benchmarks/scoreboard/scoreboard.py            # writes the page
    python benchmarks/scoreboard/scoreboard.py --check    # exits 1 if the page is not what would be written

targets.toml has a table a target. Figures come from benchmarks/results/NAME.json, which record.py writes; a target
without such a file is "not run here", and one that no benchmark measures says why.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import NOT_ASKED_FOR

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGETS = HERE / "targets.toml"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "development" / "scoreboard.md"
NOT_RUN = "not run here"
NOT_COMPARED = "not compared"
STATES = ("met", "**not met**", NOT_COMPARED, NOT_RUN, "not measured")
# options by which a program measures less than its targets are of
NARROWER = {
    "--small",
    "--quick",
    "--rows",
    "--train-rows",
    "--defaults-only",
    "--layers",
    "--updates",
}
# options that select sections: where a result names the others under `absent`, only those are not of its figures
SELECTIONS = {"--sets", "--sides", "--only"}
COLUMNS = ("item", "target", "limit", "measured", "state", "from, or why not")
TAKES = {"min": min, "max": max, "sum": sum, "mean": lambda values: sum(values) / len(values)}
HEAD = """\
# Scoreboard

Every target of an open issue that has a figure: met, not met, not compared (measured on a part, or on another
processor), or not run and why. `make scoreboard` writes this page from `benchmarks/scoreboard/targets.toml` and from
the files that `make bench` wrote to `benchmarks/results`; no figure is typed by hand, and a test compares the page
with what would be written.
"""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure that an issue asks for.

    item: of the issue. program: the benchmark that measures it, empty where none does; then `why` has the reason.
    value: path in its JSON, dotted, `*` for every key or element. take: of several values, of TAKES. Of at_least,
    at_most and
    equals one is set. needs: a flag of the processor that the target is of, as /proc/cpuinfo spells it; elsewhere the
    figure stands on the page and is not compared. whole_with: an option of NARROWER with which the program measures
    all of this target, and less of others.
    """

    issue: int
    item: str
    text: str
    program: str = ""
    value: str = ""
    take: str = ""
    at_least: float | None = None
    at_most: float | None = None
    equals: float | bool | None = None
    why: str = ""
    needs: str = ""
    whole_with: str = ""

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.at_least, self.at_most, self.equals) if limit is not None]
        if self.program and (not self.value or len(limits) != 1):
            raise ValueError(f"{self.text}: a target of a program needs a value and one of at_least, at_most, equals")
        if not self.program and not self.why:
            raise ValueError(f"{self.text}: no program measures it, and why does not say why")
        if self.take and self.take not in TAKES:
            raise ValueError(f"{self.text}: take is {self.take!r}, none of {', '.join(TAKES)}")

    @property
    def limit(self) -> str:
        """The limit as the page shows it."""
        if self.equals is not None:
            return f"= {show(self.equals)}"
        if self.at_least is not None:
            return f">= {show(self.at_least)}"
        return f"<= {show(self.at_most)}" if self.at_most is not None else ""

    def is_met(self, value: float) -> bool:
        """Whether a measured value reaches the limit."""
        if self.equals is not None:
            return value == self.equals
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


@dataclass(frozen=True)
class Standing:
    """Where a target stands. state: one of STATES, the last for what no benchmark measures."""

    target: Target
    state: str
    measured: str
    source: str


def read_targets(file: Path = TARGETS) -> list[Target]:
    """Return the targets of a file. Raises ValueError for one that nothing could be compared with."""
    return [Target(**table) for table in tomllib.loads(file.read_text(encoding="utf-8"))["target"]]


def values_at(result: Any, path: str) -> Iterator[Any]:
    """Yield what stands at a dotted path of a JSON value; `*` is every key or element. Nothing where there is no such
    key.
    """
    name, _, rest = path.partition(".")
    if not path:
        yield result
    elif name == "*":
        for inner in result.values() if isinstance(result, dict) else result if isinstance(result, list) else []:
            yield from values_at(inner, rest)
    elif isinstance(result, dict) and name in result:
        yield from values_at(result[name], rest)


def standing_of(target: Target, results: Path = RESULTS) -> Standing:
    """Compare a target with its results file."""
    if not target.program:
        return Standing(target, "not measured", "", target.why)
    file = results / f"{target.program}.json"
    if not file.is_file():
        return Standing(target, NOT_RUN, "", target.why or f"no {target.program}.json in benchmarks/results")
    record = json.loads(file.read_text(encoding="utf-8"))
    if "not_run" in record:
        return Standing(target, NOT_RUN, "", record["not_run"])
    # the least, the most or a count of some members says nothing of all
    if unfinished := record["result"].get("unfinished"):
        return Standing(target, NOT_RUN, "", f"unfinished: {', '.join(unfinished)}")
    values = [value for value in values_at(record["result"], target.value) if isinstance(value, int | float)]
    origins = origins_of(record, target.value)
    source = " and ".join(
        f"`{' '.join(origin['command'])}`, {origin['commit'] or 'no commit'}, {origin['machine']['processor']}"
        for origin in origins
    )
    if not values:
        reason = next(iter(absent_at(record, target.value)), "the result has no such key")
        return Standing(target, NOT_RUN, "", f"{reason}; {source}")
    if len(values) > 1 and not target.take:
        raise ValueError(
            f"{target.text}: {len(values)} values at {target.value}, and take says none of {', '.join(TAKES)}"
        )
    value = TAKES[target.take](values) if target.take else values[0]
    narrowing = NARROWER - {target.whole_with}
    reasons = record["result"].get("absent", {}).values()
    # a file with `kept` sections, or that says which were not asked for, names what a selection left out
    names_its_parts = "kept" in record or any(why.startswith(NOT_ASKED_FOR) for why in reasons)
    if not names_its_parts or absent_at(record, target.value):
        narrowing |= SELECTIONS - {target.whole_with}
    options = dict.fromkeys(option for origin in origins for option in origin["command"])
    if narrower := [option for option in options if option.partition("=")[0] in narrowing]:
        return Standing(target, NOT_COMPARED, show(value), f"of a part alone ({' '.join(narrower)}): {source}")
    if target.needs and any(target.needs not in origin["machine"].get("flags", ()) for origin in origins):
        return Standing(
            target, NOT_COMPARED, show(value), f"the target is of a processor with {target.needs}: {source}"
        )
    return Standing(target, "met" if target.is_met(value) else "**not met**", show(value), source)


def is_part(name: str, path: str) -> bool:
    """Whether what stands at a dotted name has, or is part of, what a target's path names."""
    return all(selected in ("*", part) for part, selected in zip(name.split("."), path.split("."), strict=False))


def absent_at(record: dict[str, Any], path: str) -> list[str]:
    """Return why parts of what a path names are absent from a result."""
    absent = record["result"].get("absent", {})
    return [why for name, why in absent.items() if name in path.split(".") or is_part(name, path)]


def origins_of(record: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """Return command, commit and machine of what a path names: of the record's call, or of the calls it `kept`."""
    kept = {name: origin for name, origin in record.get("kept", {}).items() if is_part(name, path)}
    origins = [] if any(path == name or path.startswith(f"{name}.") for name in kept) else [record]
    for origin in kept.values():
        if origin not in origins:
            origins.append(origin)
    return origins


def show(value: float | bool | None) -> str:
    """Return a number as the page has it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}"


def page(standings: list[Standing]) -> str:
    """Return the page's text."""
    lines = [HEAD]
    counts = {state: sum(one.state == state for one in standings) for state in STATES}
    lines.append(", ".join(f"{count} {state}" for state, count in counts.items()) + f"; {len(standings)} targets.\n")
    for issue in dict.fromkeys(one.target.issue for one in standings):
        lines += [f"## Issue {issue}\n", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for one in standings:
            if one.target.issue == issue:
                cells = (one.target.item, one.target.text, one.target.limit, one.measured, one.state, one.source)
                lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the page is not what would be written"
    )
    arguments = parser.parse_args()
    text = page([standing_of(target) for target in read_targets()])
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what its results say: make scoreboard")


if __name__ == "__main__":
    main()
