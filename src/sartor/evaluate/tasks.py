"""Adapter -> Report: what it gained on held-out rows and what it forgot, base against tuned, with intervals.

A Task is rows with prompts and references; both sides answer each prompt greedily and are scored by the same scorers.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from sartor.core import catalogue, rows
from sartor.core.artifacts import Artifact, check_free, open_artifact, write_artifact
from sartor.core.errors import AssetError, ConfigError, ModelError
from sartor.core.records import Example
from sartor.evaluate import audit, compare, page
from sartor.evaluate.compare import Comparison
from sartor.evaluate.held_out import HeldOut, fitting, held_out
from sartor.evaluate.scorers import SCORERS
from sartor.models import adapters, batches, composed, paths
from sartor.models.base import Base, open_base
from sartor.models.generate import generate
from sartor.models.media import blank
from sartor.models.native.media import is_native
from sartor.models.sampling import Sampling

Notice = Callable[[str], object]
# A reply may be this much longer than the longest reference before it is cut (and then it is wrong anyway)
SPARE_TOKENS = 8
MOST_REPLY_TOKENS = 512
# Up to this median length of the references an exact match is the natural metric, above it the overlap of words
SHORT_REFERENCE_WORDS = 12


@dataclass(frozen=True)
class Side:
    """What one side (base or tuned) did with the rows of a task: replies, scores by scorer, loss and tokens by row."""

    replies: list[str]
    scores: dict[str, list[float]]
    loss: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` made: the Report."""

    report: Artifact

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        manifest = self.report.manifest
        known = ("primary", "metrics", "forgetting", "audit", "rows", "left_out", "wall_s")
        return {"report": str(self.report.path), **{key: manifest[key] for key in known}}


