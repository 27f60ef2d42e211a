"""Client task: LoRA training, privately if asked.

Neighbours are the client's rows with and without one of them; how many they are counts as known. All that the client
sends is computed from what the noise went into, so the rest, the coordinator included, may know every update. The
noise is a ChaCha20 stream under a secret that was drawn from the system once and stays here: for each manifest and set
of rows another, and the same for the same, so that a client that was killed does its round again to the bits and
nobody gets two draws of one round.

Loop, losses, optimiser and order of rows are those of `tune`. What is repeated is repeated: a round's work follows
from the shared adapter, the rows, the round's number and the recipe alone, so that a client that was killed does it
again to the bits.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sartor.core import config
from sartor.core.errors import ArtifactError, ConfigError, ModelError, RoundError
from sartor.core.filesystem import PrivateFileSystem
from sartor.federate.aggregation import Mode
from sartor.federate.privacy.accountant import Account, PrivacyBudget, Spending, calibrated
from sartor.federate.privacy.dp_sgd import RowNoise, poisson_sample, private_updates
from sartor.federate.recipe import MODES, LocalTraining, Privacy, RoundSettings
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest
from sartor.federate.secure import masking_crypto
from sartor.federate.tuning import round_schedule
from sartor.models import quantization
from sartor.models.lora_tensors import Array, Tensors, add_changes
from sartor.models.packing import TokenizedExample, pack
from sartor.tune import optimizers
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.recipe import StopCriteria as recipe_Budget
from sartor.tune.sampler import SchedulePart
from sartor.tune.shared_base import SharedBase, train
from sartor.tune.tokenized_dataset import TokenizedDataset
from sartor.tune.training_loop import learning_rate

SECRET, ACCOUNT = "noise.secret", "account.json"


@dataclass(frozen=True)
class RowPrivacy:
    """What a client's rows may cost: the budget's account, and the secret (32 bytes) of its noise, in a folder of its
    own.
    """

    privacy: Privacy
    account: Account
    secret: bytes

    @classmethod
    def open(cls, privacy: Privacy, folder: Path) -> RowPrivacy:
        """The guard of a folder, begun where there is none. Raises ArtifactError, ConflictError as `Account` does."""
        account = Account(folder / ACCOUNT, privacy.budget)
        if not (folder / SECRET).exists():
            PrivateFileSystem().replace(folder / SECRET, os.urandom(masking_crypto.KEY_BYTES))
        secret = (folder / SECRET).read_bytes()
        if len(secret) != masking_crypto.KEY_BYTES:
            raise ArtifactError(
                f"{folder / SECRET} is not the secret of a client's noise", f"cp BACKUP/{SECRET} {folder / SECRET}"
            )
        return cls(privacy, account, secret)

    def noise(self, settings: RoundSettings, rows: int) -> RowNoise:
        """How one update of a round protects the rows: `auto` noise is the least with which all rounds fit into the
        budget.
        """
        privacy, batch_rows = self.privacy, min(self.privacy.batch_rows, rows)
        multiplier = privacy.noise_multiplier
        if multiplier == "auto":
            times = settings.rounds * updates_of(settings.local, rows, batch_rows)
            multiplier = _calibrated(privacy.budget, times, batch_rows / rows)
        return RowNoise(privacy.max_grad_norm, multiplier, batch_rows)

    def spending(self, manifest: Manifest, settings: RoundSettings, rows: int) -> Spending:
        """What a round costs. Another manifest of one number is another release, and costs again."""
        row_noise = self.noise(settings, rows)
        name = f"{manifest.run} round {manifest.number} {manifest.digest[:16]}"
        return row_noise.spending(name, rows, updates_of(settings.local, rows, row_noise.batch_rows))

    def train(self, resident: SharedBase, rows: TokenizedDataset, settings: RoundSettings, manifest: Manifest) -> None:
        """A round's training of what of the resident may learn. Its rate goes its course over all rounds.

        Raises BudgetError before anything is drawn where the budget does not hold the round; ExtraError without
        opacus.
        """
        _check(resident)
        spending, row_noise = self.spending(manifest, settings, len(rows.train)), self.noise(settings, len(rows.train))
        self.account.spend(spending)
        source = masking_crypto.stream(masking_crypto.derive(self.secret, manifest.digest, "rows", rows.digest()))
        trainable = [factor for factor in resident.factors.values() if factor.requires_grad]
        optimizer = optimizers.make(trainable, resident.recipe.optimizer, resident.device)

        def losses(chosen: Sequence[TokenizedExample]) -> torch.Tensor:
            return row_means(resident.model, chosen, resident.device)

        with private_updates(resident.model, optimizer, losses, row_noise, source=source) as update:
            for index in range(spending.times):
                fraction = (manifest.number - 1 + index / spending.times) / settings.rounds
                for group in optimizer.param_groups:
                    group["lr"] = _rate(resident, settings, min(1.0, fraction))
                update(poisson_sample(rows.train, row_noise, source))


def updates_of(local: LocalTraining, rows: int, batch_rows: int) -> int:
    """Updates of a client in a round: an epoch is as many as draw each row once on average."""
    return local.updates or max(1, math.ceil((local.epochs or 1) * rows / batch_rows))


def row_means(model: Any, rows: Sequence[TokenizedExample], device: torch.device) -> torch.Tensor:
    """(B,) nats per supervised token of each row, times its weight; a row of the batch is a row, padded at its end.

    Nothing of a causal model sees what comes after it, so the padding changes no loss.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=device)
    logits = model(input_ids=ids, use_cache=False).logits
    means = []
    for row, row_logits in zip(rows, logits, strict=True):
        batch = pack([row], device)
        supervised_logits = row_logits[batch.predict].to(torch.promote_types(row_logits.dtype, torch.float32))
        means.append(row.weight * F.cross_entropy(supervised_logits, batch.targets))
    return torch.stack(means)


