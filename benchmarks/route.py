"""`auto` over the Releases of examples/team: held-out prompts that get their agent, and chitchat that is left to the base.

Half of each Release's held-out exemplars, drawn anew in each round, is taken from the router: it neither fits nor chooses a
threshold with them. They are what is asked, together with the held-out rows of the Dataset that are no exemplars. Of each
conversation of the asset `chitchat` the first turn is asked; nothing of it is in any Release or in the router.

    bash examples/team/up.sh --quick --build team        # the router goes by prompts: how long the agents were tuned is all one
    python benchmarks/route.py --team team --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sartor.agents.asking import Embedded
from sartor.agents.router import AutoRouter
from sartor.agents.team import Routing, load
from sartor.core import assets
from sartor.core.artifacts import open_artifact
from sartor.core.rows import read_examples
from sartor.evaluate.training import EXEMPLARS
from sartor.models.encoder import Encoder, MiniLM, SentenceEncoder


class Crew:
    """The encoder in this process, where a server asks its workers."""

    def __init__(self) -> None:
        self._encoders: dict[str, Encoder] = {}

    async def embed(self, texts: Sequence[str], encoder: str) -> Embedded:
        if encoder not in self._encoders:
            self._encoders[encoder] = MiniLM() if encoder == "minilm" else SentenceEncoder(Path(encoder), encoder)
        return Embedded([list(map(float, vector)) for vector in self._encoders[encoder].encode(texts)])


def halved(release: Path, part: Path, rng: random.Random) -> set[str]:
    """Write the Release's exemplars below `part` without a half of the held-out ones; returns those that stay."""
    lines = [json.loads(line) for line in (release / EXEMPLARS).read_text(encoding="utf-8").splitlines()]
    held = [line for line in lines if line["split"] == "eval"]
    out = {id(line) for line in rng.sample(held, len(held) // 2)}
    kept = [line for line in lines if id(line) not in out]
    (part / EXEMPLARS).parent.mkdir(parents=True)
    (part / EXEMPLARS).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return {line["text"] for line in kept}


def held_out(dataset: Path) -> list[str]:
    """The last user turn of each row that tuning never saw."""
    rows = (example for example in read_examples(open_artifact(dataset)) if example.split == "eval")
    return [[message.text for message in row.prompt if message.role == "user"][-1] for row in rows]


def small_talk(count: int, rng: random.Random) -> list[str]:
    """First turns of conversations between people."""
    file = assets.install("chitchat") / assets.entry("chitchat").paths[0]
    talks = json.loads(file.read_text(encoding="utf-8")).values()
    firsts = [talk["messages"][0][0]["text"].strip() for talk in talks if talk["messages"] and talk["messages"][0]]
    return rng.sample([text for text in dict.fromkeys(firsts) if text], count)


async def measure(team: Path, rules: Routing, seed: int, foreign: int) -> dict[str, Any]:
    """One round: the router fitted, every prompt asked."""
    rng = random.Random(seed)
    members = load(team / "team.yaml").agents
    with tempfile.TemporaryDirectory() as work:
        parts = {member.name: Path(work) / member.name for member in members}
        known = {member.name: halved(Path(member.release), parts[member.name], rng) for member in members}
        router = AutoRouter(Crew(), rules, Path(work) / "state")
        await router.learn(parts)
        await router.settle()
        if router.troubles:
            raise SystemExit(f"the router is not whole: {router.troubles}")
        went: dict[str, Counter[str]] = {}
        asked = {name: [text for text in held_out(team / "data" / name) if text not in known[name]] for name in parts}
        for name, texts in [*asked.items(), ("chitchat", small_talk(foreign, rng))]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the JSON line alone")
    parser.add_argument("--team", type=Path, default=Path("team"), help="what examples/team/up.sh made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chitchat", type=int, default=500, help="conversations asked each round")
    parser.add_argument("--encoder", default="auto")
    arguments = parser.parse_args()
    rules = Routing(encoder=arguments.encoder)
    rounds = []
    for seed in range(arguments.rounds):
        rounds.append(asyncio.run(measure(arguments.team, rules, seed, arguments.chitchat)))
        if not arguments.json:
            print({key: rounds[-1][key] for key in ("accuracy", "by_agent", "abstain_out_of_domain", "encoder")})
    mean = {key: sum(one[key] for one in rounds) / len(rounds) for key in ("accuracy", "abstain_out_of_domain")}
    by_agent = {name: sum(one["by_agent"][name] for one in rounds) / len(rounds) for name in rounds[0]["by_agent"]}
    machine = {"processor": platform.machine(), "python": platform.python_version()}
    print(json.dumps({**mean, "by_agent": by_agent, "rounds": rounds, "machine": machine}))


if __name__ == "__main__":
    main()
