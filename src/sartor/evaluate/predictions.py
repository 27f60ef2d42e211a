"""Held-out rows and the replies of a model to them."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sartor.core import parquet_io, reply_markup
from sartor.core.artifacts import Artifact, adapter_manifest
from sartor.core.errors import ArtifactError, ConfigError, ModelError, SourceError
from sartor.core.lineage import ancestry
from sartor.core.records import Example
from sartor.core.row_warnings import DataWarning
from sartor.core.splits import LEAST_GROUPS, TEST, split_group
from sartor.evaluate.file_rows import rows_of_file
from sartor.evaluate.metrics import ModelOutputs
from sartor.evaluate.reply_labels import label_of, span_of
from sartor.inference.engine import Sampling
from sartor.inference.generate import DECIDED, Generation, context_tokens, generate
from sartor.models import packing
from sartor.models.base import Base
from sartor.models.chat import ChatTokenizer
from sartor.models.content_shielding import reply_text
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.media_tokens import blank
from sartor.models.multimodal.native_media import is_native
from sartor.models.packing import TokenizedExample
from sartor.models.reasoning_rules import with_reasoning_rule


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate on.

    folder: folder of their media.
    left_out: number of rows that were left out, by reason.
    """

    examples: list[Example]
    folder: Path
    left_out: dict[str, int] = field(default_factory=dict)


def held_out(adapter: Artifact, data: Path | None, most_rows: int, media: Path, split: str = "eval") -> HeldOut:
    """Return the rows to evaluate on, and how many were left out and why.

    split: of the Dataset; it applies only without `data`.
    media: a folder of the caller's, into which the media of `data` are copied.

    Rows that were trained on are never among them, those of `data` by the rule of `file_rows.py`. Where a Dataset is
    missing this cannot be checked, and `left_out` says so. An Adapter of many clients has a Dataset of each: a row
    that one holds out and another trained on is left out. Rows that were rated bad are left out too. Raises
    ConfigError if `most_rows` is below 1, ArtifactError if no Dataset is found and no `data` given, and SourceError if
    no row is left.
    """
    datasets = ancestry.find_parents(adapter, "dataset")
    left_out: dict[str, int] = {}
    if most_rows < 1:
        raise ConfigError(f"--rows is {most_rows}; there must be at least one row to evaluate on", "--rows 200")
    if data is None:
        if not datasets:
            raise ArtifactError(
                f"the Dataset of {adapter.path} is not where it was, or was changed",
                "sartor index DIR finds it; or give --data FILE",
            )
        if split == TEST:  # a retrained version's own Dataset has no test rows; its ancestor's may have
            datasets = ancestry.test_datasets(adapter) or datasets
        folder = datasets[0].path
        examples = _held_out_of(datasets, ancestry.training_datasets(adapter), left_out, split)
        alternative = "and tune again" if split == TEST else "or give --data FILE"
        if not examples and (trained_on := left_out.get("trained_on")):
            raise SourceError(
                f"all {trained_on} rows that {folder} holds out in the split {split} were trained on, as rehearsal or "
                "in the tuning that this one went on from",
                f"curate again with rows that were not trained on, {alternative}",
            )
        if not examples:
            raise _nothing_held_out_error(datasets, split, alternative)
    else:
        if not datasets:
            # the entry itself tells that the Dataset is missing; no row was left out for it
            left_out["not_compared_with_training_rows"] = 0
        folder = media
        examples, refused = rows_of_file(data, datasets, ancestry.training_datasets(adapter), media)
        left_out |= refused
    if bad_count := sum(example.rating < 0 for example in examples):
        left_out["rated_bad"] = bad_count  # such a reply is no reference
        examples = [example for example in examples if example.rating >= 0]
        if not examples:
            instead = ", in place of --split test" if split == TEST else ""
            raise SourceError(
                f"all {bad_count} rows were rated bad, and so show no reply to be like",
                f'--data FILE with rows of "rating": 0 or above{instead}',
            )
    # order by digest: a fixed sample, the same rows in every run
    examples.sort(key=lambda example: hashlib.sha256(example.id.encode()).digest())
    if len(examples) > most_rows:
        left_out["beyond_most_rows"] = len(examples) - most_rows
    return HeldOut(examples[:most_rows], folder, left_out)


