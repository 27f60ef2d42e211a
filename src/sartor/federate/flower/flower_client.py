"""The verb `federate client`: takes part in rounds over Flower.

It answers the ClientApp of this machine's SuperNode at a socket (`local_rpc`), until SIGTERM or SIGINT. Every request
is checked against what this client agreed to: its coordinator's key, its roster and its recipe.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import pwd
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.core.config import REQUIRED, is_valid_name, option
from sartor.core.errors import ConfigError, RoundError
from sartor.federate.flower.local_rpc import LOG, serve
from sartor.federate.privacy.accountant import Account, epsilon_of
from sartor.federate.privacy.client_noise import noise_of, noised, values_of, without_collusion
from sartor.federate.recipe import FederateRecipe, tuning
from sartor.federate.recipe import load as load_recipe
from sartor.federate.rounds.round_client import EnrolmentPolicy, Participant, RoundClient
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import Manifest, read_manifest
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.secagg_terms import SecureSumPolicy
from sartor.federate.tuning.lora_task import NAME, LoraTask, RowPrivacy
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.shared_base import SharedBase

Notice = Callable[[str], object]


@dataclass(frozen=True)
class ClientOptions:
    """Identity and files of a client, and the users who may carry its messages."""

    key: str = option(REQUIRED, "this client's private key, as keygen writes it")
    roster: str = option(REQUIRED, "folder of NAME.pub: this client's own copy, compared with the keys' owners")
    socket: str = option(REQUIRED, "where it answers: a path in a folder that others cannot write in")
    journal: str = option("", "what it has said and heard; NAME.sqlite, if nothing is said")
    coordinator: str = option(
        "coordinator", "what the roster calls the coordinator, the only one whose rounds are heard"
    )
    hear: tuple[str, ...] = option(
        (), "users whose processes are heard: the ClientApp's; this one's own, if nothing is said"
    )
    min_cohort: int = option(
        0, "fewest clients of a round that it joins; 0: everyone of its roster if the recipe has noise, else 3"
    )
    group: str = option("", "whose members may connect to the socket; its owner alone, if nothing is said")

    def __post_init__(self) -> None:
        least = SecureSumPolicy().least_cohort
        if self.min_cohort and self.min_cohort < least:
            problem = f"min_cohort is {self.min_cohort}; of two each could subtract its own update from the sum"
            raise ConfigError(problem, f"min_cohort: {least} or more, or 0")


class RecipeAgreement(EnrolmentPolicy):
    """Agreement of a client by its recipe: who sees its updates, who might collude, and all rounds' privacy budget.

    account: file of this client's own account, of all rounds whose update it noised, whatever a coordinator reports.
    """

    def __init__(self, recipe: FederateRecipe, account: Path) -> None:
        super().__init__("inspectable" if recipe.robust else "private", recipe.colluders_asked)
        self._privacy = recipe.of_clients
        self._account = Account(account, recipe.of_clients) if recipe.of_clients else None

    def check(self, manifest: Manifest) -> None:
        """Raise an error for a round that the recipe does not allow, and spend its privacy.

        RoundError for another mode, missing noise or too few assumed colluders, BudgetError for a round beyond the
        budget.
        """
        super().check(manifest)
        if self._account is None:
            return
        if not manifest.rules.noise:
            problem = f"the round adds no noise; this client agreed to {self._privacy}"
            raise RoundError(problem, "leave this coordinator, or agree to a recipe without privacy", "noise")
        self._account.spend(noise_of(manifest).spending(_spending_name(manifest), values_of(manifest)))

    def epsilon(self) -> float | None:
        """Return the epsilon spent; None without a budget."""
        return self._account.epsilon() if self._account else None

    def epsilon_without_collusion(self, manifests: Sequence[Manifest]) -> float | None:
        """Return the epsilon spent if nobody colludes; None without a budget.

        manifests: of rounds that were spent; what others spent counts as if the assumed colluders were.
        """
        if not self._account:
            return None
        names = {_spending_name(manifest): manifest for manifest in manifests}
        return epsilon_of(without_collusion(self._account.spent(), names), self._account.budget.delta)


def _spending_name(manifest: Manifest) -> str:
    return f"{manifest.run} round {manifest.number}"


@dataclass
class _Counted:
    """Client that counts the bytes of its answers."""

    client: RoundClient
    sent_bytes: int = 0

    def answer(self, request: bytes) -> bytes:
        """Return the client's answer and count its bytes."""
        answer = self.client.answer(request)
        self.sent_bytes += len(answer)
        return answer


def join_rounds(
    recipe: FederateRecipe | Mapping[str, Any] | Path | str,
    dataset: Path | str,
    name: str,
    options: ClientOptions | Mapping[str, Any],
    *,
    notice: Notice = lambda line: None,
) -> dict[str, Any]:
    """Answer at the socket until SIGTERM or SIGINT, then return a summary.

    name: this client's name in the roster. Returns client, rounds (of the last run, done with this client in the sum),
    clients (of its last cohort), uploaded_bytes (since this process began), exactness_error (None: a client cannot
    know it), epsilon, metrics (loss of the last round that this process trained).
    Raises ConfigError for an invalid enrolment or socket, BusyError if another process answers, and the errors of
    opening base and Dataset.
    """
    recipe, options = load_recipe(recipe), config.load_any(ClientOptions, options)
    member, allowed, group = enrol(recipe, name, options), _users(options.hear), _group(options.group)
    with RoundJournal(_journal(name, options)) as journal:
        task = task_of(recipe, dataset, _journal(name, options).with_suffix(".rows"), notice)
        counted = _Counted(round_client(member, journal, task, recipe.seed))
        for reason, ids in task.rows.left_out.items():
            notice(f"left out: {len(ids):,} rows, {reason}")
        notice(f"{name} has {len(task.rows.train):,} rows, and takes part in {member.agreement.mode} rounds only")
        with _logged(notice):
            serve(counted, name, Path(options.socket), allowed=allowed, group=group)
        return _summary(member, journal, counted, task)


