"""Feedback inbox as a source; distrusted raters left out.

A trial is a reply that a voice rated and that is judged elsewhere too: by what is known of it, else by most of the other
voices, one vote each. A voice is set aside when it stands against that judgement both in more of its trials than `disagreement`
allows (exact binomial test) and more often than the other voices do (Fisher's exact test, 1922), by p-values that Holm
corrects over all voices. Only the worst goes at once: whoever rated the same replies as a voice that lies is contradicted by
it, and what remains is judged anew without. Who merely thinks otherwise now and then stays; so does a majority that lies,
unless it is held against what is known.

A correction is a row whose reply is the correction, with the reply that was given as `rejected` where it is another. A rating
is a row of the reply with its `rating`. A conversation is one group, whichever of its turns was commented on.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core.records import Feedback, MalformedRow, SkippedRow
from sartor.core.statistics import holm_correction
from sartor.curate.sources import feedback_lines
from sartor.curate.sources.feedback_lines import FeedbackLine, Place
from sartor.curate.sources.row_readers import Read
from sartor.curate.sources.types import InboxTerms

Giver = tuple[str, str]  # key, user
WHOLE = "*"  # in the place of a user: the key with all of its users
Votes = Mapping[str, Mapping[Giver, int]]  # of a reply, what each giver says of it: a sum of signs


@dataclass(frozen=True)
class RaterTrust:
    """How what a voice says goes with the rest. user: "*" of a key as a whole. compared: its trials. against: those of them in
    which it contradicts. p: that it does so by chance, corrected.
    """

    key: str
    user: str
    compared: int = 0
    against: int = 0
    p: float = 1.0
    is_aside: bool = False

    @property
    def score(self) -> float:
        """How far it is to be trusted, 0..1: the mean of what its agreement leaves likely, from even odds on (Laplace 1774)."""
        return (self.compared - self.against + 1) / (self.compared + 2)

    @property
    def name(self) -> str:
        """The key, and the user's digest cut short, as a person reads it."""
        key = f"the key {self.key}" if self.key else "whoever asks without a key"
        return key if self.user == WHOLE else f"the user {self.user[:12]} of {key}"

    @property
    def why(self) -> str:
        """Why it is set aside, in a sentence."""
        return f"{self.name} contradicts the rest on {self.against} of {self.compared} replies (p {self.p:.1g})"


def rate_raters(lines: Sequence[FeedbackLine], terms: InboxTerms) -> list[RaterTrust]:
    """The standing of every key, and of every user of a key that has several, by key and user."""
    votes, known = _votes(lines)
    users = _users(lines)
    found: dict[Giver, RaterTrust] = {}
    while True:
        standings = [one for one in _standings(votes, known, users, terms) if (one.key, one.user) not in found]
        worst = min(standings, key=lambda one: (one.p, -one.against), default=None)
        if worst is None or worst.p > terms.alpha:
            return sorted([*found.values(), *standings], key=lambda one: (one.key, one.user))
        found[worst.key, worst.user] = replace(worst, is_aside=True)
        votes = {item: {giver: sum_ for giver, sum_ in by.items() if not _is_of(giver, worst)} for item, by in votes.items()}


def distrusted_raters(standings: Iterable[RaterTrust]) -> Mapping[Giver, RaterTrust]:
    """Those that are set aside, by key and user."""
    return {(one.key, one.user): one for one in standings if one.is_aside}


def _is_of(giver: Giver, voice: RaterTrust) -> bool:
    return giver[0] == voice.key and voice.user in (WHOLE, giver[1])


def _votes(lines: Iterable[FeedbackLine]) -> tuple[Votes, Mapping[str, int]]:
    votes: dict[str, Counter[Giver]] = defaultdict(Counter)
    known: dict[str, int] = {}
    for line in lines:
        if line.item and line.sign:
            votes[line.item][line.key, line.user] += line.sign
            known[line.item] = line.known
    return {item: by for item, by in votes.items() if known[item] or len(by) > 1}, known


def _users(lines: Iterable[FeedbackLine]) -> Mapping[str, set[str]]:
    """Key -> its users."""
    users: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        users[line.key].add(line.user)
    return users


