"""Everything a card is written from: the facts of the manifest to be, and what was measured in the files beside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sartor.core.licences.spdx import UNKNOWN
from sartor.core.records import tally
from sartor.curate.card import look
from sartor.curate.card.removed import Drops, Evidence, read_drops, read_evidence
from sartor.curate.card.rows import Labels, Rows, measure

_LABEL_FIELDS = ("intent", "label", "category", "class", "topic", "sentiment", "answer")
_MOST_LABELS = 200
_GENERIC = ("data", "dataset", "rows", "train", "test", "examples", "part-00000")  # a folder says more


@dataclass(frozen=True)
class Contents:
    """The facts, and the measurements. What the facts lack is counted from the files."""

    folder: Path
    facts: Mapping[str, Any]
    rows: Rows
    drops: Drops
    evidence: Evidence
    media: Mapping[str, look.Files]
    languages: Counter[str] | None = field(default_factory=Counter)

    @property
    def counts(self) -> Mapping[str, Any]:
        """The manifest's counts."""
        return self.facts.get("counts") or {}

    @property
    def kept(self) -> int:
        """Rows kept."""
        return int(self.counts.get("kept", self.rows.kept))

    @property
    def dropped(self) -> dict[str, int]:
        """reason -> rows, most frequent first."""
        found = self.counts.get("dropped")
        return tally(self.drops.reasons().elements()) if found is None else dict(found)

    @property
    def read(self) -> int:
        """Rows read."""
        return int(self.counts.get("read", self.kept + sum(self.dropped.values())))

    @property
    def made_by(self) -> str:
        """Who wrote the rows, where nobody did: a teacher's name, or "rules alone"; empty of rows that people wrote."""
        said = self.facts.get("synthetic")
        return str(said["teacher"] or "rules alone") if said else ""

    @property
    def made(self) -> int:
        """Copies that steps made of rows, those among them that are Drops."""
        return int(self.counts.get("made", 0))

    @property
    def splits(self) -> dict[str, int]:
        """split -> rows, train first."""
        found = self.counts.get("splits")
        found = dict(self.rows.splits) if found is None else dict(found)
        return {name: found[name] for name in sorted(found, key=lambda name: (name != "train", name))}

    @property
    def sources(self) -> Sequence[Mapping[str, Any]]:
        """One mapping per input file."""
        return self.facts.get("sources") or ()

    @property
    def licence(self) -> str:
        """SPDX expression of the whole."""
        return str(self.facts.get("licence") or UNKNOWN)

    @property
    def steps(self) -> Mapping[str, Any]:
        """kind -> what that step found."""
        return self.facts.get("steps") or {}

    @property
    def step_kinds(self) -> list[str]:
        """The recipe's steps by name, in their order, each once."""
        listed = (self.facts.get("recipe") or {}).get("steps") or ()
        return list(dict.fromkeys(_kind(step) for step in listed))

    @property
    def name(self) -> str:
        """What the Dataset is called: its own name, or its sources'."""
        if self.facts.get("name"):
            return str(self.facts["name"])
        names = list(dict.fromkeys(_called(str(file.get("source") or file.get("path") or "rows")) for file in self.sources))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more or "Dataset"

    def stages(self) -> list[tuple[str, int, int]]:
        """From read to kept: (step, rows left after it, rows that went in it). Rows that a step made are left after it."""
        lost: Counter[str] = Counter()
        for (step, _), count in self.drops.by_step.items():
            lost[step] += count
        order = list(dict.fromkeys(["read", *self.step_kinds]))
        order += sorted(set(lost) - set(order))
        stages, left = [("rows in the sources", self.read, 0)], self.read
        for step in order:
            left += int((self.steps.get(step) or {}).get("copies", 0)) - lost[step]
            if step != "read" or lost[step]:
                stages.append(("unusable" if step == "read" else step, left, lost[step]))
        return [*stages, ("kept", self.kept, 0)]

    def gaps(self) -> Iterator[str]:
        """Where the counts of the manifest and of the files are not the same. Empty is as it should be."""
        dropped = sum(self.dropped.values())
        if self.kept != self.rows.kept:
            yield f"the manifest counts {self.kept:,} rows kept; examples/ holds {self.rows.kept:,}."
        if dropped != self.drops.total:
            yield f"the manifest counts {dropped:,} rows dropped; drops/ holds {self.drops.total:,}."
        if self.read + self.made != self.kept + dropped:
            made = f" and {self.made:,} made" if self.made else ""
            yield f"{self.read:,} rows were read{made}, {self.kept:,} kept and {dropped:,} dropped: these do not add up."

    def labels(self) -> tuple[str, Counter[str]] | None:
        """What the rows are labelled with, if they are: (field of JSON replies or `reply`, label -> rows)."""
        fields = {key: values for key, labels in self.rows.fields.items() if (values := self._as_labels(labels))}
        named = (self.steps.get("suspicious_labels") or {}).get("label")
        for key in (named, *_LABEL_FIELDS, *sorted(fields, key=lambda key: (len(fields[key]), key))):
            if key in fields:
                return str(key), fields[key]
        values = self._as_labels(self.rows.replies)
        return ("reply", values) if values else None

    def _as_labels(self, labels: Labels) -> Counter[str] | None:
        """The values that repeat, where there are a few and they cover half of the rows."""
        repeated = Counter({value: count for value, count in (labels.values or {}).items() if count > 1})
        covers = repeated.total() * 2 >= max(self.rows.kept, 1)
        return repeated if covers and 2 <= len(repeated) <= _MOST_LABELS else None


def gather(folder: Path, facts: Mapping[str, Any]) -> Contents:
    """Read the files of a Dataset that is being written. Bounded memory: the rows are read in batches, once."""
    drops = read_drops(sorted((folder / "drops").glob("*.parquet")))
    evidence = read_evidence(folder)
    wanted = {drop.kept for held in drops.shown.values() for drop in held if drop.kept}
    wanted |= {str(row["id"]) for queue in evidence.queues.values() for row in queue}
    rows = measure(sorted((folder / "examples").glob("*.parquet")), wanted)
    return Contents(folder, facts, rows, drops, evidence, look.media(folder), look.languages(rows.sample))


def place(path: str) -> str:
    """A path as a card names it: of an absolute one the last two parts, since the rest is the machine's."""
    if not (PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()):
        return path
    parts = re.split(r"[\\/]+", path)
    return "/".join(("…", *[part for part in parts if part][-2:]))


def _called(source: str) -> str:
    if source.startswith("sql:"):
        return "sql"
    stem = source.removeprefix("hub:").removeprefix("inbox:").rstrip("/\\")
    parts = [part.split("*")[0] for part in re.split(r"[\\/]+", stem)]
    name = parts[-1].rsplit(".", 1)[0]
    if (not name or name.lower() in _GENERIC) and len(parts) > 1 and parts[-2]:
        return parts[-2]
    return name or source


def _kind(step: Any) -> str:
    if isinstance(step, Mapping):
        return str(step["kind"] if "kind" in step else next(iter(step), "?"))
    return str(step)
