"""Tables that benchmarks write into documents, between markers."""

from __future__ import annotations

from pathlib import Path


def write(file: Path, name: str, text: str) -> None:
    """Put `text` between the markers of that name."""
    before, _, rest = file.read_text().partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- /{name} -->")
    file.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")
