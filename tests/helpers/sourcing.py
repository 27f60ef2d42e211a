"""What the tests of sources share: every row of some sources, read unit by unit as workers do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sartor.core.records import Drop, Example
from sartor.curate.sources.chunk_reader import chunk_of_json, read_chunk
from sartor.curate.sources.planner import ReadPlan, plan_reading
from sartor.curate.sources.types import SourceOptions


class Rows:
    """Examples and Drops of some sources, the plan and the notes."""

    def __init__(
        self, media: Path, *sources: SourceOptions | str | Path, most: int = 4 << 20, strict: bool = False
    ) -> None:
        declared = [
            source if isinstance(source, SourceOptions) else SourceOptions(str(source), licence="MIT")
            for source in sources
        ]
        self.plan: ReadPlan = plan_reading(declared, most)
        self.notes: Counter[tuple[str, str]] = Counter()
        self.media = media
        self.all: list[Example | Drop] = []
        for unit in self.plan.chunks:
            travelled = chunk_of_json(json.loads(json.dumps(unit.as_json())))
            assert travelled == unit and travelled.digest == unit.digest
            self.all += read_chunk(travelled, declared[unit.source], media, strict, self.notes)
        self.kept = [row for row in self.all if isinstance(row, Example)]
        self.drops = [row for row in self.all if isinstance(row, Drop)]

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(drop.reason for drop in self.drops))

    @property
    def replies(self) -> list[str]:
        return [row.reply for row in self.kept]

    @property
    def places(self) -> list[str]:
        return [row.origins[0].locator for row in self.kept]


def chat(prompt: Any, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def tree(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*")}


def pdf(*pages: str) -> bytes:
    """A PDF with a text on each page, by hand."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        resources = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {resources} /Contents {5 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    return assembled([text.encode() for text in objects])


def assembled(objects: list[bytes]) -> bytes:
    """PDF objects, numbered from 1, with their table. The first is the catalogue."""
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