def _standings(votes: Votes, known: Mapping[str, int], users: Mapping[str, set[str]], terms: InboxTerms) -> list[RaterTrust]:
    """Every voice, its p corrected over all that have a trial. Keys are compared with keys, users with users."""
    keys = _trials(votes, known, lambda giver: (giver[0], WHOLE))
    people = _trials(votes, known, lambda giver: giver)
    wanted = [(key, user) for key, some in users.items() if len(some) > 1 for user in some if user]
    tested = [
        *(_tested(voice, keys, terms) for voice in ((key, WHOLE) for key in users)),
        *(_tested(voice, people, terms) for voice in wanted),
    ]
    counted = [place for place, one in enumerate(tested) if one.compared]
    for place, p in zip(counted, holm_correction([tested[place].p for place in counted]), strict=True):
        tested[place] = replace(tested[place], p=p)
    return tested


def _trials(votes: Votes, known: Mapping[str, int], voice_of: Any) -> dict[Giver, tuple[int, int]]:
    """Voice -> (against, compared)."""
    found: dict[Giver, tuple[int, int]] = {}
    for item, by in votes.items():
        sums: Counter[Giver] = Counter()
        for giver, said in by.items():
            sums[voice_of(giver)] += said
        signs = {voice: _sign(total) for voice, total in sums.items()}
        together = sum(signs.values())
        for voice, own in signs.items():
            judgement = known.get(item) or _sign(together - own)
            if own and judgement:
                against, compared = found.get(voice, (0, 0))
                found[voice] = against + (own != judgement), compared + 1
    return found


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _tested(voice: Giver, trials: Mapping[Giver, tuple[int, int]], terms: InboxTerms) -> RaterTrust:
    from scipy.stats import binom, hypergeom  # a second to load, which a source without an inbox need not wait for

    against, compared = trials.get(voice, (0, 0))
    if not compared:
        return RaterTrust(*voice)
    all_against, all_compared = (sum(one[place] for one in trials.values()) for place in (0, 1))
    p = float(binom.sf(against - 1, compared, terms.disagreement))
    if all_compared > compared:
        p = max(p, float(hypergeom.sf(against - 1, all_compared, all_against, compared)))
    return RaterTrust(*voice, compared, against, p)


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


