"""Router of `auto` requests.

A router is fitted in the background when the team starts and whenever its agents change; the old one answers
meanwhile. The first router of a new server uses words alone. One with an encoder replaces it when it is ready and
better on prompts that neither saw. Each agent has a classifier of its own: when another agent comes or goes, it stays
the same bit for bit. Classifiers are stored in STATE/router and loaded at the next start.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from sartor.core import assets
from sartor.core.errors import ArtifactError, BusyError, SartorError
from sartor.inference.engine import LOCAL
from sartor.serving.routing import agent_classifier, calibration, exemplars
from sartor.serving.routing.agent_classifier import AgentClassifier, GeneralPrompts
from sartor.serving.routing.exemplars import Exemplars, shortened
from sartor.serving.routing.router_model import BASE, FittedRouter, RoutedText
from sartor.serving.team_config import Routing
from sartor.serving.types import EmbeddingResult, RoutingDecision

WORDS, BASE_ENCODER = "tfidf", "base"
Result = TypeVar("Result")
# Longest wait of a request for the first router of a new server
FIRST_WAIT_S = 10.0
# Longest wait for the encoder's vectors of one prompt; then words alone decide
EMBED_WAIT_S = 2.0
# Prompts per embedding call while a router is fitted, so that requests can come in between
EMBEDDED_AT_ONCE = 64
BUSY_TRIES, BUSY_WAIT_S = 30, 1.0
# A message that fits no agent alone ("and the bedroom?") goes to the agent that fits it together with the message
# before, if its own score for that agent reaches this fraction of the threshold
LEAN = 0.3


class Embedder(Protocol):
    """Part of a worker backend that a router needs."""

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        """Return embeddings of texts, as `WorkerBackend.embed` does."""
        ...


class AutoRouter:
    """Router (types.py) of one event loop. Call `close`, or its last fit goes on."""

    def __init__(self, crew: Embedder, rules: Routing, state: Path, engine: str = LOCAL, dtype: str = "") -> None:
        """Create a router without agents.

        engine: kind of the workers' engine. Only Sartor's own makes vectors of its base fast enough to be used by
        default.
        dtype: in which that engine computes.
        """
        self._crew = crew
        self._rules = rules
        self._folder = state / "router"
        self._engine = engine
        self._dtype = dtype if engine == LOCAL else ""
        self._fitted: FittedRouter | None = None
        self._words: FittedRouter | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_ready = asyncio.Event()
        self._without_exemplars: tuple[str, ...] = ()
        self._spaces: dict[str, GeneralPrompts] = {}
        self._parts: dict[tuple[str, str], AgentClassifier] = {}
        self.troubles: dict[str, str] = {}

    async def learn(self, releases: Mapping[str, Path]) -> None:
        """Start to fit the agents in the background, and return at once. Problems appear in `troubles`."""
        await self._stop()
        if self._fitted is None:
            self._is_ready.clear()
        self._task = asyncio.ensure_future(self._refit(dict(releases)))

    async def settle(self) -> None:
        """Wait until the last fit has ended."""
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task

    async def close(self) -> None:
        """Stop fitting."""
        await self._stop()

    @property
    def figures(self) -> Mapping[str, Any]:
        """Encoder, agents, threshold and held-out figures of the current router; empty without one."""
        return {} if self._fitted is None else self._fitted.summary

    async def route(self, messages: Sequence[Mapping[str, Any]], openable: Collection[str]) -> RoutingDecision:
        """Choose the agent by the last user message; the one before helps if it says too little."""
        turns = user_turns(messages)
        if not turns:
            return RoutingDecision(BASE, "there is no text to go by")
        if not self._is_ready.is_set() and self._task is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_WAIT_S):
                    await self._is_ready.wait()
        if self._fitted is None:
            return RoutingDecision(
                BASE, "the router is being made" if not self._is_ready.is_set() else "no live agent has exemplars"
            )
        texts = [shortened(turns[-1]), *([shortened("\n".join(turns[-2:]))] if len(turns) > 1 else [])]
        try:
            fitted, judged, note = await self._judged(self._fitted, texts, openable)
        except (
            Exception
        ) as error:  # a fault of the router must not fail the request: dispatch handles only SartorError
            reason = error.problem if isinstance(error, SartorError) else f"{type(error).__name__}: {error}"
            return RoutingDecision(BASE, f"the router failed: {reason}")
        route = choose_agent(fitted, judged, openable)
        without_exemplars = [name for name in self._without_exemplars if name in openable]
        silent_note = f"; without exemplars: {', '.join(sorted(without_exemplars))}" if without_exemplars else ""
        return replace(route, reason=f"{route.reason}{note}{silent_note}")

    async def _judged(
        self, fitted: FittedRouter, texts: Sequence[str], openable: Collection[str]
    ) -> tuple[FittedRouter, list[RoutedText], str]:
        """Return the router that judged the texts, its results, and a note.

        If the encoder does not answer, the router of words alone judges.
        """
        if not fitted.has_encoder:
            return fitted, await asyncio.to_thread(fitted.judge, texts, None, openable), ""
        try:
            async with asyncio.timeout(EMBED_WAIT_S):
                vectors = np.array((await self._crew.embed(texts, fitted.encoder)).vectors, dtype=np.float32)
        except TimeoutError:
            reason = f"{fitted.encoder} took more than {EMBED_WAIT_S:g} s"
        except SartorError as error:
            reason = f"{fitted.encoder}: {error.problem}"
        else:
            return fitted, await asyncio.to_thread(fitted.judge, texts, vectors, openable), ""
        if self._words is None:
            raise ArtifactError(reason, '"model": the name of an agent in place of "auto"; or send the request again')
        return (
            self._words,
            await asyncio.to_thread(self._words.judge, texts, None, openable),
            f"; by words alone ({reason})",
        )

    async def _refit(self, releases: Mapping[str, Path]) -> None:
        """Fit routers for these Releases, the cheapest first, and use the best."""
        self.troubles = {}
        try:
            exemplars_by_name = await asyncio.to_thread(self._read, releases)
            agents = {
                name: agent_exemplars for name, agent_exemplars in exemplars_by_name.items() if agent_exemplars.train
            }
            self._without_exemplars = tuple(name for name in releases if name not in agents)
            if not agents:
                self._fitted = self._words = None
                self._parts = {}
                await asyncio.to_thread(agent_classifier.keep_only, self._folder, ())
            else:
                await self._fit_all(agents)
        except (SartorError, OSError, MemoryError) as error:
            self.troubles["router"] = f"auto is not fitted anew: {error}"
        finally:
            self._is_ready.set()

    async def _fit_all(self, agents: Mapping[str, Exemplars]) -> None:
        words = await self._fit_one(agents, WORDS)
        if self._fitted is None:
            self._fitted = words
            self._is_ready.set()
        routers = [words]
        for encoder in self._encoders():
            try:
                routers.append(await self._fit_one(agents, encoder))
            except SartorError as error:
                self.troubles["router"] = f"auto goes by words alone: {encoder}: {error.problem}"
        explicit = self._rules.encoder != "auto"
        self._fitted = routers[-1] if explicit else calibration.best_of(routers)
        self._words = words

    def _encoders(self) -> list[str]:
        """Return the encoders to fit besides words.

        The base is used only without a sentence encoder: it costs more and chooses no better.
        """
        if self._rules.encoder != "auto":
            return [self._rules.encoder] if self._rules.encoder != WORDS else []
        if assets.entry("minilm").is_installed:
            return ["minilm"]
        return [BASE_ENCODER] if self._engine == LOCAL else []

    def _made_in(self, encoder: str) -> str:
        """Return the dtype in which Sartor's engine makes an encoder's vectors; empty for other libraries."""
        return self._dtype if encoder == BASE_ENCODER else ""

    async def _fit_one(self, agents: Mapping[str, Exemplars], encoder: str) -> FittedRouter:
        """Return the router with one encoder, from stored classifiers and newly fitted ones."""
        space = await self._space(encoder)
        parts = {name: await self._part(agent_exemplars, space) for name, agent_exemplars in agents.items()}
        current_keys = {(encoder, part.digest) for part in parts.values()}
        self._parts = {key: part for key, part in self._parts.items() if key[0] != encoder or key in current_keys}
        with suppress(OSError):
            await asyncio.to_thread(agent_classifier.keep_only, self._folder, {part.digest for part in parts.values()})
        measured = self._rules.lift == "measured"
        unproven = {
            name: agent_exemplars.gain.detail
            for name, agent_exemplars in agents.items()
            if measured and agent_exemplars.gain and not agent_exemplars.gain.is_shown
        }
        rules = self._rules
        fitted = await _run_in_thread(
            lambda: calibration.assemble(parts, space, target=rules.target, risk=rules.risk, unproven=unproven)
        )
        with suppress(OSError):
            await asyncio.to_thread(agent_classifier.save_figures, self._folder, encoder, fitted.summary)
        return (
            fitted if measured else replace(fitted, parts=tuple(replace(part, slices=None) for part in fitted.parts))
        )

    async def _space(self, encoder: str) -> GeneralPrompts:
        """Return the general prompts with this encoder's features."""
        digest, made_in = exemplars.general_digest(), self._made_in(encoder)
        if (cached := self._spaces.get(f"{encoder} {digest}")) is not None:
            return cached
        vectors = None
        if encoder != WORDS:
            with suppress(ArtifactError):  # damaged vectors are computed again
                vectors = await asyncio.to_thread(
                    agent_classifier.open_vectors, self._folder, encoder, digest, dtype=made_in
                )
            if vectors is None:
                vectors = await self._embedded(agent_classifier.general_texts(), encoder)
                with suppress(OSError):  # a full disk costs the next start a few seconds
                    await asyncio.to_thread(
                        agent_classifier.save_vectors, self._folder, encoder, digest, vectors=vectors, dtype=made_in
                    )
        self._spaces = {
            f"{encoder} {digest}": await _run_in_thread(lambda: agent_classifier.make(encoder, vectors)),
            **self._spaces,
        }
        return self._spaces[f"{encoder} {digest}"]

    async def _part(self, agent_exemplars: Exemplars, space: GeneralPrompts) -> AgentClassifier:
        """Return one agent's classifier from memory, from disk, or newly fitted."""
        digest = exemplars.digest(agent_exemplars)
        key = (space.encoder, digest)
        if key not in self._parts:
            stored = None
            with suppress(ArtifactError):  # a damaged one is fitted again
                made_in = self._made_in(space.encoder)
                stored = await asyncio.to_thread(
                    agent_classifier.open_part, self._folder, space.encoder, digest, dtype=made_in
                )
            self._parts[key] = stored or await self._fitted_part(agent_exemplars, space)
        return self._parts[key]

    async def _fitted_part(self, agent_exemplars: Exemplars, space: GeneralPrompts) -> AgentClassifier:
        vectors = None
        if space.dense is not None:
            vectors = await self._embedded(agent_classifier.rows_of(agent_exemplars).texts, space.encoder)
        result = await _run_in_thread(lambda: agent_classifier.fit(agent_exemplars, space, vectors))
        with suppress(OSError):  # a full disk costs the next start a few seconds
            await asyncio.to_thread(
                agent_classifier.save_part, self._folder, space.encoder, result, dtype=self._made_in(space.encoder)
            )
        return result

    async def _embedded(self, texts: Sequence[str], encoder: str) -> Any:
        """Return (N, D) vectors of the texts."""
        vector_of_text: dict[str, Any] = {}
        missing = list(dict.fromkeys(texts))
        for start in range(0, len(missing), EMBEDDED_AT_ONCE):
            batch = missing[start : start + EMBEDDED_AT_ONCE]
            vectors = np.array(await self._patiently(batch, encoder), dtype=np.float32)
            vector_of_text |= dict(zip(batch, vectors, strict=True))
        return np.stack([vector_of_text[text] for text in texts])

    async def _patiently(self, texts: Sequence[str], encoder: str) -> list[list[float]]:
        """Return vectors of the texts, with retries while the workers are busy: requests come first."""
        for _ in range(BUSY_TRIES):
            try:
                return (await self._crew.embed(texts, encoder)).vectors
            except BusyError:
                await asyncio.sleep(BUSY_WAIT_S)
        return (await self._crew.embed(texts, encoder)).vectors

    def _read(self, releases: Mapping[str, Path]) -> dict[str, Exemplars]:
        result = {}
        for name, release in releases.items():
            try:
                result[name] = exemplars.read_exemplars(release, name)
            except ArtifactError as error:
                self.troubles[f"router: {name}"] = error.problem
        return result

    async def _stop(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task


# Allows one fit at a time, however often agents change
_FIT = threading.Lock()


async def _run_in_thread(fit: Callable[[], Result]) -> Result:
    """Run a fit in a daemon thread, because it takes seconds and cannot be interrupted.

    The server's end does not wait for it. A fit that is cancelled before it starts does not run.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def tell(fitted: Result | None, error: Exception | None) -> None:
        if fitted is not None and not future.done():
            future.set_result(fitted)
        elif error is not None and not future.done():
            future.set_exception(error)

    def run() -> None:
        fitted, error = None, None
        with _FIT:
            if future.cancelled():
                return
            try:
                fitted = fit()
            except Exception as caught:  # raised where it is awaited
                error = caught
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, fitted, error)

    threading.Thread(target=run, daemon=True).start()
    return await future


def choose_agent(fitted: FittedRouter, judged: Sequence[RoutedText], openable: Collection[str]) -> RoutingDecision:
    """Return the decision for the last user message, judged[0].

    judged[1]: result for that message together with the one before, if there is one.
    The base is chosen if no agent fits, or if the fitting agent is no better by its Report. The reason names no agent
    that may not be chosen.
    """
    by_turn = judged[0].best(openable)
    if not by_turn:
        return RoutingDecision(BASE, "no agent that may be chosen has exemplars")
    scores = {name: round(score, 4) for name, score in by_turn}
    (name, score), note = by_turn[0], ""
    routed = judged[0]
    if score < fitted.threshold and len(judged) > 1:
        other, joint_score = judged[1].best(openable)[0]
        if joint_score >= fitted.threshold and judged[0].score.get(other, 0.0) >= LEAN * fitted.threshold:
            name, score, note, routed = other, joint_score, " with the turn before", judged[1]
    key, likeness = routed.nearest[name]
    others = [pair for pair in routed.best(openable) if pair[0] != name]
    second = f", then {others[0][0]} {others[0][1]:.3f}" if others else ""
    text = (
        f"{name} {score:.3f}{note}{second}; threshold {fitted.threshold:.3f}; nearest exemplar {key} ({likeness:.2f})"
    )
    text = f"{text}; {fitted.encoder}"
    if score < fitted.threshold:
        return RoutingDecision(BASE, f"no agent fits: {text}", scores)
    if reason := _no_gain(fitted, routed, name):
        return RoutingDecision(BASE, f"{name} fits, {reason}: {text}", scores, name)
    return RoutingDecision(name, text, scores)


def _no_gain(fitted: FittedRouter, routed: RoutedText, name: str) -> str:
    """Return the reason why the base is as good as this agent by its Report; empty if it is not."""
    if name in fitted.unproven:
        return f"but its Report shows no gain over the base ({fitted.unproven[name]})"
    if report_slice := routed.poor.get(name):
        return (
            f"but its Report shows no gain on the {report_slice.rows} rows that this is most like "
            f"({report_slice.gain:+.3f})"
        )
    return ""


def user_turns(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the non-empty texts of the user messages; content in parts counts with its text parts."""
    result = []
    for message in messages:
        if message.get("role") != "user":
            continue
        content = message.get("content")
        texts = [content] if isinstance(content, str) else []
        if isinstance(content, list | tuple):
            for part in content:
                if isinstance(part, Mapping) and part.get("type") == "text":
                    texts.append(str(part.get("text") or ""))
        if text := "\n".join(texts).strip():
            result.append(text)
    return result
