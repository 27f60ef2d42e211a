"""Is a delta better on a person's own rows, and no worse elsewhere? Computed on the device, in this process, by torch alone.

Losses of whole rows, not replies: they need one pass and no judge, and nothing of a row leaves the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sartor.edge.tuning.tuner import LOGITS_BYTES, adapted, load_factors
from sartor.models import kernels
from sartor.models.losses.fused_decoder import Fast
from sartor.models.mmap_llama import MappedLlama
from sartor.models.packing import Encoded, pack
from sartor.personalization.acceptance import Asked, Verdict, judge, too_few_prompts  # noqa: F401
from sartor.tune.recipe import Lora


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
