"""Batched generation with a KV cache.

Rows are left-padded and masked, and leave the batch (and its cache) when they end, so a long reply does not hold up
short ones. Sampling draws from one generator per prompt, seeded by (seed, prompt index): a reply depends on its own
prompt and the seed, not on who shared its batch.
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

# Why a reply ended that was not written on, since its rest was of no interest
DECIDED = "decided"


@dataclass(frozen=True)
class Generation:
    """One reply: its tokens without the stop token, and why it ended (`stop`, `length` or DECIDED).

    logprobs: of each token the natural logarithm of its probability, given all before it, at temperature 1.
    """

    ids: list[int]
    finish: str
    logprobs: list[float] = field(default_factory=list, compare=False)  # batches round otherwise


# As good as greedy. What is colder is 0 in fp32, or takes logits beyond what fp32 holds
COLDEST = 1e-6
# Looked at before the whole vocabulary is sorted for a nucleus
NUCLEUS_TOKENS = 256


def sampling_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(B, V) logits -> probabilities to draw from, on the CPU, by temperature (above 0) and top_p (Holtzman et al.
    2020).
    """
    probabilities = (logits.float().cpu() / max(sampling.temperature, COLDEST)).softmax(-1)
    if sampling.top_p == 1:
        return probabilities
    ordered, order = probabilities.topk(min(NUCLEUS_TOKENS, probabilities.shape[-1]))
    if bool((ordered.sum(-1) < sampling.top_p).any()):
        ordered, order = probabilities.sort(-1, descending=True)
    # a token stays if the mass before it is below top_p, so the most likely one always stays
    is_dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
    is_dropped[..., 0] = False  # a top_p that is 0 in fp32 would leave none
    ordered[is_dropped] = 0
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)


def sample_token(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """A token by (V,) probabilities on the CPU, by one number; torch.multinomial takes V of them, a millisecond a
    token.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(sums, torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1], right=True)
    # a product that rounds up to the whole sum points behind the last token
    return int(index) if int(index) < len(sums) else int(probabilities.nonzero()[-1])


def prompt_generator(sampling: Sampling, prompt: int = 0) -> torch.Generator:
    """What the prompt's tokens are drawn with. 1_000_003 keeps seeds of neighbouring prompts apart for any count that
    fits.
    """
    return torch.Generator().manual_seed((sampling.seed * 1_000_003 + prompt) % 2**63)


class Chooser:
    """Logits -> next tokens for the rows still alive."""

    def __init__(self, sampling: Sampling, count: int) -> None:
        self.sampling = sampling
        self.generators = [prompt_generator(sampling, row) for row in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]

    def __call__(self, logits: torch.Tensor, alive: Sequence[int]) -> list[int]:
        """logits: (B, V) of the rows `alive` (indices of their prompts). Returns B token ids; `logprobs` gains
        theirs.
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
        """The reply of a prompt, all of whose tokens were chosen here; a stop token is none of `ids`."""
        return Generation(ids, finish, self.logprobs[prompt][: len(ids)])


def context_tokens(model: Any) -> int | None:
    """Positions of a prompt and its reply together; None where the model does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_context(model: Any, prompt_tokens: int, max_tokens: int) -> None:
    """Raise ModelError when a prompt and its reply cannot fit the model's context."""
    context = context_tokens(model)
    if context and prompt_tokens + max_tokens > context:
        raise ModelError(
            f"a prompt of {prompt_tokens} tokens and a reply of {max_tokens} need {prompt_tokens + max_tokens} "
            f"positions; the model has {context}",
            f"shorten the prompt, or ask for at most {max(context - prompt_tokens, 0)} tokens",
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
) -> list[Generation]:
    """One reply per prompt, in order.

    prompts: token ids, each non-empty. stop: ids that end a reply. pad: an id for the left padding, masked throughout.
    Raises ModelError when a prompt and its reply cannot fit the model's context. `progress` is told of finished rows.
    """
    sampling = sampling or Sampling()
    check_context(model, max((len(prompt) for prompt in prompts), default=0), sampling.max_tokens)
    choose = Chooser(sampling, len(prompts))
    replies = _by_own_forward(model, prompts, stop, pad, choose)
    if replies:
        progress(len(replies))
    by_length = sorted(
        (index for index in range(len(prompts)) if index not in replies), key=lambda index: len(prompts[index])
    )
    for start in range(0, len(by_length), batch_rows):
        rows = by_length[start : start + batch_rows]
        replies.update(_generate_batch(model, {row: prompts[row] for row in rows}, set(stop), pad, choose))
        progress(len(rows))
    return [replies[index] for index in range(len(prompts))]


def _by_own_forward(
    model: Any, prompts: Sequence[Sequence[int]], stop: Sequence[int], pad: int, choose: Chooser
) -> dict[int, Generation]:
    """Replies of a native multi-modal base that it does not give in batches: by its own forward, one at a time."""
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

        ids = reply(base_model, media, prompt, stop, pad, choose.sampling.max_tokens, chosen)
        has_ended = bool(ids) and ids[-1] in set(stop)
        result[row] = choose.ended(row, ids[:-1] if has_ended else ids, "stop" if has_ended else "length")
    return result


def _check_finite(logits: torch.Tensor) -> None:
    if not torch.isfinite(logits.amax(-1)).all():
        raise broken_logits()


def broken_logits() -> ModelError:
    """The error for logits that are infinite or no numbers."""
    return ModelError(
        "the model's logits are not finite: its weights or the adapter are broken",
        "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4, or another base",
    )


@torch.inference_mode()
def _generate_batch(
    model: Any, prompts: dict[int, Sequence[int]], stop: set[int], pad: int, choose: Chooser
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
        arguments = {cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **arguments).logits[:, -1]
        _check_finite(logits)
        tokens = choose(logits, alive)
        keep = []
        for batch_index, (row, token) in enumerate(zip(alive, tokens, strict=True)):
            if token not in stop:
                reply_ids[row].append(token)
            if token in stop or len(reply_ids[row]) >= choose.sampling.max_tokens:
                generations[row] = choose.ended(row, reply_ids[row], "stop" if token in stop else "length")
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
    """Transformers renamed the cache argument within major version 5; the signature says which one this release
    has.
    """
    return "cache" if "cache" in inspect.signature(without_peft(model).forward).parameters else "past_key_values"
