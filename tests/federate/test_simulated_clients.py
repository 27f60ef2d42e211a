"""Golden: a loss that explodes in a client's tuning is told in short: without this machine's paths and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import ModelError
from sartor.federate.recipe import FederateRecipe, load
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.simulated_clients import Clients, open_clients
from sartor.personalization.stacked_adapter import StackedAdapter
from sartor.tune.recipe import StopCriteria
from sartor.tune.training_loop import TrainingRun
from tuning_rounds import manifest


@pytest.fixture
def people(
    tiny_base: Path, dataset: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> tuple[FederateRecipe, Clients]:
    """Clients whose losses are said to be NaN."""
    said = {
        "base": str(tiny_base),
        "data": {"path": str(dataset)},
        "method": {"rank": 4, "alpha": 8},
        "rounds": 3,
        "local": {"updates": 1},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
    }
    check = TrainingRun._check

    def check_nan(self: TrainingRun, rows: Any, loss: float, norm: float) -> None:
        check(self, rows, float("nan"), 0.5)

    monkeypatch.setattr(TrainingRun, "_check", check_nan)
    asked = load(said)
    return asked, open_clients(asked, [dataset], None)


def test_exploded_loss_of_a_round_is_told_in_short(people: tuple[FederateRecipe, Clients]) -> None:
    asked, clients = people
    shared = clients.resident.current_factors()
    with pytest.raises(ModelError) as caught:
        LoraTask(clients.resident, clients.rows["client-0"]).update(manifest(asked, clients, shared, 2), shared)
    assert caught.value.problem == "round 2: update 1: the loss is nan, the gradient's norm 0.5"
    assert caught.value.remedy == "lower optimizer.learning_rate, or look at this client's rows"


def test_exploded_loss_of_own_ranks_is_told_in_short(people: tuple[FederateRecipe, Clients]) -> None:
    _, clients = people
    stack = StackedAdapter.open(clients.resident, clients.resident.current_factors(), 2)
    with pytest.raises(ModelError) as caught:
        stack.tuned(clients.rows["client-0"], stack.start, stack.personal_ranks, StopCriteria(updates=1), 1e-2)
    assert caught.value.problem == "tuning of one's own: update 1: the loss is nan, the gradient's norm 0.5"
    assert caught.value.remedy == "a lower learning rate, or look at these rows"
