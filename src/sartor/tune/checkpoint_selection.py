"""Choose the weights of an Adapter: the last, or an earlier evaluation's if better beyond chance.

At each evaluation every held-out row that is watched gets a score: whether the greedy reply is the reference, or,
where replies are long, its loss. Who takes the best of K evaluations has chosen by the noise of those rows. So the
best earlier one replaces the last only if it is better on more groups of rows than chance allows: the exact sign test
of the pairs (McNemar 1947) at LEVEL / (K - 1), Bonferroni's correction for having chosen among the earlier ones. Rows
of a group fail together, so a group is one piece of evidence however many rows it has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from sartor.core.lazy_import import import_module
from sartor.inference.engine import Sampling
from sartor.models.packing import TokenizedExample
from sartor.tune.recipe import ResolvedRecipe

if TYPE_CHECKING:
    from sartor.models.chat import ChatTokenizer

Metric = Literal["exact_match", "loss"]
LEVEL = 0.05
# Up to this median length of the references replies are generated; longer ones cost more than they tell
MAX_MEDIAN_REPLY_TOKENS = 64
# A reply may be this much longer than the longest reference beside it; a longer one is no match anyway
_SPARE_TOKENS = 4
# A row whose own reference is longer is not asked: it would cost as much as all others together
_MAX_REPLY_TOKENS = 4 * MAX_MEDIAN_REPLY_TOKENS
# Of one batch: its cache is a small part of what a micro-batch takes
_BATCH_ROWS = 16


@dataclass(frozen=True)
class CheckpointScore:
    """An evaluation. loss: nats per supervised token of all rows. scores: of each row, the higher the better."""

    update: int
    loss: float
    scores: Sequence[float]

    @property
    def score(self) -> float:
        """Mean over the rows."""
        return statistics.fmean(self.scores)


def last_reply(row: TokenizedExample) -> tuple[list[int], list[int]]:
    """(tokens of the prompt, tokens of the last reply with what ends it); no prompt for a document."""
    start, end = row.last_reply
    return row.ids[:start], row.ids[start:end]


def natural_metric(rows: Sequence[TokenizedExample]) -> Metric:
    """What a row's score is: exact match where each row has a prompt and their replies are short."""
    replies = [last_reply(row) for row in rows]
    if not all(prompt and reply for prompt, reply in replies):
        return "loss"
    median = statistics.median(len(reply) for _, reply in replies)
    return "exact_match" if median <= MAX_MEDIAN_REPLY_TOKENS else "loss"


def passes(recipe: ResolvedRecipe, rows: Sequence[TokenizedExample]) -> int:
    """How often an evaluation goes through the held-out rows: for their loss, and for replies, whose tokens cost the
    same.
    """
    return 2 if recipe.weights == "best" and rows and natural_metric(rows) == "exact_match" else 1


