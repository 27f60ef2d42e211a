"""Forty chat rows, the recipe that tunes a tiny base on them, and a writer of JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"switch {place} {word}"},
            {"role": "assistant", "content": f"{word}:{place}"},
        ]
    }
    for word in ("on", "off", "up", "down")
    for place in ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft")
]


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe_on(dataset: Path, base: Path) -> dict[str, Any]:
    return {
        "base": str(base),
        "data": {"path": str(dataset)},
        "method": {"kind": "lora", "rank": 8, "alpha": 16},
        "budget": {"epochs": 2},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
    }
