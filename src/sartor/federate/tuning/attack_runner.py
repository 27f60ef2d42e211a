"""Runner of privacy attacks on a federated adapter.

    membership   of the tuned adapter: losses of trained and of held-out rows, beside the untuned base's
    exposure     of rows with a secret, planted in a run of rounds of their own, which makes no adapter that is shipped
    inversion    of what one client sends in the first round, and of the gradient of one of its rows
    audit        where privacy is claimed: of a client, the rounds; of its rows, who is a member of the adapter

Every writer of such an adapter runs them. A coordinator of real clients has none of their rows. Attacks that need rows
are then left out with the reason, and simulated clients do the rest.

A gradient canary is a direction: values of an update that belong to no other canary, with random signs. A client of
the audit sends the sum of those of its canaries whose coins say so, scaled to the clip norm. It passes through the
same rounds that tuned the adapter: the clip, the noise as it is really drawn, the ring, the secure sum, as many
rounds. Andrew et al. 2023, arXiv:2302.03098, use random directions in this way; the worst case is that of Nasr et al.
2021, arXiv:2101.04535. With unit direction d_c of canary c, its score is the change of the shared adapter along it:

    score_c = <shared_after - shared_before, d_c>

Guessing the coins from the scores bounds epsilon from below (`privacy_attacks.one_run`).

This measures the mechanism as installed here, not the shipped adapter, which holds no canary. A client has many
canaries, so one canary is only a part of what a client can change. The bound holds for the client's epsilon, and is
looser than with one canary a client.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sartor.core.records import Example, Message, Origin
from sartor.evaluate.audit import membership_inference
from sartor.evaluate.audit.membership_inference import Membership
from sartor.federate.aggregation import Mode
from sartor.federate.privacy import privacy_attacks
from sartor.federate.privacy.accountant import PrivacyBudget
from sartor.federate.privacy.privacy_attacks import AttackReport, Audit, Exposure, Inversion, exposure
from sartor.federate.recipe import MODES
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest
from sartor.federate.tuning.lora_task import LoraTask, Losses, RowPrivacy
from sartor.federate.tuning.simulated_rounds import InspectedRounds, Rounds, SecureRounds, SimulationSetup
from sartor.models import packing
from sartor.models.lora_tensors import A, Array, B, Tensors, add_changes, flat, modules, unflat
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.packing import TokenizedExample
from sartor.tune.shared_base import SharedBase
from sartor.tune.tokenized_dataset import TokenizedDataset

LEAST, MOST = 64, 16_384


def canaries_for(claim: PrivacyBudget, values: int) -> int:
    """Return the number of canaries m that can show 1.1 times the claim if every guess is right.

    m / 2 right guesses refute epsilon if (1 + e^-epsilon)^(-m / 2) < 0.05, so m = 2 ceil(ln(20) e^(1.1 epsilon)).
    values: size of an update, an upper limit of m. m is also limited to 64..16,384, and at least 10.
    """
    needed = 2 * math.ceil(-math.log(1 - privacy_attacks.CONFIDENCE) * math.exp(min(1.1 * claim.epsilon, 20.0)))
    return max(10, min(max(LEAST, needed), MOST, values))


@dataclass(frozen=True)
class GradientCanaries:
    """Canaries over the P values of an update.

    owner: (P,), canary of each value.
    signs: (P,), -1 or 1.
    is_in: (count,), coins; True: the canary is sent.
    """

    owner: NDArray[np.int64]
    signs: NDArray[np.float64]
    is_in: NDArray[np.bool_]

    @classmethod
    def drawn(cls, count: int, values: int, seed: int) -> GradientCanaries:
        """Draw `count` canaries over an update of `values` numbers from a seed."""
        rng = np.random.default_rng([seed, 1])
        owner = rng.permutation(np.arange(values, dtype=np.int64) % count)
        return cls(owner, np.where(rng.random(values) < 0.5, 1.0, -1.0), privacy_attacks.coins(count, seed))

    def sent(self, canaries: Sequence[int], like: Tensors, length: float) -> Tensors:
        """Return the update of a client with these canaries, in the shapes of `like`.

        It is the sum of the canaries that are in, scaled to the norm `length`; zeros if there are none.
        """
        chosen = np.isin(self.owner, [canary for canary in canaries if self.is_in[canary]])
        direction = np.where(chosen, self.signs, 0.0)
        norm = float(np.linalg.norm(direction))
        return unflat(direction * (length / norm if norm else 0.0), like)

    def scores(self, change: Tensors) -> NDArray[np.float64]:
        """Return the change along each canary's unit direction, shape (count,).

        score_c = sum over p with owner p = c of change_p signs_p / sqrt(number of such p).
        """
        projections = np.bincount(self.owner, flat(change) * self.signs, len(self.is_in))
        return np.asarray(projections / np.sqrt(np.bincount(self.owner, minlength=len(self.is_in))))

    def audited(self, change: Tensors, claim: PrivacyBudget) -> Audit:
        """Return the audit by guessing the coins from a change, which has the shapes of an update."""
        return privacy_attacks.one_run(self.scores(change).tolist(), self.is_in.tolist(), claim.delta)


@dataclass
class CanaryTask:
    """Task of a client of the audit, which trains nothing.

    canaries: indices of its canaries.
    """

    mode: Mode
    drawn: GradientCanaries
    canaries: Sequence[int]
    losses: dict[int, Losses] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """Return the canaries' update, in the shapes that the round sends.

        It is the same in each round that sends the tensors of the first one, and zero in the others.
        """
        like = self.mode.sent(shared, manifest.number)
        if set(like) != set(self.mode.sent(shared, 1)):
            return LocalUpdate({name: np.zeros_like(value) for name, value in like.items()}, 1)
        return LocalUpdate(self.drawn.sent(self.canaries, like, manifest.rules.clip), 1)


# tokens of the vocabulary that one forward pass computes
_AT_ONCE = 4_096


@torch.no_grad()
def row_losses(resident: SharedBase, shared: Tensors, rows: Sequence[TokenizedExample]) -> list[float]:
    """Return the mean loss of each row under an adapter, nats per supervised token, in the rows' order.

    shared: LoRA factors A (R, in), B (out, R).
    """
    resident.put(shared)
    resident.model.eval()
    path, means = resident.path(resident.model, rows, LossOptions()), list[float]()
    limit = resident.recipe.compute.micro_batch_tokens
    if not rows:
        return []
    for micro in packing.micro_batches(rows, limit if isinstance(limit, int) else 1, share=False):
        losses, _ = path.losses(micro)
        parts = losses.float().split([row.supervised_tokens for row in micro])
        means += [float(part.mean()) for part in parts]
    return means


def gradient(resident: SharedBase, shared: Tensors, row: TokenizedExample, name: str) -> Array:
    """Return the gradient of one row's mean loss in the factor `name`, in the factor's shape, fp32.

    A client that takes a gradient step would send it.
    """
    resident.put(shared)
    resident.hold(lambda other: other == name)
    path = resident.path(resident.model, [row], LossOptions())
    losses, _ = path.losses([row])
    losses.mean().backward()  # type: ignore[no-untyped-call]
    factor = resident.factors[name]
    result: Array = (
        (factor.grad if factor.grad is not None else torch.zeros_like(factor)).detach().float().cpu().numpy()
    )
    factor.grad = None
    return result


class _Read(Exception):
    """Exception that ends a forward pass once the module's input was read."""