class CheckpointSelection:
    """The evaluations of a run, and the weights of the best one before the last.

    rows: the held-out rows. groups: of each. weights: by name of the parameter, on the CPU; empty before the first
    evaluation.
    """

    def __init__(self, chat: ChatTokenizer, rows: Sequence[TokenizedExample], groups: Sequence[str]) -> None:
        self.chat, self.rows, self.groups, self.metric = chat, rows, groups, natural_metric(rows)
        self.candidates: list[CheckpointScore] = []
        self.weights: dict[str, torch.Tensor] = {}

    def score_replies(self, model: Any) -> list[float]:
        """1.0 for each row to which the greedy reply of `model`, in eval mode, is the reference, else 0.0.

        A row whose reply has no room in the model's context, or is much longer than the others', is not asked and has
        0.0.
        """
        # devices load this module, tune without transformers, and reply to nothing
        generate = import_module("sartor.inference.generate")
        replies = [last_reply(row) for row in self.rows]
        scores = [0.0] * len(replies)
        context = generate.context_tokens(model) or math.inf
        for batch in reply_batches(replies, context):
            prompts = [replies[index][0] for index in batch]
            limit = max(len(replies[index][1]) for index in batch) + _SPARE_TOKENS
            room = context - max(map(len, prompts))
            generations = generate.generate(
                model,
                prompts,
                stop=self.chat.stops,
                pad=self.chat.pad,
                sampling=Sampling(int(min(limit, room))),
                batch_rows=_BATCH_ROWS,
            )
            for index, generation in zip(batch, generations, strict=True):
                scores[index] = float(self._text(generation.ids) == self._text(replies[index][1]))
        return scores

    def _text(self, ids: Sequence[int]) -> str:
        return self.chat.decode([token for token in ids if token not in self.chat.stops]).strip()

    def add(self, candidate: CheckpointScore, weights: dict[str, torch.Tensor]) -> None:
        """Take note of an evaluation; of two that are equal the later one is the better."""
        best = self._best([*self.candidates, candidate])
        self.candidates.append(candidate)
        if best is candidate:
            self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    @staticmethod
    def _best(candidates: Sequence[CheckpointScore]) -> CheckpointScore:
        return max(candidates, key=lambda candidate: (candidate.score, candidate.update))

    def choose(self) -> tuple[CheckpointScore, dict[str, Any]]:
        """Return the evaluation whose weights are kept, and why: the key `selection` of an Adapter's run.

        After the last evaluation; `weights` are those of the one that is returned if it is not the last.
        """
        last, earlier = self.candidates[-1], self.candidates[:-1]
        facts = {
            "metric": self.metric,
            "rows": len(self.rows),
            "level": LEVEL,
            "evaluations": [
                {"update": item.update, "loss": item.loss, "score": item.score} for item in self.candidates
            ],
        }
        best = self._best(self.candidates)
        if best is last or not earlier:
            return last, {**facts, "update": last.update, "p_value": None, "reason": "no earlier evaluation is better"}
        p_value = sign_test_p_value(*(group_means(item.scores, self.groups) for item in (best, last)))
        limit = LEVEL / len(earlier)
        comparison = (
            f"update {best.update}: {best.score:.3f} against {last.score:.3f}, p {p_value:.3f}, limit {limit:.3f}"
        )
        if p_value > limit:
            return last, {
                **facts,
                "update": last.update,
                "p_value": p_value,
                "reason": f"not beyond chance: {comparison}",
            }
        return best, {
            **facts,
            "update": best.update,
            "p_value": p_value,
            "reason": f"better beyond chance: {comparison}",
        }

    def state(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """(weights, evaluations) for a checkpoint."""
        return self.weights, [asdict(candidate) for candidate in self.candidates]

    def restore(self, weights: dict[str, torch.Tensor], candidates: Sequence[dict[str, Any]]) -> None:
        """Become what `state` returned."""
        self.weights, self.candidates = weights, [CheckpointScore(**candidate) for candidate in candidates]


def reply_batches(replies: Sequence[tuple[Sequence[int], Sequence[int]]], context: float) -> list[list[int]]:
    """Rows to ask together: (their indices,) a batch, so that each has room for the longest of its references.

    replies: (prompt, reference) of each row, in tokens. Rows that have no room even alone are in none.
    """
    batches: list[list[int]] = []
    longest_prompt = 0
    for index in sorted(range(len(replies)), key=lambda index: len(replies[index][1])):
        prompt, reply = map(len, replies[index])
        if reply > _MAX_REPLY_TOKENS or prompt + reply > context:
            continue
        # references come shortest first: this one is the longest of its batch
        is_full = not batches or len(batches[-1]) == _BATCH_ROWS
        if is_full or max(prompt, longest_prompt) + reply > context:
            batches.append([])
            longest_prompt = 0
        batches[-1].append(index)
        longest_prompt = max(prompt, longest_prompt)
    return batches


def group_means(scores: Sequence[float], groups: Sequence[str]) -> list[float]:
    """The mean score of each group, in the order of their names.

    >>> group_means([1.0, 0.0, 1.0], ["b", "b", "a"])
    [1.0, 0.5]
    """
    by_group: dict[str, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        by_group.setdefault(group, []).append(score)
    return [statistics.fmean(by_group[group]) for group in sorted(by_group)]


def sign_test_p_value(better: Sequence[float], worse: Sequence[float]) -> float:
    """One-sided p-value of paired scores, equal pairs aside; of scores of 0 and 1 it is McNemar's exact test.

    >>> sign_test_p_value([1, 1, 1, 0], [0, 0, 1, 0])
    0.25
    """
    from scipy.stats import binomtest  # a second to load, for the end of a run

    differences = [first - second for first, second in zip(better, worse, strict=True) if first != second]
    wins = sum(difference > 0 for difference in differences)
    return float(binomtest(wins, len(differences), alternative="greater").pvalue) if differences else 1.0
