"""The engines of TEAM.yaml are those that a worker opens: every option of one is an argument of the other."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from sartor.inference import llamacpp_engine, openai_engine
from sartor.inference.local import local_engine
from sartor.serving.team_config import LlamaCppOptions, LocalEngineOptions, OpenAiEngineOptions, load


@pytest.mark.parametrize(
    ("declared", "module"),
    [(LocalEngineOptions, local_engine), (LlamaCppOptions, llamacpp_engine), (OpenAiEngineOptions, openai_engine)],
)
def test_every_option_is_an_argument_with_the_same_default(declared: type, module: object) -> None:
    options = {field.name: field.default for field in fields(declared) if field.name != "kind"}
    taken = inspect.signature(module.open_engine).parameters  # type: ignore[attr-defined]
    assert options == {name: parameter.default for name, parameter in taken.items() if name != "base"}


def test_a_gguf_file_is_seen_from_the_teams_directory(tmp_path: Path) -> None:
    (tmp_path / "team.yaml").write_text("base: starter\nengine: {kind: llamacpp, gguf: models/base.gguf}\n")
    engine = load(tmp_path / "team.yaml").engine
    assert isinstance(engine, LlamaCppOptions) and engine.gguf == str(tmp_path / "models" / "base.gguf")
