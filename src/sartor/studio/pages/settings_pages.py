"""Settings, for owners: users, keys, licences, storage, and what this machine can do.

No secret is shown but the one-time link of a user, once, in the answer to the form that made it. Users are changed
here and not by a job, since a job's journal would keep the link.
"""

from __future__ import annotations

import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import sartor
from sartor.core import signing
from sartor.core.errors import ConfigError, SartorError
from sartor.core.filesystem import tree_bytes
from sartor.core.home import home
from sartor.core.licences import compliance
from sartor.studio.accounts import Role, checked_name
from sartor.studio.page_renderer import redirect, render
from sartor.studio.pages.team_pages import FAST_S, recent_commands, teams_of
from sartor.studio.studio_folder import UPLOADS, FoundArtifact, StudioFolder, back_up
from sartor.studio.visitor import Owner, PostedForm, Studio, Visitor, studio_of, text_field

router = APIRouter()
DOCTOR, ASSETS = "doctor", "assets"
PRIVATE_KEY, PUBLIC_KEY = "sartor.key", "sartor.pub"
# folders below SARTOR_HOME that hold keys, and how deep they are looked at
KEY_FOLDERS = ("keys", "edge")
MAX_KEYS = 300
MAX_ROWS = 300
# below this many free bytes the page warns, as `sartor doctor` does
LITTLE_DISK_BYTES = 5 << 30


class UserAction(StrEnum):
    """What an owner may do to users of the studio: verbs of `sartor studio user`."""

    ADD = "add"
    CHANGE = "change"
    REMOVE = "remove"


@router.get("/settings")
def users(request: Request, visitor: Owner) -> Response:
    """Show the users, the language, backups and the version."""
    return _users_page(request, visitor)


def _users_page(request: Request, visitor: Visitor, *, link: str = "", invited: str = "") -> Response:
    studio = studio_of(request)
    return render(
        request,
        visitor,
        "settings",
        users=studio.accounts.list_users(),
        roles=list(Role),
        link=link,
        invited=invited,
        root=studio.folder.root,
        version=sartor.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        add_arguments=["studio", "user", "add", "NAME", "--role", "reviewer", "--folder", str(studio.folder.root)],
        backup_arguments=["studio", "backup", "studio.zip", "--folder", str(studio.folder.root)],
        restore_arguments=["studio", "restore", "studio.zip", "--folder", str(studio.folder.root)],
    )


@router.post("/settings/users")
def change_users(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Add a user or make them a new link, change a role, or remove a user. The link is shown in this answer alone."""
    accounts = studio_of(request).accounts
    action, name = text_field(form, "action"), checked_name(text_field(form, "name"))
    if action == UserAction.REMOVE:
        if not text_field(form, "sure"):
            raise ConfigError(f"{name} was not removed", "tick the box beside the name, then remove")
        accounts.remove_user(name)
        return redirect(request, "/settings")
    if action not in list(UserAction):
        raise ConfigError(f"there is no action {action[:40]!a}", f"one of {', '.join(UserAction)}")
    role = _role(text_field(form, "role"))
    if action == UserAction.CHANGE:
        accounts.change_role(name, role)
        return redirect(request, "/settings")
    path = f"{request.scope.get('root_path', '')}/welcome/{accounts.add_user(name, role)}"
    return _users_page(request, visitor, link=f"{request.url.scheme}://{request.url.netloc}{path}", invited=name)


def _role(text: str) -> Role:
    if text not in list(Role):
        raise ConfigError(f"there is no role {text[:40]!a}", f"one of {', '.join(Role)}")
    return Role(text)


@router.post("/settings/backup")
def download_backup(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Send a backup of users, roles and settings, as `sartor studio backup` writes it."""
    folder = studio_of(request).folder
    with tempfile.TemporaryDirectory(dir=folder.hidden) as scratch:
        file = Path(scratch) / "studio.zip"
        back_up(folder, file)
        content = file.read_bytes()
    name = f"studio-{time.strftime('%Y-%m-%d', time.gmtime())}.zip"
    return Response(
        content, media_type="application/zip", headers={"content-disposition": f'attachment; filename="{name}"'}
    )


@dataclass(frozen=True)
class KeyRow:
    """A key file, without its content.

    place: below the folder, or below SARTOR_HOME. id, purposes: of the public key beside it; empty if there is none.
    mode: of the file, octal; is_exposed: whether others may read a private key. made_at: Unix time, s.
    """

    place: str
    id: str
    purposes: Sequence[str]
    mode: str
    is_private: bool
    is_encrypted: bool
    is_exposed: bool
    made_at: float
    problem: str = ""


@dataclass(frozen=True)
class TeamKeys:
    """API keys of a team, as `sartor agents key --list` has them, and the files of its state directory."""

    name: str
    keys: Sequence[Mapping[str, Any]]
    files: Sequence[KeyRow]
    problem: str = ""


@router.get("/settings/keys")
def keys(request: Request, visitor: Owner) -> Response:
    """Show the keys: what they are for, where they are, and who could read them."""
    studio = studio_of(request)
    return render(
        request,
        visitor,
        "settings_keys",
        keys=list(_signing_keys(studio.folder)),
        trusted=[_key_row(studio.folder, file) for file in _key_files(home() / "trusted", "*.pub")],
        revoked=[_key_row(studio.folder, file) for file in _key_files(home() / "revoked", "*.pub")],
        teams=[_team_keys(studio, name, file) for name, file in teams_of(studio).items() if file.is_file()],
        home=home(),
    )


def _signing_keys(folder: StudioFolder) -> Iterator[KeyRow]:
    """Yield the private keys below SARTOR_HOME and below the folder."""
    files = [file for name in KEY_FOLDERS for file in _key_files(home() / name, f"**/{PRIVATE_KEY}")]
    files += [path / PRIVATE_KEY for path in folder.walk() if (path / PRIVATE_KEY).is_file()]
    for file in files[:MAX_KEYS]:
        yield _key_row(folder, file)


def _key_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))[:MAX_KEYS] if folder.is_dir() else []


