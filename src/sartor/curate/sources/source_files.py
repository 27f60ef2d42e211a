"""What a recipe declares as a source, made ready: the place it names, its licence, and what the manifest says of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.core.errors import ConfigError, ExtraError, HubError, need
from sartor.core.licences.spdx import UNKNOWN
from sartor.curate.recipe import Source
from sartor.curate.sources import forms, places, sql
from sartor.curate.sources.parquet import drop_nulls
from sartor.curate.sources.places import Found
from sartor.curate.sources.tables import Read

# Rows looked at to find a file's form: the commonest one among them is the file's.
HEAD_ROWS = 50
FEEDBACK = "LicenseRef-feedback"


@dataclass
class FileFacts:
    """What the manifest says of one input file. `notes` counts what was noticed in it and is no reason for a Drop."""

    source: str
    path: str
    sha256: str
    bytes: int
    licence: str
    use: tuple[str, ...]
    form: str = "unknown"
    read: int = 0
    notes: dict[str, int] = field(default_factory=dict)


def scheme(path: str) -> str:
    """`sql`, `hub`, `asset` or `inbox`, or empty for files."""
    return next((name for name in ("sql", "hub", "asset", "inbox") if path.startswith(f"{name}:")), "")


def with_licence(source: Source) -> Source:
    """The source; one that names an asset and no licence has the asset's, and an inbox terms of its own.

    What people told a team is licensed by nobody's table: what it may be used for is for `use` to say.
    """
    if source.licence != UNKNOWN:
        return source
    if scheme(source.path) == "inbox":
        return replace(source, licence=FEEDBACK)
    return replace(source, licence=assets.entry(_asset(source.path)[0]).licence) if scheme(source.path) == "asset" else source


def files_of(source: Source) -> list[Found]:
    """The files of a source. An asset is installed first. Raises ConfigError, AssetError."""
    if scheme(source.path) != "asset":
        return places.find(source.path.removeprefix("inbox:"))
    name, inner = _asset(source.path)
    folder = assets.install(name)
    if inner.startswith("/") or ".." in Path(inner).parts:
        raise ConfigError(f"the source {source.path!r} leads out of the asset", f"asset:{name}/PATH, of a file in {folder}")
    found = places.find(str(folder / inner))
    # a pattern gives whole paths: no name of a row's place may hang on where this machine keeps its assets
    return [replace(file, name=file.name.removeprefix(f"{folder}/")) for file in found]


def _asset(path: str) -> tuple[str, str]:
    name, _, inner = path.removeprefix("asset:").partition("/")
    return name, inner


def queried(source: Source, most_bytes: int, most_rows: int = 0) -> Read:
    """Rows of a `sql:` or `hub:` source, the first `most_rows` if that is not 0."""
    return sql.rows(source.path, most_bytes, most_rows) if scheme(source.path) == "sql" else _hub_rows(source, most_rows)


def query_facts(source: Source) -> FileFacts:
    """What is known of a `sql:` or `hub:` source before its rows are read."""
    if scheme(source.path) == "sql":
        sql.split(source.path)
        return FileFacts(source.path, "query", "", 0, source.licence, source.use)
    found = _hub(source)
    return FileFacts(
        source.path, source.path, str(found._fingerprint), int(found.dataset_size or 0), source.licence, source.use
    )


def _hub_rows(source: Source, most_rows: int) -> Read:
    for number, row in enumerate(_hub(source), 1):
        yield str(number), drop_nulls(dict(row))
        if number == most_rows:
            return


def _hub(source: Source) -> Any:
    """`hub:owner/name` or `hub:owner/name:split`, by the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise need("datasets", "hub") from None
    name, _, split = source.path.removeprefix("hub:").partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except ExtraError:
        raise
    except Exception as error:  # the library raises many kinds: offline, gated, absent, bad config
        raise HubError(
            f"the dataset {name!r} could not be fetched: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
            "check the name and the network, or download it elsewhere and give its Parquet files",
        ) from None


def form_of(rows: Iterable[tuple[str, Any]], *, of_media: bool = False) -> str:
    """The commonest form among some rows; empty where none has one."""
    found = Counter(form for _, row in rows if isinstance(row, dict) and (form := forms.detect(row, of_media=of_media)))
    return found.most_common(1)[0][0] if found else ""
