"""Transformers loss backends, and the choice among all loss backends.

`packed_attention` registers `attend` with transformers under the name `sartor_packed`. Any architecture whose
attention uses transformers' AttentionInterface then packs exactly, which `matches_single_rows` measures on rows of the
run.

    fast       our own forward and backward of the Llama-shaped block (`fused_decoder.py`), frozen layers from
               disk (`loss_backend.py`)
    general    transformers' own module, with our packing and loss
    one-row    transformers' own module, a row at a time: for models that do not pack exactly

Every backend gives the same losses up to rounding; they differ in time and memory. Backends that need torch alone are
in `loss_backend.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from sartor.models import kernels
from sartor.models import packing as batches
from sartor.models.loading import quiet_transformers
from sartor.models.losses.fp32_copy import in_fp32
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.losses.lora_linear import Unsupported, rounds
from sartor.models.losses.lora_rounding import rounded_twice
from sartor.models.losses.loss_backend import WISH, FusedBackend, LossBackend, LossOptions, activation_cache_for
from sartor.models.losses.row_gradients import RowGradientObserver
from sartor.models.losses.soft_targets import soft_losses
from sartor.models.media_tokens import own_inputs
from sartor.models.multimodal.native_media import is_plain, native_media
from sartor.models.packing import AttentionShape, Pack, TokenizedExample, attend, pack


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute `attend` with the signature of transformers' attention functions.

    query: (1, H, T, K). key, value: (1, G, T, K). Returns ((1, T, H, K), None). `options` are transformers' (scaling,
    softcap, sliding_window, dropout) and our `rows`.
    """
    shape = AttentionShape(
        heads=query.shape[1],
        groups=key.shape[1],
        scale=options.get("scaling") or query.shape[3] ** -0.5,
        softcap=options.get("softcap"),
        window=options.get("sliding_window"),
    )
    dropout = options.get("dropout") or 0.0
    mixed = attend(query[0], key[0], value[0], rows=options["rows"], shape=shape, dropout=dropout)
    return mixed[None], None


AttentionInterface.register("sartor_packed", packed_attention)


@contextmanager
def packing(model: Any) -> Iterator[None]:
    """Make `model` use packed attention inside the `with` block, and build no mask of its own.

    Tokens then attend within segments. The previous attention implementation is restored afterwards.
    """
    text = decoder(model)
    previous = text.config._attn_implementation
    text.set_attn_implementation("sartor_packed")
    try:
        yield
    finally:
        text.set_attn_implementation(previous)


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Make `model` use its own attention inside the `with` block, to generate.

    A model that computes activations again is left with packed attention (`with_recompute`).
    """
    text = decoder(without_peft(model))
    previous = text.config._attn_implementation
    if previous == "sartor_packed":
        text.set_attn_implementation("eager")
    try:
        yield
    finally:
        if previous == "sartor_packed":
            text.set_attn_implementation(previous)


def without_peft(model: Any) -> Any:
    """Return transformers' module inside a PeftModel; `model` itself if it has no adapter."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def decoder(model: Any) -> Any:
    """Return the causal decoder: the model itself, or the language model of a multimodal model."""
    return model if model.config.get_text_config(decoder=True) is model.config else model.get_decoder()


def pack_losses(model: Any, batch: Pack) -> torch.Tensor:
    """Return the loss (S,) in nats, at least fp32, of each supervised token of a pack.

    It is the cross-entropy, or the divergence from a soft target.

    Call it inside `packing(model)`.
    """
    return _token_losses(pack_logits(model, batch), batch)


def _token_losses(logits: torch.Tensor, batch: Pack) -> torch.Tensor:
    """Return the losses (S,) of a pack's supervised tokens from their logits (S, V)."""
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    if batch.soft is None:
        return losses
    places, soft = batch.soft.places, batch.soft.targets
    scores = logits[places].log_softmax(-1).gather(1, soft.ids)
    return losses.index_put((places,), soft_losses(scores, soft.log_probabilities).to(losses.dtype))


