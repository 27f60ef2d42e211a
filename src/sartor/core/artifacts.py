"""Artefact directories and manifests, opened with integrity checks.

    dataset/   manifest.json  examples/*.parquet  drops/*.parquet
    adapter/   sartor.json    adapter_config.json  adapter_model.safetensors  log.jsonl  loss.png
    report/    report.json    rows.parquet  report.html
    release/   release.json   signature  and the files of the adapter and its report
    duplicates/  duplicates.json  kept/  dropped.parquet  pairs.parquet
    export/    parity.json    signature (by option)  files that another runtime loads

A manifest lists the sha256 of every file except those in UNLISTED. Its own `id` is the digest of all its other keys. A
flipped byte, a missing or foreign file and a hand-edited manifest are therefore each refused by name; so are links and
hidden files that it does not list. The manifest is read once: `Artifact.document` holds the bytes that were parsed,
for a check of their signature. A writer fills a hidden sibling directory, fsyncs it and renames it. A kill leaves
either nothing or a whole artefact; the next write names and removes leftovers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from sartor.core import records, strict_json
from sartor.core.config import SUFFIXES_OF_ROWS
from sartor.core.errors import ArtifactError, ConfigError, MissingError
from sartor.core.filesystem import (
    DISK_FULL,
    _remove_leftovers,
    create_directory_atomic,
    file_digest,
    make_parent,
    replaced_versions,
    writer_lock,
)
from sartor.core.lazy_import import import_module

if TYPE_CHECKING:
    import datasets
    import pandas
    import polars

SCHEMA = 2
Kind = Literal["dataset", "adapter", "report", "release", "duplicates", "export"]
MANIFESTS: dict[str, str] = {
    "dataset": "manifest.json",
    "adapter": "sartor.json",
    "report": "report.json",
    "release": "release.json",
    "duplicates": "duplicates.json",
    "export": "parity.json",
}
REVIEW = "review.jsonl"
# Written after the manifest: a signature signs the manifest, and review decisions come later.
UNLISTED = {"signature", REVIEW}
# Hidden files that Sartor itself keeps in an artefact: the record of a server's copy, and what a review is written by.
_HIDDEN = re.compile(r"\.admitted\.json|\.{1,2}(admitted\.json|review\.jsonl)\.(part-.*|lock)")
# Fills a new directory, and returns the facts for its manifest
Fill = Callable[[Path], Mapping[str, Any]]
ArtifactPath = str | os.PathLike[str]
RowSplit = Literal["train", "eval", "test", "dropped"]
MOST_NESTED = 256  # brackets of a manifest, which holds the JSON schemas of tools


@dataclass(frozen=True, repr=False)
class Artifact:
    """An opened, checked artefact: its directory and its manifest.

    It is a path (os.PathLike), so that every verb takes it where it takes the artefact's directory.
    document: the manifest's bytes, as read and parsed; empty if only its manifest's values are known.
    """

    path: Path
    manifest: dict[str, Any]
    document: bytes = field(default=b"", compare=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        """Return one line: class, path, start of the id, and what the artefact holds."""
        facts = ", ".join(f"{name} {value}" for name, value in self._stated_facts().items())
        return f"{type(self).__name__}({_short_path(self.path)}, id {self._short_id}{': ' if facts else ''}{facts})"

    def _repr_html_(self) -> str:
        """Return a small table for a notebook."""
        facts = {"path": _short_path(self.path), "id": self._short_id, **self._stated_facts()}
        html: str = import_module("sartor.core.html").facts_table(type(self).__name__, facts)
        return html

    @property
    def kind(self) -> str:
        """Kind of the artefact: dataset, adapter, report, release, duplicates or export."""
        return str(self.manifest["kind"])

    @property
    def id(self) -> str:
        """sha256 of all other keys of the manifest, and so of every listed file."""
        return str(self.manifest["id"])

    @property
    def licence(self) -> str:
        """SPDX expression for everything the artefact was made from; NOASSERTION if the manifest states none."""
        return str(self.manifest.get("licence", "NOASSERTION"))

    @property
    def _short_id(self) -> str:
        return str(self.manifest.get("id", "none"))[:12]

    def as_parent(self) -> dict[str, str]:
        """Return the entry by which a child's manifest refers to this artefact."""
        return {"kind": self.kind, "id": self.id, "path": str(self.path)}

    def _stated_facts(self) -> dict[str, str]:
        """Return `_facts`; empty for a manifest that lacks them, since what is printed must never raise."""
        try:
            return self._facts()
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}

    def _facts(self) -> dict[str, str]:
        """Return the facts that are shown beside path and id."""
        return {"kind": self.kind, "files": f"{len(self.manifest['files']):,}"}


