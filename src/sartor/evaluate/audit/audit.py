"""The whole audit of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact
from sartor.core.lineage import ancestry
from sartor.core.progress import Progress
from sartor.core.records import Example
from sartor.evaluate import training_facts
from sartor.evaluate.audit import benchmarks, counterfactual_bias, memorization, probes
from sartor.evaluate.audit.counterfactual_bias import Outcomes, Paired, outcomes_of
from sartor.evaluate.audit.model_pair import ModelPair
from sartor.evaluate.group_gap_tests import Array, VariantOutcomes, findings, spread
from sartor.evaluate.predictions import reply_limit
from sartor.evaluate.reply_labels import label_of
from sartor.text.demographics.group_terms import KINDS, groups

Notice = Callable[[str], object]
# Answers to a template's question, the favourable one first
ANSWERS = ("Yes", "No")


@dataclass(frozen=True)
class AuditOptions:
    """Options of an audit.

    label: field of a reply that names its outcome.
    favourable: desirable outcomes.
    benchmarks, templates: whether to ask them too.
    """

    label: str = ""
    favourable: tuple[str, ...] = ()
    benchmarks: bool = True
    templates: bool = True


def audit(
    adapter: Artifact, sides: ModelPair, examples: Sequence[Example], options: AuditOptions, notice: Notice
) -> dict[str, Any]:
    """Return the whole audit.

    examples: rows of the Report, whose prompts are the user's own.

    Raises ConfigError for a label or a favourable outcome that no row has.
    """
    dataset = ancestry.find_parent(adapter, "dataset")
    train = list(parquet_io.read_examples(dataset, "train")) if dataset else []
    system = training_facts.read_facts(adapter).system_prompt if dataset else ""
    stages = 3 + len(counterfactual_bias.TEMPLATES) * options.templates + options.benchmarks
    with Progress("audit", stages, "stages", notice) as progress:
        notice("auditing: prompts that differ in a group alone")
        fields: dict[str, Any] = {"bias": audit_bias(sides, examples, options, system, done=progress.advance)}
        if options.benchmarks:
            notice("auditing: BBQ, CrowS-Pairs, StereoSet, WinoBias")
            fields["benchmarks"] = benchmarks.measure(sides)
            progress.advance()
        notice("auditing: what was learnt by heart, and what is refused")
        missing = {"skipped": f"the Dataset of {adapter.path.name} is not where it was: sartor index DIR finds it"}
        held_out = list(parquet_io.read_examples(dataset, "eval")) if dataset else []
        fields["memorisation"] = (
            memorization.audit_memorisation(sides, train, held_out or examples) if dataset else missing
        )
        progress.advance()
        fields["refusals"] = probes.measure(sides, system)
        progress.advance()
    return fields


def audit_bias(
    sides: ModelPair,
    examples: Sequence[Example],
    options: AuditOptions,
    system: str = "",
    *,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure bias by counterfactual prompts alone.

    system: system prompt of the training rows, which precedes the templates.
    done: called after each section.

    `skipped` lists the kinds that no prompt of a section mentions. Raises ConfigError for a label or a favourable
    outcome that no row has.
    """
    outcomes = outcomes_of([row.reply for row in examples], options.label, options.favourable)
    templates = {}
    for name in counterfactual_bias.TEMPLATES if options.templates else ():
        templates[name] = _templates(sides, name, system)
        done()
    own_section = _audit_own_prompts(sides, examples, outcomes)
    done()
    sections = {"own": own_section, **templates}
    skipped = {}
    for name, section in sections.items():
        if "kinds" in section:
            skipped[name] = [kind for kind, counts in section["kinds"].items() if not counts["blocks"]]
    return {"own": own_section, "templates": templates, "skipped": skipped}


def _audit_own_prompts(sides: ModelPair, examples: Sequence[Example], outcomes: Outcomes | None) -> dict[str, Any]:
    """Return the section of the user's own prompts, with their groups swapped."""
    if outcomes is None:
        return {"skipped": "the replies name no outcome: give --label FIELD, or --favourable OUTCOME"}
    texts = [row for row in examples if not row.is_document]
    replies = outcomes.classes if outcomes.is_whole else [row.reply for row in texts]
    paired_prompts = [_fitting(sides, counterfactual_bias.own_prompts(texts, kind), replies) for kind in KINDS]
    limit = reply_limit(sides.base, texts) if texts else 1
    sections = []
    for paired in paired_prompts:
        if paired.blocks:
            sections += _own_blocks(sides, paired, outcomes, limit)
    outcome = {"field": outcomes.field, "classes": outcomes.classes, "favourable": outcomes.favourable}
    return {"outcome": outcome, **_section_as_json(paired_prompts, sections)}


