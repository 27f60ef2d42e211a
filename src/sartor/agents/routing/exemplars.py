"""What the router is fitted on: the exemplars that each Release brings, and general prompts that are no agent's business."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from sartor.core import records
from sartor.core.errors import ArtifactError
from sartor.evaluate.training import EXEMPLARS, OTHER

MOST_BYTES = 4 << 20
MOST_LINES = 2_000
# Of a text; of a longer one the beginning and the end, where questions stand
MOST_CHARACTERS = 2_000


@dataclass(frozen=True)
class Prompt:
    """An exemplar and where it stands: `agent:line` of its Release's file."""

    id: str
    text: str


@dataclass(frozen=True)
class Exemplars:
    """Of one agent: prompts that its tuning saw, prompts that it never saw, and prompts among its rows that are not for it."""

    train: tuple[Prompt, ...] = ()
    held_out: tuple[Prompt, ...] = ()
    other: tuple[Prompt, ...] = ()


def read(release: Path, agent: str) -> Exemplars:
    """The exemplars of a Release; none for one without any (`sartor release --exemplars 0`, or an older Release).

    Raises ArtifactError for a file that has another form.
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
    return Exemplars(tuple(found["train"]), tuple(found["eval"]), tuple(found[OTHER]))


@cache
def general() -> Mapping[str, tuple[Prompt, ...]]:
    """Sartor's own general prompts, by kind (general.yaml)."""
    text = importlib.resources.files("sartor").joinpath("agents/routing/general.yaml").read_text(encoding="utf-8")
    return {
        kind: tuple(Prompt(f"{kind}:{number}", str(prompt)) for number, prompt in enumerate(prompts, 1))
        for kind, prompts in yaml.safe_load(text).items()
    }


def digest(agents: Mapping[str, Exemplars]) -> str:
    """Equal exactly when the same agents have the same exemplars, and the general prompts are the same."""
    said = {name: [[one.text for one in part] for part in vars(found).values()] for name, found in agents.items()}
    kinds = {kind: [one.text for one in prompts] for kind, prompts in general().items()}
    return records.digest([said, kinds])


def shortened(text: str) -> str:
    """A text as it is compared: of a long one the beginning and the end."""
    text = text.encode("utf-8", "replace").decode().strip()  # a client may send half a surrogate pair
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} {text[-half:]}"
