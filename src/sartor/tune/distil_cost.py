"""Cost of a teacher, of sampled replies and of their groups, for `plan`: measured on a few rows."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sartor.core.row_warnings import DataWarning
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models.base import Base
from sartor.models.losses.transformers_backend import unpacked
from sartor.tune.checkpoint_selection import last_reply
from sartor.tune.cost_model import FORWARD_FRACTION, MOST_HALF_WIDTH, Interval, TimeModel, take
from sartor.tune.distil_teachers import DistilTeacher
from sartor.tune.distillation import distil_rows
from sartor.tune.recipe import Distil, Grpo, ResolvedRecipe
from sartor.tune.tokenized_dataset import TokenizedDataset
from sartor.tune.training_loop import Counters

# Tokens that the teacher scores as a sample, and of the sampled replies
_SCORED_TOKENS, _REPLY_TOKENS = 256, 8
# Replies that `generate` computes at once, and most tokens of the prompts of a sample of them
_BATCH_ROWS, _SAMPLED_TOKENS = 64, 4096
# Power by which the time of a step grows with the rows of the batch, for an estimate
_GROWTH = 0.5
ENDPOINT = "teacher_endpoint"


@dataclass(frozen=True)
class SamplingTimes:
    """Measured seconds of replies to a batch of prompts.

    rows: of the batch. prompt_token_s: for each token of its prompts. step_s: for one token of every reply.
    """

    rows: int
    prompt_token_s: float
    step_s: float

    def seconds(self, rows: float, prompt_tokens: float, reply_tokens: float, growth: float) -> float:
        """Return the seconds of replies to `rows` prompts of so many tokens together.

        growth: power by which the time of a step grows with the rows beyond the measured ones, 0 to 1.
        """
        return prompt_tokens * self.prompt_token_s + reply_tokens * self.step_s * max(rows / self.rows, 1.0) ** growth


@dataclass(frozen=True)
class DistilCost:
    """Measured seconds of a teacher's pass and of a batch of the student's sampled replies.

    teacher_token_s: for each token that a teacher in this process reads; 0 for an endpoint.
    replies: of the rows of an update that are sampled; None without sampled replies.
    warnings: on what is not foreseen.
    """

    teacher_token_s: float
    replies: SamplingTimes | None = None
    warnings: Sequence[DataWarning] = ()

    def seconds(
        self, recipe: ResolvedRecipe, counters: Counters, times: TimeModel, data: TokenizedDataset
    ) -> Interval:
        """Return the seconds of a run beside its updates on the rows' own replies.

        Those replies are scored once. Nobody knows how long the sampled ones will be: the estimate has the length of
        the Dataset's, the ends of the interval have one token and `max_reply_tokens`.
        """
        objective = recipe.objective
        assert isinstance(objective, Distil)
        held_out = sum(row.tokens for row in data.held_out) if recipe.evaluations else 0
        off_policy = min(data.tokens, counters.tokens) if objective.on_policy < 1 else 0
        scored_s = (held_out + off_policy) * self.teacher_token_s
        if self.replies is None:
            return Interval(scored_s, scored_s, scored_s)
        replies = self.replies
        sampled_rows = objective.on_policy * counters.tokens * len(data.train) / max(data.tokens, 1)
        prompt_tokens = objective.on_policy * counters.tokens * (1 - data.supervised_tokens / max(data.tokens, 1))
        own_reply = data.supervised_tokens / len(data.train)
        rows = sampled_rows / max(counters.updates, 1)

        def seconds(reply_tokens: float, growth: float) -> float:
            sampling_s = replies.seconds(rows, prompt_tokens, reply_tokens * counters.updates, growth)
            read_s = (prompt_tokens + sampled_rows * reply_tokens) * self.teacher_token_s
            return scored_s + sampling_s + read_s + sampled_rows * (reply_tokens - own_reply) * times.token_s

        longest = float(objective.max_reply_tokens)
        estimate = seconds(min(own_reply, longest), _GROWTH)
        low, high = seconds(1.0, 0.0), seconds(longest, 1.0)
        return Interval(estimate, min(low - abs(low) * MOST_HALF_WIDTH, estimate), high * (1 + MOST_HALF_WIDTH))


def measure(
    objective: Distil, teacher: DistilTeacher, counters: Counters, *, base: Base, model: Any, data: TokenizedDataset
) -> DistilCost:
    """Measure the teacher's pass and a batch of sampled replies. An endpoint is not asked.

    counters: of the planned run, by which an update's sampled rows are known.
    """
    rows = distil_rows(take(data.train, _SCORED_TOKENS))
    token_s, warnings = 0.0, list[DataWarning]()
    if teacher.is_remote:
        problem = f"the time and price of {teacher.name} are not part of the forecast: it is asked by `tune` alone"
        warnings.append(DataWarning(ENDPOINT, problem, "budget: {updates: 2}, and the log's tokens_per_s"))
    elif rows:
        # the first pass chooses and checks the path
        teacher.score(rows)
        started = time.perf_counter()
        teacher.score(rows)
        token_s = (time.perf_counter() - started) / sum(row.tokens for row in rows)
    prompts = [prompt for prompt, _ in map(last_reply, rows) if prompt]
    if not objective.on_policy or not prompts:
        return DistilCost(token_s, warnings=warnings)
    update_rows = counters.tokens / max(counters.updates, 1) * len(data.train) / max(data.tokens, 1)
    batch = _repeated(prompts, round(objective.on_policy * update_rows))
    return DistilCost(token_s, sampling_times(objective, batch, base=base, model=model), warnings)


def _repeated(prompts: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Return `count` prompts for a timed batch, each as often as needed; fewer if the memory might not hold them."""
    fitting = max(_SAMPLED_TOKENS // max(map(len, prompts)), 1)
    return list(itertools.islice(itertools.cycle(prompts), max(min(count, fitting, _BATCH_ROWS), 1)))


def sampling_times(
    objective: Distil | Grpo, prompts: Sequence[Sequence[int]], *, base: Base, model: Any
) -> SamplingTimes:
    """Return the times of a batch of prompts, measured on replies of one token and of several.

    No reply ends before its limit here, so the number of tokens is known.
    """
    limit = min(_REPLY_TOKENS, objective.max_reply_tokens)
    seconds = {}
    for tokens in (1, 1, limit):  # the first time warms up
        sampling = Sampling(tokens, temperature=objective.temperature)
        started = time.perf_counter()
        with unpacked(model):
            generate(model, prompts, stop=(), pad=base.chat.pad, sampling=sampling)
        seconds[tokens] = time.perf_counter() - started
    step_s = max(seconds[limit] - seconds[1], 0.0) / max(limit - 1, 1)
    prompt_s = max(seconds[1] - step_s, 0.0)
    return SamplingTimes(len(prompts), prompt_s / sum(map(len, prompts)), step_s)


def grpo_seconds(
    recipe: ResolvedRecipe, counters: Counters, times: TimeModel, *, base: Base, model: Any, data: TokenizedDataset
) -> Interval:
    """Return the seconds of a run of GRPO beside one update of each row that it reads.

    Nobody knows how long the replies will be: the ends of the interval are replies of one token, of which none is
    learnt, and replies of `max_reply_tokens`, all of which are. The estimate has those of the Dataset. The verifier's
    own time is not part of it.
    """
    objective = recipe.objective
    assert isinstance(objective, Grpo)
    prompts = [prompt for prompt, _ in map(last_reply, distil_rows(take(data.train, _SCORED_TOKENS))) if prompt]
    if not prompts:
        return Interval(0.0, 0.0, 0.0)
    rows_read = counters.tokens * len(data.train) / max(data.tokens, 1)
    size, updates = objective.group_size, max(counters.updates, 1)
    batches = math.ceil(rows_read / updates * size / _BATCH_ROWS)  # of an update
    rows = rows_read / updates * size / batches
    sampled = _repeated([prompt for prompt in prompts for _ in range(size)], round(rows))
    replies = sampling_times(objective, sampled, base=base, model=model)
    # the Dataset's own replies stand for prompts and replies of the run
    own_reply = min(data.supervised_tokens / len(data.train), float(objective.max_reply_tokens))
    prompt_tokens = counters.tokens * (1 - data.supervised_tokens / max(data.tokens, 1))
    evaluated = len(data.held_out) * recipe.evaluations

    def seconds(reply_tokens: float, growth: float, *, is_shared: bool, is_learnt: bool) -> float:
        all_prompts = size * prompt_tokens * (1 + evaluated / (size * max(rows_read, 1.0)))
        steps = reply_tokens * (updates * batches + recipe.evaluations * math.ceil(len(data.held_out) / _BATCH_ROWS))
        sampling_s = replies.seconds(rows, all_prompts, steps, growth)
        if not is_learnt:
            return sampling_s - counters.tokens * times.token_s
        replied = size * rows_read * reply_tokens
        passed = replied + prompt_tokens * (1 if is_shared else size)
        reference = (replied + size * prompt_tokens) * FORWARD_FRACTION if objective.beta else 0.0
        return sampling_s + (passed + reference - counters.tokens) * times.token_s

    estimate = seconds(own_reply, _GROWTH, is_shared=recipe.compute.share_prefixes, is_learnt=True)
    low = seconds(1.0, 0.0, is_shared=True, is_learnt=False)
    high = seconds(objective.max_reply_tokens, 1.0, is_shared=False, is_learnt=True)
    return Interval(estimate, min(low - abs(low) * MOST_HALF_WIDTH, estimate), high * (1 + MOST_HALF_WIDTH))