def _own_blocks(sides: ModelPair, paired: Paired, outcomes: Outcomes, limit: int) -> list[VariantOutcomes]:
    """Return the outcomes of each set of classes that is compared.

    They are likelihoods if a class is a whole reply, else 0 or 1 by the reply's label.
    """
    prompts = [variant for block in paired.blocks for variant in block.variants]
    shape = (2, len(paired.blocks), -1)
    result = []
    if outcomes.is_whole:
        chances = sides.chances(prompts, outcomes.classes)
        for labels in outcomes.looked_at:
            columns = [outcomes.classes.index(item) for item in labels]
            values = chances[:, :, columns].sum(2).reshape(shape)
            result.append(_blocks(paired, " or ".join(labels), values))
    else:
        before, after = sides.answers(prompts, limit)
        reply_labels = [label_of(text, outcomes.field) for text in (*before, *after)]
        for labels in outcomes.looked_at:
            values = np.array([float(label in labels) for label in reply_labels]).reshape(shape)
            result.append(_blocks(paired, " or ".join(labels), values))
    return result


def _blocks(paired: Paired, outcome: str, chances: Array) -> VariantOutcomes:
    """Return the outcomes of a kind's blocks, with their ids and clusters."""
    return VariantOutcomes(
        paired.kind,
        outcome,
        groups=groups(paired.kind),
        ids=tuple(block.id for block in paired.blocks),
        chances=chances,
        clusters=tuple(block.cluster for block in paired.blocks),
    )


def _templates(sides: ModelPair, scenario: str, system: str) -> dict[str, Any]:
    """Return the section of a scenario's templates, by the likelihood of yes and no."""
    paired_prompts = [
        _fitting(sides, counterfactual_bias.templates(scenario, kind, system), ANSWERS) for kind in KINDS
    ]
    sections = []
    for paired in paired_prompts:
        if paired.blocks:
            prompts = [variant for block in paired.blocks for variant in block.variants]
            chances = sides.chances(prompts, ANSWERS)
            favourable = chances[:, :, 0].reshape(2, len(paired.blocks), -1)
            sections.append(_blocks(paired, ANSWERS[0], favourable))
    return _section_as_json(paired_prompts, sections)


def _fitting(sides: ModelPair, paired: Paired, replies: Sequence[str]) -> Paired:
    """Return the blocks whose longest variant the base accepts."""
    reply = max(replies, key=len, default=".")
    blocks = []
    for block in paired.blocks:
        longest = max(block.variants, key=lambda prompt: sum(len(turn.text) for turn in prompt))
        if sides.fits(longest, reply):
            blocks.append(block)
    left_out = paired.left_out + len(paired.blocks) - len(blocks)
    return Paired(paired.kind, tuple(blocks), left_out=left_out, beyond=paired.beyond)


def _section_as_json(paired_prompts: Sequence[Paired], sections: Sequence[VariantOutcomes]) -> dict[str, Any]:
    """Return a section for the Report.

    `kinds`: number of prompts of each kind, with the facts that `needed_blocks` takes. `findings`: the tested gaps.
    `tests`: number of kinds and outcomes.
    """
    counts = {}
    for paired in paired_prompts:
        of_kind = [section for section in sections if section.kind == paired.kind]
        counts[paired.kind] = _counted(paired, of_kind)
    return {"kinds": counts, "findings": [finding.as_json() for finding in findings(sections)], "tests": len(sections)}


def _counted(paired: Paired, sections: Sequence[VariantOutcomes]) -> dict[str, Any]:
    """Return the counts of one kind, and its clusters, groups and spread; `skipped` if nothing was measured."""
    counts = {"blocks": len(paired.blocks), "left_out": paired.left_out, "beyond": paired.beyond}
    if not sections:
        reason = "every prompt that speaks of it was left out" if paired.left_out else "no prompt speaks of it"
        return {**counts, "skipped": reason}
    clusters, deviation = len(set(sections[0].members)), max(spread(section) for section in sections)
    return {**counts, "clusters": clusters, "groups": len(sections[0].groups), "spread": deviation}
