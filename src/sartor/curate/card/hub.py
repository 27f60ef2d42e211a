"""What the Hugging Face Hub reads from the head of a card. Spec: https://huggingface.co/docs/hub/datasets-cards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sartor.core.licences.spdx import UNKNOWN
from sartor.curate.card.contents import Contents
from sartor.curate.card.story import known_languages

# SPDX id -> the Hub's word, where that is not the SPDX id in small letters
_RENAMED = {
    "ODC-By-1.0": "odc-by",
    "ODbL-1.0": "odbl",
    "PDDL-1.0": "pddl",
    "BSL-1.0": "bsl-1.0",
    **{f"{family}-{version}-{ending}": f"{family.lower()}-{version}"
       for family, version in (("GPL", "2.0"), ("GPL", "3.0"), ("LGPL", "2.1"), ("LGPL", "3.0"), ("AGPL", "3.0"))
       for ending in ("only", "or-later")},
}  # fmt: skip
_KNOWN = """
    apache-2.0 mit afl-3.0 artistic-2.0 bsl-1.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gpl-2.0 gpl-3.0 lgpl-2.1 lgpl-3.0 isc lppl-1.3c
    ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
"""
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"))  # fmt: skip


def head(contents: Contents) -> dict[str, Any]:
    """The YAML head: pretty name, licence, languages, size, tasks, and where the rows lie."""
    found: dict[str, Any] = {"pretty_name": contents.name[:120], **_licence(contents.licence)}
    if languages := known_languages(contents):
        found["language"] = languages
    found["size_categories"] = [next((word for most, word in _SIZES if contents.kept < most), "100B<n<1T")]
    found["task_categories"] = _tasks(contents)
    found["tags"] = ["sartor", "fine-tuning"]
    configs = [_config("default", "examples/*.parquet", default=True)]
    if contents.drops.total:
        configs.append(_config("drops", "drops/*.parquet"))
    found["configs"] = configs
    return found


def _config(name: str, path: str, *, default: bool = False) -> dict[str, Any]:
    files = [{"split": "train", "path": path}]
    return {"config_name": name, "data_files": files, **({"default": True} if default else {})}


def _licence(expression: str) -> dict[str, Any]:
    """The Hub's words for an SPDX expression; `other` and the expression where it has none."""
    if expression == UNKNOWN:
        return {"license": "unknown"}
    words = [_RENAMED.get(part, part.lower()) for part in conjuncts(expression)]
    if words and set(words) <= set(_KNOWN.split()):
        unique = list(dict.fromkeys(words))
        return {"license": unique[0] if len(unique) == 1 else unique}
    return {"license": "other", "license_name": expression[:200], "license_link": "manifest.json"}


def conjuncts(expression: str) -> Sequence[str]:
    """The ids that an expression joins by AND; the whole expression where it offers a choice."""
    return re.split(r" AND ", expression) if " OR " not in expression else [expression]


def _tasks(contents: Contents) -> list[str]:
    media = contents.rows.media
    tasks = ["text-generation"]
    if media["image"]:
        tasks.append("image-text-to-text")
    if media["audio"]:
        tasks.append("audio-text-to-text")
    return tasks
