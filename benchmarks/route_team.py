"""`auto` over the Releases of examples/team: held-out prompts that get their agent, and chitchat that is left to the
base.

Half of each Release's held-out exemplars, drawn anew in each round, is taken from the router: it neither fits nor
chooses a threshold with them. They are what is asked, together with the held-out rows of the Dataset that are no
exemplars. Of each conversation of the asset `chitchat` the first turn is asked; nothing of it is in any Release or in
the router.

    bash examples/team/up.sh --quick --build team        # the router goes by prompts: how long the agents were tuned
    is all one python benchmarks/route.py --team team --json
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from route_sets import small_talk

from sartor.core.artifacts import MANIFESTS, open_artifact
from sartor.core.parquet_io import read_examples
from sartor.evaluate.training_facts import EXEMPLARS
from sartor.serving.routing.router import AutoRouter, Embedder
from sartor.serving.team_config import Routing, load


def halved(release: Path, part: Path, rng: random.Random) -> set[str]:
    """Write the Release's exemplars below `part` without a half of the held-out ones; returns those that stay."""
    lines = [json.loads(line) for line in (release / EXEMPLARS).read_text(encoding="utf-8").splitlines()]
    held = [line for line in lines if line["split"] == "eval"]
    out = {id(line) for line in rng.sample(held, len(held) // 2)}
    kept = [line for line in lines if id(line) not in out]
    (part / EXEMPLARS).parent.mkdir(parents=True)
    content = "".join(json.dumps(line) + "\n" for line in kept).encode()
    (part / EXEMPLARS).write_bytes(content)
    # the router reads what a manifest lists, and nothing else
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (part / MANIFESTS["release"]).write_text(json.dumps({"files": {EXEMPLARS: entry}}), encoding="utf-8")
    return {line["text"] for line in kept}


def held_out(dataset: Path) -> list[str]:
    """The last user turn of each row that tuning never saw."""
    rows = (example for example in read_examples(open_artifact(dataset)) if example.split == "eval")
    return [[message.text for message in row.prompt if message.role == "user"][-1] for row in rows]


async def measure(team: Path, crew: Embedder, seed: int, foreign: int) -> dict[str, Any]:
    """One round: the router fitted, every prompt asked."""
    rng = random.Random(seed)
    members = load(team / "team.yaml").agents
    with tempfile.TemporaryDirectory() as work:
        parts = {member.name: Path(work) / member.name for member in members}
        known = {member.name: halved(Path(member.release), parts[member.name], rng) for member in members}
        router = AutoRouter(crew, Routing(lift="ignored"), Path(work) / "state")
        await router.learn(parts)
        await router.settle()
        if router.troubles:
            raise SystemExit(f"the router is not whole: {router.troubles}")
        went: dict[str, Counter[str]] = {}
        asked = {name: [text for text in held_out(team / "data" / name) if text not in known[name]] for name in parts}
        for name, texts in [*asked.items(), ("chitchat", rng.sample(small_talk(), foreign))]:
            routes = [await router.route([{"role": "user", "content": text}], set(parts)) for text in texts]
            went[name] = Counter(route.agent for route in routes)
        figures = router.figures
        await router.close()
    right = {name: went[name][name] / went[name].total() for name in parts}
    return {
        "accuracy": sum(went[name][name] for name in parts) / sum(went[name].total() for name in parts),
        "by_agent": right,
        "abstain_out_of_domain": went["chitchat"]["base"] / went["chitchat"].total(),
        "prompts": {name: counts.total() for name, counts in went.items()},
        "went": {name: dict(counts) for name, counts in went.items()},
        "encoder": figures["encoder"],
        "threshold": figures["threshold"],
    }


def measured(team: Path, crew: Embedder, rounds: int, chitchat: int) -> dict[str, Any]:
    """The means of some rounds, and each."""
    found = [asyncio.run(measure(team, crew, seed, chitchat)) for seed in range(rounds)]
    mean = {key: sum(one[key] for one in found) / rounds for key in ("accuracy", "abstain_out_of_domain")}
    by_agent = {name: sum(one["by_agent"][name] for one in found) / rounds for name in found[0]["by_agent"]}
    return {**mean, "by_agent": by_agent, "rounds": found}
