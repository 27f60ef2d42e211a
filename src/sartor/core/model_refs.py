"""Resolver of base and tower names to files and digests.

A base is an offline asset (`starter`, `whisper-tiny-en`), a GGUF file (both are converted once by `models/base.py`), a
local directory in transformers' layout, or the name of a model on the Hugging Face hub. Its digest is the same on
every machine. For an asset or a GGUF file it covers the file and the converter's version; for the others, the weight,
tokenizer and config files.

A tower is the frozen encoder of images or audio in a composed base. It is an offline asset (converted once by
`models/towers`), or a directory or hub name in transformers' layout, like a base.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from sartor.core import assets, gguf_header
from sartor.core.artifacts import kind_of
from sartor.core.errors import ConfigError, ExtraError, HubError, ModelError, missing_package
from sartor.core.filesystem import file_digest
from sartor.core.home import folder, home
from sartor.core.licences.spdx import UNKNOWN
from sartor.core.records import digest
from sartor.core.remedies import restore_command

STARTER, WHISPER = "starter", "whisper-tiny-en"
# increased when `models/base.py` writes other bytes for the same asset: adapters bind to the digest
CONVERTER_VERSION = 1
_FILES = re.compile(r"(.*\.safetensors|.*\.json|tokenizer.*|vocab.*|merges\.txt|.*\.jinja|.*\.model)$")
# an export's receipt states the digest of the base that it forms, so that digest cannot include it
_NOT_OF_IT = {"parity.json"}
# name in model cards -> SPDX id
HUB_LICENCES = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc-by-4.0": "CC-BY-4.0", "bsd-3-clause": "BSD-3-Clause"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class BaseRef:
    """A resolved base: its location and identity.

    path: may be absent for an asset or a GGUF file that is not converted yet.
    gguf: the GGUF file, if the base is one.
    """

    name: str
    path: Path
    digest: str
    licence: str
    gguf: Path | None = None

    @property
    def is_converted(self) -> bool:
        """Whether `path` is converted from an asset or a GGUF file."""
        return self.gguf is not None or self.name in (STARTER, WHISPER)

    @property
    def short_digest(self) -> str:
        """First 12 digits of the digest, for messages."""
        return self.digest[:12]


def locate_base(name: str, revision: str = "", licence: str = "", *, option: str = "base") -> BaseRef:
    """Return the base with this name.

    licence: overrides the licence that the base's own files state. option: that names the base, for remedies: an
    option of a recipe, a command that takes the base as its argument, or `--base` of a command that needs the very
    base of an artefact.
    Raises ModelError for a directory or file without a usable model, HubError if a hub name cannot be fetched, and
    ConfigError for a revision of a base that has none.
    """
    if revision and (name in (STARTER, WHISPER) or Path(name).expanduser().exists()):
        problem = f"base.revision is {revision!r}, and {name} has no revisions: it is no model of the hub"
        raise ConfigError(problem, "leave base.revision out, or name a hub model (owner/model)")
    if name in (STARTER, WHISPER):
        entry = assets.entry(name)
        identity = digest({"asset": [file.sha256 for file in entry.files], "converter": CONVERTER_VERSION})
        return BaseRef(
            name, path=folder("bases") / f"{name}-{identity[:12]}", digest=identity, licence=licence or entry.licence
        )
    if not name:
        raise ModelError("there is no base '': the name is empty", _another_base(option, name))
    path = Path(name).expanduser()
    if path.is_dir():
        return _local(str(path.absolute()), path.absolute(), licence)
    if path.is_file():
        return _from_gguf(path.absolute(), licence)
    if not _HUB_NAME.match(name) or name.startswith((".", "/", "~")):
        raise ModelError(
            f"there is no base {name!r}: it is not `starter`, not a directory or GGUF file, and not a hub name "
            "(owner/model)",
            _another_base(option, name),
        )
    return _local(name, _from_hub(name, revision, option), licence)


def _another_base(option: str, name: str) -> str:
    """Return the remedy for a base that is not there. option: as in `locate_base`."""
    if option != "--base":
        return f"{option} starter" if " " in option else f"{option}: starter"
    back = f"put that base back as {name}; or " if name else ""
    return f"{back}--base DIR, with the base that it was tuned on, where the command has --base"


def source_gguf(ref: BaseRef) -> Path:
    """Return the GGUF file of a starter or GGUF base, fetching the asset if it is absent."""
    return ref.gguf or assets.install(STARTER) / assets.entry(STARTER).paths[0]


def _local(name: str, path: Path, licence: str) -> BaseRef:
    if (kind := kind_of(path)) not in (None, "export"):
        raise ModelError(
            f"{path} is a Sartor {kind}, not a base",
            f"give the base that it was made from: sartor inspect {shlex.quote(str(path))}",
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json, so it is no model in transformers' layout",
            f"ls {shlex.quote(str(path))}; a base is a directory with config.json, a GGUF file, a hub name or starter",
        )
    if not list(path.glob("*.safetensors")):
        pickled = [*path.glob("*.bin"), *path.glob("*.pth"), *path.glob("*.pt")]
        weights = (
            f"only pickled weights ({pickled[0].name}), which can run code when read" if pickled else "no weights"
        )
        raise ModelError(f"{path} holds {weights}", "save the model with safetensors (`save_pretrained` does)")
    return BaseRef(name, path=path, digest=files_digest(path), licence=licence or _stated_licence(path))


def _from_gguf(file: Path, licence: str) -> BaseRef:
    """Resolve a GGUF file; its digest covers its bytes and the converter's version."""
    if not gguf_header.is_gguf(file):
        raise ModelError(
            f"the base {file} is a file, not a directory, and no GGUF file",
            "give a directory with config.json and *.safetensors, or a GGUF file",
        )
    stated_licence = _spdx(gguf_header.read_head(file).metadata.get("general.license"))
    identity = gguf_digest(remembered_digest(file))
    stem = re.sub(r"[^\w.-]", "-", file.stem)
    return BaseRef(
        str(file),
        path=folder("bases") / f"{stem}-{identity[:12]}",
        digest=identity,
        licence=licence or stated_licence,
        gguf=file,
    )


