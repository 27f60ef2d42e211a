"""`auto`: whose a prompt is, what goes to the base, and that a fault of the router never is one of the request."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sartor.core import parquet_io
from sartor.core.artifacts import MANIFESTS
from sartor.core.errors import ArtifactError, BusyError, UnavailableError
from sartor.core.filesystem import file_digest
from sartor.evaluate.training_facts import EXEMPLARS
from sartor.serving.routing import agent_classifier, calibration, exemplars, router
from sartor.serving.routing import exemplars as lift
from sartor.serving.routing.exemplars import ExemplarPrompt, Exemplars
from sartor.serving.routing.router import AutoRouter, choose_agent, user_turns
from sartor.serving.routing.router_model import CANDIDATES, FittedRouter, RoutedText
from sartor.serving.team_config import Routing
from sartor.serving.types import EmbeddingResult, RoutingDecision

ROOMS = ("kitchen", "hall", "attic", "garage", "cellar", "office", "nursery", "bathroom", "loft", "porch")
THINGS = ("lamp", "heater", "fan", "blind", "radio")
DISHES = ("lasagne", "goulash", "ramen", "curry", "paella", "risotto", "chili", "borscht", "moussaka", "tagine")
LISTED = {
    "home": [
        f"switch {word} the {thing} in the {room}" for room in ROOMS for thing in THINGS for word in ("on", "off")
    ],
    "chef": [
        f"which {what} go into a {dish} for {n} guests"
        for dish in DISHES
        for what in ("spices", "herbs")
        for n in (2, 6, 9)
    ],
}


def prompts(agent: str, start: int, stop: int, step: int = 1) -> tuple[ExemplarPrompt, ...]:
    return tuple(ExemplarPrompt(f"{agent}:{n}", text) for n, text in enumerate(LISTED[agent][start:stop:step], 1))


def agents(*names: str) -> dict[str, Exemplars]:
    return {name: Exemplars(prompts(name, 0, None, 2), prompts(name, 1, 40, 2)) for name in names}


def release(folder: Path, agent: str, **splits: Sequence[str]) -> Path:
    """The directory of a Release, as far as a router looks at it."""
    (folder / agent / "router").mkdir(parents=True)
    found = splits or {"train": LISTED[agent][::2], "eval": LISTED[agent][1:40:2]}
    lines = [{"text": text, "split": split} for split, texts in found.items() for text in texts]
    (folder / agent / EXEMPLARS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    list_files(folder / agent, {})
    return folder / agent


def list_files(folder: Path, facts: dict[str, Any]) -> None:
    """Write a release.json that lists the files there are."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": file_digest(file), "bytes": file.stat().st_size}
        for file in folder.glob("*/*")
    }
    (folder / MANIFESTS["release"]).write_text(json.dumps({**facts, "files": files}))


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def ground() -> agent_classifier.GeneralPrompts:
    return agent_classifier.make("tfidf", None)


def fit(found: dict[str, Exemplars], ground: agent_classifier.GeneralPrompts) -> FittedRouter:
    parts = {name: agent_classifier.fit(one, ground, None) for name, one in found.items()}
    return calibration.assemble(parts, ground, 0.9, 0.05)


@pytest.fixture(scope="module")
def two(ground: agent_classifier.GeneralPrompts) -> FittedRouter:
    return fit(agents("home", "chef"), ground)


def agent_of(fitted: FittedRouter, text: str) -> str:
    return choose_agent(fitted, fitted.judge([exemplars.shortened(text)]), {"home", "chef"}).agent


def test_known_prompt_goes_to_its_agent_and_foreign_to_base(two: FittedRouter) -> None:
    """Other languages, other subjects, short questions, empty text and surrogates are foreign."""
    assert agent_of(two, "switch off the fan in the library please") == "home"
    assert agent_of(two, "which spices go into a jambalaya for 7 guests") == "chef"
    for foreign in (
        "Wer hat die Glühbirne erfunden?",
        "my brother is coming over tonight",
        "is 91 a prime",
        "zzzz",
        "",
        "\x00 \ud800",
    ):
        assert agent_of(two, foreign) == "base", foreign


def test_the_figures_are_of_prompts_that_it_never_saw(two: FittedRouter) -> None:
    assert two.figures["accuracy"] == 1.0 and two.figures["by_agent"] == {"home": 1.0, "chef": 1.0}
    assert two.figures["held_out"] == 40
    assert two.figures["to_base_kinds"] >= 0.95 and two.figures["to_base_agents"] >= 0.95
    assert two.figures["foreign"] == len(two.space.folds) + 40 + 40
    assert (
        two.figures["risk"] <= 0.05
        and two.figures["coverage"] == pytest.approx(0.5, abs=0.03)
        and two.figures["ece"] < 0.1
    )


