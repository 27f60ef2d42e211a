"""Verb ask for one Release."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sartor.core.records import Message
from sartor.evaluate.evaluation import open_tuned
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.release.release import verify_release
from sartor.serving.commands.ask_types import AskPrompt, AskReply, as_prompt, nearest_examples


def ask(
    release: Path | str,
    prompt: str | AskPrompt,
    *,
    key: Path | str | None = None,
    base: str = "",
    sampling: Sampling | Mapping[str, Any] | None = None,
    top: int = 3,
    notice: Callable[[str], object] = lambda line: None,
) -> AskReply:
    """Answer one prompt, with media where it is a Question, by a Release, after verifying it (`key` and `base` as in `verify`).

    The Release's own system prompt goes first, and its own sampling holds but for the options given. Raises what
    `verify` raises, ConfigError for an empty prompt, RequestError for media that the Release does not read, MediaError.
    """
    question = as_prompt(prompt)
    question.check(question.kinds, "")
    verified = verify_release(release, key=key, base=base)
    manifest = verified.release.manifest
    agent = f"{manifest['name']}@{manifest['version']}"
    opened, model = open_tuned(verified.release, notice, base)
    chat = opened.chat
    question.check(chat.media.kinds if chat.media else (), agent)
    system = manifest["system_prompt"]
    messages = [*([Message.of("system", system)] if system else []), question.message]
    if not isinstance(sampling, Sampling):
        sampling = Sampling(**{**manifest["sampling"], **(sampling or {})})
    generated = generate(model, [chat.prompt_ids(messages)], stop=chat.stops, pad=chat.pad, sampling=sampling)[0]
    nearest, note = nearest_examples(verified.release, question.text, top)
    reason = f"asked by name; signed by {verified.signer}"
    return AskReply(
        question.text,
        chat.decode(generated.ids),
        generated.finish,
        agent,
        reason,
        nearest,
        note,
        media=question.media_digests(),
    )
