"""Data that a team holds about a user, and the search for it.

A text is searched by pieces of it, one from each word on, so that a part of it is found too. Each piece is searched in
UTF-8, in UTF-16, and as JSON, HTML and XML spell it, in files as they are, in the columns of Parquet and Arrow files
and in what compressed files unfold into (`packed_contents.py`). Texts of under `LEAST` characters do not show whose
they are, nor do those that others have written too: both are counted. Words that also stand in an artefact that was
not made from this team's state ("switch on the light" in a public data set) are distinguished by that artefact's
sources.
"""

from __future__ import annotations

import getpass
import html
import json
import mmap
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.artifacts import MANIFESTS, kind_of
from sartor.core.errors import ConfigError, MissingError
from sartor.core.lineage.receipt_index import PATTERN
from sartor.learn.packed_contents import HEAD_BYTES, is_packed, unpacked
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.commands.agent_commands import CommandRows
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.receipts import lines_with, team_digest
from sartor.serving.registry.registry import ChangeCause, Registry, Snapshot
from sartor.serving.registry.user_versions import (
    ANYBODY,
    UserVersion,
    UserVersionStore,
    required_user_digest,
    speakers,
)
from sartor.serving.team_config import Team, load

LEAST, PIECE = 12, 32  # characters
_WORD, _BLOCK = 8, 1 << 24
# most bytes of a piece as JSON spells it: \\ud83d\\ude00 for a character
_LONGEST = 12 * PIECE


class SearchTerms:
    """Texts to search for, except those that others have written; any number of them costs one pass.

    texts: number of texts searched for.
    too_short: number of texts under LEAST characters.
    said_by_others: number of texts that others have written too.
    """

    def __init__(self, texts: Iterable[str], others: Iterable[str] = ()) -> None:
        unique, others_text = {text.strip() for text in texts} - {""}, "\0".join(others)
        long_texts = [text for text in unique if len(text) >= LEAST]
        self.texts = 0
        windows: set[bytes] = set()
        for text in long_texts:
            pieces = [piece for piece in _pieces(text) if piece not in others_text]
            self.texts += bool(pieces)
            for piece in pieces:
                # as the files of Sartor encode it
                spelled = {
                    piece,
                    json.dumps(piece)[1:-1],
                    json.dumps(piece, ensure_ascii=False)[1:-1],
                    html.escape(piece),
                    html.escape(piece, quote=False),
                }
                windows |= {item.encode("utf-8", "replace") for item in spelled}
                windows.add(piece.encode("utf-16-le", "replace"))
        self.too_short, self.said_by_others = len(unique) - len(long_texts), len(long_texts) - self.texts
        self._windows: dict[int, list[bytes]] = {}
        for window in windows:
            self._windows.setdefault(int.from_bytes(window[:_WORD], "little"), []).append(window)
        self._heads: NDArray[np.uint64] = np.sort(np.fromiter(self._windows, np.uint64, len(self._windows)))

    def are_in(self, data: Any) -> bool:
        """Return whether one of the texts is in these bytes (anything with a buffer)."""
        if not len(self._heads):
            return False
        view = memoryview(data).cast("B")
        return any(
            self._begin_in(view[start : start + _BLOCK + _LONGEST]) for start in range(0, max(len(view), 1), _BLOCK)
        )

    def _begin_in(self, view: memoryview) -> bool:
        for offset in range(min(_WORD, len(view))):
            words = np.frombuffer(view, "<u8", (len(view) - offset) // _WORD, offset)
            indices = np.minimum(np.searchsorted(self._heads, words), len(self._heads) - 1)
            for hit in np.flatnonzero(self._heads[indices] == words):
                start = int(hit) * _WORD + offset
                if any(view[start : start + len(window)] == window for window in self._windows[int(words[hit])]):
                    return True
        return False


def _pieces(text: str) -> Iterator[str]:
    """Yield the pieces that begin at each word of a text, and at every PIECE characters.

    A piece has at most PIECE characters and at least LEAST.
    """
    starts = [index for index in range(len(text)) if index % PIECE == 0 or text[index - 1].isspace()]
    yield from {piece for start in starts if len(piece := text[start : start + PIECE]) >= LEAST}


@dataclass(frozen=True)
class ScanResult:
    """Result of a search.

    files, bytes: amount searched.
    found: files with the words.
    same_words: files of artefacts that have the words from elsewhere.
    unread: file -> reason why it could not be searched.
    """

    files: int
    bytes: int
    found: list[str] = field(default_factory=list)
    same_words: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)


