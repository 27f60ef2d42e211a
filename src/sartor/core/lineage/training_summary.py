"""Public summary of training content (EU AI Act), filled in from lineage.

Article 53(1)(d) of Regulation (EU) 2024/1689 (AI Act) requires it from providers of general-purpose AI models. The
sections follow the Commission's template of 24 July 2025 ("Explanatory Notice and Template for the Public Summary of
Training Content for general-purpose AI models"), as described in secondary sources read on 2026-11-29. Facts that no
manifest holds are marked as open, never invented. This is not legal advice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.artifacts import Artifact, Kind, open_artifact
from sartor.core.licences.spdx import UNKNOWN
from sartor.core.lineage import ancestry

TO_STATE = "to be stated by you"
_KINDS: tuple[Kind, ...] = ("dataset", "adapter", "release")
# the template's size ranges of text, in tokens
_TEXT_RANGES = ((10**9, "less than 1 billion tokens"), (10**13, "1 billion to 10 trillion tokens"))
_LARGEST_TEXT = "more than 10 trillion tokens"
_WHOM = """\
> Whom this binds: providers that place a **general-purpose AI model** on the Union market, from 2 August 2025
> (models that were on it before: by 2 August 2027). A specialist for one task is not one by itself. Who modifies
> such a model is held to be the provider of the modification where the modification took more than a third of the
> compute of the original's training (Commission guidelines of July 2025), and then summarises what the modification
> was trained on. Tuning by LoRA on a firm's own rows is far below that.
> This page was filled from files and is no legal advice."""


@dataclass(frozen=True)
class TrainingSummary:
    """The page, as Markdown.

    open_points: number of places that a person must fill in.
    mark: text that marks them.
    """

    text: str
    open_points: int
    mark: str = TO_STATE

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {"summary": self.text, "open": self.open_points}


def training_summary(path: Path | str) -> TrainingSummary:
    """Fill the template for a Dataset, an Adapter or a Release. Raises ArtifactError for anything else."""
    artifact = open_artifact(path, _KINDS)
    datasets = [artifact] if artifact.kind == "dataset" else ancestry.training_datasets(artifact)
    sources = [source for source in artifact.manifest.get("sources", []) if source.get("kept", 1)]
    lines = [
        f"# Public summary of training content: {_name_of(artifact)}",
        "",
        _WHOM,
        "",
        *_general(artifact, datasets),
        *_data_sources(artifact, datasets, sources),
        *_processing(datasets, sources),
    ]
    text = "\n".join(lines)
    return TrainingSummary(text, text.count(TO_STATE))


def _name_of(artifact: Artifact) -> str:
    manifest = artifact.manifest
    return f"{manifest['name']} {manifest['version']}" if artifact.kind == "release" else artifact.path.name


def _general(artifact: Artifact, datasets: Sequence[Artifact]) -> list[str]:
    manifest = artifact.manifest
    base = manifest.get("base")
    dependency = (
        f"{base['name']} ({base['digest'][:16]}, {base['licence']}), fine-tuned" if base else "none: this is a Dataset"
    )
    return [
        "## 1. General information",
        "",
        "### 1.1 Provider",
        "",
        f"- Name and contact: {TO_STATE}",
        f"- Authorised representative, if outside of the Union: {TO_STATE}",
        "",
        "### 1.2 Model",
        "",
        f"- Versioned name: {_name_of(artifact)} (`{artifact.id}`, made "
        f"{manifest.get('created', 'at an unknown time')})",
        f"- Model that it was made from: {dependency}",
        *([f"- Summary of that model's training content, by its provider: {TO_STATE}"] if base else []),
        f"- Placed on the Union market on: {TO_STATE}",
        "",
        "### 1.3 Modalities, size and characteristics",
        "",
        *_modalities(artifact, datasets),
        f"- Newest content, by its date of collection: {TO_STATE}",
        f"- Languages: {_languages(datasets)}",
        f"- Regional, demographic or other characteristics: {TO_STATE}",
        "",
    ]


def _modalities(artifact: Artifact, datasets: Sequence[Artifact]) -> list[str]:
    rows = sum(dataset.manifest["counts"]["splits"].get("train", 0) for dataset in datasets)
    tokens = artifact.manifest.get("run", {}).get("tokens")
    lines = [f"- Rows that were trained on: {rows:,}" if datasets else f"- Rows that were trained on: {TO_STATE}"]
    if tokens:
        size = next((name for limit, name in _TEXT_RANGES if tokens < limit), _LARGEST_TEXT)
        lines.append(f"- Text: {size} ({tokens:,} were read in all passes)")
    else:
        lines.append(f"- Text: {TO_STATE}")
    kinds = sorted(artifact.manifest.get("base", {}).get("towers", {}))
    lines += [f"- {kind.capitalize()}: yes; size {TO_STATE}" for kind in kinds]
    return lines


def _languages(datasets: Sequence[Artifact]) -> str:
    """Return the languages that the curation allowed, if its recipe has a language step."""
    found: list[str] = []
    for dataset in datasets:
        for step in dataset.manifest.get("recipe", {}).get("steps", []) or []:
            if isinstance(step, Mapping) and step.get("kind") == "language":
                found += step.get("allow", ())
    return ", ".join(dict.fromkeys(found)) or TO_STATE


def _data_sources(artifact: Artifact, datasets: Sequence[Artifact], sources: Sequence[Mapping[str, Any]]) -> list[str]:
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for source in sources:
        scheme = source["source"].partition(":")[0]
        kind = {"hub": "hub", "asset": "hub", "inbox": "inbox", "sql": "sql"}.get(scheme, "file")
        by_kind.setdefault(kind, []).append(source)
    teachers = {teacher for dataset in datasets if (teacher := dataset.manifest.get("teacher"))}
    synthetic = [dataset for dataset in datasets if "teacher" in dataset.manifest or "ways" in dataset.manifest]
    lines = [
        "## 2. Data sources",
        "",
        f"What {_name_of(artifact)} was tuned on. What its base was trained on stands in the summary of the base's "
        "provider.",
        "",
        "### 2.1 Publicly available datasets",
        "",
        *_listed(by_kind.get("hub", [])),
        "",
        "### 2.2 Private datasets of third parties, licensed by rightsholders or otherwise",
        "",
        f"- Which of the files and databases under 2.6 were licensed from somebody: {TO_STATE}",
        "",
        "### 2.3 Data crawled and scraped from online sources",
        "",
        "Sartor crawls nothing. Whether a file under 2.6 was crawled, by whom, when and from which domains: "
        f"{TO_STATE}",
        "",
        "### 2.4 User data",
        "",
        *_listed(by_kind.get("inbox", [])),
        "",
        "### 2.5 Synthetic data",
        "",
    ]
    if synthetic:
        lines += [f"- {dataset.path.name}: rows that were generated" for dataset in synthetic]
        lines += [f"- generated by: {teacher}" for teacher in sorted(teachers)] or [
            "- generated by rules, without a model"
        ]
    else:
        lines.append(f"None by Sartor. Whether a file under 2.6 was generated, and by which model: {TO_STATE}")
    return [*lines, "", "### 2.6 Other sources", "", *_listed([*by_kind.get("file", []), *by_kind.get("sql", [])]), ""]


def _listed(sources: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = []
    for source in sources:
        rows = f"{source.get('kept', 0):,} rows of {source.get('read', 0):,}"
        licence = TO_STATE if source["licence"] == UNKNOWN else source["licence"]
        digest = f", sha256 `{source['sha256'][:16]}`" if source.get("sha256") else ""
        rehearsal = "; read against forgetting alone" if source.get("rehearsal") else ""
        # the page is public, so a file is named without the folders of this machine
        name = source["source"] if ":" in source["source"] else source["path"]
        lines.append(f"- `{name}`: {rows}, licence {licence}{digest}{rehearsal}")
    return lines or ["- none"]


def _processing(datasets: Sequence[Artifact], sources: Sequence[Mapping[str, Any]]) -> list[str]:
    steps: dict[str, None] = {}  # names in order, each once
    dropped: dict[str, int] = {}
    for dataset in datasets:
        for step in dataset.manifest.get("recipe", {}).get("steps", []) or []:
            steps[str(step.get("kind", step) if isinstance(step, Mapping) else step)] = None
        for reason, count in dataset.manifest["counts"].get("dropped", {}).items():
            dropped[reason] = dropped.get(reason, 0) + count
    consents = sorted({source["consent"] for source in sources if source.get("consent")})
    return [
        "## 3. Data processing",
        "",
        "### 3.1 Reservations of rights (text and data mining)",
        "",
        f"- Measures to respect them before and while the data were collected: {TO_STATE}",
        f"- Licences that the sources state: {', '.join(sorted({source['licence'] for source in sources})) or 'none'}",
        *([f"- Consent that the sources state: {', '.join(consents)}"] if consents else []),
        "",
        "### 3.2 Removal of illegal content",
        "",
        f"- Measures: {TO_STATE}",
        f"- Steps of the curation: {', '.join(steps) or 'none beside reading'}",
        "- Rows that were dropped, by reason: "
        + (", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items())) or "none"),
        "",
        "### 3.3 Other information",
        "",
        f"- {TO_STATE}, or nothing: this part is voluntary",
        "",
    ]
