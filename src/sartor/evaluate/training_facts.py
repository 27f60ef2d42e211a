"""Facts about the rows an adapter was tuned on.

They are the system prompt and the tools that most rows carry, whether their replies are JSON, prompts for the router
(`exemplars`), and prompts with the replies that the Report recorded (`canaries`). No torch.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sartor.core import numerics, parquet_io
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError
from sartor.core.lineage import ancestry
from sartor.core.records import Example, Message
from sartor.core.splits import TEST
from sartor.curate.steps.personal_data import PersonalData
from sartor.evaluate.reply_labels import is_json
from sartor.text.encoders import counts, rarity

EXEMPLARS = "router/exemplars.jsonl"
MOST_EXEMPLARS = 400
# fraction of exemplars from held-out rows, with which the router's threshold is chosen
HELD_OUT_FRACTION = 1 / 4
MOST_CHARACTERS = 600
# Split of rows of general conversation, which a rehearsal adds: the router should leave them to the base
OTHER = "other"
MOST_OTHER = 60
# So many general rows are searched for those that resemble the agent's own most
MOST_MINED = 2_000
# They also probe a personal version, which needs at least six (evaluate/bootstrap.py); two are spare
CANARIES = 8
# Replies are JSON if at least this fraction of the training replies is
JSON_FRACTION = 0.95
MASKING = "personal_data"


@dataclass
class TrainingFacts:
    """Counts over the rows of a Dataset.

    exemplars: split -> (Example's id, prompt, system prompt).
    rehearsed: (Example's id, prompt) of rows whose source the recipe calls `rehearsal`; nothing else is counted of
    them.
    prompts: Example's id -> its prompt, of held-out rows.
    """

    systems: Counter[str] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)
    json_replies: int = 0
    rows: int = 0
    exemplars: dict[str, list[tuple[str, str, str]]] = field(default_factory=lambda: {"train": [], "eval": []})
    rehearsed: list[tuple[str, str]] = field(default_factory=list)
    prompts: dict[str, tuple[Message, ...]] = field(default_factory=dict)

    @property
    def system_prompt(self) -> str:
        """System prompt of most rows; empty if most have none."""
        return self.systems.most_common(1)[0][0] if self.systems else ""

    @property
    def most_tools(self) -> list[Any]:
        """Tools that most rows declare."""
        tools_json = self.tools.most_common(1)[0][0] if self.tools else ""
        return list(json.loads(tools_json)) if tools_json else []

    @property
    def format(self) -> Literal["json", "text"]:
        """Format of the replies: "json" if at least JSON_FRACTION of them are JSON, else "text"."""
        return "json" if self.rows and self.json_replies >= JSON_FRACTION * self.rows else "text"

    def rehearse(self, example: Example) -> None:
        """Record one row of general conversation."""
        if text := _exemplar(example):
            self.rehearsed.append((example.id, text))

    def add(self, example: Example) -> None:
        """Count one row of the agent's own, of either split."""
        system = example.messages[0].text if example.messages[0].role == "system" else ""
        if example.split == "train":
            self.rows += 1
            self.systems[system] += 1
            self.tools[example.tools] += 1
            self.json_replies += is_json(example.reply)
        else:
            self.prompts[example.id] = example.prompt
        if example.split in self.exemplars and (text := _exemplar(example)):
            self.exemplars[example.split].append((example.id, text, system))


def read_facts(adapter: Artifact) -> TrainingFacts:
    """Return the facts of an Adapter's Dataset and of the Datasets that its tuning went on from.

    Each row counts once; rows that were rated bad do not count. Raises ArtifactError if the Dataset is not found.
    """
    own_dataset = ancestry.find_parent(adapter, "dataset")
    if own_dataset is None:
        raise ArtifactError(
            f"the Dataset of {adapter.path} is not where it was, so the system prompt of its rows is unknown",
            "sartor index DIR finds a Dataset that was moved",
        )
    facts, seen = TrainingFacts(), set[str]()
    for dataset in (own_dataset, *_earlier(adapter)):
        rehearsed = parquet_io.rehearsal_sources(dataset)
        for example in parquet_io.read_examples(dataset):
            if example.id in seen or example.rating < 0:  # a reply that was rated bad is no example
                continue
            seen.add(example.id)
            is_rehearsal = all(origin.source in rehearsed for origin in example.origins)
            (facts.rehearse if is_rehearsal else facts.add)(example)
    for dataset in ancestry.test_datasets(adapter):  # a Report on them records replies to their prompts
        facts.prompts |= {example.id: example.prompt for example in parquet_io.read_examples(dataset, TEST)}
    return facts


def _earlier(adapter: Artifact) -> Iterator[Artifact]:
    """Yield the Datasets of the Adapters that a tuning went on from, the nearest first.

    Datasets that no longer exist are left out.
    """
    starts = {parent["id"] for parent in adapter.manifest["parents"] if parent["kind"] in ("adapter", "release")}
    for step in ancestry.walk(adapter):
        if step.id in starts and step.state == "opened":
            start = open_artifact(step.path)
            if (dataset := ancestry.find_parent(start, "dataset")) is not None:
                yield dataset
            yield from _earlier(start)


def write_exemplars(facts: TrainingFacts, part: Path, max_rows: int) -> int:
    """Write `router/exemplars.jsonl` below `part` and return its number of lines.

    A line is {"text", "split"}; there are at most `max_rows`, and none writes no file.

    split: `train`, `eval` (held out: the router's threshold is chosen with them), or `other`: general conversation,
    which the agent is not for. That is rehearsal, and training rows without a system prompt where most have one.

    Rows are taken in the order of their ids, which are digests. So any part of them is a fair sample, and the same
    one each time. If there is more general conversation than room, half of it is what resembles the agent's own
    prompts most. Prompts that look personal are left out.
    """
    is_general = bool(facts.system_prompt)
    own_prompts: list[tuple[str, str]] = []
    general = list(facts.rehearsed)
    for id, text, system in facts.exemplars["train"]:
        (general if is_general and not system else own_prompts).append((id, text))
    train_texts = {text for _, text, _ in facts.exemplars["train"]} | {text for _, text in facts.rehearsed}
    unseen = [
        (id, text)
        for id, text, system in facts.exemplars["eval"]
        if text not in train_texts and (system or not is_general)
    ]
    held_out = _chosen(unseen, round(max_rows * HELD_OUT_FRACTION))
    others = _hard(general, [text for _, text in own_prompts], min(MOST_OTHER, max_rows // 5))
    chosen = [("train", text) for text in _chosen(own_prompts, max_rows - len(held_out) - len(others))]
    chosen += [*(("eval", text) for text in held_out), *((OTHER, text) for text in others)]
    if chosen:
        (part / EXEMPLARS).parent.mkdir()
        lines = [json.dumps({"text": text, "split": split}, ensure_ascii=False) + "\n" for split, text in chosen]
        (part / EXEMPLARS).write_text("".join(lines), encoding="utf-8")
    return len(chosen)


def recorded_canaries(facts: TrainingFacts, report: Artifact) -> list[dict[str, Any]]:
    """Return a few held-out prompts of the Report with the tuned model's greedy replies.

    Admission asks them again before it serves.

    One prompt of each distinct reply comes first, then others with the same reply. Short replies are preferred:
    replies are compared exactly, and different rounding makes long ones diverge. Rows with media are left out, since
    a manifest holds text, and so are replies that were cut. Each entry states the arithmetic that made its reply
    (core/numerics.py).
    """
    rows = parquet_io.read_file(report.path / "rows.parquet")
    candidates = [
        row for row in rows if row["tuned_reply"].strip() and not row.get("media") and not row.get("tuned_is_cut")
    ]
    candidates.sort(key=lambda row: (len(row["tuned_reply"]), row["id"]))
    first = {row["tuned_reply"]: row["id"] for row in reversed(candidates)}
    candidates.sort(key=lambda row: first[row["tuned_reply"]] != row["id"])
    prompts: dict[str, dict[str, Any]] = {}
    for row in candidates:
        prompts.setdefault(json.dumps(_messages(facts, row)), row)
    chosen = itertools.islice(prompts.values(), CANARIES)
    base = report.manifest.get("base", {})
    arithmetic = {"dtype": base["dtype"], "numerics": base.get("numerics", numerics.FIRST)} if "dtype" in base else {}
    return [{"messages": _messages(facts, row), "reply": row["tuned_reply"], **arithmetic} for row in chosen]


def _messages(facts: TrainingFacts, row: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row's prompt as it was asked.

    A row from another file than the Dataset is preceded by the system prompt of most rows.
    """
    messages = facts.prompts.get(row["id"])
    if messages is None:
        system = [Message.of("system", facts.system_prompt)] if facts.system_prompt else []
        messages = (*system, Message.of("user", row["prompt"]))
    return [{"role": message.role, "content": message.text} for message in messages]


def _exemplar(example: Example) -> str:
    """Return the question of a row: its last user turn; "" if it is too long or the row was masked."""
    questions = [message.text.strip() for message in example.prompt if message.role == "user"]
    is_fit = bool(questions) and MASKING not in example.steps and len(questions[-1]) <= MOST_CHARACTERS
    return questions[-1] if is_fit else ""


def _chosen(rows: Sequence[tuple[str, str]], max_texts: int) -> list[str]:
    """Return up to `max_texts` distinct texts in the order of their ids, without those that look personal."""
    texts = dict.fromkeys(text for _, text in sorted(rows))
    return list(itertools.islice((text for text in texts if _masker()(text) == text), max_texts))


def _hard(general: Sequence[tuple[str, str]], own_texts: Sequence[str], max_texts: int) -> list[str]:
    """Return a fair sample of general texts, and as many that resemble the agent's own prompts most.

    Resemblance is the largest cosine similarity to one own prompt, of word counts weighted by rarity.
    """
    texts = _chosen(general, MOST_MINED)
    if len(texts) <= max_texts or not own_texts:
        return texts[:max_texts]
    from sklearn.preprocessing import normalize  # takes a second to import, and few Releases have so many rows

    weights = rarity(texts)
    general_vectors, own_vectors = (
        normalize(counts(sample).multiply(weights).tocsr()) for sample in (texts, own_texts[:MOST_MINED])
    )
    likeness = (general_vectors @ own_vectors.T).max(axis=1).toarray()[:, 0]
    fair = texts[: max_texts - max_texts // 2]
    nearest = sorted(range(len(fair), len(texts)), key=lambda index: -likeness[index])
    return [*fair, *(texts[index] for index in nearest[: max_texts // 2])]


@cache
def _masker() -> Callable[[str], str]:
    return PersonalData().masker()
