"""Choice of an Adapter's weights: the last, or an earlier evaluation's if better beyond chance.

Each evaluation scores every watched held-out row: 1 if the greedy reply equals the reference, or, if replies are long,
the negative loss. Taking the best of K evaluations would also select for the noise of those rows. So the best earlier
evaluation replaces the last only if it is better on more groups of rows than chance allows. The test is the exact sign
test of pairs (McNemar 1947) at level LEVEL / (K - 1), Bonferroni's correction for the choice among the K - 1 earlier
ones. Rows of a group fail together, so a group counts once, however many rows it has.
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
# Replies are generated if the references' median length is at most this; longer ones cost too much for what they show
MAX_MEDIAN_REPLY_TOKENS = 64
# A reply may be this much longer than the longest reference of its batch; a longer one cannot match
_SPARE_TOKENS = 4
# No reply is generated for a longer reference: it would cost as much as all others together
_MAX_REPLY_TOKENS = 4 * MAX_MEDIAN_REPLY_TOKENS
# The key-value cache is small beside the memory of a micro-batch: rows of a batch, and tokens of the compiled kernels
_BATCH_ROWS = 16
_CACHE_TOKENS = 2048


@dataclass(frozen=True)
class CheckpointScore:
    """Result of an evaluation.

    loss: nats per supervised token over all rows.
    scores: one for each row, higher is better.
    """

    update: int
    loss: float
    scores: Sequence[float]

    @property
    def score(self) -> float:
        """Mean score of the rows."""
        return statistics.fmean(self.scores)


def last_reply(row: TokenizedExample) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt, and those of the last reply with its end token.

    The prompt of a document is empty.
    """
    start, end = row.last_reply
    return row.ids[:start], row.ids[start:end]


def natural_metric(rows: Sequence[TokenizedExample]) -> Metric:
    """Return `exact_match` if every row has a prompt and the replies are short, else `loss`.

    Short is a median of at most MAX_MEDIAN_REPLY_TOKENS tokens.
    """
    replies = [last_reply(row) for row in rows]
    if not all(prompt and reply for prompt, reply in replies):
        return "loss"
    median = statistics.median(len(reply) for _, reply in replies)
    return "exact_match" if median <= MAX_MEDIAN_REPLY_TOKENS else "loss"


def passes(recipe: ResolvedRecipe, rows: Sequence[TokenizedExample]) -> int:
    """Return the number of passes of an evaluation over the held-out rows.

    One pass computes the loss. Replies need a second one, whose tokens cost the same.
    """
    return 2 if recipe.weights == "best" and rows and natural_metric(rows) == "exact_match" else 1


