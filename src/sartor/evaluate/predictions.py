"""Held-out rows and what a model replies to them."""

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

from sartor.core import parquet_io, records, reply_markup
from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError, ConfigError, ModelError, SourceError
from sartor.core.lineage import ancestry
from sartor.core.records import Drop, Example, Message
from sartor.core.splits import TEST, split_group
from sartor.curate.sources.planner import read_all
from sartor.curate.sources.types import SourceOptions
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


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate on. folder: below which their media lie. left_out: how many were not taken, and why."""

    examples: list[Example]
    folder: Path
    left_out: dict[str, int] = field(default_factory=dict)


def held_out(adapter: Artifact, data: Path | None, most_rows: int, media: Path, split: str = "eval") -> HeldOut:
    """The rows to evaluate on, and how many were left out and why. split: of the Dataset; without `data` alone.

    Rows that were trained on are never among them; where a Dataset is gone that cannot be checked, and `left_out` says
    so. An Adapter of many clients has a Dataset of each: what one holds out and another trained on is left out.
    media: a folder of the caller's, into which the media of `data` are copied.
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
        if split == TEST:  # a retrained version's own Dataset has none; the one that it descends from may
            datasets = ancestry.test_datasets(adapter) or datasets
        examples, folder = (
            _held_out_of(datasets, ancestry.training_datasets(adapter), left_out, split),
            datasets[0].path,
        )
        if not examples and split == TEST:
            raise _nothing_held_out_error(datasets, split, "and tune again")
        if not examples:
            raise _nothing_held_out_error(datasets, split, "or give --data FILE")
    else:
        if not datasets:
            left_out["not_compared_with_training_rows"] = (
                0  # the Dataset is gone: said, since nothing was left out for it
            )
        folder = media
        examples, refused = _rows_of(data, ancestry.training_datasets(adapter), media)
        left_out |= refused
    if bad_count := sum(example.rating < 0 for example in examples):
        left_out["rated_bad"] = bad_count  # such a reply is no reference
        examples = [example for example in examples if example.rating >= 0]
        if not examples:
            raise SourceError(
                f"all {bad_count} rows were rated bad, and so show no reply to be like",
                '--data FILE with rows of "rating": 0 or above',
            )
    # a fixed sample: the same rows in every run, whatever their order
    examples.sort(key=lambda example: hashlib.sha256(example.id.encode()).digest())
    if len(examples) > most_rows:
        left_out["beyond_most_rows"] = len(examples) - most_rows
    return HeldOut(examples[:most_rows], folder, left_out)


def _held_out_of(
    datasets: Sequence[Artifact], training_datasets: Sequence[Artifact], left_out: dict[str, int], split: str
) -> list[Example]:
    """What Datasets hold out, each row once, without what another was trained on: of them, or of `training_datasets`,
    among which are those of the rehearsal and of what the Adapter went on from. Media lie below the first one.
    """
    examples = {example.id: example for dataset in datasets for example in parquet_io.read_examples(dataset, split)}
    is_own = [item.id for item in training_datasets] == [item.id for item in datasets]
    trained_on = set() if is_own and len(datasets) == 1 else _trained_on(training_datasets) & set(examples)
    if trained_on:
        left_out["trained_on"] = len(trained_on)
    return [example for name, example in examples.items() if name not in trained_on]


def _nothing_held_out_error(datasets: Sequence[Artifact], split: str, alternative: str) -> SourceError:
    """That of Datasets without a row in a split; the remedy names a fraction that holds out a group, where one can."""
    groups = Counter(split_group(example) for dataset in datasets for example in parquet_io.read_own_examples(dataset))
    rows, folder = groups.total(), datasets[0].path
    if len(groups) < 2:
        problem = (
            f"{folder} holds out no row in the split {split}: its {rows} rows are in one group, which is never parted"
        )
        return SourceError(problem, f"add rows of other groups, {alternative}")
    # `held_out_groups` takes a group from half of its size on
    fraction = math.ceil(100 * min(groups.values()) / rows) / 100
    problem = f"{folder} holds out no row in the split {split}, of {rows} rows in {len(groups)} groups"
    return SourceError(problem, f"curate with split.{split}_fraction of {min(fraction, 0.5):g} or more, {alternative}")


