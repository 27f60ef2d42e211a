"""Feedback inbox as a source, without the feedback of distrusted raters.

A rater is a key, or one user of a key. A trial is a reply that a rater rated and that has another judgement: the gold
reply if known, else the majority of the other raters, one vote each. A rater is distrusted if it contradicts that
judgement in a larger fraction of its trials than `disagreement` allows (exact binomial test) and more often than the
other raters do (Fisher's exact test, 1922). Holm's method corrects the p-values over all raters.

Only the worst rater is removed at a time, and the rest is judged again: raters of the same replies as a lying rater
are contradicted by it. A rater who sometimes disagrees stays; so does a lying majority, unless gold replies expose it.

A correction becomes a row whose reply is the correction, with the reply that was given as `rejected` if it differs. A
rating becomes a row of the reply with its `rating`. A conversation is one group, whichever of its turns has feedback.
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
WHOLE = "*"  # instead of a user: the key with all of its users
Votes = Mapping[str, Mapping[RaterId, int]]  # reply -> rater -> sum of the signs of its ratings


@dataclass(frozen=True)
class RaterTrust:
    """Agreement of a rater with the other judgements.

    user: "*" for a key as a whole.
    compared: number of trials.
    against: number of trials in which the rater contradicts the judgement.
    p: p-value of that many contradictions, corrected over all raters.
    """

    key: str
    user: str
    compared: int = 0
    against: int = 0
    p: float = 1.0
    is_distrusted: bool = False

    @property
    def score(self) -> float:
        """Posterior mean of the agreement, 0..1: (agreements + 1) / (compared + 2) (Laplace 1774)."""
        return (self.compared - self.against + 1) / (self.compared + 2)

    @property
    def name(self) -> str:
        """Description for people: the key, and the first 12 characters of the user's digest."""
        key = f"the key {self.key}" if self.key else "whoever asks without a key"
        return key if self.user == WHOLE else f"the user {self.user[:12]} of {key}"

    @property
    def reason(self) -> str:
        """Sentence that says why the rater is distrusted."""
        return f"{self.name} contradicts the rest on {self.against} of {self.compared} replies (p {self.p:.1g})"


def rate_raters(lines: Sequence[FeedbackLine], terms: InboxTerms) -> list[RaterTrust]:
    """Return the trust in every key, and in each user of a key with several users.

    Sorted by key and user.
    """
    votes, known_signs = _votes(lines)
    users: dict[str, set[str]] = defaultdict(set)  # key -> its users
    for line in lines:
        users[line.key].add(line.user)
    distrusted: dict[RaterId, RaterTrust] = {}
    while True:
        standings = _standings(votes, known_signs, users, terms)
        standings = [standing for standing in standings if (standing.key, standing.user) not in distrusted]
        worst = min(standings, key=lambda standing: (standing.p, -standing.against), default=None)
        if worst is None or worst.p > terms.alpha:
            return sorted([*distrusted.values(), *standings], key=lambda standing: (standing.key, standing.user))
        distrusted[worst.key, worst.user] = replace(worst, is_distrusted=True)
        trusted_votes: dict[str, dict[RaterId, int]] = {}
        for item, reply_votes in votes.items():
            trusted_votes[item] = {
                (key, user): vote_sum
                for (key, user), vote_sum in reply_votes.items()
                if key != worst.key or worst.user not in (WHOLE, user)
            }
        votes = trusted_votes


def distrusted_raters(standings: Iterable[RaterTrust]) -> Mapping[RaterId, RaterTrust]:
    """Return the distrusted raters by (key, user)."""
    return {(standing.key, standing.user): standing for standing in standings if standing.is_distrusted}


def _votes(lines: Iterable[FeedbackLine]) -> tuple[Votes, Mapping[str, int]]:
    votes: dict[str, Counter[RaterId]] = defaultdict(Counter)
    known_signs: dict[str, int] = {}
    for line in lines:
        if line.item and line.sign:
            votes[line.item][line.key, line.user] += line.sign
            known_signs[line.item] = line.known
    comparable = {
        item: reply_votes for item, reply_votes in votes.items() if known_signs[item] or len(reply_votes) > 1
    }
    return comparable, known_signs


def _standings(
    votes: Votes, known_signs: Mapping[str, int], users: Mapping[str, set[str]], terms: InboxTerms
) -> list[RaterTrust]:
    """Return every rater with its Holm-corrected p-value.

    The correction covers all raters that have a trial. Keys are compared with keys, users with users.
    """
    keys = _trials(votes, known_signs, lambda voter: (voter[0], WHOLE))
    people = _trials(votes, known_signs, lambda voter: voter)
    standings = [_standing_of((key, WHOLE), keys, terms) for key in users]
    for key, key_users in users.items():
        if len(key_users) > 1:
            standings += [_standing_of((key, user), people, terms) for user in key_users if user]
    compared_indices = [index for index, item in enumerate(standings) if item.compared]
    corrected = holm_correction([standings[index].p for index in compared_indices])
    for index, p in zip(compared_indices, corrected, strict=True):
        standings[index] = replace(standings[index], p=p)
    return standings


