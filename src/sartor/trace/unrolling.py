"""Influence of rows on a reply through a whole tuning, by unrolling its updates backwards.

Update t reads rows I_t, each with the weight w_i = 1. With the raw gradient G and its norm n:

    G = grad sum_i w_i share_i(theta)          share_i: the row's part of the update's loss
    g = G min(1, C / (n + 1e-6))               clipping at the norm C
    m' = b1 m + (1 - b1) g                     AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2)
    v' = b2 v + (1 - b2) g^2
    theta' = (1 - lr decay) theta - lr (m' / c1) / (sqrt(v' / c2) + eps),   c1 = 1 - b1^t,   c2 = 1 - b2^t

`lam`, `lam_m` and `lam_v` are the derivatives of the reply's loss by theta, m and v; at the end lam is the loss's
gradient, and the others are 0. Each update is undone by the chain rule (reverse-mode differentiation of training as in
MAGIC, Ilyas & Engstrom 2025, arXiv:2504.16430), and no second backward pass is needed. With lam_G, the derivative by
the raw gradient:

    d loss / d w_i += d/de share_i(theta + e lam_G)
    lam            += d/de G(theta + e lam_G)            Hessian-vector product; the Hessian is symmetric

Both are central differences of the same two passes at theta +- e lam_G.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sartor.core.errors import ModelError
from sartor.trace.attribution import Attribution, Method
from sartor.trace.replay import Replay
from sartor.trace.replay_run import ReplayRun, RunState, UpdateRecord
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery
from sartor.tune.optimizers import BETAS
from sartor.tune.recipe import ResolvedOptimizer

Notice = Callable[[str], object]
# (theta) -> (shares (N,) of the rows in the update's loss, gradient of each parameter)
Evaluation = Callable[[list[torch.Tensor]], tuple[torch.Tensor, list[torch.Tensor]]]
# Bytes of stored updates, and of the queries' derivatives, beside the memory of tuning. If all updates need more, only
# about the square root of their number is stored at a time
MAX_STATE_BYTES = 1 << 30
# Length of the step e lam_G, as a fraction of the length of theta
RELATIVE_STEP = 1e-3
# A row's score above this fraction of the reply's whole loss is no effect that a row can have
MOST_OF_LOSS = 2.0
# Added to v' in derivatives, as a fraction of its mean over a tensor. An early step is about lr sign(g), whose
# derivative is 0, although a row that is left out may turn the sign of a small g. With it the derivative is that of
# g / sqrt(g^2 + sigma^2). On the starter (24 updates of 4 rows, 20 retrains, 6 replies) it raised the LDS from .81 to
# .90
SMOOTHING = 1e-2
# of torch.nn.utils.clip_grad_norm_
_CLIP_FLOOR = 1e-6
# fp32 tensors of a parameter that a stored state and a recorded update hold
_STATE_TENSORS, _RECORD_TENSORS = 3, 4


@dataclass
class Adjoint:
    """Derivatives of a reply's loss by the parameters and by AdamW's moments, (...) of each parameter."""

    parameters: list[torch.Tensor]
    moments: list[torch.Tensor]
    second_moments: list[torch.Tensor]

    @classmethod
    def of(cls, gradients: Sequence[torch.Tensor]) -> Adjoint:
        """Return the derivatives after the last update. gradients: (...) of the reply's loss."""
        zeros = [[torch.zeros_like(gradient) for gradient in gradients] for _ in range(2)]
        return cls(list(gradients), *zeros)


def unrolled_scores(
    traced: TracedAdapter,
    queries: Sequence[TraceQuery],
    *,
    summed: bool = False,
    notice: Notice = lambda line: None,
) -> Attribution:
    """Return the predicted rise of each reply's loss if a row is left out, in nats, for each traced row.

    summed: one line of scores for the sum of the replies' losses, at the cost of one reply.
    Raises what `Replay.open`, `Replay.retrain` and `Replay.encode` raise.
    """
    return unroll(Replay.open(traced, notice=notice), queries, summed=summed, notice=notice)