def _held_out_of(
    datasets: Sequence[Artifact], training_datasets: Sequence[Artifact], left_out: dict[str, int], split: str
) -> list[Example]:
    """Return the rows that Datasets hold out, each once, without rows that a Dataset trained on.

    Those include `training_datasets`, among which are the Datasets of the rehearsal and of what the Adapter went on
    from. Media lie below the first of `datasets`.
    """
    examples = {example.id: example for dataset in datasets for example in parquet_io.read_examples(dataset, split)}
    is_own = [item.id for item in training_datasets] == [item.id for item in datasets]
    trained_on = set() if is_own and len(datasets) == 1 else _trained_on(training_datasets) & set(examples)
    if trained_on:
        left_out["trained_on"] = len(trained_on)
    return [example for name, example in examples.items() if name not in trained_on]


def _nothing_held_out_error(datasets: Sequence[Artifact], split: str, alternative: str) -> SourceError:
    """Return the error for Datasets without a row in a split.

    The remedy names a fraction that holds out a group, where one can.
    """
    groups = Counter(split_group(example) for dataset in datasets for example in parquet_io.read_own_examples(dataset))
    rows, folder = groups.total(), datasets[0].path
    if len(groups) < 2:
        problem = (
            f"{folder} holds out no row in the split {split}: its {rows} rows are in one group, which is never parted"
        )
        return SourceError(problem, f"add rows of other groups, {alternative}")
    # the smallest groups that give an interval, or one where these would be most of the rows
    sizes = sorted(groups.values())
    wanted = sum(sizes[:LEAST_GROUPS])
    fraction = math.ceil(100 * (wanted if 2 * wanted <= rows else sizes[0]) / rows) / 100
    problem = f"{folder} holds out no row in the split {split}, of {rows} rows in {len(groups)} groups"
    return SourceError(problem, f"curate with split.{split}_fraction of {min(fraction, 0.5):g} or more, {alternative}")


def _trained_on(datasets: Sequence[Artifact]) -> set[str]:
    """Return the ids of the training rows of Datasets."""
    return {example.id for dataset in datasets for example in parquet_io.read_examples(dataset, "train")}


@dataclass(frozen=True)
class TrainingForm:
    """How the rows of a tuning were written: a held-out row is written alike.

    reasoning: the rule for reasoning (`models/reasoning_rules.py`). empty_think: whether a template's empty thinking
    block is kept.
    """

    reasoning: str = "last"
    empty_think: str = "keep"

    @classmethod
    def of(cls, adapter: Artifact) -> TrainingForm:
        """Return the form of an Adapter's or Release's tuning; the defaults for one that was tuned elsewhere."""
        data = adapter_manifest(adapter).get("recipe", {}).get("data", {})
        return cls(data.get("reasoning", "last"), data.get("empty_think", "keep"))

    def base(self, base: Base) -> Base:
        """Return the base with the chat template as the tuning had it."""
        return base if self.empty_think == "keep" else replace(base, chat=base.chat.without_empty_think())

    def example(self, example: Example, chat: ChatTokenizer) -> Example:
        """Return a row as the tuning would learn it. Raises SourceError for one that it would leave out."""
        example = reply_markup.read_example(example, chat.markup.spelt, keep_id=True)
        return with_reasoning_rule(example, self.reasoning, chat, Counter())


def fitting(base: Base, rows: HeldOut, form: TrainingForm) -> HeldOut:
    """Return the rows that the base's chat template, towers and context accept, in the form of the tuning.

    Raises SourceError if the base refuses all rows.
    """
    formed, refused, problem, remedy = [], Counter(rows.left_out), "", "give rows in its chat template's form"
    for example in rows.examples:
        try:
            formed.append(form.example(example, base.chat))
        except SourceError as error:
            problem, remedy = error.problem, error.remedy
            refused[error.reason or "template"] += 1
    limit, fitting = reply_limit(base, formed), []
    for example in formed:
        reason, *detail = ask_refusal(base, example, rows.folder, limit)
        if reason:
            problem, remedy = detail
            refused[reason] += 1
        else:
            fitting.append(example)
    if not fitting:
        raise SourceError(
            f"the base can read none of the {len(rows.examples)} rows: {problem}",
            remedy,
        )
    return HeldOut(fitting, rows.folder, dict(refused))


