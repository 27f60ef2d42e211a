"""Command line of vLLM for a team.

Adapters are served under their digests, so that a name always means the same content and two versions of an agent can
be served together. Whatever vLLM would serve differently from the Release is refused, with the agent's name: vLLM has
one chat template for all, no DoRA, and ignores ranks and alphas that differ from module to module.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sartor.core import model_refs
from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError, ConfigError, ModelError
from sartor.inference.engine import adapter_digest
from sartor.release.release import verify_release
from sartor.serving.team_config import OpenAiEngineOptions, Team

# Values that --max-lora-rank accepts
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_REMEDY = "serve this agent by engine: {kind: local}"


@dataclass(frozen=True)
class Launch:
    """Command for vLLM.

    argv: the command.
    environment: variables that it needs; a value that begins with $ names another variable.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def line(self) -> str:
        """Command line for a shell; secrets appear as the names of their variables."""
        assignments = [f'{name}="{value}"' for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(self.argv)])


def launch(team: Team) -> Launch:
    """Return the command for a team, after verifying its Releases.

    Raises what `verify_release` and `command` raise, ModelError for its base.
    """
    ref = model_refs.locate_base(team.base)
    if not ref.path.is_dir():
        raise ModelError(
            f"the base {ref.name} is not converted yet", f"sartor ask RELEASE PROMPT --base {ref.name} does so"
        )
    releases = [
        verify_release(member.release, key=team.trust or None, base=team.base).release for member in team.agents
    ]
    return command(team, ref.path, releases)


def command(team: Team, base: Path, releases: Sequence[Artifact]) -> Launch:
    """Return the command for a base's directory and one Release per agent.

    Raises ConfigError if the team has another engine, ModelError with the agent that vLLM cannot serve as released.
    """
    engine = team.engine
    if not isinstance(engine, OpenAiEngineOptions):
        raise ConfigError(
            f"the team's engine is {engine.kind}", "engine: {kind: openai, url: http://127.0.0.1:8000/v1}"
        )
    url = urlsplit(engine.url)
    if not url.hostname:
        raise ConfigError(f"engine.url is {engine.url!r}, no address", "engine.url: http://127.0.0.1:8000/v1")
    _check_templates(base, releases)
    rank = _rank(releases)
    argv = [
        "vllm",
        "serve",
        str(base),
        "--served-model-name",
        "base",
        "--host",
        url.hostname,
        "--port",
        str(url.port or 8000),
    ]
    if (base / "chat_template.jinja").is_file():
        argv += ["--chat-template", str(base / "chat_template.jinja")]
    if releases or engine.loads_adapters:
        argv += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(max(len(releases), 1))]
    if releases:
        argv.append("--lora-modules")
        for release in releases:
            name, path = adapter_digest(release.manifest["files"]), str(release.path)
            # vLLM splits the short form at every =
            needs_json = "=" in path or path.startswith("{")
            argv.append(json.dumps({"name": name, "path": path}) if needs_json else f"{name}={path}")
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if engine.loads_adapters else {}
    if engine.key_env:
        # not a flag, because other users of the machine could read it
        environment["VLLM_API_KEY"] = f"${engine.key_env}"
    return Launch(tuple(argv), environment)


def _check_templates(base: Path, releases: Sequence[Artifact]) -> None:
    template = model_refs.chat_template(base)
    for release in releases:
        bound = release.manifest["base"]["template_digest"]
        expected = (
            model_refs.template_digest(template) if template else releases[0].manifest["base"]["template_digest"]
        )
        if bound != expected:
            raise ModelError(
                f"{_name(release)} is bound to the chat template {bound[:12]}, and vLLM uses {expected[:12]} for "
                "every agent",
                _REMEDY,
            )


def _rank(releases: Sequence[Artifact]) -> int:
    """Return the smallest --max-lora-rank that holds every adapter's rank."""
    ranks = {_name(release): _config(release)["r"] for release in releases}
    max_rank = max(ranks.values(), default=RANKS[0])
    if fits := [rank for rank in RANKS if rank >= max_rank]:
        return fits[0]
    raise ModelError(f"{max(ranks, key=ranks.__getitem__)} has rank {max_rank}; vLLM takes up to {RANKS[-1]}", _REMEDY)


def _config(release: Artifact) -> Mapping[str, Any]:
    """Return the adapter's config. Raises ModelError for features that vLLM does not support."""
    file = release.path / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        fields = {
            f"peft_type {config['peft_type']}": config["peft_type"] != "LORA",
            "DoRA": config.get("use_dora"),
            f"bias {config.get('bias')}": config.get("bias", "none") != "none",
            "modules_to_save": config.get("modules_to_save"),
            "rank_pattern": config.get("rank_pattern"),
            "alpha_pattern": config.get("alpha_pattern"),
            "the embedding or LM head": {"lm_head", "embed_tokens"} & set(config["target_modules"]),
        }
        unfit = [feature for feature, is_so in fields.items() if is_so]
        int(config["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is no adapter's config: {error!r}", "sartor release makes it anew") from None
    if unfit:
        raise ModelError(f"{_name(release)} has {', '.join(unfit)}, which vLLM does not serve as released", _REMEDY)
    return dict(config)


def _name(release: Artifact) -> str:
    return f"{release.manifest['name']}@{release.manifest['version']}"