def _rate(resident: SharedBase, settings: RoundSettings, fraction: float) -> float:
    optimizer = resident.recipe.optimizer
    return learning_rate(optimizer, fraction) * settings.learning_rate / optimizer.learning_rate


@functools.cache
def _calibrated(budget: PrivacyBudget, times: int, fraction: float) -> float:
    return calibrated(budget, times, fraction)


def _check(resident: SharedBase) -> None:
    """Raise ConfigError for a base whose single gradients cannot be had."""
    if bits := quantization.bits_of(resident.model):
        problem = f"the base is in {bits} bits: the gradients of single rows are taken on one that is not quantised"
        raise ConfigError(problem, "base.bits: 16")
    if resident.model.config.is_encoder_decoder:
        raise ConfigError(
            "the base has an encoder, which sees the padding of a batch", "base: a causal one, as starter"
        )


NAME = "lora"
# of the first update of a round, and of the last; None where none was made here
Losses = tuple[float | None, float | None]


@dataclass
class LoraTask:
    """See `round_manifest.ClientTask`. rows: this client's; losses: round -> (loss of the first update, of the last).

    rank: of the shared ranks this client trains the first so many, and holds the others still; None: it trains all.
    guard: makes its updates private of its rows.
    """

    resident: SharedBase
    rows: TokenizedDataset
    rank: int | None = None
    guard: RowPrivacy | None = None
    losses: dict[int, Losses] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """The change of what the round's mode trains, by PEFT's names; of factors too it is the change that is sent.

        Raises RoundError for another base, recipe or settings than this client has, ModelError for a loss that
        explodes.
        """
        settings = settings_of(manifest, self.resident.ref.digest, self.resident.digest)
        mode, resident, number = MODES[settings.mode], self.resident, manifest.number
        resident.put(shared)
        resident.hold(lambda name: mode.trains(name, number), slice(self.rank))
        if self.guard:
            self.guard.train(resident, self.rows, settings, manifest)
        else:
            self._train(settings, number)
        changes = change(mode, shared, resident.current_factors(), number)
        return LocalUpdate(
            changes, len(self.rows.train), round_schedule.responses(manifest, shared, changes, resident.recipe.seed)
        )

    def _train(self, settings: RoundSettings, number: int) -> None:
        recipe, part = local_recipe(self.resident.recipe, settings), SchedulePart(number - 1, settings.rounds)
        try:
            run = train(self.resident, self.rows, recipe, part)
        except ModelError as error:
            problem = f"round {number}: {error.brief}"
            raise ModelError(problem, "lower optimizer.learning_rate, or look at this client's rows") from None
        self.losses[number] = run.losses["first"], run.losses["last"]


def local_recipe(recipe: ResolvedRecipe, settings: RoundSettings) -> ResolvedRecipe:
    """A client's recipe with what a round decides."""
    local, optimizer = settings.local, replace(recipe.optimizer, learning_rate=settings.learning_rate)
    budget = recipe_Budget(epochs=local.epochs and float(local.epochs), updates=local.updates)
    return replace(recipe, budget=budget, optimizer=optimizer)


def change(mode: Mode, shared: Tensors, trained: Tensors, number: int) -> dict[str, Array]:
    """What a client sends: of the modes that send factors whole, their change, since a round clips what it sums.

    The mean of changes, added, is the mean of factors.
    """
    upload = mode.upload(shared, trained, number)
    is_whole = len(upload) == len(shared)
    return add_changes(upload, {name: shared[name] for name in upload}, -1.0) if is_whole else dict(upload)


def settings_of(manifest: Manifest, base: str, recipe: str) -> RoundSettings:
    """What a round says of the task. base, recipe: digests of this client's. Raises RoundError for others, or for
    settings that it lacks.
    """
    for kind, digest, expected in (("base", manifest.work.base, base), ("recipe", manifest.work.recipe, recipe)):
        if digest != expected:
            raise RoundError(
                f"the round is of a {kind} with the digest {digest[:16] or 'none'}; this client's has {expected[:16]}",
                f"tune with the {kind} that the coordinator has",
                "manifest",
            )
    try:
        return config.load(RoundSettings, dict(manifest.work.settings))
    except ConfigError as error:
        raise RoundError(f"the settings of the task {NAME}: {error.problem}", error.remedy, "task") from None
