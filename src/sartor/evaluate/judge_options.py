"""Options of a judge of replies (JUDGE.yaml), and the file of pairs that people labelled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError, SourceError

# Fewest planted pairs: 20 of 20 right have the lower bound 0.83
LEAST_PLANTED = 20
PREFERENCES = ("a", "b", "tie")


@dataclass(frozen=True)
class JudgeEndpoint:
    """Judge behind an OpenAI-compatible endpoint (/chat/completions). Prompts and replies are sent to it."""

    url: str = option(REQUIRED, "address with /v1, such as http://127.0.0.1:8000/v1")
    model: str = option(REQUIRED, "model's name there")
    key_env: str = option("", "environment variable that holds the key")
    at_once: int = option(4, "questions at the same time")
    tries: int = option(6, "attempts for one question, with doubling pauses")
    max_tokens: int = option(16, "longest answer; a model that reasons first needs more")

    def __post_init__(self) -> None:
        for name in ("at_once", "tries", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"judge.{name} is {getattr(self, name)}; it must be at least 1", f"judge.{name}: 4")


@dataclass(frozen=True)
class JudgeOptions:
    """Judge of pairs of replies by a rubric (Zheng et al. 2023, arXiv:2306.05685), asked in both orders.

    A local judge answers by the likelihoods of A, B and T as whole replies, an endpoint by one of these letters.
    """

    judge: str | JudgeEndpoint = option(
        REQUIRED, "base, Adapter or Release that judges, or {url:, model:} of an endpoint"
    )
    rubric: str = option(REQUIRED, "what makes a reply better, in words; the judge reads it as it is")
    max_characters: int = option(
        4000, "most characters of a prompt, a reference and a reply that the judge sees; what is cut is counted"
    )
    planted: int = option(
        30, f"pairs whose better reply is known, by which the judge itself is tested; at least {LEAST_PLANTED}"
    )
    seed: int = option(0, "of the planted pairs")

    def __post_init__(self) -> None:
        if not self.rubric.strip():
            raise ConfigError("the rubric is empty", 'rubric: "The better reply is correct, complete and brief."')
        if self.max_characters < 1:
            raise ConfigError(
                f"max_characters is {self.max_characters}; it must be at least 1", "max_characters: 4000"
            )
        if self.planted < LEAST_PLANTED:
            raise ConfigError(
                f"planted is {self.planted}; fewer than {LEAST_PLANTED} pairs do not tell a judge from chance",
                f"planted: {LEAST_PLANTED}",
            )


@dataclass(frozen=True)
class LabelledPair:
    """Two replies to a prompt, of which a person prefers one. preferred: a, b or tie. reference: empty for none."""

    prompt: str
    reply_a: str
    reply_b: str
    preferred: str
    reference: str = ""


def read_labels(path: Path) -> list[LabelledPair]:
    """Return the pairs of a JSONL file with `prompt, reply_a, reply_b, preferred`, and `reference` if there is one.

    Raises SourceError, naming the line, for a file that does not have this form, and for one without a pair.
    """
    form = '{"prompt": "...", "reply_a": "...", "reply_b": "...", "preferred": "a"}'
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a reply may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} cannot be read as text: {error}", f"--judge-labels FILE with lines {form}"
        ) from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            raise SourceError(f"{path}, line {number} is not JSON", form) from None
        pairs.append(_labelled_pair(fields, f"{path}, line {number}", form))
    if not pairs:
        raise SourceError(f"{path} holds no pair", form)
    return pairs


def _labelled_pair(fields: Any, where: str, form: str) -> LabelledPair:
    """Return the pair of a line. Raises SourceError."""
    if not isinstance(fields, Mapping):
        raise SourceError(f"{where} is no JSON object", form)
    for name in ("prompt", "reply_a", "reply_b", "preferred"):
        if not isinstance(fields.get(name), str):
            raise SourceError(f"{where} has no text `{name}`", form)
    if fields["preferred"] not in PREFERENCES:
        problem = f"{where}: preferred is {fields['preferred']!r:.40}; it is one of {', '.join(PREFERENCES)}"
        raise SourceError(problem, '"preferred": "tie"')
    reference = fields.get("reference")
    return LabelledPair(
        fields["prompt"],
        fields["reply_a"],
        fields["reply_b"],
        preferred=fields["preferred"],
        reference=reference if isinstance(reference, str) else "",
    )
