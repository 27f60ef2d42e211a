"""Verdict of an ablation by its matched controls, and the signed document that states it.

An ablation leaves out the suspects, a set of m rows, and compares the effect with those of K control sets of m other
rows each (`ablation.py`). The effect of a set is the rise of the reply's loss, nats summed over its tokens, averaged
over the seeds. Write e for the effect of the suspects, c_1..c_K for those of the controls, with mean c and standard
deviation s (K - 1 degrees of freedom).

The question is whether the suspects matter more than a new set of rows that resemble the prompt and the reply as much.
The interval of the excess e - c is the prediction interval of a new control (Hahn 1969, J. Amer. Stat. Assoc. 64):

    h = t_(1 - LEVEL, K - 1) s sqrt(1 + 1/K),   excess in [e - c - h, e - c + h]                             (1)

    proven       e - c - h > LEAST_EFFECT_NATS
    cannot_tell  not proven, and an effect of the needed size would be seen with a chance below POWER
    not_proven   otherwise

The first rule has the one-sided level LEVEL where controls' effects are normal, and a smaller one for effects up to
LEAST_EFFECT_NATS, below which a row does not matter. Ranks alone could not reach it: the suspects lie above all of
K = 5 controls with chance 1/6. The needed size is NEEDED_FRACTION of what the tuning added to the reply, its loss
before minus its loss after the tuning, and at least LEAST_NEEDED_NATS. The smallest effect that is seen with the
chance POWER, with n the noncentrality at which Student's t exceeds t_(1 - LEVEL, K - 1) with that chance, is

    LEAST_EFFECT_NATS + n s sqrt(1 + 1/K)                                                                    (2)

For K = 5, 8, 10, 20 controls h is 3.0, 2.5, 2.4, 2.1 s, and (2) is 4.1, 3.5, 3.3, 3.0 s above the least effect. A
control that matters itself, such as a row with the same content, makes s large: the verdict is then cannot_tell or
not_proven, and not proven by mistake. More controls help more than more seeds, unless seeds differ much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import nctdtrinc, stdtrit

from sartor.core import signing
from sartor.core.errors import ConfigError, SignatureError
from sartor.core.signed_document import DocumentForm, read_document

LEVEL = 0.025
POWER = 0.8
LEAST_EFFECT_NATS = 0.1
NEEDED_FRACTION = 0.2
LEAST_NEEDED_NATS = 0.5
LEAST_CONTROLS = 5
FILE, KIND, SCHEMA = "proof.json", "ablation", 1
# decimals of stored effects, from which a reader computes the verdict again
DECIMALS = 6
FORM = DocumentForm(
    kind=KIND,
    schema=SCHEMA,
    purpose="proof",
    title="proof by retraining",
    required=("adapter", "prompt", "reply", "examples", "suspects", "controls", "effect", "verdict"),
    source=f"give the {FILE} that sartor ablate wrote",
)


class Verdict(StrEnum):
    """Verdict of an ablation; rules in the docstring of the module."""

    PROVEN = "proven"
    NOT_PROVEN = "not_proven"
    CANNOT_TELL = "cannot_tell"


@dataclass(frozen=True)
class Judgement:
    """Excess effect of the suspects over their controls, nats, and the verdict.

    low, high: interval (1). detectable: effect (2). needed: size of an effect that would have to be seen.
    """

    estimate: float
    low: float
    high: float
    detectable: float
    needed: float
    verdict: Verdict


def judge(suspects: float, controls: Sequence[float], gain: float) -> Judgement:
    """Return the judgement of an ablation.

    suspects: effect of the suspects, nats. controls: (K,) effects of the control sets, K >= 2.
    gain: loss of the reply before the tuning minus that after it, nats.

    >>> judge(3.0, [0.1, -0.1, 0.0, 0.2, 0.0], gain=5.0).verdict.value
    'proven'
    >>> judge(0.1, [0.1, -0.1, 0.0, 0.2, 0.0], gain=5.0).verdict.value
    'not_proven'
    >>> judge(3.0, [0.1, -2.0, 0.0, 2.2, 0.0], gain=5.0).verdict.value
    'cannot_tell'
    """
    count = len(controls)
    excess = suspects - float(np.mean(controls))
    spread = float(np.std(controls, ddof=1)) * math.sqrt(1 + 1 / count)
    quantile = float(stdtrit(count - 1, 1 - LEVEL))
    half_width = quantile * spread
    detectable = LEAST_EFFECT_NATS + float(nctdtrinc(count - 1, 1 - POWER, quantile)) * spread
    needed = max(LEAST_NEEDED_NATS, NEEDED_FRACTION * gain)
    if excess - half_width > LEAST_EFFECT_NATS:
        verdict = Verdict.PROVEN
    elif detectable > needed:
        verdict = Verdict.CANNOT_TELL
    else:
        verdict = Verdict.NOT_PROVEN
    return Judgement(
        estimate=round(excess, DECIMALS),
        low=round(excess - half_width, DECIMALS),
        high=round(excess + half_width, DECIMALS),
        detectable=round(detectable, DECIMALS),
        needed=round(needed, DECIMALS),
        verdict=verdict,
    )


def judged_fields(judgement: Judgement) -> dict[str, Any]:
    """Return the fields of a proof that follow from its effects."""
    return {
        "effect": {"estimate": judgement.estimate, "low": judgement.low, "high": judgement.high},
        "detectable_nats": judgement.detectable,
        "needed_nats": judgement.needed,
        "rule": {
            "level": LEVEL,
            "power": POWER,
            "least_effect_nats": LEAST_EFFECT_NATS,
            "needed_fraction": NEEDED_FRACTION,
            "least_needed_nats": LEAST_NEEDED_NATS,
        },
        "verdict": judgement.verdict.value,
    }


@dataclass(frozen=True)
class SetEffect:
    """Effect of leaving out one set of rows.

    examples: their ids. likeness: mean score of their resemblance to prompt and reply.
    by_seed: rise of the reply's loss, nats, for each seed.
    """

    examples: tuple[str, ...]
    likeness: float
    by_seed: tuple[float, ...]

    @property
    def effect(self) -> float:
        """Mean of the seeds, nats."""
        return round(float(np.mean(self.by_seed)), DECIMALS)

    def as_json(self) -> dict[str, Any]:
        """Return the entry of a proof."""
        return {**asdict(self), "effect": self.effect}


def judge_fields(fields: Mapping[str, Any]) -> Judgement:
    """Return the judgement that the effects in a proof lead to."""
    controls = [float(control["effect"]) for control in fields["controls"]]
    gain = float(fields["loss"]["before_tuning"]) - float(fields["loss"]["tuned"])
    return judge(float(fields["suspects"]["effect"]), controls, gain)


def check_ablation(file: Path | str, key: Path | str | None = None) -> dict[str, Any]:
    """Return the content of a proof that `key` signed, by default a key in SARTOR_HOME/trusted.

    file: the proof, or the folder that `sartor ablate` wrote.
    Raises SignatureError, also for another kind of document signed by that key, and for a proof whose verdict does not
    follow from its effects.
    """
    path = Path(file)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise ConfigError(f"there is no proof at {path}", f"give the {FILE} that sartor ablate wrote, or its folder")
    trusted = [signing.open_public(Path(key))] if key else None
    fields = read_document(path, FORM, trusted)
    try:
        expected = judged_fields(judge_fields(fields))
        is_consistent = len(fields["controls"]) >= LEAST_CONTROLS and all(
            fields[name] == value for name, value in expected.items()
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        is_consistent = False
    if not is_consistent:
        raise SignatureError(f"{path}: its verdict does not follow from the effects that it states", FORM.source)
    return fields
