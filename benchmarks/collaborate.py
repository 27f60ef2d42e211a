"""Draft -> check -> mend against the single specialist at no fewer tokens, on held-out commands of a home.

The specialist is tuned briefly on few rows of the asset `home-intents`, so that there is something to mend; held-out
rows are wordings that it never saw. All sides are answered by the package's own engine in this process, the plans by
the package's own conductor. What the home knows of itself (intents, their slots and values, its areas, floors and
names) is a JSON Schema, which
every side may decode under: else the plan would win by what it is told and not by how it works.

    single         one greedy reply
    checked        draft -> JSON of the schema? said in the request? -> the same specialist again, sampled, under the
                   schema
    vote           the greedy reply and n - 1 sampled ones, the majority of them
    .._schema      the same, every reply decoded under the schema

n is the least odd number, 3 at least, by which a vote takes no fewer tokens than `checked` beside it, prompts and
replies together. An interval is of a paired bootstrap over wordings. Temperature and mends were set before anything
was measured.

    nice -n 3 python benchmarks/collaborate.py --out DIR --json          # what is in DIR already is not made again
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import smallest
from results import print_result

import sartor
from sartor.core import assets, config, records
from sartor.core.artifacts import open_artifact
from sartor.core.parquet_io import read_examples
from sartor.demo import home_intents
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.evaluate.scorers import exact_match
from sartor.inference.engine import (
    Engine,
    Event,
    GenerateCall,
    ReplyDone,
    TextDelta,
    adapter_digest,
    event_as_json,
    event_from_json,
)
from sartor.inference.local.local_engine import open_engine
from sartor.serving.dispatch.dispatcher import CallTerms, build_call
from sartor.serving.plans.plan_dispatch import PlanDispatcher
from sartor.serving.plans.plan_log import PlanLog
from sartor.serving.receipts import digest_by
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.team_config import Team
from sartor.serving.types import AgentReply, AgentRequest

HELPERS = Path(__file__).parent.parent / "tests" / "helpers"
AGENT = "home"
TEMPERATURE, MENDS = 0.8, 4
MOST_TOKENS = 96
SMALL_ASKED = 4
NAMES = sorted({one for names in home_intents.NAMES.values() for one in names})
KNOWN = {"area": home_intents.AREAS, "floor": home_intents.FLOORS, "name": NAMES}
SAID = ("area", "floor", "name", *home_intents.WILDCARDS)


class Events:
    """The events of one call, as the engine says them, or as it said them before."""

    def __init__(self, known: Sequence[Event] = ()) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        for event in known:
            self.queue.put_nowait(event)
        self._is_over = False

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        event = await self.queue.get()
        self._is_over = not isinstance(event, TextDelta)
        return event

    async def aclose(self) -> None:
        self._is_over = True


@dataclass
class House:
    """One engine in this process with the specialist on it. A call that was answered before counts, and is not
    computed.
    """

    engine: Engine
    version: AgentVersion
    file: Path
    live: dict[str, tuple[str, Events, list[Event]]] = field(default_factory=dict)
    known: dict[str, list[Event]] = field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            key, events = json.loads(line)
            self.known[key] = [event_from_json(event) for event in events]

    def keep(self) -> None:
        """What was answered so far, for the next time."""
        lines = [json.dumps([key, [event_as_json(event) for event in events]]) for key, events in self.known.items()]
        part = self.file.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        part.replace(self.file)

    async def open(self, request: AgentRequest) -> AgentReply:
        call = build_call(request, self.version, f"c{self.made}", CallTerms(MOST_TOKENS))
        self.made += 1
        key = key_of(call)
        events = Events(self.known.get(key, ()))
        if key not in self.known:
            self.live[call.id] = (key, events, [])
            self.engine.submit(call)
        return AgentReply(self.version.name, "asked by name", call.id, events)

    async def work(self) -> None:
        """Drive the engine while there is something to do; until cancelled."""
        while True:
            for event in self.engine.step() if self.engine.busy else ():
                key, events, heard = self.live[event.call]
                heard.append(event)
                events.queue.put_nowait(event)
                if isinstance(event, ReplyDone):
                    self.known[key] = heard
            await asyncio.sleep(0 if self.engine.busy else 0.001)


def key_of(call: GenerateCall) -> str:
    """What two calls have in common that are answered alike."""
    return records.digest(json.loads(json.dumps(replace(call, id="").as_json())))


@dataclass(frozen=True)
class Side:
    """What one side said: per row its score and its tokens, prompts and replies together."""

    scores: list[float]
    tokens: list[int]
    replies: list[str]

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens) / len(self.tokens)


def schema_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the home takes: each intent with its slots, each of which is one of its own things or of a type."""
    slots: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        reply = json.loads(row["messages"][-1]["content"])
        found = slots.setdefault(reply.pop("intent"), defaultdict(list))
        for name, value in reply.items():
            found[name].append(value)
    return {"anyOf": [_intent(intent, found) for intent, found in sorted(slots.items())]}


