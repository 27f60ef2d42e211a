"""Checks before a run, with changes that would fit.

`sartor plan` lists every Refusal; `sartor tune` raises the first as an error. A remedy for memory is offered only if
the same forecast says that it fits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from sartor.core import config, model_refs
from sartor.core.errors import BudgetError, ConfigError, MissingError, SartorError, SourceError
from sartor.models import hardware
from sartor.models.hardware import best_device, best_dtype
from sartor.models.packing import TokenizedExample
from sartor.tune.cost_model import LADDER, BatchLoad, MemoryModel, ModelShape, choose_micro_batch
from sartor.tune.methods.full import Full
from sartor.tune.methods.pissa import Pissa
from sartor.tune.recipe import PAIRED, SAMPLED, Distil, Grpo, Recipe, ResolvedRecipe, Sft
from sartor.tune.tokenized_dataset import TokenizedDataset, all_sequences, lessons

NO_PREFERENCE, VERIFIER, NO_ROOM = "nothing_preferred", "verifier_refused", "no_room_for_replies"
MEMORY, TOO_LONG, UNSUPERVISED, PAD, END = (
    "memory",
    "cut_answers",
    "nothing_supervised",
    "pad_is_stop",
    "end_unsupervised",
)
# Quantised linear weights over 16-bit and 32-bit ones: 4 bits and an absmax per 64 values; 8 bits and a scale per row
_BYTES_PER_WEIGHT: dict[Any, float] = {4: 0.5 + 4 / 64, 8: 1.05, 16: 2.0, 32: 4.0}
# Method `full`: the base's weight, its copy, the copy's gradient and two moments, fp32
_FULL_BYTES_PER_WEIGHT = 20
# Trained adapter in memory over the stored one: values, gradients and two moments; half of what pissa stores is frozen
_STATE_FACTOR, _PISSA_STATE_FACTOR = 4.0, 2.5
# A smaller adapter is counted with the micro-batch, whose refusal names more remedies
_LEAST_STATE_BYTES = 1 << 28
_KEPT_FRACTION = 0.99
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


# Floats per trained parameter in a checkpoint: its value and two moments of the optimiser
_CHECKPOINT_FLOATS = 3
_DISK_RESERVE_BYTES = 50_000_000


@dataclass(frozen=True)
class Refusal:
    """Reason to refuse a run, with the problem and the remedy.

    reason: MEMORY, TOO_LONG or another of the words above.
    problem: with its values.
    remedy: the next thing to type.
    """

    reason: str
    problem: str
    remedy: str

    @property
    def error(self) -> SartorError:
        """Error that `tune` raises for this refusal."""
        return (BudgetError if self.reason == MEMORY else SourceError)(self.problem, self.remedy)


class Tokenised(Protocol):
    """Part of a ChatTokenizer that the checks need."""

    pad: int
    stops: list[int]
    tokenizer: Any


def of_base(recipe: Recipe, device: torch.device | None = None) -> Iterator[Refusal]:
    """Yield a refusal if the weights alone do not fit, by the sizes in their files. Nothing is loaded.

    Raises ModelError, HubError and AssetError as opening does.
    """
    folder = model_refs.locate_base(recipe.base.name, recipe.base.revision, recipe.base.licence).path
    device = device or best_device()
    count, available = hardware.weights_in(folder), hardware.available_bytes(device)
    if isinstance(recipe.method, Full) and recipe.method.targets == Full().targets:
        yield from _of_full(recipe, count, available)
        return
    width = _BYTES_PER_WEIGHT.get(recipe.base.bits) or best_dtype(device).itemsize
    if count * width > available.bytes:
        fitting = [
            f"--base.bits {bits} ({count * size / 1e9:.2f} GB)"
            for bits, size in _BYTES_PER_WEIGHT.items()
            if size < width and count * size <= available.bytes and _changed(recipe, [f"base.bits={bits}"])
        ]
        yield Refusal(
            MEMORY,
            f"the weights of {recipe.base.name} need {count * width / 1e9:.2f} GB; "
            f"{available.bytes / 1e9:.2f} GB can be had ({available.bound})",
            "; or ".join(fitting) or f"a machine with more than {count * width / 1e9:.2f} GB free, or a smaller base",
        )


def _of_full(recipe: Recipe, count: int, available: hardware.FreeMemory) -> Iterator[Refusal]:
    """Yield a refusal if tuning all of `count` weights does not fit."""
    needed = count * _FULL_BYTES_PER_WEIGHT
    if needed > available.bytes:
        yield Refusal(
            MEMORY,
            f"tuning all weights of {recipe.base.name} needs {needed / 1e9:.2f} GB: the weights, their copies, "
            f"gradients and two moments, each fp32; {available.bytes / 1e9:.2f} GB can be had ({available.bound})",
            f"--method.kind lora (the weights need {count * 4 / 1e9:.2f} GB); or --method.targets.layers top-1, or as "
            "many as fit",
        )


def of_adapter(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], device: torch.device | None = None
) -> Iterator[Refusal]:
    """Yield a refusal if the adapter, its gradients and two moments do not fit. Nothing is allocated.

    shapes: (out, in) of each adapted module.
    """
    method, available = recipe.method, hardware.available_bytes(device)
    factor = _PISSA_STATE_FACTOR if isinstance(method, Pissa) else _STATE_FACTOR
    needed = factor * method.stored_bytes(shapes)
    if needed <= max(available.bytes, _LEAST_STATE_BYTES):
        return
    rank = getattr(method, "rank", 0)
    problem = f"what {method.kind} trains needs {needed / 1e9:,.2f} GB, with gradients and two moments, each fp32"
    remedy = "--method.kind lora; or --method.targets.layers top-1"
    if rank:
        problem = f"method.rank is {rank:,}: {problem}"
        # half of what would just fit, and no rank above a module's sides: it would add nothing
        widest = max(min(shape) for shape in shapes.values())
        remedy = f"--method.rank {max(min(int(rank * available.bytes / needed / 2), widest), 1)}"
    yield Refusal(MEMORY, f"{problem}; {available.bytes / 1e9:.2f} GB can be had ({available.bound})", remedy)


def of_lengths(lengths: Sequence[int], recipe: Recipe) -> Iterator[Refusal]:
    """Yield a refusal if too many rows are left out as too long.

    lengths: tokens of every row that could be encoded.
    """
    limit = recipe.data.max_length_tokens
    n_longer = sum(length > limit for length in lengths)
    if lengths and n_longer / len(lengths) > recipe.data.too_long_fraction:
        yield Refusal(
            TOO_LONG,
            f"{n_longer:,} of {len(lengths):,} rows ({n_longer / len(lengths):.0%}) are longer than "
            f"{limit} tokens (data.max_length_tokens) "
            f"and would be left out; data.too_long_fraction allows {recipe.data.too_long_fraction:.0%}",
            f"--data.max_length_tokens {length_that_keeps(lengths)} keeps {_KEPT_FRACTION:.0%}",
        )


def length_that_keeps(lengths: Sequence[int], fraction: float = _KEPT_FRACTION) -> int:
    """Return the smallest limit in tokens that keeps at least `fraction` of the rows."""
    return sorted(lengths)[math.ceil(fraction * len(lengths)) - 1]


def of_rows(recipe: Recipe, chat: Tokenised, data: TokenizedDataset) -> Iterator[Refusal]:
    """Yield every refusal because of a run's rows."""
    yield from of_objective(recipe, data)
    yield from of_lengths(data.lengths, recipe)
    yield from check_end_tokens(chat, all_sequences(data.train))


