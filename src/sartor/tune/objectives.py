"""SFT, DPO and KTO losses as pure functions of tensors.

The loss of a batch is one number to minimise, or one a row.

Log-probabilities are sums over the tokens of a reply, in nats: (N,), of the model that is tuned and of the reference,
which is that model before its first update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def sft(losses: torch.Tensor, weights: torch.Tensor, total_weight: float) -> torch.Tensor:
    """Supervised fine-tuning: the weighted mean over the supervised tokens of a whole update.

    losses, weights: (S,) of one micro-batch; total_weight: sum of weights over the update's micro-batches. Dividing by
    the update's total, not the micro-batch's, makes the split into micro-batches change nothing but memory.
    """
    return (losses * weights).sum() / total_weight


def log_probabilities(losses: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(N,) log-probabilities of N replies from the (S,) losses of their tokens, reply after reply. lengths: tokens of
    each.
    """
    return -torch.stack([part.sum() for part in losses.split(list(lengths))])


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """(N,) losses of N pairs: Rafailov et al. 2023, arXiv:2305.18290, equation 7.

    -log sigmoid(beta ((chosen - reference_chosen) - (rejected - reference_rejected))). label_smoothing: the
    probability, below 0.5, that a pair stands the wrong way round (Mitchell 2023, "A note on DPO with noisy
    preferences").
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def kto(
    policy: torch.Tensor,
    reference: torch.Tensor,
    is_good: torch.Tensor,
    divergence: torch.Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """(N,) losses of N rated replies: Ethayarajh et al. 2024, arXiv:2402.01306: lambda_y - v(x, y).

    is_good: (N,) booleans; a good reply is worth lambda_D sigmoid(beta (r - z_0)), a bad one lambda_U sigmoid(beta
    (z_0 - r)), with r = policy - reference and z_0 = divergence, through which no gradient goes.
    """
    margin = beta * (policy - reference - divergence)
    good, bad = desirable_weight * torch.sigmoid(-margin), undesirable_weight * torch.sigmoid(margin)
    return torch.where(is_good, good, bad)


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """z_0 of `kto`: the mean log-ratio of (N,) replies to prompts that are not theirs, at least 0, without
    gradient.
    """
    if not len(policy):
        return policy.new_zeros(())
    return (policy - reference).mean().clamp(min=0).detach()
