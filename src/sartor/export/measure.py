"""How alike a runtime answers: figures against the reference, the least that is let pass, and the refusal below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sartor.core.errors import GateError
from sartor.export.reference import Trace

LIKELIEST = 10
# form -> least fraction of positions where the likeliest next token is the same. Down to q8_0 three `agreement_deviation` and
# more below what any right export reached; under it a limit of use, away from what any reached: docs/decisions/009-export.md
LEAST_AGREEMENT = {
    "sartor": 0.995,
    "peft": 0.995,
    "merged": 0.98,
    "f32": 0.98,
    "f16": 0.98,
    "bf16": 0.98,
    "adapter": 0.98,
    "adapter on the base's own file": 0.95,
    "q8_0": 0.95,
    "q5_1": 0.92,
    "q5_0": 0.92,
    "q4_1": 0.90,
    "q4_0": 0.90,
}
# prompts that a runtime's own template and tokenizer turn into the same tokens
LEAST_ALIKE = 0.98
# the same fp32 computation by another program: more is another scale or another layer
MOST_LOGIT_DIFFERENCE = {"peft": 0.01}


@dataclass(frozen=True)
class Answers:
    """What a runtime said to the traces, in their order.

    greedy: its own replies (the token that ends one is the last). likeliest: per position behind the reference's reply the
    likeliest tokens with logprobs (None where not told), best first. logits: the same positions whole, where the runtime gives
    them.
    """

    greedy: list[list[int]]
    likeliest: list[list[list[tuple[int, float | None]]]]
    logits: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class Figures:
    """One line of a receipt. Fractions are of positions (`agreement`, `greedy_tokens`) or of replies and prompts.

    Differences: the largest and the mean over the likeliest tokens of each position (logprobs, natural), and the largest over
    the whole vocabulary (logits), None where the runtime does not tell them. alike: prompts that its template and tokenizer
    write as Sartor's do; None where it has none of its own. agreement_deviation: the standard deviation of `agreement` over
    replies drawn like these; the positions of one reply are not independent.
    """

    runtime: str
    form: str
    positions: int
    agreement: float
    greedy_tokens: float
    greedy_replies: float
    logprob_difference: float
    mean_logprob_difference: float
    logit_difference: float | None = None
    alike: float | None = None
    agreement_deviation: float = 0.0
    wall_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The figures and what they are held against."""
        return {**asdict(self), "least_agreement": LEAST_AGREEMENT[self.form]}


def compare(runtime: str, form: str, traces: Sequence[Trace], answers: Answers) -> Figures:
    """Figures of what a runtime answered."""
    same: list[int] = []
    differences: list[torch.Tensor] = []
    for one, told in zip(traces, answers.likeliest, strict=True):
        logprobs = one.logits.log_softmax(-1)
        same.append(sum(likeliest[0][0] == token for token, likeliest in zip(one.reply, told, strict=True)))
        for place, likeliest in enumerate(told):
            known = {token: value for token, value in likeliest if value is not None}
            differences.append((logprobs[place, list(known)] - torch.tensor(list(known.values()))).abs())
    tokens, whole, length = 0, 0, 0
    for one, greedy in zip(traces, answers.greedy, strict=True):
        tokens += sum(mine == theirs for mine, theirs in zip(one.reply, greedy, strict=False))
        length += max(len(one.reply), len(greedy))
        whole += list(one.reply) == greedy
    lengths = [len(one.reply) for one in traces]
    positions, agreement = sum(lengths), sum(same) / sum(lengths)
    spread = sum((agreed - agreement * count) ** 2 for agreed, count in zip(same, lengths, strict=True)) ** 0.5
    each = torch.cat([*differences, torch.zeros(1)])
    found_logits = [float((one.logits - theirs).abs().max()) for one, theirs in zip(traces, answers.logits or [], strict=False)]
    return Figures(
        runtime,
        form,
        positions,
        agreement,
        tokens / length,
        whole / len(traces),
        round(float(each.max()), 6),
        round(float(each.mean()), 6),
        round(max(found_logits), 6) if found_logits else None,
        agreement_deviation=round(spread / positions, 6),
    )


def with_prompts(figures: Figures, traces: Sequence[Trace], rendered: Sequence[Sequence[int]]) -> Figures:
    """The figures with the fraction of plain prompts that came out in the same tokens."""
    plain = [one for one in traces if one.asked.is_plain]
    same = sum(one.prompt == list(ids) for one, ids in zip(plain, rendered, strict=True))
    return replace(figures, alike=same / len(plain) if plain else None)


def check(figures: Figures, name: str) -> None:
    """Raise GateError with the numbers unless a form answers as the Release does."""
    least = LEAST_AGREEMENT[figures.form]
    problems = []
    if not figures.agreement >= least:
        problems.append(
            f"{figures.agreement:.4f} of {figures.positions} next tokens are the Release's, and {least} must be "
            f"(chance moves that by {figures.agreement_deviation:.4f})"
        )
    most = MOST_LOGIT_DIFFERENCE.get(figures.form)
    if most is not None and not (figures.logit_difference or 0) <= most:
        problems.append(f"a logit differs by {figures.logit_difference:.3g}, and at most {most} may")
    if figures.alike is not None and figures.alike < LEAST_ALIKE:
        problems.append(f"{figures.alike:.2f} of the prompts become the same tokens, and {LEAST_ALIKE} must")
    if problems:
        raise GateError(
            f"the {figures.form} export of {name} does not answer as it does in {figures.runtime}: {'; '.join(problems)}; "
            f"whole greedy replies alike {figures.greedy_replies:.2f}, largest logprob difference "
            f"{figures.logprob_difference:.3g}; nothing was written",
            _REMEDIES.get(figures.form, "this is a fault of Sartor or of the runtime's version; --to peft is what was signed"),
        )


# in few bits what a tune changed may round away, most of all where the base stood on the same grid already
_FEWER = "--quantise q8_0 has finer steps; the adapter's GGUF on the base's own file is rounded nowhere"
_REMEDIES = {form: _FEWER for form in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")}
