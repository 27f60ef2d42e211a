"""The account says what dp-accounting says, lies between an exact lower and a textbook upper bound, and refuses what is over."""

from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from sartor.core.errors import ArtifactError, BudgetError, ConfigError, ConflictError, ExtraError
from sartor.federate.privacy.accountant import (
    SAMPLED_ORDERS,
    Account,
    PrivacyBudget,
    Spending,
    calibrated,
    epsilon_of,
    most_times,
    noise_utility,
)

dp_accounting = pytest.importorskip("dp_accounting", reason="pip install 'sartor[federated]'")
DELTA = 1e-5


def exact_gaussian(noise: float, delta: float) -> float:
    """Balle & Wang 2018 (arXiv:1805.06530), theorem 8, for one Gaussian release."""

    def over(epsilon: float) -> float:
        first = norm.cdf(0.5 / noise - epsilon * noise)
        return float(first - math.exp(epsilon) * norm.cdf(-0.5 / noise - epsilon * noise) - delta)

    return float(brentq(over, 0, 500))


@pytest.mark.parametrize(
    ("noise", "fraction", "times"), [(1.0, 1.0, 1), (4.0, 1.0, 50), (1.1, 0.01, 1000), (0.8, 0.2, 30)]
)
def test_epsilon_is_the_librarys(noise: float, fraction: float, times: int) -> None:
    event = dp_accounting.GaussianDpEvent(noise)
    event = event if fraction == 1 else dp_accounting.PoissonSampledDpEvent(fraction, event)
    reference = (
        dp_accounting.rdp.RdpAccountant(None if fraction == 1 else SAMPLED_ORDERS)
        .compose(event, times)
        .get_epsilon(DELTA)
    )
    finer = dp_accounting.rdp.RdpAccountant().compose(event, times).get_epsilon(DELTA)
    assert finer <= reference <= 1.01 * finer
    assert epsilon_of([Spending("all", noise, fraction, times)], DELTA) == pytest.approx(reference, rel=1e-12)
    if times <= 50:
        one_by_one = [Spending(f"r{place}", noise, fraction) for place in range(times)]
        assert epsilon_of(one_by_one, DELTA) == pytest.approx(reference, rel=1e-12)


@pytest.mark.parametrize(("noise", "times"), [(0.7, 1), (1.0, 1), (5.0, 20)])
def test_epsilon_is_above_the_exact_one_and_below_the_textbooks(noise: float, times: int) -> None:
    found = epsilon_of([Spending("all", noise, 1.0, times)], DELTA)
    together = noise / math.sqrt(times)
    rho = 1 / (2 * together**2)
    assert exact_gaussian(together, DELTA) <= found <= rho + 2 * math.sqrt(rho * math.log(1 / DELTA))


def test_a_sample_amplifies_and_no_noise_is_no_privacy() -> None:
    assert epsilon_of([Spending("a", 1.0, 0.01, 10)], DELTA) < 0.2 * epsilon_of([Spending("a", 1.0, 1.0, 10)], DELTA)
    assert epsilon_of([], DELTA) == 0 and epsilon_of([Spending("a", 0.0)], DELTA) == math.inf


@pytest.mark.parametrize(
    ("epsilon", "times", "fraction"), [(8.0, 20, 1.0), (1.0, 5, 1.0), (2.0, 200, 0.05), (300.0, 1, 1.0)]
)
def test_calibrated_noise_just_fits(epsilon: float, times: int, fraction: float) -> None:
    budget = PrivacyBudget(epsilon, DELTA)
    noise = calibrated(budget, times, fraction)
    assert epsilon_of([Spending("all", noise, fraction, times)], DELTA) <= epsilon
    assert epsilon_of([Spending("all", 0.98 * noise, fraction, times)], DELTA) > epsilon
    assert most_times(budget, Spending("one", noise, fraction)) >= times