def of_objective(recipe: Recipe, data: TokenizedDataset) -> Iterator[Refusal]:
    """Yield a refusal if no row has the preference that the objective learns from."""
    objective = recipe.objective
    if isinstance(objective, (Sft, *SAMPLED)) or lessons(data.train):
        return
    requirement = "has a rejected reply" if isinstance(objective, PAIRED) else "is rated, or has a rejected reply"
    forms = "{prompt, chosen, rejected}" if isinstance(objective, PAIRED) else "{prompt, completion, rating}"
    yield Refusal(
        NO_PREFERENCE,
        f"objective.kind is {objective.kind}, and none of the {len(data.train):,} training rows {requirement}",
        f"rows of the form {forms}, or objective: {{kind: sft}}",
    )


def of_room(recipe: Recipe, context: int | None, data: TokenizedDataset) -> Iterator[Refusal]:
    """Yield a refusal if prompts leave the replies that are sampled to them no room.

    context: positions of the base; None if it does not state them.
    """
    objective = recipe.objective
    is_sampled = isinstance(objective, Grpo) or (isinstance(objective, Distil) and objective.on_policy > 0)
    if not is_sampled or context is None:
        return
    rows = [row for row in (*data.train, *data.held_out) if isinstance(row, TokenizedExample)]
    too_long = [row for row in rows if row.last_reply[0] >= context]
    if too_long:
        shorter = "shorter prompts, or a base with a longer context"
        yield Refusal(
            NO_ROOM,
            f"the prompts of {len(too_long):,} of {len(rows):,} rows fill the {context:,} positions of the base, so "
            f"that no reply to them can be sampled; the first is {too_long[0].example_id}",
            shorter
            if len(too_long) == len(rows)
            else f"--data.max_length_tokens {context} leaves them out; or {shorter}",
        )


