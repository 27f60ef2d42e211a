"""Cost of a teacher, of sampled replies and of their groups, for `plan`: measured on a few rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sartor.core.row_warnings import DataWarning
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models.base import Base
from sartor.tune.checkpoint_selection import last_reply
from sartor.tune.cost_model import FORWARD_FRACTION, TimeModel, take
from sartor.tune.distil_teachers import DistilTeacher
from sartor.tune.distillation import distil_rows
from sartor.tune.recipe import Distil, Grpo, ResolvedRecipe
from sartor.tune.tokenized_dataset import TokenizedDataset

# Tokens that the teacher scores as a sample, and tokens and rows of the sampled replies
_SCORED_TOKENS, _REPLY_TOKENS, _REPLY_ROWS = 256, 8, 8
ENDPOINT = "teacher_endpoint"


@dataclass(frozen=True)
class DistilCost:
    """Measured seconds of a teacher's pass and of a student's sampled reply.

    teacher_token_s: for each token that a teacher in this process reads; 0 for an endpoint.
    reply_token_s: for each token of the replies, several at a time; 0 without sampled replies.
    warnings: on what is not foreseen.
    """

    teacher_token_s: float
    reply_token_s: float
    warnings: Sequence[DataWarning] = ()

    def seconds(self, recipe: ResolvedRecipe, data: TokenizedDataset, tokens: int) -> float:
        """Return the seconds of a run that reads `tokens`, beside its own updates.

        The Dataset's own replies are scored once. Sampled replies are taken to be as long as those of the Dataset.
        """
        assert isinstance(recipe.objective, Distil)
        fraction = recipe.objective.on_policy
        held_out = sum(row.tokens for row in data.held_out) if recipe.evaluations else 0
        scored = held_out + (min(data.tokens, tokens) if fraction < 1 else 0)
        read = fraction * tokens
        replied = read * data.supervised_tokens / max(data.tokens, 1)
        return (scored + read) * self.teacher_token_s + replied * self.reply_token_s


def measure(
    objective: Distil, teacher: DistilTeacher, *, base: Base, model: Any, data: TokenizedDataset
) -> DistilCost:
    """Measure the teacher's pass and a few sampled replies. An endpoint is not asked."""
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
    prompts = [prompt for prompt, _ in map(last_reply, rows) if prompt][:_REPLY_ROWS]
    if not objective.on_policy or not prompts:
        return DistilCost(token_s, 0.0, warnings)
    return DistilCost(token_s, _reply_token_s(objective, prompts, base=base, model=model), warnings)


def _reply_token_s(objective: Distil | Grpo, prompts: Sequence[Sequence[int]], *, base: Base, model: Any) -> float:
    """Return the seconds of a token of sampled replies, measured on a few of them."""
    limit = min(_REPLY_TOKENS, objective.max_reply_tokens)
    sampling = Sampling(limit, temperature=objective.temperature)
    chat, reply_s = base.chat, 0.0
    for _ in range(2):  # the first time warms up
        started = time.perf_counter()
        replies = generate(model, prompts, stop=chat.stops, pad=chat.pad, sampling=sampling)
        reply_s = (time.perf_counter() - started) / sum(len(reply.ids) + 1 for reply in replies)
    return reply_s


def grpo_seconds(
    objective: Grpo, tokens: int, times: TimeModel, *, base: Base, model: Any, data: TokenizedDataset
) -> float:
    """Return the seconds of a run of GRPO that reads `tokens`, beside one update of each row.

    Replies are taken to be as long as those of the Dataset. The verifier's own time is not part of it.
    """
    prompts = [prompt for prompt, _ in map(last_reply, distil_rows(take(data.train, _SCORED_TOKENS))) if prompt]
    if not prompts:
        return 0.0
    replied = objective.group_size * tokens * data.supervised_tokens / max(data.tokens, 1)
    # every reply of a group but one, and of all of them the reference's pass
    passes = objective.group_size - 1 + (objective.group_size * FORWARD_FRACTION if objective.beta else 0.0)
    reply_s = _reply_token_s(objective, prompts[:_REPLY_ROWS], base=base, model=model)
    return replied * reply_s + passes * tokens * times.token_s