def task_of(recipe: FederateRecipe, dataset: Path | str, folder: Path, notice: Notice = lambda line: None) -> LoraTask:
    """Return the task `lora` on this client's Dataset, with a base of its own.

    folder: of the privacy account of its rows, if the recipe has privacy of level example.
    """
    rows = open_artifact(Path(dataset), "dataset")
    tuning_recipe = tuning(recipe, str(rows.path))
    resident = SharedBase.open(tuning_recipe, notice)
    guard = RowPrivacy.open(recipe.privacy, folder) if recipe.privacy and recipe.privacy.level == "example" else None
    encoded = encode_rows(rows, tuning_recipe, resident.base.chat)
    if recipe.data.reuse_frozen:
        resident.keep_frozen([*encoded.train, *encoded.held_out], int(tuning_recipe.compute.cache_gb * 1e9))
    return LoraTask(resident, encoded, guard=guard)


def round_client(member: Participant, journal: RoundJournal, task: LoraTask, seed: int) -> RoundClient:
    """Return a client whose stochastic rounding is drawn from the recipe's seed.

    As in a simulation, a run can then be repeated to the bit.
    """

    def chance(manifest: Manifest) -> np.random.Generator:
        return np.random.default_rng([seed, manifest.terms.share_indices[member.identity.name] - 1, manifest.number])

    return RoundClient(member, journal, {NAME: task}, noised, chance=chance)


def enrol(recipe: FederateRecipe, name: str, options: ClientOptions) -> Participant:
    """Return this client as a participant.

    Raises ConfigError for an invalid name, a key that is not the roster's, or a roster without the coordinator.
    """
    if not is_valid_name(name):
        raise ConfigError(f"{name!r:.80} is no name of a client", "the name that its key was made with")
    identity, roster = Identity.open(name, Path(options.key)), PinnedKeys.open(Path(options.roster))
    identity.check_in(roster)
    if options.coordinator not in roster.keys:
        problem = f"{options.roster} has no key of {options.coordinator}, whose rounds are to be heard"
        raise ConfigError(problem, f"put {options.coordinator}.pub there, as its owner hands it over")
    account = _journal(name, options).with_suffix(".privacy.json")
    return Participant(
        identity,
        roster,
        options.coordinator,
        SecureSumPolicy(least_cohort=_min_cohort(recipe, options, roster)),
        RecipeAgreement(recipe, account),
    )


def _min_cohort(recipe: FederateRecipe, options: ClientOptions, roster: PinnedKeys) -> int:
    """Return the fewest clients of a round that this client joins.

    By default a round with noise has to have everyone of the roster: a coordinator that may choose whom to invite
    could choose this client and those it colludes with.
    """
    least = SecureSumPolicy().least_cohort
    if options.min_cohort:
        return options.min_cohort
    has_noise = recipe.of_clients is not None or recipe.noise_asked
    return max(least, len(roster.keys) - 1) if has_noise else least


def _journal(name: str, options: ClientOptions) -> Path:
    return Path(options.journal or f"{name}.sqlite")


def _users(names: Sequence[str]) -> frozenset[int] | None:
    try:
        return frozenset(int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid for name in names) or None
    except KeyError as error:
        raise ConfigError(
            f"this machine has no such user: {error.args[0]}", "useradd --system flower, or a number"
        ) from None


def _group(name: str) -> int | None:
    if not name:
        return None
    try:
        return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ConfigError(
            f"this machine has no such group: {error.args[0]}", "groupadd --system flower, or a number"
        ) from None


class _Noticed(logging.Handler):
    """Log handler that passes the messages of the socket server to a notice function."""

    def __init__(self, notice: Notice) -> None:
        super().__init__()
        self._notice = notice

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the formatted record to the notice function."""
        self._notice(self.format(record))


@contextlib.contextmanager
def _logged(notice: Notice) -> Iterator[None]:
    handler, previous_level = _Noticed(notice), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(previous_level)


def _summary(member: Participant, journal: RoundJournal, counted: _Counted, task: LoraTask) -> dict[str, Any]:
    first, last = task.losses.get(max(task.losses, default=0), (None, None))
    agreement, latest = member.agreement, journal.latest()
    assert isinstance(agreement, RecipeAgreement)
    rounds = journal.rounds(latest.run) if latest else []
    manifests = [read_manifest(item.manifest, member.coordinator, member.roster) for item in rounds]
    cohort = manifests[0].terms.cohort if manifests else ()
    return {
        "client": member.identity.name,
        "rounds": sum(stored_round.state == "done" for stored_round in rounds),
        "clients": len(cohort),
        "uploaded_bytes": counted.sent_bytes,
        "exactness_error": None,
        "epsilon": task.guard.account.epsilon() if task.guard else agreement.epsilon(),
        "epsilon_without_collusion": agreement.epsilon_without_collusion(manifests),
        "metrics": {"loss": {"first": first, "last": last}},
    }