def inputs_of(resident: SharedBase, module: str) -> NDArray[np.float32]:
    """Return the input of a module for each token of the vocabulary alone: shape (V, in), fp32.

    module: name as in PEFT's files, without the factor. Layers behind the module are not computed.
    """
    count = int(resident.model.get_input_embeddings().weight.shape[0])
    with _watched(resident.model.get_submodule(module)) as read, torch.no_grad():
        for low in range(0, count, _AT_ONCE):
            ids = torch.arange(low, min(low + _AT_ONCE, count), device=resident.device)[:, None]
            try:
                resident.model(input_ids=ids, use_cache=False)
            except _Read:
                continue
    return np.concatenate(read)


@contextmanager
def _watched(module: Any) -> Iterator[list[NDArray[np.float32]]]:
    """Collect the inputs (N, in) of a module in the yielded list; each of them ends the forward pass."""
    read: list[NDArray[np.float32]] = []

    def look(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        read.append(inputs[0].reshape(-1, inputs[0].shape[-1]).float().cpu().numpy())
        raise _Read

    handle = module.register_forward_pre_hook(look)
    try:
        yield read
    finally:
        handle.remove()


Notice = Callable[[str], object]
# copies of each planted row in a client's rows; other secrets that it is ranked among: an exposure of 6 bits at most
COPIES, OTHERS = (1, 4), 63
# most rounds of the run in which they are planted
MOST_ROUNDS = 5
_SECRET = 6
# least number of members, and of others: with fewer, guessing shows nothing
LEAST_ROWS = 10
_NOBODYS = "its clients' rows are not here"


@dataclass(frozen=True)
class AttackTarget:
    """Adapter under attack, and the rows around it.

    shared: the tuned adapter.
    rows: by client; empty where they are not available.
    most_rows: number of trained rows, and of held-out rows, that the attacks use; with planted canaries each client
    also trains on at most this many of its own rows.
    """

    setup: SimulationSetup
    shared: Tensors
    rows: Mapping[str, TokenizedDataset]
    held_out: Sequence[TokenizedExample]
    most_rows: int

    @property
    def members(self) -> list[TokenizedExample]:
        """Some of the rows that were trained on, each once, drawn by the seed."""
        trained_rows = list({row.example_id: row for rows in self.rows.values() for row in rows.train}.values())
        return random.Random(self.setup.recipe.seed).sample(trained_rows, min(self.most_rows, len(trained_rows)))


def run_attacks(target: AttackTarget, notice: Notice = lambda line: None) -> AttackReport:
    """Run every attack that is possible here; the report gives the reason for the others.

    `most_rows` 0 runs none. Journals of its rounds stand in the setup's folder meanwhile, and are removed. Raises the
    errors of the rounds.
    """
    recipe = target.setup.recipe
    claimed = recipe.privacy.budget if recipe.privacy else None
    reason = ""
    if not target.most_rows:
        reason = "data.attack_rows is 0: nobody asked for it"
    elif recipe.mode == "residual":
        reason = "mode residual changes its ranks as it goes, and the attacks are of rounds that do not"
    if reason:
        return AttackReport(claimed, skipped=dict.fromkeys(("membership", "canaries", "inversion", "audit"), reason))
    skipped: dict[str, str] = {}
    report = AttackReport(
        claimed,
        membership=_membership(target, skipped),
        canaries=_exposures(target),
        inversions=_inversions(target, skipped),
        audit=_audit(target, skipped),
        skipped=skipped,
    )
    for line in report.sentences():
        notice(line)
    return report


def _task(target: AttackTarget, rows: TokenizedDataset, folder: str) -> LoraTask:
    """Return a client's task on these rows, with noise if their privacy is claimed.

    The noise has a budget of its own in `folder`.
    """
    privacy, setup = target.setup.recipe.privacy, target.setup
    guard = RowPrivacy.open(privacy, setup.folder / folder) if privacy and privacy.level == "example" else None
    return LoraTask(setup.resident, rows, guard=guard)


def _membership(target: AttackTarget, skipped: dict[str, str]) -> tuple[Membership, ...]:
    members, others = target.members, list(target.held_out[: target.most_rows])
    if min(len(members), len(others)) < 2:
        problem = f"{len(members)} members and {len(others)} held-out rows are too few"
        skipped["membership"] = problem if target.rows else _NOBODYS
        return ()
    resident, start = target.setup.resident, target.setup.start
    losses = [row_losses(resident, target.shared, rows) for rows in (members, others)]
    base = [row_losses(resident, start, rows) for rows in (members, others)]
    return membership_inference.by_threshold(*losses), membership_inference.calibrated(*losses, *base)


def _exposures(target: AttackTarget) -> tuple[Exposure, ...]:
    """Return the exposure of planted canaries.

    They are planted in rounds like the real ones, on some rows of the same clients.
    """
    setup, chat = target.setup, target.setup.resident.base.chat
    rng = random.Random(f"canaries {setup.recipe.seed}")
    names = sorted(setup.tasks)

    def row(index: int) -> TokenizedExample:
        text = f"What is the code of canary {index}?", "".join(rng.choices("0123456789", k=_SECRET))
        turns = Message.of("user", text[0]), Message.of("assistant", text[1])
        return replace(chat.encode(Example(turns, (Origin("canary", str(index)),))), example_id=f"canary-{index}")

    planted = [row(index) for index in range(len(COPIES))]
    rows_by_client = {name: list(rows.train[: target.most_rows]) for name, rows in target.rows.items()}
    for index, canary in enumerate(planted):
        rows_by_client.setdefault(names[index % len(names)], []).extend([canary] * COPIES[index])
    # a client without rows here trains on a row with a fresh secret
    tasks = {
        name: _task(target, TokenizedDataset(rows_by_client.get(name) or [row(0)]), f"planted/{name}")
        for name in names
    }
    rounds = min(MOST_ROUNDS, setup.recipe.rounds)
    shared = _run_rounds(replace(setup, tasks=tasks, folder=setup.folder / "canaries"), rounds)
    shutil.rmtree(setup.folder / "planted", ignore_errors=True)
    exposures = []
    for index, canary in enumerate(planted):
        candidates = [row(index) for _ in range(OTHERS)]
        loss, *others = row_losses(setup.resident, shared, [canary, *candidates])
        rows = rows_by_client[names[index % len(names)]]
        exposures.append(
            exposure(
                f"of six digits, {COPIES[index]} of {len(rows)} rows",
                _times(target, rows, rounds, index),
                loss,
                others,
            )
        )
    return tuple(exposures)


def _times(target: AttackTarget, rows: Sequence[TokenizedExample], rounds: int, index: int) -> int:
    """Return about how often a canary was trained on."""
    local, optimizer = target.setup.recipe.local, target.setup.recipe.optimizer
    tokens = sum(len(row.ids) for row in rows)
    passes = local.epochs or (local.updates or 0) * min(1.0, optimizer.batch_tokens / tokens)
    return max(1, round(passes * rounds * COPIES[index]))


def _inversions(target: AttackTarget, skipped: dict[str, str]) -> tuple[Inversion, ...]:
    setup = target.setup
    readers = ("v_proj", "k_proj", "q_proj")
    first = [name for part in readers for name in modules(setup.start) if ".layers.0." in name and name.endswith(part)]
    rows = {name: client_rows for name, client_rows in target.rows.items() if client_rows.train}
    if not (first and rows):
        skipped["inversion"] = _NOBODYS if first else f"no factor stands at {', '.join(readers)} of the first layer"
        return ()
    module, resident = first[0], setup.resident
    inputs, a = inputs_of(resident, module), setup.start[module + A]
    client = min(sorted(rows), key=lambda name: len(rows[name].train))
    upload = _task(target, rows[client], "first").update(setup.manifest(setup.start, 1), setup.start)
    shortest = min(rows[client].train, key=lambda row: len(row.ids))
    observations = {
        f"first update of {client}, of {len(rows[client].train)} rows": (
            upload.tensors[module + B],
            rows[client].train,
        ),
        f"gradient of one row of {client}": (gradient(resident, setup.start, shortest, module + B), [shortest]),
    }
    inversions = []
    for attack, (change, read_rows) in observations.items():
        # the last token of a row is never an input
        input_tokens = {token for row in read_rows for token in row.ids[:-1]}
        guessed_tokens = privacy_attacks.from_factor(change, a, inputs)
        inversions.append(privacy_attacks.score_inversion(attack, guessed_tokens, input_tokens))
    return tuple(inversions)


def _audit(target: AttackTarget, skipped: dict[str, str]) -> Audit | None:
    setup, privacy = target.setup, target.setup.recipe.privacy
    if privacy is None:
        skipped["audit"] = "no privacy is claimed that it could be held against"
        return None
    claim = privacy.budget
    if privacy.level == "example":
        return _audit_of_rows(target, claim, skipped)
    mode, names = MODES[setup.recipe.mode], sorted(setup.tasks)
    values = sum(value.size for value in mode.sent(setup.start, 1).values())
    canaries = GradientCanaries.drawn(canaries_for(claim, values), values, setup.recipe.seed)
    tasks = {
        name: CanaryTask(mode, canaries, range(index, len(canaries.is_in), len(names)))
        for index, name in enumerate(names)
    }
    shared = _run_rounds(replace(setup, tasks=tasks, folder=setup.folder / "audit"), setup.recipe.rounds)
    change = add_changes(shared, setup.start, -1.0)
    return canaries.audited({name: change[name] for name in mode.sent(setup.start, 1)}, claim)


def _audit_of_rows(target: AttackTarget, claim: PrivacyBudget, skipped: dict[str, str]) -> Audit | None:
    """Audit the shipped adapter itself, with as many trained rows as held-out ones.

    score of a row = its loss before tuning - its loss after. Held-out rows were drawn by group, not by a coin for each
    row, and the bound is proved for coins only.
    """
    count = min(len(target.members), len(target.held_out), target.most_rows)
    if count < LEAST_ROWS:
        skipped["audit"] = f"{count} trained rows beside held-out ones are too few: {LEAST_ROWS} of each"
        return None
    rows = [*target.members[:count], *target.held_out[:count]]
    resident, start = target.setup.resident, target.setup.start
    before, after = (row_losses(resident, shared, rows) for shared in (start, target.shared))
    scores = [loss_before - loss_after for loss_before, loss_after in zip(before, after, strict=True)]
    return privacy_attacks.one_run(scores, [True] * count + [False] * count, claim.delta)


def rounds_of(setup: SimulationSetup) -> Rounds:
    """Return the rounds of an attack: the same rules, but no privacy account, as only the attack sees them."""
    return InspectedRounds(setup, setup.recipe.robust) if setup.recipe.robust else SecureRounds(setup, None)


def _run_rounds(setup: SimulationSetup, count: int) -> Tensors:
    """Return the shared adapter after `count` rounds of these tasks; always from the start, even after a kill."""
    folder: Path = setup.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with closing(rounds_of(setup)) as rounds:
        for _ in range(count):
            rounds.step()
        shared = rounds.shared
    shutil.rmtree(folder)
    return shared