def pack_logits(model: Any, batch: Pack) -> torch.Tensor:
    """Return the logits (S, V), at least fp32, from which each supervised token of a pack is predicted.

    Call it inside `packing(model)`. Only the S predicting positions reach the LM head (`logits_to_keep`), so a prompt
    costs no (T, V) logits.
    """
    logits = model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        logits_to_keep=batch.predict,
        use_cache=False,
        rows=batch.rows,
    ).logits[0]
    if len(logits) == batch.tokens:  # a model that does not know `logits_to_keep`
        logits = logits[batch.predict]
    return _at_least_fp32(logits)


def row_losses(
    model: Any,
    examples: Sequence[TokenizedExample],
    device: torch.device | str,
    observer: RowGradientObserver | None = None,
) -> torch.Tensor:
    """Return the losses (S,) of `pack_losses`, one example at a time through the model's own attention.

    This is slow, and right for any model. observer: of the rows' gradients.
    """
    losses = []
    for example in examples:
        batch = pack([example], device)
        if batch.supervised_tokens:
            if observer is not None and torch.is_grad_enabled():
                observer.begin(batch)
            losses.append(_token_losses(row_logits(model, batch), batch))
    return torch.cat(losses) if losses else torch.zeros(0, device=device)


def row_logits(model: Any, batch: Pack) -> torch.Tensor:
    """Return the logits (S, V), at least fp32, of the supervised tokens of a pack of one example.

    They are computed by the model's own attention.
    """
    logits = model(**own_inputs(model, batch.ids), use_cache=False).logits[0]
    return _at_least_fp32(logits[batch.predict])


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def packs_exactly(model: Any, examples: Sequence[TokenizedExample], device: torch.device | str) -> tuple[bool, float]:
    """Return whether packed losses equal unpacked ones, and the largest difference in nats.

    `matches_single_rows` defines the criterion.
    """

    def packed(few: Sequence[TokenizedExample]) -> torch.Tensor:
        with packing(model):
            return pack_losses(model, pack(few, device))

    return matches_single_rows(model, examples, device, packed)


def reversed_text(ids: Sequence[int]) -> list[int]:
    """Return the text tokens in reverse order; media tokens (negative ids) stay in place.

    A media token must not become a token to predict.

    >>> reversed_text([1, 2, -9, 3])
    [3, 2, -9, 1]
    """
    text = [token for token in ids if token >= 0]
    return [token if token < 0 else text.pop() for token in ids]


@torch.no_grad()
def matches_single_rows(
    model: Any,
    examples: Sequence[TokenizedExample],
    device: torch.device | str,
    packed: Callable[[Sequence[TokenizedExample]], torch.Tensor],
) -> tuple[bool, float]:
    """Return whether `packed` gives the losses of single rows, and the largest difference in nats.

    packed: function from rows to their (S,) losses.

    A few short rows and the longest are packed, since windows and chunks take effect in long rows only. Their losses
    must equal those of the plain pass, up to the cost of reordered sums at the model's precision. They must also not
    change when only the tokens of the row before them change. The second is the sharper test: in bf16 a leak can be
    smaller than the rounding. A model with state outside attention (convolutions, recurrences), or one that drops
    unknown keyword arguments, fails one of them. Any exception of the packed pass counts as "no"; another backend is
    then used.

    In 16 bits both passes round, by up to 0.5 nats a token where losses are near 10, so neither can judge the other.
    Both are compared with the same computation in fp32 (`fp32_copy.py`), over more rows. `packed` may deviate by half
    as much again as the model's own pass. The difference returned is then the largest one to fp32.
    """
    few = _few_rows(examples, model.get_output_embeddings().weight.dtype)
    if not few:
        return True, 0.0  # nothing is supervised, so nothing can leak
    media = native_media(model)
    for row in few:
        if media is not None and not is_plain(model, media, row.ids):
            return False, max(media.deviations.values())
    plain = row_losses(model, few, device)
    altered = replace(few[0], ids=reversed_text(few[0].ids))
    try:
        packed_losses, altered_losses = (packed([first, *few]) for first in (few[0], altered))
    except Exception:  # each architecture raises its own exceptions, and each means "no"
        return False, float("inf")
    n_first = few[0].supervised_tokens
    leak = float((packed_losses[n_first:] - altered_losses[n_first:]).abs().max())
    if not rounds(model.get_output_embeddings().weight.dtype):
        difference = float((plain - packed_losses[n_first:]).abs().max())
        return leak <= 1e-6 and difference <= 1e-3, max(difference, leak)
    reference = _fp32_losses(model, few, device)
    # Without a reference the bounds are absolute: rounding alone costs a root mean square of 0.1 nats, and 1 nat for
    # one token in hundreds (docs/development/log.md).
    if reference is None:
        deviation = (plain - packed_losses[n_first:]).abs()
        is_near = _root_mean_square(deviation) <= 0.2 and float(deviation.max()) <= 3.0
    else:
        deviation = (packed_losses[n_first:] - reference).abs()
        is_near = (
            _root_mean_square(deviation) <= ROUNDING_SLACK * _root_mean_square(plain - reference) + ROUNDING_FLOOR_NATS
        )
    return leak <= 1e-3 and is_near, max(float(deviation.max()), leak)


