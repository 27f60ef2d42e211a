"""Replies of a native base by transformers' own generation, a row at a time.

For models that do more with media than to put embeddings in their places; which ones they are is measured on the first
prompt with the same kinds of media.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from sartor.models.media import keys_in
from sartor.models.native.media import NativeMedia

# Nats by which log-probabilities of the two ways may differ: the worst, and in 16 bits the root mean square. It is the same
# row through the same operations, so next to nothing: what attention both ways changes can be less than a pack's rounding
MOST_APART, MOST_SPREAD = 1e-3, 1e-2


@torch.inference_mode()
def is_plain(model: Any, media: NativeMedia, prompt: Sequence[int]) -> bool:
    """Whether rows with such media may be computed with virtual ids, in batches and packs; `media.apart` says how far off."""
    kinds = media.kinds_of(keys_in(prompt))
    is_exact = model.get_output_embeddings().weight.dtype not in (torch.bfloat16, torch.float16)
    if kinds not in media.apart:
        ids = torch.tensor([list(prompt)], device=model.device)
        own = model(**media.inputs(ids), use_cache=False).logits[0].float().log_softmax(-1)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        try:
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False)
            apart = found.logits[0].float().log_softmax(-1) - own
            media.apart[kinds] = float(apart.abs().max() if is_exact else apart.pow(2).mean().sqrt())
        except Exception:  # each architecture fails in its own way, and each failure is an answer
            media.apart[kinds] = math.inf
    return media.apart[kinds] <= (MOST_APART if is_exact else MOST_SPREAD)


class Chosen(transformers.LogitsProcessor):
    """Leaves nothing but the token that `choose` takes of (1, V) logits."""

    def __init__(self, choose: Callable[[torch.Tensor], int]) -> None:
        self._choose = choose

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(1, V) scores -> 0 for the token that is chosen, else -inf."""
        left = torch.full_like(scores, -torch.inf)
        left[0, self._choose(scores)] = 0.0
        return left


@torch.inference_mode()
def reply(
    model: Any,
    media: NativeMedia,
    prompt: Sequence[int],
    stop: Sequence[int],
    pad: int,
    most: int,
    choose: Callable[[torch.Tensor], int],
) -> list[int]:
    """Token ids of one reply, at most `most`, with the stop token that ends it, if one does. model: without PEFT's own."""
    given = media.inputs(torch.tensor([list(prompt)], device=model.device))
    settings = transformers.GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=list(stop), pad_token_id=pad)
    made = model.generate(
        **given, generation_config=settings, logits_processor=transformers.LogitsProcessorList([Chosen(choose)])
    )
    return [int(token) for token in made[0, given["input_ids"].shape[1] :]]
