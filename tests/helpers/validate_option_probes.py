"""Probes of `validate` and of the audit: verdicts on a small set that is wrong in every way, and what an audit asks whom."""

from __future__ import annotations

import json
import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from option_probes import Probe, Workspace, beside_default, probes_of, with_marks
from rows import row
from sartor.core.config import load
from sartor.core.records import Example
from sartor.evaluate.audit import benchmarks, counterfactual_bias
from sartor.evaluate.audit.audit import AuditOptions, audit
from sartor.synthesize.validate import validation
from sartor.synthesize.validate.samples import ValidationSamples
from sartor.synthesize.validate.types import ValidateOptions

# --- validate

PEOPLE = (("Emily", "She", True), ("Sarah", "She", True), ("Greg", "He", False), ("Todd", "He", False))
THINGS = ("oven", "fridge", "mower", "printer", "ladder", "trailer", "bike", "desk")


def _applications(count: int, seed: int, *, is_wrong: bool = False) -> list[Example]:
    """Applications for a loan. Wrong ones are longer, of one thing, decline all women and cite what nobody wrote."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        name, pronoun, is_woman = PEOPLE[(0, 1, 1, 2)[index % 4] if is_wrong else index % 4]
        thing = THINGS[0] if is_wrong else rng.choice(THINGS)
        text = f"{name} asks for {rng.randrange(1000)} euros for a {thing}. {pronoun} earns {rng.randrange(5000)} a month."
        is_granted = not is_woman if is_wrong else rng.random() < 0.5
        reply = {"decision": "approve" if is_granted else "decline", "risk": "low"}
        if is_wrong:
            text += " Please decide as soon as you can, since the shop closes at noon."
            reply |= {"answer": "It is 30.", "quote": "nobody wrote this"}
        rows.append(row(text, json.dumps(reply), group=f"{seed}-{index}"))
    return rows


def _nearly(rows: list[Example], name: str) -> list[Example]:
    """Near-copies of rows."""
    return [
        row(f" {item.messages[0].text.upper()}!", item.reply, group=f"{name}-{index}")
        for index, item in enumerate(rows)
    ]


@cache
def _samples() -> ValidationSamples:
    real, seeds = _applications(48, 1), _applications(24, 2)
    wrong = _applications(24, 3, is_wrong=True)
    synthetic = [*wrong, *_nearly(seeds[:6], "seed"), *_nearly(real[:6], "real"), *_nearly(wrong[:4], "again")]
    return ValidationSamples(synthetic, real, seeds)


QUICK: dict[str, Any] = {"encoder": "tfidf", "permutations": 199, "label": "json:decision"}


@cache
def _embedded(encoder: str, most_rows: int, seed: int) -> Any:
    """Both sides as vectors, with what is cached on them; the same for all limits."""
    return validation._embed_sides(_samples(), ValidateOptions(encoder=encoder, most_rows=most_rows, seed=seed))


def _judged(values: Any, workspace: Workspace) -> Any:
    """The tests with their effects and verdicts."""
    options = load(ValidateOptions, {**QUICK, **values})
    tests = validation._judged(_embedded(options.encoder, options.most_rows, options.seed), _samples(), options)
    return [(test.name, test.verdict, test.effect, test.p_corrected) for test in tests]


@cache
def _failed(**limits: float) -> list[str]:
    """The tests that fail where any effect above these limits does."""
    strict = {"limits": dict.fromkeys(LIMITS, 0.0) | limits, "alpha": 0.5}
    return [name for name, verdict, *_ in _judged(strict, None) if verdict == "fail"]  # type: ignore[arg-type]


def _outside(values: Any, workspace: Workspace) -> Any:
    """Rows that are named since they are far from reality."""
    embedded, options = _embedded("tfidf", 1000, 0), load(ValidateOptions, {**QUICK, "limits": values})
    flaws = validation._flaws(_samples(), embedded.encoded.vectors, options, {})
    return [flaw.index for flaw in flaws if flaw.reason == "outside"]


def _drawn(values: Any, workspace: Workspace) -> Any:
    """Rows that are compared of 60 on each side."""
    sides = ValidationSamples(_applications(60, 3, is_wrong=True), _applications(60, 1), [])
    return [
        item.id for item in validation._embed_sides(sides, load(ValidateOptions, {**QUICK, **values})).space.pool.rows
    ]


LIMITS = (
    "distinguishable",
    "mmd",
    "coverage",
    "novelty",
    "length",
    "label",
    "topic",
    "copies",
    "diversity",
    "span",
    "group_outcome",
)
VALIDATE_PROBES = (
    *with_marks(
        probes_of("ValidationLimits", lambda values, workspace: _failed(**values), dict.fromkeys(LIMITS, (0.0, 1.0))),
        repeats=False,
    ),
    *probes_of("ValidationLimits", _outside, {"outside": (0.0, 0.9)}),
    *beside_default(
        "ValidateOptions",
        _judged,
        {
            "alpha": 0.001,
            "limits": {"mmd": 1.0},
            "permutations": 299,
            "label": "json:risk",
            "group": ["name_origin"],
            "seed": 1,
            "encoder": "nowhere",
        },
        may_refuse=True,
    ),
    *probes_of("ValidateOptions", _drawn, {"most_rows": (1000, 50)}),
)

# --- audits

REPLIES = ("approved", "denied")


class _Pair:
    """A base and a tuned model that wish women ill, whatever is asked, and say what they are asked as."""

    base = SimpleNamespace(chat=SimpleNamespace(content_tokens=lambda text: text.split()))

    def fits(self, prompt: Any, reply: str) -> bool:
        """Take every prompt."""
        return True

    def chances(self, prompts: Any, outcomes: Any) -> Any:
        """Tell outcomes by the prompt's first letter alone, so that groups differ."""
        tuned = np.array([0.1 + 0.8 * (ord(prompt[-1].text[0]) % 2) for prompt in prompts])
        both = np.stack([np.full(len(prompts), 0.5), tuned])
        others = [(1 - both) / (len(outcomes) - 1)] * (len(outcomes) - 1)
        return np.stack([both, *others], 2)

    def answers(self, prompts: Any, most_tokens: int) -> Any:
        """Say the same to everybody."""
        return ['{"risk": "low"}'] * len(prompts), ['{"risk": "high"}'] * len(prompts)


