"""Changes of hidden states on replies: against transformers' own outputs, and where nothing was tuned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sartor.models.losses.loss_backend import LossOptions
from sartor.models.losses.transformers_backend import RowTransformersBackend
from sartor.trace import ensemble, hidden_states
from sartor.trace.traced_adapter import TraceQuery, open_traced
from sartor.trace.traced_model import SignedSequence, TracedModel

pytestmark = pytest.mark.usefixtures("fp32")


@pytest.fixture
def model(adapter: Path) -> TracedModel:
    return TracedModel.open(open_traced(adapter))


@torch.no_grad()
def by_transformers(model: TracedModel, sequence: SignedSequence) -> np.ndarray:
    """The mean change of one row alone, from the layers of transformers' module."""
    ids = torch.tensor([sequence.tokens.ids])
    predicting = [place - 1 for place, learnt in enumerate(sequence.tokens.learnt) if learnt and place]

    outputs: list[torch.Tensor] = []
    layers = model.model.get_base_model().model.layers
    handles = [
        layers[layer].register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for layer in hidden_states.chosen_layers(model)
    ]

    def states() -> torch.Tensor:
        outputs.clear()
        model.model(input_ids=ids)
        parts = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return torch.cat([part[0, predicting].mean(0) for part in parts])

    tuned = states()
    with model.model.disable_adapter():
        base = states()
    for handle in handles:
        handle.remove()
    return (tuned - base).numpy()


@pytest.mark.parametrize("name", ["fast", "general", "one-row"])
def test_changes_are_those_of_single_rows(model: TracedModel, name: str) -> None:
    """Packed, with shared beginnings, by each loss backend."""
    backends = {
        "fast": lambda: model.backend,
        "general": lambda: model.base.path(model.model, [model.row(0)[0].tokens], LossOptions(fast=False)),
        "one-row": lambda: RowTransformersBackend(model.model, model.base.device, ""),
    }
    model.backend = backends[name]()
    assert model.backend.name == name
    items = [model.row(index) for index in range(5)]
    found = hidden_states.changes(model, items)
    for row, (sequence,) in zip(found, items, strict=True):
        expected = by_transformers(model, sequence)
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-5)


def test_prompt_tokens_do_not_count(model: TracedModel) -> None:
    """Of a row whose first half is unlearnt, the states of the other half count alone."""
    (sequence,) = model.row(0)
    places = [place for place, learnt in enumerate(sequence.tokens.learnt) if learnt]
    half = replace(sequence.tokens, learnt=[place in places[:2] for place in range(len(sequence.tokens.ids))])
    both = hidden_states.changes(model, [[sequence], [SignedSequence(half)]])
    assert not np.allclose(both[0], both[1])
    expected = by_transformers(model, SignedSequence(half))
    np.testing.assert_allclose(both[1], expected, rtol=1e-3, atol=1e-5)


def test_untuned_factors_change_nothing(model: TracedModel) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in model.final.items()}
    model.put(zeros)
    assert not hidden_states.changes(model, [model.row(0)]).any()


def test_rejected_replies_and_empty_rows_have_no_state(model: TracedModel) -> None:
    (sequence,) = model.row(0)
    found = hidden_states.changes(model, [[], [replace(sequence, sign=-1.0)], [sequence]])
    assert not found[:2].any() and found[2].any()


def test_hidden_scores_find_a_rows_own_reply(model: TracedModel) -> None:
    *prompt, reply = model.traced.rows[4].example.messages
    scores = ensemble.hidden_scores(model.traced, [TraceQuery(tuple(prompt), reply.text)], model=model)
    assert scores.shape == (1, len(model.traced.rows)) and scores[0].argmax() == 4