def _trials(votes: Votes, known_signs: Mapping[str, int], rater_of: Any) -> dict[RaterId, tuple[int, int]]:
    """Return rater -> (against, compared)."""
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
    from scipy.stats import binom, hypergeom  # here, since it takes a second to load and only an inbox needs it

    against, compared = trials.get(rater, (0, 0))
    if not compared:
        return RaterTrust(*rater)
    all_against = sum(rater_against for rater_against, _ in trials.values())
    all_compared = sum(rater_compared for _, rater_compared in trials.values())
    # p = max(P(Bin(compared, disagreement) >= against), P(Hypergeom >= against)): both tests must reject
    p = float(binom.sf(against - 1, compared, terms.disagreement))
    if all_compared > compared:
        p = max(p, float(hypergeom.sf(against - 1, all_compared, all_against, compared)))
    return RaterTrust(*rater, compared, against, p)


FORM = "feedback"
DISTRUSTED = "distrusted"
MOST_BYTES = 4 << 20
ReplyKey = tuple[str, str]  # receipt and key; the newest feedback of a key on a reply counts


@dataclass(frozen=True)
class InboxFile:
    """File of an inbox as it was when the run was planned: its first `bytes` bytes.

    number: index of the file in the inbox.
    """

    number: int
    path: str
    bytes: int
    sha256: str


class FeedbackInbox:
    """Outcome of every line of an inbox, judged together.

    standings: trust in each key, and in the users of keys with several users.
    Raises ConfigError for an unusable file of gold replies.
    """

    def __init__(self, files: Sequence[InboxFile], terms: InboxTerms, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._outcomes: dict[LinePosition, SkippedRow | None] = {}  # None: the line becomes a row
        self._older_feedback: dict[
            ReplyKey, Feedback
        ] = {}  # merged feedback of earlier lines, until the newest line on the same reply is read
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
        """Yield (line, raw row in a format of `row_formats`, or the reason for none).

        Call it for the files in their order, once each.
        """
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
        """Return the newest line of each key on each reply, merged with the earlier ones."""
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
        except (MalformedRow, OSError):  # occurs again in `rows`, which reports it
            return


def of_folder(path: Path, terms: InboxTerms | None = None, most_bytes: int = MOST_BYTES) -> FeedbackInbox:
    """Judge an inbox as it is now; a missing folder gives an empty inbox."""
    files = []
    for number, file in enumerate(sorted(path.glob("feedback-*.jsonl"))):
        size = file.stat().st_size
        with file.open("rb") as stream:
            files.append(InboxFile(number, str(file), size, feedback_lines.prefix_digest(stream, size)))
    return FeedbackInbox(files, terms or InboxTerms(), most_bytes)


def _skip_reason(line: FeedbackLine, terms: InboxTerms, distrusted: Mapping[RaterId, RaterTrust]) -> SkippedRow | None:
    """Return the reason why a line makes no row, or None."""
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
    """Return a row in the format `preference`, `rated` or `prompt_completion`."""
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
    """Return the lines beyond the cap of their user or key, each with a sentence that says so.

    The seed decides which lines those are.
    """
    over_user_cap = _over_cap(lines, terms, lambda line: (line.key, line.user))
    remaining_lines = [line for line in lines if line.position not in over_user_cap]
    return over_user_cap | _over_cap(remaining_lines, terms, lambda line: (line.key, ""))


def _over_cap(
    lines: Sequence[FeedbackLine], terms: InboxTerms, rater_of: Callable[[FeedbackLine], RaterId]
) -> dict[LinePosition, str]:
    counts = Counter(map(rater_of, lines))
    max_rows = allowed(list(counts.values()), terms)
    row_counts: Counter[RaterId] = Counter()
    over_cap: dict[LinePosition, str] = {}
    for line in sorted(
        lines, key=lambda line: hashlib.sha256(f"{terms.seed}:{line.receipt}:{line.key}".encode()).digest()
    ):
        rater = rater_of(line)
        row_counts[rater] += 1
        if row_counts[rater] > max_rows:
            rater_kind = "user" if rater[1] else "key"
            over_cap[line.position] = (
                f"its {rater_kind} gives {counts[rater]} rows; of {len(counts)} that speak, one may give {max_rows}"
            )
    return over_cap


def allowed(counts: Sequence[int], terms: InboxTerms) -> int:
    """Return the largest number of rows that each rater may give.

    It is at most `most_fraction` of the rows that all raters then give together, or `most_rows` if that is more. With
    few raters, twice the even share replaces the fraction: one or two raters may give everything.

    >>> allowed([1000, 20, 20, 20, 20, 20, 20, 20], InboxTerms())
    46
    >>> allowed([60], InboxTerms())
    60
    """
    # fixed point of m = max(most_rows, floor(fraction * sum_i min(count_i, m))), reached from above
    max_rows = max(counts, default=0)
    fraction = max(terms.most_fraction, 2 / len(counts)) if counts else 1.0
    while fraction < 1:
        lower_max = max(terms.most_rows, int(fraction * sum(min(count, max_rows) for count in counts)))
        if lower_max >= max_rows:
            break
        max_rows = lower_max
    return max_rows