# Root mean square deviation from fp32 of a packed 16-bit pass: at most this factor times that of the model's own
# single rows, plus a floor
ROUNDING_SLACK, ROUNDING_FLOOR_NATS = 1.5, 0.02
# Rows and supervised tokens over which rounding is measured in 16 bits
_ROUNDED_ROWS, _ROUNDED_TOKENS = 16, 256


def _few_rows(examples: Sequence[TokenizedExample], dtype: torch.dtype) -> list[TokenizedExample]:
    """Return the rows for `matches_single_rows`: the two shortest, the longest, and one with media.

    In 16 bits further short rows are added.
    """
    rows = sorted((example for example in examples if example.supervised_tokens), key=lambda example: len(example.ids))
    few = [*rows[:2], *rows[-1:]]
    # packing of media can only be tested on a row that has some
    if all(min(row.ids) >= 0 for row in few):
        few += [row for row in rows if min(row.ids) < 0][:1]
    if rounds(dtype):
        for row in rows[2:-1]:
            if len(few) >= _ROUNDED_ROWS or sum(chosen.supervised_tokens for chosen in few) >= _ROUNDED_TOKENS:
                break
            if row is not few[-1]:
                few.append(row)
    return few


def _fp32_losses(model: Any, examples: Sequence[TokenizedExample], device: torch.device | str) -> torch.Tensor | None:
    """Return the losses (S,) of `row_losses` in fp32; None for a model that cannot compute with widened weights."""
    try:
        with in_fp32(model):
            losses = row_losses(model, examples, device)
    except Exception:  # models that cast to their weights' dtype raise various exceptions
        return None
    return losses if bool(losses.isfinite().all()) else None


