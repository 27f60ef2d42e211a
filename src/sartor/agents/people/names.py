"""Who a person is to a team: the keyed digest of the id that a client sends as `user`. The id itself is never written.

The same digest stands in the inbox (`Feedback.by`), in the registry, in receipts and in names of folders.
"""

from __future__ import annotations

from pathlib import Path

from sartor.agents.receipt_content import Digest
from sartor.core.errors import ConfigError, RequestError

SUFFIX = "+personal"
ANYBODY = "*"
MOST_CHARACTERS = 256
FOLDER, ADAPTER = "people", "adapter"
# locked beside an agent's folder of a person while they are tuned for, or forgotten
TUNING = "tuning"


def person_of(user: str, digest: Digest) -> str:
    """64 hex digits for a user's id, "" for none. Raises RequestError for one that is too long."""
    if len(user) > MOST_CHARACTERS:
        raise RequestError(f"the user's id has {len(user)} characters; the limit is {MOST_CHARACTERS}", "a shorter id")
    return digest("user", user)


def named(user: str, digest: Digest) -> str:
    """`person_of` for who must name somebody. Raises ConfigError for an empty id."""
    if not user or len(user) > MOST_CHARACTERS:
        raise ConfigError(f"{user[:40]!r} cannot be a user's id", f"--user ID, of 1 to {MOST_CHARACTERS} characters")
    return person_of(user, digest)


def folder_of(state: Path, person: str, agent: str = "") -> Path:
    """Where everything of a person stands, or what belongs to one agent."""
    folder = state / FOLDER / person
    return folder / agent if agent else folder


def is_personal(path: Path, state: Path) -> bool:
    """Whether a directory is that of a personal adapter of this team."""
    return path.absolute().is_relative_to((state / FOLDER).absolute())