def check_end_tokens(chat: Tokenised, rows: Sequence[TokenizedExample]) -> Iterator[Refusal]:
    """Yield refusals if the model would not learn to stop.

    That is so if the pad is a stop token, or if a row's last learnt token is not a stop token. Sartor's packing needs
    no pad. But a pad that ends replies hides their end elsewhere (serving, other trainers), and a mask made from it
    leaves the end of the turn unlearnt.
    """
    if chat.pad in chat.stops:
        token = chat.tokenizer.convert_ids_to_tokens(chat.pad)
        yield Refusal(
            PAD,
            f"the pad {token!r} (id {chat.pad}) is also a stop token of this base: who masks the pad masks the end of "
            "a reply",
            "set pad_token in the base's tokenizer_config.json to a token that ends nothing",
        )
    unended = [row for row in rows if row.supervised_tokens and _last_learnt(row) not in chat.stops]
    if unended:
        stops = ", ".join(repr(chat.tokenizer.convert_ids_to_tokens(stop)) for stop in chat.stops)
        yield Refusal(
            END,
            f"in {len(unended):,} of {len(rows):,} rows the last learnt token ends no reply (the stop tokens are "
            f"{stops}), "
            f"the first is {unended[0].example_id}: the model would not learn to stop",
            "use a base whose chat template writes its end-of-turn token after a reply, or set eos_token to it",
        )


def _last_learnt(row: TokenizedExample) -> int:
    return next(token for token, is_learnt in zip(reversed(row.ids), reversed(row.learnt), strict=True) if is_learnt)


def check_memory(model: MemoryModel, recipe: ResolvedRecipe, loads: Sequence[BatchLoad]) -> Iterator[Refusal]:
    """Yield a refusal if the heaviest micro-batch does not fit, with the changes that would."""
    settled = choose_micro_batch(model, recipe, loads)
    if settled.fits:
        return
    needed_bytes = model.needs(settled.load).high
    fixes = [f"{as_flags(change)} ({size / 1e9:.2f} GB)" for change, size in remedies(model, recipe, loads)]
    if not fixes:  # no change of the recipe helps
        shape = replace(model.shape, recompute=True)
        smallest = choose_micro_batch(model, recipe, loads, shape)
        least_bytes = model.needs(smallest.load, shape).high
        fixes = [f"a machine on which {least_bytes / 1e9:.2f} GB can be had, or a smaller base"]
    yield Refusal(
        MEMORY,
        f"a micro-batch of {settled.load.tokens:,} tokens needs up to {needed_bytes / 1e9:.2f} GB; "
        f"{model.limit_bytes / 1e9:.2f} GB can be had ({model.bound})",
        "; or ".join(fixes),
    )


def as_flags(changes: str) -> str:
    """Return changes as flags that can be added to a command.

    >>> as_flags("compute.recompute=true base.bits=8")
    '--compute.recompute true --base.bits 8'
    """
    return " ".join(f"--{change.replace('=', ' ', 1)}" for change in changes.split())


def remedies(model: MemoryModel, recipe: ResolvedRecipe, loads: Sequence[BatchLoad]) -> Iterator[tuple[str, float]]:
    """Yield changes of the recipe that fit: (`option=value ...`, bytes at the high end).

    These are all single changes that fit; if none does, the first combination that fits.
    """
    singles = list(_changes(model.shape, recipe, loads))
    fitting = [(change, size) for change in singles if (size := needed_under(model, recipe, loads, [change]))]
    if fitting:
        yield from ((change, size) for change, size in fitting if size)
        return
    combined: list[str] = []
    option_names: set[str] = set()
    for change in singles:
        name = change.partition("=")[0]
        # several values of one option come mildest first; a combination takes the sharpest
        combined = [earlier for earlier in combined if not earlier.startswith(f"{name}=")] + [change]
        option_names.add(name)
        if len(option_names) > 1 and (size := needed_under(model, recipe, loads, combined)):
            yield " ".join(combined), size
            return


