"""Feedback inbox as a source; distrusted raters left out.

A trial is a reply that a voice rated and that is judged elsewhere too: by what is known of it, else by most of the
other voices, one vote each. A voice is set aside when it stands against that judgement both in more of its trials than
`disagreement` allows (exact binomial test) and more often than the other voices do (Fisher's exact test, 1922), by
p-values that Holm corrects over all voices. Only the worst goes at once: whoever rated the same replies as a voice
that lies is contradicted by it, and what remains is judged anew without. Who merely thinks otherwise now and then
stays; so does a majority that lies, unless it is held against what is known.

A correction is a row whose reply is the correction, with the reply that was given as `rejected` where it is another. A
rating is a row of the reply with its `rating`. A conversation is one group, whichever of its turns was commented on.
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
from sartor.curate.sources.feedback_lines import FeedbackLine, LinePosition
from sartor.curate.sources.row_readers import Read
from sartor.curate.sources.types import InboxTerms

RaterId = tuple[str, str]  # key, user
WHOLE = "*"  # in the place of a user: the key with all of its users
Votes = Mapping[str, Mapping[RaterId, int]]  # of a reply, what each giver says of it: a sum of signs


@dataclass(frozen=True)
class RaterTrust:
    """How what a voice says goes with the rest. user: "*" of a key as a whole. compared: its trials. against: those of
    them in
    which it contradicts. p: that it does so by chance, corrected.
    """

    key: str
    user: str
    compared: int = 0
    against: int = 0
    p: float = 1.0
    is_distrusted: bool = False

    @property
    def score(self) -> float:
        """How far it is to be trusted, 0..1: the mean of what its agreement leaves likely, from even odds on (Laplace
        1774).
        """
        return (self.compared - self.against + 1) / (self.compared + 2)

    @property
    def name(self) -> str:
        """The key, and the user's digest cut short, as a person reads it."""
        key = f"the key {self.key}" if self.key else "whoever asks without a key"
        return key if self.user == WHOLE else f"the user {self.user[:12]} of {key}"

    @property
    def reason(self) -> str:
        """Why it is set aside, in a sentence."""
        return f"{self.name} contradicts the rest on {self.against} of {self.compared} replies (p {self.p:.1g})"


def rate_raters(lines: Sequence[FeedbackLine], terms: InboxTerms) -> list[RaterTrust]:
    """The standing of every key, and of every user of a key that has several, by key and user."""
    votes, known_signs = _votes(lines)
    users = _users(lines)
    distrusted: dict[RaterId, RaterTrust] = {}
    while True:
        standings = [
            standing
            for standing in _standings(votes, known_signs, users, terms)
            if (standing.key, standing.user) not in distrusted
        ]
        worst = min(standings, key=lambda standing: (standing.p, -standing.against), default=None)
        if worst is None or worst.p > terms.alpha:
            return sorted([*distrusted.values(), *standings], key=lambda standing: (standing.key, standing.user))
        distrusted[worst.key, worst.user] = replace(worst, is_distrusted=True)
        votes = {
            item: {voter: vote_sum for voter, vote_sum in reply_votes.items() if not _is_voter_of(voter, worst)}
            for item, reply_votes in votes.items()
        }


def distrusted_raters(standings: Iterable[RaterTrust]) -> Mapping[RaterId, RaterTrust]:
    """Those that are set aside, by key and user."""
    return {(standing.key, standing.user): standing for standing in standings if standing.is_distrusted}


def _is_voter_of(voter: RaterId, standing: RaterTrust) -> bool:
    return voter[0] == standing.key and standing.user in (WHOLE, voter[1])


def _votes(lines: Iterable[FeedbackLine]) -> tuple[Votes, Mapping[str, int]]:
    votes: dict[str, Counter[RaterId]] = defaultdict(Counter)
    known_signs: dict[str, int] = {}
    for line in lines:
        if line.item and line.sign:
            votes[line.item][line.key, line.user] += line.sign
            known_signs[line.item] = line.known
    return {
        item: reply_votes for item, reply_votes in votes.items() if known_signs[item] or len(reply_votes) > 1
    }, known_signs


def _users(lines: Iterable[FeedbackLine]) -> Mapping[str, set[str]]:
    """Key -> its users."""
    users: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        users[line.key].add(line.user)
    return users


