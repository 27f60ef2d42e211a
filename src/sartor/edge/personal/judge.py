"""Is a delta better on a person's own rows, and no worse elsewhere? Computed on the device, in this process, by torch alone.

Losses of whole rows, not replies: they need one pass and no judge, and nothing of a row leaves the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sartor.edge.tuning.llama import MappedLlama
from sartor.edge.tuning.tuner import LOGITS_BYTES, adapted, load_factors
from sartor.evaluate.compare import LEAST_GROUPS, Comparison, paired
from sartor.models import kernels
from sartor.models.batches import Encoded, pack
from sartor.models.forward import Fast
from sartor.tune.recipe import Lora


@dataclass(frozen=True)
class Asked:
    """Rows to be judged by, and their groups: rows of one prompt are one group."""

    rows: Sequence[Encoded]
    groups: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """Mean losses in nats a token, before and after. why: empty if the delta may be made current."""

    private: Comparison
    probe: Comparison
    why: str


class Judge:
    """A base with room for an adapter of a method."""

    def __init__(self, base: Path, method: Lora) -> None:
        self._model = adapted(MappedLlama(base), method)
        self._fast = Fast(self._model, kernels.choose(torch.device("cpu"))[0], logits_bytes=LOGITS_BYTES)

    @torch.no_grad()
    def losses(self, adapter: Path, rows: Sequence[Encoded]) -> list[float]:
        """Mean loss of each row's supervised tokens under an adapter in PEFT's form. Raises ModelError if it does not fit."""
        load_factors(self._model, adapter)
        return [float(self._fast.losses(pack([row])).mean()) for row in rows]


def judge(private: tuple[Asked, Sequence[float], Sequence[float]], probe: tuple[Asked, Sequence[float], Sequence[float]],
          most_probe_loss: float) -> Verdict:  # fmt: skip
    """The verdict on (rows, losses before, losses after) of a person's rows and of the probe.

    Better by the whole interval over prompts (`evaluate.compare`); the probe's loss may rise by `most_probe_loss` at the
    upper end of its interval.
    """
    mine, other = (
        paired(before, after, asked.groups, [row.supervised_tokens for row in asked.rows], is_bounded=False)
        for asked, before, after in (private, probe)
    )
    verdict = mine.verdict(higher_is_better=False)
    why = ""
    if verdict != "better":
        why = f"on the person's own rows: {verdict} ({mine.low:+.3f} to {mine.high:+.3f} nats a token)"
    elif not other.high <= most_probe_loss:
        why = f"the probe's loss may have risen by {other.high:.3f} nats a token, over {most_probe_loss:g}"
        if too_few := too_few_prompts(probe[0].groups):
            why = f"cannot tell whether the probe's loss has risen: {too_few}: --probe FILE"
    return Verdict(mine, other, why)


def too_few_prompts(groups: Sequence[str]) -> str:
    """What to say of a probe that has too few prompts to tell anything; empty for enough of them."""
    prompts = len(set(groups))
    return f"the probe has {prompts} prompts, and {LEAST_GROUPS} are the least that tell" if prompts < LEAST_GROUPS else ""
