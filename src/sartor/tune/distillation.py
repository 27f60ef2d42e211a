"""Training loop of distillation: a student learns the distributions of a teacher.

Off-policy the teacher scores the rows' own replies once, before the first update. On-policy the student samples a new
reply to a row's prompt at each update, and the teacher scores that. A sampled reply depends on the seed, the number of
the update and the weights alone, so a resumed run samples it again. Scores of rows, and all scores of an endpoint, are
on disk before they are used (`teacher_scores.py`).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from sartor.core.errors import BusyError, SartorError, StoppedError, UnavailableError
from sartor.core.processes import DeferredSignals
from sartor.inference.engine import Sampling
from sartor.models.chat import ChatTokenizer
from sartor.models.losses.token_scores import token_log_probabilities
from sartor.models.packing import TokenizedExample
from sartor.tune import objectives
from sartor.tune.checkpoint_selection import last_reply
from sartor.tune.distil_teachers import DistilTeacher, Notice, check_aligned
from sartor.tune.objectives import Divergence
from sartor.tune.recipe import Distil
from sartor.tune.reply_sampling import sample_replies, update_seed
from sartor.tune.teacher_scores import ScoreBatch, ScoreFiles, TeacherScore
from sartor.tune.tokenized_dataset import DistilExample
from sartor.tune.training_loop import TrainingRun

# Rows that are scored together before the first update, so that a kill loses at most the scores of so many
_SCORED_ROWS = 32
# Half-width of a normal 95 % interval, in standard errors
_STANDARD_ERRORS = 1.96


class DistilRun(TrainingRun):
    """TrainingRun for distillation.

    An update's loss is the weighted mean of the divergence over the units of its rows (tokens, or chunks of text under
    another tokenizer), plus `plain_weight` times the sft loss of rehearsal.
    """

    teacher: DistilTeacher
    files: ScoreFiles
    notice: Notice

    def set_teacher(self, teacher: DistilTeacher, notice: Notice) -> None:
        """Set the teacher. Call it before `train`."""
        self.teacher, self.notice = teacher, notice
        self.files = ScoreFiles(self.saver.folder, f"{teacher.identity}:{self._objective.top_k}")
        # scores of the Dataset's own replies, by the id of the row's object
        self.scores: dict[int, TeacherScore] = {}
        # nats per token that the held-out rows cost more than under the teacher, and the upper end of its interval
        self.forgetting: dict[str, float] = {}

    @property
    def _objective(self) -> Distil:
        assert isinstance(self.recipe.objective, Distil)
        return self.recipe.objective

    @property
    def _chat(self) -> ChatTokenizer:
        chat = getattr(self.base, "chat", None)
        assert isinstance(chat, ChatTokenizer)
        return chat

    def teacher_facts(self) -> dict[str, Any]:
        """Return the facts about the teacher for the manifest."""
        return {
            "name": self.teacher.name,
            "identity": self.teacher.identity,
            "licence": self.teacher.licence,
            "is_remote": self.teacher.is_remote,
            **self.forgetting,
            "ended_by_forgetting": self.is_done,
        }

    def train(self, signals: DeferredSignals) -> None:
        """Score the rows' own replies, then train."""
        self.notice(f"teacher {self.teacher.name}: {self.teacher.note}")
        self.score_rows(signals)
        super().train(signals)
        if self.is_done:
            upper = self.forgetting["forgetting_high"]
            self.notice(f"ended after update {self.counters.updates}: forgetting is at most {upper:.4f} nats a token")

    def score_rows(self, signals: DeferredSignals) -> None:
        """Let the teacher score the Dataset's replies that the run needs, unless its files have them.

        Raises StoppedError after a signal; what was scored is kept.
        """
        rows = distil_rows(self.data.held_out) if self.evaluation_points else []
        rows = [row for row in self.data.train if isinstance(row, DistilExample) and self._needs_own(row)] + rows
        for first in range(0, len(rows), _SCORED_ROWS):
            if signals.received:
                problem = f"{signals.received.name} after the teacher scored {first:,} of {len(rows):,} rows"
                raise StoppedError(problem, _going_on(self.counters.updates), int(signals.received))
            group = rows[first : first + _SCORED_ROWS]
            scores = self.files.read(group)
            if scores is None:
                scores = self._ask(group)
                self.files.write(group, scores)
            self.scores |= {id(row): score for row, score in zip(group, scores, strict=True)}
        unaligned = check_aligned(rows, [self.scores[id(row)] for row in rows], self.teacher)
        if unaligned:
            self.notice(f"in {unaligned:,} of {len(rows):,} rows no reply is spelt alike: they teach nothing")
        self.journal.note(teacher_rows=len(rows), unaligned_rows=unaligned)

    def _needs_own(self, row: DistilExample) -> bool:
        """Return whether a training row's own reply may be learnt: all but those whose replies are always sampled."""
        return self._objective.on_policy < 1 or not last_reply(row)[0]

    def _ask(self, rows: Sequence[DistilExample]) -> list[TeacherScore]:
        """Return the teacher's scores of rows. An endpoint that is lost is an error with the way to go on."""
        try:
            return self.teacher.score(rows)
        except (BusyError, UnavailableError) as error:
            raise _lost(error, self.counters.updates) from None

    def _backward(self, rows: Sequence[TokenizedExample], weight: float = 1.0) -> float:
        own, plain_rows = distil_rows(rows), [row for row in rows if not isinstance(row, DistilExample)]
        loss = super()._backward(plain_rows, weight * self._objective.plain_weight) if plain_rows else 0.0
        learnt, sampled, scores = self._replies(own)
        total = sum(row.weight * scores[id(row)].units for row in [*learnt, *sampled]) or 1.0
        for replies, divergence in ((learnt, self._divergence()), (sampled, self._divergence(is_sampled=True))):
            for micro in self._cut(replies) if replies else []:
                values, weights = self._divergences(micro, scores, divergence)
                objective = weight * objectives.sft(values, weights, total)
                self.scaler.scale(objective).backward()
                loss += float(objective.detach())
        return loss

    def _divergence(self, *, is_sampled: bool = False) -> Divergence:
        """Return the divergence of sampled replies, or of the rows' own.

        Of a reply that the student would hardly give, KL(student || teacher) has hardly a gradient: its weights are
        the student's probabilities. On the student's own replies they are not small.
        """
        if self._objective.divergence == "auto":
            return "reverse" if is_sampled else "forward"
        return self._objective.divergence

    def _replies(
        self, rows: Sequence[DistilExample]
    ) -> tuple[list[DistilExample], list[DistilExample], dict[int, TeacherScore]]:
        """Return an update's rows with their own replies, those with sampled ones, and the scores of all."""
        chosen = [row for row in rows if self._is_sampled(row)]
        chosen_ids = {id(row) for row in chosen}
        learnt = [row for row in rows if id(row) not in chosen_ids]
        scores = {id(row): self.scores[id(row)] for row in learnt}
        self.objective_facts = {"sampled": len(chosen)}
        if not chosen:
            return learnt, [], scores
        sampled = self.sample(chosen)
        found = self.files.read(sampled) if self.teacher.is_remote else None
        if found is None:
            found = self._ask(sampled)
            if self.teacher.is_remote:
                self.files.write(sampled, found)
        scores |= {id(row): score for row, score in zip(sampled, found, strict=True)}
        tokens = [row.supervised_tokens for row in sampled]
        self.objective_facts["sampled_tokens"] = round(statistics.fmean(tokens), 1)
        return learnt, sampled, scores

    def _is_sampled(self, row: DistilExample) -> bool:
        """Return whether the student replies to a row's prompt in this update, by the seed."""
        if not last_reply(row)[0]:
            return False
        draw = random.Random(f"{self.recipe.seed}:{self.counters.updates}:{row.example_id}").random()
        return draw < self._objective.on_policy

    def sample(self, rows: Sequence[DistilExample]) -> list[DistilExample]:
        """Return rows with the student's own replies in place of their last ones."""
        sampling = Sampling(
            self._objective.max_reply_tokens,
            temperature=self._objective.temperature,
            seed=update_seed(self.recipe.seed, self.counters.updates),
        )
        return sample_replies(self.model, self._chat, rows, sampling)

    def _divergences(
        self, rows: Sequence[TokenizedExample], scores: dict[int, TeacherScore], divergence: Divergence
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divergences and weights of the units of rows, (U,) each."""
        batch = ScoreBatch.of([scores[id(row)] for row in rows], self.base.device)
        student = batch.student_bins(token_log_probabilities(self.path, rows, batch.ids))
        values = objectives.distil(
            student,
            batch.teacher,
            divergence=divergence,
            mixture=self._objective.mixture,
            temperature=self._objective.loss_temperature,
        )
        weights = torch.tensor([row.weight for row in rows], device=self.base.device)
        return values, weights[batch.row]

    def _loss_of(self, rows: Sequence[TokenizedExample]) -> tuple[float, dict[str, float]]:
        """Return the held-out rows' divergence per unit on their own replies, and what they forgot.

        Forgetting is the mean over rows of the nats per token by which the row's own replies are less likely than
        under the teacher; `forgetting_high` is the upper end of its normal 95 % interval.
        """
        own = distil_rows(rows)
        total, count = 0.0, 0
        excess: list[float] = []
        for micro in self._cut(own):
            values, _ = self._divergences(micro, self.scores, self._divergence())
            total, count = total + float(values.sum()), count + len(values)
            losses, _ = self.path.losses(micro)
            found = [self.scores[id(row)] for row in micro]
            batch = ScoreBatch.of(found, self.base.device)
            differences = batch.target - batch.student_targets(losses)
            for part, score in zip(differences.split([score.units for score in found]), found, strict=True):
                if score.units:
                    excess.append(float(part.sum()) / int((score.unit >= 0).sum()))
        facts = _mean_and_upper_end(excess)
        self.forgetting = {name: round(value, 6) for name, value in facts.items()}
        limit = self._objective.stop_at_forgetting
        if limit is not None and facts.get("forgetting_high", math.inf) <= limit:
            self.is_done = True
        return total / max(count, 1), facts


def distil_rows(rows: Sequence[TokenizedExample]) -> list[DistilExample]:
    """Return the rows that a teacher scores."""
    return [row for row in rows if isinstance(row, DistilExample)]


def _mean_and_upper_end(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over rows, and the upper end of its interval; empty for fewer than two rows."""
    if len(values) < 2:
        return {}
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return {"forgetting": mean, "forgetting_high": mean + _STANDARD_ERRORS * error}


def _lost(error: BusyError | UnavailableError, updates: int) -> SartorError:
    """Return the error for an endpoint that does not answer any more."""
    problem = f"the teacher is lost after update {updates}: {error.problem}"
    return UnavailableError(problem, _going_on(updates))


def _going_on(updates: int) -> str:
    """Return how a run goes on: before the first update there is no checkpoint to resume from."""
    if updates:
        return "the same command with --resume, in place of --replace, goes on there; what was scored is kept"
    return "the same command goes on there; what was scored is kept, unless it says --replace"
