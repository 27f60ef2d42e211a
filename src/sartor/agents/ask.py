"""Release + prompt -> Reply: one answer, which release gave it, and which training examples are nearest to the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfuzz import fuzz, process

from sartor.core import lineage, rows
from sartor.core.artifacts import Artifact
from sartor.core.errors import ConfigError
from sartor.core.records import Message
from sartor.evaluate.release import verify
from sartor.evaluate.tasks import open_tuned
from sartor.models.generate import generate
from sartor.models.sampling import Sampling


@dataclass(frozen=True)
class Reply:
    """One answer. `nearest` are training Examples like the prompt; `nearest_note` says why when there are none."""

    prompt: str
    reply: str
    finish: str
    agent: str
    reason: str
    nearest: list[dict[str, Any]]
    nearest_note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        said = {"prompt": self.prompt, "reply": self.reply, "finish": self.finish, "agent": self.agent}
        note = {"nearest_note": self.nearest_note} if self.nearest_note else {}
        return {**said, "reason": self.reason, "receipt": None, "nearest": self.nearest, **note}


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
    verified = verify(release, key=key, base=base)
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


def nearest_examples(release: Artifact, prompt: str, top: int) -> tuple[list[dict[str, Any]], str]:
    """Training Examples whose question is most like `prompt` (0..1, by shared words and edits), and a note when there are none.

    A look-up, not attribution: it says what the model saw that resembles the question, not what made it answer so.
    """
    dataset = lineage.find_parent(release, "dataset")
    if dataset is None:
        return [], "the Dataset is not on this machine, or was changed; `sartor index DIR` finds a moved one"
    examples = list(rows.read_examples(dataset, "train"))
    asked = [example.prompt[-1].text if example.prompt else example.reply for example in examples]
    # shared words find candidates whatever their order; the mean with the edit similarity puts whole questions before parts
    shared = process.extract(prompt, asked, scorer=fuzz.token_set_ratio, processor=str.lower, limit=20 * top)
    scored = [((score + fuzz.ratio(prompt.lower(), text.lower())) / 2, place) for text, score, place in shared]
    found = sorted(scored, key=lambda pair: -pair[0])[:top]
    return [
        {
            "id": examples[place].id,
            "score": round(score / 100, 4),
            "prompt": asked[place],
            "reply": examples[place].reply,
            "source": examples[place].origins[0].source,
            "locator": examples[place].origins[0].locator,
            "licence": examples[place].origins[0].licence,
        }
        for score, place in found
    ], ""
