"""Llama-shaped decoder with hand-written forward and backward.

    embed -> [norm -> qkv -> attention -> out -> + -> norm -> gate, up -> glu -> down -> +] x layers -> norm -> head ->
    losses

There is one autograd node per block and one for the head. A node keeps the outputs of matrix products and the sums of
the residual stream; norms and activations are computed again in the backward. Layers below the lowest adapted one run
without gradient. The tail of the last layer and the head run for supervised rows only. A family of architectures is
one entry in FAMILIES.

For a mapped head the log-sum-exp is computed online over slices of the vocabulary (Milakov & Gimelshein 2018,
arXiv:1805.02867). The gradient is accumulated in the same loop, as blocked attention does: both are scaled down when a
larger logit appears. So each slice of the head is widened once for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sartor.core.errors import ModelError
from sartor.models.kernels.reference import AttentionLayout, Geometry, ReferenceKernels
from sartor.models.losses.lora_linear import MappedLinear, Projection, Unsupported, rounds
from sartor.models.losses.soft_targets import soft_losses
from sartor.models.packing import AttentionShape, Pack

# Vocabulary entries (rows of the head's weight) that are widened at once
SLICE = 2048


def mapped_losses(
    normed: torch.Tensor, head: MappedLinear, targets: torch.Tensor, needs_gradient: bool, logits_bytes: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute token losses and their gradients for an LM head that is widened slice by slice.

    normed: (N, D) hidden states after the final norm. targets: (N,) token ids. Returns losses: (N,) nats, and
    dloss/dnormed: (N, D), or None unless `needs_gradient`. Memory at once: a slice of the head, (SLICE, D), and a
    slice of the logits of at most `logits_bytes`.
    """
    rows = max(1, logits_bytes // (SLICE * normed.element_size()))
    losses = normed.new_empty(len(normed))
    slopes = torch.empty_like(normed) if needs_gradient else None
    for low in range(0, len(normed), rows):
        part = slice(low, low + rows)
        part_slopes = None if slopes is None else slopes[part]
        _rows(normed[part], head, targets[part], losses=losses[part], slopes=part_slopes)
    return losses, slopes


def _rows(
    x: torch.Tensor, head: MappedLinear, targets: torch.Tensor, losses: torch.Tensor, slopes: torch.Tensor | None
) -> None:
    """Compute token losses of N hidden states, one slice of the vocabulary at a time.

    x: (N, D). targets: (N,) token ids. losses: (N,) nats, written.
    slopes: (N, D) dloss/dx, written; None to skip them.
    """
    row_max, total = x.new_full((len(x), 1), -torch.inf), x.new_zeros(len(x), 1)
    if slopes is not None:
        slopes.zero_()
    vocabulary = head.out_features
    buffer = x.new_empty(min(SLICE, vocabulary), x.shape[1])
    for low in range(0, vocabulary, SLICE):
        # one slice of the vocabulary: weight W_v (v, D), logits z = x W_v^T (N, v)
        weight = head.widen(buffer[: min(SLICE, vocabulary - low)], low)
        scores = x @ weight.T
        # online log-sum-exp, each (N, 1): m' = max(m, max_v z_v);  s' = s exp(m - m') + sum_v exp(z_v - m')
        new_max = torch.maximum(row_max, scores.amax(1, keepdim=True))
        rescale, row_max = (row_max - new_max).exp_(), new_max
        scores.sub_(row_max).exp_()
        total.mul_(rescale).add_(scores.sum(1, keepdim=True))
        # unnormalised expected weight row, (N, D): g' = g exp(m - m') + exp(z - m') W_v
        if slopes is not None:
            slopes.mul_(rescale).addmm_(scores, weight)
    # loss (N,) = m + log s - x . w_target, with w_target (N, D) the targets' rows of W
    target_weights = head.weight.detach()[targets].to(x.dtype)
    torch.sub(row_max.add(total.log()).squeeze(1), (x * target_weights).sum(1), out=losses)
    # dloss/dx (N, D) = softmax(z) W - w_target = g / s - w_target
    if slopes is not None:
        slopes.div_(total).sub_(target_weights)


# In 16 bits on a CPU oneDNN prepares the code of a product anew for each number of rows that it has not met lately: 1
# ms a product, about 50 products an update. So packs are filled up to a multiple. 32 costs 8 % more tokens where an
# update has 200, and makes it 1.12 times as fast (docs/development/log.md).
TOKEN_MULTIPLE = 32
# Logits are computed in chunks of about this size: a larger chunk is slower to traverse, a smaller one reads the head
# more often.
LOGITS_BYTES = 64 << 20


@dataclass(frozen=True)
class DecoderFamily:
    """Differences of an architecture from Llama.

    attention_in, mlp_in: names of the linear modules that are fused into one product.
    norm_offset: added to the stored weights of norms (Gemma stores weight - 1).
    epsilon: attribute of the norm module that holds eps.
    head_norms: RMSNorm of each query and key head before the rotation.
    post_norms: RMSNorm of the output of attention and of the MLP before the residual sum.
    rope_by_layer: the rotary embedding depends on the layer's type.
    activation: attribute of the config that names the activation.
    window: object whose `sliding_window` applies, the config or the layer's attention; empty for none.
    softcaps: attention scores and logits are soft-capped, as the config says.
    dropouts: settings of the config that must be 0.
    """

    attention_in: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    norm_offset: float = 0.0
    epsilon: str = "variance_epsilon"
    head_norms: bool = False
    post_norms: bool = False
    rope_by_layer: bool = False
    activation: str = "hidden_act"
    window: Literal["", "config", "layer"] = ""
    softcaps: bool = False
    dropouts: tuple[str, ...] = ("attention_dropout",)


_GEMMA = DecoderFamily(
    norm_offset=1.0, epsilon="eps", post_norms=True, activation="hidden_activation", window="layer", softcaps=True
)
FAMILIES = {
    "llama": DecoderFamily(),  # and SmolLM2, TinyLlama, Yi, ...
    "mistral": DecoderFamily(window="config"),
    "qwen2": DecoderFamily(window="layer"),  # `Projection` finds its biases on the modules
    "qwen3": DecoderFamily(window="layer", head_norms=True),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, head_norms=True, rope_by_layer=True),
    "phi3": DecoderFamily(
        attention_in=("qkv_proj",),
        mlp_in=("gate_up_proj",),
        window="config",
        dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"),
    ),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Norm:
    """RMSNorm: x / rms(x) * (offset + weight), over the last dimension."""

    def __init__(self, module: Any, family: DecoderFamily, kernels: ReferenceKernels) -> None:
        self.weight, self._kernels = module.weight.detach(), kernels
        self.offset, self.eps = family.norm_offset, getattr(module, family.epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (N, D), and 1 / rms(x) (N,) for the backward. x: (N, D)."""
        return self._kernels.rms_norm(x, self.weight, self.eps, self.offset)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, add: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return dloss/dx (N, D), plus `add` (N, D) if given.

        dy, x: (N, D). rstd: (N,) as `forward` returned it.
        """
        return self._kernels.rms_norm_backward(dy, x, self.weight, rstd, self.offset, add)


class HeadNorms:
    """RMSNorm of each query and key head before the rotation (Qwen 3, Gemma 3)."""

    def __init__(
        self, attention: Any, family: DecoderFamily, shape: AttentionShape, width: int, kernels: ReferenceKernels
    ) -> None:
        self.norms = [Norm(module, family, kernels) for module in (attention.q_norm, attention.k_norm)]
        self._sizes = [shape.heads * width, shape.groups * width, shape.groups * width]
        self._width = width

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """Return qkv (T, (H + 2 G) K) with queries and keys normalised; values are unchanged."""
        parts = [part.reshape(-1, self._width) for part in qkv.split(self._sizes, 1)]
        normed = [norm.forward(part)[0] for norm, part in zip(self.norms, parts, strict=False)]
        return torch.cat([part.view(len(qkv), -1) for part in (*normed, parts[2])], 1)

    def backward(self, d: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """Return dloss/dqkv (T, (H + 2 G) K) before the norms.

        d: (T, (H + 2 G) K) gradient of what `forward` returned. qkv: (T, (H + 2 G) K) as `forward` received it.
        """
        # rows are single heads: queries (T H, K), keys (T G, K), values (T G, K)
        parts = [part.reshape(-1, self._width) for part in qkv.split(self._sizes, 1)]
        grads = [part.reshape(-1, self._width) for part in d.split(self._sizes, 1)]
        # RMSNorm backward of each query and key head; dv passes through. 1 / rms was not kept, so it is computed again
        for index, norm in enumerate(self.norms):
            grads[index] = norm.backward(grads[index], parts[index], norm.forward(parts[index])[1])
        return torch.cat([part.view(len(qkv), -1) for part in grads], 1)


class DecoderBlock:
    """One decoder layer with hand-written forward and backward.

    `forward` stores in `saved` the tensors that `backward` reads.
    """

    def __init__(self, layer: Any, family: DecoderFamily, model: Any, kernels: ReferenceKernels) -> None:
        config, attention, dtype = model.config, layer.self_attn, layer.input_layernorm.weight.dtype
        self.kernels = kernels
        self.width = attention.head_dim
        self.rope_kind = config.layer_types[attention.layer_idx] if family.rope_by_layer else ""
        self.shape = AttentionShape(
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            scale=attention.scaling,
            softcap=config.attn_logit_softcapping if family.softcaps else None,
            window=self._window(family, config, attention),
        )
        self.activation = self._activation(family, config)
        self.norm = Norm(layer.input_layernorm, family, kernels)
        second = layer.pre_feedforward_layernorm if family.post_norms else layer.post_attention_layernorm
        self.mlp_norm = Norm(second, family, kernels)
        self.post_norms: list[Norm] = []
        if family.post_norms:
            modules = (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
            self.post_norms = [Norm(module, family, kernels) for module in modules]
        self.head_norms: HeadNorms | None = None
        if family.head_norms:
            self.head_norms = HeadNorms(attention, family, shape=self.shape, width=self.width, kernels=kernels)
        self.attention_in = Projection([getattr(attention, name) for name in family.attention_in], dtype)
        self.attention_out = Projection([attention.o_proj], dtype)
        self.mlp_in = Projection([getattr(layer.mlp, name) for name in family.mlp_in], dtype)
        self.mlp_out = Projection([layer.mlp.down_proj], dtype)

    @staticmethod
    def _window(family: DecoderFamily, config: Any, attention: Any) -> int | None:
        """Return the size of the layer's sliding window in tokens; None without one."""
        if not family.window:
            return None
        window: int | None = (config if family.window == "config" else attention).sliding_window
        return window

    @staticmethod
    def _activation(family: DecoderFamily, config: Any) -> str:
        """Return the kernels' name of the config's activation. Raises Unsupported for an unknown one."""
        name = getattr(config, family.activation)
        if name not in ACTIVATIONS:
            raise Unsupported(f"the activation {name!r}")
        return ACTIVATIONS[name]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """LoRA factors, in the order of `backward`'s gradients."""
        parts = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        return [parameter for part in parts for parameter in part.parameters]

    def forward(
        self, x: torch.Tensor, geometry: Geometry, output_rows: torch.Tensor | None, saved: dict[str, Any]
    ) -> torch.Tensor:
        """Compute the layer's output for hidden states x (T, D).

        output_rows: (W,) token indices of the last layer, whose other rows nothing reads; None for all. Returns (W,
        D), or (T, D) without `output_rows`. saved: filled with the tensors that `backward` reads.
        """
        # L(x; W) stands for the adapted product x W^T + bias + scale (x A^T) B^T of `lora_linear.Projection`.
        # h = norm(x) (T, D);  qkv = L(h; W_qkv) (T, (H + 2 G) K)
        h, saved["rstd"] = self.norm.forward(x)
        qkv, saved["low_in"] = self.attention_in.forward(h)
        # mixed = attention(rotate(qkv)) (T, H K)
        rotary_input = qkv if self.head_norms is None else self.head_norms.forward(qkv)
        mixed, saved["lse"] = self.kernels.attention(rotary_input, geometry)
        # middle = x + L(mixed; W_o) (W, D), for the rows that are read
        mixed_rows, residual = (mixed, x) if output_rows is None else (mixed[output_rows], x[output_rows])
        middle, saved["low_out"] = self._add(residual, self.attention_out, mixed_rows, saved=saved, index=0)
        # gate_up = L(norm(middle); W_gate_up) (W, 2 I);  out = middle + L(act(gate) * up; W_down) (W, D)
        h, saved["mlp_rstd"] = self.mlp_norm.forward(middle)
        gate_up, saved["low_mlp"] = self.mlp_in.forward(h)
        glu = self.kernels.glu(gate_up, self.activation)
        out, saved["low_down"] = self._add(middle, self.mlp_out, glu, saved=saved, index=1)
        saved.update(qkv=qkv, mixed=mixed, middle=middle, gate_up=gate_up)
        return out

    def _add(
        self, residual: torch.Tensor, part: Projection, x: torch.Tensor, saved: dict[str, Any], index: int
    ) -> Any:
        """Return residual + part(x), or residual + norm(part(x)) with post-norms, and x A^T for the backward.

        residual: (N, D). x: (N, inputs of `part`). index: 0 for attention, 1 for the MLP.
        """
        if not self.post_norms:
            return part.forward(x, onto=residual)
        y, low_rank = part.forward(x)
        normed, saved[f"after_rstd_{index}"] = self.post_norms[index].forward(y)
        saved[f"after_{index}"] = y
        return residual + normed, low_rank

    def _before_norm(self, dy: torch.Tensor, saved: dict[str, Any], index: int) -> torch.Tensor:
        """Return the gradient of part(x) in `_add`, (N, D), from the gradient dy (N, D) of the sum."""
        return (
            self.post_norms[index].backward(dy, saved[f"after_{index}"], saved[f"after_rstd_{index}"])
            if self.post_norms
            else dy
        )

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        geometry: Geometry,
        output_rows: torch.Tensor | None,
        saved: dict[str, Any],
        want_dx: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradient of x, (T, D) or None, and the gradients of `parameters`.

        dy: (W, D) gradient of `forward`'s output; W = T without `output_rows`. x, geometry, output_rows: as `forward`
        received them. saved: as `forward` filled it. want_dx: false skips the gradient of x.
        """
        # The forward's steps in reverse. `lowered` is scale d B (W, sum of R), shared by dx and dA of a projection.
        # d (W, D): gradient of the down projection's output;  d_glu = d W_down + lowered A (W, I)
        middle = saved["middle"]
        d = self._before_norm(dy, saved, 1)
        lowered = self.mlp_out.lower(d)
        glu, d_gate_up = self.kernels.glu_backward(
            self.mlp_out.input_gradient(d, lowered), saved.pop("gate_up"), self.activation
        )
        # dA = lowered^T glu (R, I);  dB = scale d^T (glu A^T) (D, R), with glu (W, I) computed again
        down = self.mlp_out.factor_gradients(d, glu, saved["low_down"], lowered)
        del glu  # freed because peak memory on an edge device is reached here
        # d_h = d_gate_up W_gate_up + lowered A (W, D), with d_gate_up (W, 2 I) and h = norm(middle) computed again
        lowered = self.mlp_in.lower(d_gate_up)
        h, _ = self.mlp_norm.forward(middle) if self.mlp_in.factors else (middle, None)
        mlp = self.mlp_in.factor_gradients(d_gate_up, h, saved["low_mlp"], lowered)
        d_h = self.mlp_in.input_gradient(d_gate_up, lowered)
        del h, d_gate_up
        # d_middle = dy + J_norm(middle)^T d_h (W, D): the residual path, and the path through norm and MLP
        d_middle = self.mlp_norm.backward(d_h, middle, saved["mlp_rstd"], dy)
        del d_h
        # d (W, D): gradient of the out projection's output;  d_mixed = d W_o + lowered A (W, H K)
        d = self._before_norm(d_middle, saved, 0)
        lowered = self.attention_out.lower(d)
        mixed, qkv = saved["mixed"], saved["qkv"]
        out = self.attention_out.factor_gradients(
            d, mixed if output_rows is None else mixed[output_rows], saved["low_out"], lowered
        )
        d_mixed = self.attention_out.input_gradient(d, lowered)
        # rows that nothing read have gradient zero: (W, .) -> (T, .)
        if output_rows is not None:
            d_mixed, d_middle = (
                part.new_zeros(len(x), part.shape[1]).index_copy_(0, output_rows, part) for part in (d_mixed, d_middle)
            )
        # d_qkv (T, (H + 2 G) K): backward of attention, of the rotation, and of the norms of single heads
        rotary_input = qkv if self.head_norms is None else self.head_norms.forward(qkv)
        d_qkv = self.kernels.attention_backward(d_mixed, rotary_input, mixed, saved["lse"], geometry)
        if self.head_norms is not None:
            d_qkv = self.head_norms.backward(d_qkv, qkv)
        # dA = lowered^T h (R, D);  dB = scale d_qkv^T (h A^T), with h = norm(x) (T, D) computed again
        lowered = self.attention_in.lower(d_qkv)
        h, _ = self.norm.forward(x) if self.attention_in.factors else (x, None)
        first = self.attention_in.factor_gradients(d_qkv, h, saved["low_in"], lowered)
        # dx = d_middle + J_norm(x)^T (d_qkv W_qkv + lowered A) (T, D)
        dx = None
        if want_dx:
            dx = self.norm.backward(self.attention_in.input_gradient(d_qkv, lowered), x, saved["rstd"], d_middle)
        return dx, [*first, *out, *mlp, *down]


class _BlockNode(torch.autograd.Function):
    """Autograd node of one DecoderBlock; its factors are inputs so that autograd delivers their gradients.

    forward: x (T, D) -> (W, D). With `recompute` only x is kept and the forward runs again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        block: DecoderBlock,
        geometry: Geometry,
        output_rows: torch.Tensor | None,
        recompute: bool,
        *_: Any,
    ) -> torch.Tensor:
        saved: dict[str, Any] = {}
        out = block.forward(x, geometry, output_rows, saved)
        ctx.block, ctx.geometry, ctx.output_rows = block, geometry, output_rows
        ctx.saved = None if recompute else saved
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        saved, ctx.saved = ctx.saved, None
        if saved is None:
            saved = {}
            ctx.block.forward(x, ctx.geometry, ctx.output_rows, saved)
        dx, gradients = ctx.block.backward(
            dy.contiguous(), x, ctx.geometry, ctx.output_rows, saved=saved, want_dx=ctx.needs_input_grad[0]
        )
        return (dx, None, None, None, None, *gradients)


class _HeadNode(torch.autograd.Function):
    """Autograd node of the final norm, the LM head and the cross-entropy: hidden (N, D) -> losses (N,) in nats.

    A token's loss depends on its own row alone. So dloss/dhidden is computed together with the logits, except for the
    factor that the backward brings, and the logits are never kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, decoder: FusedDecoder, targets: torch.Tensor) -> torch.Tensor:
        normed, rstd = decoder.norm.forward(hidden)
        needs_gradient = ctx.needs_input_grad[0]
        ctx.fast = decoder
        if decoder.mapped is not None:
            result, slope = mapped_losses(
                normed, decoder.mapped, targets, needs_gradient=needs_gradient, logits_bytes=decoder.logits_bytes
            )
            ctx.save_for_backward(hidden, rstd, *(() if slope is None else (slope,)))
            return result
        losses, slopes = [], []
        rows = decoder.rows_at_once(hidden)
        for part, part_targets in zip(normed.split(rows), targets.split(rows), strict=True):
            # logits z = part W^T (n, V);  the kernel returns losses (n,) and dloss/dz (n, V)
            logits = decoder.logits(part)
            loss, gradient = decoder.kernels.cross_entropy(logits, part_targets, decoder.softcap, needs_gradient)
            losses.append(loss)
            # dloss/dnormed = dloss/dz W (n, D)
            if gradient is not None:
                slopes.append(gradient @ decoder.head)
        ctx.save_for_backward(hidden, rstd, *slopes)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        # dy (N, D) = d[:, None] dloss/dnormed, with d (N,) the gradient of each token's loss
        hidden, rstd, *slopes = ctx.saved_tensors
        dy = (slopes[0] if len(slopes) == 1 else torch.cat(slopes)) * d.to(hidden.dtype)[:, None]
        return ctx.fast.norm.backward(dy, hidden, rstd), None, None


class _ScoresNode(torch.autograd.Function):
    """Autograd node of the final norm, the LM head and the log-softmax at K tokens: (N, D) -> (N, K).

    The logits are computed once more in the backward pass instead of being kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, decoder: FusedDecoder, ids: torch.Tensor) -> torch.Tensor:
        normed, rstd = decoder.norm.forward(hidden)
        size = decoder.scored_at_once
        scores = [
            decoder.capped_logits(part).log_softmax(-1).gather(1, part_ids)
            for part, part_ids in zip(normed.split(size), ids.split(size), strict=True)
        ]
        ctx.fast = decoder
        ctx.save_for_backward(hidden, normed, rstd, ids)
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        hidden, normed, rstd, ids = ctx.saved_tensors
        decoder, size = ctx.fast, ctx.fast.scored_at_once
        slopes = []
        for part, part_ids, part_d in zip(normed.split(size), ids.split(size), d.split(size), strict=True):
            logits = decoder.capped_logits(part)
            # s_k = z_{i_k} - logsumexp(z):  ds/dz = onehot(i_k) - softmax(z), so
            # dz (n, V) = scatter(d) - softmax(z) sum_k d_k
            slope = logits.softmax(-1).mul_(-part_d.sum(-1, keepdim=True))
            slope.scatter_add_(1, part_ids, part_d)
            if decoder.softcap:
                # z = c tanh(y / c):  dz/dy = 1 - (z / c)^2
                slope *= 1 - (logits / decoder.softcap) ** 2
            # dnormed (n, D) = dz W
            slopes.append(slope.to(decoder.head.dtype) @ decoder.head)
        return decoder.norm.backward(torch.cat(slopes), hidden, rstd), None, None


class FusedDecoder:
    """A causal language model of a known family, as blocks with hand-written backward.

    Raises Unsupported, with the reason, for any other model. model: transformers' module with adapters in place and
    without the PeftModel wrapper (`transformers_backend.without_peft`), or an edge device's module with the same
    attributes (`models/mmap_llama.py`). For the latter neither transformers nor peft is imported.
    """

    def __init__(
        self, model: Any, kernels: ReferenceKernels, *, recompute: bool = False, logits_bytes: int = LOGITS_BYTES
    ) -> None:
        family = FAMILIES.get(model.config.model_type)
        if family is None:
            raise Unsupported(f"architecture {model.config.model_type!r} is not in the fast path's table")
        body, head = model.get_decoder(), model.get_output_embeddings()
        self._check(family, model, body, head)
        self.kernels, self.recompute = kernels, recompute
        self.embed, self.rope, self.family_name = body.embed_tokens, body.rotary_emb, model.config.model_type
        inputs = [parameter for parameter in body.embed_tokens.parameters() if parameter.requires_grad]
        self.blocks = [DecoderBlock(layer, family, model, kernels) for layer in body.layers]
        self.norm = Norm(body.norm, family, kernels)
        self.head, self.dtype, self.logits_bytes = head.weight.detach(), body.norm.weight.dtype, logits_bytes
        self._logits: torch.Tensor | None = None
        is_prepared_by_length = self.head.device.type == "cpu" and rounds(self.dtype)
        # of the tokens of a pack
        self.token_multiple = TOKEN_MULTIPLE if is_prepared_by_length else 1
        self.softcap = model.config.final_logit_softcapping if family.softcaps else None
        self.mapped = head if isinstance(head, MappedLinear) else None
        if self.mapped is not None and self.softcap:
            raise Unsupported("a mapped LM head whose logits are capped")
        adapted: list[int] = []
        covered = {id(parameter) for parameter in inputs}
        for index, block in enumerate(self.blocks):
            covered |= {id(parameter) for parameter in block.parameters}
            if any(parameter.requires_grad for parameter in block.parameters):
                adapted.append(index)
        # a trained projector of media makes inputs, so its gradient passes through every block
        self.lowest = 0 if inputs else min(adapted, default=len(self.blocks))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in covered:
                raise Unsupported(f"{name} is trained, which lies outside the blocks' linear modules")

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, V) of x (N, D), in a buffer that the next call overwrites.

        A fresh allocation of that size for each call is costly.
        """
        if self._logits is None or len(self._logits) < len(x):
            self._logits = x.new_empty(len(x), len(self.head))
        return torch.mm(x, self.head.T, out=self._logits[: len(x)])

    @staticmethod
    def _check(family: DecoderFamily, inner: Any, body: Any, head: Any) -> None:
        """Raise Unsupported for a head, a layer count or a dropout that the fused path does not compute."""
        if not isinstance(head, torch.nn.Linear) or head.bias is not None:
            raise Unsupported("the LM head is no plain linear module")
        if head.weight.dtype != body.norm.weight.dtype and not isinstance(head, MappedLinear):
            raise Unsupported("the LM head and the norms have unlike dtypes")
        if inner.config.num_hidden_layers != len(body.layers):
            raise Unsupported("layers are left out by the config")
        for name in family.dropouts:
            if getattr(inner.config, name):
                raise Unsupported(f"the base has {name}")

    def losses(self, batch: Pack) -> torch.Tensor:
        """Return the losses (S,) in nats of a pack's supervised tokens.

        They equal those of `transformers_backend.pack_losses` up to rounding.
        """
        geometries = self.geometries(batch)
        x = self.embed(batch.ids[0])
        with torch.no_grad():
            x = self.frozen(x, geometries) if self.lowest else x
        return self.tuned(x, batch, geometries)

    def geometries(self, batch: Pack) -> list[Geometry]:
        """Return each layer's attention geometry over this pack."""
        layout = AttentionLayout(batch.segments, batch.rows, batch.tokens)
        like = torch.empty(0, dtype=self.dtype, device=batch.ids.device)
        turns: dict[str, list[torch.Tensor]] = {}
        result = []
        for block in self.blocks:
            if block.rope_kind not in turns:
                kind = (block.rope_kind,) if block.rope_kind else ()
                turns[block.rope_kind] = [part[0] for part in self.rope(like, batch.positions, *kind)]
            cos, sin = turns[block.rope_kind]
            result.append(Geometry(block.shape, block.width, cos=cos, sin=sin, layout=layout))
        return result

    def frozen(self, x: torch.Tensor, geometries: Sequence[Geometry]) -> torch.Tensor:
        """Return the input of the lowest adapted layer, (T, D), for embeddings x (T, D). Call under no_grad."""
        for block, geometry in zip(self.blocks[: self.lowest], geometries, strict=False):
            x = block.forward(x, geometry, None, {})
        return x

    def tuned(self, x: torch.Tensor, batch: Pack, geometries: Sequence[Geometry]) -> torch.Tensor:
        """Return differentiable losses (S,) in nats from x (T, D), the input of the lowest adapted layer."""
        hidden = self.predicting(x, batch, geometries)
        if batch.soft is None:
            return _HeadNode.apply(hidden, self, batch.targets)
        places, hard, soft = batch.soft.places, batch.soft.hard, batch.soft.targets
        losses = [soft_losses(self.token_scores(hidden[places], soft.ids), soft.log_probabilities)]
        if len(hard):
            losses.append(_HeadNode.apply(hidden[hard], self, batch.targets[hard]).to(losses[0].dtype))
        return torch.cat(losses)[torch.cat([places, hard]).argsort()]

    def token_scores(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return differentiable log-probabilities (N, K) of the tokens `ids` (N, K) from `predicting`'s (N, D)."""
        self.check_distributions()
        return _ScoresNode.apply(hidden, self, ids)

    def check_distributions(self) -> None:
        """Raise ModelError for a head that is read from its file."""
        if self.mapped is not None:
            raise ModelError("a head that is read from its file gives no distributions", "objective: {kind: sft}")

    def rows_at_once(self, hidden: torch.Tensor) -> int:
        """Return how many of the hidden states (N, D) get their logits at once."""
        return max(1, self.logits_bytes // (self.head.shape[0] * hidden.element_size()))

    @property
    def scored_at_once(self) -> int:
        """Number of hidden states that get their log-probabilities at once.

        They are fewer than of `rows_at_once`, since logits, probabilities and gradient are in fp32 and in memory
        together.
        """
        return max(1, self.logits_bytes // (self.head.shape[0] * torch.float32.itemsize) // 4)

    def capped_logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, V), at least fp32, of normed hidden states (n, D), soft-capped where the family is."""
        logits = normed @ self.head.T
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def predicting(self, x: torch.Tensor, batch: Pack, geometries: Sequence[Geometry]) -> torch.Tensor:
        """Return differentiable hidden states (S, D) before the final norm, of the positions that predict.

        x: (T, D), the input of the lowest adapted layer.
        """
        output_rows, places = batch.output_rows
        for index in range(self.lowest, len(self.blocks)):
            block, is_last = self.blocks[index], index == len(self.blocks) - 1
            block_rows = output_rows if is_last else None
            x = _BlockNode.apply(x, block, geometries[index], block_rows, self.recompute, *block.parameters)
        if self.lowest == len(self.blocks):
            x = x[output_rows]
        return x[places]
