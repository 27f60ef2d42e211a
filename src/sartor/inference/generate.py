"""Batched generation with a KV cache.

Rows are left-padded and masked. They leave the batch and its cache when they end, so a long reply does not delay short
ones. Each prompt samples from its own generator, seeded by (seed, prompt index): a reply depends on its own prompt and
the seed, not on the other rows of its batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from sartor.core.errors import ModelError
from sartor.inference.engine import Sampling
from sartor.models.losses.transformers_backend import without_peft
from sartor.models.multimodal import native_media as native_replies
from sartor.models.multimodal import whisper_base
from sartor.models.multimodal.native_media import native_media

# finish reason of a reply that was ended early because its rest does not matter
DECIDED = "decided"


@dataclass(frozen=True)
class Generation:
    """One reply: its tokens without the stop token.

    finish: `stop`, `length` or DECIDED.
    logprobs: natural log of each token's probability given all tokens before it, at temperature 1.
    """

    ids: list[int]
    finish: str
    logprobs: list[float] = field(default_factory=list, compare=False)  # rounding depends on the batch


# practically greedy; a lower temperature becomes 0 in fp32, or makes logits overflow fp32
COLDEST = 1e-6
# tokens tried before the whole vocabulary is sorted for the nucleus
NUCLEUS_TOKENS = 256


def sampling_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the weights to sample from, by temperature (above 0) and top_p (Holtzman et al. 2020).

    logits: (B, V). Returns (B, V) fp32 on the CPU: softmax(logits / temperature), with 0 outside the nucleus. The rows
        are
    not renormalised.
    """
    probabilities = (logits.float().cpu() / max(sampling.temperature, COLDEST)).softmax(-1)
    if sampling.top_p == 1:
        return probabilities
    ordered, order = probabilities.topk(min(NUCLEUS_TOKENS, probabilities.shape[-1]))
    if bool((ordered.sum(-1) < sampling.top_p).any()):
        ordered, order = probabilities.sort(-1, descending=True)
    # nucleus: token i (by falling probability) stays if sum_{j < i} p_j < top_p, so the most likely one always stays
    is_dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
    is_dropped[..., 0] = False  # a top_p that rounds to 0 in fp32 would leave none
    ordered[is_dropped] = 0
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)


def sample_token(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """Return a token sampled from weights (V,) on the CPU, drawing one random number.

    It is inverse transform sampling; torch.multinomial draws V random numbers, which takes a millisecond per token.
    """
    # the smallest token t with u * sum_v p_v < sum_{v <= t} p_v, for u uniform in [0, 1)
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(sums, torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1], right=True)
    # if the product rounds up to the whole sum, the index is past the end
    return int(index) if int(index) < len(sums) else int(probabilities.nonzero()[-1])


def prompt_generator(sampling: Sampling, prompt: int = 0) -> torch.Generator:
    """Return the random generator of a prompt's reply.

    The factor 1_000_003 keeps the seeds of neighbouring prompts apart for any realistic number of prompts.
    """
    return torch.Generator().manual_seed((sampling.seed * 1_000_003 + prompt) % 2**63)


class Chooser:
    """Sampler of the next tokens of the rows still alive.

    logprobs: for each prompt, the logprobs of its tokens so far.
    """

    def __init__(self, sampling: Sampling, count: int) -> None:
        self.sampling = sampling
        self.generators = [prompt_generator(sampling, row) for row in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]

    def __call__(self, logits: torch.Tensor, alive: Sequence[int]) -> list[int]:
        """Return the next tokens and append their logprobs to `logprobs`.

        logits: (B, V) of the rows `alive` (indices of their prompts). Returns B token ids.
        """
        if self.sampling.temperature == 0:
            tokens = [int(token) for token in logits.argmax(-1)]
        else:
            probabilities = sampling_probabilities(logits, self.sampling)
            tokens = [
                sample_token(row, self.generators[prompt]) for row, prompt in zip(probabilities, alive, strict=True)
            ]
        row_logprobs = logits.float().log_softmax(-1)[range(len(tokens)), tokens]
        for prompt, logprob in zip(alive, row_logprobs.tolist(), strict=True):
            self.logprobs[prompt].append(logprob)
        return tokens

    def ended(self, prompt: int, ids: list[int], finish: str) -> Generation:
        """Return the finished reply of a prompt; `ids` excludes the stop token."""
        return Generation(ids, finish, self.logprobs[prompt][: len(ids)])