def test_round_over_budget_is_refused_with_noise_that_fits(tmp_path: Path) -> None:
    """The account stays as it was; the noise_multiplier of the remedy is accepted."""
    account = Account(tmp_path / "account.json", PrivacyBudget(3.0, DELTA))
    noise = calibrated(account.budget, 4)
    spent = [account.spend(Spending(f"round-{place}", noise)) for place in range(4)]
    assert spent == sorted(spent) and account.epsilon() == spent[-1] <= 3.0
    assert account.remaining(Spending("next", noise)) == 0
    before = account.file.read_bytes()
    with pytest.raises(
        BudgetError, match=r"round-4 would bring epsilon from 3 to 3\.\d+; the budget is 3 .*"
    ) as refused:
        account.spend(Spending("round-4", noise))
    assert account.file.read_bytes() == before
    assert "noise_multiplier=" in refused.value.remedy
    enough = float(refused.value.remedy.split("=")[1].split(" ")[0])
    assert account.spend(Spending("round-4", enough + 1e-3)) <= 3.0
    with pytest.raises(BudgetError, match="infinite|inf"):
        account.spend(Spending("round-5", 0.0))


def test_of_several_updates_the_remedy_says_how_many_fit(tmp_path: Path) -> None:
    account = Account(tmp_path / "account.json", PrivacyBudget(1.0, DELTA))
    asked = Spending("local", 1.0, 0.01, 100_000)
    with pytest.raises(BudgetError) as refused:
        account.spend(asked)
    fewer = int(refused.value.remedy.split("=")[1].split(" ")[0])
    assert account.spend(Spending("local", 1.0, 0.01, fewer)) <= 1.0
    assert account.remaining(Spending("next", 1.0, 0.01)) == 0


def test_reopened_account_charges_a_resumed_round_once(tmp_path: Path) -> None:
    """The same round with other noise, or an account with another budget, is a ConflictError."""
    file, budget = tmp_path / "deep" / "account.json", PrivacyBudget(8.0, DELTA)
    first = Account(file, budget).spend(Spending("round-1", 2.0))
    again = Account(file, budget)
    assert again.spend(Spending("round-1", 2.0)) == first == again.epsilon()
    assert [one.name for one in again.spent()] == ["round-1"] and json.loads(file.read_text())["schema"] == 1
    with pytest.raises(ConflictError, match="round-1 was spent as"):
        again.spend(Spending("round-1", 1.9))
    with pytest.raises(ConflictError, match="begun with epsilon 8"):
        Account(file, PrivacyBudget(9.0, DELTA))


def test_two_who_spend_at_once_cannot_both_have_the_last_of_it(tmp_path: Path) -> None:
    budget = PrivacyBudget(2.0, DELTA)
    noise = calibrated(budget, 3)
    Account(tmp_path / "a.json", budget)
    done: list[str] = []

    def spend(who: int) -> None:
        account = Account(tmp_path / "a.json", budget)
        for place in range(3):
            try:
                account.spend(Spending(f"{who}-{place}", noise))
                done.append(f"{who}-{place}")
            except BudgetError:
                pass

    threads = [threading.Thread(target=spend, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3 and {one.name for one in Account(tmp_path / "a.json", budget).spent()} == set(done)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"schema": 9}', '{"schema": 1, "kind": "privacy-account", "budget": {}, "spent": []}'],
)
def test_what_is_no_account_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ArtifactError, match="no privacy account"):
        Account(tmp_path / "a.json", PrivacyBudget(8.0))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError):
            PrivacyBudget(wrong)
    for wrong in (
        {"noise_multiplier": -1.0},
        {"noise_multiplier": 1.0, "fraction": 0.0},
        {"noise_multiplier": 1.0, "times": 0},
    ):
        with pytest.raises(ConfigError):
            Spending("a", **wrong)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ExtraError, match="dp-accounting"):
        epsilon_of([Spending("a", 1.0)], DELTA)


def test_few_clients_are_told_that_nothing_is_left() -> None:
    few = noise_utility(PrivacyBudget(8.0), rounds=20, clients=8, values=1_200_000)
    assert few.noise_to_signal == pytest.approx(few.noise_multiplier * 1_200_000**0.5 / 8)
    assert "nothing will be learnt" in str(few) and f"{few.clients_needed:,}" in str(few)
    many = noise_utility(PrivacyBudget(8.0), rounds=20, clients=few.clients_needed, values=1_200_000)
    assert many.noise_to_signal == pytest.approx(1, rel=1e-3) and "can be learnt" in str(many)
    assert noise_utility(PrivacyBudget(8.0), 20, 8, 1_200_000, sharers=2).noise_to_signal == pytest.approx(
        2 * few.noise_to_signal
    )