class FeedbackInbox:
    """What becomes of every line of an inbox, judged together. standings: of the keys that speak in it, and their users.

    Raises ConfigError for a file of known replies that is none.
    """

    def __init__(self, files: Sequence[InboxFile], terms: InboxTerms, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._outcomes: dict[Place, SkippedRow | None] = {}  # None: it becomes a row
        self._held: dict[Said, Feedback] = {}  # what earlier lines said, until the newest of the same is read
        newest = self._newest(files, terms)
        self._last = {(line.receipt, line.key): line.place for line in newest}
        self.standings = rate_raters(newest, terms)
        aside = distrusted_raters(self.standings)
        self._outcomes |= {line.place: _unfit(line, terms, aside) for line in newest}
        fit = [line for line in newest if self._outcomes[line.place] is None]
        self._outcomes |= {place: SkippedRow("over_share", why) for place, why in rows_over_cap(fit, terms).items()}

    def rows(self, file: InboxFile) -> Read:
        """(line, raw row in a form that `forms` reads), or why there is none. The files in order, each once."""
        for number, said in feedback_lines.read_feedback_lines(file.path, file.bytes, file.sha256, self._most_bytes):
            yield str(number), said if isinstance(said, MalformedRow) else self._row((file.number, number), said)

    def _row(self, place: Place, said: Feedback) -> dict[str, Any] | MalformedRow:
        if place not in self._outcomes:
            return MalformedRow("changed_file", "the line was not there when the inbox was judged")
        one: Said = (said.receipt, said.by.key)
        outcome, older = self._outcomes[place], self._held.pop(one, None)
        said = feedback_lines.over(said, older) if older else said
        if self._last[one] != place:
            self._held[one] = said
        return row_of(said) if outcome is None else outcome

    def _newest(self, files: Sequence[InboxFile], terms: InboxTerms) -> list[FeedbackLine]:
        """The lines that count, each with what the ones before it said of the same."""
        found: dict[Said, FeedbackLine] = {}
        answers = feedback_lines.read_gold_replies(terms.known)
        for file in files:
            for line in self._facts(file, answers):
                one: Said = (line.receipt, line.key)
                if older := found.pop(one, None):
                    self._outcomes[older.place] = SkippedRow("replaced", "the same key said something of this reply later")
                    line = line.over(older)
                found[one] = line
        return list(found.values())

    def _facts(self, file: InboxFile, answers: feedback_lines.Known) -> Iterator[FeedbackLine]:
        try:
            for number, said in feedback_lines.read_feedback_lines(file.path, file.bytes, file.sha256, self._most_bytes):
                if isinstance(said, Feedback):
                    yield feedback_lines.line_of((file.number, number), said, answers.sign(said))
        except (MalformedRow, OSError):  # met again when its rows are read, and told there
            return


def of_folder(path: Path, terms: InboxTerms | None = None, most_bytes: int = MOST_BYTES) -> FeedbackInbox:
    """An inbox as it is now, judged; of a folder that is not there, an empty one."""
    files = []
    for number, file in enumerate(sorted(path.glob("feedback-*.jsonl"))):
        size = file.stat().st_size
        with file.open("rb") as stream:
            files.append(InboxFile(number, str(file), size, feedback_lines.prefix_digest(stream, size)))
    return FeedbackInbox(files, terms or InboxTerms(), most_bytes)


def _unfit(line: FeedbackLine, terms: InboxTerms, aside: Mapping[Giver, RaterTrust]) -> SkippedRow | None:
    """Why a line makes no row."""
    standing = aside.get((line.key, WHOLE)) or aside.get((line.key, line.user))
    if terms.agent and terms.agent not in (line.agent, line.agent.partition("@")[0]):
        return SkippedRow("other_agent", f"it is of {line.agent}")
    if standing:
        return SkippedRow(DISTRUSTED, standing.why)
    if line.consent == "refused" or (line.consent == "assumed" and terms.consent == "given"):
        return SkippedRow("no_consent", "nobody agreed that it be learnt from")
    if not line.item:
        return SkippedRow("not_remembered", "the server no longer knew what was asked")
    if not line.correction and not line.rating:
        return SkippedRow("nothing_to_learn", "it neither rates the reply nor corrects it")
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


def rows_over_cap(lines: Sequence[FeedbackLine], terms: InboxTerms) -> dict[Place, str]:
    """Lines that are too many of one user or one key, drawn by the seed, each with the sentence that says so."""
    gone: dict[Place, str] = {}
    for giver_of in (_user, _key):
        gone |= _cut([line for line in lines if line.place not in gone], terms, giver_of)
    return gone


def _user(line: FeedbackLine) -> Giver:
    return line.key, line.user


def _key(line: FeedbackLine) -> Giver:
    return line.key, ""


def _cut(lines: Sequence[FeedbackLine], terms: InboxTerms, giver_of: Callable[[FeedbackLine], Giver]) -> dict[Place, str]:
    counts = Counter(map(giver_of, lines))
    most = allowed(list(counts.values()), terms)
    taken: Counter[Giver] = Counter()
    gone: dict[Place, str] = {}
    for line in sorted(lines, key=lambda line: _draw(terms.seed, line)):
        giver = giver_of(line)
        taken[giver] += 1
        if taken[giver] > most:
            what = "user" if giver[1] else "key"
            gone[line.place] = f"its {what} gives {counts[giver]} rows; of {len(counts)} that speak, one may give {most}"
    return gone


def _draw(seed: int, line: FeedbackLine) -> bytes:
    return hashlib.sha256(f"{seed}:{line.receipt}:{line.key}".encode()).digest()


def allowed(counts: Sequence[int], terms: InboxTerms) -> int:
    """How many rows each may give: the most that is no more than `most_fraction` of what is then left of all, or `most_rows`.

    Where few speak, twice the even share stands for the fraction: of one or two, all may be said by one.

    >>> allowed([1000, 20, 20, 20, 20, 20, 20, 20], InboxTerms())
    46
    >>> allowed([60], InboxTerms())
    60
    """
    most = max(counts, default=0)
    fraction = max(terms.most_fraction, 2 / len(counts)) if counts else 1.0
    while fraction < 1:
        less = max(terms.most_rows, int(fraction * sum(min(count, most) for count in counts)))
        if less >= most:
            break
        most = less
    return most
