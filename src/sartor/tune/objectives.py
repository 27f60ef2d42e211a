"""SFT, DPO, KTO, ORPO, SimPO, distillation and GRPO losses as pure functions of tensors.

The loss of a batch is one number to minimise, or one number per row.

Log-probabilities are sums over the tokens of a reply, in nats: (N,), of the tuned model and of the reference, which is
the model before its first update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from sartor.models.losses.soft_targets import NO_BIN, kl_divergence, with_tail


def sft(losses: torch.Tensor, weights: torch.Tensor, total_weight: float) -> torch.Tensor:
    """Return the supervised fine-tuning loss: the weighted mean over the supervised tokens of an update.

        loss = sum_i w_i l_i / W

    losses, weights: (S,) of one micro-batch.
    total_weight: W, the sum of weights over all micro-batches of the update. With the update's total as divisor, the
    split into micro-batches changes only memory.
    Returns a scalar.
    """
    return (losses * weights).sum() / total_weight


def log_probabilities(losses: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return (N,) log-probabilities of N replies from the (S,) losses of their tokens, in order.

    lengths: (N,) tokens of each reply.
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
    """Return (N,) DPO losses of N pairs: Rafailov et al. 2023, arXiv:2305.18290, equation 7.

        m = beta ((chosen - reference_chosen) - (rejected - reference_rejected))
        loss = -(1 - label_smoothing) log sigmoid(m) - label_smoothing log sigmoid(-m)

    chosen, rejected, reference_chosen, reference_rejected: (N,) log-probabilities.
    label_smoothing: probability, below 0.5, that a pair is the wrong way round (Mitchell 2023, "A note on DPO with
    noisy preferences").
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
    """Return (N,) KTO losses of N rated replies: Ethayarajh et al. 2024, arXiv:2402.01306.

        r = policy - reference;  z_0 = divergence
        loss = lambda_D (1 - sigmoid(beta (r - z_0))) for a good reply
        loss = lambda_U (1 - sigmoid(beta (z_0 - r))) for a bad reply

    The paper writes this as lambda_y - v(x, y). lambda_D and lambda_U are desirable_weight and undesirable_weight.

    policy, reference: (N,) log-probabilities.
    is_good: (N,) booleans.
    divergence: scalar without gradient.
    """
    # 1 - sigmoid(x) = sigmoid(-x)
    margin = beta * (policy - reference - divergence)
    good, bad = desirable_weight * torch.sigmoid(-margin), undesirable_weight * torch.sigmoid(margin)
    return torch.where(is_good, good, bad)


def orpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return (N,) odds-ratio losses of N pairs: Hong et al. 2024, arXiv:2403.07691, equations 4 to 7.

        log odds(p) = p - log(1 - exp(p))
        loss = -log sigmoid(log odds(chosen) - log odds(rejected))

    The paper's L_ORPO adds lambda times this to the sft loss of the chosen replies.

    chosen, rejected: (N,) mean log-probabilities of a token, at most 0.
    """

    def log_odds(mean: torch.Tensor) -> torch.Tensor:
        # a certain reply has infinite odds: the probability is kept below 1 by a rounding of its dtype
        below = mean.clamp(max=-torch.finfo(mean.dtype).eps)
        return below - torch.log(-torch.expm1(below))

    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, margin: float) -> torch.Tensor:
    """Return (N,) SimPO losses of N pairs: Meng et al. 2024, arXiv:2405.14734, equation 6.

        loss = -log sigmoid(beta chosen - beta rejected - margin)

    chosen, rejected: (N,) mean log-probabilities of a token.
    margin: gamma, by which the rewards beta * chosen and beta * rejected should differ.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return z_0 of `kto`: the mean log-ratio of replies to prompts that are not theirs, at least 0.

    policy, reference: (N,) log-probabilities; z_0 is 0 for N = 0. Returns a scalar without gradient.
    """
    if not len(policy):
        return policy.new_zeros(())
    return (policy - reference).mean().clamp(min=0).detach()


Divergence = Literal["reverse", "forward", "jensen"]


def distil(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    divergence: Divergence = "reverse",
    mixture: float = 0.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return (N,) divergences of a student from its teacher, over K bins and the tail of each of N tokens.

    With q of the student and p of the teacher, and m = beta p + (1 - beta) q:

        reverse = KL(q || p) = sum_b q_b (log q_b - log p_b)
        forward = KL(p || q)
        jensen = beta KL(p || m) + (1 - beta) KL(q || m)

    They are the divergences of generalised knowledge distillation, Agarwal et al. 2023, arXiv:2306.13649, section 2
    and equation 1; the reverse one is the objective of MiniLLM, Gu et al. 2023, arXiv:2306.08543, equation 1, whose
    gradient through the sampling is left out, as equation 3 of the former does.

    With a temperature T, q and p are softmax(log q / T) and softmax(log p / T) over the bins, and the divergence is
    multiplied by T^2, so that its gradients keep their size: Hinton et al. 2015, arXiv:1503.02531, section 2. Above 1,
    what a sure teacher says of the words that it does not choose counts more.

    For texts that two tokenizers cut differently N counts chunks, and K is 1: the sum of the log-probabilities of the
    tokens of a chunk. This is approximate likelihood matching with its binarised divergence: Minixhofer et al. 2025,
    arXiv:2503.20083.

    student, teacher: (N, K) log-probabilities; NO_BIN of the teacher where a token has fewer bins.
    mixture: beta of jensen, above 0 and below 1.
    temperature: T, above 0.
    """
    has_bin = teacher > NO_BIN / 2
    q, p = (with_tail(bins.masked_fill(~has_bin, NO_BIN)) for bins in (student, teacher))
    if temperature != 1:
        q, p = ((side / temperature).log_softmax(-1) for side in (q, p))
    scale = temperature**2
    if divergence == "reverse":
        return scale * kl_divergence(q, p)
    if divergence == "forward":
        return scale * kl_divergence(p, q)
    # log m_b = log(beta p_b + (1 - beta) q_b)
    mixed = torch.logaddexp(p + math.log(mixture), q + math.log1p(-mixture))
    return scale * (mixture * kl_divergence(p, mixed) + (1 - mixture) * kl_divergence(q, mixed))


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return (P, G) advantages of G replies to each of P prompts.

        A_i = r_i - mean(r)

    DeepSeekMath (Shao et al. 2024, arXiv:2402.03300, section 4.1.2) also divides by the group's standard deviation.
    That weighs a prompt the more, the nearer its replies are to all right or all wrong; without it the estimate has no
    such bias: Liu et al. 2025, arXiv:2503.20783 ("Dr. GRPO"), section 3.

    rewards: (P, G). A group whose rewards are all equal has advantages of 0.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    # the mean of equal numbers may be off by a rounding
    return advantages.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0)