def test_reason_has_scores_threshold_and_nearest_exemplar(
    two: FittedRouter,
) -> None:
    """Agents that may not be chosen appear neither in the scores nor in the reason."""
    asked = two.judge([LISTED["home"][0]])
    route = choose_agent(two, asked, {"home", "chef"})
    assert route.agent == "home" and set(route.scores) == {"home", "chef"}
    assert "then chef 0.0" in route.reason and f"threshold {two.threshold:.3f}" in route.reason
    assert "nearest exemplar home:1 (1.00)" in route.reason
    other = choose_agent(two, asked, {"chef"})
    assert other.agent == "base" and "home" not in other.reason and set(other.scores) == {"chef"}
    assert choose_agent(two, asked, {"stranger"}).agent == choose_agent(two, asked, ()).agent == "base"


def arrays_of(one: agent_classifier.AgentClassifier) -> dict[str, Any]:
    return {name: np.asarray(array) for name, array in agent_classifier.as_arrays(one).items()}


def test_part_of_an_agent_is_independent_of_other_agents(
    ground: agent_classifier.GeneralPrompts, two: FittedRouter
) -> None:
    """A part that is fitted alone is bit-identical to one beside another agent."""
    alone = arrays_of(agent_classifier.fit(agents("home")["home"], ground, None))
    beside = arrays_of(two.parts[two.agents.index("home")])
    assert set(alone) == set(beside) and all(
        np.array_equal(alone[name], beside[name], equal_nan=True) for name in alone
    )


