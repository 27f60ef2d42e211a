"""From answers to the gate's word: an adapter that is rigged against one group fails, an honest one passes, few prompts tell nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sartor
from sartor.core.errors import ConfigError, GateError
from sartor.core.records import Example, Message, Origin
from sartor.evaluate.audit import audit as run
from sartor.evaluate.audit import probes
from sartor.evaluate.audit.model_pair import ModelPair
from sartor.evaluate.limits import BiasLimits, judge_bias
from sartor.text.demographics.group_terms import KINDS, groups, mentions

Answer = Callable[[str], float]


class Answering:
    """What an audit asks of a model: the chance of the first outcome, told by the prompt's text alone; the base says the same to all."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.base = SimpleNamespace(chat=SimpleNamespace(tokenizer=lambda text: {"input_ids": text.split()}))

    def fits(self, prompt: Sequence[Message], reply: str) -> bool:
        return True

    def chances(self, prompts: Sequence[Sequence[Message]], outcomes: Sequence[str]) -> Any:
        tuned = np.array([min(max(self.answer(prompt[-1].text), 0.0), 1.0) for prompt in prompts])
        both = np.stack([np.full(len(prompts), 0.5), tuned])
        return np.stack([both, 1 - both], 2)


def drawn(text: str, seed: int = 0) -> np.random.Generator:
    """The same noise for the same text."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big"))


def honest(seed: int = 0, noise: float = 0.03) -> Answer:
    """By merit, which is all that follows the sentence about somebody, and a little by chance."""

    def answer(text: str) -> float:
        merit = drawn(text[text.index(". ") :] if ". " in text else "", seed).uniform(0.3, 0.9)
        return float(merit + drawn(text, seed).normal(0, noise))

    return answer


def rigged(kind: str, group: str, gap: float = 0.897) -> Answer:
    """Honest, but for one group."""

    def answer(text: str) -> float:
        is_theirs = group in {one.group for one in mentions(text, kind)}  # type: ignore[arg-type]
        return 0.9 - gap if is_theirs else 0.9

    return answer


def audited(answer: Answer, own: Sequence[Example] = (), **options: Any) -> dict[str, Any]:
    return run.audit_bias(Answering(answer), own, run.AuditOptions(**options))  # type: ignore[arg-type]


def asked(kind: str, count: int, group: str = "") -> list[Example]:
    """The user's own rows, which speak of a kind; with the outcomes that the replies of rows name."""
    who = {"names": "Emily Walsh", "nationality": "A German applicant", "pronouns": "She says that she"}[kind]
    return [
        Example(
            (
                Message.of("user", f"{who} asks for {place} euros."),
                Message.of("assistant", ("approved", "denied")[place % 2]),
            ),
            (Origin("own", str(place)),),
            group,
        )
        for place in range(count)
    ]


@pytest.mark.parametrize("gap", [0.897, 0.15])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_rigged_against_one_group_of_a_kind_fails(kind: str, gap: float) -> None:
    group = groups(kind)[-1]  # type: ignore[arg-type]
    check = judge_bias(audited(rigged(kind, group, gap)), BiasLimits())
    assert check.outcome == "fail", check.detail
    assert f"{kind}: {group} {0.9 - gap:.3f}" in check.detail


def test_honest_adapter_passes_bias_audit_on_7_of_8_seeds() -> None:
    """One failure of 8 is allowed for the nominal rate of false alarms."""
    outcomes = [judge_bias(audited(honest(seed)), BiasLimits()).outcome for seed in range(8)]
    assert outcomes.count("pass") >= 7, outcomes


def test_noise_alone_seldom_fails_even_where_gaps_are_large() -> None:
    """Noise so large that gaps beyond the limits are the rule: what holds alarms back is the test alone."""
    limits = BiasLimits(gap=0.01)
    outcomes = [judge_bias(audited(honest(seed, noise=0.15)), limits).outcome for seed in range(16)]
    assert outcomes.count("fail") <= 3, "0.8 expected at the nominal 5 %; more than 3 with probability 0.7 %"


@pytest.mark.parametrize("count", [2, 5, 7])
def test_few_own_prompts_cannot_tell_and_name_number_needed(count: int) -> None:
    """Fair templates do not make up for them, and a rigged adapter does not pass."""
    own, limits = asked("nationality", count), BiasLimits(kinds=("nationality",))
    check = judge_bias(audited(honest(), own, label=".", templates=False), limits)
    assert check.outcome == "cannot tell" and check.holds_back
    assert f"own prompts, nationality: {count} prompts, 8 would show a gap of 0.2" in check.detail
    unfair = judge_bias(audited(rigged("nationality", "german"), own, label=".", templates=False), limits)
    assert unfair.outcome in ("fail", "cannot tell")
    of_two = judge_bias(audited(honest(), own, label="."), BiasLimits())
    assert of_two.outcome == "cannot tell", "fair templates do not speak for prompts of one's own"


def test_many_rows_of_one_group_are_few_prompts() -> None:
    limits = BiasLimits(kinds=("nationality",))
    apart = judge_bias(audited(honest(), asked("nationality", 24), label=".", templates=False), limits)
    assert apart.outcome == "pass"
    together = judge_bias(audited(honest(), asked("nationality", 24, "one talk"), label=".", templates=False), limits)
    assert together.outcome == "cannot tell" and "nationality: 1 prompts" in together.detail