def unroll(
    replay: Replay,
    queries: Sequence[TraceQuery],
    *,
    summed: bool = False,
    max_state_bytes: int = MAX_STATE_BYTES,
    notice: Notice = lambda line: None,
) -> Attribution:
    """Return the scores of `unrolled_scores` from an open replay.

    max_state_bytes: most bytes of stored updates, unless the square root of their number needs more; the same again
        holds for the replies' derivatives, unless those of one reply need more.
    """
    start_s = time.monotonic()
    for query in queries:  # before time is spent on a replay
        replay.encode(query)
    run = replay.restart()
    untrained = replay.parameters()
    stored = StoredUpdates(run, replay.course.last_update, max_state_bytes)
    backward_start_s = time.monotonic()
    trained = replay.parameters()
    groups: list[list[TraceQuery]] = [[query] for query in queries]
    if summed:
        groups = [list(queries)]
    adjoint_bytes = _STATE_TENSORS * sum(parameter.nbytes for parameter in run.parameters)
    at_once = max(max_state_bytes // adjoint_bytes, 1)
    notice(
        f"unrolling {len(groups)} replies through {stored.updates:,} updates: about {2 * len(groups) + 2} tunings' "
        f"time, and {stored.bytes + min(at_once, len(groups)) * adjoint_bytes:,} bytes beside the memory of tuning"
    )
    scores = np.zeros((len(groups), len(replay.rows)))
    # parameters that begin at 0 have no length of their own at first
    length = _norm(list(trained.values()))
    for begin in range(0, len(groups), at_once):
        replay.put(trained)
        adjoints = [Adjoint.of(_gradients(replay, group)) for group in groups[begin : begin + at_once]]
        for record in stored.backwards():
            for index, adjoint in enumerate(adjoints, start=begin):
                evaluate = _Evaluation(run, record)
                slopes = reverse_update(record, adjoint, replay.recipe.optimizer, evaluate, length)
                scores[index] -= slopes[:-1].cpu().numpy()
    end_s = time.monotonic()
    if not np.isfinite(scores).all():
        raise ModelError(
            f"unrolling the tuning of {replay.traced.artifact.path} overflows: its scores are not finite",
            f"{replay.traced.command} --prompt P --reply R --method gradient",
        )
    difference = replay.difference(trained, queries)
    losses = np.maximum(replay.losses(untrained, queries), difference.adapter_losses)
    most = losses.sum(keepdims=True) if summed else losses
    reasons = [difference.approximate, _divergence(scores, most)]
    facts = {
        "updates": stored.updates,
        "replay": difference.as_json(),
        "seconds": round(end_s - start_s, 1),
        # in units of the replay's time: all replies with the replay, and each reply beside it
        "tunings": round((end_s - start_s) / stored.forward_s, 2),
        "tunings_a_reply": round((end_s - backward_start_s) / (len(groups) * stored.forward_s), 2),
        "stored_bytes": stored.bytes,
    }
    return Attribution(Method.UNROLLED, scores, "; ".join(reason for reason in reasons if reason), facts)


def _divergence(scores: np.ndarray[Any, Any], losses: np.ndarray[Any, Any]) -> str:
    """Return the reason why derivatives predict nothing for a reply; empty if they may.

    scores: (Q, N). losses: (Q,) of the replies before or after the tuning, the larger.
    """
    largest = np.abs(scores).max(1)
    worst = int((largest / losses).argmax())
    if largest[worst] <= MOST_OF_LOSS * losses[worst]:
        return ""
    return (
        f"derivatives grew on their way through the tuning: a row's score is {largest[worst]:,.1f} nats, and the "
        f"whole reply has {losses[worst]:.1f}; a high learning rate does that. --calibrate measures what the ranks "
        "are worth"
    )


class StoredUpdates:
    """Updates of a run, with the states between stored ones computed again.

    updates: their number.
    bytes: most bytes that are stored at a time.
    forward_s: seconds of the run, without recomputation.
    """

    def __init__(self, run: ReplayRun, updates: int | None, max_bytes: int) -> None:
        """Make the run, from its current state to its end.

        updates: its number of updates.
        max_bytes: every update is stored if that needs no more.
        """
        assert updates, "the recorded run states its updates"
        self.updates, self._run, self._course = updates, run, run.course
        parameter_bytes = sum(parameter.nbytes for parameter in run.parameters)
        length = updates
        if updates * _RECORD_TENSORS * parameter_bytes > max_bytes:
            length = math.ceil(math.sqrt(updates))
        self._ends = [*range(length, updates, length), updates]
        self.bytes = (len(self._ends) * _STATE_TENSORS + length * _RECORD_TENSORS) * parameter_bytes
        self._states: list[RunState] = []
        self._records: list[UpdateRecord] = []
        start_s = time.monotonic()
        for end in self._ends:
            self._states.append(run.snapshot())
            self._go_to(end, is_taped=end == updates)
        self._taped = len(self._ends) - 1
        self.forward_s = time.monotonic() - start_s

    def backwards(self) -> Iterator[UpdateRecord]:
        """Yield the updates, the last one first."""
        for index in reversed(range(len(self._ends))):
            if index != self._taped:
                self._records = []  # freed before the next ones are made
                self._run.go_back(self._states[index])
                self._go_to(self._ends[index], is_taped=True)
                self._taped = index
            yield from reversed(self._records)

    def _go_to(self, update: int, *, is_taped: bool) -> None:
        run = self._run
        run.course, run.tape = replace(self._course, last_update=update), [] if is_taped else None
        run.go_on()
        self._records, run.tape, run.course = run.tape or [], None, self._course


class _Evaluation:
    """Shares of the rows in an update's loss and its gradient, as functions of the parameters."""

    def __init__(self, run: ReplayRun, record: UpdateRecord) -> None:
        self.run, self.record = run, record

    def __call__(self, parameters: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return (N + 1,) shares, the last of which belongs to no row, and the gradient of each parameter (...)."""
        run, weights = self.run, self.run.row_weights.values
        with torch.no_grad():
            for parameter, value in zip(run.parameters, parameters, strict=True):
                parameter.copy_(value)
        run.model.train()
        self.record.random_state.put_back(run.base.device)
        # the loss is sum_i w_i share_i, so its derivative by a weight is the row's share
        weights.requires_grad_(True)
        try:
            run._backward(self.record.rows)
            assert weights.grad is not None
            shares = weights.grad
            gradients = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for parameter in run.parameters
            ]
        finally:
            weights.requires_grad_(False)
            weights.grad = None
            for parameter in run.parameters:
                parameter.grad = None
            run.model.eval()
        return shares, gradients


def _gradients(replay: Replay, queries: Sequence[TraceQuery]) -> list[torch.Tensor]:
    """Return the gradient (...) of the summed loss of the replies, at the current parameters."""
    run = replay.run
    run.model.eval()
    for query in queries:
        losses, _ = run.path.losses([replay.encode(query)])
        losses.sum().backward()
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in run.parameters
    ]
    for parameter in run.parameters:
        parameter.grad = None
    return gradients


def reverse_update(
    record: UpdateRecord,
    adjoint: Adjoint,
    settings: ResolvedOptimizer,
    evaluate: Evaluation,
    least_length: float = 0.0,
) -> torch.Tensor:
    """Replace the derivatives after an update by those before it, and return (N,) derivatives by the rows' weights.

    adjoint: derivatives after the update, overwritten.
    least_length: of the parameters, from which the step of the differences is computed.
    """
    factor, norm = _clipping(record, settings.clip_norm)
    slopes: list[torch.Tensor | None] = []
    for index, gradient in enumerate(record.gradients):
        slopes.append(
            None if gradient is None else _reverse_adamw(record, adjoint, index, gradient * factor, settings)
        )
    direction = _reverse_clipping(record, slopes, norm=norm, clip_norm=settings.clip_norm)
    length = _norm(direction)
    if not length:
        return torch.zeros_like(evaluate(record.parameters)[0], dtype=torch.float64)
    step = RELATIVE_STEP * (_norm(record.parameters) or least_length) / length
    # derivative of f along lam_G = (f(theta + e lam_G) - f(theta - e lam_G)) / 2 e + O(e^2)
    (shares, gradients), (shares_below, gradients_below) = (
        evaluate([theta + sign * step * slope for theta, slope in zip(record.parameters, direction, strict=True)])
        for sign in (1.0, -1.0)
    )
    for lam, above, below in zip(adjoint.parameters, gradients, gradients_below, strict=True):
        lam += (above - below) / (2 * step)
    return (shares.double() - shares_below.double()) / (2 * step)


def _norm(tensors: Sequence[torch.Tensor | None]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors if tensor is not None))


def _clipping(record: UpdateRecord, clip_norm: float) -> tuple[float, float]:
    """Return the factor by which an update's gradient was clipped, at most 1, and its norm before."""
    norm = _norm(record.gradients)
    return min(1.0, clip_norm / (norm + _CLIP_FLOOR)), norm


def _reverse_adamw(
    record: UpdateRecord, adjoint: Adjoint, index: int, gradient: torch.Tensor, settings: ResolvedOptimizer
) -> torch.Tensor:
    """Return the derivative (...) by a parameter's clipped gradient, and undo its step in `adjoint`.

    gradient: (...), clipped. The part of lam that passes through the gradient is not yet in `adjoint`.
    """
    rate, count, (beta, beta2) = record.rates[index], record.steps[index] + 1, BETAS
    # terms that nearly cancel, as in a first step, are added in fp64
    g = gradient.double()
    lam, lam_m, lam_v = (
        part[index].double() for part in (adjoint.parameters, adjoint.moments, adjoint.second_moments)
    )
    moment = beta * record.moments[index].double() + (1 - beta) * g
    second_moment = beta2 * record.second_moments[index].double() + (1 - beta2) * g.square()
    correction, correction2 = 1 - beta**count, 1 - beta2**count
    root = ((second_moment + SMOOTHING * second_moment.mean()) / correction2).sqrt()
    below = root + settings.epsilon
    # An entry that never had a gradient (A, as long as B is 0) does not move: its derivative would be 1 / eps
    moved = second_moment > 0
    # lam_m' = lam_m - lam lr / (c1 (s + eps)),   s = sqrt(v' / c2)
    lam_m = torch.where(moved, lam_m - lam * rate / (correction * below), 0.0)
    # lam_v' = lam_v + lam lr (m' / c1) / (s + eps)^2 ds/dv',   ds/dv' = 1 / (2 s c2)
    slope = rate * moment / (correction * below.square() * 2 * root * correction2)
    lam_v = torch.where(moved, lam_v + lam * slope, 0.0)
    # lam_g = (1 - b1) lam_m' + 2 (1 - b2) g lam_v'
    lam_g = torch.where(moved, (1 - beta) * lam_m + 2 * (1 - beta2) * g * lam_v, 0.0)
    # theta' = (1 - lr decay) theta - ...,   m' = b1 m + ...,   v' = b2 v + ...
    adjoint.parameters[index] = adjoint.parameters[index] * (1 - rate * settings.weight_decay)
    adjoint.moments[index] = (beta * lam_m).to(gradient.dtype)
    adjoint.second_moments[index] = (beta2 * lam_v).to(gradient.dtype)
    return lam_g.to(gradient.dtype)


def _reverse_clipping(
    record: UpdateRecord, slopes: Sequence[torch.Tensor | None], *, norm: float, clip_norm: float
) -> list[torch.Tensor]:
    """Return the derivatives (...) by the raw gradient of each parameter; 0 for a parameter that was skipped.

    slopes: (...) derivatives by the clipped gradient.
    """
    floored = norm + _CLIP_FLOOR
    is_clipped = clip_norm < floored
    inner = 0.0
    if is_clipped:
        pairs = zip(record.gradients, slopes, strict=True)
        inner = sum(float((raw.double() * lam).sum()) for raw, lam in pairs if raw is not None and lam is not None)
    result = []
    for parameter, raw, lam in zip(record.parameters, record.gradients, slopes, strict=True):
        if raw is None or lam is None:
            result.append(torch.zeros_like(parameter))
        elif is_clipped:
            # g = C G / (n + f), so lam_G = C / (n + f) (lam_g - G (G . lam_g) / (n (n + f))): a projection
            result.append(clip_norm / floored * (lam - raw * (inner / (norm * floored))))
        else:
            result.append(lam)
    return result
