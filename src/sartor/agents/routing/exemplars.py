"""What the router is fitted on: the exemplars that each Release brings, and general prompts that are no agent's business."""

from __future__ import annotations

import importlib.resources
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from sartor.agents.routing.lift import Gain
from sartor.agents.routing.lift import read as read_gain
from sartor.core import records
from sartor.core.errors import ArtifactError
from sartor.evaluate.training_facts import EXEMPLARS, OTHER

MOST_BYTES = 4 << 20
MOST_LINES = 2_000
# Of a text; of a longer one the beginning and the end, where questions stand
MOST_CHARACTERS = 2_000
FOLDS = 5


@dataclass(frozen=True)
class Prompt:
    """An exemplar and where it stands: `agent:line` of its Release's file."""

    id: str
    text: str


@dataclass(frozen=True)
class Exemplars:
    """Of one agent: prompts that its tuning saw, prompts that it never saw, and prompts among its rows that are not for it.

    gain: what its Report measured; None where there is no Report.
    """

    train: tuple[Prompt, ...] = ()
    held_out: tuple[Prompt, ...] = ()
    other: tuple[Prompt, ...] = ()
    gain: Gain | None = None


def read(release: Path, agent: str) -> Exemplars:
    """The exemplars of a Release; none for one without any (`sartor release --exemplars 0`, or an older Release).

    With what its Report measured, where it is a whole Release. Raises ArtifactError for a file that has another form.
    """
    file = release / EXEMPLARS
    if not file.is_file():
        return Exemplars()
    remedy = "release it again"
    if file.stat().st_size > MOST_BYTES:
        raise ArtifactError(f"{file} has {file.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read", remedy)
    found: dict[str, list[Prompt]] = {"train": [], "eval": [], OTHER: []}
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[:MOST_LINES], 1):
            said = json.loads(line)
            if text := str(said["text"]).strip():
                found[said["split"]].append(Prompt(f"{agent}:{number}", text))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{file} is not a file of exemplars: {type(error).__name__}: {error}", remedy) from None
    return Exemplars(tuple(found["train"]), tuple(found["eval"]), tuple(found[OTHER]), read_gain(release))


@cache
def general() -> Mapping[str, tuple[Prompt, ...]]:
    """Sartor's own general prompts, by kind (general.yaml)."""
    text = importlib.resources.files("sartor").joinpath("agents/routing/general.yaml").read_text(encoding="utf-8")
    return {
        kind: tuple(Prompt(f"{kind}:{number}", str(prompt)) for number, prompt in enumerate(prompts, 1))
        for kind, prompts in yaml.safe_load(text).items()
    }


def digest(found: Exemplars) -> str:
    """Equal exactly when an agent has the same exemplars under the same name and the general prompts are the same."""
    parts = [[(one.id, one.text) for one in part] for part in (found.train, found.held_out, found.other)]
    gain = [(row.prompt, row.label, row.gain) for row in found.gain.rows] if found.gain else None
    return records.digest([parts, gain, general_digest()])


def general_digest() -> str:
    """Of the general prompts."""
    return records.digest({kind: [one.text for one in prompts] for kind, prompts in general().items()})


def fold(kind: str) -> int:
    """Which of FOLDS a kind of general prompts is left out with."""
    return zlib.crc32(kind.encode()) % FOLDS


def shortened(text: str) -> str:
    """A text as it is compared: of a long one the beginning and the end."""
    text = text.encode("utf-8", "replace").decode().strip()  # a client may send half a surrogate pair
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} {text[-half:]}"