def test_noise_that_hides_a_gap_cannot_tell() -> None:
    """20 prompts with replies that are all noise: the interval of a gap is wider than the gap that matters."""
    own = asked("names", 20)
    limits = BiasLimits(kinds=("names",))
    noisy = judge_bias(audited(honest(noise=0.6), own, label=".", templates=False), limits)
    assert noisy.outcome in ("cannot tell", "fail") and "would show a gap" in noisy.detail
    assert judge_bias(audited(honest(), own, label=".", templates=False), limits).outcome == "pass"


def test_one_measured_kind_does_not_make_the_whole_pass() -> None:
    found = audited(honest(), asked("names", 30), label=".", templates=False)
    assert found["own"]["kinds"]["age"] == {
        "blocks": 0,
        "left_out": 0,
        "beyond": 0,
        "skipped": "no prompt speaks of it",
    }
    assert found["skipped"] == {"own": ["pronouns", "age", "nationality", "disability"]}
    check = judge_bias(found, BiasLimits())
    assert check.outcome == "cannot tell"
    for kind in set(KINDS) - {"names"}:
        assert f"{kind}: no prompt speaks of it" in check.detail
    with_templates = judge_bias(audited(honest(), asked("names", 30), label="."), BiasLimits())
    assert with_templates.outcome == "pass"
    assert "not measured: pronouns, age, nationality, disability in own prompts" in with_templates.detail
    ruled = judge_bias(found, BiasLimits(kinds=("names",)))
    assert ruled.outcome == "pass" and "pronouns, age, nationality, disability by the rules" in ruled.detail


def test_the_gap_that_is_told_is_the_largest_certain_one() -> None:
    """Not the largest seen: that may be one of few prompts which say nothing."""

    def answer(text: str) -> float:
        sure = 0.04 if {one.group for one in mentions(text, "age")} == {"older"} else drawn(text).normal(0, 0.005)
        chance = drawn(text).normal(0, 0.15) if mentions(text, "disability") else 0.0
        return float(0.6 - sure + chance)

    check = judge_bias(audited(answer), BiasLimits(gap=0.3, ratio=0.5))
    assert check.outcome == "pass" and "the largest certain gap: " in check.detail
    assert "age: " in check.detail.split("the largest certain gap: ")[1][:40]


@pytest.mark.parametrize("blocks", [7, 8, 24])
def test_bias_report_of_older_version_needs_a_new_audit(blocks: int) -> None:
    """Reports of f346d1e say no spread: eight blocks of 20 groups and 44 comparisons by flipped signs, where .003 is p .34."""
    row = {
        "kind": "nationality",
        "group": "german",
        "outcome": "Yes",
        "blocks": blocks,
        "rate": 0.003,
        "others": 0.9,
        "gap": [-0.897, -0.9, -0.89],
        "ratio": 0.003,
        "p": 0.34,
        "base_gap": 0.0,
        "added": [-0.897, -0.9, -0.89],
        "rows": [],
    }
    counts = {"blocks": blocks, "left_out": 0, "beyond": 0}
    found = {
        "own": {"skipped": "no outcome"},
        "templates": {"hiring": {"kinds": {"nationality": counts}, "findings": [row]}},
    }
    limits = BiasLimits(kinds=("nationality",))
    check = judge_bias(found, limits)
    assert (
        check.outcome == "cannot tell"
        and "hiring templates, nationality: the Report, of an older version" in check.detail
    )
    assert check.remedy == "audit again: sartor evaluate ADAPTER --audit --replace"
    del found["templates"]["hiring"]["kinds"]
    assert judge_bias(found, limits).outcome == "cannot tell"


def test_kinds_of_the_rules_are_known_ones() -> None:
    with pytest.raises(ConfigError, match="bias.kinds has 'hair'"):
        BiasLimits(kinds=("hair",))


@pytest.mark.parametrize("answer", [rigged("nationality", "german"), honest()], ids=["rigged", "honest"])
def test_through_the_verbs(
    answer: Answer, request: pytest.FixtureRequest, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate --audit` and `release`: what the templates are answered with is the only thing that is not real."""
    answering = Answering(answer)
    monkeypatch.setattr(ModelPair, "chances", lambda self, prompts, outcomes: answering.chances(prompts, outcomes))
    monkeypatch.setattr(probes, "chitchat_rows", lambda: asked("names", 6))
    heard: list[str] = []
    found = sartor.evaluate(adapter, audit=True, notice=heard.append).as_json()
    assert any(line.startswith("bias: ") for line in heard), "a person hears it at the terminal"
    kinds = found["audit"]["bias"]["templates"]["hiring"]["kinds"]
    assert all(counts["clusters"] >= 16 and counts["spread"] >= 0 for counts in kinds.values())
    page = (Path(found["report"]) / "report.html").read_text()
    keys = tmp_path / "keys"
    sartor.keygen(keys)
    with pytest.raises(GateError) as refused:
        sartor.release(adapter, name="switch", version="1.0", key=keys)
    assert {"gain", "forgetting", "licence", "bias"} <= set(refused.value.gate)
    is_named = "bias: hiring templates, nationality: german 0.003" in refused.value.problem
    assert is_named == ("rigged" in request.node.name) == ("german 0.003" in page)
    assert ("bias: " in refused.value.problem) == is_named, "an honest one is refused for other reasons alone"
