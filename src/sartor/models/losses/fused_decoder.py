"""Llama-shaped decoder with hand-written forward and backward.

    embed -> [norm -> qkv -> attention -> out -> + -> norm -> gate, up -> glu -> down -> +] x layers -> norm -> head ->
    losses

One autograd node a block and one for the head. What a node keeps is what a matrix product made (and the sums of the
residual); norms and activations are computed again in the backward. Layers below the lowest adapted one run without
gradient, the last layer's tail and the head for supervised rows only. A family is a line in FAMILIES.

The log of the sum is kept running from slice to slice (Milakov & Gimelshein 2018, arXiv:1805.02867), and the gradient
with it,
as the blocked attentions do: what is there is scaled down when a larger logit comes. So each slice is widened once for
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sartor.models.kernels.reference import AttentionLayout, Geometry, ReferenceKernels
from sartor.models.losses.lora_linear import MappedLinear, Projection, Unsupported
from sartor.models.packing import AttentionShape, Pack

# Rows of the head that are widened at once
SLICE = 2048


def mapped_losses(
    normed: torch.Tensor, head: MappedLinear, targets: torch.Tensor, needs_gradient: bool, logits_bytes: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """normed (N, D) -> (N,) losses in nats, and their gradients (N, D) with respect to `normed` if they are wanted.

    At once there are a slice of the head, (SLICE, D), and a slice of the logits of at most `logits_bytes`.
    """
    rows = max(1, logits_bytes // (SLICE * normed.element_size()))
    losses = normed.new_empty(len(normed))
    slopes = torch.empty_like(normed) if needs_gradient else None
    for low in range(0, len(normed), rows):
        part = slice(low, low + rows)
        _rows(normed[part], head, targets[part], losses[part], None if slopes is None else slopes[part])
    return losses, slopes


def _rows(
    x: torch.Tensor, head: MappedLinear, targets: torch.Tensor, losses: torch.Tensor, slopes: torch.Tensor | None
) -> None:
    """Losses of some rows, and their gradients, into `losses` and `slopes`."""
    row_max, total = x.new_full((len(x), 1), -torch.inf), x.new_zeros(len(x), 1)
    if slopes is not None:
        slopes.zero_()
    vocabulary = head.out_features
    buffer = x.new_empty(min(SLICE, vocabulary), x.shape[1])
    for low in range(0, vocabulary, SLICE):
        weight = head.widen(buffer[: min(SLICE, vocabulary - low)], low)
        scores = x @ weight.T
        new_max = torch.maximum(row_max, scores.amax(1, keepdim=True))
        rescale, row_max = (row_max - new_max).exp_(), new_max
        scores.sub_(row_max).exp_()
        total.mul_(rescale).add_(scores.sum(1, keepdim=True))
        if slopes is not None:
            slopes.mul_(rescale).addmm_(scores, weight)
    target_weights = head.weight.detach()[targets].to(x.dtype)
    torch.sub(row_max.add(total.log()).squeeze(1), (x * target_weights).sum(1), out=losses)
    if slopes is not None:
        slopes.div_(total).sub_(target_weights)


# Logits are made in chunks of about this size: a larger one is slower to walk, a smaller one reads the head more
# often.
LOGITS_BYTES = 64 << 20


@dataclass(frozen=True)
class DecoderFamily:
    """In what an architecture differs from Llama.

    norm_offset: norms' weights are stored minus that. epsilon, activation: where a norm and the config keep theirs.
    window: whose `sliding_window` holds, the config's or the layer's. softcaps: attention's scores and the logits are
    capped.
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
    "qwen2": DecoderFamily(window="layer"),  # its biases are seen on the modules
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
    """x / rms(x) * (offset + weight), over the last dimension."""

    def __init__(self, module: Any, family: DecoderFamily, kernels: ReferenceKernels) -> None:
        self.weight, self._kernels = module.weight.detach(), kernels
        self.offset, self.eps = family.norm_offset, getattr(module, family.epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, what the backward wants)."""
        return self._kernels.rms_norm(x, self.weight, self.eps, self.offset)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, add: torch.Tensor | None = None
    ) -> torch.Tensor:
        """dx, with `add` added."""
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
        """(T, (H + 2 G) K) with queries and keys normed."""
        parts = [part.reshape(-1, self._width) for part in qkv.split(self._sizes, 1)]
        normed = [norm.forward(part)[0] for norm, part in zip(self.norms, parts, strict=False)]
        return torch.cat([part.view(len(qkv), -1) for part in (*normed, parts[2])], 1)

    def backward(self, d: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """The gradient of what `forward` got."""
        parts = [part.reshape(-1, self._width) for part in qkv.split(self._sizes, 1)]
        grads = [part.reshape(-1, self._width) for part in d.split(self._sizes, 1)]
        for index, norm in enumerate(self.norms):
            grads[index] = norm.backward(grads[index], parts[index], norm.forward(parts[index])[1])
        return torch.cat([part.view(len(qkv), -1) for part in grads], 1)


class DecoderBlock:
    """One layer. `forward` keeps in `saved` what `backward` takes out again."""

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
        self.head_norms = HeadNorms(attention, family, self.shape, self.width, kernels) if family.head_norms else None
        self.attention_in = Projection([getattr(attention, name) for name in family.attention_in], dtype)
        self.attention_out = Projection([attention.o_proj], dtype)
        self.mlp_in = Projection([getattr(layer.mlp, name) for name in family.mlp_in], dtype)
        self.mlp_out = Projection([layer.mlp.down_proj], dtype)

    @staticmethod
    def _window(family: DecoderFamily, config: Any, attention: Any) -> int | None:
        """Tokens of the layer's sliding window."""
        if not family.window:
            return None
        window: int | None = (config if family.window == "config" else attention).sliding_window
        return window

    @staticmethod
    def _activation(family: DecoderFamily, config: Any) -> str:
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
        """x (T, D) -> (T, D), or (W, D) for the W places `output_rows` alone (the last layer: nothing reads the
        others).
        """
        h, saved["rstd"] = self.norm.forward(x)
        qkv, saved["low_in"] = self.attention_in.forward(h)
        rotary_input = qkv if self.head_norms is None else self.head_norms.forward(qkv)
        mixed, saved["lse"] = self.kernels.attention(rotary_input, geometry)
        mixed_rows, residual = (mixed, x) if output_rows is None else (mixed[output_rows], x[output_rows])
        middle, saved["low_out"] = self._add(residual, self.attention_out, mixed_rows, saved, 0)
        h, saved["mlp_rstd"] = self.mlp_norm.forward(middle)
        gate_up, saved["low_mlp"] = self.mlp_in.forward(h)
        out, saved["low_down"] = self._add(middle, self.mlp_out, self.kernels.glu(gate_up, self.activation), saved, 1)
        saved.update(qkv=qkv, mixed=mixed, middle=middle, gate_up=gate_up)
        return out

    def _add(
        self, residual: torch.Tensor, part: Projection, x: torch.Tensor, saved: dict[str, Any], index: int
    ) -> Any:
        """residual + [norm of] part(x), and what `part` wants for its backward."""
        if not self.post_norms:
            return part.forward(x, onto=residual)
        y, low_rank = part.forward(x)
        normed, saved[f"after_rstd_{index}"] = self.post_norms[index].forward(y)
        saved[f"after_{index}"] = y
        return residual + normed, low_rank

    def _before_norm(self, dy: torch.Tensor, saved: dict[str, Any], index: int) -> torch.Tensor:
        """The gradient of what `_add` normed, from that of the sum."""
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
        """(the gradient of x if wanted, those of `parameters`)."""
        middle = saved["middle"]
        d = self._before_norm(dy, saved, 1)
        lowered = self.mlp_out.lower(d)
        glu, d_gate_up = self.kernels.glu_backward(
            self.mlp_out.input_gradient(d, lowered), saved.pop("gate_up"), self.activation
        )
        down = self.mlp_out.factor_gradients(d, glu, saved["low_down"], lowered)
        del glu  # what is not read again is let go: on a device the peak is here
        lowered = self.mlp_in.lower(d_gate_up)
        h, _ = self.mlp_norm.forward(middle) if self.mlp_in.factors else (middle, None)
        mlp = self.mlp_in.factor_gradients(d_gate_up, h, saved["low_mlp"], lowered)
        d_h = self.mlp_in.input_gradient(d_gate_up, lowered)
        del h, d_gate_up
        d_middle = self.mlp_norm.backward(d_h, middle, saved["mlp_rstd"], dy)
        del d_h
        d = self._before_norm(d_middle, saved, 0)
        lowered = self.attention_out.lower(d)
        mixed, qkv = saved["mixed"], saved["qkv"]
        out = self.attention_out.factor_gradients(
            d, mixed if output_rows is None else mixed[output_rows], saved["low_out"], lowered
        )
        d_mixed = self.attention_out.input_gradient(d, lowered)
        if output_rows is not None:
            d_mixed, d_middle = (_scattered(part, output_rows, len(x)) for part in (d_mixed, d_middle))
        rotary_input = qkv if self.head_norms is None else self.head_norms.forward(qkv)
        d_qkv = self.kernels.attention_backward(d_mixed, rotary_input, mixed, saved["lse"], geometry)
        if self.head_norms is not None:
            d_qkv = self.head_norms.backward(d_qkv, qkv)
        lowered = self.attention_in.lower(d_qkv)
        h, _ = self.norm.forward(x) if self.attention_in.factors else (x, None)
        first = self.attention_in.factor_gradients(d_qkv, h, saved["low_in"], lowered)
        dx = None
        if want_dx:
            dx = self.norm.backward(self.attention_in.input_gradient(d_qkv, lowered), x, saved["rstd"], d_middle)
        return dx, [*first, *out, *mlp, *down]