def context_tokens(model: Any) -> int | None:
    """Return the number of positions for prompt and reply together; None if the model does not state it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_context(model: Any, prompt_tokens: int, max_tokens: int) -> None:
    """Raise ModelError if a prompt and its reply exceed the model's context."""
    context = context_tokens(model)
    if context and prompt_tokens + max_tokens > context:
        left = context - prompt_tokens
        raise ModelError(
            f"a prompt of {prompt_tokens} tokens and a reply of {max_tokens} need {prompt_tokens + max_tokens} "
            f"positions; the model has {context}",
            f"shorten the prompt, or ask for at most {left} tokens"
            if left > 0
            else f"shorten the prompt by {1 - left} tokens or more, which leaves room for a reply",
        )


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[int],
    pad: int,
    sampling: Sampling | None = None,
    batch_rows: int = 64,
    progress: Callable[[int], object] = lambda rows: None,
    is_decided: Callable[[Sequence[int]], bool] | None = None,
) -> list[Generation]:
    """Generate one reply per prompt, in order.

    prompts: token ids, each non-empty.
    stop: ids that end a reply.
    pad: id for the left padding, always masked.
    progress: called with the number of newly finished rows.
    is_decided: called with the tokens of a reply so far; a true result ends it as DECIDED. A native multi-modal base's
        own reply to media is not asked.
    Raises ModelError if a prompt and its reply exceed the model's context, or if logits are not finite.
    """
    sampling = sampling or Sampling()
    check_context(model, max((len(prompt) for prompt in prompts), default=0), sampling.max_tokens)
    choose = Chooser(sampling, len(prompts))
    replies = _by_own_forward(model, prompts, stop=stop, pad=pad, choose=choose)
    if replies:
        progress(len(replies))
    by_length = sorted(
        (index for index in range(len(prompts)) if index not in replies), key=lambda index: len(prompts[index])
    )
    for start in range(0, len(by_length), batch_rows):
        rows = by_length[start : start + batch_rows]
        batch = {row: prompts[row] for row in rows}
        replies.update(_generate_batch(model, batch, stop=set(stop), pad=pad, choose=choose, is_decided=is_decided))
        progress(len(rows))
    return [replies[index] for index in range(len(prompts))]


def _by_own_forward(
    model: Any, prompts: Sequence[Sequence[int]], stop: Sequence[int], pad: int, choose: Chooser
) -> dict[int, Generation]:
    """Generate the replies that a native multi-modal base cannot batch, one at a time."""
    media = native_media(model)
    if media is None:
        return {}
    base_model, result = without_peft(model), {}
    reply = whisper_base.reply if isinstance(media, whisper_base.WhisperMedia) else native_replies.reply
    for row, prompt in enumerate(prompts):
        if native_replies.is_plain(base_model, media, prompt):
            continue

        def chosen(logits: torch.Tensor, row: int = row) -> int:
            _check_finite(logits)
            return choose(logits, [row])[0]

        max_tokens = choose.sampling.max_tokens
        ids = reply(base_model, media, prompt, stop=stop, pad=pad, max_new_tokens=max_tokens, choose=chosen)
        has_ended = bool(ids) and ids[-1] in set(stop)
        result[row] = choose.ended(row, ids[:-1] if has_ended else ids, "stop" if has_ended else "length")
    return result


def _check_finite(logits: torch.Tensor) -> None:
    if not torch.isfinite(logits.amax(-1)).all():
        raise broken_logits()


def broken_logits() -> ModelError:
    """Return the error for logits that are not finite."""
    return ModelError(
        "the model's logits are not finite: its weights or the adapter are broken",
        "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4, or another base",
    )


@torch.inference_mode()
def _generate_batch(
    model: Any,
    prompts: dict[int, Sequence[int]],
    stop: set[int],
    pad: int,
    choose: Chooser,
    is_decided: Callable[[Sequence[int]], bool] | None = None,
) -> dict[int, Generation]:
    """Prefill, then decode until every row has stopped or has `max_tokens`."""
    device = model.device
    alive = list(prompts)
    width = max(len(prompt) for prompt in prompts.values())
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts.values()], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts.values()], device=device
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cache_argument = cache_name(model)
    reply_ids: dict[int, list[int]] = {row: [] for row in prompts}
    generations: dict[int, Generation] = {}
    while alive:
        # an index, not the number 1: that would give the head a strided view, and torch's bf16 product of one copies
        # the whole head once a row (16 prompts of 40 tokens: 920 MB instead of 13, 1.3 s instead of 0.5)
        last = torch.tensor([ids.shape[1] - 1], device=device)
        arguments = {cache_argument: cache, "use_cache": True, "logits_to_keep": last}
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **arguments).logits[:, -1]
        _check_finite(logits)
        tokens = choose(logits, alive)
        keep = []
        for batch_index, (row, token) in enumerate(zip(alive, tokens, strict=True)):
            if token not in stop:
                reply_ids[row].append(token)
            if token in stop or len(reply_ids[row]) >= choose.sampling.max_tokens:
                generations[row] = choose.ended(row, reply_ids[row], "stop" if token in stop else "length")
            elif is_decided is not None and is_decided(reply_ids[row]):
                generations[row] = choose.ended(row, reply_ids[row], DECIDED)
            else:
                keep.append(batch_index)
        if len(keep) < len(alive) and keep:
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            mask, positions = mask[index], positions[index]
        alive = [alive[batch_index] for batch_index in keep]
        ids = torch.tensor([[tokens[batch_index]] for batch_index in keep], device=device)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return generations


def cache_name(model: Any) -> str:
    """Return the name of the model's cache argument.

    transformers renamed it within major version 5, so the signature decides.
    """
    return "cache" if "cache" in inspect.signature(without_peft(model).forward).parameters else "past_key_values"
