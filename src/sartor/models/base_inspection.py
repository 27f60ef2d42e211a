"""Verb inspect of a base: context, template, markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sartor.core import gguf_header, model_refs
from sartor.core.artifacts import kind_of
from sartor.core.lazy_import import import_module
from sartor.core.lineage import ancestry


def inspect(path: Path | str, *, example: str = "") -> dict[str, Any]:
    """Return a description of an artefact, with `example` of one row of a Dataset, or of a base.

    A base is described by its identity and its markup. path: an artefact's directory, or a base: `starter`, a
    directory in transformers' layout, or a GGUF file. Raises ArtifactError for anything else, ModelError for a base
    that cannot be opened.
    """
    if example or not _is_base(str(path)):
        return ancestry.inspect(path, example=example)
    ref = model_refs.locate_base(str(path))
    chat = import_module("sartor.models.base").read_chat(ref)
    probed = chat.probed
    return {
        "kind": "base",
        "name": ref.name,
        "path": str(ref.path),
        "digest": ref.digest,
        "licence": ref.licence,
        "template_digest": chat.template_digest,
        "writes_tool_calls": probed.writes_calls,
        "writes_reasoning": probed.writes_reasoning,
        "markup": [token.as_json() for token in probed.markup.tokens],
        "plain_text_markup": list(probed.plain_text),
    }


def _is_base(name: str) -> bool:
    """Return whether `name` is a base: a model directory, a GGUF file, or a built-in name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return kind_of(path) is None and (path / "config.json").is_file()
    if path.is_file():
        return gguf_header.is_gguf(path)
    return name in (model_refs.STARTER, model_refs.WHISPER)