def gguf_digest(sha256: str) -> str:
    """Return the digest of the base in a GGUF file with this sha256."""
    return digest({"gguf": sha256, "converter": CONVERTER_VERSION})


def files_digest(path: Path) -> str:
    """Return the sha256 over the names and digests of the files of a base.

    Digests of large files are cached by `remembered_digest`.
    """
    candidates = (file for file in path.iterdir() if _FILES.match(file.name) and file.name not in _NOT_OF_IT)
    files = sorted(file for file in candidates if file.is_file())
    return digest([[file.name, remembered_digest(file)] for file in files])


def remembered_digest(file: Path) -> str:
    """Return the sha256 of a file, cached in SARTOR_HOME/digests.sqlite.

    The cache entry holds until the file's inode, size, mtime or ctime changes. Files below 1 MiB are not cached. A
    cache that others can write to is not believed. Not detected: a change by whoever can set the machine's clock.
    """
    stat = file.stat()
    if stat.st_size < 1 << 20:
        return file_digest(file)
    # changed just now: a second change could fall into the same clock tick, of up to 2 s on FAT and some NFS servers
    if abs(time.time() - stat.st_ctime) < 2:
        return file_digest(file)
    # ctime is in the key because a program can reset mtime but not ctime
    key = f"{file.resolve()}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    with (
        contextlib.suppress(sqlite3.Error, OSError),
        contextlib.closing(sqlite3.connect(_private_store(), timeout=30)) as connection,
        connection,
    ):
        connection.execute("create table if not exists digests (key text primary key, sha256 text)")
        row = connection.execute("select sha256 from digests where key = ?", (key,)).fetchone()
        sha256 = str(row[0]) if row else file_digest(file)
        connection.execute("insert or replace into digests values (?, ?)", (key, sha256))
        return sha256
    return file_digest(file)


def _private_store() -> Path:
    """Return the cache of digests, which nobody else can write to; one that others can is made anew.

    Raises OSError if it belongs to another user than root.
    """
    file = home() / "digests.sqlite"
    if os.name != "posix":
        return file
    with contextlib.suppress(FileNotFoundError):
        stat = file.lstat()
        if stat.st_uid not in (0, os.getuid()):
            raise PermissionError(f"{file} is another user's")
        if stat.st_mode & 0o022:
            file.unlink()
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    return file


def chat_template(path: Path) -> str:
    """Return the chat template in a base's directory; empty if it has none."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path / name).is_file():
            template = _template_in(path / name)
            if template:
                return template
    return ""


def _template_in(file: Path) -> str:
    try:
        template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, list):  # several named templates: transformers uses the one named default
            template = {item["name"]: item["template"] for item in template}.get("default")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is not a whole JSON file of a tokenizer: {error}", restore_command(file)) from None
    return str(template or "")


def template_digest(template: str) -> str:
    """Return the sha256 of a chat template's text."""
    return hashlib.sha256(template.encode()).hexdigest()


def _stated_licence(path: Path) -> str:
    """Return the licence in the front matter of a model card; NOASSERTION without one."""
    card = path / "README.md"
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        fields = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:
        fields = None
    licence = fields.get("license") if isinstance(fields, dict) else None
    if licence == "other" and isinstance(fields, dict):  # the card then names it in a separate field
        licence = fields.get("license_name") or licence
    return _spdx(licence[0] if isinstance(licence, list) and len(licence) == 1 else licence)