def test_saved_part_reads_back_bit_identical(two: FittedRouter, tmp_path: Path) -> None:
    """A damaged file is named, another encoder has no part, and parts of removed agents are deleted."""
    one = two.parts[0]
    agent_classifier.save_part(tmp_path, "tfidf", one)
    again = agent_classifier.open_part(tmp_path, "tfidf", one.digest)
    assert again is not None and again.ids == one.ids
    assert all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(arrays_of(one).values(), arrays_of(again).values(), strict=True)
    )
    assert replace(two, parts=(again, two.parts[1])).judge(["switch on the oven"]) == two.judge(["switch on the oven"])
    assert (
        agent_classifier.open_part(tmp_path, "tfidf", "0" * 64) is None
        and agent_classifier.open_part(tmp_path, "minilm", one.digest) is None
    )
    (file,) = tmp_path.glob("*/*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="cannot be read"):
        agent_classifier.open_part(tmp_path, "tfidf", one.digest)
    arrays = arrays_of(one)
    with pytest.raises(ValueError, match="do not fit each other"):
        agent_classifier.from_arrays(one.digest, one.ids[:-1], arrays)
    file.write_bytes(whole)
    agent_classifier.keep_only(tmp_path, {one.digest})
    assert file.is_file()
    agent_classifier.keep_only(tmp_path, ())
    assert not file.is_file(), "no prompts stay of an agent that is gone"


def test_the_threshold_is_set_by_the_risk_coverage_curve() -> None:
    own = [np.array([0.9, 0.8, 0.3]), np.array([0.7, 0.25])]
    right = [np.array([True, True, True]), np.array([True, False])]
    foreign = [np.array([0.85, 0.2, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])]
    threshold = calibration.choose(own, right, foreign, 0.9)
    assert 0.25 < threshold < 0.3, "all that can be right is, and one of ten foreign prompts gets an agent"
    assert calibration.choose(own, right, foreign, 0.9, 0.12) == pytest.approx(threshold), "0.1 of 0.85 is wrong"
    assert calibration.choose(own, right, foreign, 0.9, 0.05) == pytest.approx(0.875), (
        "the only one with nobody astray"
    )
    assert calibration.choose(own, right, foreign, 1.0) == pytest.approx(0.875)
    dear = calibration.choose([np.array([0.9, 0.5])], [np.array([True, True])], [np.array([0.6, *[0.0] * 3])], 0.0)
    assert dear < 0.5, "a prompt that misses its agent weighs more than a foreign one that gets one"
    assert calibration.choose([np.array([0.5])], [np.array([True])], [np.array([0.0])], 0.9) > 0, (
        "a score of nothing is never enough"
    )


def test_risk_coverage_aurc_and_ece_match_a_worked_example() -> None:
    """Three weighted predictions, computed by hand."""
    confidence, is_right, weight = np.array([0.9, 0.6, 0.4]), np.array([True, False, True]), np.array([1.0, 1.0, 2.0])
    coverage, risk = calibration.risk_coverage(confidence, is_right, weight)
    assert coverage.tolist() == [0.25, 0.5, 1.0] and risk.tolist() == [0.0, 0.5, 0.25]
    assert calibration.aurc(confidence, is_right, weight) == pytest.approx(0.25 * 0.5 + 0.5 * 0.25)
    assert calibration.ece(confidence, is_right, weight) == pytest.approx((0.1 + 0.6 + 2 * 0.6) / 4)


def test_agent_without_eval_prompts_splits_its_training_ones(ground: agent_classifier.GeneralPrompts) -> None:
    """Ten of 50 prompts are set aside; of three prompts none is, and the agent is still chosen."""
    rows = agent_classifier.rows_of(Exemplars(prompts("home", 0, 50)))
    assert len(rows.held_out) == 10 and len({one.id for one in rows.train + rows.held_out}) == 50
    assert len(rows.texts) == rows.bounds[-1].stop
    lone = fit({"home": Exemplars(prompts("home", 0, 3))}, ground)
    assert lone.figures["held_out"] == 0 and agent_of(lone, LISTED["home"][0]) == "home"


def test_near_misses_of_an_agents_own_words_go_to_the_base(two: FittedRouter) -> None:
    for asked in ("Translate into Spanish: switch off the fan in the attic", "What rhymes with attic?"):
        assert agent_of(two, asked) == "base", asked


def test_of_many_agents_those_that_may_be_chosen_are_looked_at(ground: agent_classifier.GeneralPrompts) -> None:
    many = {f"a{n}": Exemplars(prompts("home", 0, 20)) for n in range(CANDIDATES + 2)}
    fitted = fit({**many, "chef": agents("chef")["chef"]}, ground)
    (found,) = fitted.judge([LISTED["home"][0]])
    assert len(found.score) == CANDIDATES and "chef" not in found.score
    (found,) = fitted.judge([LISTED["home"][0]], None, {"chef", "a0"})
    assert {name for name, _ in found.best({"chef", "a0"})} == {"chef", "a0"} and sum(found.score.values()) <= 1.0001


def measured(release: Path, low: float, gains: Sequence[float]) -> Path:
    """A Release's Report on its rows about rooms and about dishes, as far as a router looks at it."""
    metric = {"base": 0.1, "tuned": 0.5, "difference": 0.4, "low": low, "high": 0.6}
    texts = [*LISTED["home"][:40], *LISTED["chef"][:40]]
    table = [
        {"prompt": text, "media": "", "base_exact_match": 0.5, "tuned_exact_match": 0.5 + gain}
        for text, gain in zip(texts, gains, strict=True)
    ]
    (release / "report").mkdir()
    parquet_io.write_rows(release / "report" / "rows.parquet", pa.Table.from_pylist(table).schema, table)
    list_files(release, {"primary": "exact_match", "metrics": {"exact_match": metric}})
    return release


def test_route_needs_a_gain_shown_by_the_report(ground: agent_classifier.GeneralPrompts, tmp_path: Path) -> None:
    """Where the Report shows no gain over the base, the base answers and the reason names the agent."""
    everything = [*LISTED["home"][::2], *LISTED["chef"][::2]]
    gains = [*[0.5] * 40, *[-0.1] * 40]
    one = measured(release(tmp_path, "one", train=everything), 0.2, gains)
    found = exemplars.read_exemplars(one, "one")
    assert found.gain is not None and found.gain.is_shown and len(found.gain.rows) == 80
    fitted = fit({"one": found}, ground)
    home, chef = (choose_agent(fitted, fitted.judge([LISTED[name][3]]), {"one"}) for name in ("home", "chef"))
    assert home.agent == "one" and home.fits == ""
    assert chef.agent == "base" and chef.fits == "one"
    assert "one fits, but its Report shows no gain on the 40 rows that this is most like (-0.100)" in chef.reason
    none = exemplars.read_exemplars(measured(release(tmp_path, "none", train=everything), -0.01, gains), "none")
    assert none.gain is not None and not none.gain.is_shown
    fitted = replace(fitted, unproven={"one": none.gain.detail})
    home = choose_agent(fitted, fitted.judge([LISTED["home"][3]]), {"one"})
    assert (home.agent, home.fits) == (
        "base",
        "one",
    ) and "its Report shows no gain over the base (exact_match" in home.reason


def test_report_rows_are_sliced_by_class(ground: agent_classifier.GeneralPrompts) -> None:
    """Each slice has the mean gain of its class; a single row gives no slices."""
    told = tuple(lift.MeasuredRow(text, "abc"[n % 3], float(n % 3)) for n, text in enumerate(LISTED["home"][:60]))
    gain = lift.Gain(True, "", told)
    found = lift.sliced(gain, ground.features([row.prompt for row in told], None))
    assert found is not None and found.gain.tolist() == [0.0, 1.0, 2.0] and found.size.tolist() == [20, 20, 20]
    assert [found.lacks_gain(n) for n in range(3)] == [True, False, False]
    few = lift.Gain(True, "", told[:1])
    assert lift.sliced(few, ground.features([told[0].prompt], None)) is None


def judged(score: float, agent: str = "home") -> RoutedText:
    scores = {"home": 0.0, "chef": 0.0, agent: score}
    return RoutedText(scores, {name: (f"{name}:1", 0.5) for name in scores})


def test_uncertain_turn_follows_the_agent_of_the_previous_turn(
    two: FittedRouter,
) -> None:
    """A turn below the threshold must lean to that agent; a turn above it is routed by itself."""
    fitted = replace(two, threshold=0.4)
    both = {"home", "chef"}
    assert choose_agent(fitted, [judged(0.2), judged(0.6)], both).agent == "home"
    assert "with the turn before" in choose_agent(fitted, [judged(0.2), judged(0.6)], both).reason
    assert choose_agent(fitted, [judged(0.1), judged(0.6)], both).agent == "base"
    assert choose_agent(fitted, [judged(0.2), judged(0.3)], both).agent == "base"
    assert choose_agent(fitted, [judged(0.5, "chef"), judged(0.9)], both).agent == "chef"


def test_only_what_the_user_said_counts_in_any_form_of_content() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {}},
                {"type": "text", "text": "b"},
            ],
        },
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": None},
        {"role": "user", "content": "d"},
        {"role": "tool", "content": "e"},
    ]
    assert user_turns(turns) == ["a\nb", "d"]
    assert len(exemplars.shortened("x" * 9_000)) < 2_010