def _root_mean_square(x: torch.Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


RECOMPUTED = "activations are computed again in the backward pass"
# Rows on which a refused fused path is timed
_TIMED_ROWS = 8


@dataclass
class PackedTransformersBackend:
    """Losses by transformers' module on exact packs."""

    model: Any
    device: torch.device
    reason: str
    share: bool = False
    packing_difference: float | None = None
    name: str = "general"
    observer: RowGradientObserver | None = None

    def losses(self, rows: Sequence[TokenizedExample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses (S,) in nats and weights (S,), as `LossBackend.losses` specifies."""
        batch = batches.pack(rows, self.device, share=self.share)
        if self.observer is not None and torch.is_grad_enabled():
            self.observer.begin(batch)
        with packing(self.model):
            return pack_losses(self.model, batch), batch.weights

    def plain(self) -> LossBackend:
        """Return this backend without shared prefixes."""
        return PackedTransformersBackend(self.model, self.device, "")

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters that require gradients."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


@dataclass
class RowTransformersBackend:
    """Losses by transformers' module, a row at a time."""

    model: Any
    device: torch.device
    reason: str
    packing_difference: float | None = None
    name: str = "one-row"
    observer: RowGradientObserver | None = None

    def losses(self, rows: Sequence[TokenizedExample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses (S,) in nats and weights (S,), as `LossBackend.losses` specifies."""
        losses = row_losses(self.model, rows, self.device, self.observer)
        weights = [weight for row in rows for weight in row.token_weights]
        return losses, torch.tensor(weights, device=losses.device)

    def plain(self) -> None:
        """Return None: this backend saves nothing that could be compared."""

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters that require gradients."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def choose_loss_backend(
    model: Any, rows: Sequence[TokenizedExample], device: torch.device, options: LossOptions = WISH
) -> LossBackend:
    """Return the fastest backend that is right for `model`, measured on a few of `rows`.

    The model should be in eval mode. A backend that is not the fused one says in its `reason` why, and its cost in
    time if both can be timed.
    """
    fast: FusedDecoder | None = None
    try:
        if not options.fast:
            raise Unsupported("compute.path is general")
        selected_kernels, kernel_reason = kernels.choose_kernels(device)
        fast = FusedDecoder(without_peft(model), selected_kernels, recompute=options.recompute)
        is_exact, difference = matches_single_rows(
            model, rows, device, lambda few: fast.losses(batches.pack(few, device))
        )
        if not is_exact:
            difference_text = (
                f"differs from the model's own losses by {difference:.2g} nats"
                if math.isfinite(difference)
                else "fails"
            )
            raise Unsupported(f"it {difference_text} on rows of this run")
    except Unsupported as error:
        backend = _general(model, rows, device, options=options, reason=f"not the fast path: {error}")
        if options.fast:
            backend.reason += _cost(backend, fast, rows, device)
        return backend
    reason = f"{fast.family_name} block by hand, {kernel_reason}"
    if options.recompute:
        reason += f"; {RECOMPUTED}"
    return FusedBackend(
        fast,
        device,
        reason,
        share=options.share,
        frozen=activation_cache_for(fast, rows, device, options),
        packing_difference=difference,
    )


@torch.no_grad()
def _cost(
    backend: PackedTransformersBackend | RowTransformersBackend,
    fast: FusedDecoder | None,
    rows: Sequence[TokenizedExample],
    device: torch.device,
) -> str:
    """Return a clause with the slower backend's time on a few rows over the fused path's."""
    few = [row for row in rows if row.supervised_tokens][:_TIMED_ROWS]
    if fast is None or not few:
        return "; what that costs cannot be timed here (docs/development/tuning-speed.md has the ratio on the starter)"
    try:
        slow_s = _seconds(lambda: backend.losses(few))
        fast_s = _seconds(lambda: fast.losses(batches.pack(few, device)))
    except Exception:  # a fused path that fails cannot be timed
        return "; what that costs could not be measured, since the fast path fails"
    return f"; {len(few)} rows take {slow_s / fast_s:.1f} times as long as on the fast path"


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest wall time of three runs, s, each waiting for the device."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _general(
    model: Any, rows: Sequence[TokenizedExample], device: torch.device, options: LossOptions, reason: str
) -> PackedTransformersBackend | RowTransformersBackend:
    """Return the packed backend if packing is exact for `model`, else the single-row backend."""
    if count := rounded_twice(model):
        reason += (
            f"; {count} adapted layers are of a kind that rounds twice in 16 bits (docs/development/tuning-speed.md)"
        )
    is_exact, difference = packs_exactly(model, rows, device)
    if not is_exact:
        difference_text = (
            f"differ by {difference:.2g} nats from single rows" if math.isfinite(difference) else "cannot be computed"
        )
        return RowTransformersBackend(model, device, f"{reason}; packed losses {difference_text}", difference)
    backend = PackedTransformersBackend(model, device, reason, share=options.share, packing_difference=difference)
    return with_recompute(backend) if options.recompute else backend


def with_recompute(backend: PackedTransformersBackend) -> PackedTransformersBackend:
    """Return `backend` with gradient checkpointing: one tensor per layer is kept, the rest is computed again.

    Its reason says whether the architecture supports that. This is transformers' own checkpointing, which passes our
    `rows` on to each layer; it takes effect in training mode only.
    """
    model = backend.model
    if not model.supports_gradient_checkpointing:
        backend.reason += "; this architecture cannot compute activations again, so all are kept"
        return backend
    with quiet_transformers():  # later versions than transformers 5.0 warn that this name is deprecated
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # only reentrant checkpointing needs it; here it would compute gradients below the lowest adapted layer
    model.disable_input_require_grads()
    # the layers are called again in the backward pass, after the `packing` block has ended
    decoder(model).set_attn_implementation("sartor_packed")
    backend.reason += f"; {RECOMPUTED}"
    return backend