class _BlockNode(torch.autograd.Function):
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
        ctx.block, ctx.geometry, ctx.output_rows, ctx.saved = (
            block,
            geometry,
            output_rows,
            None if recompute else saved,
        )
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
            dy.contiguous(), x, ctx.geometry, ctx.output_rows, saved, ctx.needs_input_grad[0]
        )
        return (dx, None, None, None, None, *gradients)


class _HeadNode(torch.autograd.Function):
    """Hidden rows -> losses. A row's loss depends on that row alone, so its gradient is made with the logits, up to
    the factor that the backward brings, and the logits are never kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, decoder: FusedDecoder, targets: torch.Tensor) -> torch.Tensor:
        normed, rstd = decoder.norm.forward(hidden)
        needs_gradient = ctx.needs_input_grad[0]
        ctx.fast = decoder
        if decoder.mapped is not None:
            result, slope = mapped_losses(normed, decoder.mapped, targets, needs_gradient, decoder.logits_bytes)
            ctx.save_for_backward(hidden, rstd, *(() if slope is None else (slope,)))
            return result
        losses, slopes = [], []
        rows = max(1, decoder.logits_bytes // (decoder.head.shape[0] * hidden.element_size()))
        for part, part_targets in zip(normed.split(rows), targets.split(rows), strict=True):
            logits = decoder.logits(part)
            loss, gradient = decoder.kernels.cross_entropy(logits, part_targets, decoder.softcap, needs_gradient)
            losses.append(loss)
            if gradient is not None:
                slopes.append(gradient @ decoder.head)
        ctx.save_for_backward(hidden, rstd, *slopes)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        hidden, rstd, *slopes = ctx.saved_tensors
        dy = (slopes[0] if len(slopes) == 1 else torch.cat(slopes)) * d.to(hidden.dtype)[:, None]
        return ctx.fast.norm.backward(dy, hidden, rstd), None, None


class FusedDecoder:
    """A causal language model of a known family as blocks. Raises Unsupported, with the reason, for any other.

    model: transformers' module, adapters in place and without PEFT's shell (`transformers_backend.without_peft`), or a
    device's own of the same parts (`models/mmap_llama.py`): neither transformers nor peft is imported for it.
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
        self.softcap = model.config.final_logit_softcapping if family.softcaps else None
        self.mapped = head if isinstance(head, MappedLinear) else None
        if self.mapped is not None and self.softcap:
            raise Unsupported("a mapped LM head whose logits are capped")
        adapted = [
            index for index, block in enumerate(self.blocks) if any(part.requires_grad for part in block.parameters)
        ]
        # what makes the inputs (a projector of media) is learnt through every block
        self.lowest = 0 if inputs else min(adapted, default=len(self.blocks))
        covered = {
            id(parameter) for parameter in [*inputs, *(part for block in self.blocks for part in block.parameters)]
        }
        if uncovered := [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in covered
        ]:
            raise Unsupported(f"{uncovered[0]} is trained, which lies outside the blocks' linear modules")

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, D) -> (N, V), in the same room every time: pages of that size are costly to get anew."""
        if self._logits is None or len(self._logits) < len(x):
            self._logits = x.new_empty(len(x), len(self.head))
        return torch.mm(x, self.head.T, out=self._logits[: len(x)])

    @staticmethod
    def _check(family: DecoderFamily, inner: Any, body: Any, head: Any) -> None:
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
        """(S,) losses in nats of the supervised tokens of a pack, as `transformers_backend.pack_losses` gives."""
        geometries = self.geometries(batch)
        x = self.embed(batch.ids[0])
        with torch.no_grad():
            x = self.frozen(x, geometries) if self.lowest else x
        return self.tuned(x, batch, geometries)

    def geometries(self, batch: Pack) -> list[Geometry]:
        """How each layer attends over this pack."""
        layout = AttentionLayout(batch.segments, batch.rows, batch.tokens)
        like = torch.empty(0, dtype=self.dtype, device=batch.ids.device)
        turns: dict[str, list[torch.Tensor]] = {}
        result = []
        for block in self.blocks:
            if block.rope_kind not in turns:
                kind = (block.rope_kind,) if block.rope_kind else ()
                turns[block.rope_kind] = [part[0] for part in self.rope(like, batch.positions, *kind)]
            cos, sin = turns[block.rope_kind]
            result.append(Geometry(block.shape, block.width, cos, sin, layout))
        return result

    def frozen(self, x: torch.Tensor, geometries: Sequence[Geometry]) -> torch.Tensor:
        """(T, D) embeddings -> (T, D) input of the lowest adapted layer. Call under no_grad."""
        for block, geometry in zip(self.blocks[: self.lowest], geometries, strict=False):
            x = block.forward(x, geometry, None, {})
        return x

    def tuned(self, x: torch.Tensor, batch: Pack, geometries: Sequence[Geometry]) -> torch.Tensor:
        """(T, D) input of the lowest adapted layer -> (S,) losses, differentiable."""
        output_rows, inverse = torch.unique(batch.predict, return_inverse=True)
        for index in range(self.lowest, len(self.blocks)):
            block, is_last = self.blocks[index], index == len(self.blocks) - 1
            block_rows = output_rows if is_last else None
            x = _BlockNode.apply(x, block, geometries[index], block_rows, self.recompute, *block.parameters)
        if self.lowest == len(self.blocks):
            x = x[output_rows]
        return _HeadNode.apply(x[inverse], self, batch.targets)


def _scattered(part: torch.Tensor, output_rows: torch.Tensor, rows: int) -> torch.Tensor:
    return part.new_zeros(rows, part.shape[1]).index_copy_(0, output_rows, part)
