"""User rows and probes as tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sartor.core import config, reply_markup
from sartor.core.adapter_methods import SERVED, method_of
from sartor.core.artifacts import CONFIG, WEIGHTS
from sartor.core.errors import (
    ConfigError,
    ModelError,
    SourceError,
    TemplateMarkupError,
)
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.models.chat import ChatTokenizer
from sartor.models.packing import TokenizedExample
from sartor.personalization.acceptance import JudgedRows
from sartor.personalization.user_rows import UserRow
from sartor.tune.recipe import ResolvedRecipe

_FACTOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.lora_[AB]\.weight")
# Small steps from an existing adapter, since a person has few rows
DEFAULTS: dict[str, Any] = {
    "budget": {"epochs": 3.0},
    "optimizer": {"learning_rate": 1e-4, "batch_tokens": 1024},
    "compute": {"recompute": True, "reuse_frozen": False},  # else activations of rows would be on the disk
    "evaluations": 0,
}


@dataclass
class Material:
    """Rows as tokens.

    A row's `example_id` is its random id: digests of short texts can be guessed.

    groups: of the held-out rows, in order.
    left_out: reason -> ids.
    """

    train: list[TokenizedExample] = field(default_factory=list)
    held_out: list[TokenizedExample] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def prepare_rows(rows: Sequence[UserRow], chat: ChatTokenizer, held_out_fraction: float, max_tokens: int) -> Material:
    """Return a person's rows as tokens, train and held out by each prompt's digest.

    Rows that are left out are listed by reason.
    """
    material = Material()
    for row in rows:
        encoded = (
            encode_user_row(row.learnt, row.id, chat, max_tokens) if row.learnt else "rated bad, and not corrected"
        )
        if isinstance(encoded, str):
            material.left_out.setdefault(encoded, []).append(row.id)
        elif row.is_held_out(held_out_fraction):
            material.held_out.append(encoded)
            material.groups.append(row.group)
        else:
            material.train.append(encoded)
    return material


def encode_probe(examples: Sequence[Example], chat: ChatTokenizer, max_tokens: int) -> JudgedRows:
    """Return the Examples that can be learnt as rows to judge by; rows of one prompt are one group."""
    encoded = [(encode_user_row(example, example.id, chat, max_tokens), group_of(example)) for example in examples]
    usable = [(row, group) for row, group in encoded if isinstance(row, TokenizedExample)]
    return JudgedRows([row for row, _ in usable], [group for _, group in usable])


def encode_user_row(example: Example, name: str, chat: ChatTokenizer, max_tokens: int) -> TokenizedExample | str:
    """Return an Example as tokens, or the reason why it cannot be learnt."""
    try:
        example = reply_markup.read_example(example, chat.markup.spelt)
        encoded = replace(chat.encode(example), example_id=name)
    except TemplateMarkupError as error:
        return f"{error.reason}: {error.problem[:120]}"
    except SourceError as error:
        return f"the chat template: {error.problem[:120]}"
    if len(encoded.ids) > max_tokens:
        return f"over {max_tokens} tokens"
    return encoded if encoded.supervised_tokens else "nothing to learn"


def recipe_of(adapter: Path, base: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that goes on from a release's adapter.

    It combines the adapter's method, DEFAULTS, and a person's changes to these. Raises ConfigError and ModelError.
    """
    result = {"base": str(base), "data": {"path": "personal"}, **DEFAULTS, **changes, "method": _method(adapter, base)}
    result["compute"] = {**DEFAULTS["compute"], **changes.get("compute", {}), "reuse_frozen": False}
    config.load(ResolvedRecipe, result)
    return result


def _method(adapter: Path, base: Path) -> dict[str, Any]:
    """Return the method of an adapter.

    Rank and scale come from its config, and the modules from its weights, since a config may name them in many ways.
    Raises ModelError if a file is not whole, ConfigError for anything except plain LoRA of the layers next to the
    head.
    """
    try:
        fields = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        layers = int(json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
        if method_of(fields) not in (*SERVED, "dora"):  # below, DoRA is named by its option
            raise ConfigError(
                f"{adapter} is of method {method_of(fields)}, on top of which no personal version is tuned",
                "a release tuned with method: {kind: lora}",
            )
        rank, alpha = fields["r"], fields["lora_alpha"]
        with safe_open(str(adapter / WEIGHTS), framework="pt") as weights_file:
            matches = [_FACTOR.fullmatch(name) for name in weights_file.keys()]  # noqa: SIM118  # no mapping
    except ConfigError:
        raise
    except Exception as error:  # safetensors' own errors have no common base but Exception
        raise ModelError(
            f"the adapter {adapter} or the base {base} is not whole: {error!r}",
            "sartor edge verify --store STORE, then sartor edge sync URL NAME --device ID --root 1.root.json",
        ) from None
    adapted_modules = {(int(match[1]), match[2]) for match in matches if match}
    lowest = min((layer for layer, _ in adapted_modules), default=layers)
    modules = sorted({module for _, module in adapted_modules})
    expected = {(layer, module) for layer in range(lowest, layers) for module in modules}
    unsupported = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if fields.get(name)]
    if unsupported or not adapted_modules or adapted_modules != expected or not all(matches):
        reason = f": {', '.join(unsupported)}" if unsupported else ""
        raise ConfigError(
            f"{adapter} is no plain LoRA of the layers next to the head{reason}", "a release tuned by sartor tune"
        )
    targets = {"modules": modules, **({"layers": f"top-{layers - lowest}"} if lowest else {})}
    return {"kind": "lora", "rank": rank, "alpha": alpha, "targets": targets}
