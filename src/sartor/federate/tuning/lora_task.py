"""Client task: LoRA training, with DP-SGD if the recipe asks for privacy of rows.

Neighbouring data sets are the client's rows with and without one of them; their number counts as known. All that the
client sends is computed from noised gradients, so anybody, the coordinator included, may know every update. The noise
is a ChaCha20 stream under a secret that was drawn from the system once and stays here. Each manifest and set of rows
has another stream, and the same ones have the same. A client that was killed therefore repeats its round to the bit,
and nobody gets two draws of one round.

Loop, losses, optimiser and order of rows are those of `tune`. A round's work depends only on the shared adapter, the
rows, the round's number and the recipe (and with privacy on the manifest and the secret), so it can be repeated.
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
    """Privacy of a client's rows: the budget's account, and the secret of its noise, in a folder of its own.

    secret: 32 bytes.
    """

    privacy: Privacy
    account: Account
    secret: bytes

    @classmethod
    def open(cls, privacy: Privacy, folder: Path) -> RowPrivacy:
        """Return the privacy state of a folder, created if absent.

        Raises ArtifactError, ConflictError as `Account` does.
        """
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
        """Return clipping and noise of one update of a round.

        `auto` noise is the least with which all rounds fit into the budget.
        """
        privacy, batch_rows = self.privacy, min(self.privacy.batch_rows, rows)
        multiplier = privacy.noise_multiplier
        if multiplier == "auto":
            times = settings.rounds * updates_of(settings.local, rows, batch_rows)
            multiplier = _calibrated(privacy.budget, times, batch_rows / rows)
        return RowNoise(privacy.max_grad_norm, multiplier, batch_rows)

    def spending(self, manifest: Manifest, settings: RoundSettings, rows: int) -> Spending:
        """Return the spending of a round. Another manifest of one number is another release, and costs again."""
        row_noise = self.noise(settings, rows)
        name = f"{manifest.run} round {manifest.number} {manifest.digest[:16]}"
        return row_noise.spending(name, rows, updates_of(settings.local, rows, row_noise.batch_rows))

    def train(self, resident: SharedBase, rows: TokenizedDataset, settings: RoundSettings, manifest: Manifest) -> None:
        """Train the factors that require a gradient for one round; the learning rate's schedule spans all rounds.

        Raises BudgetError before anything is drawn if the budget does not allow the round; ConfigError for an
        unsuitable base; ExtraError without opacus.
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
                    rate = learning_rate(resident.recipe.optimizer, min(1.0, fraction))
                    group["lr"] = rate * settings.learning_rate / resident.recipe.optimizer.learning_rate
                update(poisson_sample(rows.train, row_noise, source))


def updates_of(local: LocalTraining, rows: int, batch_rows: int) -> int:
    """Return a client's updates in a round; an epoch has as many as draw each row once on average."""
    return local.updates or max(1, math.ceil((local.epochs or 1) * rows / batch_rows))


def row_means(model: Any, rows: Sequence[TokenizedExample], device: torch.device) -> torch.Tensor:
    """Return the weighted mean loss of each row, nats per supervised token: shape (B,).

    Each row is one row of the batch, padded at its end. In a causal model no token sees what comes after it, so the
    padding changes no loss.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=device)
    logits = model(input_ids=ids, use_cache=False).logits
    means = []
    for row, row_logits in zip(rows, logits, strict=True):
        batch = pack([row], device)
        supervised_logits = row_logits[batch.predict].to(torch.promote_types(row_logits.dtype, torch.float32))
        if row.factors is None:
            means.append(row.weight * F.cross_entropy(supervised_logits, batch.targets))
            continue
        # row weight * sum_i f_i l_i / sum_i f_i;  f_i: weight of the token's turn
        losses = F.cross_entropy(supervised_logits, batch.targets, reduction="none")
        means.append(row.weight * (losses * batch.weights).sum() / batch.weights.sum().clamp_min(1e-30))
    return torch.stack(means)


@functools.cache
def _calibrated(budget: PrivacyBudget, times: int, fraction: float) -> float:
    return calibrated(budget, times, fraction)


def _check(resident: SharedBase) -> None:
    """Raise ConfigError for a base that does not yield gradients of single rows."""
    if bits := quantization.bits_of(resident.model):
        problem = f"the base is in {bits} bits: the gradients of single rows are taken on one that is not quantised"
        raise ConfigError(problem, "base.bits: 16")
    if resident.model.config.is_encoder_decoder:
        raise ConfigError(
            "the base has an encoder, which sees the padding of a batch", "base: a causal one, as starter"
        )


NAME = "lora"
# losses of the first and the last update of a round; None where none was made here
Losses = tuple[float | None, float | None]


@dataclass
class LoraTask:
    """Client task that trains LoRA factors on the shared base.

    rows: rows of this client.
    rank: number of shared ranks that it trains, the first ones; it freezes the others. None: all.
    guard: makes its updates private of its rows.
    losses: round -> (loss of the first update, of the last).
    """

    resident: SharedBase
    rows: TokenizedDataset
    rank: int | None = None
    guard: RowPrivacy | None = None
    losses: dict[int, Losses] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """Return the change of the factors that the round's mode trains, by PEFT's names, in their shapes.

        The change is sent even in modes of whole factors. Raises RoundError for another base, recipe or settings than
        this client has, ModelError for a loss that explodes.
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
    """Return a client's recipe with the settings that a round decides."""
    local, optimizer = settings.local, replace(recipe.optimizer, learning_rate=settings.learning_rate)
    budget = recipe_Budget(epochs=local.epochs and float(local.epochs), updates=local.updates)
    return replace(recipe, budget=budget, optimizer=optimizer)


def change(mode: Mode, shared: Tensors, trained: Tensors, number: int) -> dict[str, Array]:
    """Return what a client sends, in the shapes of the mode's upload.

    For modes that upload whole factors it is trained - shared, since a round clips what it sums. shared +
    mean(changes) is the mean of the factors.
    """
    upload = mode.upload(shared, trained, number)
    is_whole = len(upload) == len(shared)
    return add_changes(upload, {name: shared[name] for name in upload}, -1.0) if is_whole else dict(upload)


def settings_of(manifest: Manifest, base: str, recipe: str) -> RoundSettings:
    """Return a round's settings of the task.

    base, recipe: digests of this client's. Raises RoundError for other digests, or for settings that are not
    supported.
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
