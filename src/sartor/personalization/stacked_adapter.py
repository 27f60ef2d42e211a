"""A user's ranks stacked on a frozen shared adapter.

    A = [A_shared; A_own] (R + r, inputs),  B = [B_shared B_own] (outputs, R + r)
    B A = B_shared A_shared + B_own A_own, exactly

The result is one PEFT directory, which works without the shared one. It serves clients of rounds
(`personal_adapters.py`), and users of a served agent (`learn/personal_tuning.py`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import catalogue
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.errors import ModelError
from sartor.core.licences import compliance
from sartor.models import adapters, hardware
from sartor.models.base import machine_facts
from sartor.models.lora_tensors import Array, Tensors, join_ranks, rank_of, split_ranks, zero_adapter
from sartor.personalization.acceptance import JudgedRows, PairedLosses
from sartor.personalization.benefit_report import row_losses
from sartor.tune.recipe import StopCriteria
from sartor.tune.shared_base import SharedBase, train
from sartor.tune.tokenized_dataset import TokenizedDataset

Losses = Mapping[str, float | None]


@dataclass(frozen=True)
class StackedAdapter:
    """A base with room for the shared and the personal ranks.

    shared: of R ranks.
    fresh: of R + `rank` ranks, which change nothing.
    """

    resident: SharedBase
    shared: Tensors
    fresh: Tensors
    rank: int

    @classmethod
    def open(cls, resident: SharedBase, shared: Tensors, rank: int) -> StackedAdapter:
        """Give the resident room for `rank` ranks on top of `shared`.

        shared: factors A (R, inputs) and B (outputs, R) by name.
        """
        resident.refit(rank_of(shared) + rank)
        return cls(resident, shared, resident.current_factors(), rank)

    @property
    def personal_ranks(self) -> slice:
        """Ranks on top of the shared ones."""
        return slice(rank_of(self.shared), None)

    @property
    def start(self) -> dict[str, Array]:
        """Shared adapter with fresh ranks on top: it computes the same as the shared one."""
        return join_ranks(self.shared, self._fresh_ranks)

    @property
    def unchanged(self) -> dict[str, Array]:
        """Shared adapter with zero ranks on top."""
        return join_ranks(self.shared, zero_adapter(self._fresh_ranks))

    @property
    def _fresh_ranks(self) -> dict[str, Array]:
        return split_ranks(self.fresh, rank_of(self.shared))[1]

    def tuned(
        self, rows: TokenizedDataset, start: Tensors, ranks: slice, budget: StopCriteria, learning_rate: float
    ) -> tuple[Tensors, Losses]:
        """Tune these ranks from `start`; return the adapter, and the losses of the first and last update.

        start, result: factors A (R, inputs) and B (outputs, R) by name, where R counts shared and own ranks. Raises
        ModelError.
        """
        self.resident.put(start)
        self.resident.hold(lambda name: True, ranks)
        recipe = self.resident.recipe
        optimizer = replace(recipe.optimizer, learning_rate=learning_rate)
        try:
            run = train(self.resident, rows, replace(recipe, budget=budget, optimizer=optimizer))
        except ModelError as error:
            problem = f"tuning of one's own: {error.brief}"
            raise ModelError(problem, "a lower learning rate, or look at these rows") from None
        return self.resident.current_factors(), run.losses

    def pair(self, tuned: Tensors, rows: JudgedRows) -> PairedLosses:
        """Return the losses of rows without and with the tuned ranks.

        tuned: as `tuned` returns it.
        """
        before, after = (row_losses(self.resident, adapter, rows.encoded) for adapter in (self.unchanged, tuned))
        return PairedLosses(rows, before, after)

    def facts(
        self, parents: Sequence[Artifact], sources: Sequence[Any], run: Mapping[str, Any], losses: Losses
    ) -> dict[str, Any]:
        """Return the manifest of the stacked Adapter, without its recipe.

        run: facts of the tuning.
        """
        base = self.resident.base
        self.resident.hold(lambda name: True)
        trained, total = adapters.trainable(self.resident.model)
        trainable_count = trained * self.rank // self.resident.rank
        return {
            "base": base.as_manifest(),
            "parents": [parent.as_parent() for parent in parents],
            "sources": list(sources),
            "licence": compliance.combine([*(parent.licence for parent in parents), base.ref.licence]),
            "left_out": {},
            "run": {
                **run,
                "loss": {"first": losses["first"], "last": losses["last"], "eval": None},
                "peak_memory_bytes": hardware.peak_bytes(),
                "trainable": trainable_count,
                "trainable_fraction": trainable_count / total,
            },
            "machine": machine_facts(),
            "versions": {
                name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")
            },
        }

    def write(self, tuned: Tensors, out: Path, facts: Mapping[str, Any], *, replace: bool = False) -> Artifact:
        """Write a stacked Adapter with its manifest, and register it.

        tuned: as `tuned` returns it.
        """

        def fill(part: Path) -> Mapping[str, Any]:
            self.resident.write(tuned, part)
            return facts

        adapter = write_artifact(out, "adapter", fill, replace=replace)
        catalogue.register(adapter)
        return adapter