def _key_row(folder: StudioFolder, file: Path) -> KeyRow:
    is_private = file.suffix == ".key"
    public = file.with_name(PUBLIC_KEY) if is_private else file
    identity, purposes, problem = "", list[str](), ""
    try:
        if public.is_file():
            key = signing.open_public(public)
            identity, purposes = signing.key_id(key), [str(purpose) for purpose in sorted(key.purposes)]
        status = file.stat()
        is_encrypted = is_private and b"ENCRYPTED PRIVATE KEY" in file.read_bytes()
    except (SartorError, OSError) as error:
        problem = error.problem if isinstance(error, SartorError) else str(error.strerror)
        return KeyRow(_place(folder, file), identity, purposes, "", is_private, False, False, 0.0, problem)
    return KeyRow(
        place=_place(folder, file),
        id=identity,
        purposes=purposes,
        mode=f"{stat.S_IMODE(status.st_mode):03o}",
        is_private=is_private,
        is_encrypted=is_encrypted,
        is_exposed=is_private and bool(status.st_mode & 0o077),
        made_at=status.st_mtime,
    )


def _place(folder: StudioFolder, file: Path) -> str:
    if file.is_relative_to(home()):
        return f"SARTOR_HOME/{file.relative_to(home())}"
    return folder.name_of(file) or str(file)


def _team_keys(studio: Studio, name: str, file: Path) -> TeamKeys:
    try:
        overview = sartor.team_overview(file, events=1)
    except SartorError as error:
        return TeamKeys(name, [], [], error.problem)
    files = [_key_row(studio.folder, path) for path in _key_files(Path(overview.state), "**/*.key")]
    return TeamKeys(name, overview.keys, files)


@dataclass(frozen=True)
class LicenceRow:
    """What Sartor knows of a licence. uses: permitted ones; objection: why commercial use is not, empty if it is."""

    name: str
    kind: str
    licence: str
    uses: Sequence[str]
    objection: str = ""
    page: str = ""


@router.get("/settings/licences")
def licences(request: Request, visitor: Owner) -> Response:
    """Show the licences of artefacts, of the bases that they were tuned from, of agents and of installed assets."""
    studio = studio_of(request)
    artifacts, _ = studio.folder.scan()
    rows = [row for found in artifacts[:MAX_ROWS] for row in _licence_rows(found)]
    for name, file in teams_of(studio).items():
        try:
            versions = sartor.team_overview(file, events=1).versions if file.is_file() else {}
        except SartorError:
            continue
        for version, entry in versions.items():
            licence = str(entry.facts.get("licence", "")) or "NOASSERTION"
            rows.append(_licence_row(version, "agent", [{"source": name, "licence": licence}]))
    for name, asset in sartor.assets().items():
        if asset.is_installed:
            rows.append(_licence_row(name, "asset", [{"source": name, "licence": asset.licence}]))
    rows = list(dict.fromkeys(rows))
    return render(request, visitor, "settings_licences", rows=rows[:MAX_ROWS], total=len(rows))


