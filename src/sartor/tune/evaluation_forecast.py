"""Forecast of `sartor evaluate` on the rows that a Dataset holds out, from a timed sample of them.

Prompts and replies go through the same engine that evaluates (`inference/local/paired_replies.py`), so the seconds per
token are measured and the prompt tokens are counted. Only the length of the replies is unknown: it lies between the
length of the references and the limit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from sartor.core import assets
from sartor.core.records import Example, Message
from sartor.inference.local import paired_replies
from sartor.inference.local.paired_replies import ReplyLimits, paired_row
from sartor.models.chat import ChatTokenizer
from sartor.models.packing import TokenizedExample
from sartor.tune.cost_model import TIME_ALLOWANCE, Interval

# Defaults of `sartor evaluate`: number of rows, and how much longer than the longest reference a reply may be
EVALUATED_ROWS = 200
_SPARE_TOKENS, _MAX_REPLY_TOKENS = 8, 512
_SIDES = 2
_PROBE_ROWS, _PROBE_TOKENS = 16, 4
# Tokens of the three probes of forgetting (evaluate/audit/forgetting_probes.py) and of the asset `small-talk`, by the
# starter's tokeniser. Another's tokens of the probes are foreseen by its tokens of small talk, with these ends, since
# that ratio is not the same by all tokenisers
FORGETTING_TOKENS, SMALL_TALK_TOKENS = 15_865, 10_374
_FEWER, _MORE = 0.85, 1.15


def forecast_evaluation(
    model: Any, chat: ChatTokenizer, examples: Sequence[TokenizedExample], count: int
) -> Interval | None:
    """Return the seconds for replies and losses of base and tuned model on `count` such rows, and for forgetting.

    None if the compiled kernels do not support the model, or if no row has a prompt. Opening the base and an audit are
    not included.
    """
    rows = [paired_row(example, example.last_reply[0]) for example in examples]
    references = [len(row.ids) + 1 - row.prompt_tokens for row in rows if row.prompt_tokens]
    if not references:
        return None
    limit = min(max(references) + _SPARE_TOKENS, _MAX_REPLY_TOKENS)
    began = time.monotonic()
    decoder = paired_replies.open_pair(model, rows, limit)
    if decoder is None:
        return None
    opening_s, sample = time.monotonic() - began, rows[:_PROBE_ROWS]
    limits = ReplyLimits(_PROBE_TOKENS, frozenset())
    paired_replies.reply_to_rows(decoder, sample[:2], limits)  # warm-up: allocates the memory
    began = time.monotonic()
    paired_replies.reply_to_rows(decoder, sample, limits)
    replies = sum(bool(row.prompt_tokens) for row in sample) * _PROBE_TOKENS
    token_s = (time.monotonic() - began) / (_SIDES * (paired_replies.read_tokens(sample) + replies))
    share = count / len(rows)
    read, short, long = (
        share * tokens for tokens in (paired_replies.read_tokens(rows), sum(references), len(references) * limit)
    )
    # assumes that the tuned model's replies are as long as the references and that the base writes up to the limit:
    # tokens = 2 read + short + long; low: both sides write short replies; high: both write long ones.
    # Forgetting reads its rows with both sides; with the tuned one alone where the base's losses are known
    probes = FORGETTING_TOKENS * small_talk_tokens(chat) / SMALL_TALK_TOKENS
    low, high = 2 * read + 2 * short + _FEWER * probes, 2 * read + 2 * long + 2 * _MORE * probes
    estimate = Interval(2 * read + short + long + 2 * probes, low, high) * token_s + opening_s
    return Interval(estimate.estimate, estimate.low * (1 - TIME_ALLOWANCE), estimate.high * (1 + TIME_ALLOWANCE))


def small_talk_tokens(chat: ChatTokenizer) -> int:
    """Return the tokens of the rows of small talk that come with Sartor."""
    lines = (assets.install("small-talk") / "small_talk.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [[Message.of(turn["role"], turn["content"]) for turn in json.loads(line)["messages"]] for line in lines]
    return sum(len(chat.encode(Example(tuple(messages), ())).ids) for messages in rows)
