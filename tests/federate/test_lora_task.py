"""Rounds whose clients protect their rows (DP-SGD), and rounds of the modes that one process alone can hold: residual, ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sartor.core import config
from sartor.core.errors import BudgetError, ConfigError, ConflictError
from sartor.federate import updates as arrays
from sartor.federate.recipe import FederateRecipe, LocalTraining, Privacy, RoundSettings, load
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules, terms_for
from sartor.federate.tuning import lora_task
from sartor.federate.tuning.lora_task import LoraTask, RowPrivacy, row_means, updates_of
from sartor.federate.tuning.simulated_clients import Clients, open_clients
from sartor.federate.tuning.simulated_rounds import compress_ranks
from sartor.federate.tuning.simulation import simulate
from sartor.models import quantization
from sartor.models.lora_tensors import A, B, LoraPair, Tensors, add_changes, modules, norm, pair, rank_of, split_ranks
from sartor.models.losses.transformers_backend import row_losses

SHARDS = {"count": 3, "alpha": 5.0}


def recipe(base: Path, dataset: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "data": {"path": str(dataset)},
        "method": {"rank": 4, "alpha": 8},
        "rounds": 2,
        "local": {"updates": 2},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
        **changes,
    }


@pytest.fixture
def people(tiny_base: Path, dataset: Path, fp32: None) -> tuple[FederateRecipe, Clients]:
    asked = load(recipe(tiny_base, dataset))
    return asked, open_clients(asked, [dataset], None)


def manifest(asked: FederateRecipe, people: Clients, shared: Tensors, number: int = 1) -> Manifest:
    resident = people.resident
    said = ClientWork(
        "lora",
        arrays.digest(arrays.pack_tensors(shared)),
        resident.ref.digest,
        resident.digest,
        config.dump(RoundSettings.of(asked)),
    )
    return Manifest(
        "test", number, "coordinator", said, terms_for(("a", "b", "c"), shared, UpdateRules(), seed="0" * 64), 0
    )


# rows


def rows_of(people: Clients) -> Any:
    return next(iter(people.rows.values()))


@pytest.fixture
def dp() -> None:
    pytest.importorskip("opacus", reason="pip install 'sartor[federated]'")
    pytest.importorskip("dp_accounting", reason="pip install 'sartor[federated]'")


def test_losses_of_padded_rows_are_those_of_single_rows(people: tuple[FederateRecipe, Clients]) -> None:
    resident, rows = people[1].resident, sorted(rows_of(people[1]).train, key=lambda row: len(row.ids))
    few = [rows[0], rows[-1], rows[1]]
    assert len({len(row.ids) for row in few}) > 1
    with torch.no_grad():
        wanted = [float(row_losses(resident.model, [row], "cpu").mean()) for row in few]
        found = row_means(resident.model, [few[0], few[1], replace(few[2], weight=0.5)], torch.device("cpu")).tolist()
    assert found == pytest.approx([wanted[0], wanted[1], 0.5 * wanted[2]], abs=1e-5)


def test_round_repeats_bitwise_per_round_number_and_secret(
    people: tuple[FederateRecipe, Clients], tmp_path: Path, dp: None
) -> None:
    """A repeated round is not charged again; the file of the secret has mode 0600."""
    asked, clients = people
    shared = clients.resident.current_factors()
    privacy = Privacy(8.0, 1e-2, "example", batch_rows=8)

    def learnt(folder: str, number: int = 1) -> dict[str, np.ndarray]:
        task = LoraTask(clients.resident, rows_of(clients), guard=RowPrivacy.open(privacy, tmp_path / folder))
        return dict(task.update(manifest(asked, clients, shared, number), shared).tensors)

    first = learnt("one")
    assert set(first) == {name for name in shared if name.endswith(B)} and norm(first) > 0
    assert (tmp_path / "one" / lora_task.SECRET).stat().st_mode & 0o777 == 0o600
    before = RowPrivacy.open(privacy, tmp_path / "one").account.epsilon()
    again = learnt("one")
    assert all(np.array_equal(again[name], value) for name, value in first.items())
    assert RowPrivacy.open(privacy, tmp_path / "one").account.epsilon() == before, "a round that is done again is paid"
    for other in (learnt("one", 2), learnt("two")):
        assert any(not np.array_equal(other[name], value) for name, value in first.items())
    with pytest.raises(ConflictError):
        RowPrivacy.open(Privacy(9.0, 1e-2, "example"), tmp_path / "one")


def test_epsilon_is_dp_accountings_of_the_whole_composition(
    people: tuple[FederateRecipe, Clients], tmp_path: Path, dp: None
) -> None:
    import dp_accounting

    asked, clients = people
    asked, rows = replace(asked, rounds=3, local=LocalTraining(epochs=2)), rows_of(clients)
    shared, count = clients.resident.current_factors(), len(rows.train)
    own = RowPrivacy.open(Privacy(50.0, 1e-3, "example", batch_rows=8, noise_multiplier=0.9), tmp_path / "own")
    settings, updates = RoundSettings.of(asked), -(-2 * count // 8)
    assert updates_of(settings.local, count, 8) == updates
    for number in (1, 2, 3):
        own.account.spend(own.spending(manifest(asked, clients, shared, number), settings, count))
    event = dp_accounting.PoissonSampledDpEvent(8 / count, dp_accounting.GaussianDpEvent(0.9))
    accountant = dp_accounting.rdp.RdpAccountant(guard_orders())
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, 3 * updates))
    assert own.account.epsilon() == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-9)
    auto = RowPrivacy.open(Privacy(4.0, 1e-3, "example", batch_rows=8), tmp_path / "auto")
    for number in (1, 2, 3):
        auto.account.spend(auto.spending(manifest(asked, clients, shared, number), settings, count))
    assert 3.8 < auto.account.epsilon() <= 4.0, "auto noise uses the budget up in all rounds, and not more"
    with pytest.raises(BudgetError):
        auto.account.spend(auto.spending(manifest(asked, clients, shared, 4), settings, count))
    few = auto.noise(settings, 3)
    assert few.batch_rows == 3 and few.fraction(3) == 1.0


def guard_orders() -> list[float]:
    from sartor.federate.privacy.accountant import SAMPLED_ORDERS

    return SAMPLED_ORDERS


def test_each_client_keeps_its_budget_and_the_worst_is_said(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None, dp: None
) -> None:
    privacy = {"level": "example", "epsilon": 6.0, "delta": 1e-2, "batch_rows": 4}
    made = simulate(recipe(tiny_base, dataset, privacy=privacy), tmp_path / "out", shards=SHARDS)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert set(line["epsilons"]) == {"client-0", "client-1", "client-2"}
        assert line["epsilon"] == max(line["epsilons"].values())
        assert line["loss_first"] is None, "the loss of rows is not private"
    assert lines[0]["epsilon"] < made.as_json()["epsilon"] == lines[-1]["epsilon"] <= 6.0
    assert made.as_json()["exactness_error"] <= 1e-6
    assert made.adapter.manifest["run"]["federated"]["rules"]["most_examples"] == 1, "a count would tell of a row"


def test_budget_too_small_for_next_round_stops_the_run(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None, dp: None
) -> None:
    """At least one of 20 rounds is done, and no adapter is written."""
    privacy = {"level": "example", "epsilon": 8.0, "delta": 1e-2, "batch_rows": 8, "noise_multiplier": 0.8}
    said: list[str] = []
    with pytest.raises(BudgetError, match="would bring epsilon from"):
        simulate(
            recipe(tiny_base, dataset, rounds=20, privacy=privacy), tmp_path / "out", shards=SHARDS, notice=said.append
        )
    rounds = [line for line in said if line.startswith("round ")]
    assert 1 <= len(rounds) < 20 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": {"name": "starter", "bits": 4}}, "not quantised"),
        ({"rules": {"noise": 1.0}}, "of the secure sum"),
        ({"rules": {"most_examples": 100}}, "tell of each row"),
        ({"method": {"rank": 8, "ranks": [4, 4, 8]}}, "clipped with the rest"),
        ({"mode": "residual", "robust": "mean"}, "clipped with the rest"),
        ({"privacy": {"epsilon": 1.0, "batch_rows": 4}}, "level is client"),
        ({"privacy": {"epsilon": 1.0, "level": "row"}}, "client | example"),
        ({"privacy": {"epsilon": 1.0, "level": "example", "max_grad_norm": 0.0}}, "max_grad_norm above 0"),
    ],
)
def test_a_recipe_whose_rows_cannot_be_private_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"base": "starter", "privacy": {"epsilon": 1.0, "level": "example"}, **changes})
    assert says in f"{caught.value.problem} {caught.value.remedy}"


def test_a_base_that_came_quantised_is_refused(
    people: tuple[FederateRecipe, Clients], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dp: None
) -> None:
    asked, clients = people
    shared = clients.resident.current_factors()
    task = LoraTask(
        clients.resident, rows_of(clients), guard=RowPrivacy.open(Privacy(8.0, 1e-2, "example"), tmp_path / "one")
    )
    monkeypatch.setattr(quantization, "bits_of", lambda model: 4)
    with pytest.raises(ConfigError, match="4 bits"):
        task.update(manifest(asked, clients, shared), shared)
    assert task.guard and task.guard.account.epsilon() == 0, "nothing was spent"


# what one process holds


def test_residual_rounds_are_exact_and_so_is_the_adapter(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None
) -> None:
    asked = recipe(tiny_base, dataset, mode="residual", robust="mean", local={"updates": 3})
    made = simulate(asked, tmp_path / "out", shards=SHARDS)
    said, factors = (
        made.as_json(),
        simulate({**asked, "mode": "factors"}, tmp_path / "factors", shards=SHARDS).as_json(),
    )
    assert said["exactness_error"] <= 1e-6 and factors["exactness_error"] > 1e-4
    assert said["metrics"]["eval_loss"]["tuned"] < said["metrics"]["eval_loss"]["base"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    means, residual = split_ranks(tensors, 4)
    assert said["trainable"] == sum(value.size for value in means.values())
    assert rank_of(residual) > 4 and norm({name: value for name, value in residual.items() if name.endswith(B)}) > 0
    config_ = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config_["lora_alpha"] / config_["r"] == pytest.approx(8 / 4) and config_["r"] == rank_of(tensors)
    assert all(means[name].shape[0 if name.endswith(A) else 1] == 4 for name in means)

    def killed(line: str) -> None:
        if line.startswith("round 1 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(asked, tmp_path / "killed", shards=SHARDS, notice=killed)
    simulate(asked, tmp_path / "killed", shards=SHARDS, resume=True)
    again = load_file(tmp_path / "killed" / "adapter_model.safetensors")
    assert all(np.array_equal(again[name], value) for name, value in tensors.items())


def test_the_residual_has_the_fewest_ranks_and_computes_the_same() -> None:
    source = np.random.default_rng(0)
    low, wide = ((source.standard_normal((k, 6)), source.standard_normal((9, k))) for k in (2, 20))
    pairs = {
        "low": LoraPair(np.concatenate([low[0]] * 3), np.concatenate([low[1]] * 3, axis=1)),
        "wide": LoraPair(*wide),
        "none": LoraPair(np.zeros((3, 6)), np.zeros((9, 3))),
    }
    found = compress_ranks(pairs)
    assert rank_of(found) == 6 and modules(found) == ["low", "none", "wide"]
    assert (np.abs(found["low" + B]).sum(0) > 0).sum() == 2 and not found["none" + B].any()
    for name, one in pairs.items():
        assert np.allclose(pair(found, name).product, one.product, atol=2e-6 * max(1.0, np.abs(one.product).max()))


def test_a_client_of_lower_rank_trains_its_own_ranks_alone(people: tuple[FederateRecipe, Clients]) -> None:
    asked, clients = people
    shared = clients.resident.current_factors()
    source = np.random.default_rng(1)
    shared = {
        name: value + 0.05 * source.standard_normal(value.shape).astype(np.float32) for name, value in shared.items()
    }
    for number, half in ((1, B), (2, A)):
        said = replace(asked, mode="alternate")
        learnt = LoraTask(clients.resident, rows_of(clients), rank=1).update(
            manifest(said, clients, shared, number), shared
        )
        for name, value in learnt.tensors.items():
            own, rest = (value[:, :1], value[:, 1:]) if half == B else (value[:1], value[1:])
            assert name.endswith(half) and own.any() and not rest.any()
    whole = LoraTask(clients.resident, rows_of(clients)).update(manifest(asked, clients, shared), shared).tensors
    assert all(value[:, 1:].any() for value in whole.values()), "the masks of one client are gone for the next"
    assert norm(add_changes(shared, whole)) != norm(shared)


def test_unequal_ranks_are_simulated_exactly(tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None) -> None:
    asked = recipe(tiny_base, dataset, method={"rank": 4, "alpha": 8, "ranks": [4, 1, 2]}, rounds=1)
    made = simulate(asked, tmp_path / "out", shards=SHARDS)
    assert made.as_json()["exactness_error"] <= 1e-6
    assert made.adapter.manifest["recipe"]["method"]["ranks"] == [4, 1, 2]
    with pytest.raises(ConfigError, match="3 ranks, and there are 4 clients"):
        simulate(asked, tmp_path / "four", shards={**SHARDS, "count": 4})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "residual"}, "robust: mean"),
        ({"mode": "residual", "robust": "median"}, "robust: mean"),
        ({"mode": "factors", "method": {"ranks": [1, 2, 3]}}, "one rank only"),
        ({"method": {"rank": 4, "ranks": [8, 4, 4]}}, "ranks of 1 to 4"),
        ({"method": {"ranks": [8, 4, 4]}, "optimizer": {"weight_decay": 0.1}}, "weight_decay"),
    ],
)
def test_what_the_modes_cannot_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"base": "starter", **changes})
    assert says in f"{caught.value.problem} {caught.value.remedy}"
