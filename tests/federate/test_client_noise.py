"""The noise has the distribution that it is said to have, shares add up to what was paid for, and steps that are too coarse are refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import chisquare

from sartor.core.errors import ConfigError, InputError
from sartor.federate.privacy import client_noise
from sartor.federate.privacy.client_noise import ClientNoise, discrete_gaussian, step_of
from sartor.models.lora_tensors import norm


def seeded(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.3, 12.0])
def test_frequencies_are_those_of_the_discrete_gaussian(sigma: float) -> None:
    drawn = discrete_gaussian(sigma, 40_000, seeded(1))
    reach = max(2, math.floor(2.5 * sigma))
    grid = np.arange(-40 * math.ceil(sigma), 40 * math.ceil(sigma) + 1)
    chances = np.exp(-(grid.astype(float) ** 2) / (2 * sigma**2))
    chances /= chances.sum()
    inside = np.abs(grid) <= reach
    counts = np.array([(drawn == value).sum() for value in grid[inside]])
    wanted = 40_000 * chances[inside]
    both = np.append(counts, 40_000 - counts.sum()), np.append(wanted, 40_000 - wanted.sum())
    keep = both[1] > 5
    assert chisquare(both[0][keep], both[1][keep] * both[0][keep].sum() / both[1][keep].sum()).pvalue > 1e-3


def test_a_wide_one_has_its_moments_and_an_odd_count() -> None:
    sigma = 3.7e7
    drawn = discrete_gaussian(sigma, 20_001, seeded(2))
    assert drawn.shape == (20_001,) and drawn.dtype == np.int64
    assert drawn.std() == pytest.approx(sigma, rel=0.02) and abs(drawn.mean()) < 4 * sigma / 20_001**0.5
    assert not discrete_gaussian(0.0, 5).any() and discrete_gaussian(2.0, 0).shape == (0,)
    assert not np.array_equal(discrete_gaussian(50.0, 64), discrete_gaussian(50.0, 64)), "the system's randomness"
    with pytest.raises(ConfigError, match="units of the ring"):
        discrete_gaussian(2.0**41, 1)


def test_remainders_favour_nobody() -> None:
    most = client_noise._below(3, 3, lambda count: np.array([2**64 - 1, 2**64 - 2, 5], np.uint64).tobytes())
    assert most.tolist() == [2, 2], "the last of 2^64 = 3 k + 1 is left out"
    assert set(client_noise._below(2**20, 1000, seeded(0)) < 2**20) == {True}


def upload(seed: int, size: float, values: int = 6000) -> dict[str, np.ndarray]:
    source = np.random.default_rng(seed)
    drawn = source.standard_normal(values)
    drawn *= size / np.linalg.norm(drawn)
    return {"b": drawn[: values // 2].reshape(-1, 10).astype(np.float32), "w": drawn[values // 2 :].astype(np.float32)}


def summed(uploads: list[dict], how: ClientNoise) -> dict[str, np.ndarray]:
    """As the ring has it: modulo 2^32, and back to signed."""
    total: dict[str, np.ndarray] = {}
    for place, one in enumerate(uploads):
        for name, value in how.encoded(one, seeded(place)).items():
            total[name] = (total.get(name, np.zeros_like(value)) + value) % 2**32
    return {name: np.where(value >= 2**31, value - 2**32, value) for name, value in total.items()}


def test_ring_sum_is_clipped_mean_plus_calibrated_noise() -> None:
    """The noise is what was accounted if only the sharers stay, and more if more clients do."""
    clients, sharers, clip, multiplier = 9, 6, 2.0, 0.7
    step = step_of(clip, multiplier, sharers, clients)
    how = ClientNoise(clip, multiplier, sharers, step)
    uploads = [upload(place, 1.0 if place % 2 else 50.0) for place in range(clients)]
    found = how.mean_of(summed(uploads, how), clients)
    silent = ClientNoise(clip, 0.0, sharers, step)
    plain = silent.mean_of(summed(uploads, silent), clients)
    wanted = {name: np.mean([one[name] * min(1, clip / norm(one)) for one in uploads], axis=0) for name in plain}
    assert all(np.allclose(plain[name], value, atol=1e-6) for name, value in wanted.items())
    noise_values = np.concatenate([(found[name] - plain[name]).ravel() for name in plain]) * clients
    expected = multiplier * clip * (clients / sharers) ** 0.5
    assert noise_values.std() == pytest.approx(expected, rel=0.04), (
        "more survivors than sharers: more noise than was paid for"
    )
    only = how.mean_of(summed(uploads[:sharers], how), sharers)
    least = np.concatenate(
        [(only[name] - silent.mean_of(summed(uploads[:sharers], silent), sharers)[name]).ravel() for name in plain]
    )
    assert least.std() * sharers == pytest.approx(multiplier * clip, rel=0.04)


def test_the_longest_sum_does_not_wrap_around() -> None:
    clients, clip = 12, 1.0
    one_value = [{"x": np.array([5.0], np.float32)} for _ in range(clients)]
    how = ClientNoise(clip, 1.0, clients, step_of(clip, 1.0, clients, clients))
    for seed in range(20):
        total = sum(how.encoded(one, seeded(100 * seed + place))["x"] for place, one in enumerate(one_value))
        assert abs(int(total[0])) < 2**31
        assert total[0] * how.step == pytest.approx(clients * clip, abs=6)


def test_what_it_costs_is_nearly_the_gaussians_and_never_less() -> None:
    how = ClientNoise(1.0, 1.1, 20, step_of(1.0, 1.1, 20, 30))
    assert 1.1 * 0.995 < how.effective_multiplier(2_400_000) < 1.1
    assert how.spending("round-1", 10).noise_multiplier == how.effective_multiplier(10)
    assert ClientNoise(1.0, 0.0, 20, 1e-6).effective_multiplier(10) == 0


@pytest.mark.parametrize(("step", "values", "sharers"), [(0.05, 1_000_000, 10), (1.0, 10, 50)])
def test_coarse_step_is_refused_with_a_fine_enough_step(step: float, values: int, sharers: int) -> None:
    """The remedy's step keeps more than 95 % of the noise multiplier."""
    with pytest.raises(ConfigError, match="the noise counts as") as refused:
        ClientNoise(1.0, 1.0, sharers, step).effective_multiplier(values)
    finer = float(refused.value.remedy.split(" ")[1])
    assert ClientNoise(1.0, 1.0, sharers, finer).effective_multiplier(values) > 0.95


def test_what_is_no_noise_and_no_update_is_refused() -> None:
    for wrong in ((0.0, 1.0, 1, 1.0), (1.0, -1.0, 1, 1.0), (1.0, 1.0, 0, 1.0), (1.0, 1.0, 1, 0.0)):
        with pytest.raises(ConfigError, match="is no noise"):
            ClientNoise(*wrong)
    with pytest.raises(InputError, match="norm of inf"):
        ClientNoise(1.0, 1.0, 1, 1e-6).encoded({"x": np.array([np.inf])})
    zero = ClientNoise(1.0, 0.0, 1, 1e-6).encoded({"x": np.zeros(3)})
    assert not zero["x"].any()