class CheckpointSelection:
    """Evaluations of a run, and the weights of the best one so far.

    rows: the held-out rows.
    groups: the group of each row.
    weights: of the best evaluation, by parameter name, on the CPU; empty before the first evaluation.
    """

    def __init__(self, chat: ChatTokenizer, rows: Sequence[TokenizedExample], groups: Sequence[str]) -> None:
        self.chat, self.rows, self.groups, self.metric = chat, rows, groups, natural_metric(rows)
        self.candidates: list[CheckpointScore] = []
        self.weights: dict[str, torch.Tensor] = {}

    def score_replies(self, model: Any) -> list[float]:
        """Return 1.0 for each row whose greedy reply by `model` equals the reference, else 0.0.

        The model must be in eval mode. A row whose reply does not fit into the model's context, or whose reference is
        longer than _MAX_REPLY_TOKENS, is not generated and scores 0.0. Replies are generated in one batch by the
        compiled kernels where they apply, and end as soon as they differ from the reference.
        """
        # imported here, because devices load this module without transformers and generate nothing
        generate = import_module("sartor.inference.generate")
        paired_replies = import_module("sartor.inference.local.paired_replies")
        replies = [last_reply(row) for row in self.rows]
        scores = [0.0] * len(replies)
        context = generate.context_tokens(model) or math.inf
        prompt_rows = [paired_replies.PairedRow(prompt, (), len(prompt)) for prompt, _ in replies]
        batches = reply_batches(replies, context, len(replies))
        longest = max((len(replies[index][1]) for batch in batches for index in batch), default=0) + _SPARE_TOKENS
        asked = [prompt_rows[index] for batch in batches for index in batch]
        # weights are read where the training has them: a second copy would need as much memory as the base
        decoder = paired_replies.open_pair(model, asked, longest, cache_tokens=_CACHE_TOKENS, moves_weights=False)
        if decoder is None:
            batches = reply_batches(replies, context, _BATCH_ROWS)
        for batch in batches:
            limit = max(len(replies[index][1]) for index in batch) + _SPARE_TOKENS
            room = context - max(len(replies[index][0]) for index in batch)
            limit = int(min(limit, room))
            prompts = [replies[index][0] for index in batch]
            if decoder is None:
                generations = generate.generate(
                    model,
                    prompts,
                    stop=self.chat.stops,
                    pad=self.chat.pad,
                    sampling=Sampling(limit),
                    batch_rows=_BATCH_ROWS,
                )
            else:
                references = [self._text(replies[index][1]) for index in batch]

                def is_decided(row: int, tokens: Sequence[int], references: Sequence[str] = references) -> bool:
                    text = self._text(tokens)
                    # an incomplete UTF-8 character decodes to U+FFFD; wait for the rest of it
                    return not references[row].startswith(text) and not text.endswith("\ufffd")

                limits = paired_replies.ReplyLimits(limit, frozenset(self.chat.stops), is_decided)
                rows = [prompt_rows[index] for index in batch]
                results = paired_replies.reply_to_rows(decoder, rows, limits, sides=(True,))[0]
                generations = [result.generation for result in results]
            for index, generation in zip(batch, generations, strict=True):
                is_whole = generation.finish != generate.DECIDED
                scores[index] = float(is_whole and self._text(generation.ids) == self._text(replies[index][1]))
        return scores

    def _text(self, ids: Sequence[int]) -> str:
        return self.chat.decode([token for token in ids if token not in self.chat.stops]).strip()

    def add(self, candidate: CheckpointScore, weights: dict[str, torch.Tensor]) -> None:
        """Record an evaluation, and copy its weights if it is the best so far.

        Of two equal scores the later one is the better. weights: of any shape (...), by parameter name.
        """
        best = self._best([*self.candidates, candidate])
        self.candidates.append(candidate)
        if best is candidate:
            self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    @staticmethod
    def _best(candidates: Sequence[CheckpointScore]) -> CheckpointScore:
        return max(candidates, key=lambda candidate: (candidate.score, candidate.update))

    def choose(self) -> tuple[CheckpointScore, dict[str, Any]]:
        """Return the evaluation whose weights are kept, and the reasons: `run.selection` of the manifest.

        Call it after the last evaluation. If the result is not the last evaluation, `weights` holds its weights.
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
        """Return the best weights, of any shape (...), and the evaluations, for a checkpoint."""
        return self.weights, [asdict(candidate) for candidate in self.candidates]

    def restore(self, weights: dict[str, torch.Tensor], candidates: Sequence[dict[str, Any]]) -> None:
        """Restore what `state` returned. weights: of any shape (...), by parameter name."""
        self.weights, self.candidates = weights, [CheckpointScore(**candidate) for candidate in candidates]


def reply_batches(
    replies: Sequence[tuple[Sequence[int], Sequence[int]]], context: float, batch_rows: int = _BATCH_ROWS
) -> list[list[int]]:
    """Return the row indices of each batch, cut so that every reply fits into the context.

    replies: token ids of (prompt, reference) of each row.
    Each row of a batch has room for the longest reference of its batch. A row that does not fit alone is left out, and
    so is one whose reference is longer than _MAX_REPLY_TOKENS.
    """
    batches: list[list[int]] = []
    longest_prompt = 0
    for index in sorted(range(len(replies)), key=lambda index: len(replies[index][1])):
        prompt, reply = map(len, replies[index])
        if reply > _MAX_REPLY_TOKENS or prompt + reply > context:
            continue
        # references are sorted by length, so this one is the longest of its batch
        is_full = not batches or len(batches[-1]) == batch_rows
        if is_full or max(prompt, longest_prompt) + reply > context:
            batches.append([])
            longest_prompt = 0
        batches[-1].append(index)
        longest_prompt = max(prompt, longest_prompt)
    return batches


def group_means(scores: Sequence[float], groups: Sequence[str]) -> list[float]:
    """Return the mean score of each group, sorted by group name.

    >>> group_means([1.0, 0.0, 1.0], ["b", "b", "a"])
    [1.0, 0.5]
    """
    by_group: dict[str, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        by_group.setdefault(group, []).append(score)
    return [statistics.fmean(by_group[group]) for group in sorted(by_group)]


def sign_test_p_value(better: Sequence[float], worse: Sequence[float]) -> float:
    """Return the one-sided p-value of the exact sign test on paired scores.

    Equal pairs are left out. For scores of 0 and 1 it is McNemar's exact test.

    >>> sign_test_p_value([1, 1, 1, 0], [0, 0, 1, 0])
    0.25
    """
    from scipy.stats import binomtest  # takes a second to import, so only at the end of a run

    # wins ~ Binomial(n, 1/2) under the null hypothesis; p = P(W >= wins) over the n pairs that differ

    differences = [first - second for first, second in zip(better, worse, strict=True) if first != second]
    wins = sum(difference > 0 for difference in differences)
    return float(binomtest(wins, len(differences), alternative="greater").pvalue) if differences else 1.0