class Dataset(Artifact):
    """An opened Dataset: its rows as tables of pandas, Polars or the `datasets` library.

    A table has the columns of `examples/*.parquet`, with `prompt` (text of the last turn before the reply) and
    `reply` (text of the last turn) before them. Paths of images and recordings start at `path`. The split `dropped`
    has one row per dropped row: reason, source, locator, detail and the start of its text.
    """

    def to_pandas(self, split: RowSplit | None = None) -> pandas.DataFrame:
        """Return the rows of one split, or of all, as a pandas DataFrame.

        Raises ExtraError without pandas, ConfigError for an unknown split.
        """
        frame: pandas.DataFrame = import_module("sartor.core.artifact_tables").dataset_frame(self, split)
        return frame

    def to_polars(self, split: RowSplit | None = None) -> polars.DataFrame:
        """Return the rows of one split, or of all, as a Polars DataFrame. Raises ConfigError for an unknown split."""
        frame: polars.DataFrame = import_module("sartor.core.artifact_tables").dataset_polars(self, split)
        return frame

    def to_hf(self, split: RowSplit | None = None) -> datasets.Dataset:
        """Return the rows of one split, or of all, as a Dataset of the `datasets` library, in memory.

        `messages` has the form that the library's users expect: the content of a turn is text, or a list of parts if
        any row has an image or a recording. Raises ExtraError without `datasets`, ConfigError for an unknown split.
        """
        rows: datasets.Dataset = import_module("sartor.core.artifact_tables").dataset_hf(self, split)
        return rows

    def _facts(self) -> dict[str, str]:
        counts = self.manifest["counts"]
        splits = {
            name: f"{counts['splits'][name]:,}" for name in ("train", "eval", "test") if name in counts["splits"]
        }
        dropped = f"{sum(counts['dropped'].values()):,}"
        return {"rows": f"{counts['kept']:,}", **splits, "dropped": dropped, "licence": self.licence}


class LoadedModel(Protocol):
    """A base in memory with an Adapter on it. `model, tokenizer = adapter.load()` unpacks it.

    model: peft's PeftModel, in eval mode.
    tokenizer: the base's, with the chat template in place.
    """

    @property
    def model(self) -> Any:
        """The model."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        ...

    def generate(self, prompts: str | Sequence[Any], *, sampling: Any = None) -> list[str]:
        """Return the reply to each prompt, as `Adapter.generate` does."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


# set by `offer_model_loader`: models are opened on a higher level than artefacts
_MODEL_LOADER: list[Callable[..., LoadedModel]] = []


def offer_model_loader(loader: Callable[..., LoadedModel]) -> None:
    """Set what `Adapter.load` calls: (adapter, dtype, device, base, notice) -> its LoadedModel."""
    _MODEL_LOADER[:] = [loader]