def _trained_on(datasets: Sequence[Artifact]) -> set[str]:
    return {example.id for dataset in datasets for example in parquet_io.read_examples(dataset, "train")}


def _rows_of(data: Path, datasets: Sequence[Artifact], folder: Path) -> tuple[list[Example], dict[str, int]]:
    """The rows of a file that were not trained on. Raises SourceError where none is left."""
    trained_on = _trained_on(datasets)
    # as in a Dataset, so that a row has the id that it has there
    rows = list(read_all(SourceOptions(str(data)), 4 << 20, folder / "media"))
    all_examples = [row for row in rows if isinstance(row, Example)]
    examples = [example for example in all_examples if example.id not in trained_on]
    left_out = records.count_values(row.reason for row in rows if isinstance(row, Drop))
    if trained_count := len(all_examples) - len(examples):
        left_out["trained_on"] = trained_count
    if not examples:
        reads = "were not trained on" if trained_count else "have a form that sartor curate reads"
        remedy = f"--data FILE with rows that {reads}"
        raise SourceError(f"no row of {data} can be used ({left_out or 'it is empty'})", remedy)
    return examples, left_out


def fitting(base: Base, rows: HeldOut, limit: int) -> HeldOut:
    """The rows that the base's chat template, towers and context take, with a reply of `limit` tokens.

    Raises SourceError when they refuse all.
    """
    fitting, refused, problem = [], dict(rows.left_out), ""
    for example in rows.examples:
        reason, detail = ask_refusal(base, example, rows.folder, limit)
        if reason:
            problem = detail
            refused[reason] = refused.get(reason, 0) + 1
        else:
            # as `tune` learns it
            fitting.append(reply_markup.read_example(example, base.chat.markup.spelt, keep_id=True))
    if not fitting:
        raise SourceError(
            f"the base can read none of the {len(rows.examples)} rows: {problem}",
            "give rows in its chat template's form",
        )
    return HeldOut(fitting, rows.folder, refused)


def ask_refusal(base: Base, example: Example, folder: Path, limit: int) -> tuple[str, str]:
    """(reason, problem) why a row cannot be asked; both empty where it can. limit: tokens of the reply."""
    try:
        example = reply_markup.read_example(example, base.chat.markup.spelt)
        tokens = len(base.chat.encode(example, folder).ids)
        if not example.is_document:
            tokens = max(tokens, len(base.chat.prompt_ids(example.prompt, example.tools, folder)) + limit)
    except SourceError as error:
        return error.reason or "template", error.problem
    context = context_tokens(base.model)
    if context and tokens > context:
        return "too_long", f"a row of {tokens} tokens with its reply; the model has {context} positions"
    return "", ""


# A reply may be this much longer than the longest reference before it is cut (and then it is wrong anyway)
SPARE_TOKENS = 8
MOST_REPLY_TOKENS = 512
# Of a prompt's end, in which a template may open the reasoning
_OPENING_TOKENS = 8


def model_side(model: Any, *, tuned: bool) -> AbstractContextManager[Any]:
    """Inside, `model` computes as the tuned model, or as its base, to which what projectors make of media is blank."""
    stack = ExitStack()
    if not tuned:
        stack.enter_context(model.disable_adapter())
        if not is_native(model):  # which reads media without an adapter
            stack.enter_context(blank(model))
    return stack


def reply_limit(base: Base, examples: Sequence[Example]) -> int:
    """Tokens after which a reply to any of these rows is cut."""
    lengths = [
        len(base.chat.tokenizer(_whole_text(example.messages[-1]))["input_ids"])
        for example in examples
        if not example.is_document  # nothing is replied to
    ]
    return min(max(lengths, default=0) + SPARE_TOKENS, MOST_REPLY_TOKENS)


