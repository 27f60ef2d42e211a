"""Verb ask for one Release, or for an Adapter that no gate has passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sartor.core.artifacts import Adapter, ArtifactPath, open_artifact
from sartor.core.errors import ConfigError
from sartor.evaluate import training_facts
from sartor.inference.engine import Sampling
from sartor.models.tuned_model import open_tuned
from sartor.release.release import verify_release
from sartor.serving.commands.ask_types import AskPrompt, AskReply, as_prompt, nearest_examples
from sartor.serving.commands.loaded_adapter import ADAPTER_SAMPLING, LoadedAdapter


def ask(
    release: ArtifactPath,
    prompt: str | AskPrompt,
    *,
    key: Path | str | None = None,
    base: str = "",
    sampling: Sampling | Mapping[str, Any] | None = None,
    top: int = 3,
    notice: Callable[[str], object] = lambda line: None,
) -> AskReply:
    """Answer one prompt, with or without media, by a Release, after verifying it.

    key, base: as in `verify`.
    The Release's own system prompt comes first, and its own sampling applies except for the given options. An Adapter
    answers under its directory's name, with the system prompt that most of its rows have. Its bytes are checked, but
    nobody has signed them, and the reply is marked as unreleased.
    Raises what `verify` raises, ConfigError for an empty prompt, RequestError for media that the Release does not
    read, MediaError.
    """
    question = as_prompt(prompt)
    question.check(question.kinds, "")
    artifact = open_artifact(release, ("release", "adapter"))
    is_released = artifact.kind == "release"
    if is_released:
        verified = verify_release(artifact.path, key=key, base=base)
        manifest = artifact.manifest
        agent, reason = f"{manifest['name']}@{manifest['version']}", f"asked by name; signed by {verified.signer}"
        system, defaults = manifest["system_prompt"], manifest["sampling"]
    else:
        if key is not None:
            raise ConfigError(
                f"{artifact.path} is an Adapter, which nobody has signed", "leave --public-key out, or ask its Release"
            )
        assert isinstance(artifact, Adapter)
        agent, reason = artifact.name, "asked by its directory; unreleased: no gate has passed it"
        system, defaults = training_facts.read_facts(artifact).system_prompt, ADAPTER_SAMPLING
        notice(f"{artifact.path} is an Adapter, not a Release: no gate has checked it")
    opened, model = open_tuned(artifact, notice, base)
    reply = LoadedAdapter(model, opened.chat, agent, system, defaults).replies([question], sampling)[0]
    nearest, note = nearest_examples(artifact, question.text, reply.text, top, question.media)
    return AskReply(
        prompt=question.text,
        reply=reply.text,
        finish=reply.finish,
        agent=agent,
        reason=reason,
        nearest=nearest,
        nearest_note=note,
        media=question.media_digests(),
        is_released=is_released,
    )
