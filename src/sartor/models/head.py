"""The losses of a mapped LM head, in slices of the vocabulary: neither a whole row of logits nor a whole head is ever dense.

The log of the sum is kept running from slice to slice (Milakov & Gimelshein 2018, arXiv:1805.02867), and the gradient with it,
as the blocked attentions do: what is there is scaled down when a larger logit comes. So each slice is widened once for both.
"""

from __future__ import annotations

import torch

from sartor.models.linear import MappedLinear

# Rows of the head that are widened at once
SLICE = 2048


def mapped_losses(
    normed: torch.Tensor, head: MappedLinear, targets: torch.Tensor, wants: bool, logits_bytes: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """normed (N, D) -> (N,) losses in nats, and their gradients (N, D) with respect to `normed` if they are wanted.

    At once there are a slice of the head, (SLICE, D), and a slice of the logits of at most `logits_bytes`.
    """
    rows = max(1, logits_bytes // (SLICE * normed.element_size()))
    losses = normed.new_empty(len(normed))
    slopes = torch.empty_like(normed) if wants else None
    for low in range(0, len(normed), rows):
        part = slice(low, low + rows)
        _rows(normed[part], head, targets[part], losses[part], None if slopes is None else slopes[part])
    return losses, slopes


def _rows(
    x: torch.Tensor, head: MappedLinear, targets: torch.Tensor, losses: torch.Tensor, slopes: torch.Tensor | None
) -> None:
    """Losses of some rows, and their gradients, into `losses` and `slopes`."""
    most, total = x.new_full((len(x), 1), -torch.inf), x.new_zeros(len(x), 1)
    if slopes is not None:
        slopes.zero_()
    vocabulary = head.out_features
    room = x.new_empty(min(SLICE, vocabulary), x.shape[1])
    for low in range(0, vocabulary, SLICE):
        weight = head.widen(room[: min(SLICE, vocabulary - low)], low)
        shares = x @ weight.T
        larger = torch.maximum(most, shares.amax(1, keepdim=True))
        kept, most = (most - larger).exp_(), larger
        shares.sub_(most).exp_()
        total.mul_(kept).add_(shares.sum(1, keepdim=True))
        if slopes is not None:
            slopes.mul_(kept).addmm_(shares, weight)
    aims = head.weight.detach()[targets].to(x.dtype)
    torch.sub(most.add(total.log()).squeeze(1), (x * aims).sum(1), out=losses)
    if slopes is not None:
        slopes.div_(total).sub_(aims)