class Crew:
    """Vectors by which words there are; `fault` is raised instead."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.faults = 10**9
        self.asked: list[int] = []
        self.wait_s = 0.0

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        self.asked.append(len(texts))
        if self.fault is not None and self.faults > 0:
            self.faults -= 1
            raise self.fault
        await asyncio.sleep(self.wait_s)
        return EmbeddingResult(
            [[float(word in text) + 0.01 for word in ("switch", "guests", "the")] for text in texts]
        )


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few general prompts: these tests are about when something is fitted, not how well."""
    found = {kind: prompts[:3] for kind, prompts in exemplars.general().items()}
    monkeypatch.setattr(exemplars, "general", lambda: found)
    monkeypatch.setattr(agent_classifier, "general", lambda: found)
    monkeypatch.setattr(router, "BUSY_WAIT_S", 0.0)
    monkeypatch.setattr(router, "FIRST_WAIT_S", 60.0)


async def test_auto_router_learns_in_background_and_survives_restart(few: None, tmp_path: Path) -> None:
    """The old router answers until the new fit; a restart fits nothing again."""
    releases = {name: release(tmp_path, name) for name in LISTED}
    (tmp_path / "silent").mkdir()
    auto = AutoRouter(Crew(), Routing("tfidf"), tmp_path / "state")
    assert (await auto.route(ask("switch on the lamp in the hall"), {"home"})).reason == "the router is being made"
    await auto.learn({"home": releases["home"], "silent": tmp_path / "silent"})
    route = await auto.route(ask("switch on the lamp in the hall"), {"home", "silent"})
    assert route.agent == "home" and route.reason.endswith("without exemplars: silent")
    assert (await auto.route([{"role": "assistant", "content": "hi"}], {"home"})).reason == "there is no text to go by"
    await auto.learn(releases)
    before = await auto.route(ask("which herbs go into a lasagne for 2 guests"), set(LISTED))
    assert before.agent == "base", "the old router answers until the new one is fitted"
    await auto.settle()
    assert (await auto.route(ask("which herbs go into a lasagne for 2 guests"), set(LISTED))).agent == "chef"
    assert auto.figures["agents"] == ["home", "chef"] and auto.troubles == {}
    await auto.close()

    def never(*arguments: object) -> None:
        raise AssertionError("fitted again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_classifier, "fit", never)
        again = AutoRouter(Crew(), Routing("tfidf"), tmp_path / "state")
        await again.learn(releases)
        assert (await again.route(ask("switch on the lamp in the hall"), set(LISTED))).agent == "home"
        await again.settle()
        assert len(list((tmp_path / "state").rglob("*.npz"))) == 2
        await again.learn({})
        await again.settle()
        assert (await again.route(ask("switch on the lamp"), {"home"})).reason == "no live agent has exemplars"
        assert not list((tmp_path / "state").rglob("*.npz")), "no prompts stay of an agent that is gone"


async def test_first_agents_are_awaited_and_close_waits_for_no_fit(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests wait for the first fit of a team; closing starts no fit that is still queued."""
    begun, may_end, fits = threading.Event(), threading.Event(), []
    fit = agent_classifier.fit

    def slow(*arguments: Any) -> agent_classifier.AgentClassifier:
        fits.append(arguments)
        begun.set()
        assert may_end.wait(60)
        return fit(*arguments)

    releases = {name: release(tmp_path, name) for name in LISTED}
    auto = AutoRouter(Crew(), Routing("tfidf"), tmp_path / "state")
    await auto.learn({})
    await auto.settle()
    await auto.learn(releases)
    assert (await auto.route(ask("switch on the lamp in the hall"), set(LISTED))).agent == "home"
    monkeypatch.setattr(agent_classifier, "fit", slow)
    for name in (
        "cook",
        "baker",
    ):  # the first is being fitted, the second is not wanted any more when its turn comes
        await auto.learn({name: release(tmp_path, name, train=LISTED["chef"][:20])})
        await asyncio.to_thread(begun.wait, 60)
    await auto.close()
    assert not may_end.is_set() and len(fits) == 1
    may_end.set()


async def test_failing_or_slow_encoder_falls_back_to_words(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason names the fault, no request fails, and known vectors are not computed again."""
    releases = {name: release(tmp_path, name) for name in LISTED}
    crew = Crew()
    crew.fault, crew.faults = BusyError("full", "later"), 3
    auto = AutoRouter(crew, Routing("base"), tmp_path / "state")
    await auto.learn(releases)
    await auto.settle()
    assert auto.figures["encoder"] == "base" and auto.troubles == {} and max(crew.asked) == router.EMBEDDED_AT_ONCE
    home = ask("switch on the lamp in the hall")
    assert (await auto.route(home, {"home"})).reason.endswith("; base")
    crew.fault, crew.faults = UnavailableError("no worker lives", "later"), 10**9
    route = await auto.route(home, {"home"})
    assert route.agent == "home" and route.reason.endswith("; tfidf; by words alone (base: no worker lives)")
    crew.fault = RuntimeError("a bug")
    assert await auto.route(home, {"home"}) == RoutingDecision("base", "the router failed: RuntimeError: a bug")
    crew.fault, crew.wait_s = None, 60.0
    monkeypatch.setattr(router, "EMBED_WAIT_S", 0.01)
    assert "took more than" in (await auto.route(home, {"home"})).reason
    known = len(crew.asked)
    crew.fault = UnavailableError("no worker lives", "later")
    await auto.learn({"home": releases["home"]})
    await auto.settle()
    assert len(crew.asked) == known, "vectors of an earlier fit are not asked for again"
    lost = AutoRouter(crew, Routing("base"), tmp_path / "other")
    await lost.learn(releases)
    await lost.settle()
    assert lost.figures["encoder"] == "tfidf" and "no worker lives" in lost.troubles["router"]


async def test_invalid_exemplars_are_reported_and_others_learnt(few: None, tmp_path: Path) -> None:
    """The trouble names the agent; the other agents are routed to."""
    releases = {"home": release(tmp_path, "home"), "chef": release(tmp_path, "chef", nobody=["x"])}
    auto = AutoRouter(Crew(), Routing("tfidf"), tmp_path / "state")
    await auto.learn(releases)
    assert (await auto.route(ask("switch on the lamp in the hall"), set(LISTED))).agent == "home"
    assert "is not a file of exemplars" in auto.troubles["router: chef"]
    await auto.close()


def test_of_two_encoders_the_dearer_one_must_be_better(two: FittedRouter) -> None:
    def rated(accuracy: float, encoder: str) -> FittedRouter:
        found = replace(two.space, encoder=encoder)
        return replace(two, space=found, figures={"accuracy": accuracy, "to_base": 0.95})

    assert calibration.best_of([rated(0.9, "tfidf"), rated(0.905, "minilm")]).encoder == "tfidf"
    assert calibration.best_of([rated(0.9, "tfidf"), rated(0.95, "minilm")]).encoder == "minilm"
