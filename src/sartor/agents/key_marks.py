"""Marks that a team had API keys, so that a server whose keys are lost refuses everybody instead of answering everybody.

There are two, and each is enough: an event in the registry's log, which outlives the table of keys and is shared by all servers
of the team, and a file in the state directory, which outlives the registry.
"""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from sqlalchemy import Connection, select

from sartor.agents import tables
from sartor.agents.people.book import note
from sartor.agents.registry import Cause
from sartor.core.database import is_whole
from sartor.core.filesystem import fsync_directory

KEYED, UNKEYED = "keys asked for", "keys removed"
FILE = "keyed"
_TEXT = "This team has had API keys: its server answers nobody without one. sartor agents key --remove-all takes that back.\n"


def read_mark(connection: Connection) -> str:
    """Return KEYED or UNKEYED, whichever the registry's log says last, or "" where it says neither."""
    column = tables.events.c
    query = select(tables.events).where(column.agent == "", column.what.in_((KEYED, UNKEYED))).order_by(column.id.desc())
    row = connection.execute(query.limit(1)).mappings().first()
    if row is None:
        return ""
    is_unkeyed = row["what"] == UNKEYED and is_whole({name: value for name, value in row.items() if name != "id"})
    return UNKEYED if is_unkeyed else KEYED


def write_mark(connection: Connection, mark: str, why: str) -> None:
    """Write a mark into the registry's log, in the transaction of the change that it is about."""
    note(connection, mark, "", "", Cause(_user(), why), {})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""


def has_file(state: Path | None) -> bool:
    """Whether the state directory says that there were keys. What cannot be looked at counts as a yes."""
    if state is None:
        return False
    try:
        (state / FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def write_file(state: Path | None) -> None:
    """Put the file into the state directory, so that it survives a power cut. Raises OSError."""
    if state is None or has_file(state):
        return
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / FILE).open("w", encoding="utf-8") as file:
        file.write(_TEXT)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(state)


def remove_file(state: Path | None) -> None:
    """Take the file out of the state directory. Raises OSError."""
    if state is None or not has_file(state):  # the directory may not be there either
        return
    (state / FILE).unlink(missing_ok=True)
    fsync_directory(state)
