"""Signed round manifest and Task protocol.

    {"schema": 2, "kind": "round", "run": "triage", "number": 4, "coordinator": "coordinator", "work": {...}, "rules":
    {...},
     "terms": {...}, "stage_s": 60, "work_s": 600, "deadline": 1780000000, "signature": {...}}

One that is signed and malformed is refused as well: what a coordinator signs is not thereby harmless.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from sartor.core import records, signing
from sartor.core.config import is_valid_name
from sartor.core.errors import ArtifactError, ConfigError, RoundError, SignatureError
from sartor.federate.secure.fixed_point import layout_for, scale_for
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.secagg_terms import Round, SecureSumTerms, TensorSlot, least_threshold
from sartor.federate.updates import WEIGHT
from sartor.models.lora_tensors import Tensors

SCHEMA, KIND = 2, "round"
# private: the coordinator learns the sum alone. inspectable: it sees each update, as a robust rule has to.
Mode = Literal["private", "inspectable"]
# of a manifest: names of some ten thousand clients, a layout of some thousand tensors
MOST_BYTES = 4 << 20
# noise of every client is within so many of its standard deviations, but for a chance of 1e-15 a number
_TAIL = 8.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ClientWork:
    """What clients compute. task: a type that they have installed; settings: JSON for it, never code.

    base, recipe: digests of what is tuned, and how; shared: of the packed tensors that the round starts from.
    """

    task: str
    shared: str
    base: str = ""
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateRules:
    """clip: the norm that an update is scaled down to. noise: standard deviation of the sum's noise, in clips; 0:
    none.

    most_examples: more than these count as these; 1: every client counts the same, which noise demands. stale_rounds:
    how many rounds old an update that missed its sum may be; it counts 1 / sqrt(1 + age) (Nguyen et al. 2022,
    FedBuff). mode: who sees the updates; a client takes part in what it agreed to when it enrolled, and in nothing
    else.
    """

    clip: float = 1.0
    noise: float = 0.0
    most_examples: int = 1_000
    stale_rounds: int = 0
    mode: Mode = "private"

    def __post_init__(self) -> None:
        is_in_range = math.isfinite(self.clip) and self.clip > 0 and math.isfinite(self.noise) and self.noise >= 0
        if not is_in_range or self.most_examples < 1 or self.stale_rounds < 0:
            raise ConfigError(
                f"a rule of the round is out of range: {self}", "clip above 0, noise from 0, most_examples from 1"
            )
        if self.mode not in get_args(Mode):
            raise ConfigError(f"the mode of the round is {self.mode!r:.40}", " or ".join(get_args(Mode)))
        if self.noise and (self.most_examples > 1 or self.stale_rounds):
            raise ConfigError(
                "noise is fitted to what one client can change, so each counts the same, and none twice",
                "most_examples: 1, stale_rounds: 0",
            )

    def weight(self, examples: int, age: int) -> float:
        """How much an update counts, in (0, 1]. age: in rounds."""
        return min(max(examples, 1), self.most_examples) / self.most_examples / math.sqrt(1 + age)

    def bound(self) -> float:
        """The largest magnitude of a number in a client's update, noise included."""
        # a hair more, as an update that is clipped to one number is rounded to float32
        return self.clip * (1 + 1e-6 + _TAIL * self.noise)


@dataclass(frozen=True)
class Manifest:
    """One round of a run. number: from 1, rising. deadline: seconds since 1970.

    stage_s: how long an exchange may take; the first, in which clients compute their updates, work_s longer.
    """

    run: str
    number: int
    coordinator: str
    work: ClientWork
    terms: SecureSumTerms
    deadline: int
    rules: UpdateRules = field(default_factory=UpdateRules)
    stage_s: int = 60
    work_s: int = 0

    def document(self) -> bytes:
        """What is signed."""
        return self._document

    @cached_property
    def _document(self) -> bytes:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        nested = {"work": asdict(self.work), "rules": asdict(self.rules), "terms": self.terms.as_json()}
        return records.canonical({"schema": SCHEMA, "kind": KIND, **values, **nested})

    @cached_property
    def digest(self) -> str:
        """sha256 of the document, hex: the round's name in every message."""
        return hashlib.sha256(self._document).hexdigest()

    @property
    def round(self) -> Round:
        """What the sum needs of it."""
        return Round(self.digest, self.terms, self.coordinator)

    def signed(self, identity: Identity) -> bytes:
        """What is sent."""
        return records.canonical(
            {**json.loads(self.document()), "signature": signing.signature_of(self.document(), identity.key)}
        )


