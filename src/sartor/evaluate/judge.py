"""Judging of base and tuned replies by a model, and the tests that the judge itself has to pass.

Each pair of replies is asked in both orders, and a reply wins only if both answers name it; else the pair is a tie
(Zheng et al. 2023, arXiv:2306.05685, section 3.4). Before any of the rows, the judge is asked planted pairs, whose
better reply is known: the reference of a row against that of another row, or against itself with its words dropped and
shuffled. A judge that does not find the better reply in clearly more than LEAST_ACCURACY of them is refused.
Intervals of fractions are exact (Clopper & Pearson 1934); the gain has that of the Report's metrics (`bootstrap.py`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sartor.core.errors import SartorError
from sartor.core.progress import Progress
from sartor.core.statistics import interval
from sartor.curate.review.quality_control import ReviewerAgreement
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.evaluate.judge_models import (
    CHARACTERS_PER_TOKEN,
    Judge,
    JudgeQuestion,
    Verdict,
    check_judge,
    open_judge,
)
from sartor.evaluate.judge_options import LEAST_PLANTED, JudgeOptions, LabelledPair, read_labels

Notice = Callable[[str], object]
# The lower end of the accuracy on planted pairs has to lie above this
LEAST_ACCURACY = 0.6
# A row gives at most so many planted pairs: more of one row would be no independent trials of the judge
PLANTED_OF_A_ROW = 2


class Winner(StrEnum):
    """Reply that won a pair, as people's labels name them."""

    FIRST = "a"
    SECOND = "b"
    TIE = "tie"


