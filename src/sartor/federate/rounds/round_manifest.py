"""Signed round manifest, and the protocol of client tasks.

    {"schema": 2, "kind": "round", "run": "triage", "number": 4, "coordinator": "coordinator", "work": {...}, "rules":
    {...},
     "terms": {...}, "stage_s": 60, "work_s": 600, "deadline": 1780000000, "signature": {...}}

A manifest that is signed but malformed is refused as well: a coordinator's signature does not make it harmless.
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

from sartor.core import records, signing, strict_json
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
# largest manifest: names of some ten thousand clients, a layout of some thousand tensors
MOST_BYTES = 4 << 20
# standard deviations that a client's noise stays within, except with probability 1e-15 a number
_TAIL = 8.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ClientWork:
    """Work that clients compute.

    task: type of work, which they have installed.
    shared: digest of the packed tensors that the round starts from.
    base, recipe: digests of the base that is tuned, and of its recipe.
    settings: JSON for the task, never code.
    """

    task: str
    shared: str
    base: str = ""
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateRules:
    """Rules for the updates of a round.

    clip: norm that an update is scaled down to.
    noise: standard deviation of the sum's noise, in clips; 0: none.
    assumed_colluders: clients whose noise does not count, since they might tell it to each other or to the
    coordinator; None in a manifest without noise, or of an older version.
    most_examples: more examples count as these; 1: every client counts the same, which noise requires.
    stale_rounds: age, in rounds, up to which an update that missed its sum is accepted; it counts 1 / sqrt(1 + age)
    (Nguyen et al. 2022, FedBuff).
    mode: who sees the updates; a client takes part only in the mode that it agreed to when it enrolled.
    """

    clip: float = 1.0
    noise: float = 0.0
    most_examples: int = 1_000
    stale_rounds: int = 0
    mode: Mode = "private"
    assumed_colluders: int | None = None

    def __post_init__(self) -> None:
        is_in_range = math.isfinite(self.clip) and self.clip > 0 and math.isfinite(self.noise) and self.noise >= 0
        if not is_in_range or self.most_examples < 1 or self.stale_rounds < 0:
            raise ConfigError(
                f"a rule of the round is out of range: {self}", "clip above 0, noise from 0, most_examples from 1"
            )
        if self.assumed_colluders is not None and self.assumed_colluders < 0:
            raise ConfigError(f"assumed_colluders is {self.assumed_colluders}", "assumed_colluders: 0 or more")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"the mode of the round is {self.mode!r:.40}", " or ".join(get_args(Mode)))
        if self.noise and self.mode == "inspectable":
            raise ConfigError(
                "a client's share of the noise hides nothing where each update is seen, and each invitation would "
                "draw it anew",
                "noise: 0, or mode: private",
            )
        if self.noise and (self.most_examples > 1 or self.stale_rounds):
            raise ConfigError(
                "noise is fitted to what one client can change, so each counts the same, and none twice",
                "most_examples: 1, stale_rounds: 0",
            )

    def weight(self, examples: int, age: int) -> float:
        """Return the weight of an update, in (0, 1]: min(examples, most) / most / sqrt(1 + age).

        age: in rounds. Fewer than 1 example count as 1.
        """
        return min(max(examples, 1), self.most_examples) / self.most_examples / math.sqrt(1 + age)

    def bound(self) -> float:
        """Return the largest magnitude of a number in a client's update, noise included: C (1 + 8 noise)."""
        # slightly more, as an update whose norm is in one number is rounded to float32
        return self.clip * (1 + 1e-6 + _TAIL * self.noise)


@dataclass(frozen=True)
class Manifest:
    """Manifest of one round of a run.

    number: from 1, rising.
    deadline: Unix time, s.
    stage_s: seconds of an exchange.
    work_s: additional seconds of the first exchange, in which clients compute their updates.
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
        """Return the bytes that are signed."""
        return self._document

    @cached_property
    def _document(self) -> bytes:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        rules = asdict(self.rules)
        if rules["assumed_colluders"] is None:
            # older versions signed no such field, and their rounds still have to be read
            del rules["assumed_colluders"]
        nested = {"work": asdict(self.work), "rules": rules, "terms": self.terms.as_json()}
        return records.canonical({"schema": SCHEMA, "kind": KIND, **values, **nested})

    @cached_property
    def digest(self) -> str:
        """Sha256 of the document, hex: the round's name in every message."""
        return hashlib.sha256(self._document).hexdigest()

    @property
    def round(self) -> Round:
        """Part of the manifest that the secure sum needs."""
        return Round(self.digest, self.terms, self.coordinator)

    def signed(self, identity: Identity) -> bytes:
        """Return the manifest as it is sent, signed by `identity`."""
        return records.canonical(
            {**json.loads(self.document()), "signature": signing.signature_of(self.document(), identity.key, "fleet")}
        )