def _licence_rows(found: FoundArtifact) -> Iterator[LicenceRow]:
    """Yield the licence of an artefact, and of its base if it has one."""
    if found.artifact is None:
        return
    manifest = found.artifact.manifest
    base = manifest.get("base")
    own = [{"source": found.name, "licence": found.artifact.licence}]
    try:
        sources = compliance.made_from(manifest) or own
        yield _licence_row(found.name, found.kind, sources, found.artifact.licence)
        if isinstance(base, dict) and base.get("licence"):
            yield _licence_row(str(base["name"]), "base", [{"source": str(base["name"]), "licence": base["licence"]}])
    except (KeyError, TypeError, AttributeError):
        yield _licence_row(found.name, found.kind, own)


def _licence_row(name: str, kind: str, sources: Sequence[Mapping[str, Any]], licence: str = "") -> LicenceRow:
    """Return what Sartor knows of the licence of what was made of some sources."""
    licence = licence or str(sources[0]["licence"])
    try:
        uses = tuple(compliance.permitted(sources))
        objections = [str(item) for item in compliance.objections(sources)] + compliance.conflicts(sources)
    except SartorError as error:
        return LicenceRow(name, kind, licence, (), error.problem)
    return LicenceRow(name, kind, licence, uses, "; ".join(objections[:3]))


@router.get("/settings/storage")
def storage(request: Request, visitor: Owner) -> Response:
    """Show what fills the disk, and what can be removed."""
    studio = studio_of(request)
    folder = studio.folder
    artifacts, is_whole = folder.scan()
    sizes = [(found, tree_bytes(folder.root / found.name)) for found in artifacts]
    sizes.sort(key=lambda item: -item[1])
    cache = [(path.name, tree_bytes(path)) for path in sorted(home().iterdir()) if path.is_dir()]
    disks = {str(path): shutil.disk_usage(path) for path in (folder.root, home())}
    commands = recent_commands(studio, ASSETS, home())
    return render(
        request,
        visitor,
        "settings_storage",
        sizes=sizes[:MAX_ROWS],
        is_whole=is_whole,
        total=sum(size for _, size in sizes),
        uploads=tree_bytes(folder.root / UPLOADS),
        own=tree_bytes(folder.hidden),
        cache=sorted(((name, size) for name, size in cache if size), key=lambda item: -item[1]),
        disks=disks,
        little=LITTLE_DISK_BYTES,
        assets=sartor.prune(dry_run=True),
        everything=sartor.prune(cache=True, dry_run=True),
        commands=commands,
        refresh_s=FAST_S if any(not status.state.is_over for status in commands) else 0,
        home=home(),
    )


@router.post("/settings/storage")
def prune(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Remove what is not needed from SARTOR_HOME, after the heavy jobs before it: they may use it."""
    assert visitor.user is not None
    studio = studio_of(request)
    arguments = [ASSETS, "prune", *(["--cache"] if text_field(form, "cache") else [])]
    studio.jobs.start(
        arguments, title="assets prune", by=visitor.user.name, cwd=studio.folder.root, out=str(home()), is_heavy=True
    )
    return redirect(request, "/settings/storage")


@router.get("/settings/doctor")
def doctor(request: Request, visitor: Owner) -> Response:
    """Show what this machine can do, as `sartor doctor` found last."""
    studio = studio_of(request)
    commands = recent_commands(studio, DOCTOR, studio.folder.root)
    done = next((status for status in commands if status.state.is_over and "advice" in status.result), None)
    return render(
        request,
        visitor,
        "settings_doctor",
        commands=commands,
        done=done,
        found=done.result if done else {},
        refresh_s=FAST_S if any(not status.state.is_over for status in commands) else 0,
    )


@router.post("/settings/doctor")
def examine(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Start `sartor doctor`."""
    assert visitor.user is not None
    studio = studio_of(request)
    root = studio.folder.root
    studio.jobs.start([DOCTOR], title=DOCTOR, by=visitor.user.name, cwd=root, out=str(root), is_heavy=False)
    return redirect(request, "/settings/doctor")
