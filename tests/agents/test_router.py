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
import pytest

from sartor.agents import router
from sartor.agents.asking import Embedded, Route
from sartor.agents.router import AutoRouter, chosen, user_turns
from sartor.agents.routing import exemplars, fitting
from sartor.agents.routing.exemplars import Exemplars, Prompt
from sartor.agents.routing.fitted import Fitted, Judged, open_fitted
from sartor.agents.team import Routing
from sartor.core.errors import ArtifactError, BusyError, UnavailableError
from sartor.evaluate.training import EXEMPLARS

ROOMS = ("kitchen", "hall", "attic", "garage", "cellar", "office", "nursery", "bathroom", "loft", "porch")
THINGS = ("lamp", "heater", "fan", "blind", "radio")
DISHES = ("lasagne", "goulash", "ramen", "curry", "paella", "risotto", "chili", "borscht", "moussaka", "tagine")
LISTED = {
    "home": [f"switch {word} the {thing} in the {room}" for room in ROOMS for thing in THINGS for word in ("on", "off")],
    "chef": [
        f"which {what} go into a {dish} for {n} guests" for dish in DISHES for what in ("spices", "herbs") for n in (2, 6, 9)
    ],
}


def prompts(agent: str, start: int, stop: int, step: int = 1) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{agent}:{n}", text) for n, text in enumerate(LISTED[agent][start:stop:step], 1))


def agents(*names: str) -> dict[str, Exemplars]:
    return {name: Exemplars(prompts(name, 0, None, 2), prompts(name, 1, 40, 2)) for name in names}


