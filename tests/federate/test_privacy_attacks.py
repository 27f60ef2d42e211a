"""Attacks where the truth is known: on numbers by hand, on mechanisms whose epsilon is exact, on a learner with and without noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from sartor.core.errors import ArtifactError, ConfigError, GateError
from sartor.evaluate.audit import membership_inference
from sartor.federate.privacy import privacy_attacks
from sartor.federate.privacy.accountant import PrivacyBudget, calibrated
from sartor.federate.privacy.privacy_attacks import AttackReport, Exposure, exposure, open_report

DELTA = 1e-5


def test_membership_threshold_separates_only_learnt_rows() -> None:
    """The AUC is 0.5 for equal losses and 1 for lower losses of members; few rows show little."""
    source = np.random.default_rng(0)
    alike = membership_inference.by_threshold(source.standard_normal(2000), source.standard_normal(2000))
    assert abs(alike.auc - 0.5) < 0.03 and alike.low <= 0.01 <= alike.high
    learnt = membership_inference.by_threshold(source.normal(0, 0.1, 300), source.normal(3, 0.1, 500))
    assert learnt.auc == 1 and learnt.found_fraction == 1 and learnt.low > 0.98 and "100.0% of 300" in str(learnt)
    few = membership_inference.by_threshold(source.normal(0, 0.1, 300), source.normal(3, 0.1, 100))
    assert few.found_fraction == 1 and few.low == 0, (
        "a hundred others do not show that a threshold takes one in a hundred"
    )
    by_hand = membership_inference.by_threshold([0.0, 2.0], [1.0, 3.0])
    assert by_hand.auc == 0.75 and by_hand.found_fraction == 0.5
    assert alike.auc_low < 0.5 < alike.auc_high and alike.auc_high - alike.auc_low < 0.05
    assert by_hand.auc_low < 0.1 and by_hand.auc_high == 1, "two rows a side show little"


def test_the_interval_holds_as_often_as_it_says() -> None:
    source, held, ranked = np.random.default_rng(7), 0, 0
    true = float(norm.cdf(norm.ppf(0.01) + 1))  # members are one standard deviation lower
    for _ in range(100):
        found = membership_inference.by_threshold(source.normal(-1, 1, 200), source.normal(0, 1, 600))
        held += found.low <= true <= found.high
        ranked += found.auc_low <= norm.cdf(2**-0.5) <= found.auc_high
    assert held >= 90 and 90 <= ranked < 100


def test_a_reference_finds_what_a_threshold_does_not() -> None:
    source = np.random.default_rng(1)
    difficulty = source.normal(5, 2, 1000), source.normal(5, 2, 1000)
    losses = difficulty[0] - 0.5 + source.normal(0, 0.1, 1000), difficulty[1] + source.normal(0, 0.1, 1000)
    plain = membership_inference.by_threshold(*losses)
    beside = membership_inference.calibrated(*losses, *difficulty)
    assert plain.found_fraction < 0.1 and beside.found_fraction > 0.9 and beside.low > plain.high
    with pytest.raises(ConfigError, match="two rows a side"):
        membership_inference.by_threshold([1.0], [2.0, 3.0])
    with pytest.raises(ConfigError, match="finite"):
        membership_inference.by_threshold([1.0, math.nan], [2.0, 3.0])


def test_exposure_by_hand() -> None:
    others = np.linspace(1, 2, 255)
    seen = exposure("phone", 8, 0.5, others)
    assert (seen.bits, seen.most_bits, seen.chance) == (8.0, 8.0, 1 / 256) and "8.0 of at most 8.0 bits" in str(seen)
    assert exposure("phone", 0, 5.0, others).bits == 0
    assert exposure("phone", 0, 1.5, others).bits == pytest.approx(1, abs=0.02)
    with pytest.raises(ConfigError, match="no candidates"):
        exposure("phone", 0, 1.0, [])


def test_inversion_recovers_tokens_if_ranks_outnumber_them() -> None:
    """It reads gradients of embeddings and of factors; with too few ranks or outputs it is blind."""
    source = np.random.default_rng(2)
    inputs, true = source.standard_normal((200, 32)), {3, 17, 42, 99, 150}
    gradient = np.zeros((200, 32))
    gradient[list(true)] = source.standard_normal((5, 32))
    named = privacy_attacks.from_embedding(gradient)
    assert privacy_attacks.score_inversion("embedding", named, true) == privacy_attacks.Inversion(
        "embedding", 5, 1.0, 1.0
    )
    assert privacy_attacks.from_embedding(np.zeros((4, 2))) == set()
    for ranks, is_blind in ((16, False), (4, True)):
        a = source.standard_normal((ranks, 32))
        change = source.standard_normal((24, 5)) @ (inputs[list(true)] @ a.T)
        found = privacy_attacks.score_inversion(
            "factor", privacy_attacks.from_factor(change.astype(np.float32), a, inputs), true
        )
        assert found.is_blind == is_blind and (is_blind or (found.precision, found.recall) == (1.0, 1.0))
        assert ("blind" in str(found)) == is_blind
    few = source.standard_normal((4, 5)) @ (inputs[list(true)] @ source.standard_normal((16, 32)).T)
    assert privacy_attacks.from_factor(few, source.standard_normal((16, 32)), inputs) is None, (
        "four outputs, five tokens"
    )
    assert privacy_attacks.from_factor(np.zeros((24, 16)), source.standard_normal((16, 32)), inputs) == set()
    with pytest.raises(ConfigError, match="do not fit"):
        privacy_attacks.from_factor(np.zeros((24, 5)), np.zeros((16, 32)), inputs)


def test_one_run_by_closed_form() -> None:
    canaries = 100
    is_in = privacy_attacks.coins(canaries, 0)
    sure = privacy_attacks.one_run(is_in.astype(float), is_in, 0.0, guess_fraction=0.8)
    coin = 0.05 ** (1 / 80)
    assert sure.right == sure.guesses == 80 and sure.epsilon_low == pytest.approx(
        math.log(coin / (1 - coin)), abs=1e-3
    )
    assert sure.most == sure.epsilon_low
    assert privacy_attacks.one_run(is_in.astype(float), is_in, 1e-3, 0.8).epsilon_low < sure.epsilon_low - 0.1, (
        "delta lets some be told"
    )
    assert privacy_attacks.one_run(-is_in.astype(float), is_in, 0.0).epsilon_low == 0
    assert privacy_attacks.coins(10_000, 1).mean() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ConfigError, match="at least 10"):
        privacy_attacks.one_run([1.0] * 9, [True] * 9, 0.0)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_epsilon_bound_of_exact_mechanism_holds_and_is_tight(epsilon: float) -> None:
    """Of randomised response about 5 % of bounds exceed epsilon; their median is over 0.6 of it."""
    source, bounds = np.random.default_rng(3), []
    for _ in range(60):
        is_in = source.random(1000) < 0.5
        honest = source.random(1000) < 1 / (1 + math.exp(-epsilon))  # randomised response
        bounds.append(
            privacy_attacks.one_run(
                np.where(honest, is_in, ~is_in) + source.random(1000) / 10, is_in, DELTA
            ).epsilon_low
        )
    assert np.mean(np.array(bounds) > epsilon) <= 0.05 + 2 * (0.05 * 0.95 / 60) ** 0.5
    assert np.median(bounds) > 0.6 * epsilon


def test_many_runs_by_closed_form() -> None:
    high = 1 - 0.025 ** (1 / 100)  # Clopper & Pearson, none of 100
    found = privacy_attacks.many_runs([1.0] * 100, [0.0] * 100, 0.0, threshold=0.5)
    assert found.epsilon_low == pytest.approx(math.log((1 - high) / high), rel=1e-6) and found.right == 200
    assert privacy_attacks.many_runs([1.0, 0.0] * 50, [1.0, 0.0] * 50, DELTA, 0.5).epsilon_low == 0
    with pytest.raises(ConfigError, match="0 runs with the row and 1 without"):
        privacy_attacks.many_runs([], [1.0], 0.0, 0.5)


def learner_scores(noise: float, is_in: np.ndarray, rounds: int = 20, seed: int = 0) -> np.ndarray:
    """Logistic regression on random rows, by full-batch DP-SGD with clip 1; how well each canary is known at the end."""
    source = np.random.default_rng(seed)
    x = source.standard_normal((len(is_in), 400)) / 20
    y = np.where(source.random(len(is_in)) < 0.5, 1.0, -1.0)
    weights = np.zeros(400)
    for _ in range(rounds):
        each = (-y / (1 + np.exp(y * (x @ weights))))[is_in, None] * x[is_in]
        each /= np.maximum(1, np.linalg.norm(each, axis=1, keepdims=True))
        weights -= 0.5 * (each.sum(0) + noise * source.standard_normal(400))
    return y * (x @ weights)


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_missing_noise_refutes_the_claim_and_fails_check(adapter_folder: Path) -> None:
    """The audit shows more than the claimed epsilon; with calibrated noise the report passes."""
    pytest.importorskip("dp_accounting", reason="pip install 'sartor[federated]'")
    claim, is_in = PrivacyBudget(1.0, DELTA), privacy_attacks.coins(300, 5)
    leaky = AttackReport(claim, audit=privacy_attacks.one_run(learner_scores(0.0, is_in), is_in, DELTA))
    assert leaky.audit and leaky.audit.epsilon_low > 2
    with pytest.raises(GateError, match=r"epsilon 1 at delta 1e-05 is claimed; \d+ of 150 guesses show epsilon"):
        leaky.check()
    assert leaky.write(adapter_folder).is_file(), "what was found is written, whatever it is"
    noise = calibrated(claim, 20)
    quiet = AttackReport(claim, audit=privacy_attacks.one_run(learner_scores(noise, is_in), is_in, DELTA))
    assert quiet.audit and quiet.audit.epsilon_low < 1 < quiet.audit.most
    quiet.check()


def test_the_report_comes_back_and_is_bound_to_its_adapter(adapter_folder: Path) -> None:
    is_in = privacy_attacks.coins(20, 0)
    report = AttackReport(
        PrivacyBudget(8.0, DELTA),
        (membership_inference.by_threshold([0.0, 2.0], [1.0, 3.0]),),
        (Exposure("phone", 8, 6.0, 8.0, 1 / 64),),
        (
            privacy_attacks.score_inversion("factor", None, {1}),
            privacy_attacks.score_inversion("embedding", {1, 2}, {1}),
        ),
        privacy_attacks.one_run(is_in.astype(float), is_in, DELTA),
    )
    report.write(adapter_folder)
    assert open_report(adapter_folder) == report
    said = "\n".join(report.sentences())
    assert all(
        part in said
        for part in ("claimed: epsilon 8", "AUC 0.750", "6.0 of at most 8.0", "blind", "precision 0.50", "10 of 10")
    )
    (adapter_folder / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(ArtifactError, match="other files"):
        open_report(adapter_folder)
    (adapter_folder / "attacks.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no attack report"):
        open_report(adapter_folder)
    with pytest.raises(ArtifactError, match="holds no adapter"):
        report.write(adapter_folder / "elsewhere")


def test_privacy_claim_needs_an_audit_at_its_delta() -> None:
    """A report without a claim passes."""
    with pytest.raises(GateError, match="no audit was made"):
        AttackReport(PrivacyBudget(8.0)).check()
    is_in = privacy_attacks.coins(20, 0)
    with pytest.raises(GateError, match=r"audit was made at delta 0\.1"):
        AttackReport(PrivacyBudget(8.0, DELTA), audit=privacy_attacks.one_run(np.zeros(20), is_in, 0.1)).check()
    nothing = AttackReport(None)
    nothing.check()
    assert list(nothing.sentences()) == ["no privacy is claimed", "no audit was made"]