def _whole_text(message: Message) -> str:
    """A reply as a model that has learnt it writes it: with its reasoning."""
    text = reply_text(message)
    return f"<think>\n{message.reasoning_content}\n</think>\n\n{text}" if message.reasoning_content else text


def measure_model(base: Base, model: Any, eval_set: HeldOut, field: str, *, tuned: bool) -> ModelOutputs:
    """Return all that is measured of one side. field: where a reply names a class; empty where none is asked for.

    Raises ModelError where a loss is NaN or infinite: such a model has no scores.
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
    return reply_outputs(base.chat, generations, loss, tokens, field, is_opened=is_opened)


def reply_outputs(
    chat: ChatTokenizer,
    generations: Sequence[Generation],
    loss: Sequence[float],
    tokens: Sequence[int],
    field: str,
    *,
    is_opened: bool,
) -> ModelOutputs:
    """The outputs of one side from its replies. field: as of `measure_model`. is_opened: as of ModelOutputs."""
    texts = [chat.decode(generation.ids) for generation in generations]
    outputs = ModelOutputs(
        texts, loss, tokens, [], [generation.finish == DECIDED for generation in generations], is_opened
    )
    if not field:
        return outputs
    rows = zip(generations, texts, outputs.answers, strict=True)
    return replace(outputs, confidence=[_confidence(chat, *row, field) for row in rows])


def prompt_tokens(chat: ChatTokenizer, eval_set: HeldOut) -> list[list[int]]:
    """The prompt of each row; an empty one of a document."""
    return [
        [] if row.is_document else chat.prompt_ids(row.prompt, row.tools, eval_set.folder) for row in eval_set.examples
    ]


def opens_reasoning(chat: ChatTokenizer, prompt: Sequence[int]) -> bool:
    """Whether the chat template has opened the reply's reasoning at a prompt's end."""
    # ids of media are below 0
    return reply_markup.opens_reasoning(chat.decode([token for token in prompt[-_OPENING_TOKENS:] if token >= 0]))


def template_opens_reasoning(chat: ChatTokenizer, eval_set: HeldOut) -> bool:
    """Whether the chat template opens the reasoning of replies: it does so of each or of none, so that one prompt
    tells.
    """
    asked = [row for row in eval_set.examples if not row.is_document][:1]
    return any(opens_reasoning(chat, prompt) for prompt in prompt_tokens(chat, replace(eval_set, examples=asked)))


def replies(base: Base, model: Any, eval_set: HeldOut, limit: int) -> list[Generation]:
    """Greedy replies under the model as it stands, at most `limit` tokens each; an empty one to a document."""
    chat = base.chat
    prompts = [prompt for prompt in prompt_tokens(chat, eval_set) if prompt]
    generations = iter(generate(model, prompts, stop=chat.stops, pad=chat.pad, sampling=Sampling(limit)))
    return [Generation([], "stop") if row.is_document else next(generations) for row in eval_set.examples]


@torch.no_grad()
def losses(
    base: Base, model: Any, encoded: Sequence[TokenizedExample], pack_tokens: int = 2048, *, share: bool = False
) -> tuple[list[float], list[int]]:
    """(nats per supervised token, supervised tokens) of each row under the model as it stands.

    share: what neighbouring rows begin with is computed once, which rounds otherwise.
    """
    # the fast path would always see the adapter, and `side` switches it off
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
    """The probability of the label that a reply named: the product over the tokens that spell it; 0 where it named
    none.

    answer: the end of `text` behind its reasoning.
    """
    if not generation.ids or label_of(answer, field) is None:
        return 0.0
    offset = len(text) - len(answer)
    start, end = span_of(answer, field)
    first, last = _spelling(chat, generation.ids, offset + start, offset + end)
    return math.exp(sum(generation.logprobs[first:last]))


def _spelling(chat: ChatTokenizer, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """[first, last) of the tokens that hold any of the characters [start, end) of a reply."""

    def reached(count: int) -> int:
        return len(chat.decode(ids[:count]))

    counts = range(len(ids) + 1)
    return max(bisect_right(counts, start, key=reached) - 1, 0), bisect_left(counts, end, key=reached)