def _standings(
    votes: Votes, known_signs: Mapping[str, int], users: Mapping[str, set[str]], terms: InboxTerms
) -> list[RaterTrust]:
    """Every voice, its p corrected over all that have a trial. Keys are compared with keys, users with users."""
    keys = _trials(votes, known_signs, lambda voter: (voter[0], WHOLE))
    people = _trials(votes, known_signs, lambda voter: voter)
    named_users = [(key, user) for key, key_users in users.items() if len(key_users) > 1 for user in key_users if user]
    standings = [
        *(_standing_of(rater, keys, terms) for rater in ((key, WHOLE) for key in users)),
        *(_standing_of(rater, people, terms) for rater in named_users),
    ]
    compared_indices = [index for index, item in enumerate(standings) if item.compared]
    for index, p in zip(
        compared_indices, holm_correction([standings[index].p for index in compared_indices]), strict=True
    ):
        standings[index] = replace(standings[index], p=p)
    return standings


def _trials(votes: Votes, known_signs: Mapping[str, int], rater_of: Any) -> dict[RaterId, tuple[int, int]]:
    """Voice -> (against, compared)."""
    trials: dict[RaterId, tuple[int, int]] = {}
    for item, reply_votes in votes.items():
        sums: Counter[RaterId] = Counter()
        for voter, vote in reply_votes.items():
            sums[rater_of(voter)] += vote
        signs = {rater: _sign(total) for rater, total in sums.items()}
        sign_total = sum(signs.values())
        for rater, sign in signs.items():
            judgement = known_signs.get(item) or _sign(sign_total - sign)
            if sign and judgement:
                against, compared = trials.get(rater, (0, 0))
                trials[rater] = against + (sign != judgement), compared + 1
    return trials


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _standing_of(rater: RaterId, trials: Mapping[RaterId, tuple[int, int]], terms: InboxTerms) -> RaterTrust:
    from scipy.stats import binom, hypergeom  # a second to load, which a source without an inbox need not wait for

    against, compared = trials.get(rater, (0, 0))
    if not compared:
        return RaterTrust(*rater)
    all_against, all_compared = (sum(trial[index] for trial in trials.values()) for index in (0, 1))
    p = float(binom.sf(against - 1, compared, terms.disagreement))
    if all_compared > compared:
        p = max(p, float(hypergeom.sf(against - 1, all_compared, all_against, compared)))
    return RaterTrust(*rater, compared, against, p)


FORM = "feedback"
DISTRUSTED = "distrusted"
MOST_BYTES = 4 << 20
ReplyKey = tuple[str, str]  # receipt and key: of what one key says of one reply the newest counts


@dataclass(frozen=True)
class InboxFile:
    """A file as it was when the run was planned: its first `bytes` bytes. number: its place among the inbox's."""

    number: int
    path: str
    bytes: int
    sha256: str


