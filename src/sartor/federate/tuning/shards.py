"""One Dataset dealt out to clients who see unlike things: for simulations.

Of each label every client gets a share that is drawn from a Dirichlet distribution (Hsu, Qi, Brown 2019, arXiv:1909.06335):
with a small alpha few clients have most of a label, with a large one all have as much. Groups are dealt whole.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.evaluate.labels import label_of

# so often is dealt anew, until no client is left with nothing
_TRIES = 1_000


@dataclass(frozen=True)
class Shards:
    """How a Dataset is dealt out."""

    count: int = option(REQUIRED, "clients")
    alpha: float = option(0.3, "above 0: small is unlike, large is alike")
    by: str = option("", "field of the JSON replies that names a class, a dotted path; . is the whole reply; empty: one class")
    seed: int = option(0, "what is dealt follows from it")

    def __post_init__(self) -> None:
        if self.count < 1 or self.alpha <= 0 or self.seed < 0:
            problem = f"shards: count is {self.count}, alpha {self.alpha}, seed {self.seed}"
            raise ConfigError(problem, "count from 1, alpha above 0, seed from 0")

    def deal(self, examples: Sequence[Example]) -> dict[str, int]:
        """Example's id -> client, 0..count - 1. The same for the same seed, whatever the rows' order.

        A group has the label that most of its rows have. Raises ConfigError where no row has the field, or where there are
        too few groups for so many clients.
        """
        members: dict[str, list[Example]] = defaultdict(list)
        for example in examples:
            members[example.group or example.id].append(example)
        labels = self._labels(examples)
        of_label: dict[str, list[str]] = defaultdict(list)
        for group in sorted(members):
            counted = Counter(labels[one.id] for one in members[group])
            of_label[min(counted, key=lambda label: (-counted[label], label))].append(group)
        sizes = {group: len(rows) for group, rows in members.items()}
        owners = self._owners(of_label, sizes)
        return {one.id: owners[group] for group, rows in members.items() for one in rows}

    def _labels(self, examples: Sequence[Example]) -> dict[str, str]:
        found = {one.id: label_of(one.reply, self.by) if self.by else "" for one in examples}
        if self.by and not any(label is not None for label in found.values()):
            raise ConfigError(f"no reply has the field {self.by!r}", "--by FIELD of the JSON replies, or . for the whole reply")
        return {name: "" if label is None else label for name, label in found.items()}

    def _owners(self, of_label: dict[str, list[str]], sizes: dict[str, int]) -> dict[str, int]:
        """Group -> client."""
        if len(sizes) < self.count:
            raise ConfigError(f"{len(sizes)} groups of rows are too few for {self.count} clients", f"--shards {len(sizes)}")
        source, shuffle = np.random.default_rng(self.seed), random.Random(self.seed)
        for _ in range(_TRIES):
            owners: dict[str, int] = {}
            for label in sorted(of_label):
                groups = list(of_label[label])
                shuffle.shuffle(groups)
                ends = np.cumsum(source.dirichlet([self.alpha] * self.count)) * sum(sizes[group] for group in groups)
                dealt = 0.0
                for group in groups:
                    # by the middle of the group, so that a large one goes where most of it falls
                    owners[group] = min(int(np.searchsorted(ends, dealt + sizes[group] / 2)), self.count - 1)
                    dealt += sizes[group]
            if len(set(owners.values())) == self.count:
                return owners
        problem = (
            f"{_TRIES} times a client was left without a row: {len(sizes)} groups, {self.count} clients, alpha {self.alpha}"
        )
        raise ConfigError(problem, "a larger alpha, or fewer shards")
