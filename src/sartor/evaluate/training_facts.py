"""Facts about the rows an adapter was tuned on.

The system prompt and the tools that most rows carry, whether their replies are JSON, prompts for the router
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
# of the held-out rows, with which the router's threshold is chosen
HELD_OUT_FRACTION = 1 / 4
MOST_CHARACTERS = 600
# Rows of general talk, which some add to keep a specialist's manners: what the router should leave to the base
OTHER = "other"
MOST_OTHER = 60
# So many of the general rows are looked through for those that are most like the agent's own
MOST_MINED = 2_000
# They are the probe of a personal version too, of which six are the least that tell (evaluate/bootstrap.py): two to
# spare
CANARIES = 8
# A reply is JSON if the training replies are, but for a few
JSON_FRACTION = 0.95
MASKING = "personal_data"


@dataclass
class TrainingFacts:
    """Counted over the rows of a Dataset; `exemplars` maps a split to (Example's id, prompt, system prompt).

    `rehearsed`: (Example's id, prompt) of rows whose source the recipe calls `rehearsal`; nothing else is counted of
    them.
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
        """What most rows open with; empty if that is nothing."""
        return self.systems.most_common(1)[0][0] if self.systems else ""

    @property
    def most_tools(self) -> list[Any]:
        """The tools that most rows declare."""
        tools_json = self.tools.most_common(1)[0][0] if self.tools else ""
        return list(json.loads(tools_json)) if tools_json else []

    @property
    def format(self) -> Literal["json", "text"]:
        """What the replies are."""
        return "json" if self.rows and self.json_replies >= JSON_FRACTION * self.rows else "text"

    def rehearse(self, example: Example) -> None:
        """One row of general talk."""
        if text := _exemplar(example):
            self.rehearsed.append((example.id, text))

    def add(self, example: Example) -> None:
        """One row of the agent's own, of either split."""
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
    """The facts of an Adapter's Dataset, and of those of what its tuning went on from; each row once.

    Raises ArtifactError where the Dataset is not to be found.
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
            if example.id in seen or example.rating < 0:  # what was rated bad shows no reply of the agent's
                continue
            seen.add(example.id)
            is_rehearsal = all(origin.source in rehearsed for origin in example.origins)
            (facts.rehearse if is_rehearsal else facts.add)(example)
    for dataset in ancestry.test_datasets(adapter):  # a Report on them records replies to their prompts
        facts.prompts |= {example.id: example.prompt for example in parquet_io.read_examples(dataset, TEST)}
    return facts


def _earlier(adapter: Artifact) -> Iterator[Artifact]:
    """The Datasets of the Adapters that a tuning went on from, the nearest first, as far as they still stand."""
    starts = {parent["id"] for parent in adapter.manifest["parents"] if parent["kind"] in ("adapter", "release")}
    for step in ancestry.walk(adapter):
        if step.id in starts and step.state == "opened":
            start = open_artifact(step.path)
            if (dataset := ancestry.find_parent(start, "dataset")) is not None:
                yield dataset
            yield from _earlier(start)


def write_exemplars(facts: TrainingFacts, part: Path, max_rows: int) -> int:
    """`router/exemplars.jsonl` below `part`: {"text", "split"} a line, `max_rows` in all; 0 writes none. Returns how
    many.

    split: `train`, `eval` (held out: the router's threshold is chosen with them), or `other`: rehearsal, and training
    rows without a system prompt where most have one, which are general talk and what the agent is not for. Rows are
    taken in the
    order of their ids, which are digests: any part of them is a fair sample, and the same one each time. Where there
    is more general talk than room, half of it is that which is most like the agent's own prompts. Prompts that look
    personal are left out.
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
    """A few held-out prompts of the Report with the tuned model's greedy replies: what admission asks again before it
    serves.

    One of each reply first, then others of the same reply. The shortest, since they are compared as they stand and
    numbers that are rounded otherwise part long ones. None of a row with media: a manifest holds text; none that was
    cut. Each states by which arithmetic its reply was made (core/numerics.py).
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
    """A row's prompt as it was asked; one from another file than the Dataset, after the system prompt that most rows
    have.
    """
    messages = facts.prompts.get(row["id"])
    if messages is None:
        system = [Message.of("system", facts.system_prompt)] if facts.system_prompt else []
        messages = (*system, Message.of("user", row["prompt"]))
    return [{"role": message.role, "content": message.text} for message in messages]


def _exemplar(example: Example) -> str:
    """The question of a row: its last user turn, if it is short enough and nothing in the row was masked."""
    questions = [message.text.strip() for message in example.prompt if message.role == "user"]
    is_fit = bool(questions) and MASKING not in example.steps and len(questions[-1]) <= MOST_CHARACTERS
    return questions[-1] if is_fit else ""


def _chosen(rows: Sequence[tuple[str, str]], max_texts: int) -> list[str]:
    texts = dict.fromkeys(text for _, text in sorted(rows))
    return list(itertools.islice((text for text in texts if not _is_personal(text)), max_texts))


def _hard(general: Sequence[tuple[str, str]], own_texts: Sequence[str], max_texts: int) -> list[str]:
    """Of general talk a fair sample, and as many that have most words in common with one of the agent's own
    prompts.
    """
    texts = _chosen(general, MOST_MINED)
    if len(texts) <= max_texts or not own_texts:
        return texts[:max_texts]
    from sklearn.preprocessing import normalize  # a second to import, and few Releases have so much talk

    weights = rarity(texts)
    general_vectors, own_vectors = (
        normalize(counts(sample).multiply(weights).tocsr()) for sample in (texts, own_texts[:MOST_MINED])
    )
    likeness = (general_vectors @ own_vectors.T).max(axis=1).toarray()[:, 0]
    fair = texts[: max_texts - max_texts // 2]
    nearest = sorted(range(len(fair), len(texts)), key=lambda index: -likeness[index])
    return [*fair, *(texts[index] for index in nearest[: max_texts // 2])]


def _is_personal(text: str) -> bool:
    return _masker()(text) != text


@cache
def _masker() -> Callable[[str], str]:
    return PersonalData().masker()
