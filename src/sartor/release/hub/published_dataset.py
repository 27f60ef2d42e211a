"""Form of a Dataset that may leave the machine: its kept rows by split, their media, and a card.

It is a Dataset itself: `sartor tune` reads it, and `sartor.open` checks it. Left behind are the rows that were dropped
and the evidence against them (they may be under other licences, or be gone for a reason), review decisions with the
names of people, the recipe, and the folders, databases and hosts in the names of sources. Ids, splits, groups, weights
and licences of the rows stay. Pushed twice, it has the same bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.errors import ArtifactError, PrivacyError
from sartor.curate.dataset_writer import DatasetWriter
from sartor.release.hub.verified_file import files_of

STEP = "push"
INBOX = "inbox:"  # rows that users of a served team gave
_PUBLIC = ("hub:", "asset:")  # sources whose names say nothing of this machine


def write_published(dataset: Artifact, out: Path) -> Artifact:
    """Write the published form of an opened Dataset to `out`, `examples/SPLIT-00000.parquet` for each split.

    Raises PrivacyError for rows of a feedback inbox, ArtifactError if a file is no longer the verified one.
    """
    names = public_names([str(source["source"]) for source in dataset.manifest["sources"]])
    parent = dataclasses.replace(dataset, path=Path(dataset.path.name))  # a manifest names its parents' paths

    def fill(folder: Path) -> dict[str, Any]:
        writer = DatasetWriter(folder, [parent])
        for split in _splits(dataset):
            file = folder / "examples" / f"{split}-00000.parquet"
            writer.row_count += parquet_io.write_rows(file, parquet_io.EXAMPLES, _public_rows(dataset, split, names))
        writer.media(dataset.path / "media")
        sources = [
            {**source, "source": names[str(source["source"])], "path": _public_path(str(source.get("path", "")))}
            for source in dataset.manifest["sources"]
        ]
        facts: dict[str, Any] = {
            key: dataset.manifest[key] for key in ("licence", "synthetic", "created") if key in dataset.manifest
        }
        return writer.finish(
            sources=[source for source in writer.sources_with_kept(sources) if source["kept"]],
            steps={},
            counts={"read": writer.row_count, "made": 0},
            recipe={"derived": [STEP]},
            extra_facts=facts,
        )

    published = write_artifact(out, "dataset", fill)
    for name, entry in published.manifest["files"].items():
        if name.startswith("media/") and entry["sha256"] != dataset.manifest["files"][name]["sha256"]:
            raise ArtifactError(
                f"{dataset.path / name} changed while it was read", "sartor inspect DATASET names what is damaged"
            )
    document = (published.path / "manifest.json").read_bytes()
    return dataclasses.replace(published, document=document)


def _splits(dataset: Artifact) -> list[str]:
    """Return the splits of a Dataset. Raises ArtifactError for a name that no file may have."""
    splits = sorted(dataset.manifest["counts"].get("splits", ("train", "eval")))
    if wrong := [split for split in splits if not re.fullmatch(r"[a-z]{1,20}", split)]:
        raise ArtifactError(
            f"{dataset.path} has a split {wrong[0]!r:.40}", "sartor curate writes the splits train, eval and test"
        )
    return splits


def public_names(sources: list[str]) -> dict[str, str]:
    """Return names of sources without folders, addresses and queries; two sources never share one.

    >>> list(public_names(["/home/ann/faq.jsonl", "/srv/faq.jsonl", "sql:sqlite:///x#select 1", "hub:a/b"]).values())
    ['faq.jsonl', 'faq.jsonl (2)', 'sql', 'hub:a/b']
    """
    names: dict[str, str] = {}
    for source in sources:
        if source in names:
            continue
        stem = source if source.startswith(_PUBLIC) else "sql" if source.startswith("sql:") else _public_path(source)
        taken, name, number = set(names.values()), stem or "rows", 2
        while name in taken:
            name, number = f"{stem} ({number})", number + 1
        names[source] = name
    return names


def _public_path(path: str) -> str:
    """Return a path without the folders of this machine; one below its source stays as it is."""
    is_absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    if path.startswith(_PUBLIC) or (not is_absolute and ".." not in path and not path.startswith("~")):
        return path
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1]


def _public_rows(dataset: Artifact, split: str, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split with the public names of their sources, from bytes that were checked."""
    examples = [name for name in dataset.manifest["files"] if re.fullmatch(r"examples/[^/]+\.parquet", name)]
    for file in files_of(dataset, examples):
        for row in parquet_io.read_file(dataset.path / file.name, file.content()):
            if row["split"] != split:
                continue
            if any(origin["source"].startswith(INBOX) for origin in row["origins"]):
                raise PrivacyError(
                    f"row {row['id']} of {dataset.path} is what a user of a served team said, which stays there",
                    "sartor curate a recipe without the source inbox:, and push that Dataset",
                )
            origins = [
                {
                    **origin,
                    "source": names.get(origin["source"]) or _public_path(origin["source"]),
                    "locator": _public_path(origin["locator"]),
                }
                for origin in row["origins"]
            ]
            yield {**row, "origins": origins}
