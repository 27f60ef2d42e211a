"""Whatever the mode, what it makes is the mean of the clients' products, or it says that it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from adapters_of import WHOLE, Q, V, shared, trained, true_products
from sartor.core import config
from sartor.core.errors import ConfigError, InputError
from sartor.federate import aggregation
from sartor.federate.aggregation import Alternate, AnyMode, Combined, FactorMean, FreezeA, Mode, Residual, fold
from sartor.federate.updates import Update, mean, mean_of, weighted
from sartor.models import lora_tensors
from sartor.models.lora_tensors import A, B, add_changes, flat, modules, pair, unflat

MODES = [member() for member in get_args(AnyMode)]
EXACT = [mode for mode in MODES if mode.is_exact]
LINEAR = [mode for mode in MODES if mode.is_linear]
every, exact, linear = (
    pytest.mark.parametrize("mode", those, ids=lambda mode: mode.kind) for those in (MODES, EXACT, LINEAR)
)


@dataclass(frozen=True)
class Declared:
    mode: AnyMode = FreezeA()


def round_of(mode: Mode, number: int, clients: int, seed: int, size: float = 1.0, step: float = 0.3) -> tuple:
    """(shared, what each client ended with, their updates)."""
    source = np.random.default_rng(seed)
    held = shared(seed=seed, size=size)
    ends = [trained(mode, held, number, seed * 1000 + place, step=step) for place in range(clients)]
    counts = source.integers(1, 500, clients)
    sent = [Update(f"c{place}", mode.upload(held, end, number), int(counts[place])) for place, end in enumerate(ends)]
    return held, ends, sent


def error(mode: Mode, held: dict, ends: list, sent: list[Update], number: int) -> float:
    """Relative Frobenius distance of the whole products, worked out here."""
    made = mode.combine(held, sent, number)
    wanted = true_products(ends, [one.examples for one in sent], held)
    off = whole = 0.0
    for module, product in wanted.items():
        found = pair(made.tensors, module).product
        if module in made.residual:
            found = found + made.residual[module].product
        off += float(np.square(found - product).sum())
        whole += float(np.square(product).sum())
    return (off / whole) ** 0.5


@every
def test_a_mode_is_chosen_by_its_kind(mode: Mode) -> None:
    assert config.load(Declared, {"mode": mode.kind}).mode == mode


@exact
@settings(max_examples=25, deadline=None)
@given(
    number=some.integers(1, 6),
    clients=some.integers(1, 12),
    seed=some.integers(0, 10_000),
    size=some.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    step=some.sampled_from([1e-4, 0.3, 5.0]),
)
def test_it_makes_the_mean_of_the_products(
    mode: Mode, number: int, clients: int, seed: int, size: float, step: float
) -> None:
    if not size and mode.kind == "alternate" and number % 2 == 0:
        size = 1.0  # A alone moves, and all products would be zero
    held, ends, sent = round_of(mode, number, clients, seed, size, step)
    assert error(mode, held, ends, sent, number) <= 1e-6


@settings(max_examples=10, deadline=None)
@given(seed=some.integers(0, 10_000))
def test_the_mean_of_factors_is_far_from_it(seed: int) -> None:
    held, ends, sent = round_of(FactorMean(), 1, 8, seed, size=0.0)  # B begins at zero, as PEFT has it
    assert error(FactorMean(), held, ends, sent, 1) > 0.05


@every
def test_the_canary_tells_what_the_whole_products_tell(mode: Mode) -> None:
    held, ends, sent = round_of(mode, 3, 6, 4, step=1.0)
    made = mode.combine(held, sent, 3)
    whole = aggregation.seen_error(aggregation.draw(held, 0, columns=0), mode, held, sent, made, 3)
    assert whole == pytest.approx(error(mode, held, ends, sent, 3), abs=5e-7)
    some_inputs = aggregation.seen_error(aggregation.draw(held, 0), mode, held, sent, made, 3)
    assert some_inputs <= 1e-6 if mode.is_exact else some_inputs > 0.05


def test_canary_is_reproducible_and_detects_inexact_mean() -> None:
    """An exact mean has an error of at most 1e-6, a changed sum more than 1e-3."""
    held, ends, sent = round_of(FreezeA(), 1, 4, 9)
    canary, again = aggregation.draw(held, 7, most_modules=1), aggregation.draw(held, 7, most_modules=1)
    assert list(canary.inputs) == list(again.inputs) and len(canary.inputs) == 1
    assert all(np.array_equal(value, again.inputs[name]) for name, value in canary.inputs.items())
    canary = aggregation.draw(held, 7)
    answers = [Update(one.client, canary.responses(end), one.examples) for one, end in zip(sent, ends, strict=True)]
    made = FreezeA().combine(held, sent, 1)
    assert aggregation.exactness_error(canary, made, mean(answers)) <= 1e-6
    wrong = Combined(add_changes(made.tensors, {V + B: np.full((16, 8), 0.05)}))
    assert aggregation.exactness_error(canary, wrong, mean(answers)) > 1e-3
    assert (
        aggregation.exactness_error(
            canary, Combined(held), {name: 0 * value for name, value in canary.responses(held).items()}
        )
        == np.inf
    )
    with pytest.raises(ConfigError, match="no factors"):
        aggregation.draw({WHOLE: held[WHOLE]}, 0)


@linear
@settings(max_examples=15, deadline=None)
@given(seed=some.integers(0, 10_000), number=some.integers(1, 4), clients=some.integers(1, 9))
def test_a_linear_mode_needs_the_sums_alone(mode: Mode, seed: int, number: int, clients: int) -> None:
    held, _, sent = round_of(mode, number, clients, seed)
    seen = mode.combine(held, sent, number).tensors
    summed: dict[str, np.ndarray] = {}
    for one in sent:
        for name, value in weighted(one.tensors, one.examples / 500).items():
            summed[name] = summed.get(name, 0) + value.astype(np.float64)
    unseen = mode.applied(held, mean_of(summed), number)
    assert all(np.allclose(unseen[name], value, atol=2e-6 * np.abs(value).max()) for name, value in seen.items())


def test_residual_mode_adds_exact_residual_to_frozen_weight() -> None:
    """Folded weight plus mean factors is the true mean; for 5 clients the residual has 6 ranks of 8."""
    mode = Residual()
    held, ends, sent = round_of(mode, 1, 5, 2)
    made = mode.combine(held, sent, 1)
    frozen, scale = np.random.default_rng(0).standard_normal((32, 24)).astype(np.float32), 2.0
    there = fold(frozen, made.residual[Q], scale) + scale * pair(made.tensors, Q).product
    wanted = frozen + scale * true_products(ends, [one.examples for one in sent], held)[Q]
    assert np.linalg.norm(there - wanted) <= 1e-6 * np.linalg.norm(wanted)
    assert made.residual[Q].b.shape == (32, 6 * 8), "one rank R a client, and one for the means"


@every
def test_the_upload_of_one_client_is_its_adapter(mode: Mode) -> None:
    held, ends, sent = round_of(mode, 2, 1, 5)
    back = mode.applied(held, sent[0].tensors, 2)
    assert all(np.allclose(back[name], value, atol=1e-6) for name, value in ends[0].items())
    assert {name for name in held if mode.trains(name, 2)} == set(sent[0].tensors)


def test_halves_alternate_and_frozen_a_never_moves() -> None:
    trains = [[half for half in (A, B) if Alternate().trains(Q + half, number)] for number in (1, 2, 3)]
    assert trains == [[B], [A], [B]]
    assert all(Alternate().trains(WHOLE, number) and FreezeA().trains(WHOLE, number) for number in (1, 2))
    assert not any(FreezeA().trains(Q + A, number) for number in range(5))


@pytest.mark.parametrize("mode", [FreezeA(), Alternate()], ids=lambda mode: mode.kind)
def test_what_a_round_holds_still_may_not_have_moved(mode: Mode) -> None:
    held = shared()
    moved = add_changes(held, {Q + A: np.ones_like(held[Q + A])})
    with pytest.raises(InputError, match="round 1 holds still"):
        mode.upload(held, moved, 1)
    with pytest.raises(InputError, match="not in both"):
        mode.upload(held, {name: value for name, value in held.items() if name != WHOLE}, 1)


@pytest.mark.parametrize("mode", [FreezeA(), Alternate()], ids=lambda mode: mode.kind)
@settings(max_examples=20, deadline=None)
@given(
    seed=some.integers(0, 10_000),
    number=some.integers(1, 4),
    own=some.lists(some.integers(1, 8), min_size=1, max_size=6),
)
def test_clients_of_unequal_ranks_have_the_same_exact_mean(mode: Mode, seed: int, number: int, own: list[int]) -> None:
    held = shared(seed=seed)
    ends = [trained(mode, held, number, seed + place, rank) for place, rank in enumerate(own)]
    assert [end[Q + A].shape[0] for end in ends] == own
    sent = [Update(f"c{place}", mode.upload(held, end, number), place + 1) for place, end in enumerate(ends)]
    assert error(mode, held, ends, sent, number) <= 1e-6
    highest = max(own)
    after = mode.combine(held, sent, number).tensors
    assert np.array_equal(after[Q + B][:, highest:], held[Q + B][:, highest:]), "ranks that nobody trained stay"


def test_a_cut_adapter_and_its_tail_are_the_whole() -> None:
    held = shared()
    own, tail = lora_tensors.split_ranks(held, 3)
    assert np.allclose(pair(own, Q).product + pair(tail, Q).product, pair(held, Q).product, atol=1e-5)
    assert modules(tail) == modules(held) and lora_tensors.split_ranks(held, 8)[1] == {}
    assert lora_tensors.alpha_of(16, 8, 3) / 3 == 16 / 8
    back = lora_tensors.pad_ranks(own, held)
    assert all(np.array_equal(back[name], value) for name, value in held.items())
    for wrong in (
        shared(rank=9),
        {**own, Q + B: own[Q + B][:, :2]},
        {"other" + A: own[Q + A], "other" + B: own[Q + B]},
    ):
        with pytest.raises(InputError):
            lora_tensors.pad_ranks(wrong, held)
    with pytest.raises(ConfigError, match="rank 0"):
        lora_tensors.split_ranks(held, 0)


@every
def test_an_update_that_cannot_be_used_is_refused_by_name(mode: Mode) -> None:
    held, _, sent = round_of(mode, 1, 2, 3)
    good, bad = sent
    name = Q + B
    spoilt = {
        "not finite": {**bad.tensors, name: np.full_like(bad.tensors[name], np.nan)},
        "shape": {**bad.tensors, name: bad.tensors[name][:-1]},
        "lacks": {other: value for other, value in bad.tensors.items() if other != name},
        "unasked": {**bad.tensors, "more": np.zeros(3, np.float32)},
    }
    for said, tensors in spoilt.items():
        with pytest.raises(InputError, match=f"'c1'.*{said}"):
            mode.combine(held, [good, Update("c1", tensors, 3)], 1)
    with pytest.raises(InputError, match="0 examples"):
        mode.combine(held, [good, Update("c1", bad.tensors, 0)], 1)
    with pytest.raises(InputError, match="two updates"):
        mode.combine(held, [good, good], 1)
    with pytest.raises(ConfigError, match="without one update"):
        mode.combine(held, [], 1)


def test_single_factor_is_refused_and_flat_vector_round_trips() -> None:
    """modules() needs both factors of a pair; unflat() restores what flat() made."""
    held = shared()
    with pytest.raises(InputError, match="one of its two factors"):
        modules([Q + A])
    back = unflat(flat(held), held)
    assert all(np.array_equal(back[name], value) for name, value in held.items())