def ask_refusal(base: Base, example: Example, folder: Path, limit: int) -> tuple[str, str, str]:
    """Return why a row cannot be asked as (reason, problem, remedy); all are empty if it can.

    limit: tokens of the reply.
    """
    try:
        example = reply_markup.read_example(example, base.chat.markup.spelt)
        tokens = len(base.chat.encode(example, folder).ids)
        if not example.is_document:
            tokens = max(tokens, len(base.chat.prompt_ids(example.prompt, example.tools, folder)) + limit)
    except SourceError as error:
        return error.reason or "template", error.problem, error.remedy
    context = context_tokens(base.model)
    if context and tokens > context:
        problem = f"a row of {tokens} tokens with its reply; the model has {context} positions"
        return "too_long", problem, "give shorter rows, or tune on a base with a longer context"
    return "", "", ""


# A reply may be this much longer than the longest reference before it is cut (and then it is wrong anyway)
SPARE_TOKENS = 8
MOST_REPLY_TOKENS = 512


def model_side(model: Any, *, tuned: bool) -> AbstractContextManager[Any]:
    """Hold `model` as the tuned model or as its base.

    As its base, the outputs of projectors for media are blank.
    """
    stack = ExitStack()
    if not tuned:
        stack.enter_context(model.disable_adapter())
        if not is_native(model):  # a native base reads media without an adapter
            stack.enter_context(blank(model))
    return stack


def reply_limit(base: Base, examples: Sequence[Example]) -> int:
    """Return the number of tokens after which a reply to any of these rows is cut."""
    return min(max(reference_tokens(base, examples), default=0) + SPARE_TOKENS, MOST_REPLY_TOKENS)