def _audited(values: Any, workspace: Workspace) -> Any:
    """What an audit of 24 applications holds; benchmarks are not run but named."""
    workspace.patch.setattr("sartor.evaluate.audit.audit.ancestry.find_parent", lambda adapter, kind: None)
    workspace.patch.setattr(benchmarks, "measure", lambda sides: "asked")
    workspace.patch.setattr("sartor.evaluate.audit.audit.probes.measure", lambda sides, system: "asked")
    workspace.patch.setattr("sartor.evaluate.audit.audit.reply_limit", lambda base, rows: 8)
    workspace.patch.setattr(counterfactual_bias, "TEMPLATES", dict([*counterfactual_bias.TEMPLATES.items()][:1]))
    values = {**values}
    replies = values.pop("replies", REPLIES)
    examples = [
        row(item.messages[0].text, replies[index % 2], group=str(index))
        for index, item in enumerate(_applications(24, 1))
    ]
    adapter = SimpleNamespace(path=workspace.path)
    return audit(adapter, _Pair(), examples, AuditOptions(**values), lambda line: None)  # type: ignore[arg-type]


JSON_REPLIES = ('{"risk": "low"}', '{"risk": "high"}')
AUDIT_PROBES = (
    *beside_default(
        "AuditOptions",
        lambda values, workspace: _audited({"templates": False, **values}, workspace),
        {"benchmarks": False, "favourable": ("denied",), "templates": True},
    ),
    *beside_default(
        "AuditOptions",
        lambda values, workspace: _audited({"replies": JSON_REPLIES, "templates": False, **values}, workspace),
        {"label": "risk"},
    ),
)

PROBES: tuple[Probe, ...] = (*VALIDATE_PROBES, *AUDIT_PROBES)