class Adapter(Artifact):
    """An opened Adapter."""

    @property
    def name(self) -> str:
        """Name of its directory; of `NAME/adapter`, as `tailor` writes it, NAME."""
        path = self.path.absolute()
        return path.parent.name if path.name == "adapter" and path.parent.name else path.name

    def load(
        self,
        *,
        dtype: Any = "auto",
        device: Any = "auto",
        base: str = "",
        notice: Callable[[str], object] = lambda line: None,
    ) -> LoadedModel:
        """Return the base with this Adapter on it, and its tokenizer. The Adapter's bytes are checked again.

        dtype: float32, bfloat16 (or torch's), or auto: what this machine computes best, and of a base that was
        quantised for the tuning its bits. device: cpu, cuda, cuda:1, or auto. base: another place of the same base.
        Raises ExtraError without the extra `tune`, ArtifactError if its files were changed, ModelError if the base is
        not the one that it was tuned on, ConfigError for a dtype or a device that this machine does not have.
        """
        loader = _MODEL_LOADER[0]
        return loader(self, dtype=dtype, device=device, base=base, notice=notice)

    def generate(
        self,
        prompts: str | Sequence[Any],
        *,
        sampling: Any = None,
        base: str = "",
        notice: Callable[[str], object] = lambda line: None,
    ) -> list[str]:
        """Return the reply to each prompt, in order: those of `sartor.ask`, many at once.

        prompts: texts, `sartor.Question`s with media, or lists of messages in the OpenAI form.
        sampling: `sartor.Sampling` or some of its options; greedy by default. base: as in `load`.
        The model is opened once and then kept as long as this object. Raises what `load` raises, and ConfigError for
        an empty prompt.
        """
        loaded: dict[str, LoadedModel] = self.__dict__.setdefault("_loaded", {})
        if base not in loaded:
            loaded[base] = self.load(base=base, notice=notice)
        return loaded[base].generate(prompts, sampling=sampling)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields to pickle, without a model in memory."""
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}

    def _facts(self) -> dict[str, str]:
        run = self.manifest["run"]
        losses = {
            f"{name} loss": f"{loss:.3f}" for name, loss in run["loss"].items() if name != "first" and loss is not None
        }
        return {"base": Path(self.manifest["base"]["name"]).name, "updates": f"{run['updates']:,}", **losses}


class Report(Artifact):
    """An opened Report."""

    def to_pandas(self, table: Literal["rows", "metrics"] = "rows") -> pandas.DataFrame:
        """Return a table of the Report as a pandas DataFrame.

        table: `rows` has a row per held-out row, with both replies and their scores; `metrics` has a row per metric:
        base, tuned, and their difference with its 95 % interval.
        Raises ExtraError without pandas, ConfigError for another table.
        """
        frame: pandas.DataFrame = import_module("sartor.core.artifact_tables").report_frame(self, table)
        return frame

    def _facts(self) -> dict[str, str]:
        name = self.manifest["primary"]
        primary = self.manifest["metrics"][name]
        gain = f"{primary['base']:.3f} -> {primary['tuned']:.3f}"
        return {"rows": f"{self.manifest['rows']:,}", name.replace("_", " "): gain}


class Release(Artifact):
    """An opened Release: an Adapter that passed the gate and was signed."""

    def _facts(self) -> dict[str, str]:
        manifest = self.manifest
        name = f"{manifest['name']}@{manifest['version']}"
        return {"release": name, "base": Path(manifest["base"]["name"]).name, "use": manifest["use"]}


_CLASSES: dict[str, type[Artifact]] = {"dataset": Dataset, "adapter": Adapter, "report": Report, "release": Release}


def artifact_of(path: Path, manifest: dict[str, Any], document: bytes = b"") -> Artifact:
    """Return an artefact of the class of its kind, from a manifest that was checked."""
    return _CLASSES.get(str(manifest.get("kind")), Artifact)(path, manifest, document)


def _short_path(path: Path) -> str:
    """Return a path from the current directory on, if it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def manifest_id(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of all keys of a manifest except `id`."""
    return records.digest({key: value for key, value in manifest.items() if key != "id"})


@contextmanager
def create_output_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling of `path` to fill; it is renamed to `path` when the block ends without an error.

    The rename follows `create_directory_atomic`. Leftovers of killed runs are removed first. Raises ConfigError if
    `path` exists and `replace` is false, if it is a file, or if another process is writing it. Raises MissingError if
    the disk is full.
    """
    path = path.absolute()
    check_output_free(path, replace=replace)
    make_parent(path)
    with writer_lock(path):
        _remove_leftovers(path)
        check_output_free(path, replace=replace)  # a leftover may be what was there before
        try:
            with create_directory_atomic(path, replace=replace) as part:
                yield part
                check_output_free(path, replace=replace)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise MissingError(
                    f"the disk is full: {path} could not be written",
                    f"df -h {shlex.quote(str(path.parent))} shows the full disk: remove something there, or write to "
                    "another one",
                ) from error
            raise


def check_output_free(path: Path, *, replace: bool | None) -> None:
    """Raise ConfigError if an output path is taken; call it before long work starts.

    replace: None for a command that has no --replace.
    """
    if path.is_symlink() or path.is_file():
        raise ConfigError(f"the output {path} is a file or a link, not a directory", "choose another --out")
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        remedy = "choose another --out" if replace is None else "choose another --out, or add --replace"
        raise ConfigError(f"the output {path} exists", remedy)
    if (
        path.is_dir()
        and replace
        and any(path.iterdir())
        and not any((path / name).exists() for name in MANIFESTS.values())
    ):
        raise ConfigError(f"{path} is not an artefact of Sartor; --replace will not delete it", "choose another --out")


def seal(part: Path, kind: Kind, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a filled directory: `facts`, the digest of every file, and the manifest's id."""
    files = {
        str(file.relative_to(part).as_posix()): {"sha256": file_digest(file), "bytes": file.stat().st_size}
        for file in sorted(part.rglob("*"))
        if file.is_file() and file.relative_to(part).as_posix() not in UNLISTED
    }
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest: dict[str, Any] = {"schema": SCHEMA, "kind": kind, "created": created, **facts, "files": files}
    manifest = json.loads(records.canonical(manifest))  # as a reader sees it: tuples become lists, keys become text
    manifest["id"] = manifest_id(manifest)
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (part / MANIFESTS[kind]).write_text(text, encoding="utf-8")
    return manifest


@overload
def write_artifact(path: Path, kind: Literal["dataset"], fill: Fill, *, replace: bool = False) -> Dataset: ...
@overload
def write_artifact(path: Path, kind: Literal["adapter"], fill: Fill, *, replace: bool = False) -> Adapter: ...
@overload
def write_artifact(path: Path, kind: Literal["report"], fill: Fill, *, replace: bool = False) -> Report: ...
@overload
def write_artifact(path: Path, kind: Kind, fill: Fill, *, replace: bool = False) -> Artifact: ...
def write_artifact(path: Path, kind: Kind, fill: Fill, *, replace: bool = False) -> Artifact:
    """Fill a new directory, write its manifest and rename it to `path`.

    fill: writes files into the path it receives and returns the facts for the manifest.
    """
    with create_output_directory(path, replace=replace) as part:
        manifest = seal(part, kind, fill(part))
    return artifact_of(path.absolute(), manifest)


@overload
def open_artifact(path: ArtifactPath, kind: Literal["dataset"], *, document: bytes | None = None) -> Dataset: ...
@overload
def open_artifact(path: ArtifactPath, kind: Literal["adapter"], *, document: bytes | None = None) -> Adapter: ...
@overload
def open_artifact(path: ArtifactPath, kind: Literal["report"], *, document: bytes | None = None) -> Report: ...
@overload
def open_artifact(path: ArtifactPath, kind: Literal["release"], *, document: bytes | None = None) -> Release: ...
@overload
def open_artifact(
    path: ArtifactPath, kind: Kind | Sequence[Kind] | None = None, *, document: bytes | None = None
) -> Artifact: ...
def open_artifact(
    path: ArtifactPath, kind: Kind | Sequence[Kind] | None = None, *, document: bytes | None = None
) -> Artifact:
    """Open an artefact of one of the given kinds (None: any) and check every listed file.

    It is a Dataset, Adapter, Report or Release; another kind is an Artifact.
    document: the manifest's bytes, if the caller has read them and verified their signature.
    Raises ArtifactError naming the difference: missing, another kind, another schema, hand-edited, truncated, extra
    file.
    """
    path = Path(path).absolute()
    kinds: Sequence[str] = [kind] if isinstance(kind, str) else kind or tuple(MANIFESTS)
    artifact = artifact_of(path, *read_manifest_document(path, kinds, document))
    _check_files(artifact)
    return artifact


def read_manifest(path: Path, kinds: Sequence[str] = tuple(MANIFESTS)) -> dict[str, Any]:
    """Return the manifest of the artefact at `path`, checked against its own id; the files are not read.

    Raises ArtifactError if there is none of these kinds, or if it is damaged, changed or of another schema.
    """
    return read_manifest_document(path, kinds)[0]


def adapter_manifest(artifact: Artifact) -> dict[str, Any]:
    """Return the manifest of an Adapter, or of the Adapter that a Release was made from; empty if it has none."""
    if artifact.kind == "adapter":
        return artifact.manifest
    file = MANIFESTS["adapter"]
    if file not in artifact.manifest["files"]:
        return {}
    manifest: dict[str, Any] = strict_json.loads((artifact.path / file).read_bytes(), takes_infinity=True)
    return manifest


def _elsewhere(path: Path, kinds: Sequence[str]) -> str:
    """Return where to look for an artefact that is not at `path`."""
    aside = replaced_versions(path.absolute()) if not path.exists() else []
    if aside:
        return f"{shlex.join(['mv', str(aside[-1]), str(path)])} brings back what a killed --replace moved aside"
    if "dataset" in kinds and path.suffix.lower() in SUFFIXES_OF_ROWS and path.is_file():
        recipe = f"sartor init {shlex.quote(str(path))}"
        return f"{recipe} writes recipes for these rows, of which sartor curate curate.yaml --out DIR makes a dataset"
    # a directory of `sartor tailor` holds its results
    within: list[Path] = []
    with suppress(OSError):
        within = [child for child in sorted(path.iterdir()) if kind_of(child) in kinds]
    if within:
        return f"one in that directory: {', '.join(map(str, within[:5]))}"
    return f"ls {shlex.quote(str(path.parent))}; sartor index DIR finds what was moved"


def read_manifest_document(
    path: Path, kinds: Sequence[str], document: bytes | None = None
) -> tuple[dict[str, Any], bytes]:
    """Return a manifest as `read_manifest` does, and the bytes from which it was parsed.

    document: as in `open_artifact`.
    """
    expected = " or ".join(kinds)
    kind = kind_of(path)
    if kind is None:
        problem = "there is nothing" if not path.exists() else "there is no artefact of Sartor"
        raise ArtifactError(f"{problem} at {path}; {_a(expected)} was expected", _elsewhere(path, kinds))
    if kind not in kinds:
        raise ArtifactError(f"{path} is {_a(kind)}, not {_a(expected)}", f"give the path of {_a(expected)}")
    file = path / MANIFESTS[kind]
    remedy = _remake_command(kind, path)
    try:
        document = file.read_bytes() if document is None else document
        # earlier versions wrote Infinity into some Adapters' manifests, which are not signed themselves
        takes_infinity = kind not in ("release", "export")
        manifest = strict_json.loads(document, max_nested=MOST_NESTED, takes_infinity=takes_infinity)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not a whole JSON manifest: {error}", remedy) from None
    if not isinstance(manifest, dict) or not _lists_files(manifest.get("files")) or manifest.get("kind") != kind:
        raise ArtifactError(f"{file} is not the manifest of {_a(kind)}", remedy)
    if manifest.get("schema") not in (SCHEMA - 1, SCHEMA):
        raise ArtifactError(
            f"{file} has schema {manifest.get('schema')}; this version of Sartor reads the schemas {SCHEMA - 1} and "
            f"{SCHEMA}",
            "open it with the version of Sartor that wrote it (`versions` in the manifest)",
        )
    try:
        identity = manifest_id(manifest)
    except (ValueError, RecursionError) as error:  # a lone surrogate, or brackets a thousand deep
        raise ArtifactError(f"{file} holds what no manifest can: {error}", remedy) from None
    if identity != manifest.get("id"):
        raise ArtifactError(
            f"{file} was changed after it was written: its content has the digest {identity[:16]}, "
            f"it says {str(manifest.get('id'))[:16]}",
            remedy,
        )
    return manifest, document


# kind -> command that makes one again
_MAKERS = {
    "dataset": "sartor curate RECIPE",
    "adapter": "sartor tune RECIPE",
    "report": "sartor evaluate ADAPTER",
    "release": "sartor release ADAPTER --name NAME --version VERSION --key KEYS",
    "export": "sartor export RELEASE --to FORM",
    "duplicates": "sartor dedup FILE...",
}


def _remake_command(kind: str, path: Path) -> str:
    """Return the commands that restore a damaged artefact: make it again, or copy a backup."""
    output = shlex.quote(str(path))
    return f"{_MAKERS[kind]} --out {output} --replace; or cp -r BACKUP/. {output}"


def _lists_files(files: Any) -> bool:
    """Return whether a manifest's `files` has the form that `seal` writes.

    A valid signature does not guarantee it: a trusted signer can write a malformed manifest.
    """
    if not isinstance(files, dict):
        return False
    for name, entry in files.items():
        # names that no system call accepts; `check_file` checks where a name leads
        if "\0" in name or any(len(part.encode("utf-8", "replace")) > 255 for part in name.split("/")):
            return False
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            return False
        if type(entry.get("bytes")) is not int:
            return False
    return True


def kind_of(path: Path) -> str | None:
    """Return the kind of a directory's artefact by its manifest's file name, or None.

    A release is tested first, since it also holds its adapter's manifest.
    """
    for kind in ("release", "dataset", "adapter", "report", "duplicates", "export"):
        if (path / MANIFESTS[kind]).is_file():
            return kind
    return None


def check_file(artifact: Artifact, name: str) -> None:
    """Check one file of an artefact against its manifest. Raises ArtifactError with the difference."""
    root, entry = artifact.path, artifact.manifest["files"][name]
    file = root / name
    remedy = _remake_command(artifact.kind, root)
    if not file.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"{root} lists {name!r}, which lies outside it", remedy)
    if not file.is_file():
        raise ArtifactError(f"{root} lacks the file {name!r}", remedy)
    if file.stat().st_size != entry["bytes"]:
        size = file.stat().st_size
        raise ArtifactError(f"{file} has {size:,} bytes; its manifest says {entry['bytes']:,}", remedy)
    if (digest := file_digest(file)) != entry["sha256"]:
        raise ArtifactError(
            f"{file} was changed: its sha256 is {digest[:16]}, its manifest says {entry['sha256'][:16]}", remedy
        )


def _check_files(artifact: Artifact) -> None:
    files, root = artifact.manifest["files"], artifact.path
    for name in files:
        check_file(artifact, name)
    allowed = set(files) | {MANIFESTS[artifact.kind]} | UNLISTED
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for folder, folder_names, file_names in os.walk(root):  # which follows no link
        for item in sorted([*folder_names, *file_names]):
            file = Path(folder, item)
            name = file.relative_to(root).as_posix()
            if file.is_symlink():
                kind, is_listed = "the link ", name in files
            elif item in folder_names:  # an empty folder with a plain name says nothing
                kind, is_listed = "the hidden folder ", name in folders or not item.startswith(".")
            else:
                kind = "the hidden file " if item.startswith(".") else ""
                is_listed = name in allowed or _HIDDEN.fullmatch(name) is not None
            if not is_listed:
                raise ArtifactError(
                    f"{root} holds {kind}{name!r}, which its manifest does not list",
                    f"mv {shlex.quote(str(file))} ELSEWHERE",
                )


def _a(kind: str) -> str:
    return f"an {kind}" if kind.startswith(("a", "e")) else f"a {kind}"


MANIFEST, WEIGHTS, CONFIG = "local.json", "adapter_model.safetensors", "adapter_config.json"


ADAPTER = "adapter_model.safetensors"


def digests(folder: Path) -> dict[str, str]:
    """Return {file: sha256} of the adapter files in a folder; empty if there are none."""
    names = [name for name in (ADAPTER, "adapter_config.json") if (folder / name).is_file()]
    return {name: file_digest(folder / name) for name in names}
