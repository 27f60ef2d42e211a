"""A few timed micro-batches of real rows: what the forecast is calibrated with. They change nothing that is learnt."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from sartor.models import hardware
from sartor.models.losses.loss_backend import Path
from sartor.models.packing import BLOCKED_ATTENTION_TOKENS, Encoded
from sartor.tune import objectives
from sartor.tune.tokenised import Lesson


@dataclass(frozen=True)
class Load:
    """How much a micro-batch, or a row, asks: tokens, of them supervised, and what attention does for them.

    pairs: token pairs, the sum of row length squared. stored_pairs: those whose weights are kept for the backward pass
    (above `BLOCKED_ATTENTION_TOKENS` the kernel keeps none). aside: of the tokens those that have no backward pass.
    """

    tokens: int = 0
    supervised: int = 0
    pairs: int = 0
    stored_pairs: int = 0
    aside: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.tokens + other.tokens,
            self.supervised + other.supervised,
            self.pairs + other.pairs,
            self.stored_pairs + other.stored_pairs,
            self.aside + other.aside,
        )


@dataclass(frozen=True)
class Sample:
    """One timed micro-batch: seconds of forward and backward, and memory at its peak above that before the first one.

    growth_bytes is None where the system does not tell.
    """

    load: Load
    seconds: float
    growth_bytes: int | None


def load_of(row: Encoded) -> Load:
    """What one row asks, with what it is learnt beside."""
    length = len(row.ids)
    pairs = length * length
    own = Load(length, row.supervised_tokens, pairs, pairs if length <= BLOCKED_ATTENTION_TOKENS else 0)
    if not isinstance(row, Lesson) or row.other is None:
        return own
    other = load_of(row.other)
    return own + (other if row.term == "pair" else replace(other, stored_pairs=0, aside=other.tokens))


def total(loads: Iterable[Load]) -> Load:
    """Their sum."""
    return sum(loads, Load())


def take(rows: Sequence[Encoded], tokens: int) -> list[Encoded]:
    """The first rows, at least one, that hold `tokens` tokens or just fewer."""
    taken: list[Encoded] = []
    held = 0
    for row in rows:
        if taken and held + len(row.ids) > tokens:
            break
        taken.append(row)
        held += len(row.ids)
    return taken


class Probe:
    """Forward and backward of micro-batches, timed; gradients, random numbers and the model's mode are put back."""

    def __init__(self, path: Path, model: Any, device: torch.device) -> None:
        self.path, self.model, self.device = path, model, device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.resident_bytes = hardware.resident_bytes(device)
        self.samples: list[Sample] = []

    def run(self, rows: Sequence[Encoded], *, warm_up: bool = False) -> float:
        """Seconds of one micro-batch over `rows`. `warm_up` leaves its time out of `samples`."""
        with self._untouched():
            is_measured = hardware.restart_peak(self.device)
            began = time.monotonic()
            losses, weights = self.path.losses(rows)
            objectives.sft(losses, weights, float(max(len(rows), 1))).backward()  # type: ignore[no-untyped-call]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.monotonic() - began
            growth = hardware.recent_peak_bytes(self.device) - self.resident_bytes if is_measured else None
        if not warm_up:
            self.samples.append(Sample(total(load_of(row) for row in rows), seconds, growth))
        return seconds

    def optimizer_seconds(self) -> float:
        """Seconds of one optimiser step over the adapter. At rate 0, on an optimiser of its own: no weight moves."""
        optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0, fused=self.device.type != "mps")
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        began = time.monotonic()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.monotonic() - began
        optimizer.zero_grad(set_to_none=True)
        return seconds

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        was_training = self.model.training
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.model.train()
            try:
                yield
            finally:
                self.model.train(was_training)
                for parameter in self.parameters:
                    parameter.grad = None
