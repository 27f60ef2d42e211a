"""What every step does and takes, as Markdown, from the declarations themselves: the help text, and docs/steps.md.

python -m sartor.curate.steps.reference > docs/steps.md
"""

from __future__ import annotations

import inspect
from typing import get_args

from sartor.core import config
from sartor.curate.steps import AnyCopyStep, AnyRowStep, AnySetStep

_HEAD = """# Steps of a curation recipe

Made from the declarations in `src/sartor/curate/steps/` by `python -m sartor.curate.steps.reference`; a test holds it to them.

Steps act in the order in which the recipe names them. A step is written `length`, `{length: {min_words: 3}}` or
`{kind: length, min_words: 3}`; a scalar or list stands for its first option (`{language: [en]}`).
"""

_UNIONS = {
    "Steps that look at one row": AnyRowStep,
    "Steps that compare rows": AnySetStep,
    "Steps that copy training rows": AnyCopyStep,
}


def lines(*, table: bool) -> list[str]:
    """Every step with its options: as tables, or as the plain list of a help text."""
    found = []
    for title, union in _UNIONS.items():
        found += [f"## {title}", ""]
        for cls in get_args(union):
            kind = next(field.default for field in cls.__dataclass_fields__.values() if field.name == "kind")
            options = list(config.describe(cls))
            found += [f"### {kind}" if table else f"**{kind}**", "", inspect.cleandoc(cls.__doc__ or ""), ""]
            if table and options:
                found += ["| option | type, default | |", "|---|---|---|"]
            for name, type_and_default, text in options:
                cells = [cell.replace("|", "\\|") for cell in (type_and_default, text)]
                found.append(f"| `{name}` | {cells[0]} | {cells[1]} |" if table else f"- `{name}` ({type_and_default}): {text}")
            found.append("")
    return found


def reference() -> str:
    """The page."""
    return "\n".join([_HEAD, *lines(table=True)]).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201
