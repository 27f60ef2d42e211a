"""Measurement of regression cases on a tuned model: greedy replies, and likelihoods of both replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sartor.core import reply_markup
from sartor.core.artifacts import Artifact
from sartor.core.errors import SourceError
from sartor.core.records import Example, Message
from sartor.evaluate.predictions import MOST_REPLY_TOKENS, SPARE_TOKENS, losses, model_side
from sartor.evaluate.regression_cases import CaseResult, RegressionCase
from sartor.inference.engine import Sampling
from sartor.inference.generate import context_tokens, generate
from sartor.models.chat import ChatTokenizer
from sartor.models.packing import TokenizedExample
from sartor.models.tuned_model import open_tuned

Notice = Callable[[str], object]


def measure_cases(
    adapter: Artifact, cases: Sequence[RegressionCase], notice: Notice = lambda line: None
) -> list[CaseResult]:
    """Return what an Adapter or Release says to the prompt of each case, in their order.

    A reply is cut where it is longer than both replies of all cases: it then equals neither. A case that the base
    cannot read, such as one that is longer than its context, is not asked. Raises ModelError.
    """
    if not cases:
        return []
    base, model = open_tuned(adapter, notice)
    notice(f"asking {len(cases)} regression cases")
    results: list[CaseResult] = []
    prompts: list[list[int]] = []
    replies: list[TokenizedExample] = []
    context = context_tokens(base.model)
    for case in cases:
        try:
            bad, corrected = (
                _encode(base.chat, case, reply, adapter.path) for reply in (case.bad_reply, case.corrected_reply)
            )
        except SourceError as error:
            results.append(CaseResult(case, not_asked=f"the base cannot read it: {error.problem}"))
            continue
        tokens = max(len(bad.ids), len(corrected.ids)) + SPARE_TOKENS
        if context and tokens > context:
            results.append(CaseResult(case, not_asked=f"it has {tokens} tokens; the model has {context} positions"))
            continue
        results.append(CaseResult(case))
        prompts.append(base.chat.prompt_ids(case.prompt, case.tools, adapter.path))
        replies += [bad, corrected]
    if not prompts:
        return results
    limit = min(max(row.supervised_tokens for row in replies) + SPARE_TOKENS, MOST_REPLY_TOKENS)
    with model_side(model, tuned=True):
        generations = []
        for prompt in prompts:  # one by one: a long prompt leaves the others their room in the context
            room = limit if not context else min(limit, context - len(prompt))
            generations += generate(
                model, [prompt], stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(max(room, 1))
            )
        means, counts = losses(base, model, replies)
    nats = [mean * count for mean, count in zip(means, counts, strict=True)]
    position = 0
    for index, result in enumerate(results):
        if result.not_asked:
            continue
        results[index] = replace(
            result,
            reply=base.chat.decode(generations[position].ids),
            bad_nats=nats[2 * position],
            corrected_nats=nats[2 * position + 1],
            is_opened=base.chat.opens_reasoning(prompts[position]),
        )
        position += 1
    return results


def _encode(chat: ChatTokenizer, case: RegressionCase, reply: str, folder: Path) -> TokenizedExample:
    """Return the case with one of its replies, of which alone the tokens count."""
    example = Example((*case.prompt, Message.of("assistant", reply)), (), tools=case.tools)
    row = chat.encode(reply_markup.read_example(example, chat.markup.spelt), folder)
    start, end = row.last_reply
    return replace(row, learnt=[start <= position < end for position in range(len(row.ids))])