def _intent(intent: str, slots: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    properties = {"intent": {"const": intent}, **{name: _slot(name, values) for name, values in sorted(slots.items())}}
    return {"type": "object", "properties": properties, "required": ["intent"], "additionalProperties": False}


def _slot(name: str, values: Sequence[Any]) -> dict[str, Any]:
    if name in KNOWN and set(values) <= set(KNOWN[name]):
        return {"enum": list(KNOWN[name])}
    if name in SAID:  # what people call a timer is theirs to choose
        return {"type": "string", "maxLength": 60}
    if all(isinstance(value, int) for value in values):
        return {"type": "integer"}
    plain = list({records.canonical_text(value): value for value in values}.values())
    return {"enum": plain}


def team_of(schema: Mapping[str, Any], members: int, state: Path) -> Team:
    """The plans that are compared."""
    sampled = {"agent": AGENT, "temperature": TEMPERATURE}
    mend = {**sampled, "gets": ["request"], "schema": schema, "times": MENDS, "repeats": MENDS}
    check = ["json", {"json": {"schema": schema}}, {"citations": {"fields": list(SAID)}}]
    checked = {"name": "checked", "kind": "sequence", "steps": AGENT, "check": check, "mend": mend}
    vote = {"name": "vote", "kind": "parallel", "members": [AGENT, *[sampled] * (members - 1)]}
    plans = [checked, vote]
    said = [{**plan, "budget": {"tokens": 65_536, "seconds": 3600.0}} for plan in plans]
    return config.load(Team, {"base": "starter", "state": str(state), "plans": said})


async def answered(plans: PlanDispatcher, rows: Sequence[Any], model: str, schema: str, at_once: int) -> Side:
    """Every row asked of one side."""
    gate = asyncio.Semaphore(at_once)

    async def one(row: Any) -> tuple[str, int]:
        sampling = {"temperature": 0.0, "seed": 0}
        messages = tuple({"role": message.role, "content": message.text} for message in row.prompt)
        async with gate:
            answer = await plans.open(
                AgentRequest(model, messages, sampling=sampling, schema=schema, deadline_s=3600.0)
            )
            events = [event async for event in answer.events]
        end = events[-1]
        assert isinstance(end, ReplyDone), end
        return "".join(
            event.text for event in events if isinstance(event, TextDelta)
        ), end.prompt_tokens + end.reply_tokens

    said = await asyncio.gather(*[one(row) for row in rows])
    scores = [exact_match(text, row.reply) for (text, _), row in zip(said, rows, strict=True)]
    return Side(scores, [tokens for _, tokens in said], [text for text, _ in said])


async def measured(
    house: House, rows: Sequence[Any], schema: Mapping[str, Any], out: Path, at_once: int
) -> tuple[dict[str, Side], dict[str, int]]:
    """(sides, how many vote in two of them)."""
    members: dict[str, int] = {}
    sides: dict[str, Side] = {}
    working = asyncio.ensure_future(house.work())
    text = json.dumps(schema)

    def plans(members: int) -> PlanDispatcher:
        return PlanDispatcher(
            team_of(schema, members, out / "state"), house, PlanLog(out / "state/plans", digest_by(b"benchmark"))
        )

    async def side(name: str, model: str, schema: str = "", members: int = 3) -> Side:
        began = time.monotonic()
        found = await answered(plans(members), rows, model, schema, at_once)
        exact = sum(found.scores) / len(rows)
        house.keep()
        print(
            f"{name}: {exact:.3f}, {found.mean_tokens:.0f} tokens a row, {time.monotonic() - began:.0f} s",
            file=sys.stderr,
        )
        return found

    try:
        for name, schema_text in (("_schema", text), ("", "")):
            single = sides[f"single{name}"] = await side(f"single{name}", AGENT, schema_text)
            checked = sides[f"checked{name}"] = await side(f"checked{name}", "checked", schema_text)
            count = members[f"vote{name}"] = max(3, math.ceil(checked.mean_tokens / single.mean_tokens) | 1)
            sides[f"vote{name}"] = await side(f"vote{name}", "vote", schema_text, count)
    finally:
        working.cancel()
    return sides, members


def made_rows(quick: bool) -> list[dict[str, Any]]:
    if not quick:
        return home_intents.rows(assets.install("home-intents"))
    rooms = [room for room in home_intents.AREAS if " " not in room]
    said = [("on", "HassTurnOn"), ("off", "HassTurnOff")]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{word} {room}"},
                {"role": "assistant", "content": json.dumps({"intent": intent, "area": room}, separators=(",", ":"))},
            ],
            "group": f"{word} {room}",
        }
        for room in rooms
        for word, intent in said
    ]