def evaluate(
    path: Path | str,
    *,
    out: Path | str | None = None,
    data: Path | str | None = None,
    scorer: str = "",
    most_rows: int = 200,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Evaluated:
    """Measure an Adapter (or a Release) against its base and write a Report.

    The rows are those its Dataset holds out, or those of the file `data` in any input form. `scorer` names the metric
    that the gate looks at; by default exact match where references are short, else F1. `out` defaults to `PATH-report`.
    Raises ArtifactError, ModelError, ConfigError, and SourceError when there is no row to evaluate on.
    """
    began = time.monotonic()
    adapter = open_artifact(path, ("adapter", "release"))
    out = Path(out) if out else adapter.path.with_name(f"{adapter.path.name}-report")
    check_free(out.absolute(), replace=replace)
    if scorer and scorer not in SCORERS:
        raise ConfigError(f"there is no scorer {scorer!r}", f"--scorer {' | '.join(SCORERS)}")
    with tempfile.TemporaryDirectory() as media:
        asked = held_out(adapter, Path(data) if data else None, most_rows, Path(media))
        base, model = open_tuned(adapter, notice)
        notice(f"evaluating base and tuned on {len(asked.examples)} held-out rows")
        asked = fitting(base, asked)
        examples = asked.examples
        before, after = (_answer(base, model, asked, tuned=tuned) for tuned in (False, True))
    metrics = _metrics(examples, before, after)
    notice("measuring what was forgotten")
    forgetting = measure_forgetting(base, model)
    facts = {
        "name": adapter.path.name,
        "parents": [adapter.as_parent()],
        "base": base.as_manifest(),
        "sources": adapter.manifest["sources"],
        "licence": adapter.licence,
        "primary": scorer or _primary(examples),
        "metrics": {name: dataclasses.asdict(comparison) for name, comparison in metrics.items()},
        "forgetting": forgetting,
        "audit": {},
        "rows": len(examples),
        "data": str(data) if data else "held-out rows of the Dataset",
        "left_out": asked.left_out,
        "wall_s": round(time.monotonic() - began, 2),
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
    }

    def fill(part: Path) -> Mapping[str, Any]:
        table = _table(examples, before, after)
        rows.write_rows(part / "rows.parquet", pa.Table.from_pylist(table).schema, table)
        (part / "report.html").write_text(page.render(facts, adapter, table), encoding="utf-8")
        return facts

    report = write_artifact(out, "report", fill, replace=replace)
    catalogue.register(report)
    return Evaluated(report)


def open_tuned(adapter: Artifact, notice: Notice = lambda line: None, base_name: str = "") -> tuple[Base, Any]:
    """The base that an Adapter or Release is bound to, and the model with the adapter on it.

    `base_name` gives another place of the same base. Raises ModelError when the base there is not the one that the
    adapter was tuned on, or its chat template differs.
    """
    said = adapter.manifest["base"]
    # a quantised base answers a little differently: what was tuned on one is measured and asked on one
    bits = said["bits"] if said.get("quantisation", "none") != "none" else "auto"
    base = open_base(base_name or said["name"], licence=said["licence"], bits=bits, notice=notice)
    check_base(adapter, base.ref.digest, base.chat.template_digest, base.ref.name)
    if towers := composed.read_towers(adapter.path):
        names = {kind: tower.name for kind, tower in towers.items()}
        base = composed.compose(base, composed.open_towers(names, base.device, notice))
    return base, adapters.open_adapter(base.model, adapter.path)


def check_base(adapter: Artifact, digest: str, template_digest: str, name: str) -> None:
    """Raise ModelError unless a base and its chat template are those that `adapter` is bound to."""
    said = adapter.manifest["base"]
    for what, wanted, found in (
        ("base", said["digest"], digest),
        ("chat template", said["template_digest"], template_digest),
    ):
        if wanted != found:
            raise ModelError(
                f"{adapter.path.name} is bound to the {what} {wanted[:12]} of {said['name']!r}; {name!r} here has {found[:12]}",
                f"use the {what} that it was tuned on, or tune again on this one",
            )


def _answer(base: Base, model: Any, asked: HeldOut, *, tuned: bool) -> Side:
    """Greedy replies, scores and losses of one side."""
    chat, examples, folder = base.chat, asked.examples, asked.folder
    longest = max(len(chat.tokenizer(example.reply)["input_ids"]) for example in examples)
    limit = min(longest + SPARE_TOKENS, MOST_REPLY_TOKENS)
    with side(model, tuned=tuned):
        prompts = [chat.prompt_ids(row.prompt, row.tools, folder) for row in examples if not row.is_document]
        made = iter(generate(model, prompts, stop=chat.stops, pad=chat.pad, sampling=Sampling(limit)))
        replies = ["" if example.is_document else chat.decode(next(made).ids) for example in examples]
        loss, tokens = losses(base, model, asked)
    scores = {
        name: [score(reply, example.reply) for reply, example in zip(replies, examples, strict=True)]
        for name, score in SCORERS.items()
    }
    return Side(replies, scores, loss, tokens)


def side(model: Any, *, tuned: bool) -> AbstractContextManager[Any]:
    """Inside, `model` computes as the tuned model, or as its base, to which what projectors make of media is blank."""
    stack = ExitStack()
    if not tuned:
        stack.enter_context(model.disable_adapter())
        if not is_native(model):  # which reads media without an adapter
            stack.enter_context(blank(model))
    return stack


@torch.no_grad()
def losses(base: Base, model: Any, asked: HeldOut, pack_tokens: int = 2048) -> tuple[list[float], list[int]]:
    """(nats per supervised token, supervised tokens) of each Example under the model as it stands."""
    encoded = [base.chat.encode(example, asked.folder) for example in asked.examples]
    # the fast path would always see the adapter, and `side` switches it off
    path = paths.choose(model, encoded, base.device, paths.Wish(fast=False, share=False))
    means: list[float] = []
    for group in batches.fill([len(row.ids) for row in encoded], max(pack_tokens, *(len(row.ids) for row in encoded))):
        chosen = [encoded[index] for index in group]
        found, _ = path.losses(chosen)
        for part in found.split([row.supervised_tokens for row in chosen]):
            means.append(float(part.mean()) if len(part) else 0.0)
    return means, [row.supervised_tokens for row in encoded]


def _metrics(examples: Sequence[Example], before: Side, after: Side) -> dict[str, Comparison]:
    groups = [example.group for example in examples]
    metrics = {name: compare.paired(before.scores[name], after.scores[name], groups) for name in SCORERS}
    metrics["loss"] = compare.paired(before.loss, after.loss, groups, before.tokens)
    return metrics


def measure_forgetting(base: Base, model: Any) -> dict[str, Any]:
    """Nats per token on the chitchat probe, before and after, with an interval. `skipped` says why when it has none."""
    try:
        probe = audit.chitchat_rows()
    except AssetError as error:
        return {"skipped": f"{error.problem} ({error.remedy})"}
    found = []
    for tuned in (False, True):
        with side(model, tuned=tuned):
            found.append(losses(base, model, HeldOut(probe, Path())))
    (before, tokens), (after, _) = found
    comparison = compare.paired(before, after, [example.group for example in probe], tokens)
    return {"unit": "nats per token", "rows": len(probe), **dataclasses.asdict(comparison)}


def _primary(examples: Sequence[Example]) -> str:
    words = statistics.median(len(example.reply.split()) for example in examples)
    return "exact_match" if words <= SHORT_REFERENCE_WORDS else "f1"


def _table(examples: Sequence[Example], before: Side, after: Side) -> list[dict[str, Any]]:
    """One mapping per row, for rows.parquet and the page."""
    table = []
    for place, example in enumerate(examples):
        row: dict[str, Any] = {
            "id": example.id,
            "group": example.group,
            "prompt": example.prompt[-1].text if example.prompt else "",
            "reference": example.reply,
            "base_reply": before.replies[place],
            "tuned_reply": after.replies[place],
            "base_loss": before.loss[place],
            "tuned_loss": after.loss[place],
        }
        for name in SCORERS:
            row[f"base_{name}"], row[f"tuned_{name}"] = before.scores[name][place], after.scores[name][place]
        table.append(row)
    return table
