"""Clients of a simulation on one shared base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import parquet_io as stored
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ConfigError
from sartor.federate.recipe import FederateRecipe, tuning
from sartor.federate.rounds.round_manifest import UpdateRules
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.lora_task import LoraTask, RowPrivacy
from sartor.models.adapters import load_start
from sartor.models.lora_tensors import Tensors, zero_adapter
from sartor.models.packing import TokenizedExample
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.model_setup import start_of
from sartor.tune.shared_base import SharedBase
from sartor.tune.tokenized_dataset import TokenizedDataset

Notice = Callable[[str], object]


@dataclass(frozen=True)
class Clients:
    """Clients of a simulation.

    rows: by client; held-out rows are like the training rows, and no client trains on them.
    held_out: held-out rows of all Datasets, without those that any client trains on.
    left_out: reason -> ids of the rows left out.
    start: Adapter or Release that the first round starts from; None for fresh factors.
    """

    resident: SharedBase
    datasets: Sequence[Artifact]
    rows: dict[str, TokenizedDataset]
    held_out: Sequence[TokenizedExample]
    left_out: dict[str, list[str]]
    start: Artifact | None = None

    @property
    def parents(self) -> list[Artifact]:
        """Artifacts that the tuned adapter is derived from: the Datasets, and the Adapter it starts from."""
        return [*self.datasets, *([self.start] if self.start else [])]

    @property
    def sources(self) -> list[Any]:
        """Sources of all parents, each once."""
        sources: list[Any] = []
        for parent in self.parents:
            sources += [source for source in parent.manifest.get("sources", []) if source not in sources]
        return sources

    def dataset_of(self, name: str) -> Artifact:
        """Return the Dataset of a client's rows."""
        return self.datasets[0 if len(self.datasets) == 1 else list(self.rows).index(name)]

    def tasks(self, recipe: FederateRecipe, folder: Path) -> dict[str, LoraTask]:
        """Return each client's task of a round.

        folder: of the privacy accounts of rows, each client's below its name. Raises ConfigError unless the number of
        ranks equals that of clients.
        """
        ranks: Sequence[int | None] = recipe.method.ranks or [None] * len(self.rows)
        if len(ranks) != len(self.rows):
            problem = f"method.ranks has {len(ranks)} ranks, and there are {len(self.rows)} clients"
            raise ConfigError(problem, "a rank for each client, in their order")
        privacy = recipe.privacy if recipe.privacy and recipe.privacy.level == "example" else None
        return {
            name: LoraTask(self.resident, rows, rank, RowPrivacy.open(privacy, folder / name) if privacy else None)
            for (name, rows), rank in zip(self.rows.items(), ranks, strict=True)
        }

    def losses(self, shared: Tensors) -> dict[str, float | None]:
        """Return the held-out loss of the base and of the tuned adapter, nats per supervised token.

        shared: LoRA factors A (R, in), B (out, R).
        """
        adapters = {"base": zero_adapter(shared), "tuned": shared}
        return {side: self.resident.loss(adapter, self.held_out) for side, adapter in adapters.items()}

    def summary_lines(self, rules: UpdateRules) -> Iterator[str]:
        """Yield lines for the log, before the first round."""
        counts = [len(rows.train) for rows in self.rows.values()]
        yield (
            f"{len(self.rows)} clients with {min(counts):,} to {max(counts):,} rows, {sum(counts):,} in all; "
            f"{len(self.held_out):,} held-out rows; clip {rules.clip:g}, noise {rules.noise:.4g} clips, "
            f"weights up to {rules.most_examples:,} examples"
        )
        for reason, ids in self.left_out.items():
            yield f"left out: {len(ids):,} rows, {reason}"


def open_shared_base(
    recipe: FederateRecipe, path: str, notice: Notice = lambda line: None
) -> tuple[SharedBase, Artifact | None]:
    """Open the base of a recipe with the factors that the first round starts from, and the Artifact they are of.

    path: Dataset of the tuning recipe. Raises what opening a base raises, and for `method.start` ArtifactError, and
    ConfigError if it is of another base or method.
    """
    resident = SharedBase.open(tuning(recipe, path), notice)
    method = replace(resident.recipe.method, start=recipe.method.start)
    start = start_of(replace(resident.recipe, method=method), resident.base)
    if start is not None:
        load_start(resident.model, start.path)
    return resident, start


def open_clients(
    recipe: FederateRecipe, folders: Sequence[Path | str], shards: Shards | None, notice: Notice = lambda line: None
) -> Clients:
    """Open the base once, and return it with every client's tokenized rows.

    Raises ConfigError unless either Datasets or shards are given.
    """
    if bool(folders) == (shards is not None):
        raise ConfigError(
            f"{len(folders)} Datasets of clients and {'shards' if shards else 'no shards'} are given",
            "--clients DIR... for a Dataset each, or --shards N to deal out the one at data.path",
        )
    if shards and not recipe.data.path:
        raise ConfigError("shards are dealt of a Dataset, and the recipe names none", "data: {path: DIR}")
    datasets = [open_artifact(Path(folder), "dataset") for folder in folders or [recipe.data.path]]
    resident, start = open_shared_base(recipe, str(datasets[0].path), notice)
    encoded = [encode_rows(dataset, tuning(recipe, str(dataset.path)), resident.base.chat) for dataset in datasets]
    if shards:
        rows = _deal(datasets[0], encoded[0], shards)
    else:
        width = len(str(len(encoded)))
        rows = {f"client-{index:0{width}}": tokenized for index, tokenized in enumerate(encoded)}
    trained = {row.example_id for tokenized in rows.values() for row in tokenized.train}
    for name, tokenized in rows.items():
        unseen = [row for row in tokenized.held_out if row.example_id not in trained]
        rows[name] = replace(tokenized, held_out=unseen)
    held_out = {
        row.example_id: row for tokenized in encoded for row in tokenized.held_out if row.example_id not in trained
    }
    if recipe.data.reuse_frozen:
        known = [row for tokenized in rows.values() for row in (*tokenized.train, *tokenized.held_out)]
        resident.keep_frozen([*known, *held_out.values()], int(resident.recipe.compute.cache_gb * 1e9))
    left_out: dict[str, list[str]] = {}
    for tokenized in encoded:
        for reason, ids in tokenized.left_out.items():
            left_out.setdefault(reason, []).extend(ids)
    return Clients(resident, datasets, rows, held_out=list(held_out.values()), left_out=left_out, start=start)


def _deal(dataset: Artifact, encoded: TokenizedDataset, shards: Shards) -> dict[str, TokenizedDataset]:
    """Return the rows of one Dataset by client, the held-out ones in the same label proportions."""
    examples = {example.id: example for example in stored.read_examples(dataset)}
    train, held_out = ([examples[row.example_id] for row in part] for part in (encoded.train, encoded.held_out))
    owners = shards.deal(train)
    owners |= shards.deal_like(owners, train, held_out)
    width = len(str(shards.count))

    def of(index: int, rows: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        return [row for row in rows if owners.get(row.example_id) == index]

    return {
        f"client-{index:0{width}}": TokenizedDataset(
            train=of(index, encoded.train), held_out=of(index, encoded.held_out)
        )
        for index in range(shards.count)
    }
