"""Losses of tokens whose target is a distribution over next tokens, not the row's own token.

The distributions are known by their K likeliest tokens; the rest of the vocabulary is one bin, the tail.
"""

from __future__ import annotations

import torch

# Log-probability of a bin that a token does not have. Its probability is 0 in every dtype, and nothing is infinite
NO_BIN = -1e4


def with_tail(bins: torch.Tensor) -> torch.Tensor:
    """Return (N, K + 1) log-probabilities: those of K bins, and of everything else as the last bin.

        tail = log(1 - sum_k exp(bins_k))

    Without the tail, the K probabilities of a teacher would have to be scaled up to 1, which biases the student:
    Anshumann et al. 2025, arXiv:2503.16870, section 3, where the tail is called the ghost token.

    bins: (N, K), NO_BIN where a token has fewer.
    """
    # the tail's probability is kept above 0 by a rounding of the dtype
    mass = bins.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(bins.dtype).eps)
    return torch.cat([bins, torch.log(-torch.expm1(mass))], -1)


def kl_divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return (N,) KL(first || second) of (N, B) log-probabilities, in nats."""
    return (first.exp() * (first - second)).sum(-1)


def soft_losses(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return (N,) KL(target || model) of N tokens, over K bins and the tail, in nats.

    scores, targets: (N, K) log-probabilities of the model and of the soft targets, of the same tokens.
    """
    return kl_divergence(with_tail(targets), with_tail(scores))
