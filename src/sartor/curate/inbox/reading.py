"""An inbox as a source: which line becomes a row, and why every other one does not.

A correction is a row whose reply is the correction, with the reply that was given as `rejected` where it is another. A rating
is a row of the reply with its `rating`. A conversation is one group, whichever of its turns was commented on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.records import Feedback, Malformed, SetAside
from sartor.curate.inbox import known, lines, shares, trust
from sartor.curate.inbox.lines import Line, Place
from sartor.curate.inbox.terms import InboxTerms
from sartor.curate.sources.tables import Read

FORM = "feedback"
DISTRUSTED = "distrusted"
MOST_BYTES = 4 << 20
Said = tuple[str, str]  # receipt and key: of what one key says of one reply the newest counts


@dataclass(frozen=True)
class InboxFile:
    """A file as it was when the run was planned: its first `bytes` bytes. number: its place among the inbox's."""

    number: int
    path: str
    bytes: int
    sha256: str


class Inbox:
    """What becomes of every line of an inbox, judged together. standings: of the keys that speak in it, and their users.

    Raises ConfigError for a file of known replies that is none.
    """

    def __init__(self, files: Sequence[InboxFile], terms: InboxTerms, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._outcomes: dict[Place, SetAside | None] = {}  # None: it becomes a row
        self._held: dict[Said, Feedback] = {}  # what earlier lines said, until the newest of the same is read
        newest = self._newest(files, terms)
        self._last = {(line.receipt, line.key): line.place for line in newest}
        self.standings = trust.judged(newest, terms)
        aside = trust.aside(self.standings)
        self._outcomes |= {line.place: _unfit(line, terms, aside) for line in newest}
        fit = [line for line in newest if self._outcomes[line.place] is None]
        self._outcomes |= {place: SetAside("over_share", why) for place, why in shares.over_share(fit, terms).items()}

    def rows(self, file: InboxFile) -> Read:
        """(line, raw row in a form that `forms` reads), or why there is none. The files in order, each once."""
        for number, said in lines.read(file.path, file.bytes, file.sha256, self._most_bytes):
            yield str(number), said if isinstance(said, Malformed) else self._row((file.number, number), said)

    def _row(self, place: Place, said: Feedback) -> dict[str, Any] | Malformed:
        if place not in self._outcomes:
            return Malformed("changed_file", "the line was not there when the inbox was judged")
        one: Said = (said.receipt, said.by.key)
        outcome, older = self._outcomes[place], self._held.pop(one, None)
        said = lines.over(said, older) if older else said
        if self._last[one] != place:
            self._held[one] = said
        return row_of(said) if outcome is None else outcome

    def _newest(self, files: Sequence[InboxFile], terms: InboxTerms) -> list[Line]:
        """The lines that count, each with what the ones before it said of the same."""
        found: dict[Said, Line] = {}
        answers = known.read(terms.known)
        for file in files:
            for line in self._facts(file, answers):
                one: Said = (line.receipt, line.key)
                if older := found.pop(one, None):
                    self._outcomes[older.place] = SetAside("replaced", "the same key said something of this reply later")
                    line = line.over(older)
                found[one] = line
        return list(found.values())

    def _facts(self, file: InboxFile, answers: known.Known) -> Iterator[Line]:
        try:
            for number, said in lines.read(file.path, file.bytes, file.sha256, self._most_bytes):
                if isinstance(said, Feedback):
                    yield lines.line_of((file.number, number), said, answers.sign(said))
        except (Malformed, OSError):  # met again when its rows are read, and told there
            return


def of_folder(path: Path, terms: InboxTerms | None = None, most_bytes: int = MOST_BYTES) -> Inbox:
    """An inbox as it is now, judged; of a folder that is not there, an empty one."""
    files = []
    for number, file in enumerate(sorted(path.glob("feedback-*.jsonl"))):
        size = file.stat().st_size
        with file.open("rb") as stream:
            files.append(InboxFile(number, str(file), size, lines.prefix_digest(stream, size)))
    return Inbox(files, terms or InboxTerms(), most_bytes)


def _unfit(line: Line, terms: InboxTerms, aside: Mapping[trust.Giver, trust.Standing]) -> SetAside | None:
    """Why a line makes no row."""
    standing = aside.get((line.key, trust.WHOLE)) or aside.get((line.key, line.user))
    if terms.agent and terms.agent not in (line.agent, line.agent.partition("@")[0]):
        return SetAside("other_agent", f"it is of {line.agent}")
    if standing:
        return SetAside(DISTRUSTED, standing.why)
    if line.consent == "refused" or (line.consent == "assumed" and terms.consent == "given"):
        return SetAside("no_consent", "nobody agreed that it be learnt from")
    if not line.item:
        return SetAside("not_remembered", "the server no longer knew what was asked")
    if not line.correction and not line.rating:
        return SetAside("nothing_to_learn", "it neither rates the reply nor corrects it")
    return None


def row_of(said: Feedback) -> dict[str, Any]:
    """A row in the form `preference`, `rated` or `prompt_completion`."""
    prompt = list(said.messages) or [{"role": "user", "content": said.text}]
    row: dict[str, Any] = {"prompt": prompt, "date": said.date}
    if not said.correction:
        return {**row, "completion": _turn(said.reply), "rating": said.rating}
    if said.reply.split() in ([], said.correction.split()):
        return {**row, "completion": _turn(said.correction)}
    return {**row, "chosen": _turn(said.correction), "rejected": _turn(said.reply)}


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