class Outcome(StrEnum):
    """End of a judging: it counts, or the judge is useless, or it could not be asked."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True)
class JudgedRow:
    """A row with the answers of both sides. group: rows of one group fail together."""

    prompt: str
    reference: str
    base: str
    tuned: str
    group: str


@dataclass(frozen=True)
class ReplyPair:
    """Two replies to a prompt. reference: empty for none."""

    prompt: str
    first: str
    second: str
    reference: str = ""


@dataclass(frozen=True)
class PairVerdict:
    """Answers to a pair as it is, and with its replies swapped: there A names the second reply."""

    plain: Verdict
    swapped: Verdict

    @property
    def winner(self) -> Winner:
        """The reply that both answers name; a tie where they name none, or two."""
        if self.plain is Verdict.FIRST and self.swapped is Verdict.SECOND:
            return Winner.FIRST
        if self.plain is Verdict.SECOND and self.swapped is Verdict.FIRST:
            return Winner.SECOND
        return Winner.TIE

    @property
    def is_flipped(self) -> bool:
        """Whether both answers name the same place, whatever stands there."""
        return self.plain is self.swapped and self.plain in (Verdict.FIRST, Verdict.SECOND)


@dataclass(frozen=True)
class JudgeResult:
    """Result of a judging.

    facts: for the manifest of a Report.
    winners: of each row: base, tuned or tie; None where it was not judged.
    """

    facts: dict[str, Any]
    winners: list[str | None]


@dataclass(frozen=True)
class JudgePlan:
    """A judge that was asked for, with the pairs that people labelled."""

    options: JudgeOptions
    labels: Sequence[LabelledPair] = ()

    @classmethod
    def of(cls, options: JudgeOptions, labels: Path | None) -> JudgePlan:
        """Return the plan, checked as far as it can be before a model is opened. Raises what is wrong with it."""
        check_judge(options.judge)
        return cls(options, read_labels(labels) if labels else ())

    def run(self, rows: Sequence[JudgedRow | None], notice: Notice) -> JudgeResult:
        """Judge the rows; None is a row that a judge of texts cannot see.

        An error of the judge is a fact of the result and is not raised: what else was measured is kept.
        """
        facts: dict[str, Any] = {
            "rubric": self.options.rubric,
            "max_characters": self.options.max_characters,
            "not_text": sum(row is None for row in rows),
        }
        try:
            judge = open_judge(self.options.judge, notice)
            facts["judge"] = judge.name
            judged, winners = self._judged(judge, rows, notice)
        except SartorError as error:
            failure = {"kind": error.kind, "problem": error.problem, "remedy": error.remedy}
            judged, winners = {"outcome": Outcome.FAILED.value, "failure": failure}, [None] * len(rows)
        facts |= judged
        facts["sentence"] = sentence(facts)
        notice(facts["sentence"])
        return JudgeResult(facts, winners)

    def _judged(
        self, judge: Judge, rows: Sequence[JudgedRow | None], notice: Notice
    ) -> tuple[dict[str, Any], list[str | None]]:
        """Return the facts of the verdicts, and the winner of each row."""
        texts = [row for row in rows if row is not None]
        # equal answers are a tie without a question
        differing = [row for row in texts if row.base.strip() != row.tuned.strip()]
        planted = list(planted_pairs(texts, self.options.planted, self.options.seed))
        pairs = [ReplyPair(row.prompt, row.base, row.tuned, row.reference) for row in differing]
        labelled = [ReplyPair(pair.prompt, pair.reply_a, pair.reply_b, pair.reference) for pair in self.labels]
        questions = [self._questions(pair) for pair in (*planted, *pairs, *labelled)]
        characters = sum(len(question.text) for both in questions for question in both)
        notice(
            f"judging by {judge.name}: {2 * len(planted)} questions that test the judge, then {2 * len(pairs)} of the "
            f"rows and {2 * len(labelled)} of the labels, about {characters // CHARACTERS_PER_TOKEN:,} tokens"
        )
        with Progress("judge", 2 * len(questions), "questions", notice) as progress:
            trial = self._trial(planted, self._ask(judge, planted, progress))
            if trial["pairs"] < LEAST_PLANTED or trial["low"] <= LEAST_ACCURACY:
                return {"outcome": Outcome.REFUSED.value, "planted": trial}, [None] * len(rows)
            verdicts = self._ask(judge, pairs, progress)
            agreement = _agreement(self.labels, self._ask(judge, labelled, progress))
        facts: dict[str, Any] = {"outcome": Outcome.ACCEPTED.value, "planted": trial, "agreement": agreement}
        facts["clipped"] = sum(self._questions(pair)[0].is_clipped for pair in pairs)
        names = {Winner.FIRST: "base", Winner.SECOND: "tuned", Winner.TIE: "tie"}
        by_row = dict(zip(map(id, differing), (names[verdict.winner] for verdict in verdicts), strict=True))
        winners = [None if row is None else by_row.get(id(row), "tie") for row in rows]
        groups = [row.group for row in texts]
        facts |= _counted([winner for winner in winners if winner is not None], groups, verdicts)
        return facts, winners

    def _questions(self, pair: ReplyPair) -> tuple[JudgeQuestion, JudgeQuestion]:
        """Return the questions of a pair, in both orders."""

        def question(first: str, second: str) -> JudgeQuestion:
            limit = self.options.max_characters
            return JudgeQuestion(
                self.options.rubric, pair.prompt, first, second, reference=pair.reference, limit=limit
            )

        return question(pair.first, pair.second), question(pair.second, pair.first)

    def _ask(self, judge: Judge, pairs: Sequence[ReplyPair], progress: Progress) -> list[PairVerdict]:
        """Return the verdicts of pairs, asked in both orders."""
        questions = [question for pair in pairs for question in self._questions(pair)]
        answers: list[Verdict] = []
        for start in range(0, len(questions), judge.at_once):
            answers += judge.ask(questions[start : start + judge.at_once])
            progress.advance(len(questions[start : start + judge.at_once]))
        return [PairVerdict(*answers[start : start + 2]) for start in range(0, len(answers), 2)]

    def _trial(self, planted: Sequence[ReplyPair], verdicts: Sequence[PairVerdict]) -> dict[str, Any]:
        """Return how many planted pairs, whose first reply is the better one, the judge got right."""
        right = sum(verdict.winner is Winner.FIRST for verdict in verdicts)
        low, high = interval(right, len(planted))
        return {
            "pairs": len(planted),
            "right": right,
            "accuracy": right / len(planted) if planted else 0.0,
            "low": low,
            "high": high,
            "least": LEAST_ACCURACY,
            "position": _position(verdicts),
        }


def planted_pairs(rows: Sequence[JudgedRow], count: int, seed: int) -> Iterator[ReplyPair]:
    """Yield at most `count` different pairs of a row's reference and a worse reply, the better one first.

    The worse reply is the reference of another row in half of the pairs, and in the others the reference itself,
    spoiled. A row gives one pair of each kind at most, and rows with the same prompt and reference count as one: the
    interval of the judge's accuracy takes the pairs as independent. Each is asked as the rows are, beside the
    reference.
    """
    usable = list({(row.prompt, row.reference): row for row in rows if row.reference.strip()}.values())
    draw = random.Random(seed)
    order = draw.sample(usable, len(usable))
    planted = 0
    for turn in range(PLANTED_OF_A_ROW):
        for index, row in enumerate(order):
            if planted == count:
                return
            others = [other.reference for other in usable if other.reference.strip() != row.reference.strip()]
            # by turns, and the other way round the next time that a row is taken
            is_of_other = index % PLANTED_OF_A_ROW == turn
            if is_of_other and not others:
                continue
            worse = draw.choice(others) if is_of_other else spoiled(row.reference, draw)
            planted += 1
            yield ReplyPair(row.prompt, row.reference, worse, row.reference)


def spoiled(text: str, draw: random.Random) -> str:
    """Return a text with half of its words dropped and the others shuffled; one of few words has shuffled letters.

    Where that gives the text itself, it says that it is wrong.
    """
    words = text.split()
    parts = words if len(words) > 3 else list(text.strip())
    left = draw.sample(parts, max(1, len(parts) // 2)) if len(words) > 3 else draw.sample(parts, len(parts))
    worse = (" " if len(words) > 3 else "").join(left)
    return worse if worse.strip() and worse != text.strip() else f"This is wrong: not {text.strip()}"


def _counted(winners: Sequence[str], groups: Sequence[str], verdicts: Sequence[PairVerdict]) -> dict[str, Any]:
    """Return wins, losses and ties of the tuned replies, the win rate with its interval, and the position bias.

    winners, groups: of all rows that could be judged. verdicts: of those whose replies differ.
    """
    counts = Counter(winners)
    # a tie is half a win for both
    tuned = [{"tuned": 1.0, "tie": 0.5, "base": 0.0}[winner] for winner in winners]
    base = [1 - score for score in tuned]
    return {
        "rows": len(winners),
        "same": len(winners) - len(verdicts),
        "wins": counts["tuned"],
        "losses": counts["base"],
        "ties": counts["tie"],
        "win_rate": _win_rate(winners, groups),
        "comparison": asdict(paired_bootstrap(base, tuned, groups)) if winners else None,
        "position": _position(verdicts),
    }


def _win_rate(winners: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
    """Return the fraction of groups that tuned wins, of those with a winner, and its exact interval.

    Rows of one group fail together, so that a group has one vote: its winner is that of more of its rows. Without
    groups each row is one, and the rate is that of the rows.
    """
    leads: Counter[str] = Counter()
    for winner, group in zip(winners, groups, strict=True):
        leads[group] += (winner == "tuned") - (winner == "base")
    won, decided = sum(lead > 0 for lead in leads.values()), sum(lead != 0 for lead in leads.values())
    low, high = interval(won, decided)
    return {"estimate": won / decided if decided else None, "low": low, "high": high, "groups": decided}


def _position(verdicts: Sequence[PairVerdict]) -> dict[str, Any]:
    """Return how often the reply that stands first is named, of the answers that name one.

    Each pair is asked in both orders, so that a judge without a bias names the first one in half of them. flipped:
    pairs in which both answers name the same place.
    """
    answers = [answer for verdict in verdicts for answer in (verdict.plain, verdict.swapped)]
    counts = Counter(answers)
    named = counts[Verdict.FIRST] + counts[Verdict.SECOND]
    low, high = interval(counts[Verdict.FIRST], named)
    return {
        "first": counts[Verdict.FIRST],
        "named": named,
        "rate": counts[Verdict.FIRST] / named if named else None,
        "low": low,
        "high": high,
        "flipped": sum(verdict.is_flipped for verdict in verdicts),
        "unreadable": counts[Verdict.UNREADABLE],
        "too_long": counts[Verdict.TOO_LONG],
    }


def _agreement(labels: Sequence[LabelledPair], verdicts: Sequence[PairVerdict]) -> dict[str, Any] | None:
    """Return the agreement of the judge with people's labels, with Cohen's kappa; None without labels."""
    if not labels:
        return None
    table: Counter[tuple[str, str]] = Counter()
    for label, verdict in zip(labels, verdicts, strict=True):
        table[verdict.winner.value, label.preferred] += 1
    agreed = sum(count for (judged, preferred), count in table.items() if judged == preferred)
    return ReviewerAgreement(("judge", "labels"), len(labels), agreed, dict(table)).as_json()


def sentence(facts: dict[str, Any]) -> str:
    """Return what a judging found, in a sentence or two, for the terminal and the page of a Report."""
    if facts["outcome"] == Outcome.FAILED:
        return f"The judge failed, and the rest of the Report is kept: {facts['failure']['problem']}."
    trial = facts["planted"]
    if trial["pairs"] < LEAST_PLANTED:
        return (
            f"The judge {facts['judge']} was refused: the references of the rows give {trial['pairs']} planted pairs, "
            f"and fewer than {LEAST_PLANTED} do not test it. A row with a reference of its own gives "
            f"{PLANTED_OF_A_ROW}: evaluate on {LEAST_PLANTED // PLANTED_OF_A_ROW} such rows or more."
        )
    tested = (
        f"{trial['right']} of {trial['pairs']} planted pairs right, {trial['accuracy']:.2f} in "
        f"[{trial['low']:.2f}, {trial['high']:.2f}]"
    )
    if facts["outcome"] == Outcome.REFUSED:
        return (
            f"The judge {facts['judge']} was refused: {tested}, and the lower end has to lie above {trial['least']}. "
            f"It named the first reply in {_rate(trial['position'], facts['max_characters'])}."
        )
    win_rate = facts["win_rate"]
    won = "no group of rows has a winner" if win_rate["estimate"] is None else f"win rate {win_rate['estimate']:.2f}"
    parts = [
        f"The judge {facts['judge']} ({tested}) prefers tuned in {facts['wins']} rows and base in {facts['losses']}, "
        f"with {facts['ties']} ties ({facts['same']} of equal replies): {won} in [{win_rate['low']:.2f}, "
        f"{win_rate['high']:.2f}] of the {win_rate['groups']} groups of rows with a winner. It named the "
        f"first reply in {_rate(facts['position'], facts['max_characters'])}."
    ]
    if facts["agreement"] and facts["agreement"]["kappa"]:
        kappa = facts["agreement"]["kappa"]
        parts.append(
            f"With {facts['agreement']['items']} labels it has Cohen's kappa {kappa['estimate']:.2f} in "
            f"[{kappa['low']:.2f}, {kappa['high']:.2f}]."
        )
    return " ".join(parts)


def _rate(position: dict[str, Any], max_characters: int) -> str:
    if position["rate"] is None:
        return f"none of its answers ({_lost(position, max_characters)})"
    return (
        f"{position['rate']:.2f} of the answers that name one, in [{position['low']:.2f}, {position['high']:.2f}]; "
        f"{position['flipped']} pairs flipped with the order, {_lost(position, max_characters)}"
    )


def _lost(position: dict[str, Any], max_characters: int) -> str:
    """Return how many questions have no verdict, and why. Older Reports do not count those that were too long."""
    lost = f"{position['unreadable']} answers unreadable"
    if too_long := position.get("too_long", 0):
        lost += f", {too_long} questions too long for its context (try max_characters: {max(1, max_characters // 2)})"
    return lost