def search(
    needles: SearchTerms,
    folders: Collection[Path],
    left_out: Collection[Path],
    state: Path,
    made_of_it: Collection[Path] = (),
) -> ScanResult:
    """Search every file below these folders, but not below `left_out`. Links are not followed.

    made_of_it: artefacts made of the user's rows, in which words are the user's whatever their manifests name.
    """
    files = total = 0
    hits: list[Path] = []
    unread: dict[str, str] = {}
    for file in sorted({file for folder in folders for file in _files(folder, left_out)}):
        try:
            total += file.stat().st_size
            files += 1
            if _holds(file, needles):
                hits.append(file)
        except FileNotFoundError:
            continue
        except (OSError, MissingError) as error:
            unread[str(file)] = str(error)
    elsewhere = [
        file
        for file in hits
        if _is_from_elsewhere(file, state) and not any(file.is_relative_to(folder) for folder in made_of_it)
    ]
    return ScanResult(
        files=files,
        bytes=total,
        found=[str(file) for file in hits if file not in elsewhere],
        same_words=[str(file) for file in elsewhere],
        unread=unread,
    )


def _files(folder: Path, left_out: Collection[Path]) -> Iterator[Path]:
    if folder.is_file() and folder not in left_out:
        yield folder
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(root, name) not in left_out]
        for name in names:
            path = Path(root, name)
            if not path.is_symlink() and path.is_file() and path not in left_out:
                yield path


def _holds(file: Path, needles: SearchTerms) -> bool:
    if file.stat().st_size == 0:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            if needles.are_in(view):
                return True
            head = bytes(view[:HEAD_BYTES])
        finally:
            view.release()
    if file.suffix == ".parquet" and not is_packed(head):
        raise MissingError(
            "not read as Parquet: its first bytes are others", f"rm {shlex.quote(str(file))}, if nothing needs it"
        )
    with file.open("rb") as packed:
        return is_packed(head) and any(needles.are_in(buffer) for buffer in unpacked(packed, _LONGEST))


def _is_from_elsewhere(file: Path, state: Path) -> bool:
    """Return whether the file belongs to an artefact without a source in the team's state."""
    for folder in file.parents:
        kind = kind_of(folder)
        if kind is not None and (
            sources := _sources(folder / MANIFESTS[kind]) or _sources(folder / MANIFESTS["adapter"])
        ):
            return not any(is_made_of(source, state) for source in sources)
    return False


def _sources(manifest: Path) -> list[Mapping[str, Any]]:
    try:
        fields = json.loads(manifest.read_bytes()).get("sources", [])
    except (OSError, ValueError):
        return []
    return [source for source in fields if isinstance(source, dict)]


def is_made_of(source: Mapping[str, Any], state: Path) -> bool:
    """Return whether a source that a manifest names lies in this state directory."""
    for location in (str(source.get("source", "")), str(source.get("path", ""))):
        path_text = location.removeprefix("inbox:")
        # the folder that a relative path starts from is unknown: such an inbox may be this one
        if str(state.absolute()) in path_text or (path_text != location and not Path(path_text).is_absolute()):
            return True
    return False


def list_personal(team: Team | Path | str, user: str = "") -> CommandRows:
    """Return every personal version, or one user's. Users appear as digests: their ids are not stored."""
    with open_team_registry(team) as (loaded_team, registry):
        person = required_user_digest(user, team_digest(Path(loaded_team.state))) if user else ""
        user_versions, snapshot = UserVersionStore(registry.database).read(person), registry.read()
    return CommandRows([_row(item, snapshot) for item in user_versions.versions.values()])