def needed_under(
    model: MemoryModel, recipe: ResolvedRecipe, loads: Sequence[BatchLoad], changes: Sequence[str]
) -> float | None:
    """Return the bytes at the high end under a recipe with `changes` (`option=value`).

    None if the changed recipe does not fit or is not valid.
    """
    changed = _changed(recipe, changes)
    if changed is None:
        return None
    usable_loads = [load for load in loads if load.tokens <= changed.data.max_length_tokens]
    if not usable_loads:
        return None
    shape = _reshaped(model.shape, recipe, changed)
    settled = choose_micro_batch(model, changed, usable_loads, shape)
    return model.needs(settled.load, shape).high if settled.fits else None


def _changed(recipe: AnyRecipe, changes: Sequence[str]) -> AnyRecipe | None:
    try:
        return config.load(type(recipe), config.dump(recipe), [f"--{change}" for change in changes])
    except ConfigError:  # an option or a value that this version does not have
        return None


def _changes(shape: ModelShape, recipe: Recipe, loads: Sequence[BatchLoad]) -> Iterator[str]:
    """Yield changes to try, cheapest first: time, then training data, then precision."""
    longest = max(load.tokens for load in loads)
    micro_batch_tokens = recipe.compute.micro_batch_tokens
    for size in (1024, 512, 256, 128, longest):
        # with auto the sizes of LADDER were tried already
        if longest <= size < (LADDER[0] if micro_batch_tokens == "auto" else micro_batch_tokens):
            yield f"compute.micro_batch_tokens={size}"
    if not shape.recompute:
        yield "compute.recompute=true"
    for layers in (shape.layers * 2 // 3, shape.layers // 3):
        if 0 < layers < shape.adapted:
            yield f"method.targets.layers=top-{layers}"
    lengths = sorted(load.tokens for load in loads)
    for keep in (0.99, 0.9):
        limit = length_that_keeps(lengths, keep)
        if limit < longest:
            yield f"data.max_length_tokens={limit}"
    for bits in (16, 8, 4):
        if _BYTES_PER_WEIGHT[bits] < shape.element_bytes and recipe.base.bits not in (4, 8):
            yield f"base.bits={bits}"


def _reshaped(shape: ModelShape, before: Recipe, after: Recipe) -> ModelShape:
    """Return the ModelShape under another recipe for the same base."""
    adapted = min(after.method.targets.top or shape.layers, shape.layers)
    changed = replace(
        shape,
        adapted=adapted,
        trainable=shape.trainable * adapted // shape.adapted,
        recompute=after.compute.recompute,
    )
    if after.base.bits != before.base.bits and after.base.bits in _BYTES_PER_WEIGHT:
        ratio = _BYTES_PER_WEIGHT[int(after.base.bits)] / shape.element_bytes
        changed = replace(changed, linear_bytes=int(shape.linear_bytes * min(ratio, 1.0)))
    return changed


def check_disk(
    out: Path, trainable: int, kept_checkpoints: int, *, adapter_bytes: int | None = None, beside_bytes: int = 0
) -> None:
    """Raise MissingError if the disk of `out` has no room for the checkpoints of a run and its Adapter.

    trainable: number of trained parameters. adapter_bytes: of the Adapter; by default 4 for each of them.
    beside_bytes: of other files beside the checkpoints.
    There is room for one checkpoint more than is kept, because it is written before an old one is removed.
    """
    checkpoint_bytes = 4 * trainable * _CHECKPOINT_FLOATS * (kept_checkpoints + 1) + beside_bytes
    needed = checkpoint_bytes + max(4 * trainable, adapter_bytes or 0) + _DISK_RESERVE_BYTES
    folder = next(parent for parent in (out, *out.parents) if parent.is_dir())
    if (free := shutil.disk_usage(folder).free) < needed:
        problem = (
            f"a run writes up to {needed / 1e6:,.0f} MB beside {out}, and {free / 1e6:,.0f} MB are free in {folder}"
        )
        raise MissingError(
            problem, f"df -h {folder}, and free some; or --out DIR on another disk; or checkpoints.keep: 1"
        )
