"""Verb init: a commented curation recipe and tuning recipe for one's own data, to change and to run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError
from sartor.core.filesystem import make_parent, write_file_atomic
from sartor.curate.recipe import CurateRecipe
from sartor.curate.sources.column_options import fields_option, quoted_scalar
from sartor.curate.sources.planner import first_rows, plan_reading, tables_of
from sartor.curate.sources.row_formats import column_names, suggest_columns, unread_label
from sartor.curate.sources.types import SourceOptions
from sartor.quickstart.preview import preview
from sartor.quickstart.yaml_schemas import schema, schema_comment, schema_file

Notice = Callable[[str], object]
_CURATE = """\
# What is read, and what is done to it. `sartor curate --help` lists every option; run it with
#   sartor curate {curate} --out data/{name}
sources:
  - path: {path}
    licence: NOASSERTION  # own, or the SPDX licence of the rows; as it stands the gate lets nothing out
{fields}    # system: You answer questions about ...   # put before each row that has no system prompt
steps:
  - exact_duplicates  # the same rows once
  # - near_duplicates                          # rows that differ in a word or two
  # - {{language: [en]}}                         # other languages are dropped
  # - {{length: {{min_words: 3}}}}
  # - personal_data                            # names, addresses, numbers are masked
split:
  eval_fraction: 0.1  # held out, to measure on
"""
_TUNE = """\
# How a base is tuned. What is left out follows from rows and base, and is printed with reasons; run it with
#   sartor plan {tune}
#   sartor tune {tune} --out adapters/{name}
base: starter  # 135 million parameters; or a directory, a GGUF file, a hub name
data: data/{name}
# method: {{kind: lora, rank: 16}}
# optimizer: {{learning_rate: 1.0e-3, batch_tokens: 256}}
# budget: {{epochs: 3}}                        # or updates, tokens, minutes
"""


@dataclass(frozen=True)
class Initialized:
    """Paths of the two recipes, and of their schemas if they were written."""

    curate: Path
    tune: Path
    schemas: tuple[Path, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        schemas = {"schemas": [str(path) for path in self.schemas]} if self.schemas else {}
        return {"curate": str(self.curate), "tune": str(self.tune), **schemas}


def init(
    data: Path | str,
    *,
    out: Path | str = ".",
    schemas: bool = False,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Initialized:
    """Write `curate.yaml` and `tune.yaml` for `data` into the directory `out`, with comments on options.

    If Sartor does not know the columns of a table, the recipe names them.
    schemas: also write JSON Schemas of both, which the recipes name in their first line for editors.
    Raises ConfigError if `data` does not exist, or if one of the files does.
    """
    out = Path(out)
    files = out / "curate.yaml", out / "tune.yaml"
    schema_files = {name: out / schema_file(name) for name in ("curate", "tune")} if schemas else {}
    if (taken := [file for file in (*files, *schema_files.values()) if file.exists()]) and not replace:
        raise ConfigError(f"{taken[0]} is there already", "--replace, or --out DIR")
    source = SourceOptions(path=str(data))
    planned = plan_reading([source], CurateRecipe.max_row_bytes).files
    form = next((file.form for file in tables_of(planned) or planned if file.form != "unknown"), "")
    rows = first_rows(source, CurateRecipe.max_row_bytes) if form in ("", "text") else []
    if form and not any(map(unread_label, rows)):
        rows = []
    name = re.sub(r"[^\w.-]+", "-", Path(str(data).partition("#")[0]).stem.lower()).strip("-") or "rows"
    names = {"curate": shlex.quote(str(files[0])), "tune": shlex.quote(str(files[1])), "name": name}
    make_parent(files[0])
    texts = {
        "curate": _CURATE.format(path=quoted_scalar(str(data)), fields=_field_lines(rows), **names),
        "tune": _TUNE.format(**names),
    }
    for file, (recipe, text) in zip(files, texts.items(), strict=True):
        if recipe in schema_files:
            schema(recipe, out=schema_files[recipe], replace=replace)
            text = schema_comment(recipe) + text
        write_file_atomic(file, text.encode())
    if not form and not rows:
        for drop in preview(data, rows=1).drops:
            notice(f"warning  {drop.locator}: {drop.detail}")
    notice(f"form     {form or 'not known'}{': name the columns in ' + str(files[0]) if rows else ''}")
    return Initialized(*files, schemas=tuple(schema_files.values()))


def _field_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Return the recipe's lines about the columns of the first rows."""
    if not rows:
        return "    # fields: {prompt: COLUMN, completion: COLUMN}  # where columns have names of their own\n"
    prompt, completion = suggest_columns(rows)
    # quoted, since a line end in a name would end the comment
    listed = ", ".join(map(quoted_scalar, column_names(rows)[:12]))
    return (
        f"    # the columns are: {listed}\n"
        f"    {fields_option(prompt=prompt, completion=completion)}  # look whether these are right\n"
    )
