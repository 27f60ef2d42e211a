"""Similarity of what tuning changed in the hidden states of replies (RepSim, arXiv:2409.19998).

A row's feature is the hidden state of the tuned model minus that of the base, averaged over the positions that predict
its reply, at a middle and at a late layer. Rows and a reply whose states tuning moved in the same direction are alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sartor.models.losses import transformers_backend
from sartor.models.losses.fused_decoder import DecoderBlock, FusedDecoder
from sartor.models.losses.loss_backend import PACK_TOKENS, FusedBackend
from sartor.models.packing import Pack, TokenizedExample, micro_batches, pack
from sartor.trace.traced_model import SignedSequence, TracedModel

Array = np.ndarray[Any, np.dtype[Any]]
# of the layers, from the input
_MIDDLE, _LATE = 0.5, 0.7


def chosen_layers(model: TracedModel) -> list[int]:
    """Return the indices of the middle and the late layer whose outputs are compared."""
    layers = model.model.config.get_text_config().num_hidden_layers
    return sorted({int(layers * share) for share in (_MIDDLE, _LATE)})


def changes(model: TracedModel, items: Sequence[Sequence[SignedSequence]]) -> Array:
    """Return (n, layers * D): mean change of the hidden states at each chosen layer, one layer after another.

    items: sequences of each row or reply. Those that tuning made less likely do not count; an item without others has
    zeros.
    """
    indices, sequences = [], []
    for index, item in enumerate(items):
        for sequence in item:
            if sequence.sign > 0:
                indices.append(index)
                sequences.append(sequence.tokens)
    layers = chosen_layers(model)
    size = len(layers) * model.model.config.get_text_config().hidden_size
    result, counts = np.zeros((len(items), size), np.float32), np.zeros(len(items), np.float32)
    if not sequences:
        return result
    tuned = mean_states(model, sequences, layers, is_tuned=True)
    base = mean_states(model, sequences, layers, is_tuned=False)
    np.add.at(result, indices, tuned - base)
    np.add.at(counts, indices, 1.0)
    mean: Array = result / np.maximum(counts, 1.0)[:, None]
    return mean


@torch.no_grad()
def mean_states(
    model: TracedModel, sequences: Sequence[TokenizedExample], layers: Sequence[int], *, is_tuned: bool
) -> Array:
    """Return (n, layers * D) mean hidden states over the positions that predict a supervised token.

    is_tuned: false for the base without the adapter.
    """
    model.model.eval()
    backend = model.backend
    positions = {id(sequence): index for index, sequence in enumerate(sequences)}
    width = model.model.config.get_text_config().hidden_size
    result = np.zeros((len(sequences), len(layers) * width), np.float32)
    is_packed = backend.name != "one-row"
    batches = micro_batches(sequences, PACK_TOKENS, share=True) if is_packed else [[row] for row in sequences]
    for rows in batches:
        batch = pack(rows, model.base.device, share=is_packed)
        if isinstance(backend, FusedBackend):
            states = _fused_states(backend.fast, batch, layers, is_tuned=is_tuned)
        else:
            with contextlib.nullcontext() if is_tuned else model.model.disable_adapter():
                states = _states(model, rows, batch, layers)
        owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(batch.supervised)).to(states.device)
        sums = torch.zeros(len(rows), states.shape[1], device=states.device)
        sums.index_add_(0, owners, states[batch.predict])
        counts = torch.tensor(batch.supervised, device=states.device).clamp_min(1)[:, None]
        result[[positions[id(row)] for row in rows]] = (sums / counts).cpu().numpy()
    return result


def _fused_states(fast: FusedDecoder, batch: Pack, layers: Sequence[int], *, is_tuned: bool) -> torch.Tensor:
    """Return (T, layers * D) outputs of the layers for a pack, fp32, by the hand-written forward pass."""
    x, outputs = fast.embed(batch.ids[0]), []
    for index, (block, geometry) in enumerate(zip(fast.blocks, fast.geometries(batch), strict=True)):
        with contextlib.nullcontext() if is_tuned else _without_factors(block):
            x = block.forward(x, geometry, None, {})
        if index in layers:
            outputs.append(x.float())
        if index == max(layers):
            break
    return torch.cat(outputs, 1)


@contextlib.contextmanager
def _without_factors(block: DecoderBlock) -> Iterator[None]:
    """Let a block compute as the base does inside the `with` block."""
    parts = (block.attention_in, block.attention_out, block.mlp_in, block.mlp_out)
    factors = [part.factors for part in parts]
    for part in parts:
        part.factors = []
    try:
        yield
    finally:
        for part, own in zip(parts, factors, strict=True):
            part.factors = own


def _states(model: TracedModel, rows: Sequence[TokenizedExample], batch: Pack, layers: Sequence[int]) -> torch.Tensor:
    """Return (T, layers * D) outputs of the layers for a pack, fp32, by transformers' own module."""
    outputs: dict[int, torch.Tensor] = {}
    with _listening(model, layers, outputs):
        if model.backend.name != "one-row":
            with transformers_backend.packing(model.model):
                transformers_backend.pack_losses(model.model, batch)
        else:
            transformers_backend.row_losses(model.model, rows, model.base.device)
    return torch.cat([outputs[layer].flatten(0, -2).float() for layer in layers], 1)


@contextlib.contextmanager
def _listening(model: TracedModel, layers: Sequence[int], outputs: dict[int, torch.Tensor]) -> Iterator[None]:
    """Collect the outputs (1, T, D) of layers inside the `with` block."""
    modules = transformers_backend.without_peft(model.model).get_decoder().layers

    def listen(layer: int) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [modules[layer].register_forward_hook(listen(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
