"""Commands: studio, and its users and backups."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from sartor.cli.app import AS_JSON, app, notice
from sartor.core.errors import ConfigError, missing_package
from sartor.core.lazy_import import import_module

# path of the studio below a server of agents
MOUNT = "/studio"
PORT = 8765
HERE = Path()

studio_group = App(
    name="studio", help="Web pages: look at rows, start jobs, compare base and tuned, talk to the result."
)
app.command(studio_group)
user_group = App(name="user", help="The studio's users.")
studio_group.command(user_group)


def studio_app(
    folder: Path, *, hosts: Collection[str] = (), max_upload_mb: int = 512, team: Path | None = None
) -> Any:
    """Return the studio's ASGI application. Raises ExtraError without the extra `studio`.

    team: what the server serves that shows the studio; None for a studio that stands alone.
    """
    for package in ("fastapi", "httpx", "python_multipart", "uvicorn"):
        if find_spec(package) is None:
            raise missing_package(package, "studio")
    module = import_module("sartor.studio.studio_app")
    return module.StudioApp(folder, hosts=hosts, max_upload_bytes=max_upload_mb << 20, team=team)


@studio_group.default
def studio(
    folder: Path = HERE,
    *,
    port: int = PORT,
    host: str = "127.0.0.1",
    hosts: tuple[str, ...] = (),
    max_upload_mb: int = 512,
) -> None:
    """Show the studio's pages of a folder until SIGTERM or Ctrl-C.

    One line on stdout states the address. At the first start a second one has a link by which the owner chooses a
    password; it works once, within a day. Jobs that were started go on without the studio.

    Args:
        folder: where your artefacts are; everything below it is shown to users of the studio
        port: 0 takes a free one
        host: address to listen on; beyond this machine only behind a proxy with TLS
        hosts: names by which browsers ask it, beside this machine's, if a proxy stands before it; also several
        max_upload_mb: largest file that is taken, in MiB
    """
    with contextlib.closing(studio_app(folder, hosts=[host, *hosts], max_upload_mb=max_upload_mb)) as pages:
        http = import_module("sartor.studio.studio_server")
        if not http.is_local(host):
            notice(f"warning: others can reach {host}, and passwords cross the network in the clear: put TLS in front")
        try:
            server = http.StudioServer(pages, host, port)
            _ready(server.address, pages.owner_path())
            asyncio.run(server.serve())
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def _ready(address: str, owner_path: str) -> None:
    facts = {"address": address, **({"owner_link": f"{address}{owner_path}"} if owner_path else {})}
    if AS_JSON.get():
        print(json.dumps(facts), flush=True)
        return
    print(f"listening on {address}", flush=True)
    if owner_path:
        print(f"the owner begins at {address}{owner_path}", flush=True)


def _accounts(folder: Path) -> Any:
    found = import_module("sartor.studio.studio_folder").StudioFolder(folder)
    return contextlib.closing(import_module("sartor.studio.accounts").Accounts(found.accounts_file))


@user_group.command(name="add")
def user_add(
    name: str, *, role: Literal["viewer", "reviewer", "owner"] = "viewer", folder: Path = HERE
) -> dict[str, Any]:
    """Add a user, or change a user's role; print the path of a link by which they choose a password.

    The link works once, within a day. Open it below the studio's address.

    Args:
        name: of the user
        role: viewers look; reviewers also decide and talk; owners also start jobs
        folder: of the studio
    """
    with _accounts(folder) as accounts:
        token = accounts.add_user(name, import_module("sartor.studio.accounts").Role(role))
    return {"user": name.strip(), "role": role, "link": f"/welcome/{token}"}


@user_group.command(name="list")
def user_list(*, folder: Path = HERE) -> dict[str, Any]:
    """List the users with their roles.

    Args:
        folder: of the studio
    """
    with _accounts(folder) as accounts:
        rows = [
            {"name": user.name, "role": user.role.value, "has_password": user.has_password}
            for user in accounts.list_users()
        ]
    return {"users": rows}


@user_group.command(name="remove")
def user_remove(name: str, *, folder: Path = HERE) -> dict[str, Any]:
    """Remove a user; their sessions end at once.

    Args:
        name: of the user
        folder: of the studio
    """
    with _accounts(folder) as accounts:
        accounts.remove_user(name)
    return {"removed": name}


@studio_group.command
def backup(file: Path, *, folder: Path = HERE) -> Any:
    """Write the studio's users, roles and settings to a file; sessions are left out.

    Args:
        file: the new ZIP file, which its owner alone can read
        folder: of the studio
    """
    module = import_module("sartor.studio.studio_folder")
    return module.back_up(module.StudioFolder(folder), file)


@studio_group.command
def restore(file: Path, *, folder: Path = HERE) -> Any:
    """Replace the studio's users, roles and settings by those of a backup; everybody logs in again.

    Args:
        file: that `sartor studio backup` wrote
        folder: of the studio
    """
    if not file.is_file():
        raise ConfigError(f"there is no file {file}", "sartor studio backup FILE writes one")
    module = import_module("sartor.studio.studio_folder")
    return module.restore(module.StudioFolder(folder), file)
