"""Distribution of one Dataset over simulated clients.

The share of each label that each client gets is drawn from a Dirichlet distribution (Hsu, Qi, Brown 2019,
arXiv:1909.06335). With a small alpha few clients have most of a label; with a large one all have about as much. Groups
stay whole.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.evaluate.reply_labels import label_of

# most attempts to distribute the groups so that no client is left without rows
_TRIES = 1_000


@dataclass(frozen=True)
class Shards:
    """Settings of the distribution of a Dataset."""

    count: int = option(REQUIRED, "clients")
    alpha: float = option(0.3, "above 0: small is unlike, large is alike")
    by: str = option(
        "", "field of the JSON replies that names a class, a dotted path; . is the whole reply; empty: one class"
    )
    seed: int = option(0, "what is dealt follows from it")

    def __post_init__(self) -> None:
        if self.count < 1 or self.alpha <= 0 or self.seed < 0:
            problem = f"shards: count is {self.count}, alpha {self.alpha}, seed {self.seed}"
            raise ConfigError(problem, "count from 1, alpha above 0, seed from 0")

    def deal(self, examples: Sequence[Example]) -> dict[str, int]:
        """Return the client, 0..count - 1, of each example's id; the same for the same seed, whatever the order.

        For each label, shares p ~ Dirichlet(alpha, .., alpha) of shape (count,) divide its groups. A group has the
        label that most of its rows have. Raises ConfigError if no row has the field, or there are too few groups for
        so many clients.
        """
        members = _members(examples)
        if self.by and all(label_of(example.reply, self.by) is None for example in examples):
            raise ConfigError(
                f"no reply has the field {self.by!r}", "--shard-by FIELD of the JSON replies, or . for the whole reply"
            )
        sizes = {group: len(rows) for group, rows in members.items()}
        owners = self._owners(self._of_label(members), sizes)
        return {row.id: owners[group] for group, rows in members.items() for row in rows}

    def deal_like(
        self, owners: Mapping[str, int], dealt: Sequence[Example], others: Sequence[Example]
    ) -> dict[str, int]:
        """Return the client of other rows, by example's id, in the label proportions of the rows dealt before.

        owners: client of each row of `dealt`. Rows of a label that was not dealt are left out.
        """
        dealt_groups, members = _members(dealt), _members(others)
        shares = {}
        for label, groups in self._of_label(dealt_groups).items():
            row_owners = [owners[item.id] for group in groups for item in dealt_groups[group]]
            shares[label] = np.bincount(row_owners, minlength=self.count)
        shuffle, dealt_ids = random.Random(self.seed), {}
        for label, groups in sorted(self._of_label(members).items()):
            if label in shares:
                shuffle.shuffle(groups)
                sizes = [len(members[group]) for group in groups]
                ends = np.cumsum(shares[label]) * (sum(sizes) / shares[label].sum())
                for group, owner in zip(groups, _by_middle(sizes, ends), strict=True):
                    dealt_ids.update({member.id: owner for member in members[group]})
        return dealt_ids

    def _of_label(self, members: Mapping[str, Sequence[Example]]) -> dict[str, list[str]]:
        """Return label -> groups, sorted. A group has the label that most of its rows have."""
        labels = {}
        for rows in members.values():
            for row in rows:
                labels[row.id] = (label_of(row.reply, self.by) or "") if self.by else ""
        groups: dict[str, list[str]] = defaultdict(list)
        for group in sorted(members):
            counted = Counter(labels[member.id] for member in members[group])
            groups[min(counted, key=lambda label: (-counted[label], label))].append(group)
        return groups

    def _owners(self, of_label: dict[str, list[str]], sizes: dict[str, int]) -> dict[str, int]:
        """Return the client of each group."""
        if len(sizes) < self.count:
            raise ConfigError(
                f"{len(sizes)} groups of rows are too few for {self.count} clients", f"--shards {len(sizes)}"
            )
        source, shuffle = np.random.default_rng(self.seed), random.Random(self.seed)
        for _ in range(_TRIES):
            owners: dict[str, int] = {}
            for label in sorted(of_label):
                groups = list(of_label[label])
                shuffle.shuffle(groups)
                ends = np.cumsum(source.dirichlet([self.alpha] * self.count)) * sum(sizes[group] for group in groups)
                owners |= zip(groups, _by_middle([sizes[group] for group in groups], ends), strict=True)
            if len(set(owners.values())) == self.count:
                return owners
        problem = (
            f"{_TRIES} times a client was left without a row: {len(sizes)} groups, {self.count} clients, alpha "
            f"{self.alpha}"
        )
        raise ConfigError(problem, "a larger alpha, or fewer shards")


def _members(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Return the rows of each group."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[group_of(example)].append(example)
    return groups


def _by_middle(sizes: Sequence[int], ends: NDArray[np.float64]) -> list[int]:
    """Return the part in which the middle of each group lies, for groups laid end to end.

    A large group thus goes where most of it falls. ends: (P,), where each part ends.
    """
    middles = np.cumsum(sizes) - np.asarray(sizes) / 2
    return np.minimum(np.searchsorted(ends, middles), len(ends) - 1).tolist()  # type: ignore[no-any-return]