class FeedbackInbox:
    """What becomes of every line of an inbox, judged together. standings: of the keys that speak in it, and their
    users.

    Raises ConfigError for a file of known replies that is none.
    """

    def __init__(self, files: Sequence[InboxFile], terms: InboxTerms, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._outcomes: dict[LinePosition, SkippedRow | None] = {}  # None: it becomes a row
        self._older_feedback: dict[
            ReplyKey, Feedback
        ] = {}  # what earlier lines said, until the newest of the same is read
        newest = self._newest(files, terms)
        self._last = {(line.receipt, line.key): line.position for line in newest}
        self.standings = rate_raters(newest, terms)
        distrusted = distrusted_raters(self.standings)
        self._outcomes |= {line.position: _skip_reason(line, terms, distrusted) for line in newest}
        usable = [line for line in newest if self._outcomes[line.position] is None]
        self._outcomes |= {
            position: SkippedRow("over_share", reason) for position, reason in rows_over_cap(usable, terms).items()
        }

    def rows(self, file: InboxFile) -> Read:
        """(line, raw row in a form that `forms` reads), or why there is none. The files in order, each once."""
        for number, feedback in feedback_lines.read_feedback_lines(
            file.path, file.bytes, file.sha256, self._most_bytes
        ):
            yield (
                str(number),
                feedback if isinstance(feedback, MalformedRow) else self._row((file.number, number), feedback),
            )

    def _row(self, position: LinePosition, feedback: Feedback) -> dict[str, Any] | MalformedRow:
        if position not in self._outcomes:
            return MalformedRow("changed_file", "the line was not there when the inbox was judged")
        reply_key: ReplyKey = (feedback.receipt, feedback.by.key)
        outcome, older = self._outcomes[position], self._older_feedback.pop(reply_key, None)
        feedback = feedback_lines.merge_feedback(feedback, older) if older else feedback
        if self._last[reply_key] != position:
            self._older_feedback[reply_key] = feedback
        return row_of(feedback) if outcome is None else outcome

    def _newest(self, files: Sequence[InboxFile], terms: InboxTerms) -> list[FeedbackLine]:
        """The lines that count, each with what the ones before it said of the same."""
        newest_lines: dict[ReplyKey, FeedbackLine] = {}
        gold_replies = feedback_lines.read_gold_replies(terms.known)
        for file in files:
            for line in self._facts(file, gold_replies):
                reply_key: ReplyKey = (line.receipt, line.key)
                if older := newest_lines.pop(reply_key, None):
                    self._outcomes[older.position] = SkippedRow(
                        "replaced", "the same key said something of this reply later"
                    )
                    line = line.merge(older)
                newest_lines[reply_key] = line
        return list(newest_lines.values())

    def _facts(self, file: InboxFile, gold_replies: feedback_lines.GoldReplies) -> Iterator[FeedbackLine]:
        try:
            for number, feedback in feedback_lines.read_feedback_lines(
                file.path, file.bytes, file.sha256, self._most_bytes
            ):
                if isinstance(feedback, Feedback):
                    yield feedback_lines.line_of((file.number, number), feedback, gold_replies.sign(feedback))
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


def _skip_reason(line: FeedbackLine, terms: InboxTerms, distrusted: Mapping[RaterId, RaterTrust]) -> SkippedRow | None:
    """Why a line makes no row."""
    standing = distrusted.get((line.key, WHOLE)) or distrusted.get((line.key, line.user))
    if terms.agent and terms.agent not in (line.agent, line.agent.partition("@")[0]):
        return SkippedRow("other_agent", f"it is of {line.agent}")
    if standing:
        return SkippedRow(DISTRUSTED, standing.reason)
    if line.consent == "refused" or (line.consent == "assumed" and terms.consent == "given"):
        return SkippedRow("no_consent", "nobody agreed that it be learnt from")
    if not line.item:
        return SkippedRow("not_remembered", "the server no longer knew what was asked")
    if not line.correction and not line.rating:
        return SkippedRow("nothing_to_learn", "it neither rates the reply nor corrects it")
    return None


def row_of(feedback: Feedback) -> dict[str, Any]:
    """A row in the form `preference`, `rated` or `prompt_completion`."""
    prompt = list(feedback.messages) or [{"role": "user", "content": feedback.text}]
    row: dict[str, Any] = {"prompt": prompt, "date": feedback.date}
    if not feedback.correction:
        return {**row, "completion": _turn(feedback.reply), "rating": feedback.rating}
    if feedback.reply.split() in ([], feedback.correction.split()):
        return {**row, "completion": _turn(feedback.correction)}
    return {**row, "chosen": _turn(feedback.correction), "rejected": _turn(feedback.reply)}


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def rows_over_cap(lines: Sequence[FeedbackLine], terms: InboxTerms) -> dict[LinePosition, str]:
    """Lines that are too many of one user or one key, drawn by the seed, each with the sentence that says so."""
    over_cap: dict[LinePosition, str] = {}
    for rater_of in (_user, _key):
        over_cap |= _over_cap([line for line in lines if line.position not in over_cap], terms, rater_of)
    return over_cap


def _user(line: FeedbackLine) -> RaterId:
    return line.key, line.user


def _key(line: FeedbackLine) -> RaterId:
    return line.key, ""


def _over_cap(
    lines: Sequence[FeedbackLine], terms: InboxTerms, rater_of: Callable[[FeedbackLine], RaterId]
) -> dict[LinePosition, str]:
    counts = Counter(map(rater_of, lines))
    max_rows = allowed(list(counts.values()), terms)
    row_counts: Counter[RaterId] = Counter()
    over_cap: dict[LinePosition, str] = {}
    for line in sorted(lines, key=lambda line: _draw(terms.seed, line)):
        rater = rater_of(line)
        row_counts[rater] += 1
        if row_counts[rater] > max_rows:
            rater_kind = "user" if rater[1] else "key"
            over_cap[line.position] = (
                f"its {rater_kind} gives {counts[rater]} rows; of {len(counts)} that speak, one may give {max_rows}"
            )
    return over_cap


def _draw(seed: int, line: FeedbackLine) -> bytes:
    return hashlib.sha256(f"{seed}:{line.receipt}:{line.key}".encode()).digest()


def allowed(counts: Sequence[int], terms: InboxTerms) -> int:
    """How many rows each may give: the most that is no more than `most_fraction` of what is then left of all, or
    `most_rows`.

    Where few speak, twice the even share stands for the fraction: of one or two, all may be said by one.

    >>> allowed([1000, 20, 20, 20, 20, 20, 20, 20], InboxTerms())
    46
    >>> allowed([60], InboxTerms())
    60
    """
    max_rows = max(counts, default=0)
    fraction = max(terms.most_fraction, 2 / len(counts)) if counts else 1.0
    while fraction < 1:
        lower_max = max(terms.most_rows, int(fraction * sum(min(count, max_rows) for count in counts)))
        if lower_max >= max_rows:
            break
        max_rows = lower_max
    return max_rows
