"""One answer as `ask` gives it, and the training examples that its prompt is like. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rapidfuzz import fuzz, process

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact
from sartor.core.lineage import ancestry


@dataclass(frozen=True)
class SpokenFile:
    """A reply as speech. text: its spoken form. left_out: what was written and is not said as it stands, counted by kind."""

    file: str
    text: str
    seconds: float
    voice: str
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """One answer. `nearest` are training Examples like the prompt; `nearest_note` says why when there are none.

    receipt: the id of its receipt, where one is kept. spoken: the file that it was spoken into, if it was. media: of what was
    asked beside the prompt, kind and sha256.
    """

    prompt: str
    reply: str
    finish: str
    agent: str
    reason: str
    nearest: list[dict[str, Any]]
    nearest_note: str = ""
    receipt: str | None = None
    spoken: SpokenFile | None = None
    media: list[dict[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        said = {"prompt": self.prompt, "reply": self.reply, "finish": self.finish, "agent": self.agent}
        note = {"nearest_note": self.nearest_note} if self.nearest_note else {}
        spoken = {"spoken": asdict(self.spoken)} if self.spoken else {}
        media = {"media": self.media} if self.media else {}
        return {**said, "reason": self.reason, "receipt": self.receipt, "nearest": self.nearest, **note, **spoken, **media}


def nearest_examples(release: Artifact, prompt: str, top: int) -> tuple[list[dict[str, Any]], str]:
    """Training Examples whose question is most like `prompt` (0..1, by shared words and edits), and a note when there are none.

    A look-up, not attribution: it says what the model saw that resembles the question, not what made it answer so.
    """
    dataset = ancestry.find_parent(release, "dataset")
    if dataset is None:
        return [], "the Dataset is not on this machine, or was changed; `sartor index DIR` finds a moved one"
    examples = list(parquet_io.read_examples(dataset, "train"))
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