def read_manifest(content: bytes, coordinator: str, roster: PinnedKeys) -> Manifest:
    """A manifest that this coordinator signed. Raises ArtifactError for what is none, SignatureError for another
    signer.
    """
    try:
        fields = json.loads(content) if len(content) <= MOST_BYTES else None
        if not isinstance(fields, dict):
            raise TypeError("no JSON object of a manifest's size")
        signature = fields.pop("signature")
        if (fields.pop("schema"), fields.pop("kind")) != (SCHEMA, KIND):
            raise ValueError("another schema or kind")
        work, rules, terms = (
            ClientWork(**fields.pop("work")),
            UpdateRules(**fields.pop("rules")),
            SecureSumTerms.of(fields.pop("terms")),
        )
        manifest = Manifest(work=work, rules=rules, terms=terms, **fields)
        _check(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
        raise ArtifactError(f"this is no manifest of a round: {error}", "look at who sends it") from None
    if manifest.coordinator != coordinator or coordinator not in roster.keys:
        raise SignatureError(
            f"the manifest is of {manifest.coordinator}; this client listens to {coordinator}",
            "ask the coordinator that you enrolled with",
        )
    signing.check_signature(manifest.document(), signature, Path("manifest"), "the round", [roster.keys[coordinator]])
    return manifest


def _check(manifest: Manifest) -> None:
    integers = (
        manifest.number,
        manifest.deadline,
        manifest.stage_s,
        manifest.work_s,
        manifest.rules.most_examples,
        manifest.rules.stale_rounds,
    )
    if (
        any(type(value) is not int for value in integers)
        or manifest.number < 1
        or min(manifest.stage_s, manifest.work_s) < 0
    ):
        raise TypeError("a number that is not whole, or below its range")
    if not (is_valid_name(manifest.run) and is_valid_name(manifest.coordinator) and is_valid_name(manifest.work.task)):
        raise TypeError("a name of another form")
    if not isinstance(manifest.work.settings, dict) or not _DIGEST.fullmatch(manifest.work.shared):
        raise TypeError("settings or a digest of another form")


@dataclass(frozen=True)
class SideTensor:
    """Numbers that go along in the sum, and are no part of the update: not clipped with it, not added to what is
    shared.

    bound: the largest magnitude of one of them, before its weight.
    """

    name: str
    shape: tuple[int, ...]
    bound: float


def terms_for(
    cohort: Iterable[str],
    tensors: Tensors,
    rules: UpdateRules,
    *,
    degree: int = 0,
    threshold: int = 0,
    seed: str = "",
    side_tensors: Iterable[SideTensor] = (),
) -> SecureSumTerms:
    """The terms of a sum of updates to these tensors, at the finest scale that the rules allow.

    threshold: by default the smallest above 2/3; degree: of the graph, 0 joins everyone; seed: of the graph, by
    default drawn.
    """
    names = tuple(sorted(set(cohort)))
    shapes = {**tensors, WEIGHT: _Number()}
    bounds = {name: 1.0 if name == WEIGHT else rules.bound() for name in shapes}
    # last, so that what is rounded by chance is rounded alike with them and without
    side_slots = tuple(TensorSlot(item.name, item.shape, scale_for(item.bound, len(names))) for item in side_tensors)
    layout = layout_for(shapes, bounds, len(names))
    return SecureSumTerms(
        names, threshold or least_threshold(len(names)), layout + side_slots, degree, seed or os.urandom(32).hex()
    )


@dataclass(frozen=True)
class _Number:
    shape: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class LocalUpdate:
    """What came of it. tensors: the change to each shared tensor of the layout, float32; examples: how many taught it.

    side_tensors: what the layout asks for besides (manifest.Beside), of this update as it is once it was clipped.
    """

    tensors: Tensors
    examples: int
    side_tensors: Tensors = field(default_factory=dict)


class ClientTask(Protocol):
    """A type of work."""

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """The change that this client's data makes to the shared tensors. Raises a SartorError for settings it
        lacks.
        """
        ...


# Adds this client's part of the round's noise to an update that was clipped. What is promised must hold where as few
# as terms.threshold clients stay in the sum, so a part is the whole divided among so many, not among the cohort.
Noise = Callable[[Tensors, Manifest], Tensors]
Tasks = Mapping[str, ClientTask]


def find_task(tasks: Tasks, manifest: Manifest) -> ClientTask:
    """The task that a manifest names. Raises RoundError where this client has none of that name."""
    task = tasks.get(manifest.work.task)
    if task is None:
        raise RoundError(
            f"the round asks for the task {manifest.work.task!r}; installed here are "
            f"{', '.join(sorted(tasks)) or 'none'}",
            "install it, if you want it: a round never brings code",
            "task",
        )
    return task
