"""Tunings that were not started: recipes and forecasts on disk, so that each has a page.

    .studio/drafts/ID/draft.json   values of the form, Datasets, jobs of the forecasts
    .studio/drafts/ID/0.yaml       recipe of the first Dataset, and so on

The id is the digest of values and Datasets: the same form is the same draft, with the forecast that it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sartor.core.filesystem import PRIVATE, write_file_atomic
from sartor.core.records import digest
from sartor.serving.http.http_errors import NotFoundError
from sartor.studio.jobs.job_files import read_json, write_json

DRAFT = "draft.json"
_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class TuningDraft:
    """A form that passed its checks.

    values: text of each field by its key. datasets: names below the studio's folder. name: of what it will make.
    recipe: options that differ from their defaults, without the Dataset.
    plans: job of the forecast by Dataset.
    """

    id: str
    values: Mapping[str, str]
    datasets: Sequence[str]
    name: str
    recipe: Mapping[str, Any]
    plans: Mapping[str, str] = field(default_factory=dict)


class TuningDrafts:
    """Folder of drafts. root: of the artefacts."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder, self._root = folder, root

    def save(
        self, values: Mapping[str, str], datasets: Sequence[str], *, name: str, recipe: Mapping[str, Any]
    ) -> TuningDraft:
        """Write a draft with its recipes, and return it with the forecasts that it has already."""
        draft_id = digest([dict(values), list(datasets)])[:16]
        plans = read_json(self._folder / draft_id / DRAFT).get("plans", {})
        draft = TuningDraft(draft_id, values, datasets, name, recipe, plans)
        for index, dataset in enumerate(datasets):
            text = self.recipe_text(draft, dataset).encode()
            write_file_atomic(self._folder / draft_id / f"{index}.yaml", text, mode=PRIVATE)
        self._write(draft)
        return draft

    def with_plans(self, draft: TuningDraft, plans: Mapping[str, str]) -> TuningDraft:
        """Write which jobs forecast a draft."""
        changed = TuningDraft(
            draft.id, draft.values, draft.datasets, name=draft.name, recipe=draft.recipe, plans=plans
        )
        self._write(changed)
        return changed

    def load(self, draft_id: str) -> TuningDraft:
        """Return a draft. Raises NotFoundError."""
        fields = read_json(self._folder / draft_id / DRAFT) if _ID.fullmatch(draft_id) else {}
        try:
            return TuningDraft(**{**fields, "id": draft_id})
        except TypeError:
            raise NotFoundError(f"there is no draft {draft_id[:40]!a}", "begin anew on the page Tune") from None

    def recipe_file(self, draft: TuningDraft, dataset: str) -> Path:
        """Return the YAML file of a Dataset's recipe."""
        return self._folder / draft.id / f"{list(draft.datasets).index(dataset)}.yaml"

    def recipe_text(self, draft: TuningDraft, dataset: str) -> str:
        """Return the YAML of a Dataset's recipe: what differs from the defaults."""
        options: dict[str, Any] = json.loads(json.dumps(dict(draft.recipe)))
        ordered = {"base": options.pop("base"), "data": {"path": str(self._root / dataset)}}
        ordered["data"] |= options.pop("data", {})
        return str(yaml.safe_dump(ordered | options, sort_keys=False, allow_unicode=True))

    def _write(self, draft: TuningDraft) -> None:
        write_json(self._folder / draft.id / DRAFT, vars(draft))
