"""The launcher: a team's Releases as vLLM's command line, and what vLLM would serve otherwise is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from sartor.core import model_refs
from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError, ConfigError, ModelError
from sartor.inference.engine import adapter_digest
from sartor.serving.commands.vllm_launch import command
from sartor.serving.team_config import AgentOptions, LocalEngineOptions, OpenAiEngineOptions, Team

CONFIG = {"peft_type": "LORA", "r": 12, "bias": "none", "target_modules": ["q_proj"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "chat_template.jinja").write_text(tiny.CHATML)
    return tmp_path / "base"


def release(folder: Path, name: str, template: str = tiny.CHATML, **changes: Any) -> Artifact:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    files = {file: {"sha256": f"{name}{file}"} for file in ("adapter_config.json", "adapter_model.safetensors")}
    return Artifact(
        folder,
        {
            "name": name,
            "version": "1",
            "files": files,
            "base": {"template_digest": model_refs.template_digest(template)},
        },
    )


def team(**engine: Any) -> Team:
    return Team(
        base="starter",
        agents=(AgentOptions("faq", "r"), AgentOptions("home", "r")),
        engine=OpenAiEngineOptions(**engine),
    )


def test_a_team_becomes_a_command(base: Path, tmp_path: Path) -> None:
    releases = [release(tmp_path / "faq", "faq"), release(tmp_path / "a=b", "home", r=4)]
    made = command(team(url="http://10.0.0.4:9001/v1", key_env="TEAM_KEY", loads_adapters=True), base, releases)
    names = [adapter_digest(item.manifest["files"]) for item in releases]
    assert made.argv == (
        "vllm",
        "serve",
        str(base),
        "--served-model-name",
        "base",
        "--host",
        "10.0.0.4",
        "--port",
        "9001",
        "--chat-template",
        str(base / "chat_template.jinja"),
        "--enable-lora",
        "--max-lora-rank",
        "16",
        "--max-loras",
        "2",
        "--lora-modules",
        f"{names[0]}={tmp_path / 'faq'}",
        json.dumps({"name": names[1], "path": str(tmp_path / "a=b")}),
    )
    assert made.line.startswith('VLLM_ALLOW_RUNTIME_LORA_UPDATING="True" VLLM_API_KEY="$TEAM_KEY" vllm serve ')


def test_a_team_without_agents_needs_no_adapters(base: Path) -> None:
    made = command(replace(team(), agents=()), base, [])
    assert "--enable-lora" not in made.argv and made.environment == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["x"]}, "modules_to_save"),
        ({"r": 1024}, "rank 1024"),
        ({"alpha_pattern": {"a": 1}}, "alpha_pattern"),
        ({"rank_pattern": {"a": 1}}, "rank_pattern"),
        ({"peft_type": "OFT"}, "peft_type OFT"),
        ({"target_modules": ["lm_head"]}, "LM head"),
        ({"template": "other"}, "chat template"),
    ],
)
def test_what_vllm_would_serve_otherwise_is_refused_by_name(
    base: Path, tmp_path: Path, changes: Any, says: str
) -> None:
    releases = [release(tmp_path / "faq", "faq"), release(tmp_path / "home", "home", **changes)]
    with pytest.raises(ModelError, match=says) as refused:
        command(team(), base, releases)
    assert "home@1" in refused.value.problem


def test_another_engine_or_address_or_config_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local"):
        command(replace(team(), engine=LocalEngineOptions()), base, [])
    with pytest.raises(ConfigError, match="address"):
        command(team(url="nothing"), base, [])
    with pytest.raises(ArtifactError, match="no adapter's config"):
        command(team(), base, [release(tmp_path / "faq", "faq", r="x")])
