"""Objectives: per-token losses -> one number to minimise. Pure functions of tensors."""

from __future__ import annotations

import torch


def sft(losses: torch.Tensor, weights: torch.Tensor, total_weight: float) -> torch.Tensor:
    """Supervised fine-tuning: the weighted mean over the supervised tokens of a whole update.

    losses, weights: (S,) of one micro-batch; total_weight: sum of weights over the update's micro-batches. Dividing by
    the update's total, not the micro-batch's, makes the split into micro-batches change nothing but memory.
    """
    return (losses * weights).sum() / total_weight
