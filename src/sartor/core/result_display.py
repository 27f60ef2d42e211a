"""Short forms of results for notebooks: one line as text, and a small table as HTML."""

from __future__ import annotations

from sartor.core.artifacts import Artifact
from sartor.core.lazy_import import import_module


class ShownResult:
    """Base of a verb's result: a dataclass of artefacts and facts, with `table` where its command prints one."""

    def __repr__(self) -> str:
        """Return one line: the class and its artefacts."""
        artifacts = (f"{name}={artifact!r}" for name, artifact in self._artifacts().items())
        return f"{type(self).__name__}({', '.join(artifacts)})"

    def _repr_html_(self) -> str:
        """Return the table that the command line prints, or those of the artefacts."""
        table = getattr(self, "table", None)
        if table is None:
            return "".join(artifact._repr_html_() for artifact in self._artifacts().values())
        facts: dict[str, str] = {}
        html = import_module("sartor.core.html")
        name = ""
        for label, value in table():
            # a line without a label goes on with the one before it
            name, text = label or name, html.format_value(value)
            facts[name] = f"{facts[name]}\n{text}" if name in facts else text
        shown: str = html.facts_table(type(self).__name__, facts)
        return shown

    def _artifacts(self) -> dict[str, Artifact]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Artifact)}
