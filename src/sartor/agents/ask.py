"""Release + prompt -> Reply: one answer, which release gave it, and which training examples are nearest to the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sartor.agents.reply import Reply, nearest_examples
from sartor.core.errors import ConfigError
from sartor.core.records import Message
from sartor.evaluate.release import verify_release
from sartor.evaluate.tasks import open_tuned
from sartor.models.generate import generate
from sartor.models.sampling import Sampling


def ask(
    release: Path | str,
    prompt: str,
    *,
    key: Path | str | None = None,
    base: str = "",
    sampling: Sampling | Mapping[str, Any] | None = None,
    top: int = 3,
    notice: Callable[[str], object] = lambda line: None,
) -> Reply:
    """Answer one prompt with a Release, after verifying it (`key` and `base` as in `verify`).

    The Release's own system prompt goes first, and its own sampling holds but for the options given. Raises what
    `verify` raises, and ConfigError for an empty prompt.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty", 'sartor ask RELEASE "a question"')
    verified = verify_release(release, key=key, base=base)
    manifest = verified.release.manifest
    opened, model = open_tuned(verified.release, notice, base)
    system = manifest["system_prompt"]
    messages = [*([Message.of("system", system)] if system else []), Message.of("user", prompt)]
    chat = opened.chat
    if not isinstance(sampling, Sampling):
        sampling = Sampling(**{**manifest["sampling"], **(sampling or {})})
    made = generate(model, [chat.prompt_ids(messages)], stop=chat.stops, pad=chat.pad, sampling=sampling)[0]
    nearest, note = nearest_examples(verified.release, prompt, top)
    agent = f"{manifest['name']}@{manifest['version']}"
    reason = f"asked by name; signed by {verified.signer}"
    return Reply(prompt, chat.decode(made.ids), made.finish, agent, reason, nearest, note)
