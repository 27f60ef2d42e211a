"""Data card of a Dataset: content, sources, and removed rows with their reasons.

    card.md         with the Hub's YAML head; its plots are `card/*.svg`
    card.html       the same on one page
    croissant.json  machine-readable metadata

All are pure functions of the Dataset's files and facts: no clock, no path, no name of a machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.curate.card import metadata as croissant
from sartor.curate.card import metadata as hub
from sartor.curate.card import plots, render
from sartor.curate.card import sections as story
from sartor.curate.card.blocks import Block, Folded, Pictures, Plot, Section
from sartor.curate.card.card_data import gather


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the card of the Dataset that is being filled at `folder`.

    facts: the facts of its manifest.

    It reads `examples/`, `drops/`, `evidence/` and `media/` in batches. Call it before the directory is sealed.
    """
    contents = gather(folder, facts)
    sections, pictures = _with_unique_names(story.sections(contents))
    (folder / "card").mkdir(exist_ok=True)
    for picture in pictures:
        _write(folder / "card" / f"{picture.name}.svg", plots.standalone(picture))
    _write(folder / "card.md", render.render_markdown(contents.name, hub.head(contents), sections))
    _write(folder / "card.html", render.render_html(contents.name, sections))
    metadata = croissant.describe(contents)
    _write(folder / "croissant.json", json.dumps(metadata, indent=1, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def _with_unique_names(sections: Sequence[Section]) -> tuple[list[Section], list[Plot]]:
    """Return the sections with unique names for all plots, and the plots.

    Names of steps and rules may collide as file names.
    """
    used: dict[str, Plot] = {}

    def named(block: Block) -> Block:
        if isinstance(block, Plot):
            name, number = block.name, 2
            while name in used:
                name, number = f"{block.name}-{number}", number + 1
            used[name] = dataclasses.replace(block, name=name)
            return used[name]
        if isinstance(block, Pictures):
            return Pictures([picture for each in block.shown if isinstance(picture := named(each), Plot)])
        if isinstance(block, Folded):
            return Folded(block.summary, [named(each) for each in block.blocks])
        return block

    renamed = []
    for section in sections:
        renamed.append(Section(section.title, [named(block) for block in section.blocks]))
    return renamed, list(used.values())
