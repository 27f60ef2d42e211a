"""Datasets with pictures and recordings, whole and hostile, made in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from media_files import png, sound
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.parquet_io import write_drops, write_examples
from sartor.core.records import Example, Message, Origin, Part

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HTML = b"<!doctype html><script>alert(1)</script>"
FILES: Mapping[str, bytes] = {
    "media/picture.png": png(),
    "media/sound.wav": sound(0.2),
    "media/drawing.svg": SVG,
    "media/drawing.png": SVG,
    "media/page.jpg": HTML,
    "media/unnamed.png": png(10),
}


def media_row(kind: str, path: str, text: str = "what is it", reply: str = "a thing") -> Example:
    question = Message("user", (Part(kind, media=path), Part("text", text)))  # type: ignore[arg-type]
    return Example((question, Message.of("assistant", reply)), (Origin("rows", f"rows:{path}"),), split="eval")


def media_dataset(path: Path, rows: Sequence[Example], files: Mapping[str, bytes] = FILES) -> Artifact:
    """A Dataset of these rows with these files, also of ones that `curate` would refuse."""

    def fill(part: Path) -> dict[str, object]:
        for name, content in files.items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_bytes(content)
        write_examples(part / "examples/0.parquet", rows)
        write_drops(part / "drops/0.parquet", [])
        counts = {"splits": {"eval": len(rows)}, "dropped": {}, "read": len(rows), "kept": len(rows), "made": 0}
        return {"licence": "MIT", "parents": [], "counts": counts}

    return write_artifact(path, "dataset", fill)