def specialist(asked: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> tuple[Path, str]:
    """(the Adapter's directory, its base): curated and tuned, unless it is there."""
    out, base = asked.out, "starter"
    if asked.small:
        sys.path.insert(0, str(HELPERS))
        import tiny

        base = str(out / "tiny" if (out / "tiny").exists() else tiny.write_base(out / "tiny"))
    if not (out / "dataset").exists():
        (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = {"path": str(out / "rows.jsonl"), "licence": "Apache-2.0"}
        fraction = 1 - asked.train / (asked.train + asked.held_out)
        sartor.curate(
            {"sources": [source], "split": {"eval_fraction": round(fraction, 3)}, "seed": 0}, out / "dataset"
        )
    if not (out / "adapter").exists():
        recipe = {
            "base": base,
            "data": {"path": str(out / "dataset"), "eval_rows": 8},
            "method": {"kind": "lora", "rank": 16, "alpha": 32},
            "budget": {"epochs": asked.epochs},
            "optimizer": {"learning_rate": 2e-3, "batch_tokens": 256},
        }
        sartor.tune(recipe, out / "adapter", resume=True, show=False, notice=lambda line: print(line, file=sys.stderr))
    return out / "adapter", base


def compared(sides: Mapping[str, Side], groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each checked side over each that is not."""
    found: dict[str, dict[str, Any]] = {}
    for ours in (name for name in sides if name.startswith("checked")):
        for name in (name for name in sides if not name.startswith("checked")):
            one = paired_bootstrap(sides[name].scores, sides[ours].scores, groups)
            interval = {"estimate": round(one.difference, 4), "low": round(one.low, 4), "high": round(one.high, 4)}
            found.setdefault(ours, {})[name] = interval
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="what is made stays there; with --small a temporary directory by default"
    )
    parser.add_argument("--train", type=int, default=240, help="rows that the specialist is tuned on")
    parser.add_argument("--held-out", type=int, default=200, help="rows that it never sees")
    parser.add_argument("--ask", type=int, default=0, help="of these, so many are asked; 0 is all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    smallest.add_argument(parser, "--quick")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.small:
        asked.ask = asked.ask or SMALL_ASKED
    elif asked.out is None:
        parser.error("--out DIR: where the specialist and what it answered stay")
    with tempfile.TemporaryDirectory(prefix="sartor-collaborate-") as folder:
        asked.out = asked.out or Path(folder)
        asked.out.mkdir(parents=True, exist_ok=True)
        print_result(measure(asked), indent=None if asked.json else 2)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Tune the specialist, unless it is there, and ask every side."""
    every = made_rows(asked.small)
    rows = every[: asked.train + asked.held_out]
    began = time.monotonic()
    adapter, base = specialist(asked, rows)
    artifact = open_artifact(adapter, "adapter")
    made_s = time.monotonic() - began
    held_out = [one for one in read_examples(open_artifact(asked.out / "dataset")) if one.split == "eval"]
    held_out = held_out[: asked.ask or asked.held_out]
    engine = open_engine(base, rows=16, threads=asked.threads)
    digest = adapter_digest(artifact.manifest["files"])
    engine.attach(digest, adapter)
    house = House(
        engine,
        AgentVersion(AGENT, "1", str(adapter), "", digest, {"sampling": {"max_tokens": MOST_TOKENS}}),
        asked.out / "known.jsonl",
    )
    sides, members = asyncio.run(measured(house, held_out, schema_of(every), asked.out, 32))
    report = {
        "rows": {"train": artifact.manifest["run"].get("rows", asked.train), "held_out": len(held_out)},
        "sides": {
            name: {"exact_match": round(sum(side.scores) / len(held_out), 4), "tokens": round(side.mean_tokens, 1)}
            for name, side in sides.items()
        },
        "vote_members": members,
        "over": compared(sides, [one.group or one.id for one in held_out]),
        "specialist_s": round(made_s, 1),
        "wall_s": round(time.monotonic() - began, 1),
    }
    said = [
        {
            "prompt": row.prompt[-1].text,
            "right": row.reply,
            **{name: side.replies[place] for name, side in sides.items()},
        }
        for place, row in enumerate(held_out)
    ]
    (asked.out / "replies.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