def release(folder: Path, agent: str, **splits: Sequence[str]) -> Path:
    """The directory of a Release, as far as a router looks at it."""
    (folder / agent / "router").mkdir(parents=True)
    found = splits or {"train": LISTED[agent][::2], "eval": LISTED[agent][1:40:2]}
    lines = [{"text": text, "split": split} for split, texts in found.items() for text in texts]
    (folder / agent / EXEMPLARS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / agent


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def two() -> Fitted:
    return fitting.fit(agents("home", "chef"), "tfidf", None, 0.9)


def agent_of(fitted: Fitted, text: str) -> str:
    return chosen(fitted, fitted.judge([exemplars.shortened(text)]), {"home", "chef"}).agent


def test_a_prompt_goes_to_the_agent_that_knows_its_like_and_a_foreign_one_to_the_base(two: Fitted) -> None:
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


def test_the_figures_are_of_prompts_that_it_never_saw(two: Fitted) -> None:
    assert two.figures["accuracy"] == 1.0 and two.figures["by_agent"] == {"home": 1.0, "chef": 1.0}
    assert two.figures["held_out"] == 40
    assert two.figures["to_base_kinds"] >= 0.95 and two.figures["to_base_agents"] >= 0.95
    assert two.figures["foreign"] == two.figures["general"] + 40


def test_its_reason_says_scores_threshold_and_the_nearest_exemplar_and_names_nobody_who_may_not_be_chosen(two: Fitted) -> None:
    asked = two.judge([LISTED["home"][0]])
    route = chosen(two, asked, {"home", "chef"})
    assert route.agent == "home" and set(route.scores) == {"home", "chef"}
    assert "then chef 0.0" in route.reason and f"threshold {two.threshold:.3f}" in route.reason
    assert "nearest exemplar home:1 (1.00)" in route.reason
    other = chosen(two, asked, {"chef"})
    assert other.agent == "base" and "home" not in other.reason and set(other.scores) == {"chef"}
    assert chosen(two, asked, {"stranger"}).agent == chosen(two, asked, ()).agent == "base"


def test_what_was_written_is_read_back_and_judges_the_same(two: Fitted, tmp_path: Path) -> None:
    two.save(tmp_path)
    again = open_fitted(tmp_path, "tfidf", two.digest)
    assert again is not None and again.figures == two.figures
    texts = ["switch on the oven", "which herbs go into soup"]
    assert again.judge(texts) == two.judge(texts)
    assert open_fitted(tmp_path, "tfidf", "0" * 64) is None and open_fitted(tmp_path, "minilm", two.digest) is None
    for name in ("tfidf.npz", "tfidf.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtifactError, match="cannot be read"):
            open_fitted(tmp_path, "tfidf", two.digest)
        (tmp_path / name).write_bytes(whole)
    arrays = dict(np.load(tmp_path / "tfidf.npz"))
    np.savez(tmp_path / "tfidf.npz", **{**arrays, "weights": arrays["weights"][:, :2]})
    with pytest.raises(ArtifactError, match="do not fit each other"):
        open_fitted(tmp_path, "tfidf", two.digest)


def test_the_threshold_leaves_the_wanted_fraction_of_foreign_prompts_to_the_base() -> None:
    own = [np.array([0.9, 0.8, 0.3]), np.array([0.7, -1.0])]
    foreign = np.array([0.85, 0.2, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    threshold, right, left = fitting.choose(own, foreign, 0.9)
    assert threshold == pytest.approx((0.2 * 0.3) ** 0.5) and (right, left) == (0.75, 0.9)
    dear = fitting.choose([np.array([0.9, 0.5])], np.array([0.6, *[0.0] * 3]), 0.0)
    assert dear[1:] == (1.0, 0.75), "a prompt that misses its agent weighs more than a foreign one that gets one"
    strict = fitting.choose(own, foreign, 1.0)
    assert strict[0] == pytest.approx((0.85 * 0.9) ** 0.5) and strict[2] == 1.0
    assert fitting.choose([np.array([0.5])], np.array([0.0]), 0.9)[0] > 0, "a score of nothing is never enough"


def test_one_agent_without_held_out_prompts_lends_some_of_its_own() -> None:
    rows = fitting.rows_of({"home": Exemplars(prompts("home", 0, 50))})
    assert rows.held == 10 and len({prompt.id for prompt in rows.prompts if prompt.id.startswith("home")}) == 50
    many = {f"a{n}": Exemplars(prompts("home", 0, 100)) for n in range(60)}
    assert (fitting.rows_of(many).labels < 60).sum() <= fitting.MOST_ROWS


def judged(score: float, agent: str = "home") -> Judged:
    scores = {"home": 0.0, "chef": 0.0, agent: score}
    return Judged(scores, {name: (f"{name}:1", 0.5) for name in scores})


def test_a_turn_that_says_too_little_belongs_to_the_agent_of_the_turn_before_if_it_leans_there(two: Fitted) -> None:
    fitted = replace(two, threshold=0.4)
    both = {"home", "chef"}
    assert chosen(fitted, [judged(0.2), judged(0.6)], both).agent == "home"
    assert "with the turn before" in chosen(fitted, [judged(0.2), judged(0.6)], both).reason
    assert chosen(fitted, [judged(0.1), judged(0.6)], both).agent == "base"
    assert chosen(fitted, [judged(0.2), judged(0.3)], both).agent == "base"
    assert chosen(fitted, [judged(0.5, "chef"), judged(0.9)], both).agent == "chef"


def test_only_what_the_user_said_counts_in_any_form_of_content() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}],
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

    async def embed(self, texts: Sequence[str], encoder: str) -> Embedded:
        self.asked.append(len(texts))
        if self.fault is not None and self.faults > 0:
            self.faults -= 1
            raise self.fault
        await asyncio.sleep(self.wait_s)
        return Embedded([[float(word in text) + 0.01 for word in ("switch", "guests", "the")] for text in texts])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few general prompts: these tests are about when something is fitted, not how well."""
    found = {kind: prompts[:3] for kind, prompts in exemplars.general().items()}
    monkeypatch.setattr(exemplars, "general", lambda: found)
    monkeypatch.setattr(fitting, "general", lambda: found)
    monkeypatch.setattr(router, "BUSY_WAIT_S", 0.0)


def test_agents_are_learnt_in_the_background_and_found_again_after_a_restart(few: None, tmp_path: Path) -> None:
    async def story() -> None:
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
        await auto.learn({})
        await auto.settle()
        assert (await auto.route(ask("switch on the lamp"), {"home"})).reason == "no live agent has exemplars"

        def never(*arguments: object) -> None:
            raise AssertionError("fitted again")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "fit", never)
            again = AutoRouter(Crew(), Routing("tfidf"), tmp_path / "state")
            await again.learn(releases)
            assert (await again.route(ask("switch on the lamp in the hall"), set(LISTED))).agent == "home"
            await again.close()

    asyncio.run(story())


def test_agents_that_come_to_an_empty_team_are_waited_for_and_a_fit_holds_up_no_end(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, fits = threading.Event(), threading.Event(), []
    fit = fitting.fit

    def slow(*arguments: Any) -> Fitted:
        fits.append(arguments)
        begun.set()
        assert may_end.wait(60)
        return fit(*arguments)

    async def story() -> None:
        releases = {name: release(tmp_path, name) for name in LISTED}
        auto = AutoRouter(Crew(), Routing("tfidf"), tmp_path / "state")
        await auto.learn({})
        await auto.settle()
        await auto.learn(releases)
        assert (await auto.route(ask("switch on the lamp in the hall"), set(LISTED))).agent == "home"
        monkeypatch.setattr(fitting, "fit", slow)
        for name in LISTED:  # the first is being fitted, the second is not wanted any more when its turn comes
            await auto.learn({name: releases[name]})
            await asyncio.to_thread(begun.wait, 60)
        await auto.close()

    asyncio.run(story())  # ends while the fit goes on
    assert not may_end.is_set() and len(fits) == 1
    may_end.set()


def test_an_encoder_that_fails_or_is_slow_leaves_words_and_a_lost_one_costs_no_request(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
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
        assert await auto.route(home, {"home"}) == Route("base", "the router failed: RuntimeError: a bug")
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

    asyncio.run(story())


def test_exemplars_of_another_form_are_named_and_the_other_agents_are_learnt(few: None, tmp_path: Path) -> None:
    async def story() -> None:
        releases = {"home": release(tmp_path, "home"), "chef": release(tmp_path, "chef", nobody=["x"])}
        auto = AutoRouter(Crew(), Routing("tfidf"), tmp_path / "state")
        await auto.learn(releases)
        assert (await auto.route(ask("switch on the lamp in the hall"), set(LISTED))).agent == "home"
        assert "is not a file of exemplars" in auto.troubles["router: chef"]
        await auto.close()

    asyncio.run(story())


def test_of_two_encoders_the_dearer_one_must_be_better(two: Fitted) -> None:
    def rated(accuracy: float, encoder: str) -> Fitted:
        return replace(two, encoder=encoder, figures={"accuracy": accuracy, "to_base": 0.95})

    assert fitting.best_of([rated(0.9, "tfidf"), rated(0.905, "minilm")]).encoder == "tfidf"
    assert fitting.best_of([rated(0.9, "tfidf"), rated(0.95, "minilm")]).encoder == "minilm"