def show_personal(team: Team | Path | str, user: str) -> dict[str, Any]:
    """Return what is stored about a user.

    These are personal versions with their gates, and the number of lines of feedback and of receipts.
    """
    with open_team_registry(team) as (loaded_team, registry):
        state = Path(loaded_team.state)
        person = required_user_digest(user, team_digest(state))
        store, snapshot = UserVersionStore(registry.database), registry.read()
        versions = [
            {**_row(item, snapshot), **dict(item.facts or {})} for item in store.read(person).versions.values()
        ]
        lines = sum(
            line.feedback is not None and line.feedback.is_of(person)
            for line in FeedbackStore(state / "inbox").lines()
        )
        needle = f'"person":"{person}"'.encode()
        receipts = sum(len(lines_with(file, needle)) for file in (state / "receipts").glob(PATTERN))
        return {
            "person": person,
            "versions": versions,
            "feedback": lines,
            "receipts": receipts,
            "rows": store.mentions(person),
        }


def allow_personal(team: Team | Path | str, key: str, user: str, *, withdraw: bool = False) -> dict[str, Any]:
    """Allow a key to speak for a user, or for anybody (`*`).

    withdraw: take that back instead. What the key says in the user's name is then not learnt from, also what it said
    before. Raises ConfigError for a key that does not exist, or that may not speak for that user.
    """
    with open_team_registry(team) as (loaded_team, registry):
        if withdraw:
            return _withdraw(loaded_team, registry, key, user)
        known = [item.id for item in ApiKeyStore(registry.database).listed()]
        if key not in known:
            raise ConfigError(
                f"there is no key {key[:40]!a}; there are: {', '.join(known) or 'none'}", "sartor agents key NAME"
            )
        person = user if user == ANYBODY else required_user_digest(user, team_digest(Path(loaded_team.state)))
        UserVersionStore(registry.database).allow(key, person, ChangeCause(getpass.getuser(), "sartor personal allow"))
        return {"key": key, "speaks_for": person}


def _withdraw(team: Team, registry: Registry, key: str, user: str) -> dict[str, Any]:
    store = UserVersionStore(registry.database)
    person = user if user == ANYBODY else required_user_digest(user, team_digest(Path(team.state)))
    if not store.withdraw(key, person, ChangeCause(getpass.getuser(), "sartor personal allow --withdraw")):
        with registry.database.read() as connection:
            may = speakers(connection).get(key, frozenset())
        problem = f"the key {key[:40]!a} was not let speak for that user"
        remedy = "sartor personal allow TEAM --key-id ID --user ID --withdraw, with the key and user that were allowed"
        if ANYBODY in may:
            problem, remedy = (
                f"{problem}, but for anybody",
                "sartor personal allow TEAM --key-id ID --user '*' --withdraw",
            )
        raise ConfigError(problem, remedy)
    return {"key": key, "speaks_for": person, "withdrawn": True}


@contextmanager
def open_team_registry(team: Team | Path | str) -> Iterator[tuple[Team, Registry]]:
    """Yield a team and its open registry."""
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    with closing(Registry.of(loaded_team)) as registry:
        yield loaded_team, registry


def _row(version: UserVersion, snapshot: Snapshot) -> dict[str, Any]:
    live = snapshot.agents[version.agent].live if version.agent in snapshot.agents else ""
    stands_on = snapshot.versions.get(f"{version.agent}@{live}")
    if not version.adapter:
        state = "refused"
    elif stands_on is not None and stands_on.release_id == version.release_id:
        state = "answers"
    else:
        state = "tuned on another version"
    fields = {
        "agent": version.agent,
        "version": version.version,
        "state": state,
        "person": version.person,
        "path": version.path,
    }
    return {**fields, "added": version.added, "note": version.note}