def reference_tokens(base: Base, examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each row's own reply, with its reasoning; documents have none."""
    lengths = []
    for example in examples:
        if example.is_document:
            continue
        reply = example.messages[-1]
        text = reply_text(reply)
        if reply.reasoning_content:  # as a model that has learnt it writes it
            text = f"<think>\n{reply.reasoning_content}\n</think>\n\n{text}"
        lengths.append(len(base.chat.tokenizer(text)["input_ids"]))
    return lengths


def reply_cap_warnings(base: Base, examples: Sequence[Example]) -> list[DataWarning]:
    """Return the warning that replies are cut before the end of some references."""
    lengths = reference_tokens(base, examples)
    too_long = sum(length > MOST_REPLY_TOKENS for length in lengths)
    if not too_long:
        return []
    problem = (
        f"{too_long} of {len(lengths)} references are longer than {MOST_REPLY_TOKENS} tokens, after which every reply "
        "is cut: none can be as they are"
    )
    remedy = "go by `loss`, which is of whole references, or give rows with shorter replies: --data FILE"
    return [DataWarning("cut_references", problem, remedy)]


def measure_model(base: Base, model: Any, eval_set: HeldOut, field: str, *, tuned: bool) -> ModelOutputs:
    """Return all outputs of one side.

    field: field of a reply that names a class; empty if none is wanted.

    Raises ModelError if a loss is NaN or infinite: such a model has no scores.
    """
    with model_side(model, tuned=tuned):
        generations = replies(base, model, eval_set, reply_limit(base, eval_set.examples))
        loss, tokens = losses(
            base, model, [base.chat.encode(example, eval_set.folder) for example in eval_set.examples]
        )
    if bad_rows := [index for index, mean in enumerate(loss) if not math.isfinite(mean)]:
        raise ModelError(
            f"the {'tuned model' if tuned else 'base'} computes no finite loss for {len(bad_rows)} of {len(loss)} "
            "rows, "
            f"the first of which is {eval_set.examples[bad_rows[0]].id}: its sums are NaN or infinite",
            "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4"
            if tuned
            else "base: starter, or another",
        )
    is_opened = template_opens_reasoning(base.chat, eval_set)
    return reply_outputs(base.chat, generations, loss=loss, tokens=tokens, field=field, is_opened=is_opened)


def reply_outputs(
    chat: ChatTokenizer,
    generations: Sequence[Generation],
    loss: Sequence[float],
    tokens: Sequence[int],
    field: str,
    *,
    is_opened: bool,
) -> ModelOutputs:
    """Return the outputs of one side from its replies.

    field: as in `measure_model`.
    is_opened: as in ModelOutputs.
    """
    texts = [chat.decode(generation.ids) for generation in generations]
    outputs = ModelOutputs(
        texts,
        loss=loss,
        tokens=tokens,
        confidence=[],
        is_cut=[generation.finish == DECIDED for generation in generations],
        is_opened=is_opened,
    )
    if not field:
        return outputs
    rows = zip(generations, texts, outputs.answers, strict=True)
    return replace(outputs, confidence=[_confidence(chat, *row, field) for row in rows])


def prompt_tokens(chat: ChatTokenizer, eval_set: HeldOut) -> list[list[int]]:
    """Return the prompt of each row; an empty one for a document."""
    return [
        [] if row.is_document else chat.prompt_ids(row.prompt, row.tools, eval_set.folder) for row in eval_set.examples
    ]


def template_opens_reasoning(chat: ChatTokenizer, eval_set: HeldOut) -> bool:
    """Return whether the chat template opens the reasoning of replies.

    A template does so for every reply or for none, so that one prompt decides.
    """
    asked = [row for row in eval_set.examples if not row.is_document][:1]
    return any(chat.opens_reasoning(prompt) for prompt in prompt_tokens(chat, replace(eval_set, examples=asked)))


def replies(base: Base, model: Any, eval_set: HeldOut, limit: int) -> list[Generation]:
    """Return greedy replies under the model as it stands, at most `limit` tokens each; empty to a document."""
    chat = base.chat
    prompts = [prompt for prompt in prompt_tokens(chat, eval_set) if prompt]
    generations = iter(generate(model, prompts, stop=chat.stops, pad=chat.pad, sampling=Sampling(limit)))
    return [Generation([], "stop") if row.is_document else next(generations) for row in eval_set.examples]


@torch.no_grad()
def losses(
    base: Base, model: Any, encoded: Sequence[TokenizedExample], pack_tokens: int = 2048, *, share: bool = False
) -> tuple[list[float], list[int]]:
    """Return (nats per supervised token, supervised tokens) of each row under the model as it stands.

    share: whether to compute a common prefix of neighbouring rows once, which changes the rounding.
    """
    # no fast path: it would always apply the adapter, which `model_side` may have disabled
    path = base.path(model, encoded, LossOptions(fast=False, share=share))
    means: list[float] = []
    for group in packing.group_by_capacity(
        [len(row.ids) for row in encoded], max(pack_tokens, *(len(row.ids) for row in encoded))
    ):
        chosen = [encoded[index] for index in group]
        token_losses, _ = path.losses(chosen)
        for row_losses in token_losses.split([row.supervised_tokens for row in chosen]):
            means.append(float(row_losses.mean()) if len(row_losses) else 0.0)
    return means, [row.supervised_tokens for row in encoded]


def _confidence(chat: ChatTokenizer, generation: Generation, text: str, answer: str, field: str) -> float:
    """Return the probability of the label that a reply names.

    It is the product over the tokens that spell the label; 0 if the reply names none.

    answer: the end of `text` after its reasoning.
    """
    if not generation.ids or label_of(answer, field) is None:
        return 0.0
    offset = len(text) - len(answer)
    start, end = span_of(answer, field)
    first, last = _spelling(chat, generation.ids, offset + start, offset + end)
    return math.exp(sum(generation.logprobs[first:last]))


def _spelling(chat: ChatTokenizer, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """Return [first, last) of the tokens that hold any of the characters [start, end) of a reply."""

    def reached(count: int) -> int:
        """Return the number of characters of the first `count` tokens."""
        return len(chat.decode(ids[:count]))

    counts = range(len(ids) + 1)
    return max(bisect_right(counts, start, key=reached) - 1, 0), bisect_left(counts, end, key=reached)
