"""The clients of a simulation: a Dataset each, or one that is dealt out; on one resident base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import rows as stored
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ConfigError
from sartor.federate.aggregate.tensors import Tensors
from sartor.federate.rounds.manifest import Rules
from sartor.federate.tuning.recipe import FederateRecipe, tuning
from sartor.federate.tuning.resident import Resident
from sartor.federate.tuning.shards import Shards
from sartor.models.batches import Encoded
from sartor.tune.rows import encode_rows
from sartor.tune.tokenised import Rows

Notice = Callable[[str], object]


@dataclass(frozen=True)
class Clients:
    """rows: by client. held_out: of all Datasets, without a row that any client trains on."""

    resident: Resident
    datasets: Sequence[Artifact]
    rows: dict[str, Rows]
    held_out: Sequence[Encoded]
    left_out: dict[str, list[str]]

    @property
    def sources(self) -> list[Any]:
        """Of all Datasets, each once."""
        found: list[Any] = []
        for dataset in self.datasets:
            found += [source for source in dataset.manifest["sources"] if source not in found]
        return found

    def losses(self, start: Tensors, shared: Tensors) -> dict[str, float | None]:
        """Nats per supervised token of the held-out rows, of the base and of what was tuned."""
        return {"base": self.resident.loss(start, self.held_out), "tuned": self.resident.loss(shared, self.held_out)}

    def said(self, rules: Rules) -> Iterator[str]:
        """Lines for a person, before the first round."""
        counts = [len(rows.train) for rows in self.rows.values()]
        yield (
            f"{len(self.rows)} clients with {min(counts):,} to {max(counts):,} rows, {sum(counts):,} in all; "
            f"{len(self.held_out):,} held-out rows; clip {rules.clip:g}, noise {rules.noise:.4g} clips, "
            f"weights up to {rules.most_examples:,} examples"
        )
        for reason, ids in self.left_out.items():
            yield f"left out: {len(ids):,} rows, {reason}"


def open_clients(
    recipe: FederateRecipe, folders: Sequence[Path | str], shards: Shards | None, notice: Notice = lambda line: None
) -> Clients:
    """Open the base once, and every client's rows as tokens. Raises ConfigError unless Datasets or shards are given."""
    if bool(folders) == (shards is not None):
        raise ConfigError(
            f"{len(folders)} Datasets of clients and {'shards' if shards else 'no shards'} are given",
            "--clients DIR... for a Dataset each, or --shards N to deal out the one at data.path",
        )
    if shards and not recipe.data.path:
        raise ConfigError("shards are dealt of a Dataset, and the recipe names none", "data: {path: DIR}")
    datasets = [open_artifact(Path(folder), "dataset") for folder in folders or [recipe.data.path]]
    resident = Resident.open(tuning(recipe, str(datasets[0].path)), notice)
    encoded = [encode_rows(one, tuning(recipe, str(one.path)), resident.base.chat) for one in datasets]
    if shards:
        rows = _dealt(datasets[0], encoded[0], shards)
    else:
        rows = {f"client-{place:0{len(str(len(encoded)))}}": one for place, one in enumerate(encoded)}
    trained = {row.example_id for one in rows.values() for row in one.train}
    held_out = {row.example_id: row for one in encoded for row in one.held_out if row.example_id not in trained}
    left_out: dict[str, list[str]] = {}
    for one in encoded:
        for reason, ids in one.left_out.items():
            left_out.setdefault(reason, []).extend(ids)
    return Clients(resident, datasets, rows, list(held_out.values()), left_out)


def _dealt(dataset: Artifact, encoded: Rows, shards: Shards) -> dict[str, Rows]:
    """The training rows of one Dataset by client."""
    kept = {row.example_id for row in encoded.train}
    owners = shards.deal([one for one in stored.read_examples(dataset) if one.id in kept])
    width = len(str(shards.count))
    dealt = {place: [row for row in encoded.train if owners[row.example_id] == place] for place in range(shards.count)}
    return {f"client-{place:0{width}}": Rows(train=rows) for place, rows in dealt.items()}