def read_manifest(content: bytes, coordinator: str, roster: PinnedKeys) -> Manifest:
    """Return a manifest that this coordinator signed.

    Raises ArtifactError for bytes that are no manifest, SignatureError for another signer.
    """
    try:
        fields = strict_json.loads(content) if len(content) <= MOST_BYTES else None
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
        manifest.document()  # text that no file can hold is found here
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
        ConfigError,
    ) as error:
        raise ArtifactError(f"this is no manifest of a round: {error}", "look at who sends it") from None
    if manifest.coordinator != coordinator or coordinator not in roster.keys:
        raise SignatureError(
            f"the manifest is of {manifest.coordinator}; this client listens to {coordinator}",
            "ask the coordinator that you enrolled with",
        )
    key = roster.keys[coordinator]
    signing.check_signature(manifest.document(), signature, Path("manifest"), "the round", [key], "fleet")
    return manifest


def _check(manifest: Manifest) -> None:
    integers = (
        manifest.number,
        manifest.deadline,
        manifest.stage_s,
        manifest.work_s,
        manifest.rules.most_examples,
        manifest.rules.stale_rounds,
        manifest.rules.assumed_colluders or 0,
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
    """Numbers that are summed with the update but are not part of it.

    They are neither clipped with it nor added to the shared tensors.
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
    """Return the terms of a sum of updates to these tensors, at the finest scale that the rules allow.

    tensors: those that are updated, in the shapes of the layout.
    degree: of the mask graph; 0 joins everyone with everyone.
    threshold: 0 takes the smallest above 2/3.
    seed: of the graph; drawn if empty.
    """
    names = tuple(sorted(set(cohort)))
    shapes = {**tensors, WEIGHT: _Number()}
    bounds = {name: 1.0 if name == WEIGHT else rules.bound() for name in shapes}
    # last, so that stochastic rounding of the update is the same with and without side tensors
    side_slots = tuple(TensorSlot(item.name, item.shape, scale_for(item.bound, len(names))) for item in side_tensors)
    layout = layout_for(shapes, bounds, len(names))
    return SecureSumTerms(
        names,
        threshold=threshold or least_threshold(len(names)),
        layout=layout + side_slots,
        degree=degree,
        seed=seed or os.urandom(32).hex(),
    )


@dataclass(frozen=True)
class _Number:
    shape: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class LocalUpdate:
    """Update of a client.

    tensors: change of each shared tensor of the layout, in its shape, float32.
    examples: number of rows it was trained on.
    side_tensors: further tensors of the layout (SideTensor), computed from the update.
    """

    tensors: Tensors
    examples: int
    side_tensors: Tensors = field(default_factory=dict)


class ClientTask(Protocol):
    """Type of work that a client has installed."""

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """Return the change that this client's data makes to the shared tensors, in their shapes.

        Raises a SartorError for settings that it does not support.
        """
        ...


# Adds this client's share of the round's noise to a clipped update. The guarantee must hold if only terms.threshold
# clients stay in the sum and the assumed colluders are among them, so the whole noise is divided among the rest.
Noise = Callable[[Tensors, Manifest], Tensors]
Tasks = Mapping[str, ClientTask]


def find_task(tasks: Tasks, manifest: Manifest) -> ClientTask:
    """Return the task that a manifest names. Raises RoundError if this client has none of that name."""
    task = tasks.get(manifest.work.task)
    if task is None:
        raise RoundError(
            f"the round asks for the task {manifest.work.task!r}; installed here are "
            f"{', '.join(sorted(tasks)) or 'none'}",
            "install it, if you want it: a round never brings code",
            "task",
        )
    return task
