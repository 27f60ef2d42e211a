"""Short forms of results for notebooks: one line as text, and a small table as HTML."""

from __future__ import annotations

from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.lazy_import import import_module


class ShownResult:
    """Base of a verb's result: a dataclass with `as_json`, and `table` where its command prints one."""

    def __repr__(self) -> str:
        """Return one line: the class and its artefacts."""
        artifacts = (f"{name}={value!r}" for name, value in vars(self).items() if isinstance(value, Artifact))
        return f"{type(self).__name__}({', '.join(artifacts)})"

    def _repr_html_(self) -> str:
        """Return what the command line prints, as a table."""
        html = import_module("sartor.core.html")
        table = getattr(self, "table", None)
        facts: dict[str, Any] = {}
        for name, value in table() if table else html.flat(self.as_json()).items():
            # of several lines with one name (`next`) each is shown
            facts[name] = f"{facts[name]}\n{value}" if name in facts else value
        shown: str = html.facts_table(type(self).__name__, facts)
        return shown

    def as_json(self) -> dict[str, Any]:
        """Return the JSON of the command."""
        raise NotImplementedError