def _spdx(licence: object) -> str:
    """Return a stated licence in SPDX spelling; NOASSERTION if none is stated."""
    if isinstance(licence, str) and licence.strip():
        return HUB_LICENCES.get(licence.strip().lower(), licence.strip())
    return UNKNOWN


def _from_hub(name: str, revision: str, option: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing_package("huggingface_hub", "tune") from None
    patterns = [
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.model",
        "*.txt",
        "README.md",
        "LICENSE*",
        "NOTICE*",
        "USE_POLICY*",
    ]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (ExtraError, KeyboardInterrupt):
        raise
    except Exception as error:  # the client raises a dozen types: offline, no such model, gated, full disk
        offline = os.environ.get("HF_HUB_OFFLINE") or "onnection" in str(error) or "offline" in str(error).lower()
        reason = "the hub cannot be reached" if offline else f"{type(error).__name__}: {str(error).splitlines()[0]}"
        remedy = f"{_another_base(option, name)} works offline; or download the model elsewhere and give its directory"
        if option == "--base":
            remedy = f"hf download {name} where the hub can be reached; or --base DIR, where the command has --base"
        raise HubError(
            f"the base {name!r} could not be fetched from the Hugging Face hub: {reason}",
            remedy,
        ) from None


Modality = Literal["image", "audio"]
# increased when `models/towers` computes other features from the same weights: features are cached by the digest
FEATURES_VERSION = 1
ASSETS: dict[str, Modality] = {"efficientnet-lite0": "image", "whisper-tiny-en": "audio"}
# transformers' model_type -> modality that it reads
MODEL_TYPES: dict[str, Modality] = {
    "whisper": "audio",
    "clip": "image",
    "clip_vision_model": "image",
    "siglip": "image",
    "siglip_vision_model": "image",
    "dinov2": "image",
}
# The only metadata key of an adapter's projectors: the towers that they read; the suffix is the format's version.
# There is one key because the writer's order of several is arbitrary, and equal adapters must be equal files.
TOWERS_KEY = "towers.1"


@dataclass(frozen=True)
class TowerRef:
    """A resolved tower: its location and identity.

    path: may be absent for an asset that is not converted yet.
    digest: digest of the weight files and FEATURES_VERSION, which determine the features.
    model: name of the asset, or transformers' model_type.
    """

    name: str
    path: Path
    digest: str
    licence: str
    modality: Modality
    model: str

    @property
    def is_asset(self) -> bool:
        """Whether `path` is converted from an asset."""
        return self.model in ASSETS


def locate_tower(name: str, kind: Modality | None = None, licence: str = "") -> TowerRef:
    """Return the tower with this name.

    licence: overrides the licence that the tower's own files state.
    Raises ModelError if it is not a supported tower, or not one of `kind`; HubError if a hub name cannot be fetched.
    """
    ref = _located(name, licence)
    if kind and ref.modality != kind:
        fitting = " or ".join(asset for asset, modality in ASSETS.items() if modality == kind)
        raise ModelError(
            f"the tower {name} takes in {ref.modality}, and is asked for as one of {kind}", f"{kind}: {fitting}"
        )
    return ref


def _located(name: str, licence: str) -> TowerRef:
    if name in ASSETS:
        entry = assets.entry(name)
        identity = digest({"asset": [file.sha256 for file in entry.files], "features": FEATURES_VERSION})
        path = folder("towers") / f"{name}-{identity[:12]}"
        return TowerRef(
            name, path=path, digest=identity, licence=licence or entry.licence, modality=ASSETS[name], model=name
        )
    path = Path(name).expanduser()
    if (
        not name
        or not path.is_dir()
        and not (_HUB_NAME.match(name) and not path.exists() and not name.startswith("."))
    ):
        raise ModelError(
            f"there is no tower {name!r}: it is none of the assets, no directory, and no hub name (owner/model)",
            f"one of {', '.join(ASSETS)}, or a directory with config.json and *.safetensors",
        )
    base = locate_base(name, licence=licence)
    model_type = _model_type(base.path)
    if model_type not in MODEL_TYPES:
        raise ModelError(
            f"{name} is a model of the type {model_type!r}, which is no tower that is known here",
            f"one of {', '.join(ASSETS)}, or a model of a type of {', '.join(MODEL_TYPES)}",
        )
    identity = digest({"files": base.digest, "features": FEATURES_VERSION})
    return TowerRef(
        base.name,
        path=base.path,
        digest=identity,
        licence=base.licence,
        modality=MODEL_TYPES[model_type],
        model=model_type,
    )


def _model_type(path: Path) -> str:
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{path / 'config.json'} is no config of a model: {error}", restore_command(path / "config.json")
        ) from None