def kl_estimate(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return (S,) unbiased estimates of KL(policy || reference) at sampled tokens, at least 0.

        k3 = exp(reference - policy) - (reference - policy) - 1

    Shao et al. 2024, arXiv:2402.03300, equation 4; Schulman 2020, "Approximating KL divergence".

    policy, reference: (S,) log-probabilities of the tokens, which the policy sampled.
    """
    difference = reference - policy
    return difference.exp() - difference - 1


def grpo(
    policy: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """Return (S,) GRPO losses of the tokens of sampled replies: Shao et al. 2024, arXiv:2402.03300, equation 3.

        loss_t = -(exp(policy_t - old_t) A_t - beta k3_t)

    The equation clips the ratio. With one update for each sampled group, `old` is the policy itself: the ratio is 1,
    has the gradient of `policy`, and is never clipped. The equation averages over the tokens of each reply first, by
    which a wrong reply weighs the less the longer it is; the caller averages over all tokens of an update, which has
    no such bias (Liu et al. 2025, arXiv:2503.20783, section 3, whose divisor is a constant of the run; a constant of
    the update: Yu et al. 2025, arXiv:2503.14476, equation 8).

    policy, old: (S,) log-probabilities of the tokens, and those under the model that sampled them.
    reference: (S,) log-probabilities under the reference; None if beta is 0.
    advantages: (S,) of the tokens' replies.
    """
    gain = (policy - old).exp() * advantages
    if reference is None:
        return -gain
    return beta * kl_estimate(policy, reference) - gain
